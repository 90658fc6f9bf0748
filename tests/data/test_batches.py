"""Batches are a pure function of (seed, step), and lengths change only the padding."""

import collections
import hashlib
import warnings

import numpy as np
import pytest

from prompt_tuning_jax.data.cache import TokenizedTask
from prompt_tuning_jax.data.order import ExampleOrder, permutation
from prompt_tuning_jax.data.padding import make_batch
from prompt_tuning_jax.data.virtual_tokens import Template
from tests.data.samples import eval_batches, make_task, train_batches

FIELDS = (
    'encoder_input_tokens',
    'decoder_input_tokens',
    'decoder_target_tokens',
    'decoder_loss_weights',
)


@pytest.fixture
def task(vocabulary):
  return make_task(vocabulary)


def assert_same(left, right):
  for field in FIELDS:
    np.testing.assert_array_equal(getattr(left, field), getattr(right, field))


def first_words(batch, num_virtual_tokens=3):
  return batch.encoder_input_tokens[:, num_virtual_tokens]


def test_a_prompt_of_the_decoder_stands_before_its_start_token():
  batch = make_batch(
      [{'inputs': [5, 1], 'targets': [7, 8, 1]}, {'inputs': [6, 1], 'targets': [1]}],
      input_length=2,
      target_length=3,
      vocab_size=100,
      num_virtual_tokens=2,
      num_decoder_virtual_tokens=3,
  )
  np.testing.assert_array_equal(batch.encoder_input_tokens[0], [100, 101, 5, 1])
  np.testing.assert_array_equal(
      batch.decoder_input_tokens, [[102, 103, 104, 0, 7, 8], [102, 103, 104, 0, 1, 0]]
  )
  np.testing.assert_array_equal(
      batch.decoder_target_tokens, [[0, 0, 0, 7, 8, 1], [0, 0, 0, 1, 0, 0]]
  )
  np.testing.assert_array_equal(batch.decoder_loss_weights, batch.decoder_target_tokens > 0)


def test_a_row_is_the_prompt_the_input_and_padding():
  batch = make_batch(
      [{'inputs': np.array([7, 8, 1]), 'targets': np.array([5, 1])}],
      input_length=5,
      target_length=3,
      vocab_size=100,
      num_virtual_tokens=2,
      batch_size=2,
  )
  np.testing.assert_array_equal(
      batch.encoder_input_tokens, [[100, 101, 7, 8, 1, 0, 0], [0] * 7]
  )
  np.testing.assert_array_equal(batch.decoder_target_tokens, [[5, 1, 0], [0, 0, 0]])
  np.testing.assert_array_equal(batch.decoder_input_tokens, [[0, 5, 1], [0, 0, 0]])
  np.testing.assert_array_equal(batch.decoder_loss_weights, [[1, 1, 0], [0, 0, 0]])
  assert all(getattr(batch, field).dtype == np.int32 for field in FIELDS)


def test_inputs_are_cut_before_the_prompt_is_added():
  batch = make_batch(
      [{'inputs': [7, 8, 9, 1], 'targets': [5, 6, 1]}],
      input_length=2,
      target_length=2,
      vocab_size=100,
      num_virtual_tokens=3,
  )
  np.testing.assert_array_equal(batch.encoder_input_tokens, [[100, 101, 102, 7, 8]])
  np.testing.assert_array_equal(batch.decoder_target_tokens, [[5, 6]])


def test_rows_that_do_not_fit_and_ids_beyond_the_table_are_refused():
  shape = {'input_length': 4, 'target_length': 2, 'vocab_size': 100}
  example = {'inputs': [7, 8, 1], 'targets': [5, 1]}
  with pytest.raises(ValueError, match='2 examples do not fit a batch of 1 rows'):
    make_batch([example] * 2, batch_size=1, **shape)
  with pytest.raises(ValueError, match='Row 0 has 5 encoder tokens.*4 wide'):
    make_batch([example], num_virtual_tokens=2, encoder_width=4, **shape)
  with pytest.raises(ValueError, match='Row 1 has the token id 103.*100 rows.*prompt 2'):
    make_batch([example, {'inputs': [103]}], num_virtual_tokens=2, **shape)
  with pytest.raises(ValueError, match='target has the token id 100.*100 rows'):
    make_batch([example | {'targets': [100]}], **shape)


def test_batches_are_the_same_in_any_order_of_asking_and_after_a_restart(task):
  batches = train_batches(task)
  in_order = [batches[step] for step in range(20)]
  again = train_batches(make_task(task.vocabulary))
  for step in (13, 2, 19, 0, 7):
    assert_same(again[step], in_order[step])


