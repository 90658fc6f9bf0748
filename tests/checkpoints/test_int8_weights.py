"""Weights read in int8: from every format, into shards, each number what it is in the whole."""

import collections
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from prompt_tuning_jax import artifact, partitioning
from prompt_tuning_jax.backbones import int8
from prompt_tuning_jax.checkpoints import int8_weights, load, names, native, source
from prompt_tuning_jax.checkpoints.load import load_backbone
from prompt_tuning_jax.typing import Injection
from tests.backbones.test_int8 import as_float
from tests.checkpoints import samples
from tests.conftest import TINY_CONFIG


@pytest.fixture(scope='module')
def params():
  return samples.random_params(TINY_CONFIG)


@pytest.fixture(scope='module')
def formats(params, tmp_path_factory):
  folder = tmp_path_factory.mktemp('formats')
  native.save_backbone(folder / 'ours', TINY_CONFIG, params, None, dtype='float32')
  native.save_backbone(folder / 'half', TINY_CONFIG, params, None, dtype='bfloat16')
  return {
      'native': folder / 'ours',
      'bfloat16': folder / 'half',
      'hf': samples.write_hf(
          folder / 'hub',
          samples.hf_description(TINY_CONFIG),
          samples.hf_tensors(TINY_CONFIG, params),
      ),
      't5x': samples.write_t5x(
          folder / 'checkpoint_1', names.flatten_to_t5x(params, TINY_CONFIG)
      ),
  }


@pytest.fixture(scope='module')
def expected(params):
  return int8.quantize_params(params)


@pytest.mark.parametrize('form', ['native', 'hf', 't5x'])
def test_every_format_gives_the_same_weights_and_the_fingerprint_of_the_file(
    formats, form, expected
):
  backbone = load_backbone(formats[form], param_dtype='int8')
  assert backbone.module.int8
  samples.assert_same_trees(jax.tree.map(np.asarray, backbone.params), expected)
  described = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), backbone.shapes)
  assert described == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), backbone.params)
  plain = load_backbone(formats[form])
  assert backbone.fingerprint == plain.fingerprint
  assert backbone.num_params == plain.num_params == int8.count(plain.params)


def test_the_numbers_do_not_depend_on_the_type_of_the_computation(formats, expected):
  half = load_backbone(formats['native'], dtype='bfloat16', param_dtype='int8').params
  assert half['encoder']['encoder_norm']['scale'].dtype == jnp.bfloat16
  mlp, of_file = half['decoder']['layers']['mlp'], expected['decoder']['layers']['mlp']
  samples.assert_same_trees(jax.tree.map(np.asarray, mlp), of_file)
  # Of a file in bfloat16 they are those of its numbers.
  rounded = jax.tree.map(
      lambda x: x.astype(ml_dtypes.bfloat16),
      names.stack_from_t5x(load.open_checkpoint(str(formats['bfloat16'])).weights, TINY_CONFIG),
  )
  found = load_backbone(formats['bfloat16'], param_dtype='int8').params
  samples.assert_same_trees(
      jax.tree.map(np.asarray, found['decoder']['layers']['mlp']),
      int8.quantize_params(rounded)['decoder']['layers']['mlp'],
  )


@pytest.mark.parametrize('rules', ['DEFAULT_RULES', 'FULLY_SHARDED_RULES'])
def test_on_a_mesh_each_device_holds_its_part_of_the_same_numbers(formats, rules, expected):
  mesh = partitioning.make_mesh(2)
  backbone = load_backbone(
      formats['native'], param_dtype='int8', mesh=mesh, rules=getattr(partitioning, rules)
  )
  samples.assert_same_trees(jax.tree.map(np.asarray, backbone.params), expected)
  mlp = backbone.params['encoder']['layers']['mlp']
  fully = rules == 'FULLY_SHARDED_RULES'
  shards = jax.tree.map(lambda leaf: leaf.sharding.shard_shape(leaf.shape), mlp)
  assert shards['wi_0'] == {'kernel': (2, 8 if fully else 16, 12), 'kernel_scale': (2, 12)}
  assert shards['wo'] == {
      'kernel': (2, 12, 8 if fully else 16), 'kernel_scale': (2, 8 if fully else 16)
  }  # fmt: skip


