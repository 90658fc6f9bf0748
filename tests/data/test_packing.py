"""Packed rows hold the examples of the padded batch, each once, in few shapes."""

import itertools

import jax
import numpy as np
import pytest

from prompt_tuning_jax.data.packing import Packing, first_fit, packed_batch
from prompt_tuning_jax.data.tokenized_task import TokenizedTask
from prompt_tuning_jax.data.virtual_tokens import Template
from tests.data.samples import eval_batches, make_task, train_batches
from tests.data.test_batches import assert_same

FIELDS = (
    'encoder_input_tokens',
    'decoder_input_tokens',
    'decoder_target_tokens',
    'decoder_loss_weights',
    'encoder_segment_ids',
    'decoder_segment_ids',
)


@pytest.fixture
def task(vocabulary):
  return make_task(vocabulary)


def packed(tasks, **kwargs):
  return train_batches(tasks, **{'lengths': 'pack', 'packed_length': 48, **kwargs})


def examples_of(batch):
  """The tokens of every example of a batch, packed or not, sorted."""
  if batch.encoder_segment_ids is None:
    # Of a padded row, what is up to the last target.
    lengths = [(np.count_nonzero(i), np.flatnonzero(t)[-1] + 1)
               for i, t in zip(batch.encoder_input_tokens, batch.decoder_target_tokens)]
    rows = [
        (batch.encoder_input_tokens[r, :s], batch.decoder_input_tokens[r, :t],
         batch.decoder_target_tokens[r, :t], batch.decoder_loss_weights[r, :t])
        for r, (s, t) in enumerate(lengths)
    ]  # fmt: skip
  else:
    rows = []
    for row in range(len(batch.encoder_input_tokens)):
      encoder, decoder = batch.encoder_segment_ids[row], batch.decoder_segment_ids[row]
      for segment in range(1, max(encoder.max(), decoder.max()) + 1):
        in_encoder, in_decoder = encoder == segment, decoder == segment
        # In one piece.
        for places in (np.flatnonzero(in_encoder), np.flatnonzero(in_decoder)):
          assert len(places) and np.ptp(places) == len(places) - 1
        rows.append((
            batch.encoder_input_tokens[row, in_encoder],
            batch.decoder_input_tokens[row, in_decoder],
            batch.decoder_target_tokens[row, in_decoder],
            batch.decoder_loss_weights[row, in_decoder],
        ))
  return sorted([part.tolist() for part in row] for row in rows)


def test_a_packed_row_is_its_examples_one_after_the_other():
  batch = packed_batch(
      [
          [{'inputs': [7, 8, 1], 'targets': [5, 1]}, {'inputs': [9, 1], 'targets': [6, 7, 1]}],
          [{'inputs': [4, 4, 4, 4, 1], 'targets': [1]}],
      ],
      encoder_width=10,
      decoder_width=8,
      input_length=4,
      target_length=3,
      vocab_size=100,
      num_virtual_tokens=2,
      num_decoder_virtual_tokens=1,
      batch_size=3,
  )
  expected = {
      'encoder_input_tokens': [
          [100, 101, 7, 8, 1, 100, 101, 9, 1, 0], [100, 101, 4, 4, 4, 4, 0, 0, 0, 0], [0] * 10
      ],
      'encoder_segment_ids': [[1] * 5 + [2] * 4 + [0], [1] * 6 + [0] * 4, [0] * 10],
      'decoder_input_tokens': [[102, 0, 5, 102, 0, 6, 7, 0], [102] + [0] * 7, [0] * 8],
      'decoder_target_tokens': [[0, 5, 1, 0, 6, 7, 1, 0], [0, 1] + [0] * 6, [0] * 8],
      'decoder_loss_weights': [[0, 1, 1, 0, 1, 1, 1, 0], [0, 1] + [0] * 6, [0] * 8],
      'decoder_segment_ids': [[1] * 3 + [2] * 4 + [0], [1] * 2 + [0] * 6, [0] * 8],
  }  # fmt: skip
  for field in FIELDS:
    np.testing.assert_array_equal(getattr(batch, field), expected[field], field)
    assert getattr(batch, field).dtype == np.int32


