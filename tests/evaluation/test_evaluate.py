"""Evaluating a task: what is predicted, what is scored, and what is written."""

import json
import os

import jax
import numpy as np
import pytest

from prompt_tuning_jax import artifact
from prompt_tuning_jax.data import cache
from prompt_tuning_jax.data.file_task import FileTask
from prompt_tuning_jax.data.padding import make_batch
from prompt_tuning_jax.data.tokenized_task import TokenizedTask
from prompt_tuning_jax.evaluation import evaluator as evaluator_lib
from prompt_tuning_jax.evaluation import metrics, ranking
from prompt_tuning_jax.evaluation.decoding import Decoding
from prompt_tuning_jax.evaluation.evaluate import EvalResult, Evaluator, evaluate
from prompt_tuning_jax.typing import Injection

CLASSES = ['yes', 'no', 'not at all']
# One shape of batches throughout, so that few programs are compiled.
SHAPE = dict(
    batch_size=4, feature_lengths={'inputs': 27, 'targets': 8}, lengths='pad', progress=False
)
WORDS = 'the old man and a sea that was green under his small boat'.split()


def texts(count=7, seed=0):
  rng = np.random.default_rng(seed)
  return [' '.join(rng.choice(WORDS, rng.integers(1, 6))) for _ in range(count)]


def classification(backbone, count=7):
  examples = [
      {'inputs': text, 'targets': CLASSES[i % 3], 'idx': i}
      for i, text in enumerate(texts(count))
  ]
  return TokenizedTask.from_examples(
      examples, backbone.vocabulary, name='toy', label_classes=CLASSES
  )


@pytest.fixture(scope='module')
def task(backbone):
  return classification(backbone)


@pytest.fixture(scope='module')
def ranked(backbone, soft_prompt, task):
  return evaluate(backbone, soft_prompt, task, **SHAPE)


def test_the_ranked_class_is_the_likeliest_target(backbone, soft_prompt, task, ranked):
  encode = backbone.vocabulary.encode
  correct = 0
  for i, prediction in enumerate(ranked.predictions):
    batch = make_batch(
        [{'inputs': task[i]['inputs'], 'targets': [*encode(c), 1]} for c in CLASSES],
        input_length=27,
        target_length=8,
        vocab_size=512,
        num_virtual_tokens=5,
    )
    scores = ranking.score_targets(backbone.module, backbone.params, batch, soft_prompt)
    np.testing.assert_allclose(
        list(prediction['scores'].values()), scores, rtol=1e-4
    )
    best = int(np.argmax(scores))
    assert prediction['prediction'] == best
    assert prediction['prediction_text'] == CLASSES[best]
    assert prediction['target'] == i % 3
    assert prediction['inputs'] == texts()[i]
    correct += best == i % 3
  assert ranked.metrics == {'accuracy': pytest.approx(100 * correct / 7)}
  assert (ranked.task, ranked.split) == ('toy', 'train')


def test_of_very_many_classes_the_same_is_found_without_scoring_all(
    backbone, soft_prompt, task, ranked, monkeypatch
):
  monkeypatch.setattr(evaluator_lib, '_MOST_SCORED', 2)
  searched = evaluate(backbone, soft_prompt, task, **SHAPE)
  assert searched.metrics == ranked.metrics
  for found, scored in zip(searched.predictions, ranked.predictions, strict=True):
    assert 'scores' not in found
    assert found['score'] == pytest.approx(max(scored['scores'].values()), rel=1e-4)
    for name in ('index', 'prediction', 'prediction_text', 'target'):
      assert found[name] == scored[name]
  # Means cannot be searched for.
  means = evaluate(backbone, soft_prompt, task, normalize_by_length=True, **SHAPE)
  assert all(len(p['scores']) == len(CLASSES) for p in means.predictions)


def test_batch_size_and_lengths_change_no_score(backbone, soft_prompt, task, ranked):
  other = evaluate(
      backbone, soft_prompt, task, batch_size=3, lengths='bucket', progress=False
  )
  assert other.metrics == ranked.metrics
  for left, right in zip(other.predictions, ranked.predictions):
    assert left['index'] == right['index']
    np.testing.assert_allclose(
        list(left['scores'].values()), list(right['scores'].values()), rtol=1e-4
    )


