"""Objectives against T5's known lengths, and the laws that any noise must keep."""

import numpy as np
import pytest

from prompt_tuning_jax.data import objectives

SENTINELS = list(range(1099, 999, -1))
EOS = 1


def rng(seed=0):
  return np.random.default_rng(seed)


def restore(inputs, targets):
  """Puts the dropped spans back in place of their sentinels."""
  spans, current = {}, None
  for token in targets[:-1]:
    if token in SENTINELS:
      current = spans.setdefault(int(token), [])
    else:
      current.append(int(token))
  restored = []
  for token in inputs[:-1]:
    restored += spans[int(token)] if token in SENTINELS else [int(token)]
  return restored


@pytest.mark.parametrize(
    'input_length, expected', [(512, (568, 114)), (128, (141, 29)), (64, (70, 14))]
)
def test_lengths_are_those_of_t5(input_length, expected):
  """512 → 568 and 114 is what T5 prints; 141/29 and 70/14 are worked by hand.

  141: round(21.15) = 21 noise tokens in round(7) spans: 141 - 21 + 7 + 1 = 128.
  70: round(10.5) = 10 (half to even) in round(3.33) = 3: 70 - 10 + 3 + 1 = 64.
  """
  assert objectives.span_corruption_lengths(input_length) == expected


def test_half_density_gives_targets_no_longer_than_inputs():
  # 191 tokens would give 96 of noise in 32 spans: 128 inputs, but 129 targets.
  raw_length, target_length = objectives.span_corruption_lengths(128, 0.5, 3.0)
  assert (raw_length, target_length) == (190, 128)
  example = objectives.span_corruption(
      np.arange(2, 2 + raw_length),
      rng(),
      noise_density=0.5,
      sentinel_ids=SENTINELS,
      eos_id=EOS,
  )
  assert len(example['targets']) == target_length


@pytest.mark.parametrize('input_length', [3, 4, 5, 17, 64, 128, 200, 512])
def test_a_chunk_of_the_raw_length_fills_inputs_and_targets_exactly(input_length):
  raw_length, target_length = objectives.span_corruption_lengths(input_length)
  example = objectives.span_corruption(
      np.full(raw_length, 7), rng(), sentinel_ids=SENTINELS, eos_id=EOS
  )
  longer, _ = objectives.span_corruption_lengths(input_length + 1)
  assert len(example['inputs']) <= input_length < len(example['inputs']) + 2
  assert len(example['targets']) == target_length
  assert longer >= raw_length


def test_putting_the_dropped_spans_back_gives_the_text():
  tokens = np.arange(2, 570)
  for seed in range(20):
    example = objectives.span_corruption(
        tokens, rng(seed), sentinel_ids=SENTINELS, eos_id=EOS
    )
    assert restore(example['inputs'], example['targets']) == tokens.tolist()


def test_sentinels_count_down_and_both_sides_end_in_eos():
  example = objectives.span_corruption(
      np.arange(2, 570), rng(), sentinel_ids=SENTINELS, eos_id=EOS
  )
  for side in example.values():
    assert side.dtype == np.int32
    assert side[-1] == EOS
    assert [t for t in side if t >= 1000] == SENTINELS[:28]
  assert example['inputs'][0] == 2, 'the first span is kept'
  assert example['targets'][0] == SENTINELS[0]


def test_spans_are_replaced_as_in_the_example_of_the_docstring():
  tokens = np.array([[11, 12, 13, 14, 15, 16]])
  noise = np.array([[False, True, True, False, False, True]])
  inputs = objectives.replace_spans_with_sentinels(tokens, noise, SENTINELS)
  targets = objectives.replace_spans_with_sentinels(tokens, ~noise, SENTINELS)
  np.testing.assert_array_equal(inputs, [[11, 1099, 14, 15, 1098]])
  np.testing.assert_array_equal(targets, [[1099, 12, 13, 1098, 16]])


def test_noise_masks_have_the_counts_of_t5_and_no_empty_span():
  masks = objectives.random_spans_noise_masks(568, [rng(i) for i in range(50)])
  assert masks.shape == (50, 568)
  assert set(masks.sum(axis=1)) == {85}
  starts = masks[:, 1:] & ~masks[:, :-1]
  assert set(starts.sum(axis=1)) == {28}
  assert not masks[:, 0].any() and masks[:, -1].all()


