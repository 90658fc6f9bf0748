"""Pretraining batches are a pure function of (seed, step) and lose no data."""

import warnings

import jax
import numpy as np
import pytest

from prompt_tuning_jax.data import objectives
from prompt_tuning_jax.data.pretraining import Component, PretrainingBatches
from prompt_tuning_jax.data.tokenized_task import TokenizedTask


class FakeVocabulary:
  """What pretraining and `TokenizedTask` ask of a vocabulary, without a file."""

  path = 'fake.model'
  fingerprint = 'fake' * 16
  sentinel_ids = list(range(1099, 999, -1))
  eos_id = 1
  size = 1100

  def decode(self, ids):
    return ' '.join(map(str, ids))


VOCABULARY = FakeVocabulary()


def source_of(examples):
  features = [name for name in ('inputs', 'targets') if name in examples[0]]
  return TokenizedTask.from_examples(examples, VOCABULARY, features=features)


def text_source(num_documents=40, seed=0):
  rng = np.random.default_rng(seed)
  return source_of([
      {'targets': np.append(rng.integers(3, 900, rng.integers(5, 90)), 1)}
      for _ in range(num_documents)
  ])


def pairs(num_pairs=30):
  return [
      {'inputs': [100 + i, 200 + i, 1], 'targets': [300 + i, 1]}
      for i in range(num_pairs)
  ]


def pair_source(num_pairs=30):
  return source_of(pairs(num_pairs))


def components(**changes):
  mixture = {
      'spans': Component('spans', text_source(), 'span_corruption', 2.0, 32, None, 4),
      'continue': Component('continue', text_source(), 'prefix_lm', 1.0, 16, 16, 8),
      'pairs': Component('pairs', pair_source(), 'supervised', 1.0, 6, 4, 8),
  }
  return list({**mixture, **changes}.values())


def make(seed=0, **kwargs):
  return PretrainingBatches(components(), VOCABULARY, seed=seed, **kwargs)


def one(objective, source, input_length=32, target_length=None, batch_size=4, **kwargs):
  component = Component(
      objective, source, objective, 1.0, input_length, target_length, batch_size, **kwargs
  )
  return PretrainingBatches([component], VOCABULARY)


def assert_same(left, right):
  for name in left.__dataclass_fields__:
    np.testing.assert_array_equal(getattr(left, name), getattr(right, name))


def test_random_access_equals_sequential_access():
  forward = make()
  in_order = [forward[step] for step in range(40)]
  backward = make()
  for step in reversed(range(40)):
    assert_same(backward[step], in_order[step])


def test_a_resumed_run_far_away_sees_what_an_unbroken_one_sees():
  unbroken = make()
  for step in range(0, 5000, 500):
    unbroken[step]
  assert_same(unbroken[5001], make()[5001])
  assert unbroken.component_name(5001) == make().component_name(5001)


def test_another_seed_gives_another_order():
  batches = one('span_corruption', text_source())
  other = PretrainingBatches(batches.components, VOCABULARY, seed=1)
  assert not np.array_equal(
      batches[0].encoder_input_tokens, other[0].encoder_input_tokens
  )


def test_batches_have_the_shape_of_their_component_and_shifted_targets():
  batches = make()
  shapes = {'spans': ((4, 32), (4, 8)), 'continue': ((8, 16),) * 2, 'pairs': ((8, 6), (8, 4))}
  seen = set()
  for step in range(12):
    batch = batches[step]
    name = batches.component_name(step)
    seen.add(name)
    targets = batch.decoder_target_tokens
    assert (batch.encoder_input_tokens.shape, targets.shape) == shapes[name]
    assert batches.tokens_per_step(step) == batch.encoder_input_tokens.size + targets.size
    np.testing.assert_array_equal(batch.decoder_input_tokens[:, 1:], targets[:, :-1])
    assert not batch.decoder_input_tokens[:, 0].any()
    np.testing.assert_array_equal(batch.decoder_loss_weights, targets > 0)
    assert all(array.dtype == np.int32 for array in jax.tree.leaves(batch))
  assert seen == set(shapes)