def test_an_evaluator_takes_the_parameters_of_the_moment_without_compiling_again(
    backbone, soft_prompt, task
):
  evaluator = Evaluator(backbone, task, num_virtual_tokens=5, **SHAPE)
  first = evaluator(soft_prompt, backbone.params, step=1)
  compiled = ranking.score_choices._cache_size()
  moved = jax.tree.map(lambda x: x + 1.0, soft_prompt)
  second = evaluator(moved, backbone.params, step=2)
  smaller = jax.tree.map(lambda x: 0.5 * x, backbone.params)
  third = evaluator(soft_prompt, smaller)
  assert ranking.score_choices._cache_size() == compiled
  scores = [list(r.predictions[0]['scores'].values()) for r in (first, second, third)]
  assert not np.allclose(scores[0], scores[1]) and not np.allclose(scores[0], scores[2])
  assert (first.step, second.step, third.step) == (1, 2, None)


def test_tasks_and_prompts_may_be_named(backbone, soft_prompt, task, ranked, tmp_path):
  cache_dir = str(tmp_path / 'cache')
  task.save(cache.cache_path('toy', 'train', backbone.vocabulary, cache_dir))
  path = str(tmp_path / 'prompt.safetensors')
  artifact.save_prompt(path, soft_prompt, backbone=backbone, method='SoftPrompt')
  named = evaluate(backbone, path, 'toy', split='train', cache_dir=cache_dir, **SHAPE)
  assert named.metrics == ranked.metrics
  assert [p['scores'] for p in named.predictions] == [p['scores'] for p in ranked.predictions]


def test_a_task_of_files_is_scored_as_the_same_examples_are(
    backbone, soft_prompt, ranked, tmp_path
):
  rows = [f'{text}\t{i % 3}' for i, text in enumerate(texts())]
  (tmp_path / 'toy.tsv').write_text('\n'.join(['text\tlabel', *rows]))
  mine = FileTask('toy', {'train': tmp_path / 'toy.tsv'}, 'text', 'label',
                  label_names=dict(enumerate(CLASSES)))  # fmt: skip
  settings = dict(split='train', cache_dir=str(tmp_path / 'cache'), **SHAPE)
  found = evaluate(backbone, soft_prompt, mine, **settings)
  assert found.metrics == ranked.metrics
  assert [p['scores'] for p in found.predictions] == [p['scores'] for p in ranked.predictions]
  assert evaluate(backbone, soft_prompt, [mine], **settings)['toy'].metrics == found.metrics


def test_several_splits_of_a_task_have_a_result_each(backbone, task):
  other = TokenizedTask.from_examples(
      [{'inputs': 'a boat', 'targets': 'no'}],
      backbone.vocabulary,
      name='toy',
      split='test',
      label_classes=CLASSES,
  )
  results = evaluate(backbone, None, [task, other], **SHAPE)
  assert {name: len(result.predictions) for name, result in results.items()} == {
      'toy/train': 7, 'toy/test': 1
  }
  with pytest.raises(ValueError, match='toy/test, toy/test. Name each once'):
    evaluate(backbone, None, [other, other], **SHAPE)
  with pytest.raises(ValueError, match='nothing to evaluate'):
    evaluate(backbone, None, [], **SHAPE)


def test_what_is_measured_is_known_without_the_model(backbone, task, ranked):
  assert Evaluator(backbone, task, **SHAPE).metric_names() == list(ranked.metrics)


def test_generation_is_scored_by_the_text_that_is_decoded(backbone, soft_prompt, task):
  result = evaluate(
      backbone, soft_prompt, task, method='generate', **SHAPE
  )
  for i, prediction in enumerate(result.predictions):
    text = prediction['prediction_text']
    expected = CLASSES.index(text) if text in CLASSES else -1
    assert prediction['prediction'] == expected
    assert isinstance(prediction['score'], float) and prediction['score'] < 0
  # A random model does not spell a class: nothing it says is right.
  assert result.metrics == {'accuracy': 0.0}


def test_a_task_without_classes_is_generated_and_scored_as_text(backbone):
  examples = [{'inputs': text, 'targets': 'the sea'} for text in texts(4)]
  task = TokenizedTask.from_examples(examples, backbone.vocabulary, name='text')
  decoding = Decoding(strategy='sample', max_length=4, seed=3)
  result = evaluate(backbone, None, task, decoding=decoding, **SHAPE)
  by_hand = decoding(
      backbone.module,
      backbone.params,
      make_batch(
          [task[i] for i in range(4)],
          input_length=27,
          target_length=8,
          vocab_size=512,
      ).encoder_input_tokens,
  )
  assert [p['prediction_text'] for p in result.predictions] == [
      backbone.vocabulary.decode(tokens) for tokens in np.asarray(by_hand.tokens_BKT)[:, 0]
  ]
  assert [p['target'] for p in result.predictions] == ['the sea'] * 4
  assert result.metrics == {'accuracy': 0.0}


