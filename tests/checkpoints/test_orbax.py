"""Orbax checkpoints of T5X runs, in every layout that Orbax has had."""

import os
import shutil

import flax.serialization
import flax.traverse_util
import numpy as np
import orbax.checkpoint as ocp
import pytest

from prompt_tuning_jax.checkpoints import names
from prompt_tuning_jax.checkpoints.load import load_backbone
from prompt_tuning_jax.checkpoints.orbax import is_orbax, read_orbax
from prompt_tuning_jax.prompt_files import load_prompt
from tests.checkpoints import samples
from tests.conftest import TINY_CONFIG

LAYOUTS = {
    'zarr': dict(use_ocdbt=False),
    'ocdbt': dict(use_ocdbt=True),
    'zarr3': dict(use_ocdbt=False, use_zarr3=True),
    'ocdbt of zarr3': dict(use_ocdbt=True, use_zarr3=True),
}
PROMPT = np.arange(48, dtype=np.float32).reshape(3, 16)


@pytest.fixture(scope='module')
def flat():
  return names.flatten_to_t5x(samples.random_params(TINY_CONFIG), TINY_CONFIG)


def write(folder, flat, top='target', **layout):
  """A step as T5X writes it: the train state as the item `state`."""
  tree = {
      'state': {'step': np.int32(7), 'param_states': {}},
      top: flax.traverse_util.unflatten_dict(flat, sep='/'),
  }
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**layout)) as checkpointer:
    checkpointer.save(folder / 'state', args=ocp.args.PyTreeSave(tree))
  return folder


@pytest.fixture(scope='module')
def written(flat, tmp_path_factory):
  folder = tmp_path_factory.mktemp('orbax')
  return {
      name: write(folder / name.replace(' ', '_'), flat, **layout)
      for name, layout in LAYOUTS.items()
  }


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('inside', ['', 'state'])
def test_every_layout_is_read_bit_for_bit(written, flat, layout, inside):
  path = written[layout] / inside
  assert is_orbax(path)
  checkpoint = read_orbax(path)
  assert (checkpoint.config, checkpoint.step) == (TINY_CONFIG, 7)
  assert set(checkpoint.weights) == set(flat)
  for name, array in flat.items():
    np.testing.assert_array_equal(checkpoint.weights[name], array)


def test_scanned_layers_are_read_as_layers(tmp_path):
  config = samples.CONFIGS['bias in every layer']
  flat = names.flatten_to_t5x(samples.random_params(config), config)
  folder = write(tmp_path / 'checkpoint_7', samples.scanned(flat, config), use_ocdbt=False)
  checkpoint = read_orbax(folder)
  assert checkpoint.config == config
  for name, array in flat.items():
    np.testing.assert_array_equal(checkpoint.weights[name], array)


@pytest.fixture
def aggregated(written, flat, tmp_path):
  """As older versions kept it: vectors in a msgpack file, names of the rest in it."""
  folder = shutil.copytree(written['zarr'], tmp_path / 'checkpoint_7')
  leaves = {'state/step': np.int32(7)}
  for name, array in flat.items():
    store = 'target.' + name.replace('/', '.')
    leaves[f'target/{name}'] = f'PLACEHOLDER://{store}'
    if array.ndim == 1:
      leaves[f'target/{name}'] = array
      shutil.rmtree(folder / 'state' / store)
  shutil.rmtree(folder / 'state' / 'state.step')
  tree = flax.traverse_util.unflatten_dict(leaves, sep='/')
  content = flax.serialization.msgpack_serialize(tree)
  (folder / 'state' / 'checkpoint').write_bytes(content)
  return folder


def test_arrays_of_the_older_msgpack_file_are_read(aggregated, flat):
  checkpoint = read_orbax(aggregated)
  assert checkpoint.step == 7
  for name, array in flat.items():
    np.testing.assert_array_equal(checkpoint.weights[name], array)
  (store,) = aggregated.glob('state/target.token_embedder.embedding')
  shutil.rmtree(store)
  with pytest.raises(FileNotFoundError, match='embedding is missing, which .*state/checkpoint'):
    read_orbax(aggregated)


def test_a_msgpack_file_that_was_cut_off_is_named(aggregated):
  os.truncate(aggregated / 'state' / 'checkpoint', 100)
  with pytest.raises(ValueError, match='state/checkpoint cannot be read as the msgpack file'):
    read_orbax(aggregated)


@pytest.mark.parametrize(
    ('layout', 'chunk'),
    [('zarr', '0.0'), ('zarr3', 'c/0/0'), ('zarr', '.zarray'), ('zarr3', 'zarr.json')],
)
def test_what_is_missing_is_an_error_and_not_zeros(written, layout, chunk, tmp_path):
  folder = shutil.copytree(written[layout], tmp_path / 'copy')
  (folder / 'state' / 'target.token_embedder.embedding' / chunk).unlink()
  with pytest.raises((FileNotFoundError, ValueError), match='embedding.*missing'):
    read_orbax(folder)


def test_a_truncated_database_is_refused(written, tmp_path):
  folder = shutil.copytree(written['ocdbt'], tmp_path / 'copy')
  for path in (folder / 'state').rglob('*'):
    if path.is_file() and path.parent.name == 'd':
      os.truncate(path, path.stat().st_size // 2)
  with pytest.raises((OSError, ValueError), match='cannot be read'):
    dict(read_orbax(folder).weights)


def test_what_is_no_train_state_of_t5x_is_refused(flat, tmp_path):
  folder = write(tmp_path / 'x', flat, top='params', use_ocdbt=True)
  with pytest.raises(ValueError, match='not of a T5X run.* It holds params, state'):
    read_orbax(folder)


def test_load_backbone_and_load_prompt_know_the_format(flat, tmp_path):
  both = flat | {'encoder/prompt/prompt/prompt': PROMPT}
  folder = write(tmp_path / 'checkpoint_7', both, use_ocdbt=False)
  backbone = load_backbone(folder)
  np.testing.assert_array_equal(backbone.embedding_VD, flat['token_embedder/embedding'])
  prompt = load_prompt(folder)
  np.testing.assert_array_equal(prompt.injection.virtual_embeddings, PROMPT)
  assert prompt.manifest.step == 7
