"""Examples without a label are counted, and refused where they would do harm."""

import json

import pytest

from prompt_tuning_jax.data import labels, provenance
from prompt_tuning_jax.data.tokenized_task import TokenizedTask


def test_a_split_whose_labels_are_all_missing_says_so(vocabulary):
  unlabelled = TokenizedTask.from_examples(
      [{'inputs': 'a', 'targets': '<unk>'}, {'inputs': 'b', 'targets': '<unk>'}],
      vocabulary,
      name='cb',
      split='test',
      label_classes=['yes', 'no'],
  )
  assert not unlabelled.has_labels
  with pytest.raises(ValueError, match="cb, split 'test', has no labels .all 2 targets"):
    unlabelled.target(0)
  unlabelled.manifest['split'] = 'validation'
  with pytest.raises(ValueError) as error:
    unlabelled.require_labels()
  assert 'Use other data.' in str(error.value)
  assert "example 'validation'" not in str(error.value)


def test_a_split_with_some_labels_says_how_many_lack_and_what_to_do(vocabulary, tmp_path):
  file = tmp_path / 'val.jsonl'
  file.write_text('{}')
  examples = [{'inputs': 'a', 'targets': t} for t in ('no', 'yes', '<unk>', 'no', 'maybe')]
  partly = TokenizedTask.from_examples(
      examples, vocabulary, name='cb', split='validation', label_classes=['yes', 'no'],
      source=provenance.describe_files([str(file)]),
  )  # fmt: skip
  assert partly.has_labels
  partly.save(tmp_path / 'saved')
  for task in (partly, TokenizedTask.read(tmp_path / 'saved', vocabulary)):
    with pytest.raises(ValueError) as error:
      task.require_labels()
    for words in (
        "cb, split 'validation',",
        'no label for 2 of its 5 examples',
        'the first is example 2, counted from 0',
        f'Label them in {file} or take them out',
    ):
      assert words in str(error.value)


@pytest.mark.parametrize(
    ('target', 'text', 'count'),
    [
        (-1, 'The trophy', 1),  # WSC: the text is the referent, the label is hidden.
        (-1.0, '-1.0', 1),  # STS-B.
        ({'value': -1, 'group': 3}, '<unk>', 1),  # MultiRC.
        ({'value': ['Paris'], 'group': [1, 2]}, 'Paris', 0),  # ReCoRD.
        ('-1', '-1', 0),
        (['-1'], '-1', 0),
        (None, None, 0),
        (1, 'yes', 0),
    ],
)
def test_what_counts_as_no_label(target, text, count):
  found = labels.count_unlabelled([0, target], ['no', text])
  assert found == {'count': count, 'first': 1 if count else None}


def test_text_and_pairs_from_files_need_no_labels(vocabulary, tmp_path):
  path = tmp_path / 'pairs.jsonl'
  path.write_text(json.dumps({'inputs': 'a', 'targets': '-1'}) + '\n')
  task = TokenizedTask.from_jsonl(path, vocabulary)
  task.require_labels()
  assert task.target(0) == '-1'


def test_an_answer_that_is_truly_minus_one_is_told_what_to_do(vocabulary):
  task = TokenizedTask.from_examples(
      [{'inputs': 'two less three', 'targets': '-1'}, {'inputs': 'one', 'targets': '1'}],
      vocabulary,
      postprocess_fn=lambda text, **unused: int(text),
  )
  with pytest.raises(ValueError, match='a filter .* Where -1 is a true answer, .* as text'):
    task.require_labels()


def test_of_numbers_minus_one_is_one():
  found = labels.count_unlabelled([-1.0, 0.5], ['-1.0', '0.5'], minus_one_is_none=False)
  assert found == labels.NONE_UNLABELLED
