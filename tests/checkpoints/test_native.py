"""The library's own layout: what is saved is what is loaded, or an error says why."""

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from prompt_tuning_jax import writing
from prompt_tuning_jax.checkpoints import names, native, source
from prompt_tuning_jax.checkpoints.load import load_backbone
from tests.checkpoints import samples
from tests.conftest import TINY_CONFIG


@pytest.fixture(scope='module')
def params():
  return samples.random_params(TINY_CONFIG)


@pytest.fixture(scope='module')
def vocabulary(tmp_path_factory):
  return samples.train_vocabulary(tmp_path_factory.mktemp('vocabulary') / 'letters.model')


@pytest.fixture
def saved(params, vocabulary, tmp_path):
  folder = tmp_path / 'model'
  native.save_backbone(
      folder, TINY_CONFIG, params, vocabulary, dtype='float32', metadata={'steps': 12}
  )
  return folder


def edit_config(folder, changes):
  """Edits config.json as one may by hand: its own sum is removed."""
  described = json.loads((folder / 'config.json').read_text()) | changes
  del described['sha256']
  (folder / 'config.json').write_text(json.dumps(described))


def only_weights(folder):
  """Reads all weights, so that their sum is checked."""
  return dict(native.read_native(folder).weights)


@pytest.mark.parametrize('family', samples.CONFIGS)
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_saving_and_loading_gives_the_same_bits(family, dtype, vocabulary, tmp_path):
  config = samples.CONFIGS[family]
  params = samples.random_params(config)
  native.save_backbone(tmp_path / 'model', config, params, vocabulary, dtype=dtype)
  backbone = load_backbone(tmp_path / 'model', dtype=dtype)
  assert backbone.module.config == config
  assert backbone.vocabulary.fingerprint == vocabulary.fingerprint
  samples.assert_same_trees(
      jax.tree.map(np.asarray, backbone.params),
      jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(dtype)), params),
  )


def test_saving_and_loading_gives_the_same_logits(tiny, tiny_batch, tmp_path):
  module, params = tiny
  native.save_backbone(tmp_path / 'm', module.config, params, None, dtype='float32')
  backbone = load_backbone(tmp_path / 'm')
  run = jax.jit(module.apply)
  np.testing.assert_array_equal(
      run({'params': backbone.params}, tiny_batch), run({'params': params}, tiny_batch)
  )
  assert backbone.vocabulary is None


def test_saving_twice_gives_the_same_files(params, vocabulary, saved, tmp_path):
  native.save_backbone(
      tmp_path / 'b', TINY_CONFIG, params, vocabulary, dtype='float32', metadata={'steps': 12}
  )
  for name in ('config.json', 'model.safetensors', 'spiece.model'):
    assert (saved / name).read_bytes() == (tmp_path / 'b' / name).read_bytes()


def test_the_files_have_t5x_names_and_say_what_they_are(saved, vocabulary):
  assert sorted(os.listdir(saved)) == ['config.json', 'model.safetensors', 'spiece.model']
  stored = safetensors.numpy.load_file(saved / 'model.safetensors')
  assert set(stored) == {entry.t5x for entry in names.entries(TINY_CONFIG)}
  described = json.loads((saved / 'config.json').read_text())
  assert described['architecture']['d_model'] == 16
  assert described['weights']['sha256'] == writing.file_sha256(saved / 'model.safetensors')
  assert described['weights']['parameters'] == sum(x.size for x in stored.values())
  assert described['fingerprint'] == source.fingerprint(stored)
  assert described['vocabulary']['extra_ids'] == vocabulary.extra_ids
  assert described['metadata'] == {'steps': 12}


def test_metadata_may_hold_numbers_of_numpy_and_any_keys(params, tmp_path):
  metadata = {'loss': np.float32(2.5), 'by_layer': {2: jnp.int32(7), 10: (1, 2)}}
  native.save_backbone(tmp_path / 'm', TINY_CONFIG, params, None, metadata=metadata)
  assert native.read_native(tmp_path / 'm').manifest['metadata'] == {
      'loss': 2.5,
      'by_layer': {'2': 7, '10': [1, 2]},
  }
  with pytest.raises(TypeError, match='not JSON serializable'):
    native.save_backbone(tmp_path / 'n', TINY_CONFIG, params, None, metadata={'x': object()})
  assert os.listdir(tmp_path) == ['m']


@pytest.mark.parametrize('position', [8, 300, 5000, -1])
def test_a_flipped_byte_is_noticed_before_the_weights_are_used(saved, position):
  samples.flip_byte(saved / 'model.safetensors', position)
  with pytest.raises(ValueError, match='model.safetensors is (damaged|not a whole)'):
    only_weights(saved)


def test_a_change_of_the_config_is_noticed(saved):
  path = saved / 'config.json'
  before = path.read_text()
  path.write_text(before.replace('"relpos_max_distance": 128', '"relpos_max_distance": 129'))
  with pytest.raises(ValueError, match='config.json is damaged: .* remove its line'):
    native.read_native(saved)
  path.write_text(before)
  edit_config(saved, {'metadata': {'steps': 13}})
  assert native.read_native(saved).manifest['metadata'] == {'steps': 13}


@pytest.mark.parametrize('kept', [0, 4, 500, 20_000])
def test_a_truncated_file_is_named(saved, kept):
  os.truncate(saved / 'model.safetensors', kept)
  with pytest.raises(ValueError, match=f'not a whole safetensors file .* has {kept:,} bytes'):
    native.read_native(saved)