def test_examples_that_do_not_fit_their_row_and_ids_beyond_the_table_are_refused():
  example = {'inputs': [7, 8, 1], 'targets': [5, 1]}
  shape = {'input_length': 4, 'target_length': 2, 'vocab_size': 100}
  with pytest.raises(ValueError, match='Row 1 has no room for its example 2: .* 6 encoder and 4'):
    packed_batch([[example], [example] * 2], encoder_width=5, decoder_width=9, **shape)
  with pytest.raises(ValueError, match='and has room for 9 and 3'):
    packed_batch([[example] * 2], encoder_width=9, decoder_width=3, **shape)
  with pytest.raises(ValueError, match='2 rows of examples do not fit a batch of 1 rows'):
    packed_batch([[], []], encoder_width=9, decoder_width=3, batch_size=1, **shape)
  with pytest.raises(ValueError, match='Row 0 has the token id 103'):
    packed_batch([[{'inputs': [103]}]], encoder_width=9, decoder_width=3, **shape)


@pytest.mark.parametrize(
    'placement', ['prefix', 'suffix', Template((1, 'subject', 2, 'inputs'))], ids=str
)
@pytest.mark.parametrize('in_decoder', [0, 2])
def test_a_packed_batch_holds_the_examples_of_the_padded_one(task, placement, in_decoder):
  settings = dict(
      placement=placement,
      num_decoder_virtual_tokens=in_decoder,
      vocab_size=5000,
      feature_lengths={'inputs': 40, 'targets': 4},
      batch_size=10,
  )
  padded = train_batches(task, **settings)
  in_rows = packed(task, **settings)
  for step in range(12):
    batch = in_rows[step]
    assert examples_of(batch) == examples_of(padded[step])
    assert len(batch.encoder_input_tokens) < 10


def test_packed_batches_are_the_same_after_a_restart_and_other_with_another_seed(task):
  batches, again = packed(task), packed(make_task(task.vocabulary))
  for step in (7, 0, 7):
    assert_same(batches[step], again[step])
    for field in FIELDS[4:]:
      np.testing.assert_array_equal(getattr(batches[step], field), getattr(again[step], field))
  assert examples_of(packed(task, seed=1)[0]) != examples_of(batches[0])


def test_packed_batches_have_few_shapes_and_hold_a_mixture(vocabulary):
  tasks = [
      (make_task(vocabulary, name='one', num_examples=90), 1.0),
      (make_task(vocabulary, name='two', longest=40), 2.0),
  ]
  settings = {'feature_lengths': {'inputs': 64, 'targets': 4}, 'batch_size': 24}
  batches = packed(tasks, packed_length=64, row_multiple=2, **settings)
  shapes = {batches[step].encoder_input_tokens.shape for step in range(100)}
  assert len(batches.packing.row_counts) <= 8
  assert shapes <= {(count, 64) for count in batches.packing.row_counts}
  assert all(count % 2 == 0 for count in batches.packing.row_counts)
  assert batches.packing.row_counts[-1] == 24
  # None is ever much emptier than its tokens ask for.
  for step in range(20):
    tokens = batches[step].encoder_input_tokens
    needed = -(-np.count_nonzero(tokens) // 64)
    assert len(tokens) <= max(1.3 * needed, needed + 2)
  padded = train_batches(tasks, **settings)
  assert examples_of(batches[5]) == examples_of(padded[5])


@pytest.mark.parametrize('count', [2, 4])
def test_hosts_hold_the_slices_of_one_packed_batch(task, count):
  whole = packed(task, row_multiple=count)
  hosts = [packed(task, process_index=i, process_count=count) for i in range(count)]
  for step in (0, 5):
    parts = [host[step] for host in hosts]
    joined = jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)
    for field in FIELDS:
      np.testing.assert_array_equal(getattr(joined, field), getattr(whole[step], field))