def mean_log_probability(targets, scores):
  """A metric over scores, told by the name of its argument as in seqio."""
  assert len(targets) == len(scores)
  return {'mean_log_probability': np.mean(scores)}


def test_a_metric_over_scores_gets_the_log_probability_of_each_target(backbone):
  labels = [*CLASSES, 'no']
  examples = [{'inputs': t, 'targets': c} for t, c in zip(texts(4), labels)]
  task = TokenizedTask.from_examples(
      examples,
      backbone.vocabulary,
      name='scored',
      label_classes=CLASSES,
      metric_fns=[mean_log_probability, metrics.accuracy],
  )
  task._live_functions = {
      'metric_fns': [mean_log_probability, metrics.accuracy],
      'postprocess_fn': task.postprocess_fn,
  }
  result = evaluate(backbone, None, task, **SHAPE)
  expected = [p['scores'][c] for p, c in zip(result.predictions, labels)]
  assert result.metrics['mean_log_probability'] == pytest.approx(
      np.mean(expected), rel=1e-4
  )
  assert set(result.metrics) == {'mean_log_probability', 'accuracy'}


def test_an_artifact_brings_its_lengths_and_placement(backbone, soft_prompt, task, tmp_path):
  prompt = artifact.save_prompt(
      tmp_path / 'p.safetensors',
      soft_prompt,
      backbone=backbone,
      placement='suffix',
      feature_lengths=SHAPE['feature_lengths'],
      step=30,
  )
  result = evaluate(backbone, prompt, task, batch_size=4, lengths='pad', progress=False)
  by_hand = evaluate(backbone, soft_prompt, task, placement='suffix', **SHAPE)
  in_front = evaluate(backbone, soft_prompt, task, **SHAPE)
  assert result.predictions == by_hand.predictions
  assert result.predictions != in_front.predictions
  assert result.step == 30


def test_several_tasks_give_a_result_each(backbone, task):
  other = classification(backbone, count=5)
  other.manifest['task'] = 'other'
  results = evaluate(backbone, None, [task, other], **SHAPE)
  assert {name: len(r.predictions) for name, r in results.items()} == {
      'toy': 7,
      'other': 5,
  }


