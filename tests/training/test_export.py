"""What a run saved can be scored and exported again, as it was."""

import numpy as np
import pytest

from prompt_tuning_jax.checkpoints.load import load_backbone
from prompt_tuning_jax.export import export, restore_run
from prompt_tuning_jax.methods.soft_prompt import SoftPrompt
from prompt_tuning_jax.prompt_files import load_prompt
from prompt_tuning_jax.training.optimizers import adafactor, adamw
from prompt_tuning_jax.training.train import train
from tests.checkpoints.samples import assert_same_trees, flip_byte
from tests.training.conftest import FEATURE_LENGTHS

BOTH = {'prompt': adafactor(0.3), 'backbone': adamw(3e-3)}


def _train(backbone, cache_dir, model_dir, method, trainable):
  return train(
      backbone=backbone,
      task='which_animal',
      model_dir=str(model_dir),
      train_steps=4,
      method=method,
      trainable=trainable,
      batch_size=8,
      feature_lengths=FEATURE_LENGTHS,
      eval_period=2,
      cache_dir=cache_dir,
      progress=False,
  )


@pytest.mark.slow
def test_a_model_tuned_in_bfloat16_is_restored_as_it_was_trained(
    random_backbone, cache_dir, tmp_path
):
  backbone = load_backbone(random_backbone.source, dtype='bfloat16')
  tx = adamw(1e-3)
  result = _train(backbone, cache_dir, tmp_path, None, tx)
  run = restore_run(tmp_path, backbone, None, tx)
  assert run.tuned_backbone and run.injection is None
  assert_same_trees(run.params, result.params['backbone'])
  output = export(
      backbone=backbone,
      checkpoint_path=str(tmp_path),
      output=str(tmp_path / 'exported'),
      method=None,
      trainable=tx,
  )
  assert_same_trees(load_backbone(output).params, result.params['backbone'])


@pytest.mark.slow
def test_a_prompt_tuned_with_its_model_is_exported_with_it(
    random_backbone, cache_dir, tmp_path
):
  method = SoftPrompt(4)
  result = _train(random_backbone, cache_dir, tmp_path / 'run', method, BOTH)
  (tmp_path / 'out').mkdir()
  settings = dict(
      backbone=random_backbone,
      checkpoint_path=str(tmp_path / 'run'),
      output=str(tmp_path / 'out' / 'prompt.safetensors'),
      method=method,
      trainable=BOTH,
  )
  prompt = load_prompt(export(**settings))
  tuned = load_backbone(tmp_path / 'out' / 'backbone')
  prompt.check(tuned)
  assert_same_trees(tuned.params, result.params['backbone'])
  np.testing.assert_array_equal(
      prompt.injection.virtual_embeddings, result.params['prompt']['prompt']
  )
  with pytest.raises(ValueError, match='out/backbone exists. Name a PROMPT_FILE in another'):
    export(**settings)


def test_a_damaged_state_is_named_with_those_that_are_whole(
    random_backbone, cache_dir, tmp_path
):
  method, tx = SoftPrompt(4), adafactor(0.3)
  _train(random_backbone, cache_dir, tmp_path, method, tx)
  files = [path for path in (tmp_path / 'checkpoint_4' / 'state').rglob('*') if path.is_file()]
  flip_byte(max(files, key=lambda path: path.stat().st_size), -8)
  with pytest.raises(ValueError) as error:
    restore_run(tmp_path, random_backbone, method, tx)
  assert 'checkpoint_4 is damaged' in str(error.value)
  assert f'Set CHECKPOINT_PATH to another: {tmp_path}/checkpoint_2.' in str(error.value)
  restored = restore_run(tmp_path / 'checkpoint_2', random_backbone, method, tx)
  assert restored.saved.step == 2
