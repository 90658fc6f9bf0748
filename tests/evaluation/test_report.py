"""Scores over prompts and tasks: means, deviations, averages, and the files that keep them."""

import json
import math

import numpy as np
import pytest

from prompt_tuning_jax.artifact import save_prompt
from prompt_tuning_jax.data.tokenized_task import TokenizedTask
from prompt_tuning_jax.evaluation.evaluate import evaluate
from prompt_tuning_jax.evaluation.report import SUPER_GLUE_SCORE, Report, evaluate_prompts
from prompt_tuning_jax.evaluation.results import EvalResult
from prompt_tuning_jax.evaluation.super_glue import METRICS, super_glue_score
from prompt_tuning_jax.json_files import read_jsonl
from prompt_tuning_jax.typing import Injection

SHAPE = dict(
    batch_size=4, feature_lengths={'inputs': 16, 'targets': 8}, lengths='pad', progress=False
)


def results(task, *metrics, split='validation', count=3):
  predictions = [{'index': n, 'idx': n, 'prediction': 0} for n in range(count)]
  return [EvalResult(task, split, m, predictions) for m in metrics]


def test_prompts_have_a_mean_and_the_deviation_of_a_sample():
  report = Report({'a': results('a', *({'accuracy': x} for x in (50.0, 53.0, 59.0)))})
  assert report.scores('a') == {'accuracy': [50.0, 53.0, 59.0]}
  described = report.as_dict()['tasks']['a']['metrics']['accuracy']
  # (4² + 1² + 5²) / 2 = 21
  assert described['mean'] == 54.0 and described['std'] == pytest.approx(math.sqrt(21))
  assert '| a    | validation | accuracy | 54.00 ± 4.58 |        3 |       3 |' in repr(report)
  assert '± is the standard deviation of the sample, over prompts.' in repr(report)


def test_a_single_result_is_a_line():
  assert repr(Report({'a': results('a', {'accuracy': 50.0})})) == (
      'a, validation: accuracy 50.00 (3 examples)'
  )


def test_metrics_that_all_tasks_have_are_averaged_over_tasks():
  report = Report({
      'a': results('a', {'hit_at_1': 10.0, 'em': 1.0}, {'hit_at_1': 20.0, 'em': 1.0}),
      'b': results('b', {'hit_at_1': 30.0}, {'hit_at_1': 60.0}),
  })
  assert report.averages == {'mean of 2 tasks, hit_at_1': [20.0, 40.0]}
  assert '30.00 ± 14.14' in repr(report)
  uneven = Report({'a': report.results['a'], 'b': report.results['b'][:1]})
  # Prompts that have no counterpart: the mean of the tasks' means.
  assert uneven.averages == {'mean of 2 tasks, hit_at_1': [pytest.approx((15 + 30) / 2)]}
  assert Report({'a': report.results['a']}).averages == {}


def super_glue(*, without=(), seeds=2):
  rng = np.random.default_rng(0)
  found = {}
  for task, names in METRICS.items():
    name = f'taskless_super_glue_{task}_v102' + '_simple_eval' * (task == 'wsc')
    if task not in without:
      scores = [{metric: float(rng.uniform(0, 100)) for metric in names} for _ in range(seeds)]
      found[name] = results(name, *scores)
  return found


def test_the_score_of_super_glue_is_made_for_each_prompt():
  found = super_glue()
  found['super_glue_axb_v102'] = results('super_glue_axb_v102', *[{'matthews_corrcoef': 3.0}] * 2)
  report = Report(found)
  by_hand = [
      super_glue_score({task: of_task[seed].metrics for task, of_task in found.items()})
      for seed in range(2)
  ]
  assert report.averages == {SUPER_GLUE_SCORE: by_hand}
  assert f'{np.mean(by_hand):.2f} ± {np.std(by_hand, ddof=1):.2f}' in repr(report)


def test_a_part_of_super_glue_has_no_score_and_says_what_is_missing():
  report = Report(super_glue(without=('rte', 'record')))
  assert report.averages == {}
  assert 'No SuperGLUE score: record, rte missing.' in repr(report)


def test_a_test_set_of_the_diagnostics_does_not_cost_the_score():
  found = super_glue(seeds=1)
  found['super_glue_axg_v102'] = results('super_glue_axg_v102', {}, split='test')
  report = Report(found)
  by_hand = super_glue_score(
      {task: of_task[0].metrics for task, of_task in found.items() if of_task[0].metrics}
  )
  assert report.averages == {SUPER_GLUE_SCORE: [by_hand]}


def test_a_task_that_is_there_twice_has_its_scores_and_says_what_cannot_be_made(tmp_path):
  found = super_glue(seeds=1)
  twice = {'accuracy': 1.0, 'mean_3class_f1': 2.0}
  found['super_glue_cb_v102'] = results('super_glue_cb_v102', twice)
  report = Report(found)
  assert report.averages == {}
  note = 'No SuperGLUE score: cb is there as taskless_super_glue_cb_v102 and as super_glue_cb_v102.'
  assert note in repr(report)
  kept = {name: of_task for name, of_task in found.items() if '_cb_' in name or '_rte_' in name}
  with pytest.warns(UserWarning, match='no file of cb for the leaderboard: CB.jsonl is to hold'):
    Report(kept).write(tmp_path)
  assert [path.name for path in (tmp_path / 'super_glue').iterdir()] == ['RTE.jsonl']
  assert (tmp_path / 'report.json').exists()