def test_every_epoch_holds_every_example_once_and_in_another_order(task):
  batches = train_batches(task, batch_size=10)
  epochs = [
      np.concatenate([first_words(batches[step]) for step in range(5 * e, 5 * e + 5)])
      for e in range(3)
  ]
  for order in epochs:
    np.testing.assert_array_equal(np.sort(order), 10 + np.arange(50))
  assert not np.array_equal(epochs[0], epochs[1])
  assert not np.array_equal(epochs[1], epochs[2])


def test_epochs_follow_each_other_without_a_gap_when_batches_do_not_divide_them(task):
  batches = train_batches(task, batch_size=8)
  seen = np.concatenate([first_words(batches[step]) for step in range(25)])
  np.testing.assert_array_equal(np.sort(seen[:50]), 10 + np.arange(50))
  np.testing.assert_array_equal(np.sort(seen[50:100]), 10 + np.arange(50))
  assert batches.epoch(25) == 4.0


def test_the_seed_and_nothing_else_changes_the_order(task):
  one, two = train_batches(task, seed=1), train_batches(task, seed=2)
  assert one.rows(0) != two.rows(0)
  assert one.rows(0) == train_batches(task, seed=1, lengths='bucket').rows(0)


def test_the_order_is_split_mix_64_whatever_numpy_makes_of_it():
  # A run that is resumed under newer libraries must see the examples it has not seen.
  state = int.from_bytes(hashlib.sha256(b'0/task/train/0').digest()[:8], 'little')
  keys = []
  for _ in range(1000):
    state = (state + 0x9E3779B97F4A7C15) % 2**64
    z = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    keys.append(z ^ (z >> 31))
  expected = sorted(range(1000), key=keys.__getitem__)
  assert permutation('0/task/train/0', 1000).tolist() == expected
  assert permutation('0/task/train/0', 12).tolist() == [3, 5, 9, 6, 2, 8, 1, 7, 10, 0, 11, 4]


def test_permutations_are_permutations_and_differ_by_key():
  for size in (1, 2, 1000):
    np.testing.assert_array_equal(np.sort(permutation('a', size)), np.arange(size))
  assert not np.array_equal(permutation('a', 1000), permutation('b', 1000))


def test_a_permutation_prefers_no_place():
  # Where example 0 of 10 lands over 4,000 epochs: 400 times each place, give or take.
  places = [int(np.flatnonzero(permutation(f'{e}', 10) == 0)[0]) for e in range(4000)]
  counts = np.bincount(places, minlength=10)
  assert np.abs(counts - 400).max() < 5 * np.sqrt(400)


def test_a_mixture_keeps_its_shares_at_every_moment_and_covers_every_task():
  order = ExampleOrder(['a', 'b', 'c'], [10, 100, 7], [1.0, 5.0, 0.5], seed=0)
  taken = [order[k] for k in range(1300)]
  for k in (13, 130, 1300):
    counts = collections.Counter(number for number, _ in taken[:k])
    for number, weight in enumerate([1.0, 5.0, 0.5]):
      assert abs(counts[number] - k * weight / 6.5) <= 2
  own = [example for number, example in taken if number == 0]
  assert sorted(own[:10]) == list(range(10))
  assert sorted(own[10:20]) == list(range(10))


def test_a_task_keeps_its_own_order_in_a_mixture(vocabulary):
  one = make_task(vocabulary, name='one')
  two = make_task(vocabulary, name='two')
  alone = [row[1] for row in train_batches(one, batch_size=50).rows(0)]
  mixed = train_batches([(two, 1.0), (one, 1.0)], batch_size=100).rows(0)
  assert [example for number, example in mixed if number == 1] == alone


@pytest.mark.parametrize('placement', ['prefix', 'after_bos', 'suffix'])
def test_pad_and_bucket_hold_the_same_tokens(task, placement):
  pad = train_batches(task, placement=placement)
  bucket = train_batches(task, placement=placement, lengths='bucket', batch_size=8)
  widths = set()
  for step in range(12):
    padded, bucketed = pad[step], bucket[step]
    width = bucketed.encoder_input_tokens.shape[1]
    widths.add(width)
    assert not padded.encoder_input_tokens[:, width:].any()
    np.testing.assert_array_equal(
        padded.encoder_input_tokens[:, :width], bucketed.encoder_input_tokens
    )
    for field in FIELDS[1:]:
      np.testing.assert_array_equal(getattr(padded, field), getattr(bucketed, field))
  assert widths <= set(bucket.widths)