def test_a_row_is_by_default_as_wide_as_is_cheapest(vocabulary):
  """Two that just fit a row are cheaper than one and a half, or three of a longer row."""
  lengths = {'inputs': 61, 'targets': 4}
  task = make_task(vocabulary)
  batches = train_batches(task, lengths='pack', feature_lengths=lengths)
  narrow, wide = (
      train_batches(task, lengths='pack', packed_length=n, feature_lengths=lengths)
      for n in (task.longest('inputs') + 3, 128)
  )

  def tokens(batches):
    return sum(batches[step].encoder_input_tokens.size for step in range(30))

  assert narrow.widths < batches.widths <= wide.widths
  assert tokens(batches) <= 1.02 * min(tokens(narrow), tokens(wide))


def test_the_width_of_a_row_is_that_of_the_fewest_tokens_until_attention_costs_more():
  def width(length, widths, count=32):
    needs = itertools.repeat((np.full(count, length), np.ones(count, int)))
    return Packing.choose(
        needs, widths=widths, longest=length, longest_target=1, batch_size=count, multiple=1
    ).width

  assert width(30, [32, 48, 64, 92]) == 32  # As full as 64, and cheaper.
  assert width(30, [40, 48, 64]) == 64
  assert width(30, [56, 64, 960]) == 64
  # A thousand tokens are filled a little better, and attend to a thousand.
  assert width(100, [104, 1000], count=100) == 104


def test_rows_that_do_not_hold_the_longest_example_are_refused(task):
  with pytest.raises(ValueError, match=r'PACKED_LENGTH=22 .* longest example has 23 tokens, its 3'):
    packed(task, packed_length=22)
  assert packed(task, packed_length=23).widths == (23,)


def test_packed_examples_are_evaluated_in_rows_of_their_own(task):
  for (bucketed, numbers), (batch, others) in zip(
      eval_batches(task, lengths='bucket'), eval_batches(task, lengths='pack'), strict=True
  ):
    assert_same(batch, bucketed)
    assert batch.encoder_segment_ids is None
    np.testing.assert_array_equal(numbers, others)


# First fit.


def test_the_longest_come_first_into_the_first_row_with_room_of_both_kinds():
  assert first_fit(np.array([3, 6, 5, 4, 2]), np.ones(5, int), (10, 9)) == [[1, 3], [2, 0, 4]]
  targets = np.array([1, 2, 2, 3, 1])
  assert first_fit(np.array([3, 6, 5, 4, 2]), targets, (10, 3)) == [[1, 0], [2, 4], [3]]


def test_the_decoder_is_narrow_where_that_costs_no_rows():
  """One row with all the short examples would be as wide as their targets together."""
  widths, targets = np.array([9, 9, 9] + [1] * 12), np.array([1] * 15)
  needs = itertools.repeat((widths, targets))
  limits = dict(longest=9, longest_target=1, batch_size=15)
  packing = Packing.choose(needs, widths=[13], multiple=1, **limits)
  assert len(first_fit(widths, targets, (13, 99))) == 3
  assert packing == Packing(13, 8, (3, 4, 15))
  wide = Packing.choose(needs, widths=[39], multiple=4, **limits)
  assert wide == Packing(39, 16, (4, 8, 16))
  # No batch of these fills a row that is wider.
  assert Packing.choose(needs, widths=[4096], multiple=1, **limits).width == 40


def test_a_batch_that_needs_more_rows_than_any_before_has_a_shape_too():
  short = np.full(8, 2), np.ones(8, int)
  packing = Packing.choose(
      itertools.repeat(short), widths=[16], longest=16, longest_target=1, batch_size=8, multiple=1
  )
  assert packing.row_counts == (1, 2, 8)
  rows, count = packing.lay(np.full(8, 16), np.ones(8, int))
  assert count == 8 and sorted(itertools.chain(*rows)) == list(range(8))


def test_targets_as_long_as_allowed_fit_the_decoder_whatever_was_sampled(vocabulary):
  examples = [{'inputs': [5, 1], 'targets': [6, 1]} for _ in range(999)]
  examples[777] = {'inputs': [5, 1], 'targets': [6] * 29 + [1]}
  task = TokenizedTask.from_examples(examples, vocabulary)
  settings = {'feature_lengths': {'inputs': 8, 'targets': 30}, 'batch_size': 1}
  batches = packed(task, packed_length=11, **settings)
  step = next(step for step in range(999) if batches.rows(step) == [(0, 777)])
  assert examples_of(batches[step]) == examples_of(train_batches(task, **settings)[step])
