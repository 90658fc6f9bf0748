"""Prompts in the forms that people have: `.npy` arrays and checkpoints of the original code.

PEFT's adapters have tests of their own.
"""

import os
import pickle

import ml_dtypes
import numpy as np
import pytest

from prompt_tuning_jax import cli, peft
from prompt_tuning_jax.artifact import Manifest, Prompt, save_prompt
from prompt_tuning_jax.checkpoints import names
from prompt_tuning_jax.checkpoints.load import load_backbone
from prompt_tuning_jax.prompt_files import export_prompt, import_prompt, load_prompt
from prompt_tuning_jax.typing import Injection
from tests.checkpoints import samples
from tests.conftest import TINY_CONFIG

ROWS = np.random.default_rng(0).normal(size=(5, 16)).astype(np.float32)


def test_an_artifact_is_read_as_one(tmp_path):
  saved = save_prompt(tmp_path / 'p', Injection(virtual_embeddings=ROWS), task='x')
  assert load_prompt(tmp_path / 'p').manifest == saved.manifest


def test_the_folder_of_a_run_is_read_as_its_prompt(tmp_path):
  save_prompt(tmp_path / 'prompt.safetensors', Injection(virtual_embeddings=ROWS), task='x')
  assert load_prompt(tmp_path).manifest.task == 'x'


def test_what_an_artifact_says_is_kept_when_it_is_imported_again(backbone_dir, tmp_path):
  backbone = load_backbone(backbone_dir)
  save_prompt(
      tmp_path / 'p', Injection(virtual_embeddings=ROWS), backbone=backbone,
      target_prefix='<extra_id_0>', backbone_weights='int8',
  )  # fmt: skip
  again = import_prompt(
      backbone=backbone, import_path=str(tmp_path / 'p'), output=str(tmp_path / 'q')
  ).manifest
  assert (again.target_prefix, again.backbone_weights) == ('<extra_id_0>', 'int8')


def test_a_missing_prompt_is_answered_with_the_nearest(tmp_path):
  path = tmp_path / 'prompt.npy'
  np.save(path, ROWS)
  with pytest.raises(FileNotFoundError, match=f'Did you mean {path}'):
    load_prompt(tmp_path / 'promt.npy')
  with pytest.raises(FileNotFoundError, match='there is no directory'):
    load_prompt(tmp_path / 'nowhere' / 'prompt.safetensors')
  with pytest.raises(FileNotFoundError, match='is a directory, but no prompt'):
    load_prompt(tmp_path)


@pytest.mark.parametrize(('kind', 'bad'), [('f4', np.nan), ('f2', np.inf), ('f8', 1e300)])
def test_npy_prompts_of_numbers_that_are_not_finite_are_refused(kind, bad, tmp_path):
  array = np.ones((5, 16), kind)
  array[2, 3:5] = bad
  np.save(tmp_path / 'p.npy', array)
  with pytest.raises(ValueError, match='p.npy is no usable prompt: 2 of the 80 numbers'):
    load_prompt(tmp_path / 'p.npy')


@pytest.mark.parametrize('order', ['C', 'F'])
def test_a_prompt_of_the_original_code_is_read(order, backbone_dir, tmp_path):
  np.save(tmp_path / 'p.npy', np.asarray(ROWS, order=order))
  prompt = load_prompt(tmp_path / 'p.npy')
  np.testing.assert_array_equal(prompt.injection.virtual_embeddings, ROWS)
  assert (prompt.length, prompt.manifest.num_virtual_tokens) == (5, 5)
  prompt.check(load_backbone(backbone_dir), length=5)


@pytest.mark.parametrize(
    ('name', 'norm'), [('sst2', 1384.848), ('mrpc', 867.673), ('rte', 903.257)]
)
def test_the_released_prompts_are_read(shared_data, name, norm, backbone_dir):
  prompt = load_prompt(shared_data / 't5' / 'released_prompts' / f'{name}.npy')
  rows = prompt.injection.virtual_embeddings
  assert rows.shape == (100, 768)
  np.testing.assert_allclose(np.linalg.norm(rows, axis=1).mean(), norm, atol=1e-3)
  with pytest.raises(ValueError, match=r'\(100, 768\); this backbone needs .*d_model=16'):
    prompt.check(load_backbone(backbone_dir))


class _Bomb:
  """Leaves a mark where it is unpickled."""

  def __init__(self, mark):
    self.mark = mark

  def __reduce__(self):
    return os.mkdir, (str(self.mark),)


def test_pickles_are_refused_and_never_executed(tmp_path):
  mark = tmp_path / 'executed'
  np.save(tmp_path / 'object.npy', np.array([_Bomb(mark)], object), allow_pickle=True)
  (tmp_path / 'raw.npy').write_bytes(pickle.dumps(_Bomb(mark)))
  (tmp_path / 'disguised.safetensors').write_bytes(pickle.dumps(_Bomb(mark)))
  (tmp_path / 'old_protocol.npy').write_bytes(pickle.dumps(_Bomb(mark), protocol=0))
  for path in sorted(tmp_path.iterdir()):
    with pytest.raises(ValueError, match='pickle, which could run any code'):
      load_prompt(path)
  assert not mark.exists()


