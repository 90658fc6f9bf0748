"""Holding a task against the recorded text of the original, and its recorded scores."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest

from prompt_tuning_jax.data import seqio_source
from prompt_tuning_jax.evaluation import metrics


def records(golden: Path, file: str, task: str) -> list[dict]:
  """The recorded lines that concern a task."""
  with open(golden / 'tasks' / file) as lines:
    return [record for record in map(json.loads, lines) if record['task'] == task]


def signature(value):
  """What TensorFlow is to expect of values like this one."""
  import tensorflow as tf

  if isinstance(value, dict):
    return {key: signature(part) for key, part in value.items()}
  if isinstance(value, list):
    return tf.TensorSpec([None], tf.string)
  dtype = {str: tf.string, int: tf.int64, float: tf.float32}[type(value)]
  return tf.TensorSpec([], dtype)


def tokenize_rows(vocabulary, name, rows, split):
  """Tokenises a task as if TFDS gave it these rows, which may have parts and lists."""
  seqio_source.import_seqio()
  import tensorflow as tf
  from prompt_tuning_jax.tasks import sources

  class Rows:
    splits = (split,)

    def __init__(self, name):
      pass

    def list_shards(self, split):
      return []

    def get_dataset(self, split, shuffle, seed, shard_info):
      return tf.data.Dataset.from_generator(lambda: rows, output_signature=signature(rows[0]))

  with pytest.MonkeyPatch.context() as patch:
    patch.delenv('PTJ_LOCAL_DATA', raising=False)
    patch.setattr(sources.LocalOrTfds, '_tfds', property(lambda self: Rows(self.tfds_name)))
    return seqio_source.tokenize_task(
        name, split, vocabulary, task_module='prompt_tuning_jax.tasks'
    )


@functools.cache
def recorded_task(golden, vocabulary, name, split):
  """A task, plain or `taskless_`, made of its recorded rows; tokenised once."""
  (record,) = records(golden, 'task_text.jsonl', f'taskless_{name.removeprefix("taskless_")}')
  return tokenize_rows(vocabulary, name, record['raw'], split)


def assert_recorded_text(golden, vocabulary, name, split, task_word):
  """Compares all that a task makes of the recorded rows, in both forms.

  The recording holds the `taskless_` form; the other form has `task_word` in front.
  """
  (recorded,) = records(golden, 'task_text.jsonl', f'taskless_{name}')
  taskless = recorded_task(golden, vocabulary, f'taskless_{name}', split)
  with_word = recorded_task(golden, vocabulary, name, split)
  assert len(taskless) == len(with_word) == len(recorded['outputs'])
  for index, expected in enumerate(recorded['outputs']):
    found = {key: ids.tolist() for key, ids in taskless[index].items()}
    assert found | taskless.example(index) == expected
    text = f'{task_word} {expected["inputs_pretokenized"]}'
    assert with_word.example(index)['inputs_pretokenized'] == text
    assert with_word[index]['inputs'].tolist() == [*vocabulary.encode(text), 1]
    assert with_word[index]['targets'].tolist() == expected['targets']


def assert_recorded_scores(recorded, task):
  """Postprocesses recorded targets and predictions as the task does, and scores them."""
  examples = [task.example(index) for index in range(len(task))]
  examples = [e for e in examples if e['targets_pretokenized'] != '<unk>']
  assert [e['targets_pretokenized'] for e in examples] == recorded['targets_text']
  targets, predictions = (
      [
          task.postprocess_fn(text, example=example, is_target=is_target)
          for text, example in zip(recorded[texts], examples, strict=True)
      ]
      for texts, is_target in (('targets_text', True), ('predictions', False))
  )
  assert json.loads(json.dumps(targets)) == recorded['targets_post']
  assert predictions == [_plain(value) for value in recorded['predictions_post']]
  found = {}
  for metric in task.metric_fns:
    # The recorded rows of AX-g are no pairs.
    if metric is not metrics.gender_parity:
      found |= metric(targets, predictions)
  if recorded['metrics']:
    # The last digit may differ by the order of sums.
    assert found == pytest.approx(recorded['metrics'], rel=1e-14)
  return found


def _plain(value):
  """What was recorded, where the texts stand beside it."""
  return value['prediction'] if isinstance(value, dict) and 'prediction' in value else value
