"""`load_backbone`: one function for every format, and for every mistake a message."""

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax.checkpoints import load, names, native, source
from prompt_tuning_jax.checkpoints.load import load_backbone
from prompt_tuning_jax.data.vocabulary import Vocabulary
from tests.checkpoints import samples
from tests.conftest import TINY_CONFIG


@pytest.fixture(scope='module')
def params():
  return samples.random_params(TINY_CONFIG)


@pytest.fixture(scope='module')
def vocabulary(tmp_path_factory):
  return samples.train_vocabulary(tmp_path_factory.mktemp('vocabulary') / 'letters.model')


@pytest.fixture(scope='module')
def formats(params, vocabulary, tmp_path_factory):
  """The same model in every format this version reads."""
  folder = tmp_path_factory.mktemp('formats')
  tensors = samples.hf_tensors(TINY_CONFIG, params)
  description = samples.hf_description(TINY_CONFIG)
  flat = names.flatten_to_t5x(params, TINY_CONFIG)
  (folder / 'run').mkdir()
  native.save_backbone(folder / 'ours', TINY_CONFIG, params, vocabulary, dtype='float32')
  return {
      'native': folder / 'ours',
      'hf': samples.write_hf(folder / 'hub', description, tensors),
      'hf_sharded': samples.write_hf(folder / 'shards', description, tensors, shards=3),
      't5x': samples.write_t5x(folder / 'run' / 'checkpoint_1000', flat),
  }


FORMATS = ['native', 'hf', 'hf_sharded', 't5x']


@pytest.mark.parametrize('form', FORMATS)
def test_every_format_gives_the_same_model_and_fingerprint(formats, form, params):
  backbone = load_backbone(formats[form])
  assert backbone.module.config == TINY_CONFIG
  assert backbone.source == str(formats[form])
  assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(backbone.params))
  samples.assert_same_trees(jax.tree.map(np.asarray, backbone.params), params)
  assert backbone.fingerprint == source.fingerprint(
      names.flatten_to_t5x(params, TINY_CONFIG)
  )


