"""Prompts that answer together: each of them as alone, and all of them as one."""

import jax
import numpy as np
import pytest

from prompt_tuning_jax import partitioning
from prompt_tuning_jax.artifact import save_prompt
from prompt_tuning_jax.checkpoints.load import load_backbone
from prompt_tuning_jax.data.tokenized_task import TokenizedTask
from prompt_tuning_jax.evaluation import evaluator as evaluator_lib
from prompt_tuning_jax.evaluation import ranking
from prompt_tuning_jax.evaluation.decoding import Decoding
from prompt_tuning_jax.evaluation.ensemble import EnsembleEvaluator
from prompt_tuning_jax.evaluation.evaluate import evaluate
from prompt_tuning_jax.evaluation.evaluator import Evaluator
from prompt_tuning_jax.evaluation.infer import ensemble, generate, rank
from prompt_tuning_jax.evaluation.report import evaluate_prompts
from prompt_tuning_jax.json_files import read_jsonl
from prompt_tuning_jax.typing import Injection

CLASSES = ['yes', 'no', 'not at all']
WORDS = 'the old man and a sea that was green under his small boat'.split()
SHAPE = dict(feature_lengths={'inputs': 27, 'targets': 8}, lengths='pad', progress=False)


@pytest.fixture(scope='module')
def prompts(backbone):
  """Three soft prompts of different lengths that disagree."""
  width = backbone.spec.d_model
  return [
      Injection(scale * jax.random.normal(jax.random.key(seed), (length, width)))
      for seed, length, scale in ((1, 5, 1.0), (2, 3, 2.0), (3, 4, 3.0))
  ]


def make_task(backbone, name='toy', count=7, **fields):
  rng = np.random.default_rng(0)
  examples = [
      {
          'inputs': ' '.join(rng.choice(WORDS, rng.integers(1, 5))),
          'targets': CLASSES[i % 3],
          'idx': i,
      }
      for i in range(count)
  ]
  return TokenizedTask.from_examples(
      examples, backbone.vocabulary, name=name, split='validation', **fields
  )


@pytest.fixture(scope='module')
def task(backbone):
  return make_task(backbone, label_classes=CLASSES)


@pytest.fixture(scope='module')
def alone(backbone, prompts, task):
  return [evaluate(backbone, prompt, task, batch_size=4, **SHAPE) for prompt in prompts]


def assert_same_predictions(found, expected):
  assert found.metrics == expected.metrics
  for one, other in zip(found.predictions, expected.predictions, strict=True):
    for name in ('index', 'target', 'prediction', 'prediction_text', 'inputs', 'idx'):
      assert one[name] == other[name]
    if 'scores' in other:
      assert one['scores'] == pytest.approx(other['scores'], rel=1e-5)
    else:
      assert one['score'] == pytest.approx(other['score'], rel=1e-5)


@pytest.mark.parametrize('lengths', ['pad', 'bucket'])
def test_each_member_of_an_ensemble_answers_as_alone(lengths, backbone, prompts, task, alone):
  settings = SHAPE | {'lengths': lengths}
  of_each, of_all = EnsembleEvaluator(backbone, prompts, task, batch_size=10, **settings)()
  for found, expected in zip(of_each, alone, strict=True):
    assert_same_predictions(found, expected)
  for number, together in enumerate(of_all.predictions):
    texts = [result.predictions[number]['prediction_text'] for result in alone]
    scores = [list(result.predictions[number]['scores'].values()) for result in alone]
    counts = [texts.count(name) for name in CLASSES]
    means = np.mean(scores, axis=0)
    best = max(range(3), key=lambda c: (counts[c], means[c]))
    assert together['prediction'] == best
    assert together['votes'] == {name: n for name, n in zip(CLASSES, counts) if n}
    assert list(together['scores'].values()) == pytest.approx(means, rel=1e-5)
  right = [p['prediction'] == p['target'] for p in of_all.predictions]
  assert of_all.metrics == {'accuracy': pytest.approx(100 * np.mean(right))}
  # Not all of them agree, or there would be nothing to see.
  assert any(len(p['votes']) > 1 for p in of_all.predictions)


def test_the_mean_of_log_probabilities_decides_where_that_is_asked_for(
    backbone, prompts, task, alone
):
  _, of_all = EnsembleEvaluator(backbone, prompts, task, ensemble='mean', batch_size=12, **SHAPE)()
  means = np.mean(
      [[list(p['scores'].values()) for p in result.predictions] for result in alone], axis=0
  )
  assert [p['prediction'] for p in of_all.predictions] == means.argmax(axis=1).tolist()


