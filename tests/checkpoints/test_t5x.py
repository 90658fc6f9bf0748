"""T5X checkpoint directories: a real one, and every way one may be broken."""

import dataclasses
import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest

from prompt_tuning_jax.backbones.t5 import T5
from prompt_tuning_jax.checkpoints import names, source, t5x, zarr
from prompt_tuning_jax.checkpoints.load import open_checkpoint
from prompt_tuning_jax.typing import Injection
from tests.checkpoints import samples
from tests.conftest import TINY_CONFIG, assert_close, prepend_virtual, recorded_batch

EMBEDDING = 'target.token_embedder.embedding'


@pytest.fixture(scope='module')
def flat():
  params = samples.random_params(TINY_CONFIG)
  return names.flatten_to_t5x(params, TINY_CONFIG)


@pytest.fixture(scope='module')
def written(flat, tmp_path_factory):
  return samples.write_t5x(tmp_path_factory.mktemp('t5x') / 'checkpoint_7', flat)


@pytest.fixture
def copy(written, tmp_path):
  """A copy to damage. It also shows that a checkpoint may be moved."""
  return shutil.copytree(written, tmp_path / 'moved')


def test_the_real_tiny_checkpoint_computes_what_t5x_computed(golden, shared_data):
  recorded = np.load(golden / 't5x' / 'forward_tiny_P5_A.npz')
  path = shared_data / 't5' / 'test_t5_1_1_tiny' / 'checkpoint_3'
  checkpoint = t5x.read_t5x(path, max_distance=8)
  params = names.stack_from_t5x(checkpoint.weights, checkpoint.config)
  batch = prepend_virtual(recorded_batch(recorded), checkpoint.config.vocab_size, 5)
  logits = jax.jit(T5(checkpoint.config).apply)(
      {'params': params}, batch, Injection(virtual_embeddings=recorded['prompt'])
  )
  assert checkpoint.step == 3
  assert_close(logits, recorded['logits'], 1e-4)


def test_distances_that_the_checkpoint_does_not_record_are_not_guessed(shared_data):
  path = shared_data / 't5' / 'test_t5_1_1_tiny' / 'checkpoint_3'
  with pytest.raises(ValueError, match='4 buckets .* Give max_distance'):
    t5x.read_t5x(path)


def test_what_was_written_is_read_bit_for_bit(written, flat):
  checkpoint = t5x.read_t5x(written)
  assert checkpoint.config == TINY_CONFIG
  assert checkpoint.step == 7
  assert set(checkpoint.weights) == set(flat)
  for name, array in flat.items():
    np.testing.assert_array_equal(checkpoint.weights[name], array)


def test_bfloat16_arrays_are_read_as_bfloat16(flat, tmp_path):
  rounded = {name: array.astype(ml_dtypes.bfloat16) for name, array in flat.items()}
  weights = t5x.read_t5x(samples.write_t5x(tmp_path / 'bf16', rounded)).weights
  for name, array in rounded.items():
    assert weights[name].dtype == weights.specs[name].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(weights[name], array)


def test_scanned_layers_are_read_as_layers(tmp_path):
  config = dataclasses.replace(TINY_CONFIG, relpos_per_layer=True)
  flat = names.flatten_to_t5x(samples.random_params(config), config)
  stored = samples.scanned(flat, config)
  assert stored['encoder/encoder/attention/query/kernel'].shape == (
      config.d_model, config.num_encoder_layers, config.num_heads, config.d_kv
  )
  checkpoint = t5x.read_t5x(samples.write_t5x(tmp_path / 'scanned', stored))
  assert checkpoint.config == config
  assert set(checkpoint.weights) == set(flat)
  for name, array in flat.items():
    assert checkpoint.weights.specs[name].shape == array.shape
    np.testing.assert_array_equal(checkpoint.weights[name], array)


def test_a_prompt_inside_is_kept_aside(flat, tmp_path):
  prompt = np.arange(48, dtype=np.float32).reshape(3, 16)
  both = flat | {'encoder/prompt/prompt/prompt': prompt}
  checkpoint = t5x.read_t5x(samples.write_t5x(tmp_path / 'prompted', both))
  assert set(checkpoint.weights) == set(flat)
  assert list(checkpoint.prompts) == ['encoder/prompt/prompt/prompt']
  np.testing.assert_array_equal(checkpoint.prompts['encoder/prompt/prompt/prompt'], prompt)


def test_a_missing_chunk_is_an_error_and_not_zeros(copy):
  (copy / EMBEDDING / '1.0').unlink()
  with pytest.raises(FileNotFoundError, match=rf'{EMBEDDING}/1.0 is missing, one of 2'):
    t5x.read_t5x(copy)


@pytest.mark.parametrize(
    'missing', ['checkpoint', f'{EMBEDDING}/.zarray', EMBEDDING], ids=str
)
def test_a_missing_file_is_named(copy, missing):
  path = copy / missing
  shutil.rmtree(path) if path.is_dir() else path.unlink()
  with pytest.raises(FileNotFoundError, match=missing):
    t5x.read_t5x(copy)