def test_every_place_is_noise_about_equally_often():
  """Away from the ends, which T5's masks favour (the last) or spare (the first)."""
  masks = objectives.random_spans_noise_masks(100, [rng(i) for i in range(4000)])
  interior = masks.mean(axis=0)[10:90]
  assert interior.min() > 0.10 and interior.max() < 0.20


def test_every_segmentation_is_equally_likely():
  """Four items in two segments: cuts after 1, 2 and 3 items, each in a third of cases."""
  ends = objectives._random_segment_ends(4, 2, [rng(i) for i in range(3000)])
  counts = np.bincount(ends[:, 0], minlength=4)
  assert counts[0] == 0
  np.testing.assert_allclose(counts[1:] / 3000, 1 / 3, atol=0.03)


@pytest.mark.parametrize('length', [2, 3, 4])
def test_the_shortest_texts_keep_one_token_and_mask_one(length):
  example = objectives.span_corruption(
      np.arange(2, 2 + length), rng(), sentinel_ids=SENTINELS, eos_id=EOS
  )
  assert restore(example['inputs'], example['targets']) == list(range(2, 2 + length))
  assert len(example['targets']) == 3


def test_the_same_generator_gives_the_same_example_alone_or_in_a_batch():
  tokens = np.arange(2, 202).reshape(2, 100)
  inputs, targets = objectives.corrupt_spans(
      tokens, [rng(3), rng(4)], sentinel_ids=SENTINELS, eos_id=EOS
  )
  alone = objectives.span_corruption(tokens[1], rng(4), sentinel_ids=SENTINELS, eos_id=EOS)
  np.testing.assert_array_equal(inputs[1], alone['inputs'])
  np.testing.assert_array_equal(targets[1], alone['targets'])


def test_too_few_sentinels_is_an_error_that_says_how_many_are_needed():
  with pytest.raises(ValueError, match='28 noise spans .* has 10'):
    objectives.span_corruption(
        np.full(568, 7), rng(), sentinel_ids=SENTINELS[:10], eos_id=EOS
    )


@pytest.mark.parametrize('density', [0.0, 1.0, -0.1])
def test_a_density_out_of_range_is_refused(density):
  with pytest.raises(ValueError, match='noise_density'):
    objectives.span_corruption_lengths(64, noise_density=density)


def test_a_span_length_below_one_and_texts_or_inputs_too_short_are_refused():
  with pytest.raises(ValueError, match='mean_noise_span_length'):
    objectives.span_corruption_lengths(64, mean_noise_span_length=0.5)
  with pytest.raises(ValueError, match='input_length=2'):
    objectives.span_corruption_lengths(2)
  with pytest.raises(ValueError, match='at least 2 tokens'):
    objectives.span_corruption(np.array([5]), rng(), sentinel_ids=SENTINELS, eos_id=EOS)


def test_prefix_lm_is_the_text_cut_in_two():
  tokens = np.arange(2, 65)
  splits = set()
  for seed in range(400):
    example = objectives.prefix_lm(tokens, rng(seed), eos_id=EOS)
    inputs, targets = example['inputs'], example['targets']
    assert inputs[-1] == EOS and targets[-1] == EOS
    np.testing.assert_array_equal(np.concatenate([inputs[:-1], targets[:-1]]), tokens)
    splits.add(len(inputs) - 1)
  assert min(splits) == 1 and max(splits) == 62, 'every split leaves a token on each side'
  assert len(splits) > 55


def test_prefix_lm_respects_the_maximal_lengths():
  tokens = np.arange(2, 97)
  for seed in range(100):
    example = objectives.prefix_lm(
        tokens,
        rng(seed),
        eos_id=EOS,
        max_input_length=96,
        max_target_length=32,
        sentinel_id=1099,
    )
    assert len(example['inputs']) <= 96 and len(example['targets']) <= 32
    assert example['targets'][0] == 1099


def test_prefix_lm_without_any_possible_split_is_an_error():
  with pytest.raises(ValueError, match='100 tokens cannot be split'):
    objectives.prefix_lm(
        np.arange(100), rng(), eos_id=EOS, max_input_length=32, max_target_length=32
    )
  with pytest.raises(ValueError, match='1 tokens cannot be split'):
    objectives.prefix_lm(np.array([5]), rng(), eos_id=EOS)