def test_an_ensemble_of_one_prompt_is_that_prompt(backbone, prompts, task, alone):
  for kind in ('vote', 'mean'):
    of_each, of_all = EnsembleEvaluator(
        backbone, prompts[:1], task, ensemble=kind, batch_size=12, **SHAPE
    )()
    for found in (*of_each, of_all):
      assert_same_predictions(found, alone[0])


def test_an_ensemble_is_compiled_once_and_takes_the_weights_of_the_moment(
    backbone, prompts, task
):
  evaluator = EnsembleEvaluator(backbone, prompts, task, batch_size=12, **SHAPE)
  first = evaluator()[1]
  compiled = ranking.score_choices._cache_size()
  smaller = evaluator(jax.tree.map(lambda x: 0.5 * x, backbone.params))[1]
  assert ranking.score_choices._cache_size() == compiled
  assert first.predictions[0]['scores'] != pytest.approx(smaller.predictions[0]['scores'])


def test_a_batch_has_the_rows_of_the_examples_that_fit_and_of_one_at_least(backbone, prompts, task):
  for batch_size, rows in ((10, 9), (2, 3), (100, 21)):
    evaluator = EnsembleEvaluator(backbone, prompts, task, batch_size=batch_size, **SHAPE)
    batch, _ = next(iter(evaluator._evaluator._batches))
    assert len(batch.prompt_ids) == rows


def test_texts_that_are_written_freely_are_voted_on(backbone, prompts):
  task = make_task(backbone)
  decoding = Decoding(strategy='sample', max_length=3, seed=1, temperature=0.5)
  settings = dict(decoding=decoding, batch_size=4, **SHAPE)
  of_each, of_all = EnsembleEvaluator(backbone, prompts, task, **settings)()
  for found, prompt in zip(of_each, prompts, strict=True):
    assert_same_predictions(found, evaluate(backbone, prompt, task, **settings))
  for number, together in enumerate(of_all.predictions):
    texts = [result.predictions[number]['prediction_text'] for result in of_each]
    assert texts.count(together['prediction_text']) == max(map(texts.count, texts))
  with pytest.raises(ValueError, match="'mean' .* classes of toy, but it has no classes"):
    EnsembleEvaluator(backbone, prompts, task, ensemble='mean', **settings)


def test_metrics_that_compare_scores_take_the_mean_of_the_prompts(backbone, prompts):
  def likelihood(targets, scores):
    assert len(targets) == len(scores)
    return {'likelihood': float(np.mean(scores))}

  task = make_task(backbone, label_classes=CLASSES, metric_fns=[likelihood])
  of_each, of_all = EnsembleEvaluator(backbone, prompts, task, batch_size=12, **SHAPE)()
  values = [
      evaluate(backbone, prompt, task, batch_size=4, **SHAPE).metrics['likelihood']
      for prompt in prompts
  ]
  assert [result.metrics['likelihood'] for result in of_each] == pytest.approx(values, rel=1e-5)
  assert of_all.metrics['likelihood'] == pytest.approx(np.mean(values), rel=1e-5)


def test_of_very_many_classes_the_best_are_voted_on(backbone, prompts, task, alone, monkeypatch):
  monkeypatch.setattr(evaluator_lib, '_MOST_SCORED', 2)
  of_each, of_all = EnsembleEvaluator(backbone, prompts, task, batch_size=12, **SHAPE)()
  for found, expected in zip(of_each, alone, strict=True):
    assert found.metrics == expected.metrics
  assert all('scores' not in p and 'votes' in p for p in of_all.predictions)
  with pytest.raises(ValueError, match='of its 3 classes only the best is searched for'):
    EnsembleEvaluator(backbone, prompts, task, ensemble='mean', **SHAPE)
  with pytest.raises(ValueError, match="EVAL_METHOD='generate' writes answers freely"):
    EnsembleEvaluator(backbone, prompts, task, ensemble='mean', method='generate', **SHAPE)