def test_npy_files_that_are_not_a_prompt_are_refused(tmp_path):
  path = tmp_path / 'p.npy'
  for array in [np.ones(5), np.ones((1, 5, 16)), np.ones((5, 16), int)]:
    np.save(path, array)
    with pytest.raises(ValueError, match=r'a prompt is \[prompt length, d_model\]'):
      load_prompt(path)
  np.save(path, ROWS)
  whole = path.read_bytes()
  for kept in [6, 9, 100, len(whole) - 1]:
    path.write_bytes(whole[:kept])
    with pytest.raises(ValueError, match='cannot be read as an array .* cut off'):
      load_prompt(path)
  # A header that claims far more than the file holds must not allocate it.
  path.write_bytes(whole.replace(b'(5, 16)', b'(9999999999999, 16)'))
  with pytest.raises(ValueError, match='cannot be read as an array'):
    load_prompt(path)


def test_a_prompt_of_no_positions_is_refused(tmp_path):
  np.save(tmp_path / 'p.npy', np.zeros((0, 16), np.float32))
  with pytest.raises(ValueError, match=r'p.npy holds an empty prompt: .* shape \[0, 16\]'):
    load_prompt(tmp_path / 'p.npy')


@pytest.fixture
def checkpoint(tmp_path):
  """Writes a T5X checkpoint with these arrays beside the model's."""

  def write(**arrays):
    flat = names.flatten_to_t5x(samples.random_params(TINY_CONFIG), TINY_CONFIG)
    prompts = {f'{name}/prompt/prompt/prompt': array for name, array in arrays.items()}
    return samples.write_t5x(tmp_path / 'checkpoint_9', flat | prompts, step=9)

  return write


@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16])
def test_the_prompt_of_a_t5x_checkpoint_is_read(dtype, checkpoint):
  prompt = load_prompt(checkpoint(encoder=ROWS.astype(dtype)))
  np.testing.assert_array_equal(prompt.injection.virtual_embeddings, ROWS.astype(dtype))
  assert (prompt.length, prompt.manifest.num_virtual_tokens, prompt.manifest.step) == (5, 5, 9)


def test_a_t5x_checkpoint_without_one_prompt_of_the_encoder_is_refused(checkpoint, tmp_path):
  with pytest.raises(ValueError, match='checkpoint_9 holds no prompt.'):
    load_prompt(checkpoint())
  (tmp_path / 'checkpoint_9').rename(tmp_path / 'without')
  with pytest.raises(ValueError, match='holds decoder/prompt/prompt/prompt, encoder/prompt'):
    load_prompt(checkpoint(encoder=ROWS, decoder=ROWS))
  (tmp_path / 'checkpoint_9').rename(tmp_path / 'both')
  with pytest.raises(ValueError, match='holds decoder/prompt/prompt/prompt. A prompt is'):
    load_prompt(checkpoint(decoder=ROWS))


def test_a_diverged_prompt_of_a_t5x_checkpoint_is_refused(checkpoint):
  with pytest.raises(ValueError, match='prompt/prompt/prompt is no usable prompt'):
    load_prompt(checkpoint(encoder=np.full_like(ROWS, np.nan)))


@pytest.fixture
def backbone(backbone_dir):
  return load_backbone(backbone_dir)


def forms(folder, backbone):
  """The same prompt in each form that another program may have left it in."""
  array = np.asarray(ROWS)
  prompt = save_prompt(
      folder / 'p.safetensors',
      Injection(virtual_embeddings=array),
      backbone=backbone,
      method='SoftPrompt',
      placement='prefix',
      task='x',
  )
  export_prompt(prompt, folder / 'adapter', backbone)
  export_prompt(prompt, folder / 'p.npy', backbone)
  return [folder / 'p.safetensors', folder / 'adapter', folder / 'p.npy']


def test_every_form_becomes_the_same_artifact_of_its_backbone(backbone, tmp_path):
  for number, path in enumerate(forms(tmp_path, backbone)):
    found = import_prompt(
        backbone=backbone, import_path=str(path), output=str(tmp_path / f'{number}.safetensors')
    )
    np.testing.assert_array_equal(found.injection.virtual_embeddings, ROWS)
    assert found.manifest.backbone_fingerprint == backbone.fingerprint
    assert found.manifest.placement == 'prefix'
    assert (found.length, found.manifest.num_virtual_tokens) == (5, 5)
  artifact = load_prompt(tmp_path / '0.safetensors')
  assert (artifact.manifest.task, artifact.manifest.method) == ('x', 'SoftPrompt')