@pytest.mark.parametrize('kept', [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_an_index_that_was_cut_off_is_named(copy, kept):
  content = (copy / 'checkpoint').read_bytes()
  (copy / 'checkpoint').write_bytes(content[: int(kept * len(content))])
  with pytest.raises(ValueError, match='checkpoint cannot be read as a T5X index'):
    t5x.read_t5x(copy)


def test_a_chunk_that_was_cut_off_is_named_when_it_is_read(copy):
  chunk = copy / EMBEDDING / '0.0'
  chunk.write_bytes(chunk.read_bytes()[:50])
  weights = t5x.read_t5x(copy).weights
  weights['decoder/logits_dense/kernel']
  with pytest.raises(ValueError, match=f'{EMBEDDING} cannot be read .* cut off'):
    weights['token_embedder/embedding']


@pytest.mark.parametrize('content', ['{"shape": [64', '[]', '{"shape": [64, 16]}'])
def test_a_damaged_description_of_an_array_is_named(copy, content):
  (copy / EMBEDDING / '.zarray').write_text(content)
  with pytest.raises(ValueError, match=rf'{EMBEDDING}/.zarray'):
    t5x.read_t5x(copy)


def test_arrays_of_another_checkpoint_are_refused(copy):
  path = copy / EMBEDDING / '.zarray'
  path.write_text(json.dumps(json.loads(path.read_text()) | {'shape': [64, 8]}))
  with pytest.raises(ValueError, match=r'shape \[64, 8\], but the index .* \[64, 16\]'):
    t5x.read_t5x(copy)


def test_another_version_is_refused(flat, tmp_path):
  written = samples.write_t5x(tmp_path / 'v2', flat, version=2)
  with pytest.raises(ValueError, match='version 2; T5X checkpoints of version 3 are read'):
    t5x.read_t5x(written)


def test_arrays_that_are_not_of_one_model_are_all_listed(flat, tmp_path):
  mixed = dict(flat)
  mixed['encoder/layers_1/mlp/wo/kernel'] = np.zeros((24, 18), np.float32)
  del mixed['decoder/layers_1/mlp/wi_1/kernel']
  with pytest.raises(ValueError) as error:
    t5x.read_t5x(samples.write_t5x(tmp_path / 'mixed', mixed))
  assert 'encoder/layers_1/mlp/wo/kernel: expected [24, 16], found [24, 18]' in str(error.value)
  assert 'decoder/layers_1/mlp/wi_1/kernel: expected [16, 24], but it is missing' in str(
      error.value
  )


def test_stores_may_be_links(written, flat, tmp_path):
  (tmp_path / 'linked').mkdir()
  for path in written.iterdir():
    (tmp_path / 'linked' / path.name).symlink_to(path)
  weights = t5x.read_t5x(tmp_path / 'linked').weights
  for name, array in flat.items():
    np.testing.assert_array_equal(weights[name], array)


def test_a_stack_of_layers_is_read_once_for_all_of_them(tmp_path, monkeypatch):
  config = dataclasses.replace(TINY_CONFIG, relpos_per_layer=True)
  flat = names.flatten_to_t5x(samples.random_params(config), config)
  folder = samples.write_t5x(tmp_path / 'scanned', samples.scanned(flat, config))
  reads = []
  read = zarr.read_array
  monkeypatch.setattr(zarr, 'read_array', lambda f, s, box: reads.append(s) or read(f, s, box))
  weights = t5x.read_t5x(folder).weights
  names.stack_from_t5x(weights, config)
  assert len(reads) == len(set(reads))
  reads.clear()
  assert source.fingerprint(weights) == source.fingerprint(flat)
  assert len(reads) == len(set(reads))


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'chunks': [0, 1]}, r'chunks of \[0, 1\]'),
        ({'chunks': ['a', 'b']}, 'is damaged, or not what it says'),
        ({'chunks': [1]}, r'chunks of \[1\] for the shape'),
        ({'chunks': [1, 1], 'shape': [10**10, 10**10]}, 'most are missing'),
    ],
)
def test_hostile_descriptions_of_chunks_are_refused(copy, changes, message):
  path = copy / EMBEDDING / '.zarray'
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    open_checkpoint(str(copy))


def test_whole_numbers_are_no_weights(flat, tmp_path):
  quantised = flat | {'encoder/layers_0/mlp/wo/kernel': np.ones((24, 16), np.int32)}
  with pytest.raises(ValueError, match='encoder/layers_0/mlp/wo/kernel is stored as int32'):
    t5x.read_t5x(samples.write_t5x(tmp_path / 'quantised', quantised))


def test_a_layer_of_a_huge_number_is_refused_at_once(flat, tmp_path):
  strange = flat | {'encoder/layers_999999999/mlp/wo/kernel': np.ones((24, 16), np.float32)}
  with pytest.raises(ValueError, match='names the layer 999,999,999 of its encoder'):
    t5x.read_t5x(samples.write_t5x(tmp_path / 'strange', strange))