def test_components_keep_their_shares_over_every_stretch_of_steps():
  batches = make(seed=5)
  names = np.array([batches.component_name(step) for step in range(3000)])
  for first in range(0, 3000, 300):
    share = np.mean(names[first : first + 300] == 'spans')
    assert abs(share - 0.5) < 0.02


def test_an_epoch_of_text_holds_every_token_of_its_chunks_once():
  source = text_source()
  stream = np.concatenate([source[i]['targets'] for i in range(len(source))])
  batches = one('span_corruption', source, batch_size=1)
  part = batches._parts[0]
  assert part.chunk_length == 34
  starts = []
  for epoch in range(3):
    rows = range(epoch * part.epoch_size, (epoch + 1) * part.epoch_size)
    chunks, _ = part._chunks(rows)
    order = [part._locate(row)[2] for row in rows]
    assert sorted(order) == list(range(part.epoch_size))
    assert order != sorted(order)
    joined = chunks[np.argsort(order)].reshape(-1)
    start = part._offset(epoch)
    starts.append(start)
    np.testing.assert_array_equal(joined, stream[start : start + len(joined)])
    assert len(joined) > len(stream) - 2 * part.chunk_length
  assert len(set(starts)) > 1, 'each epoch begins to cut at a place of its own'


def test_span_corruption_batches_fill_their_lengths_without_padding():
  batch = one('span_corruption', text_source(), input_length=64)[3]
  assert batch.encoder_input_tokens.shape == (4, 64)
  assert batch.decoder_target_tokens.shape == (4, 14)
  assert (batch.encoder_input_tokens > 0).all() and (batch.decoder_target_tokens > 0).all()


def test_a_row_is_the_objective_applied_to_its_chunk_with_its_own_generator():
  batches = one('span_corruption', text_source())
  tokens, rngs = batches._parts[0]._chunks(range(8, 12))
  expected = objectives.span_corruption(
      tokens[2], rngs[2], sentinel_ids=VOCABULARY.sentinel_ids, eos_id=1
  )
  batch = batches[2]
  np.testing.assert_array_equal(batch.encoder_input_tokens[2], expected['inputs'])
  np.testing.assert_array_equal(batch.decoder_target_tokens[2], expected['targets'])


def test_the_noise_of_a_chunk_differs_between_epochs():
  text = source_of([{'targets': np.arange(3, 37)}])  # exactly one chunk
  batches = one('span_corruption', text, batch_size=1)
  assert not np.array_equal(
      batches[0].encoder_input_tokens, batches[1].encoder_input_tokens
  )


def test_every_pair_is_seen_once_an_epoch_as_it_is():
  batches = one('supervised', pair_source(30), 6, 4, batch_size=10)
  for epoch in range(2):
    inputs = np.concatenate(
        [batches[step].encoder_input_tokens for step in range(3 * epoch, 3 * epoch + 3)]
    )
    targets = np.concatenate(
        [batches[step].decoder_target_tokens for step in range(3 * epoch, 3 * epoch + 3)]
    )
    order = np.argsort(inputs[:, 0])
    np.testing.assert_array_equal(inputs[order, 0], np.arange(100, 130))
    np.testing.assert_array_equal(targets[order, 0], np.arange(300, 330))
    assert (inputs[:, 2] == 1).all() and not inputs[:, 3:].any()
  assert batches.epochs(0) == {'supervised': 0.0}
  assert batches.epochs(6) == {'supervised': 2.0}


def test_batches_larger_than_the_source_go_round():
  batches = one('supervised', pair_source(3), 6, 4, batch_size=8)
  counts = np.zeros(3, int)
  for step in range(3):
    counts += np.bincount(batches[step].encoder_input_tokens[:, 0] - 100, minlength=3)
  np.testing.assert_array_equal(counts, [8, 8, 8])