def test_a_split_without_labels_is_predicted_and_not_scored(backbone, prompts):
  task = make_task(backbone, label_classes=CLASSES)
  task.manifest['unlabelled'] = {'count': len(task), 'first': 0}
  _, of_all = EnsembleEvaluator(backbone, prompts, task, batch_size=12, **SHAPE)()
  assert of_all.metrics == {} and len(of_all.predictions) == len(task)
  with pytest.raises(ValueError, match='has no labels'):
    Evaluator(backbone, task, **SHAPE)


def test_prompts_of_different_templates_and_limits_answer_as_alone(
    backbone, prompts, task, tmp_path
):
  paths = []
  for number, (prompt, placement, limit) in enumerate(
      zip(prompts, ('suffix', '{3} {inputs}', 'prefix'), (16, 4, 9), strict=True)
  ):
    paths.append(str(tmp_path / f'{number}.safetensors'))
    save_prompt(
        paths[-1], prompt, backbone=backbone, placement=placement, step=number,
        feature_lengths={'inputs': limit, 'targets': 8},
    )  # fmt: skip
  with pytest.warns(UserWarning, match='cuts the inputs'):
    expected = [evaluate(backbone, path, task, progress=False) for path in paths]
  with pytest.warns(UserWarning, match='cuts the inputs'):
    found, _ = EnsembleEvaluator(backbone, paths, task, progress=False)()
  for one, other in zip(found, expected, strict=True):
    assert_same_predictions(one, other)
    assert (one.prompt, one.step) == (other.prompt, other.step)


def test_what_is_no_ensemble_is_refused(backbone, prompts, task):
  other_model = Injection(np.zeros((3, backbone.spec.d_model + 1), np.float32))
  spec = backbone.spec
  keys = np.zeros((spec.num_encoder_layers, 2, spec.num_heads, spec.d_kv), np.float32)
  for members, message in [
      ([], 'no prompt to stack'),
      ([prompts[0], other_model], 'd_model'),
      ([prompts[0], Injection(encoder_kv=(keys, keys))], 'of one kind'),
  ]:
    with pytest.raises(ValueError, match=message):
      EnsembleEvaluator(backbone, members, task, **SHAPE)
  with pytest.raises(ValueError, match="ENSEMBLE is 'both'"):
    EnsembleEvaluator(backbone, prompts, task, ensemble='both', **SHAPE)
  evaluator = Evaluator(backbone, task, num_virtual_tokens=5, **SHAPE)
  with pytest.raises(ValueError, match='rows for 1 prompts, but the Injection holds 2'):
    evaluator(Injection(np.zeros((10, spec.d_model), np.float32), num_prompts=2))
  with pytest.raises(ValueError, match='was given as one prompt'):
    evaluate(backbone, Injection(np.zeros((10, spec.d_model)), num_prompts=2), task, **SHAPE)


# The report.


def test_the_report_has_the_average_the_best_and_the_ensemble(
    backbone, prompts, task, alone, tmp_path
):
  second = make_task(backbone, name='second', label_classes=CLASSES)
  report = evaluate_prompts(
      backbone, prompts, [task, second], ensemble='vote', output_dir=str(tmp_path),
      batch_size=4, **SHAPE,
  )  # fmt: skip
  accuracies = [result.metrics['accuracy'] for result in alone]
  together = report.ensembles['toy'].metrics['accuracy']
  rows = [line for line in repr(report).splitlines() if line.startswith('|')]
  cells = [cell.strip() for cell in rows[2].strip('|').split('|')]
  assert [cell.strip() for cell in rows[0].strip('|').split('|')][3:6] == [
      'average', 'best', 'ensemble'
  ]  # fmt: skip
  average = f'{np.mean(accuracies):.2f} ± {np.std(accuracies, ddof=1):.2f}'
  assert cells == [
      'toy', 'validation', 'accuracy', average, f'{max(accuracies):.2f}', f'{together:.2f}',
      '7', '3',
  ]  # fmt: skip
  assert rows[-1].startswith('| mean of 2 tasks, accuracy')
  assert 'ensemble: what most prompts answer' in repr(report)
  described = report.as_dict()
  assert described['ensemble'] == 'vote'
  assert described['tasks']['toy']['ensemble'] == {'accuracy': together}
  assert described['averages']['mean of 2 tasks, accuracy']['best'] == max(accuracies)
  # The second task has the examples of the first.
  assert described['averages']['mean of 2 tasks, accuracy']['ensemble'] == together
  for number in range(3):
    folder = tmp_path / f'prompt_{number}' / 'inference_eval'
    assert len(read_jsonl(folder / 'second-validation-predictions.jsonl')) == 7
  kept = read_jsonl(tmp_path / 'ensemble' / 'inference_eval' / 'toy-validation-predictions.jsonl')
  assert kept == report.ensembles['toy'].predictions
  assert '± is the standard deviation' in (tmp_path / 'report.md').read_text()