def test_a_prompt_of_another_width_is_not_imported(backbone, tmp_path):
  np.save(tmp_path / 'p.npy', np.ones((5, 17), np.float32))
  with pytest.raises(ValueError, match=r'p.npy does not fit .* shape \(5, 17\)'):
    import_prompt(
        backbone=backbone,
        import_path=str(tmp_path / 'p.npy'),
        output=str(tmp_path / 'p.safetensors'),
    )
  assert [path.name for path in tmp_path.iterdir()] == ['p.npy']


def test_an_adapter_that_names_another_model_is_imported_with_a_warning(backbone, tmp_path):
  prompt = Prompt(Injection(virtual_embeddings=ROWS), Manifest(num_virtual_tokens=5))
  peft.save_adapter(tmp_path / 'a', prompt, backbone, base_model='google/t5-base-lm-adapt')
  with pytest.warns(UserWarning, match='trained with google/t5-base-lm-adapt; .* will say tiny'):
    import_prompt(
        backbone=backbone,
        import_path=str(tmp_path / 'a'),
        output=str(tmp_path / 'p.safetensors'),
    )


def test_an_array_is_exported_whole_and_over_nothing(backbone, tmp_path):
  prompt = Prompt(Injection(virtual_embeddings=ROWS), Manifest(num_virtual_tokens=5))
  export_prompt(prompt, tmp_path / 'p.npy', backbone)
  np.testing.assert_array_equal(np.load(tmp_path / 'p.npy'), ROWS)
  with pytest.raises(FileExistsError, match='p.npy exists already'):
    export_prompt(prompt, tmp_path / 'p.npy', backbone)
  spec = backbone.spec
  kv = np.ones((spec.num_decoder_layers, 5, spec.num_heads, spec.d_kv), np.float32)
  prefix = Prompt(Injection(virtual_embeddings=ROWS, decoder_kv=(kv, kv)), Manifest())
  with pytest.raises(ValueError, match='a .npy file holds a soft prompt .* and nothing else'):
    export_prompt(prefix, tmp_path / 'q.npy', backbone)


def test_the_commands_hand_a_prompt_to_peft_and_take_it_back(backbone_dir, tmp_path, capsys):
  forms(tmp_path, load_backbone(backbone_dir))

  def run(*argv):
    model = f'--gin.INITIAL_CHECKPOINT_PATH={backbone_dir}'
    return cli.main([argv[0], model, *(f'--gin.{binding}' for binding in argv[1:])])

  artifact, adapter = tmp_path / 'p.safetensors', tmp_path / 'other'
  assert run('export', f'PROMPT_FILE={artifact}', f'EXPORT_PATH={adapter}') == 0
  assert str(adapter) in capsys.readouterr().out
  back = tmp_path / 'back.safetensors'
  assert run('import', f'IMPORT_PATH={adapter}', f'PROMPT_FILE={back}') == 0
  np.testing.assert_array_equal(load_prompt(back).injection.virtual_embeddings, ROWS)
  assert load_prompt(back).manifest.created_by.startswith('prompt-tuning import')
  assert run('export', f'PROMPT_FILE={artifact}') == 2
  assert 'Neither CHECKPOINT_PATH' in capsys.readouterr().err


def test_what_an_array_cannot_say_and_where_nothing_can_be_written(backbone, tmp_path):
  suffix = Manifest(num_virtual_tokens=5, placement='suffix')
  prompt = Prompt(Injection(virtual_embeddings=ROWS), suffix)
  with pytest.raises(ValueError, match='elsewhere than in front .suffix., which a .npy'):
    export_prompt(prompt, tmp_path / 'p.npy', backbone)
  prompt = Prompt(Injection(virtual_embeddings=ROWS), Manifest(num_virtual_tokens=5))
  with pytest.raises(ValueError, match='gs://b/x is not on this machine'):
    export_prompt(prompt, 'gs://b/x', backbone)
  with pytest.raises(ValueError, match='called like an artifact'):
    export_prompt(prompt, tmp_path / 'p.safetensors', backbone)
  assert not list(tmp_path.iterdir())


def test_import_and_export_leave_what_is_there(backbone_dir, tmp_path, capsys):
  artifact, *_ = forms(tmp_path, load_backbone(backbone_dir))
  (tmp_path / 'precious.txt').write_text('precious')
  model = f'--gin.INITIAL_CHECKPOINT_PATH={backbone_dir}'
  for argv in (
      ['import', f'--gin.IMPORT_PATH={artifact}', f'--gin.PROMPT_FILE={tmp_path}/precious.txt'],
      ['export', f'--gin.PROMPT_FILE={artifact}', f'--gin.EXPORT_PATH={tmp_path}/precious.txt'],
  ):
    assert cli.main([argv[0], model, *argv[1:]]) == 2
    assert 'precious.txt exists already' in capsys.readouterr().err
  assert (tmp_path / 'precious.txt').read_text() == 'precious'