@pytest.mark.parametrize('form', FORMATS)
def test_a_part_of_an_array_is_that_part_of_the_whole(formats, form):
  weights = load.open_checkpoint(str(formats[form])).weights
  for name, spec in weights.specs.items():
    box = tuple(slice(size // 3, size // 3 + 2) for size in spec.shape)
    np.testing.assert_array_equal(weights.part(name, box), weights[name][box], err_msg=name)


@pytest.mark.parametrize('form', ['native', 'hf'])
def test_the_fingerprint_is_of_the_files_whatever_type_they_are_held_in(formats, form):
  half = load_backbone(formats[form], dtype='bfloat16')
  assert half.params['token_embedder']['embedding'].dtype == jnp.bfloat16
  assert half.fingerprint == load_backbone(formats[form]).fingerprint


def test_one_changed_number_or_name_or_shape_changes_the_fingerprint():
  flat = {'a': np.zeros((2, 3), np.float32), 'b': np.ones(2, np.float32)}
  changed = [
      flat | {'b': np.array([1, np.nextafter(np.float32(1), np.float32(2))])},
      flat | {'a': np.zeros((3, 2), np.float32)},
      {'a': flat['a'], 'c': flat['b']},
      {'a': flat['a']},
  ]
  sums = {source.fingerprint(x) for x in [flat, *changed]}
  assert len(sums) == 5
  reordered = {'b': flat['b'].astype(np.float64), 'a': jnp.asarray(flat['a'])}
  assert source.fingerprint(reordered) == source.fingerprint(flat)


def test_weights_may_be_held_more_exactly_than_they_are_computed_with(formats):
  backbone = load_backbone(formats['hf'], dtype='bfloat16', param_dtype='float32')
  assert backbone.module.dtype == jnp.bfloat16
  assert {leaf.dtype for leaf in jax.tree.leaves(backbone.params)} == {jnp.dtype('float32')}


def test_options_reach_the_module(formats):
  backbone = load_backbone(
      formats['native'], dropout_rate=0.25, remat='full', unroll=True
  )
  module = backbone.module
  assert (module.dropout_rate, module.remat, module.unroll) == (0.25, 'full', True)


def test_nothing_is_read_before_it_is_used(formats, params, tmp_path):
  folder = tmp_path / 'model'
  native.save_backbone(folder, TINY_CONFIG, params, None, dtype='float32')
  samples.flip_byte(folder / 'model.safetensors', -1)
  backbone = load_backbone(folder)
  assert backbone.num_params == sum(leaf.size for leaf in jax.tree.leaves(params))
  with pytest.raises(ValueError, match='model.safetensors is damaged'):
    _ = backbone.params


def test_names_are_of_the_directory_and_of_the_run_of_a_step(formats):
  assert load_backbone(formats['hf']).name == 'hub'
  assert load_backbone(f'{formats["hf"]}/').name == 'hub'
  assert load_backbone(formats['t5x']).name == 'run/checkpoint_1000'


def test_the_vocabulary_beside_the_model_is_found(formats, vocabulary, params, tmp_path):
  found = load_backbone(formats['native']).vocabulary
  assert (found.extra_ids, found.fingerprint) == (5, vocabulary.fingerprint)
  assert load_backbone(formats['t5x']).vocabulary is None

  tensors = samples.hf_tensors(TINY_CONFIG, params)
  folder = samples.write_hf(tmp_path / 'hf', samples.hf_description(TINY_CONFIG), tensors)
  os.link(vocabulary.path, folder / 'spiece.model')
  (folder / 'tokenizer_config.json').write_text(json.dumps({'extra_ids': 5}))
  assert load_backbone(folder).vocabulary.fingerprint == vocabulary.fingerprint
  (folder / 'tokenizer_config.json').unlink()
  with pytest.raises(ValueError, match='100 sentinels.* the .* embedding has 64 rows'):
    load_backbone(folder)


def test_a_vocabulary_may_be_given_and_is_checked(formats, vocabulary, tmp_path):
  assert load_backbone(formats['t5x'], vocabulary=vocabulary).vocabulary is vocabulary
  by_path = load_backbone(formats['native'], vocabulary=vocabulary.path).vocabulary
  assert (by_path.path, by_path.extra_ids) == (vocabulary.path, 5)
  big = samples.train_vocabulary(
      tmp_path / 'big.model', ''.join(chr(0x4E00 + i) for i in range(80))
  )
  with pytest.raises(ValueError, match='has 88 ids .* embedding has 64 rows'):
    load_backbone(formats['t5x'], vocabulary=big)


def test_a_vocabulary_that_was_exchanged_is_refused(params, vocabulary, tmp_path):
  folder = tmp_path / 'model'
  native.save_backbone(folder, TINY_CONFIG, params, vocabulary)
  samples.train_vocabulary(folder / 'spiece.model', 'other letters')
  with pytest.raises(ValueError, match='not the vocabulary this backbone was saved with'):
    load_backbone(folder)


def test_a_given_vocabulary_must_be_the_recorded_one(formats, vocabulary, params, tmp_path):
  other = samples.train_vocabulary(tmp_path / 'other.model', 'other letters')
  own = formats['native'] / 'spiece.model'
  for given in (other, other.path):
    with pytest.raises(ValueError) as error:
      load_backbone(formats['native'], vocabulary=given)
    message = str(error.value)
    assert message.startswith(f'{other.path} with 5 sentinels is not the vocabulary')
    for part in (
        Vocabulary(other.path, 5).fingerprint,
        f'{formats["native"]}/config.json says {vocabulary.fingerprint}',
        f'Leave VOCABULARY unset, so that {own} is used',
    ):
      assert part in message
  with pytest.raises(ValueError, match='with 4 sentinels is not .* Give it extra_ids=5'):
    load_backbone(formats['native'], vocabulary=Vocabulary(own, 4))
  # Nothing is recorded by the other formats, nor by a model saved without a vocabulary.
  assert load_backbone(formats['hf'], vocabulary=other).vocabulary is other
  assert load_backbone(formats['t5x'], vocabulary=other).vocabulary is other
  native.save_backbone(tmp_path / 'bare', TINY_CONFIG, params, None)
  assert load_backbone(tmp_path / 'bare', vocabulary=other).vocabulary is other


def test_the_maximal_distance_is_asked_for_only_where_it_is_not_recorded(formats):
  assert load_backbone(formats['t5x'], max_distance=20).module.config.relpos_max_distance == 20
  assert load_backbone(formats['hf'], max_distance=128).module.config == TINY_CONFIG
  with pytest.raises(ValueError, match='max_distance=20 was given, but .* says 128'):
    load_backbone(formats['hf'], max_distance=20)


@pytest.mark.parametrize('label', ['dtype', 'param_dtype'])
def test_types_that_t5_overflows_in_are_refused(formats, label):
  with pytest.raises(ValueError, match=f'{label} is float16, in which T5 overflows'):
    load_backbone(formats['hf'], **{label: 'float16'})
  with pytest.raises(ValueError, match=f'{label} is int4; it may be float32 or bfloat16'):
    load_backbone(formats['hf'], **{label: 'int4'})
  with pytest.raises(ValueError, match=f"{label} is 'bf16'; it may be float32 or bfloat16"):
    load_backbone(formats['hf'], **{label: 'bf16'})


def test_a_packaged_model_is_found_by_name_and_a_slip_is_answered(
    params, vocabulary, tmp_path, monkeypatch
):
  native.save_backbone(tmp_path / 'zoo' / 'nano', TINY_CONFIG, params, vocabulary)
  (tmp_path / 'zoo' / 'demo').mkdir()
  monkeypatch.setattr(load, '_ZOO', tmp_path / 'zoo')
  assert load.packaged_names() == ['nano']
  assert load_backbone('nano').name == 'nano'
  (tmp_path / 'here' / 'nano').mkdir(parents=True)
  monkeypatch.chdir(tmp_path / 'here')
  assert load_backbone('nano').source == str(tmp_path / 'zoo' / 'nano')
  with pytest.raises(ValueError, match='nano is not a backbone of a known format'):
    load_backbone('./nano')
  with pytest.raises(FileNotFoundError, match="'nanno'.*Did you mean nano\\?.*Packaged: nano"):
    load_backbone('nanno')
  with pytest.raises(FileNotFoundError, match="'t5_1_1_bass'.*Did you mean t5_1_1_base"):
    load_backbone('t5_1_1_bass')


def test_a_name_may_be_a_path_object():
  assert load_backbone(Path('nano')).name == 'nano'


def test_the_fingerprint_needs_no_weights_on_a_device(formats, monkeypatch):
  backbone = load_backbone(formats['t5x'])
  monkeypatch.setattr(backbone, '_load_params', None)
  assert backbone.fingerprint == load_backbone(formats['hf']).fingerprint


def test_a_directory_that_is_not_there_is_answered_with_the_nearest(formats):
  slip = formats['t5x'].with_name('checkpoint_100')
  with pytest.raises(FileNotFoundError, match=f'Did you mean {formats["t5x"]}'):
    load_backbone(slip)


def test_what_is_not_a_backbone_is_refused_by_name(formats, tmp_path):
  with pytest.raises(ValueError, match='http://host/t5 is a URL of a kind that is not read'):
    load_backbone('http://host/t5')
  with pytest.raises(ValueError, match='is a file; a backbone is a directory'):
    load_backbone(formats['hf'] / 'config.json')
  with pytest.raises(ValueError, match=f'what a T5X run saved.* {formats["t5x"]}'):
    load_backbone(formats['t5x'].parent)
  with pytest.raises(ValueError, match='not a backbone of a known format.* an empty directory'):
    load_backbone(tmp_path)
  (tmp_path / 'checkpoint').write_text('model_checkpoint_path: "model.ckpt-1000"')
  with pytest.raises(ValueError, match='cannot be read as a T5X index'):
    load_backbone(tmp_path)