def test_processes_together_hold_the_batch_of_one():
  whole = make()
  halves = [make(process_index=index, process_count=2) for index in range(2)]
  for step in range(8):
    for name in ('encoder_input_tokens', 'decoder_target_tokens'):
      joined = np.concatenate([getattr(half[step], name) for half in halves])
      np.testing.assert_array_equal(joined, getattr(whole[step], name))


def test_the_sentinel_variant_puts_the_first_sentinel_before_targets():
  for objective, source in (('prefix_lm', text_source()), ('supervised', pair_source())):
    targets = one(objective, source, 16, 16, sentinel=True)[0].decoder_target_tokens
    assert (targets[:, 0] == 1099).all()


def test_cut_pairs_are_counted_in_a_warning_and_still_end_in_eos():
  long = source_of([*pairs(9), {'inputs': np.arange(2, 12), 'targets': [5, 1]}])
  with pytest.warns(UserWarning, match=r'10.0% of the inputs .*the longest has 10'):
    batches = one('supervised', long, 6, 4, batch_size=10)
  rows = batches[0].encoder_input_tokens
  cut = rows[(rows > 0).sum(axis=1) == 6]
  np.testing.assert_array_equal(cut, [[2, 3, 4, 5, 6, 1]])


def test_pairs_that_fit_give_no_warning():
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    one('supervised', pair_source(), 6, 4)


def test_a_component_describes_itself_without_its_data():
  description = components()[0].describe()
  assert description['name'] == 'spans'
  assert description['num_examples'] == 40
  assert 'source' not in description


def test_a_mixture_that_cannot_work_is_refused_with_the_component_named():
  def build(*args, **kwargs):
    return PretrainingBatches([Component(*args)], VOCABULARY, **kwargs)

  text, words = text_source(), pair_source()
  with pytest.raises(ValueError, match='no components'):
    PretrainingBatches([], VOCABULARY)
  with pytest.raises(ValueError, match="'a': no objective 'span_coruption'"):
    build('a', text, 'span_coruption', 1.0, 32, None, 4)
  with pytest.raises(ValueError, match="'a': weight=0"):
    build('a', text, 'span_corruption', 0, 32, None, 4)
  with pytest.raises(ValueError, match="'a': prefix_lm needs a target_length"):
    build('a', text, 'prefix_lm', 1.0, 32, None, 4)
  with pytest.raises(ValueError, match="'a': target_length=5 .* are 8 long"):
    build('a', text, 'span_corruption', 1.0, 32, 5, 4)
  with pytest.raises(ValueError, match='noise spans need as many sentinels'):
    build('a', text, 'span_corruption', 1.0, 8192, None, 4)
  with pytest.raises(ValueError, match="'a': its text has 5 tokens"):
    short = source_of([{'targets': np.arange(1, 6)}])
    build('a', short, 'span_corruption', 1.0, 32, None, 4)
  with pytest.raises(ValueError, match="'a': supervised needs examples with inputs"):
    build('a', text, 'supervised', 1.0, 32, 8, 4)
  with pytest.raises(ValueError, match='no label for 1 of its 2 examples'):
    partly = [{'inputs': [5, 1], 'targets': [6, 1], 'targets_pretokenized': '<unk>'}]
    build('a', source_of([*partly, *pairs(1)]), 'supervised', 1.0, 32, 8, 4)
  with pytest.raises(ValueError, match="'a': batch_size=4 does not divide among 3"):
    build('a', words, 'supervised', 1.0, 32, 8, 4, process_count=3)
  twice = Component('a', words, 'supervised', 1.0, 32, 8, 4)
  with pytest.raises(ValueError, match='different names'):
    PretrainingBatches([twice, twice], VOCABULARY)
  with pytest.raises(IndexError, match='-1'):
    make()[-1]


def test_a_source_of_another_vocabulary_is_refused():
  class OtherVocabulary(FakeVocabulary):
    fingerprint = 'other' * 12

  component = Component('a', pair_source(), 'supervised', 1.0, 6, 4, 4)
  with pytest.raises(ValueError, match="'a' was tokenised with another vocabulary"):
    PretrainingBatches([component], OtherVocabulary())