def test_weights_of_another_model_are_refused(saved, tmp_path):
  wider = dataclasses.replace(TINY_CONFIG, d_ff=32)
  native.save_backbone(tmp_path / 'w', wider, samples.random_params(wider), None)
  os.replace(tmp_path / 'w' / 'model.safetensors', saved / 'model.safetensors')
  with pytest.raises(ValueError, match='model.safetensors is damaged'):
    native.read_native(saved)
  edit_config(saved, {'weights': {'sha256': writing.file_sha256(saved / 'model.safetensors')}})
  with pytest.raises(ValueError, match=r'mlp/wo/kernel: expected \[24, 16\], found \[32, 16\]'):
    native.read_native(saved)


def test_missing_weights_are_named(saved):
  (saved / 'model.safetensors').unlink()
  with pytest.raises(FileNotFoundError, match='model.safetensors'):
    native.read_native(saved)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'format_version': 2}, 'format_version 2; this version of the library reads 1'),
        ({'architecture': {'d_model': 16}}, 'does not describe a backbone completely'),
        ({'architecture': {'width': 16}}, "unexpected keyword argument 'width'"),
        ({'weights': {}}, "does not describe a backbone completely .*'sha256'"),
    ],
)
def test_a_config_that_cannot_be_understood_is_refused(saved, changes, message):
  edit_config(saved, changes)
  with pytest.raises(ValueError, match=message):
    native.read_native(saved)


def test_saving_again_replaces_the_model_and_keeps_its_card(saved, vocabulary):
  (saved / 'README.md').write_text('the model card')
  (saved / 'pictures').mkdir()
  (saved / 'pictures' / 'loss.svg').write_text('<svg/>')
  other = samples.random_params(TINY_CONFIG, seed=1)
  native.save_backbone(saved, TINY_CONFIG, other, vocabulary, dtype='float32')
  weights = only_weights(saved)
  np.testing.assert_array_equal(
      weights['token_embedder/embedding'], other['token_embedder']['embedding']
  )
  assert (saved / 'README.md').read_text() == 'the model card'
  assert (saved / 'pictures' / 'loss.svg').read_text() == '<svg/>'
  assert os.listdir(saved.parent) == ['model']


@pytest.mark.parametrize('failing', ['write_safetensors', 'copyfile', 'replace'])
def test_a_save_that_fails_leaves_the_old_model_and_nothing_else(
    saved, params, vocabulary, failing, monkeypatch
):
  before = {path.name: path.read_bytes() for path in saved.iterdir()}
  replace = os.replace

  def full(*args, **kwargs):
    raise OSError(28, 'No space left on device')

  def full_at_the_end(old, new):
    if new == str(saved) and '.tmp-' in old:
      full()
    replace(old, new)

  if failing == 'write_safetensors':
    monkeypatch.setattr(native, 'write_safetensors', full)
  elif failing == 'copyfile':
    monkeypatch.setattr('shutil.copyfile', full)
  else:
    monkeypatch.setattr(os, 'replace', full_at_the_end)
  with pytest.raises(OSError, match=f'Could not write .*{saved}.*No space left'):
    native.save_backbone(saved, TINY_CONFIG, params, vocabulary)
  assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
  assert os.listdir(saved.parent) == ['model']


def test_a_model_of_another_format_is_not_overwritten(params, tmp_path):
  tensors = samples.hf_tensors(TINY_CONFIG, params)
  folder = samples.write_hf(tmp_path / 'hf', samples.hf_description(TINY_CONFIG), tensors)
  with pytest.raises(FileExistsError, match='model of another format'):
    native.save_backbone(folder, TINY_CONFIG, params, None)
  with pytest.raises(FileExistsError, match='is a file'):
    native.save_backbone(folder / 'config.json', TINY_CONFIG, params, None)


def test_a_directory_of_other_files_may_be_filled(params, vocabulary, tmp_path):
  folder = tmp_path / 'zoo'
  folder.mkdir()
  os.link(vocabulary.path, folder / 'spiece.model')
  (folder / 'README.md').write_text('the model card')
  own = type(vocabulary)(folder / 'spiece.model', vocabulary.extra_ids)
  native.save_backbone(folder, TINY_CONFIG, params, own)
  assert load_backbone(folder).vocabulary.fingerprint == vocabulary.fingerprint
  assert (folder / 'README.md').read_text() == 'the model card'
  assert os.listdir(tmp_path) == ['zoo']


def test_what_does_not_fit_is_not_saved(params, tmp_path):
  big = samples.train_vocabulary(
      tmp_path / 'big.model', ''.join(chr(0x4E00 + i) for i in range(80))
  )
  with pytest.raises(ValueError, match=r'88 ids \(83 pieces \+ 5 sentinels\).* 64 rows'):
    native.save_backbone(tmp_path / 'm', TINY_CONFIG, params, big)
  with pytest.raises(ValueError, match="dtype='float16' .* overflows in float16"):
    native.save_backbone(tmp_path / 'm', TINY_CONFIG, params, None, dtype='float16')
  with pytest.raises(ValueError, match='does not fit the model'):
    native.save_backbone(
        tmp_path / 'm', dataclasses.replace(TINY_CONFIG, d_model=8), params, None
    )
  assert not (tmp_path / 'm').exists()


def test_bfloat16_halves_the_file(params, saved, tmp_path):
  native.save_backbone(tmp_path / 'half', TINY_CONFIG, params, None)
  checkpoint = native.read_native(tmp_path / 'half')
  assert {spec.dtype for spec in checkpoint.weights.specs.values()} == {
      np.dtype(ml_dtypes.bfloat16)
  }
  whole = (saved / 'model.safetensors').stat().st_size
  header = 20_000  # At most; the rest is weights.
  half = (tmp_path / 'half' / 'model.safetensors').stat().st_size
  assert half < whole / 2 + header