def test_what_was_not_scored_is_said():
  report = Report({'a': results('a', {'em': 1.0}), 'b': results('b', {}, split='test')})
  assert 'Predicted, not scored, having no labels: b.' in repr(report)
  assert report.averages == {}
  assert report.as_dict()['tasks']['b']['metrics'] == {}


def test_a_report_is_written_with_the_files_of_the_leaderboard(tmp_path):
  name = 'super_glue_cb_v102'
  metrics = {'accuracy': 1.0, 'mean_3class_f1': 2.0}
  report = Report({name: results(name, metrics, metrics), 'other': results('other', {'em': 1.0})})
  report.write(tmp_path)
  assert json.loads((tmp_path / 'report.json').read_text()) == report.as_dict()
  assert (tmp_path / 'report.md').read_text().startswith(repr(report).splitlines()[0])
  for number in range(2):
    lines = read_jsonl(tmp_path / f'prompt_{number}' / 'super_glue' / 'CB.jsonl')
    assert lines == [{'idx': n, 'label': 'entailment'} for n in range(3)]
  # Of one prompt they lie beside the report, and of what was trained on there are none.
  Report({name: results(name, metrics)}).write(tmp_path / 'one')
  assert (tmp_path / 'one' / 'super_glue' / 'CB.jsonl').exists()
  Report({name: results(name, metrics, split='train')}).write(tmp_path / 'train')
  assert not (tmp_path / 'train' / 'super_glue').exists()


@pytest.fixture(scope='module')
def tasks(backbone):
  words = ['sea', 'boat', 'old man', 'green sea', 'a boat']
  return [
      TokenizedTask.from_examples(
          [{'inputs': w, 'targets': classes[n % 2], 'idx': n} for n, w in enumerate(words)],
          backbone.vocabulary, name=name, split='validation', label_classes=classes,
      )
      for name, classes in {'first': ['yes', 'no'], 'second': ['up', 'down']}.items()
  ]  # fmt: skip


def test_several_prompts_score_what_each_scores_alone(
    backbone, soft_prompt, tasks, tmp_path, capsys
):
  other = Injection(np.asarray(soft_prompt.virtual_embeddings)[:3] * 2)
  prompts = [soft_prompt, other, None]
  report = evaluate_prompts(backbone, prompts, tasks, output_dir=str(tmp_path), **SHAPE)
  assert list(report.results) == ['first', 'second']
  for task in tasks:
    for number, prompt in enumerate(prompts):
      alone = evaluate(backbone, prompt, task, **SHAPE)
      assert report.results[task.name][number].metrics == alone.metrics
      assert report.results[task.name][number].predictions == alone.predictions
      folder = tmp_path / f'prompt_{number}' / 'inference_eval'
      assert read_jsonl(folder / f'{task.name}-validation-predictions.jsonl') == alone.predictions
  of_own = evaluate_prompts(
      backbone, {'first': [soft_prompt], 'second': [other]}, tasks, **SHAPE | {'progress': True}
  )
  assert of_own.scores('second')['accuracy'] == [report.scores('second')['accuracy'][1]]
  assert 'second, validation: accuracy' in capsys.readouterr().err
  with pytest.raises(ValueError, match='There is no prompt for second. .* some for first'):
    evaluate_prompts(backbone, {'first': [None]}, tasks, **SHAPE)


def test_a_prompt_of_another_model_is_refused_before_any_is_evaluated(
    backbone, soft_prompt, tasks, tmp_path
):
  wider = Injection(np.tile(np.asarray(soft_prompt.virtual_embeddings), (1, 2)))
  with pytest.raises(ValueError, match='d_model|wide'):
    evaluate_prompts(backbone, [soft_prompt, wider], tasks, output_dir=str(tmp_path), **SHAPE)
  assert not list(tmp_path.iterdir())


def test_prompts_say_where_they_came_from(backbone, soft_prompt, tasks, tmp_path):
  path = str(tmp_path / 'p.safetensors')
  save_prompt(path, soft_prompt, backbone=backbone)
  report = evaluate_prompts(backbone, [path], tasks[0], **SHAPE)
  assert report.as_dict()['tasks']['first']['prompts'] == [path]


def test_what_an_earlier_evaluation_left_for_the_leaderboard_is_no_part_of_the_next(tmp_path):
  rte, cb = 'super_glue_rte_v102', 'super_glue_cb_v102'
  Report({rte: results(rte, {'accuracy': 1.0}, {'accuracy': 1.0})}).write(tmp_path)
  Report({rte: results(rte, {'accuracy': 1.0})}).write(tmp_path)
  (tmp_path / 'super_glue' / 'mine.txt').touch()
  Report({cb: results(cb, {'accuracy': 1.0})}).write(tmp_path)
  found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob('super_glue/*')}
  assert found == {'super_glue/CB.jsonl', 'super_glue/mine.txt'}


def test_a_score_that_is_no_number_is_said_and_leaves_the_file_readable(tmp_path):
  report = Report({'a': results('a', {'pearson_corrcoef': math.nan}, {'pearson_corrcoef': 2.0})})
  report.write(tmp_path)
  metrics = json.loads((tmp_path / 'report.json').read_text())['tasks']['a']['metrics']
  assert metrics['pearson_corrcoef'] == {'mean': None, 'std': None, 'values': [None, 2.0]}
  assert 'nan ± nan' in repr(report)
