"""The table of names: T5X on disk, Hugging Face, the model's stacked tree."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from prompt_tuning_jax.backbones.t5 import T5Config
from prompt_tuning_jax.checkpoints import names
from tests.checkpoints import samples
from tests.conftest import TINY_CONFIG

# (d_model, heads, d_ff, layers) → parameters, number of arrays (the published models).
PUBLISHED = {
    'small': ((512, 6, 1024, 8), 76_961_152, 190),
    'base': ((768, 12, 2048, 12), 247_577_856, 282),
    'large': ((1024, 16, 2816, 24), 783_150_080, 558),
    'xl': ((2048, 32, 5120, 24), 2_849_757_184, 558),
    'xxl': ((4096, 64, 10240, 24), 11_135_332_352, 558),
}


@pytest.mark.parametrize('size', PUBLISHED)
def test_the_table_counts_the_arrays_and_parameters_of_t5_1_1(size):
  (d_model, heads, d_ff, layers), parameters, arrays = PUBLISHED[size]
  config = T5Config(32128, d_model, heads, 64, d_ff, layers, layers)
  table = names.entries(config)
  assert len(table) == arrays
  assert sum(int(np.prod(entry.shape)) for entry in table) == parameters
  assert len({entry.t5x for entry in table}) == len({entry.hf for entry in table}) == arrays


@pytest.mark.parametrize('family', samples.CONFIGS)
def test_flattening_and_stacking_are_inverse(family):
  config = samples.CONFIGS[family]
  params = samples.random_params(config)
  flat = names.flatten_to_t5x(params, config)
  assert set(flat) == {entry.t5x for entry in names.entries(config)}
  np.testing.assert_array_equal(
      flat['decoder/layers_2/encoder_decoder_attention/out/kernel'],
      params['decoder']['layers']['encoder_decoder_attention']['out']['kernel'][2],
  )
  samples.assert_same_trees(names.stack_from_t5x(flat, config), params)


def test_jax_arrays_stay_jax_arrays():
  params = jax.tree.map(jnp.asarray, samples.random_params(TINY_CONFIG))
  flat = names.flatten_to_t5x(params, TINY_CONFIG)
  stacked = names.stack_from_t5x(flat, TINY_CONFIG)
  assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves((flat, stacked)))
  samples.assert_same_trees(stacked, params)


def test_stacking_casts_to_the_type_asked_for():
  params = samples.random_params(TINY_CONFIG)
  flat = names.flatten_to_t5x(params, TINY_CONFIG)
  stacked = names.stack_from_t5x(flat, TINY_CONFIG, jnp.bfloat16)
  expected = jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16), params)
  samples.assert_same_trees(stacked, expected)


@pytest.mark.parametrize('family', samples.CONFIGS)
def test_the_architecture_is_told_from_the_shapes(family):
  config = samples.CONFIGS[family]
  flat = names.flatten_to_t5x(samples.random_params(config), config)
  assert names.config_from_shapes(flat) == config
  assert names.config_from_shapes(
      flat, relpos_max_distance=20
  ) == dataclasses.replace(config, relpos_max_distance=20)


def test_every_mismatch_is_listed_with_the_size_it_looks_like():
  flat = names.flatten_to_t5x(samples.random_params(TINY_CONFIG), TINY_CONFIG)
  flat['encoder/layers_0/mlp/wi_0/kernel'] = np.zeros((1024, 2816))
  flat['decoder/layers_2/self_attention/query/kernel'] = np.zeros((17, 12))
  flat['decoder/decoder_norm/scale'] = np.zeros((2, 16))
  flat['encoder/layers_2/mlp/wo/kernel'] = np.zeros((24, 16))
  del flat['encoder/encoder_norm/scale']
  with pytest.raises(ValueError) as error:
    names.check_shapes(flat, TINY_CONFIG, 'The file x')
  lines = [line.strip() for line in str(error.value).splitlines()]
  assert lines[0].startswith('The file x does not fit the model: 5 of ')
  assert sorted(lines[1:-1]) == [
      'decoder/decoder_norm/scale: expected [16], found [2, 16] (2 axes, but it is [embed])',
      'decoder/layers_2/self_attention/query/kernel: expected [16, 12], found [17, 12] '
      '(no published T5 size)',
      'encoder/encoder_norm/scale: expected [16], but it is missing',
      'encoder/layers_0/mlp/wi_0/kernel: expected [16, 24], found [1024, 2816] '
      '(looks like T5 1.1 large)',
      'encoder/layers_2/mlp/wo/kernel: unexpected, found [24, 16]',
  ]


def test_a_tree_of_another_depth_is_refused_layer_by_layer():
  params = samples.random_params(TINY_CONFIG)
  shallower = dataclasses.replace(TINY_CONFIG, num_decoder_layers=2)
  with pytest.raises(ValueError, match=r'decoder/layers_2/mlp/wo/kernel: unexpected'):
    names.flatten_to_t5x(params, shallower)
  deeper = dataclasses.replace(TINY_CONFIG, num_encoder_layers=3)
  with pytest.raises(ValueError, match=r'encoder/layers_2/mlp/wo/kernel: .*missing'):
    names.flatten_to_t5x(params, deeper)


def test_an_array_the_model_does_not_have_is_refused():
  params = samples.random_params(TINY_CONFIG)
  params['encoder']['adapter'] = {'kernel': np.zeros((2, 2))}
  with pytest.raises(ValueError, match=r'encoder/adapter/kernel: unexpected, found \[2, 2\]'):
    names.flatten_to_t5x(params, TINY_CONFIG)


def test_shapes_that_do_not_tell_the_sizes_are_refused():
  flat = names.flatten_to_t5x(samples.random_params(TINY_CONFIG), TINY_CONFIG)
  without_bias = {name: x for name, x in flat.items() if 'relpos' not in name}
  with pytest.raises(ValueError, match='no matrix encoder/relpos_bias/rel_embedding'):
    names.config_from_shapes(without_bias)
  five_heads = flat | {'encoder/relpos_bias/rel_embedding': np.zeros((5, 32))}
  with pytest.raises(ValueError, match='12 wide, which 5 heads .* do not divide'):
    names.config_from_shapes(five_heads)