@pytest.mark.parametrize('lengths', ['pad', 'bucket'])
def test_hosts_hold_the_slices_of_one_global_batch(task, lengths):
  whole = train_batches(task, lengths=lengths)
  hosts = [
      train_batches(task, lengths=lengths, process_index=i, process_count=4)
      for i in range(4)
  ]
  for step in (0, 5):
    parts = [host[step] for host in hosts]
    for field in FIELDS:
      np.testing.assert_array_equal(
          np.concatenate([getattr(part, field) for part in parts]),
          getattr(whole[step], field),
      )


@pytest.mark.parametrize('lengths', ['pad', 'bucket'])
def test_evaluation_sees_every_example_once_in_batches_of_one_size(task, lengths):
  batches = eval_batches(task, lengths=lengths)
  seen = []
  for batch, rows in batches:
    assert batch.encoder_input_tokens.shape[0] == 8
    np.testing.assert_array_equal(first_words(batch, 0)[: len(rows)], 10 + rows)
    assert not batch.encoder_input_tokens[len(rows) :].any()
    assert not batch.decoder_loss_weights[len(rows) :].any()
    seen += list(rows)
  assert sorted(seen) == list(range(50))
  assert len(batches) == 7
  if lengths == 'pad':
    assert seen == sorted(seen)


def test_bucketed_evaluation_goes_from_long_to_short(task):
  widths = [b.encoder_input_tokens.shape[1] for b, _ in eval_batches(task, lengths='bucket')]
  assert widths == sorted(widths, reverse=True)
  assert widths[0] > widths[-1]


def test_evaluation_on_several_hosts_covers_the_last_batch_too(task):
  whole = list(eval_batches(task))
  hosts = [list(eval_batches(task, process_index=i, process_count=2)) for i in range(2)]
  for number, (batch, rows) in enumerate(whole):
    parts = [host[number][0].encoder_input_tokens for host in hosts]
    np.testing.assert_array_equal(np.concatenate(parts), batch.encoder_input_tokens)
    np.testing.assert_array_equal(hosts[1][number][1], rows)


def test_templates_read_raw_fields_of_the_examples(task, vocabulary):
  template = Template((1, 'subject', 2, 'inputs'))
  batches = train_batches(
      task, vocab_size=5000, feature_lengths={'inputs': 60, 'targets': 4},
      placement=template, lengths='bucket',
  )  # fmt: skip
  _, example = batches.rows(0)[0]
  subject = vocabulary.encode(f'thing {example}')
  expected = [5000, *subject, 5001, 5002, *task[example]['inputs']]
  row = batches[0].encoder_input_tokens[0]
  np.testing.assert_array_equal(row[: len(expected)], expected)
  assert not row[len(expected) :].any()


def test_a_template_with_a_field_that_examples_lack_is_refused(task):
  with pytest.raises(ValueError, match="names the field 'object'.*Fields: inputs, subject"):
    train_batches(task, placement=Template((3, 'object', 'inputs')))


def test_a_field_that_is_spelled_wrong_is_answered_with_the_nearest(task):
  with pytest.raises(ValueError, match="'subjct', which numbers, split 'train', .*mean 'subject'"):
    train_batches(task, placement='{3} {subjct} {inputs}')
  with pytest.raises(ValueError, match="Did you mean 'subject'.* Fields: inputs, subject"):
    make_batch(
        [{'inputs': [7, 1], 'targets': [5, 1], 'subject': [8]}],
        input_length=5,
        target_length=4,
        vocab_size=100,
        num_virtual_tokens=3,
        placement='{3} {subjct}',
    )


def test_a_template_that_does_not_fit_the_prompt_is_refused_at_once(task):
  with pytest.raises(ValueError, match='places for 4 virtual tokens, but the prompt has 3'):
    train_batches(task, placement=(2, 'inputs', 2))


def test_token_ids_beyond_the_table_name_the_example(task):
  with pytest.raises(ValueError, match=r'inputs of example 20 hold the token id 30.*30 rows'):
    train_batches(task, vocab_size=30)


