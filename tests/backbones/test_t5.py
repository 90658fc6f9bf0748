"""The T5 backbone: recorded values, and the laws it owes every prompt method."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from prompt_tuning_jax.backbones.t5 import T5, T5Config
from prompt_tuning_jax.backbones.t5_layers import (
    float32_product,
    place_virtual,
    prepend,
    relative_position_bucket,
)
from prompt_tuning_jax.backbones.t5_stacks import REMAT_POLICIES
from prompt_tuning_jax.data.virtual_tokens import as_placement
from prompt_tuning_jax.typing import Batch, Injection
from tests.conftest import (
    MINI_CONFIG,
    TINY_CONFIG,
    assert_close,
    mini_params,
    prepend_virtual,
    recorded_batch,
)


@functools.partial(jax.jit, static_argnums=0, static_argnames=('method', 'enable_dropout'))
def _jitted(module, params, batch, injection, rngs=None, **kwargs):
  return module.apply({'params': params}, batch, injection, rngs=rngs, **kwargs)


def _apply(model, batch, injection=None, **kwargs):
  return _jitted(*model, batch, injection, **kwargs)


@pytest.mark.parametrize('case', ['P0_A', 'P0_edge', 'P5_A', 'P5_edge', 'P5_long'])
def test_encoder_and_logits_equal_t5x(golden, case):
  recorded = np.load(golden / 't5x' / f'forward_mini_{case}.npz')
  model = T5(MINI_CONFIG), mini_params(golden)
  batch, injection = recorded_batch(recorded), None
  if 'prompt' in recorded:
    batch = prepend_virtual(batch, MINI_CONFIG.vocab_size, len(recorded['prompt']))
    injection = Injection(recorded['prompt'])
  encoded = _apply(model, batch.encoder_input_tokens, injection, method='encode')
  # At padded positions as well: they matter where a whole row is padding.
  assert_close(encoded, recorded['encoder_outputs'], 1e-5)
  assert_close(_apply(model, batch, injection), recorded['logits'], 1e-5)


@pytest.mark.parametrize(
    'case, place', [('after_bos', 'after_bos'), ('suffix', 'suffix_before_eos')]
)
def test_other_places_of_the_prompt_equal_the_original(golden, case, place):
  recorded = np.load(golden / 't5x' / f'variant_mini_{case}_P5.npz')
  model = T5(MINI_CONFIG), mini_params(golden)
  batch = recorded_batch(recorded)
  placement = as_placement(place)
  rows = [
      placement(row[: np.count_nonzero(row)], 5, MINI_CONFIG.vocab_size)
      for row in batch.encoder_input_tokens
  ]
  width = batch.encoder_input_tokens.shape[1] + 5
  placed = np.stack([np.pad(row, (0, width - len(row))) for row in rows])
  batch = batch.replace(encoder_input_tokens=placed)

  def loss(prompt):
    logits = _apply(model, batch, Injection(prompt))
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits, batch.decoder_target_tokens
    )
    z_loss = 1e-4 * jax.nn.logsumexp(logits, axis=-1) ** 2
    return jnp.sum((losses + z_loss) * batch.decoder_loss_weights), logits

  (total, logits), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(
      jnp.asarray(recorded['prompt'])
  )
  assert_close(total, recorded['loss_fn'], 1e-5)
  counted = batch.decoder_loss_weights > 0
  assert_close(logits[counted], recorded['logits'][counted], 1e-4)
  assert_close(gradient, recorded['grad/encoder/prompt/prompt/prompt'], 1e-4)


@pytest.mark.parametrize('also_embedded', [True, False])
def test_a_prompt_in_every_layer_equals_the_original(golden, also_embedded):
  recorded = np.load(golden / 't5x' / 'variant_mini_per_layer_replace_prompt.npz')
  model = T5(MINI_CONFIG), mini_params(golden)
  batch = prepend_virtual(recorded_batch(recorded), MINI_CONFIG.vocab_size, 5)
  # What stands at the virtual tokens before the first layer is replaced there as well.
  embedded = recorded['prompt'] if also_embedded else None
  names = [f'encoder/layers_{layer}/prompt/prompt/prompt' for layer in range(3)]

  def loss(rows):
    logits = _apply(model, batch, Injection(embedded, layer_embeddings=rows))
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits, batch.decoder_target_tokens
    )
    z_loss = 1e-4 * jax.nn.logsumexp(logits, axis=-1) ** 2
    return jnp.sum((losses + z_loss) * batch.decoder_loss_weights), logits

  (total, logits), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(
      jnp.stack([recorded[f'param/{name}'] for name in names])
  )
  assert_close(logits, recorded['logits'], 1e-5)
  assert_close(total, recorded['loss_fn'], 1e-5)
  assert_close(gradient, np.stack([recorded[f'grad/{name}'] for name in names]), 1e-5)


def test_a_soft_prompt_of_embedded_words_acts_like_the_words(tiny, tiny_batch):
  words = np.array([7, 9, 11], np.int32)
  spoken = tiny_batch.replace(
      encoder_input_tokens=np.concatenate(
          [np.tile(words, (3, 1)), tiny_batch.encoder_input_tokens], axis=1
      )
  )
  embedding_VD = tiny[1]['token_embedder']['embedding']
  injected = _apply(
      tiny,
      prepend_virtual(tiny_batch, TINY_CONFIG.vocab_size, 3),
      Injection(embedding_VD[words]),
  )
  np.testing.assert_array_equal(injected, _apply(tiny, spoken))


def test_no_injection_is_the_plain_model(tiny, tiny_batch):
  np.testing.assert_array_equal(
      _apply(tiny, tiny_batch, Injection()), _apply(tiny, tiny_batch)
  )


def test_padding_changes_no_logit_of_a_real_token(tiny, tiny_batch):
  padded = Batch(*(np.pad(x, ((0, 0), (0, 4))) for x in jax.tree.leaves(tiny_batch)))
  counted = tiny_batch.decoder_loss_weights > 0
  length = counted.shape[1]
  assert_close(
      _apply(tiny, padded)[:, :length][counted], _apply(tiny, tiny_batch)[counted], 1e-6
  )


def test_a_later_target_changes_no_earlier_logit(tiny, tiny_batch):
  changed = tiny_batch.decoder_input_tokens.copy()
  changed[:, 2] = 5
  before = _apply(tiny, tiny_batch)
  after = _apply(tiny, tiny_batch.replace(decoder_input_tokens=changed))
  np.testing.assert_array_equal(before[:, :2], after[:, :2])
  assert np.abs(before[0, 2] - after[0, 2]).max() > 1e-3


@pytest.mark.parametrize('change', [*({'remat': r} for r in REMAT_POLICIES), {'unroll': True}])
def test_scan_and_remat_change_no_loss_and_no_gradient(tiny, tiny_batch, change):
  module, params = tiny
  batch = prepend_virtual(tiny_batch, TINY_CONFIG.vocab_size, 2)
  prompt = jax.random.normal(jax.random.key(1), (2, TINY_CONFIG.d_model))

  def loss(prompt, module):
    return jnp.sum(module.apply({'params': params}, batch, Injection(prompt)) ** 2)

  gradient_of = jax.jit(jax.value_and_grad(loss), static_argnums=1)
  expected = gradient_of(prompt, module)
  actual = gradient_of(prompt, module.clone(**change))
  assert_close(actual[0], expected[0], 1e-6)
  assert_close(actual[1], expected[1], 1e-5)


@pytest.mark.parametrize(
    'change',
    [
        {},
        {'relpos_per_layer': True},
        {'mlp_activations': ('relu',), 'tied_embeddings': True, 'scale_decoder_outputs': True},
    ],
    ids=['1.1', 'bias per layer', '1.0'],
)
def test_decoding_with_a_cache_equals_teacher_forcing(change, tiny_batch):
  config = T5Config(**{**TINY_CONFIG.__dict__, **change})
  module = T5(config)
  params = jax.jit(module.init_params)(jax.random.key(2))
  batch = prepend_virtual(tiny_batch, config.vocab_size, 2)
  injection = Injection(jax.random.normal(jax.random.key(3), (2, config.d_model)))
  assert_cached_decoding_is_forced(module, params, batch, injection)


def assert_cached_decoding_is_forced(module, params, batch, injection):
  """Token by token with a cache, the logits of real tokens are those of teacher forcing."""
  model, source = (module, params), batch.encoder_input_tokens
  forced = _apply(model, batch, injection)
  encoded = _apply(model, source, injection, method='encode')
  length = batch.decoder_input_tokens.shape[1]
  cache = module.apply(
      {'params': params}, encoded, source, length + 2, injection, method='init_cache'
  )
  decode_step = jax.jit(functools.partial(module.apply, method='decode_step'))
  for step in range(length):
    logits, cache = decode_step(
        {'params': params}, batch.decoder_input_tokens[:, step], cache
    )
    counted = batch.decoder_loss_weights[:, step] > 0
    assert_close(logits[counted], forced[:, step][counted], 1e-5, f'step {step}')


def test_one_bias_table_per_layer_equals_a_shared_one_with_the_same_values(tiny, tiny_batch):
  module, params = tiny
  per_layer = jax.tree.map(lambda x: x, params)
  for stack in ('encoder', 'decoder'):
    depth = per_layer[stack]['layers']['pre_mlp_layer_norm']['scale'].shape[0]
    table = per_layer[stack].pop('relpos_bias')['rel_embedding']
    per_layer[stack]['layers']['relpos_bias'] = {
        'rel_embedding': jnp.tile(table, (depth, 1, 1))
    }
  config = T5Config(**{**TINY_CONFIG.__dict__, 'relpos_per_layer': True})
  assert_close(
      _apply((T5(config), per_layer), tiny_batch), _apply(tiny, tiny_batch), 1e-6
  )


def test_dropout_is_off_unless_asked_for_and_repeats_with_its_key(tiny, tiny_batch):
  module, params = tiny[0].clone(dropout_rate=0.3), tiny[1]
  plain = _apply((module, params), tiny_batch)
  np.testing.assert_array_equal(plain, _apply(tiny, tiny_batch))
  once, again, other = (
      _apply(
          (module, params),
          tiny_batch,
          enable_dropout=True,
          rngs={'dropout': jax.random.key(seed)},
      )
      for seed in (0, 0, 1)
  )
  np.testing.assert_array_equal(once, again)
  assert np.abs(once - other).max() > 1e-3
  assert np.abs(once - plain).max() > 1e-3


def test_every_weight_has_an_axis_name_for_each_dimension(tiny):
  axes = tiny[0].logical_axes()
  known = {
      'vocab', 'embed', 'mlp', 'heads', 'joined_kv', 'relpos_buckets', 'layers', None,
  }  # fmt: skip
  for path, leaf in jax.tree_util.tree_leaves_with_path(tiny[1]):
    names = axes
    for key in path:
      names = names[key.key]
    assert len(names) == leaf.ndim and set(names) <= known, (path, names)


def test_bfloat16_stays_near_float32(tiny, tiny_batch):
  half = _apply((tiny[0].clone(dtype=jnp.bfloat16), tiny[1]), tiny_batch)
  assert half.dtype == jnp.float32
  assert_close(half, _apply(tiny, tiny_batch), 0.05)


TIED = {'tied_embeddings': True, 'scale_decoder_outputs': True, 'mlp_activations': ('relu',)}


@pytest.mark.parametrize('change', [{}, TIED], ids=['1.1', '1.0'])
@pytest.mark.parametrize('path', ['teacher forcing', 'step by step'])
def test_logits_of_bfloat16_are_summed_and_kept_in_float32(change, path, tiny_batch):
  module = T5(T5Config(**{**TINY_CONFIG.__dict__, **change}), dtype=jnp.bfloat16)
  params = jax.jit(module.init_params)(jax.random.key(2))
  apply = functools.partial(module.apply, {'params': params})
  encoded = apply(tiny_batch.encoder_input_tokens, method='encode')
  arguments = encoded, tiny_batch.encoder_input_tokens
  if path == 'teacher forcing':
    targets = tiny_batch.decoder_input_tokens, tiny_batch.decoder_target_tokens
    hidden = apply(*targets, *arguments, method=_before_the_logits)
    logits = apply(*targets, *arguments, method='decode')
  else:
    cache = apply(*arguments, 2, method='init_cache')
    token = tiny_batch.decoder_input_tokens[:, 0]
    hidden = apply(token, cache, method=_step_before_the_logits)
    logits, _ = apply(token, cache, method='decode_step')
  kernel = params['token_embedder']['embedding'].T
  if change:
    hidden = hidden * TINY_CONFIG.d_model**-0.5
  else:
    kernel = params['decoder']['logits_dense']['kernel']
  kernel = kernel.astype(jnp.bfloat16)

  assert hidden.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
  assert np.mean(logits == logits.astype(jnp.bfloat16).astype(jnp.float32)) < 0.1
  exact = np.float64(hidden) @ np.float64(kernel)
  assert_close(logits, exact, 1e-6)
  # Rounding them, as it was, takes them a thousand times as far away.
  assert np.abs(np.float64(hidden @ kernel) - exact).max() > 1e-3 * np.abs(exact).max()


def _before_the_logits(self, inputs, targets, encoded, encoder_inputs):
  return self.decoder(
      self.token_embedder(inputs), inputs, targets, encoded, encoder_inputs > 0
  )


def _step_before_the_logits(self, token, cache):
  return self.decoder.step(self.token_embedder(token[:, None]), cache)[0][:, 0]


def test_the_logits_are_differentiated_in_the_type_of_the_factors():
  keys = jax.random.split(jax.random.key(0))
  x = jax.random.normal(keys[0], (2, 3, 8), jnp.bfloat16)
  kernel = jax.random.normal(keys[1], (8, 20), jnp.bfloat16)

  def loss(x, kernel, product=float32_product):
    return jnp.sum(jax.nn.log_softmax(product(x, kernel)) ** 2)

  program = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(x, kernel).as_text()
  products = [line for line in program.splitlines() if 'dot_general' in line]
  results = sorted(re.search(r'x(b?f\d+)>$', line)[1] for line in products)
  assert results == ['bf16', 'bf16', 'f32'], program
  actual = jax.grad(loss, argnums=(0, 1))(x, kernel)
  expected = jax.grad(loss, argnums=(0, 1))(
      x.astype(jnp.float32), kernel.astype(jnp.float32), jnp.matmul
  )
  for one, other in zip(actual, expected):
    assert one.dtype == jnp.bfloat16
    assert_close(one, other, 0.02)


@pytest.mark.parametrize('rate', [1.5, 1.0, -0.1, float('nan'), None, '0.1'])
def test_what_is_no_dropout_rate_is_refused_by_the_name_of_its_macro(rate, tiny):
  with pytest.raises(ValueError, match=r'DROPOUT_RATE is .*at least 0 and below 1'):
    T5(TINY_CONFIG, dropout_rate=rate)
  with pytest.raises(ValueError, match='DROPOUT_RATE is'):
    tiny[0].clone(dropout_rate=rate)


def test_float16_is_refused(tiny, tiny_batch):
  with pytest.raises(ValueError, match='overflows in float16.*bfloat16'):
    _apply((tiny[0].clone(dtype=jnp.float16), tiny[1]), tiny_batch)


def test_a_prompt_of_another_width_is_refused(tiny, tiny_batch):
  with pytest.raises(ValueError, match=r'\(3, 8\).*d_model=16'):
    _apply(tiny, tiny_batch, Injection(jnp.zeros((3, 8))))


def test_a_prompt_of_no_positions_is_refused(tiny, tiny_batch):
  with pytest.raises(ValueError, match=r'shape \(0, 16\): a prompt of no positions.*PROMPT_LENGTH'):
    _apply(tiny, tiny_batch, Injection(jnp.zeros((0, 16))))


def test_gradients_of_a_prompt_add_up_in_float32_whatever_the_model_computes_in():
  x = jnp.zeros((64, 5, 16), jnp.bfloat16)
  index = jnp.tile(jnp.array([0, 1, 2, -7, -1]), (64, 1))
  weights = jax.random.normal(jax.random.key(0), x.shape).astype(jnp.bfloat16)

  def loss(rows_PD):
    return jnp.sum((place_virtual(x, rows_PD, index) * weights).astype(jnp.float32))

  gradient = jax.grad(loss)(jnp.ones((3, 16)))
  expected = np.asarray(weights, np.float32)[:, :3].sum(axis=0)
  np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)

  def loss_of_prefix(prefix):
    keys, values = prepend((prefix, prefix), (x[:, :, None], x[:, :, None]))
    return jnp.sum((keys[:, :3, 0] * weights[:, :3]).astype(jnp.float32)) + 0 * values.sum()

  gradient = jax.grad(loss_of_prefix)(jnp.ones((3, 1, 16)))
  np.testing.assert_allclose(gradient[:, 0], expected, rtol=1e-5, atol=1e-5)


def test_small_distances_have_buckets_of_their_own():
  distances = np.arange(-7, 8)
  buckets = relative_position_bucket(
      distances, bidirectional=True, num_buckets=32, max_distance=128
  )
  # Earlier keys count up from 0, later keys from 16 on.
  np.testing.assert_array_equal(
      buckets, [7, 6, 5, 4, 3, 2, 1, 0, 17, 18, 19, 20, 21, 22, 23]
  )
  far = relative_position_bucket(
      np.array([-500, -128, 500]), bidirectional=True, num_buckets=32, max_distance=128
  )
  np.testing.assert_array_equal(far, [15, 15, 31])