def test_a_part_has_the_numbers_of_the_whole_and_nothing_is_read_twice(formats, params):
  stored = load.open_checkpoint(str(formats['native'])).weights
  read = collections.Counter()

  def part(name, box):
    read[name] += 1
    return stored.part(name, box)

  counted = source.Weights(stored.specs, part)
  weights, entries = int8_weights.quantized(counted, names.entries(TINY_CONFIG), 'float32')
  assert [entry.t5x for entry in entries][: len(stored)] == [
      entry.t5x for entry in names.entries(TINY_CONFIG)
  ]
  for entry in entries:
    array = weights[entry.t5x]
    spec = weights.specs[entry.t5x]
    assert (array.shape, array.dtype) == (entry.shape, spec.dtype) == (spec.shape, spec.dtype)
  assert read == dict.fromkeys(stored, 1)

  # As a process reads that holds some rows of an `out` kernel: largest numbers may be elsewhere.
  name = 'encoder/layers_1/attention/out/kernel'
  box = slice(2, 6), slice(4, 12)
  whole, scale = int8.quantize(stored[name], axis=0)
  other, _ = int8_weights.quantized(stored, names.entries(TINY_CONFIG), 'float32')
  np.testing.assert_array_equal(other.part(name + '_scale', box[1:]), scale[box[1:]])
  np.testing.assert_array_equal(other.part(name, box), whole[box])
  assert (int8.quantize(stored[name][box], axis=0)[0] != whole[box]).any()


def test_numbers_that_are_not_finite_are_refused_by_name(params, tmp_path):
  broken = jax.tree.map(np.copy, params)
  broken['encoder']['layers']['mlp']['wo']['kernel'][1, 3, 2] = np.nan
  native.save_backbone(tmp_path / 'model', TINY_CONFIG, broken, None, dtype='float32')
  with pytest.raises(ValueError, match='encoder/layers_1/mlp/wo/kernel holds .* not finite'):
    _ = load_backbone(tmp_path / 'model', param_dtype='int8').params


def test_initialisers_see_the_embeddings_that_the_model_computes_with(formats, expected):
  backbone = load_backbone(formats['native'], param_dtype='int8')
  table = as_float(expected)['token_embedder']['embedding']
  np.testing.assert_array_equal(backbone.embedding_VD, table)
  half = load_backbone(formats['native'], dtype='bfloat16', param_dtype='int8')
  np.testing.assert_array_equal(half.embedding_VD, table.astype(ml_dtypes.bfloat16))


def test_a_prompt_goes_with_the_model_in_int8_and_with_the_float_one(formats, tmp_path):
  plain = load_backbone(formats['native'])
  backbone = load_backbone(formats['native'], param_dtype='int8')
  rows = np.ones((3, TINY_CONFIG.d_model), np.float32)
  for trained_with, other, said in ((backbone, plain, 'int8'), (plain, backbone, '')):
    prompt = artifact.save_prompt(
        tmp_path / f'{said}.safetensors', Injection(rows), backbone=trained_with
    )
    assert prompt.manifest.backbone_weights == said
    assert ('held in int8' in repr(prompt)) == bool(said)
    prompt.check(other)


def test_the_rounded_weights_are_not_saved_as_a_backbone(formats, tmp_path):
  backbone = load_backbone(formats['native'], param_dtype='int8')
  with pytest.raises(ValueError, match='is held in int8.*Copy the folder.*PARAM_DTYPE'):
    native.save_backbone(tmp_path / 'copy', TINY_CONFIG, backbone.params, None)
  assert not (tmp_path / 'copy').exists()


@pytest.mark.parametrize(
    ('platform', 'dtype'), [('cpu', 'float32'), ('gpu', 'bfloat16'), ('tpu', 'bfloat16')]
)
def test_the_type_of_the_computation_is_that_of_the_devices(formats, platform, dtype, monkeypatch):
  monkeypatch.setattr(jax, 'default_backend', lambda: platform)
  auto = load_backbone(formats['native'])
  assert auto.module.dtype == jnp.dtype(dtype)
  assert auto.params['token_embedder']['embedding'].dtype == jnp.dtype(dtype)
  # A mesh says which devices compute, and whoever names a type gets that.
  on_mesh = load_backbone(formats['native'], mesh=partitioning.make_mesh(2))
  assert on_mesh.module.dtype == jnp.float32
  assert load_backbone(formats['native'], dtype='float32').module.dtype == jnp.float32


def test_int8_is_no_type_to_compute_in(formats):
  load_int8 = functools.partial(load_backbone, formats['native'])
  with pytest.raises(ValueError, match="dtype is int8; it may be float32 or bfloat16. 'auto' is"):
    load_int8(dtype='int8')
  with pytest.raises(ValueError, match="param_dtype is int4; .* Frozen weights may also be 'int8'"):
    load_int8(param_dtype='int4')
