"""Buckets are few, hold every row, and pad least; the decoder's width is not theirs."""

import itertools

import pytest

from prompt_tuning_jax.data.buckets import narrowest
from prompt_tuning_jax.data.tokenized_task import TokenizedTask
from tests.data.samples import eval_batches, make_task, train_batches


def test_default_buckets_are_few_multiples_of_eight_that_hold_the_longest(vocabulary):
  task = make_task(vocabulary, num_examples=200, longest=150)
  kwargs = {'feature_lengths': {'inputs': 512, 'targets': 8}, 'lengths': 'bucket'}
  batches = train_batches(task, **kwargs)
  assert 2 <= len(batches.widths) <= 4
  assert all(width % 8 == 0 for width in batches.widths)
  assert task.longest('inputs') + 3 <= batches.widths[-1] < task.longest('inputs') + 3 + 8
  assert batches.widths == train_batches(task, seed=5, **kwargs).widths


def test_default_buckets_pad_less_than_any_others_would(vocabulary):
  task = make_task(vocabulary, num_examples=200, longest=60)
  kwargs = {'feature_lengths': {'inputs': 512, 'targets': 8}, 'lengths': 'bucket'}

  def total_width(batches):
    return sum(batch.encoder_input_tokens.shape[1] for batch, _ in batches)

  batches = eval_batches(task, batch_size=5, **kwargs)
  longest = batches.widths[-1]
  for others in itertools.combinations(range(8, longest, 8), len(batches.widths) - 1):
    other = eval_batches(task, batch_size=5, buckets=(*others, longest), **kwargs)
    assert total_width(batches) <= total_width(other)


def test_tasks_of_one_length_need_one_bucket(vocabulary):
  task = TokenizedTask.from_examples([{'inputs': [5, 1], 'targets': [6, 1]}] * 9, vocabulary)
  assert train_batches(task, lengths='bucket').widths == (8,)


def test_the_widest_bucket_is_never_wider_than_padding(vocabulary):
  task = make_task(vocabulary, longest=150)
  with pytest.warns(UserWarning, match='cuts the inputs'):
    batches = train_batches(
        task, feature_lengths={'inputs': 50, 'targets': 8}, lengths='bucket'
    )
  assert batches.widths[-1] == 53


def test_buckets_that_do_not_hold_the_longest_row_are_refused(vocabulary):
  task = make_task(vocabulary)
  with pytest.raises(ValueError, match=r'widest holds 16 tokens.*longest row has 23'):
    train_batches(task, lengths='bucket', buckets=(8, 16))


def test_a_row_goes_to_the_first_bucket_that_holds_it():
  assert [narrowest((8, 16, 40), tokens) for tokens in (1, 8, 9, 16, 17, 40)] == [
      8, 8, 16, 16, 40, 40,
  ]  # fmt: skip


@pytest.mark.parametrize('make_batches', [train_batches, eval_batches])
def test_the_decoder_is_as_wide_as_the_targets_may_be_in_buckets_too(
    vocabulary, make_batches
):
  """Targets have 2 tokens; of 30, all are counted by NUM_TOTAL_TARGET_TOKENS."""
  batches = make_batches(
      make_task(vocabulary), feature_lengths={'inputs': 24, 'targets': 30}, lengths='bucket'
  )
  batch = batches[0] if make_batches is train_batches else next(iter(batches))[0]
  assert batches.target_length == 30
  assert batch.decoder_target_tokens.shape == batch.decoder_loss_weights.shape == (8, 30)