def test_what_the_limits_cut_is_said_with_its_share_and_the_worst_example(vocabulary):
  examples = [
      {'inputs': [5] * (9 if i == 1 else 1) + [1], 'targets': [6] * (5 - i) + [1]}
      for i in range(4)
  ]
  task = TokenizedTask.from_examples(examples, vocabulary, name='long')
  lengths = {'inputs': 8, 'targets': 4}
  with pytest.warns(UserWarning) as warned:
    train_batches(task, feature_lengths=lengths)
  targets, inputs = (str(warning.message) for warning in warned)
  assert targets == (
      "TASK_FEATURE_LENGTHS['targets']=4 cuts the targets of 50.0% of long, split 'train' (2 of "
      '4 examples; the longest, example 0, has 6 tokens): the model never learns how these '
      'answers end, not even that they do (the end-of-sequence token is cut). Allow 6 for '
      "'targets', unless that is meant."
  )
  assert inputs == (
      "TASK_FEATURE_LENGTHS['inputs']=8 cuts the inputs of 25.0% of long, split 'train' (1 of 4 "
      'examples; the longest, example 1, has 10 tokens): the model does not see what is cut.'
  )
  with pytest.warns(UserWarning) as warned:
    eval_batches(task, feature_lengths=lengths)
  targets, again = (str(warning.message) for warning in warned)
  assert targets.endswith('has 6 tokens): answers are neither generated nor scored beyond it.')
  assert again == inputs


def test_limits_that_cut_nothing_are_passed_over_in_silence(vocabulary):
  example = {'inputs': [5, 5, 1], 'targets': [6, 1]}
  task = TokenizedTask.from_examples([example] * 3, vocabulary)
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    train_batches(task, feature_lengths={'inputs': 3, 'targets': 2})
    eval_batches(task, feature_lengths={'inputs': 3, 'targets': 2})


def test_batch_sizes_that_do_not_divide_among_hosts_are_refused(task):
  with pytest.raises(ValueError, match='BATCH_SIZE=10 does not divide among 4'):
    train_batches(task, batch_size=10, process_count=4)
  with pytest.raises(ValueError, match='BATCH_SIZE=0, but .* one row. Use 1 or more'):
    train_batches(task, batch_size=0)
  with pytest.raises(ValueError, match='BATCH_SIZE=-4, .* Use a multiple of 4'):
    eval_batches(task, batch_size=-4, process_count=4)


def test_a_split_without_labels_cannot_be_trained_on_but_can_be_predicted(vocabulary):
  task = TokenizedTask.from_examples(
      [{'inputs': 'some text', 'targets': '<unk>'}], vocabulary, name='t', split='test'
  )
  with pytest.raises(ValueError, match="split 'test', has no labels"):
    train_batches(task, vocab_size=5000)
  assert len(list(eval_batches(task, vocab_size=5000))) == 1


def test_a_partly_labelled_split_cannot_be_trained_on_alone_or_in_a_mixture(vocabulary):
  examples = [{'inputs': 'a text', 'targets': t} for t in ('yes', 'no', '<unk>', 'no')]
  partly = TokenizedTask.from_examples(examples, vocabulary, name='partly')
  whole = TokenizedTask.from_examples(examples[:2], vocabulary, name='whole')
  shape = {'vocab_size': 5000, 'feature_lengths': {'inputs': 24, 'targets': 8}}
  for tasks in (partly, [(whole, 1.0), (partly, 1.0)]):
    with pytest.raises(ValueError, match='partly, .* no label for 1 of its 4 .* example 2,'):
      train_batches(tasks, **shape)
  assert len(list(eval_batches(partly, **shape))) == 1


def test_plain_text_is_refused_with_the_command_that_takes_it(vocabulary):
  task = TokenizedTask.from_examples(
      [{'targets': 'some text'}], vocabulary, features=('targets',)
  )
  with pytest.raises(ValueError, match="no 'inputs'.*pretrain"):
    train_batches(task, vocab_size=5000)


def test_missing_feature_lengths_and_unknown_modes_are_refused(task):
  with pytest.raises(ValueError, match="does not say how long 'targets'"):
    train_batches(task, feature_lengths={'inputs': 8})
  with pytest.raises(ValueError, match="lengths='buckets'; use one of pad, bucket"):
    train_batches(task, lengths='buckets')
  with pytest.raises(ValueError, match='weights are positive'):
    train_batches([(task, 0.0)])
  with pytest.raises(IndexError, match='steps begin at 0'):
    train_batches(task)[-1]


def test_words_of_a_template_stand_there_without_virtual_tokens_too(task, vocabulary):
  """A prefix, or no prompt, reads the template that `infer` reads."""
  batches = train_batches(
      task, vocab_size=5000, feature_lengths={'inputs': 60, 'targets': 4},
      num_virtual_tokens=0, placement=Template('what is it? {inputs}', vocabulary),
      lengths='bucket',
  )  # fmt: skip
  _, example = batches.rows(0)[0]
  expected = [*vocabulary.encode('what is it?'), *task[example]['inputs']]
  row = batches[0].encoder_input_tokens[0]
  assert row[: len(expected)].tolist() == expected
  assert not row[len(expected) :].any()
