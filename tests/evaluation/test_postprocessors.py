"""Postprocessors against the recorded values of the t5 package."""

import json
import math

import pytest

from prompt_tuning_jax.evaluation import postprocessors


def test_every_recorded_call_gives_the_recorded_result(golden):
  calls = json.loads((golden / 'tasks' / 'postprocessors.json').read_text())
  assert len(calls) == 35
  for call in calls:
    function = getattr(postprocessors, call['fn'].partition('[')[0])
    result = function(*call['args'], **call['kwargs'])
    if isinstance(call['result'], float) and math.isnan(call['result']):
      assert math.isnan(result)
    else:
      assert result == call['result'], call
      assert type(result) is type(call['result'])


def test_recorded_tasks_give_the_recorded_predictions(golden):
  lines = (golden / 'tasks' / 'metrics.jsonl').read_text().splitlines()
  checked = 0
  for record in map(json.loads, lines):
    task = record['task'].partition('super_glue_')[2].partition('_')[0]
    if task not in ('multirc', 'record') or 'scores' in record:
      continue
    function = getattr(postprocessors, task)
    for text, expected in zip(record['predictions'], record['predictions_post']):
      assert function(text) == expected.get('prediction', expected)
      checked += 1
  assert checked == 80


def test_targets_of_multirc_and_record_carry_their_group(golden):
  lines = (golden / 'tasks' / 'task_text.jsonl').read_text().splitlines()
  outputs = {r['task']: r['outputs'] for r in map(json.loads, lines)}
  answer = outputs['taskless_super_glue_multirc_v102'][0]
  assert postprocessors.multirc('True', example=answer, is_target=True) == {
      'value': 1,
      'group': 3,
  }
  question = outputs['taskless_super_glue_record_v102'][0]
  assert postprocessors.record('London', example=question, is_target=True) == {
      'value': ['London', 'Paris'],
      'group': (11, 22),
  }


def test_a_target_is_all_of_its_references_and_a_prediction_its_own_text():
  example = {'references': ['A pub.', 'It is a pub.']}
  found = postprocessors.all_references('A pub.', example=example, is_target=True)
  assert found == ['A pub.', 'It is a pub.']
  assert postprocessors.all_references('A bar.', example=example) == 'A bar.'
  with pytest.raises(ValueError, match="'references' of the example; it has 'idx'"):
    postprocessors.all_references('A pub.', example={'idx': 3}, is_target=True)


def test_a_missing_raw_field_is_named():
  with pytest.raises(ValueError, match="'idx/question' of the example; it has 'idx'"):
    postprocessors.multirc('True', example={'idx': 3}, is_target=True)
  with pytest.raises(ValueError, match='it has nothing'):
    postprocessors.wsc_simple('Mark')


def test_other_arguments_of_seqio_are_passed_over():
  kwargs = dict(example={'idx': 1}, is_target=False)
  assert postprocessors.string_label_to_class_id('b', ['a', 'b'], **kwargs) == 1
  assert postprocessors.string_to_float('2', **kwargs) == 2.0


def test_classes_in_other_words_are_those_of_the_recorded_translations(golden):
  words = {
      'qqp': ['not_duplicate', 'duplicate'], 'mrpc': ['not_equivalent', 'equivalent']
  }
  calls = json.loads((golden / 'tasks' / 'postprocessors.json').read_text())
  calls = [call for call in calls if call['fn'] in ('qqp_to_mrpc', 'mrpc_to_qqp')]
  assert len(calls) == 6
  for call in calls:
    source, _, target = call['fn'].partition('_to_')
    found = postprocessors.class_id_in_other_words(
        *call['args'], label_classes=words[source], own_classes=words[target]
    )
    assert found == words[target].index(call['result'])
