"""Runs of every method: resumed to the bit, and kept without what only trains."""

import os

import numpy as np
import pytest

from prompt_tuning_jax.data.cache import load_task
from prompt_tuning_jax.evaluation.evaluate import evaluate
from prompt_tuning_jax.evaluation.infer import generate, rank
from prompt_tuning_jax.methods.combined import Combined, InDecoder
from prompt_tuning_jax.methods.deep_prompt import DeepPrompt
from prompt_tuning_jax.methods.prefix import Prefix
from prompt_tuning_jax.methods.soft_prompt import SoftPrompt
from prompt_tuning_jax.training.optimizers import adamw
from prompt_tuning_jax.training.train import train
from tests.checkpoints.samples import assert_same_trees
from tests.training.conftest import FEATURE_LENGTHS

METHODS = {
    'prefix': Prefix(3, hidden=64),
    'deep prompt': DeepPrompt(3),
    'combined': Combined([SoftPrompt(2), Prefix(2, hidden=8), InDecoder(SoftPrompt(2))]),
}


def tune(method, backbone, cache_dir, model_dir, train_steps):
  return train(
      backbone=backbone,
      task='which_animal',
      model_dir=str(model_dir),
      train_steps=train_steps,
      method=method,
      trainable=adamw(1e-2),
      batch_size=8,
      feature_lengths=FEATURE_LENGTHS,
      log_period=2,
      cache_dir=cache_dir,
      progress=False,
      created_by='a test',
  )


@pytest.mark.parametrize(
    'name', ['prefix', *(pytest.param(n, marks=pytest.mark.slow) for n in list(METHODS)[1:])]
)
def test_a_run_of_two_parts_is_the_run_of_one_and_its_artifact_is_small(
    name, random_backbone, vocabulary, cache_dir, tmp_path
):
  method = METHODS[name]
  whole = tune(method, random_backbone, cache_dir, tmp_path / 'whole', 6)
  tune(method, random_backbone, cache_dir, tmp_path / 'parts', 3)
  parts = tune(method, random_backbone, cache_dir, tmp_path / 'parts', 6)
  assert_same_trees(parts.params, whole.params)
  artifacts = [tmp_path / run / 'prompt.safetensors' for run in ('whole', 'parts')]
  assert artifacts[0].read_bytes() == artifacts[1].read_bytes()

  prompt = parts.prompt
  assert prompt.manifest.method == type(method).__name__
  expected = method.apply({'params': whole.params['prompt']}, random_backbone.spec)
  assert_same_trees(prompt.injection, expected)
  if name == 'prefix':  # The network stays in the run's own states.
    state = (tmp_path / 'parts' / 'checkpoint_6').rglob('*')
    assert os.path.getsize(prompt.source) < sum(path.stat().st_size for path in state) / 5

  task = load_task('which_animal', 'validation', vocabulary, cache_dir=cache_dir)
  result = evaluate(random_backbone, prompt.source, task, progress=False)
  assert result.metrics == whole.metrics
  texts = [task.example(index)['inputs_pretokenized'] for index in range(3)]
  ranked = rank(random_backbone, prompt, texts, ['yes', 'no'])
  of_task = {p['index']: p['scores'] for p in result.predictions}
  for index, found in enumerate(ranked):
    for label, score in found.scores.items():
      np.testing.assert_allclose(score, of_task[index][label], rtol=1e-5)
  assert len(generate(random_backbone, prompt, texts, max_length=3)) == 3


def test_prefixes_do_not_share_a_batch(random_backbone):
  method = Prefix(2, hidden=None)
  injection = method.apply(
      {'params': {site: np.zeros((2, 1, 2, 2, 8), np.float32) for site in method.sites}},
      random_backbone.spec,
  )
  with pytest.raises(ValueError, match='only if they are of one kind, with prefixes'):
    generate(random_backbone, [injection, None], ['a', 'b'], max_length=2)
