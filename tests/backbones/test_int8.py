"""Weights in int8: what rounding does to them, and that the model computes just that."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from prompt_tuning_jax.backbones import int8
from prompt_tuning_jax.backbones.t5 import T5, T5Config
from prompt_tuning_jax.checkpoints.load import load_backbone
from prompt_tuning_jax.methods.soft_prompt import SoftPrompt
from prompt_tuning_jax.training.step import loss_and_grad
from prompt_tuning_jax.typing import Injection
from tests.backbones.test_t5 import TIED, assert_cached_decoding_is_forced
from tests.conftest import TINY_CONFIG, assert_close, prepend_virtual, random_batch

CHANGES = {'1.1': {}, '1.0': TIED}


def as_float(params):
  """The weights that a tree in int8 stands for, written out."""
  flat = traverse_util.flatten_dict(jax.tree.map(np.asarray, params))
  scales = {path: flat.pop(path) for path in list(flat) if path[-1].endswith('_scale')}
  for path, scale in scales.items():
    path = (*path[:-1], path[-1].removesuffix('_scale'))
    assert flat[path].dtype == np.int8
    axis = {'kernel': -2, 'embedding': -1}[path[-1]]
    flat[path] = np.float32(flat[path]) * np.expand_dims(scale, axis)
  return traverse_util.unflatten_dict(flat)


def model(change, seed=0, **settings):
  """A tiny model with weights in int8: (module, params, the weights written out)."""
  module = T5(dataclasses.replace(TINY_CONFIG, **change), int8=True, **settings)
  params = jax.jit(module.init_params)(jax.random.key(seed))
  return module, params, as_float(params)


def test_the_largest_of_each_channel_is_127_and_the_rest_is_rounded_to_the_nearest():
  weights = np.array([[-2.54, 0.5, 0.0], [1.0, 0.25, 0.0], [0.034, -0.1, 0.0]], np.float32)
  numbers, scale = int8.quantize(weights, axis=0)
  np.testing.assert_array_equal(numbers, [[-127, 127, 0], [50, 64, 0], [2, -25, 0]])
  np.testing.assert_allclose(scale, [0.02, 0.5 / 127, 1.0], rtol=1e-6)
  assert numbers.dtype == np.int8 and scale.dtype == np.float32
  by_row, of_rows = int8.quantize(weights.T, axis=-1)
  np.testing.assert_array_equal(by_row, numbers.T)
  np.testing.assert_array_equal(of_rows, scale)


@pytest.mark.parametrize('array', [np.asarray, jnp.asarray])
def test_no_weight_is_further_off_than_half_a_scale(array):
  weights = np.random.default_rng(0).normal(size=(3, 40, 30)).astype(np.float32)
  numbers, scale = int8.quantize(array(weights), axis=-2)
  assert isinstance(numbers, type(array(0.0)))
  assert scale.shape == (3, 30) and np.abs(numbers).max() == 127
  off = np.abs(int8.dequantize(numbers, scale, -2, jnp.float32) - weights)
  assert (off <= scale[:, None] * 0.5001).all()
  assert off.max() > 0.4 * scale.min()
  # Numbers whose scale float32 cannot hold are zero, and not divided by zero.
  numbers, scale = int8.quantize(array(np.full((2, 1), 1e-44, np.float32)), axis=0)
  assert not numbers.any() and scale == 1


@pytest.mark.parametrize('change', CHANGES.values(), ids=CHANGES)
def test_the_model_computes_what_the_rounded_weights_do(change, tiny_batch):
  module, params, written_out = model(change)
  batch = prepend_virtual(tiny_batch, TINY_CONFIG.vocab_size, 2)
  prompt = jax.random.normal(jax.random.key(1), (2, TINY_CONFIG.d_model))
  plain = jax.jit(module.init_params)(jax.random.key(0))
  assert plain['token_embedder']['embedding'].dtype == jnp.int8

  @jax.jit
  def logits_and_gradient(params):
    def loss(prompt):
      logits = module.apply({'params': params}, batch, Injection(prompt))
      return jnp.sum(logits**2), logits

    return jax.grad(loss, has_aux=True)(prompt)

  (gradient, logits), (expected_gradient, expected) = map(
      logits_and_gradient, (params, written_out)
  )
  assert_close(logits, expected, 1e-5)
  assert_close(gradient, expected_gradient, 1e-5)


@pytest.mark.parametrize('change', CHANGES.values(), ids=CHANGES)
def test_decoding_with_a_cache_equals_teacher_forcing(change, tiny_batch):
  module, params, _ = model(change)
  injection = Injection(jax.random.normal(jax.random.key(3), (2, TINY_CONFIG.d_model)))
  batch = prepend_virtual(tiny_batch, TINY_CONFIG.vocab_size, 2)
  assert_cached_decoding_is_forced(module, params, batch, injection)


def test_the_norms_beside_them_have_their_gradients_too(tiny_batch):
  module, params, written_out = model({})

  @jax.jit
  def gradient_of(params):
    def loss(norms):
      changed = params | {'encoder': params['encoder'] | {'encoder_norm': norms}}
      return jnp.sum(module.apply({'params': changed}, tiny_batch) ** 2)

    return jax.grad(loss)(params['encoder']['encoder_norm'])['scale']

  assert_close(gradient_of(params), gradient_of(written_out), 1e-5)


@pytest.mark.parametrize('change', CHANGES.values(), ids=CHANGES)
def test_shapes_and_axes_are_those_of_the_weights(change):
  module, params, _ = model(change)
  axes = jax.tree.map(tuple, module.logical_axes(), is_leaf=lambda x: not isinstance(x, dict))
  flat = traverse_util.flatten_dict(params)
  named = traverse_util.flatten_dict(axes)
  assert named.keys() == flat.keys()
  assert all(len(named[path]) == leaf.ndim for path, leaf in flat.items())
  wo = axes['encoder']['layers']['mlp']['wo']
  assert wo == {'kernel': ('layers', 'mlp', 'embed'), 'kernel_scale': ('layers', 'embed')}
  assert axes['token_embedder']['embedding_scale'] == ('vocab',)
  # Scales are no parameters of the model.
  plain = jax.eval_shape(module.clone(int8=False).init_params, jax.random.key(0))
  assert int8.count(params) == sum(leaf.size for leaf in jax.tree.leaves(plain))
  held = traverse_util.flatten_dict(int8.held_as(params, jnp.bfloat16))
  assert {
      'int8' if path[-1] in ('kernel', 'embedding') else
      'float32' if path[-1].endswith('_scale') else 'bfloat16'
      for path in held
  } == {leaf.dtype.name for leaf in held.values()}
  assert held[('encoder', 'encoder_norm', 'scale')].dtype == jnp.bfloat16
  assert held[('token_embedder', 'embedding_scale')].dtype == jnp.float32


@pytest.mark.parametrize(
    ('dtype', 'remat'),
    [
        (jnp.float32, 'none'),
        pytest.param(jnp.bfloat16, 'dots_with_no_batch_dims', marks=pytest.mark.slow),
        pytest.param(jnp.bfloat16, 'full', marks=pytest.mark.slow),
    ],
)
def test_a_step_holds_no_float_copy_of_the_layers(dtype, remat):
  config = T5Config(100, 128, 4, 32, 256, 8, 8)
  batch = prepend_virtual(random_batch(100, [7, 4], [3, 2]), 100, 4)

  def loss(prompt, params, module):
    return jnp.sum(module.apply({'params': params}, batch, Injection(prompt)))

  def held(module):
    shapes = jax.eval_shape(module.init_params, jax.random.key(0))
    program = jax.jit(jax.grad(loss), static_argnums=2).lower(
        jnp.zeros((4, 128)), int8.held_as(shapes, dtype), module
    )
    memory = program.compile().memory_analysis()
    return memory.argument_size_in_bytes, memory.temp_size_in_bytes

  module = T5(config, dtype=dtype, remat=remat)
  weights, temporary = held(module)
  in_int8, temporary_of_int8 = held(module.clone(int8=True))
  width = jnp.dtype(dtype).itemsize
  assert in_int8 == pytest.approx(weights / width, rel=0.05)
  # A copy of the layers would be `weights`; of one layer's arrays it is a part of an eighth.
  # (In bfloat16, XLA's CPU compiler makes such copies of float weights itself.)
  assert temporary_of_int8 < temporary + weights / 8


def test_in_bfloat16_products_are_bfloat16_and_logits_float32(tiny_batch):
  module, params, written_out = model({}, dtype=jnp.bfloat16)
  apply = functools.partial(module.apply, {'params': params})
  encoded = apply(tiny_batch.encoder_input_tokens, method='encode')
  logits = apply(tiny_batch)
  assert encoded.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
  assert np.mean(logits == logits.astype(jnp.bfloat16).astype(jnp.float32)) < 0.1
  in_float32 = module.clone(dtype=jnp.float32).apply({'params': written_out}, tiny_batch)
  assert_close(logits, in_float32, 0.05)


@pytest.fixture(scope='module')
def on_nano():
  """Loss and prompt gradient on nano's real weights, by how they are held and computed."""
  start = SoftPrompt(20)
  text = 'definition: a small animal with long ears that eats grass'

  @functools.cache
  def of(dtype, param_dtype=None):
    backbone = load_backbone('nano', dtype=dtype, param_dtype=param_dtype)
    tokens = np.asarray([*backbone.vocabulary.encode(text), 1], np.int32)[None]
    targets = np.asarray([*backbone.vocabulary.encode('animal'), 1], np.int32)[None]
    batch = random_batch(backbone.spec.vocab_size, [tokens.size], [targets.size]).replace(
        encoder_input_tokens=tokens,
        decoder_input_tokens=np.pad(targets[:, :-1], ((0, 0), (1, 0))),
        decoder_target_tokens=targets,
    )
    batch = prepend_virtual(batch, backbone.spec.vocab_size, 20)
    params = start.init(jax.random.key(0), backbone.spec)['params']
    loss, gradient = jax.jit(functools.partial(loss_and_grad, backbone, start))(params, batch)
    assert loss.dtype == gradient['prompt'].dtype == jnp.float32
    return float(loss), np.asarray(gradient['prompt'], np.float64).reshape(-1)

  return of


@pytest.mark.slow
@pytest.mark.parametrize(
    ('dtype', 'param_dtype', 'off'),
    [
        ('bfloat16', None, 0.005), ('float32', 'int8', 0.01), ('bfloat16', 'int8', 0.02),
    ],
)  # fmt: skip
def test_nano_has_nearly_the_loss_and_the_gradient_of_float32(on_nano, dtype, param_dtype, off):
  loss, gradient = on_nano('float32')
  other, other_gradient = on_nano(dtype, param_dtype)
  cosine = gradient @ other_gradient / np.linalg.norm(gradient) / np.linalg.norm(other_gradient)
  assert other != loss
  assert other == pytest.approx(loss, rel=off)
  assert 1e-8 < 1 - cosine < off
