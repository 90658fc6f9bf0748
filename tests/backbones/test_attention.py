"""`ATTENTION`: every way to compute attention gives the same numbers, or says that it cannot."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax.backbones.t5 import T5
from prompt_tuning_jax.checkpoints.load import load_backbone
from prompt_tuning_jax.evaluation.decoding import Decoding
from prompt_tuning_jax.typing import Batch, Injection
from tests.backbones.test_t5 import assert_cached_decoding_is_forced
from tests.backbones.test_t5_prefix import PER_LAYER, prefix
from tests.conftest import TINY_CONFIG, assert_close, prepend_virtual


def injections():
  rows = jax.random.normal(jax.random.key(1), (2, TINY_CONFIG.d_model))
  return {
      'prompt': Injection(rows),
      'prefixes': prefix(TINY_CONFIG).replace(virtual_embeddings=rows),
      'without positions': prefix(TINY_CONFIG, positions='none').replace(virtual_embeddings=rows),
  }


@pytest.mark.parametrize('config', [TINY_CONFIG, PER_LAYER], ids=['1.1', 'bias per layer'])
@pytest.mark.parametrize('injection', injections().values(), ids=injections())
def test_logits_and_gradients_are_those_of_the_default(config, injection, tiny_batch):
  module = T5(config)
  params = jax.jit(module.init_params)(jax.random.key(0))
  batch = prepend_virtual(tiny_batch, TINY_CONFIG.vocab_size, 2)
  # A row that is padding alone attends evenly.
  batch = Batch(*(np.concatenate([x, np.zeros_like(x[:1])]) for x in jax.tree.leaves(batch)))

  def loss(injection, module):
    logits = module.apply({'params': params}, batch, injection)
    return jnp.sum(logits**2), logits

  gradient_of = jax.jit(
      jax.grad(loss, has_aux=True, allow_int=True), static_argnums=1
  )
  gradient, logits = gradient_of(injection, module)
  other_gradient, other = gradient_of(injection, module.clone(attention='dot_product'))
  assert_close(other, logits, 1e-5)
  for one, expected in zip(*map(jax.tree.leaves, (other_gradient, gradient)), strict=True):
    assert np.abs(expected).max() > 0
    assert_close(one, expected, 1e-5)


def test_it_is_another_program(tiny, tiny_batch):
  def program(attention):
    module = tiny[0].clone(attention=attention)
    return str(jax.make_jaxpr(lambda: module.apply({'params': tiny[1]}, tiny_batch))())

  assert program('xla') != program('dot_product')


def test_decoding_with_a_cache_equals_teacher_forcing(tiny_batch):
  module = T5(TINY_CONFIG, attention='dot_product')
  params = jax.jit(module.init_params)(jax.random.key(0))
  batch = prepend_virtual(tiny_batch, TINY_CONFIG.vocab_size, 2)
  injection = injections()['prefixes']
  assert_cached_decoding_is_forced(module, params, batch, injection)


def test_bfloat16_stays_near_float32(tiny, tiny_batch):
  module = tiny[0].clone(dtype=jnp.bfloat16, attention='dot_product')
  half = module.apply({'params': tiny[1]}, tiny_batch)
  assert half.dtype == jnp.float32
  assert_close(half, tiny[0].apply({'params': tiny[1]}, tiny_batch), 0.05)


@pytest.mark.parametrize('attention', ['dot_product', 'cudnn'])
def test_dropout_is_refused_where_there_is_none(attention):
  with pytest.raises(ValueError, match=f"'{attention}' knows no dropout.* DROPOUT_RATE is 0.1"):
    T5(TINY_CONFIG, attention=attention).clone(dropout_rate=0.1)


def test_an_unknown_way_is_answered_with_the_known():
  with pytest.raises(ValueError, match="ATTENTION is 'flash'.*'xla', 'dot_product', 'cudnn'"):
    T5(TINY_CONFIG, attention='flash')


def test_cudnn_is_refused_where_it_cannot_compute(tiny, tiny_batch, monkeypatch):
  with pytest.raises(ValueError, match="'cudnn' .* in bfloat16 on cpu. Set ATTENTION='xla'[.]"):
    load_backbone('nano', attention='cudnn', dtype='bfloat16')
  module = tiny[0].clone(attention='cudnn')
  with pytest.raises(ValueError, match='computes in float32 on cpu'):
    module.apply({'params': tiny[1]}, tiny_batch)
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  with pytest.raises(ValueError, match="computes in float32 on gpu.* or DTYPE='bfloat16'[.]"):
    load_backbone('nano', attention='cudnn', dtype='float32')
  assert load_backbone('nano', attention='cudnn').module.attention == 'cudnn'


def test_cudnn_is_given_t5_s_bias_and_no_scale_but_for_single_tokens(
    tiny, tiny_batch, monkeypatch
):
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  attend = jax.nn.dot_product_attention
  calls = []

  def recorded(query, key, value, *, bias, scale, implementation):
    calls.append((implementation, query.shape[1], bias.dtype.name, scale))
    assert bias.shape[2:] == (query.shape[1], key.shape[1])
    return attend(query, key, value, bias=bias, scale=scale, implementation='xla')

  monkeypatch.setattr(jax.nn, 'dot_product_attention', recorded)
  module = tiny[0].clone(attention='cudnn', dtype=jnp.bfloat16)
  logits = module.apply({'params': tiny[1]}, tiny_batch)
  assert_close(logits, tiny[0].apply({'params': tiny[1]}, tiny_batch), 0.05)
  assert {call[0] for call in calls} == {'cudnn'} and {call[1] for call in calls} == {7, 3}
  assert {call[2:] for call in calls} == {('bfloat16', 1.0)}
  calls.clear()
  encoded = jnp.ones((3, 7, TINY_CONFIG.d_model), jnp.bfloat16)
  cache = module.apply(
      {'params': tiny[1]}, encoded, tiny_batch.encoder_input_tokens, 3, method='init_cache'
  )
  token = tiny_batch.decoder_input_tokens[:, 0]
  module.apply({'params': tiny[1]}, token, cache, method='decode_step')
  assert {call[:2] for call in calls} == {('xla', 1)}
  # Nor are the tokens of an input's beams, which attend side by side, many queries.
  calls.clear()
  beam = Decoding(strategy='beam', num_beams=4, max_length=2)
  jax.block_until_ready(beam(module, tiny[1], tiny_batch.encoder_input_tokens, eos_id=1))
  assert {call[:2] for call in calls if call[0] == 'xla'} == {('xla', 1), ('xla', 4)}
  assert {call[1] for call in calls if call[0] == 'cudnn'} == {7}


def test_what_cudnn_does_not_take_is_named(tiny, tiny_batch, monkeypatch):
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')

  def refuse(*args, **kwargs):
    raise NotImplementedError('Unsupported sequence length Q 7, KV 7.')

  monkeypatch.setattr(jax.nn, 'dot_product_attention', refuse)
  module = tiny[0].clone(attention='cudnn', dtype=jnp.bfloat16)
  with pytest.raises(ValueError, match='from 7 positions to 7.*Q 7.*PROMPT_LENGTH'):
    module.apply({'params': tiny[1]}, tiny_batch)
