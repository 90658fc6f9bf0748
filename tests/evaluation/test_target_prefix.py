"""Targets behind a sentinel: ranked, written, trained, and remembered by the prompt."""

import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax.artifact import save_prompt
from prompt_tuning_jax.checkpoints.load import load_backbone
from prompt_tuning_jax.data.padding import make_batch
from prompt_tuning_jax.data.target_prefix import with_target_prefix
from prompt_tuning_jax.data.tokenized_task import TokenizedTask
from prompt_tuning_jax.evaluation import ranking
from prompt_tuning_jax.evaluation.ensemble import EnsembleEvaluator
from prompt_tuning_jax.evaluation.evaluate import Evaluator, evaluate
from prompt_tuning_jax.evaluation.infer import generate, rank
from prompt_tuning_jax.prompt_files import load_prompt
from prompt_tuning_jax.typing import Injection

SENTINEL = '<extra_id_0>'
CLASSES = ['yes', 'no', 'a small animal']
TEXTS = ['the sun', 'it is a house', 'red', 'what']
SETTINGS = dict(feature_lengths={'inputs': 12, 'targets': 8}, progress=False)


@pytest.fixture(scope='module')
def tiny(backbone_dir):
  return load_backbone(backbone_dir)


@pytest.fixture(scope='module')
def task(tiny):
  return TokenizedTask.from_examples(
      [{'inputs': text, 'targets': CLASSES[i % 3]} for i, text in enumerate(TEXTS)],
      tiny.vocabulary,
      name='toy',
      label_classes=CLASSES,
  )


@pytest.fixture
def prompts(tiny, tmp_path):
  """Two prompts of one kind, trained behind a sentinel as their manifests say."""
  paths = []
  for number in range(2):
    rows = np.random.default_rng(number).normal(size=(3, tiny.spec.d_model))
    paths.append(str(tmp_path / f'{number}.safetensors'))
    save_prompt(
        paths[-1],
        Injection(virtual_embeddings=jnp.asarray(rows, jnp.float32)),
        backbone=tiny,
        target_prefix=SENTINEL,
        feature_lengths=SETTINGS['feature_lengths'],
    )
  return paths


def by_hand(tiny, task, index, injection):
  """The log-probabilities of the sentinel and each class, teacher-forced."""
  vocabulary = tiny.vocabulary
  first = vocabulary.sentinel_ids[0]
  batch = make_batch(
      [
          {'inputs': task[index]['inputs'], 'targets': [first, *vocabulary.encode(c), 1]}
          for c in CLASSES
      ],
      input_length=12,
      target_length=8,
      vocab_size=tiny.spec.vocab_size,
      num_virtual_tokens=3,
  )
  return ranking.score_targets(tiny.module, tiny.params, batch, injection)


def test_classes_are_ranked_behind_the_sentinel(tiny, task, prompts):
  result = evaluate(tiny, prompts[0], task, **SETTINGS)
  plain = evaluate(tiny, prompts[0], task, target_prefix='', **SETTINGS)
  ranked = rank(tiny, prompts[0], TEXTS, CLASSES)
  injection = load_prompt(prompts[0]).injection
  for index, prediction in enumerate(result.predictions):
    expected = np.asarray(by_hand(tiny, task, index, injection))
    np.testing.assert_allclose(list(prediction['scores'].values()), expected, rtol=1e-4)
    np.testing.assert_allclose(list(ranked[index].scores.values()), expected, rtol=1e-4)
    assert list(prediction['scores']) == CLASSES
    assert prediction['prediction_text'] == CLASSES[int(expected.argmax())] == ranked[index].label
    assert prediction['target'] == index % 3
    others = list(plain.predictions[index]['scores'].values())
    assert np.abs(expected - others).min() > 0.1


def test_prompts_answer_together_behind_it(tiny, task, prompts):
  of_each, _ = EnsembleEvaluator(tiny, prompts, task, **SETTINGS)()
  for prompt, result in zip(prompts, of_each, strict=True):
    alone = evaluate(tiny, prompt, task, **SETTINGS)
    for one, other in zip(alone.predictions, result.predictions, strict=True):
      np.testing.assert_allclose(
          list(one['scores'].values()), list(other['scores'].values()), rtol=1e-4
      )
  other = Injection(virtual_embeddings=jnp.ones((3, tiny.spec.d_model)))
  with pytest.raises(ValueError, match='targets that begin differently'):
    EnsembleEvaluator(tiny, [prompts[0], other], task, **SETTINGS)
  with pytest.raises(ValueError, match='targets that begin differently'):
    rank(tiny, [prompts[0], other], TEXTS[:2], CLASSES)


class Writes:
  """A decoding that writes the same tokens for every row."""

  max_length = 8

  def __init__(self, tokens):
    self.tokens = tokens

  def __call__(self, module, params, inputs_BS, injection, **others):
    rows = len(inputs_BS)
    return np.tile(self.tokens, (rows, 1, 1)), np.zeros((rows, 1))


def test_what_is_written_is_compared_without_it(tiny, task):
  vocabulary = tiny.vocabulary
  tokens = [vocabulary.sentinel_ids[0], *vocabulary.encode('a small animal'), 1]
  found = Evaluator(
      tiny,
      with_target_prefix(task, SENTINEL),
      method='generate',
      decoding=Writes(tokens),
      **SETTINGS,
  )()
  assert {p['prediction_text'] for p in found.predictions} == {'a small animal'}
  assert found.metrics == {'accuracy': 25.0}
  # Without the sentinel in the targets it is part of the answer.
  plain = Evaluator(tiny, task, method='generate', decoding=Writes(tokens), **SETTINGS)()
  assert plain.metrics == {'accuracy': 0.0}


def test_texts_are_answered_without_it(tiny, prompts, monkeypatch):
  vocabulary = tiny.vocabulary
  tokens = [vocabulary.sentinel_ids[0], *vocabulary.encode('red sun'), 1]
  monkeypatch.setattr(
      'prompt_tuning_jax.evaluation.infer.Decoding', lambda **settings: Writes(tokens)
  )
  assert generate(tiny, prompts[0], TEXTS) == ['red sun'] * 4
  assert generate(tiny, None, TEXTS[:1]) == ['<extra_id_0> red sun']


def test_the_manifest_says_it(prompts):
  prompt = load_prompt(prompts[0])
  assert prompt.manifest.target_prefix == SENTINEL
  assert 'targets begin with <extra_id_0>' in repr(prompt)