def read(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_results_are_written_once_for_each_step_and_split(tmp_path):
  def write(step, accuracy, split='validation'):
    predictions = [{'index': 0, 'prediction_text': f'{accuracy}'}]
    evaluator_lib.write_result(
        EvalResult('a/b', split, {'accuracy': accuracy}, predictions, step), tmp_path
    )

  path = tmp_path / 'inference_eval' / 'a_b-metrics.jsonl'
  write(10, 50.0)
  write(20, 60.0)
  write(20, 61.0)
  write(20, 62.0, split='test')
  assert read(path) == [
      {'step': 10, 'split': 'validation', 'accuracy': 50.0},
      {'step': 20, 'split': 'validation', 'accuracy': 61.0},
      {'step': 20, 'split': 'test', 'accuracy': 62.0},
  ]
  # A crash in mid-line costs that line and nothing else.
  path.write_text(path.read_text()[:-9])
  write(30, 70.0)
  assert [record['step'] for record in read(path)] == [10, 20, 30]
  assert read(tmp_path / 'inference_eval' / 'a_b-validation-predictions.jsonl') == [
      {'index': 0, 'prediction_text': '70.0'}
  ]
  assert not [name for name in os.listdir(path.parent) if name.endswith('.tmp')]


def test_results_of_other_prompts_and_splits_stay(tmp_path):
  for prompt in ('a.npy', 'b.npy'):
    for split in ('validation', 'test'):
      predictions = [{'index': 0, 'prediction_text': split}]
      evaluator_lib.write_result(
          EvalResult('toy', split, {'accuracy': 1.0}, predictions, prompt=prompt), tmp_path
      )
  folder = tmp_path / 'inference_eval'
  assert [(r['prompt'], r['split']) for r in read(folder / 'toy-metrics.jsonl')] == [
      ('a.npy', 'validation'), ('a.npy', 'test'), ('b.npy', 'validation'), ('b.npy', 'test'),
  ]  # fmt: skip
  for split in ('validation', 'test'):
    (record,) = read(folder / f'toy-{split}-predictions.jsonl')
    assert record['prediction_text'] == split


def test_an_evaluation_keeps_the_results_of_other_prompts(backbone, task, tmp_path):
  paths = [str(tmp_path / name) for name in ('a.safetensors', 'b.safetensors')]
  for path in (*paths, paths[0]):
    rows = np.ones((5, backbone.spec.d_model), np.float32)
    artifact.save_prompt(path, Injection(rows), backbone=backbone)
    result = evaluate(backbone, path, task, output_dir=str(tmp_path), **SHAPE)
    assert result.prompt == path
  records = read(tmp_path / 'inference_eval' / 'toy-metrics.jsonl')
  assert [record['prompt'] for record in records] == [paths[1], paths[0]]


def test_generated_answers_are_as_long_as_targets_where_nobody_says(backbone, task):
  for decoding in (None, Decoding(max_length=None), Decoding(strategy='beam', max_length=None)):
    evaluator = Evaluator(backbone, task, method='generate', decoding=decoding, **SHAPE)
    assert evaluator(None).predictions
    assert evaluator._decoding.max_length == SHAPE['feature_lengths']['targets']


def test_predictions_are_compared_as_targets_are_kept(backbone, tmp_path):
  """Through JSON: a tuple is a list, numpy's numbers are ours, bytes are text."""

  def postprocess(text, **unused):
    return (np.int64(len(text)), text.encode(), np.float32(0.5))

  answers = [text.split()[0] for text in texts(4)]
  task = TokenizedTask.from_examples(
      [{'inputs': t, 'targets': a} for t, a in zip(texts(4), answers)],
      backbone.vocabulary,
      name='tuples',
      postprocess_fn=postprocess,
      metric_fns=[metrics.accuracy],
  )
  evaluator = Evaluator(backbone, task, method='generate', output_dir=str(tmp_path), **SHAPE)
  result = evaluator.result([(answer, {'score': 0.0}) for answer in answers], list)
  assert result.metrics == {'accuracy': 100.0}
  assert result.predictions[0]['prediction'] == [len(answers[0]), answers[0], 0.5]
  evaluator_lib.write_result(result, tmp_path)


def test_an_evaluator_writes_what_it_returns(backbone, task, tmp_path):
  evaluator = Evaluator(backbone, task, output_dir=str(tmp_path), **SHAPE)
  result = evaluator(None, step=5)
  folder = tmp_path / 'inference_eval'
  assert read(folder / 'toy-train-predictions.jsonl') == result.predictions
  assert read(folder / 'toy-metrics.jsonl') == [
      {'step': 5, 'split': 'train', **result.metrics}
  ]


def test_what_does_not_fit_is_refused_before_anything_is_computed(
    backbone, soft_prompt, task
):
  with pytest.raises(ValueError, match="No evaluation method 'rnak'"):
    Evaluator(backbone, task, method='rnak')
  evaluator = Evaluator(backbone, task, num_virtual_tokens=3, progress=False)
  with pytest.raises(ValueError, match='hold 3 virtual tokens, but the prompt has 5'):
    evaluator(soft_prompt)
  with pytest.raises(ValueError, match='but the prompt has 0'):
    evaluator(None)
  with pytest.raises(ValueError, match='virtual_embeddings has shape'):
    evaluate(backbone, Injection(np.zeros((5, 3))), task)
  partly = classification(backbone)
  partly.manifest['unlabelled'] = {'count': 2, 'first': 0}
  with pytest.raises(ValueError, match='has no label for 2 of its 7 examples'):
    evaluate(backbone, None, partly)
  foreign = classification(backbone)
  foreign.manifest['vocabulary'] = {'fingerprint': 'f' * 64}
  with pytest.raises(ValueError, match='toy, .* was tokenised with another vocabulary'):
    evaluate(backbone, None, foreign)


def test_what_has_no_labels_is_predicted_but_not_scored(backbone, ranked, tmp_path):
  unlabelled = classification(backbone)
  unlabelled.manifest['unlabelled'] = {'count': len(unlabelled), 'first': 0}
  result = evaluate(backbone, None, unlabelled, output_dir=str(tmp_path), **SHAPE)
  assert result.metrics == {}
  assert repr(result) == 'toy, train: predicted, no labels to score with (7 examples)'
  assert [p['target'] for p in result.predictions] == [None] * 7
  assert os.listdir(tmp_path / 'inference_eval') == ['toy-train-predictions.jsonl']
  labelled = evaluate(backbone, None, classification(backbone), **SHAPE)
  assert [p['scores'] for p in result.predictions] == [
      p['scores'] for p in labelled.predictions
  ]
  # Training has to know how good a prompt is.
  with pytest.raises(ValueError, match='has no labels'):
    Evaluator(backbone, unlabelled, **SHAPE)


def test_a_result_prints_its_scores(ranked):
  assert repr(ranked) == (
      f'toy, train: accuracy {ranked.metrics["accuracy"]:.2f} (7 examples)'
  )