def test_no_task_is_evaluated_before_all_ensembles_are_checked(backbone, prompts, task, tmp_path):
  free = make_task(backbone, name='free')
  with pytest.raises(ValueError, match='free, but it has no classes'):
    evaluate_prompts(
        backbone, prompts, [task, free], ensemble='mean', output_dir=str(tmp_path), **SHAPE
    )
  assert not list(tmp_path.iterdir())


# Texts.

TEXTS = ['the sea', 'a boat', 'the old man']


def test_prompts_answer_texts_together_as_they_rank_them_alone(backbone, prompts):
  found = ensemble(backbone, prompts, TEXTS, choices=CLASSES, batch_size=4)
  each = [rank(backbone, prompt, TEXTS, CLASSES) for prompt in prompts]
  for number, answer in enumerate(found):
    labels = [of_one[number].label for of_one in each]
    means = {
        name: np.mean([of_one[number].scores[name] for of_one in each]) for name in CLASSES
    }
    assert answer.votes == {label: labels.count(label) for label in labels}
    assert answer.scores == pytest.approx(means, rel=1e-5)
    assert answer.label == max(CLASSES, key=lambda c: (labels.count(c), means[c]))
  by_mean = ensemble(backbone, prompts, TEXTS, choices=CLASSES, how='mean')
  assert [a.label for a in by_mean] == [max(a.scores, key=a.scores.get) for a in found]


def test_texts_written_by_several_prompts_are_those_of_each(backbone, prompts):
  settings = dict(decode='sample', max_length=3, seed=2, temperature=0.5)
  found = ensemble(backbone, prompts, TEXTS, **settings)
  each = [generate(backbone, prompt, TEXTS, **settings) for prompt in prompts]
  for answer, written in zip(found, zip(*each), strict=True):
    assert answer.votes == {text: written.count(text) for text in written}
    assert list(answer.scores) == [answer.label]
  one = ensemble(backbone, prompts[:1], TEXTS, **settings)
  assert [answer.label for answer in one] == each[0]


def test_texts_that_are_cut_are_counted_once_whatever_the_number_of_prompts(backbone, prompts):
  texts = [*TEXTS[:2], 20 * TEXTS[0]]
  with pytest.warns(UserWarning, match='^1 of 3 texts are longer .*; worst text 2, counted from'):
    ensemble(backbone, prompts, texts, choices=CLASSES, max_input_length=40)


def test_what_is_no_ensemble_of_texts_is_refused(backbone, prompts):
  for arguments, message in [
      ((prompts[0], TEXTS), 'prompts is Injection.* give a list of the prompts'),
      (([], TEXTS), r'prompts is \[\]'),
      ((prompts, 'the sea'), "texts is the one text 'the sea'"),
  ]:
    with pytest.raises(ValueError, match=message):
      ensemble(backbone, *arguments, choices=CLASSES)
  with pytest.raises(ValueError, match="'mean' .* there are none"):
    ensemble(backbone, prompts, TEXTS, how='mean')
  assert ensemble(backbone, prompts, [], choices=CLASSES) == []


@pytest.mark.slow
def test_a_mesh_changes_no_answer_of_an_ensemble(golden, backbone, prompts, task):
  on_mesh = load_backbone(
      golden / 'hf' / 't5v11' / 'hf',
      vocabulary=golden / 'hf' / 'tokenizer' / 'spiece.model',
      mesh=partitioning.make_mesh(2),
  )
  settings = dict(batch_size=9, **SHAPE)
  alone = EnsembleEvaluator(backbone, prompts, task, **settings)()
  on_devices = EnsembleEvaluator(on_mesh, prompts, task, **settings)()
  for found, expected in zip([*on_devices[0], on_devices[1]], [*alone[0], alone[1]], strict=True):
    assert_same_predictions(found, expected)
  texts = ensemble(on_mesh, prompts, TEXTS, choices=CLASSES)
  assert [a.votes for a in texts] == [
      a.votes for a in ensemble(backbone, prompts, TEXTS, choices=CLASSES)
  ]
