"""Prefixes in T5: keys and values before those of every layer, at every attention site."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax.backbones.t5 import T5
from prompt_tuning_jax.backbones.t5_stacks import REMAT_POLICIES
from prompt_tuning_jax.evaluation.decoding import greedy
from prompt_tuning_jax.evaluation.ranking import score_choices, sequence_scores
from prompt_tuning_jax.typing import KV_FIELDS, POSITIONS, Batch, Injection
from tests.backbones.test_t5 import assert_cached_decoding_is_forced
from tests.conftest import TINY_CONFIG, assert_close, prepend_virtual

ONE_LAYER = dataclasses.replace(TINY_CONFIG, num_encoder_layers=1, num_decoder_layers=1)
PER_LAYER = dataclasses.replace(TINY_CONFIG, relpos_per_layer=True)


@functools.partial(jax.jit, static_argnums=0, static_argnames='method')
def _apply(module, params, *args, method='__call__'):
  return module.apply({'params': params}, *args, method=method)


def make(config, seed=0):
  module = T5(config)
  return module, jax.jit(module.init_params)(jax.random.key(seed))


def prefix(config, sites=tuple(KV_FIELDS), length=2, positions='before', seed=5):
  """Random prefixes, of another length at each site."""
  rng = np.random.default_rng(seed)
  pairs = {}
  for more, site in enumerate(sites):
    layers = config.num_encoder_layers if site == 'encoder' else config.num_decoder_layers
    shape = (2, layers, length + more, config.num_heads, config.d_kv)
    pairs[KV_FIELDS[site]] = tuple(rng.normal(size=shape).astype(np.float32))
  return Injection(**pairs, positions=positions)


# An attention block written out, for one layer.


def _norm(x, scale):
  return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale


def _heads(x):
  return x.reshape(len(x), ONE_LAYER.num_heads, ONE_LAYER.d_kv)


def _attention(queries_TD, keys_values, prefix_kv, bias_NTK, weights):
  """One row's attention, the prefix before the other keys and values."""
  prefix_PNH, prefix_values_PNH = (part[0] for part in prefix_kv)
  keys = np.concatenate([prefix_PNH, keys_values[0]])
  values = np.concatenate([prefix_values_PNH, keys_values[1]])
  logits = np.einsum('TNH,KNH->NTK', _heads(queries_TD @ weights['query']), keys) + bias_NTK
  odds = np.exp(logits - logits.max(axis=-1, keepdims=True))
  mixed = np.einsum('NTK,KNH->TNH', odds / odds.sum(axis=-1, keepdims=True), values)
  return mixed.reshape(len(queries_TD), -1) @ weights['out']


def _mlp(x, layer):
  normed = _norm(x, layer['pre_mlp_layer_norm']['scale'][0])
  gate, linear, out = (layer['mlp'][name]['kernel'][0] for name in ('wi_0', 'wi_1', 'wo'))
  branch = normed @ gate
  gelu = 0.5 * branch * (1 + np.tanh(np.sqrt(2 / np.pi) * (branch + 0.044715 * branch**3)))
  return (gelu * (normed @ linear)) @ out


def _kernels(attention):
  return {name: np.float64(attention[name]['kernel'][0]) for name in attention}


def _own(x, weights):
  return _heads(x @ weights['key']), _heads(x @ weights['value'])


def _encoder_bias(table_NR, length, count, positions):
  """Small distances have a bucket each: d for keys before, 16 + d for keys behind."""
  bias = np.zeros((len(table_NR), length, count + length))
  for query in range(length):
    for key in range(-count, length):
      if key < 0 and positions == 'none':
        continue
      distance = query - key
      bucket = distance if distance >= 0 else 16 - distance
      bias[:, query, count + key] = table_NR[:, bucket]
  return bias


@pytest.mark.parametrize('positions', POSITIONS)
def test_a_prefix_in_the_encoder_is_what_the_equations_say(positions):
  module, params = make(ONE_LAYER)
  injection = prefix(ONE_LAYER, ['encoder'], positions=positions)
  tokens = np.array([7, 9, 33, 1], np.int32)
  actual = _apply(module, params, tokens[None], injection, method='encode')[0]

  params = jax.tree.map(np.float64, params)
  layer, table = params['encoder']['layers'], params['encoder']['relpos_bias']['rel_embedding']
  x = params['token_embedder']['embedding'][tokens]
  weights = _kernels(layer['attention'])
  normed = _norm(x, layer['pre_attention_layer_norm']['scale'][0])
  bias = _encoder_bias(table, 4, 2, positions)
  x = x + _attention(normed, _own(normed, weights), injection.encoder_kv, bias, weights)
  x = x + _mlp(x, layer)
  assert_close(actual, _norm(x, params['encoder']['encoder_norm']['scale']), 1e-5)


@pytest.mark.parametrize('positions', POSITIONS)
def test_a_prefix_in_cross_attention_is_what_the_equations_say(positions):
  module, params = make(ONE_LAYER)
  injection = prefix(ONE_LAYER, ['cross'], length=3, positions=positions)
  source = np.array([[7, 9, 1, 0, 0]], np.int32)  # Padding stays hidden beside a prefix.
  batch = Batch(source, np.array([[0]]), np.array([[12]]), np.ones((1, 1)))
  encoded = _apply(module, params, source, method='encode')
  actual = _apply(module, params, batch, injection)[0]

  params = jax.tree.map(np.float64, params)
  layer = params['decoder']['layers']
  x = params['token_embedder']['embedding'][[0]]
  # The one token attends to itself, whatever the bias.
  weights = _kernels(layer['self_attention'])
  normed = _norm(x, layer['pre_self_attention_layer_norm']['scale'][0])
  x = x + (normed @ weights['value']) @ weights['out']
  weights = _kernels(layer['encoder_decoder_attention'])
  normed = _norm(x, layer['pre_cross_attention_layer_norm']['scale'][0])
  own = _own(np.float64(encoded[0, :3]), weights)
  x = x + _attention(normed, own, injection.cross_kv, 0.0, weights)
  x = x + _mlp(x, layer)
  x = _norm(x, params['decoder']['decoder_norm']['scale'])
  assert_close(actual, x @ params['decoder']['logits_dense']['kernel'], 1e-5)


# A prefix of real tokens' keys and values acts like the tokens.


def test_a_decoder_prefix_of_what_it_has_written_is_having_written_it(tiny, tiny_batch):
  module, params = tiny
  said = np.array([0, 8, 21, 5], np.int32)
  goes_on = np.array([33, 12, 9, 1], np.int32)
  source = tiny_batch.encoder_input_tokens[:1]
  inputs = np.concatenate([said, goes_on])[None]
  targets = np.full_like(inputs, 3)  # Not padding; the logits do not depend on them.
  encoded = _apply(module, params, source, method='encode')
  whole = _apply(module, params, inputs, targets, encoded, source, method='decode')
  # The keys and values of the model's own pass over the words, given the same source.
  _, seen = module.apply(
      {'params': params},
      *(inputs[:, :4], targets[:, :4], encoded, source),
      method='decode',
      mutable='keys_values',
  )
  keys, values = seen['keys_values']['decoder']['layers']['self_attention']['own']
  injection = Injection(decoder_kv=(keys[:, 0], values[:, 0]), positions='before')
  rest = inputs[:, 4:], targets[:, 4:], encoded, source
  assert_close(_apply(module, params, *rest, injection, method='decode'), whole[:, 4:], 1e-5)
  without = injection.replace(positions='none')
  assert np.abs(_apply(module, params, *rest, without, method='decode') - whole[:, 4:]).max() > 1e-3


def test_a_cross_prefix_of_encoded_words_is_attending_to_them(tiny, tiny_batch):
  module, params = tiny
  source = tiny_batch.encoder_input_tokens[:1]
  encoded = _apply(module, params, source, method='encode')
  targets = tiny_batch.decoder_input_tokens[:1], tiny_batch.decoder_target_tokens[:1]
  whole = _apply(module, params, *targets, encoded, source, method='decode')
  _, (keys, values) = module.apply(
      {'params': params},
      encoded[:, :3],
      method=lambda module, x: module.decoder.layers.cross_keys_and_values(None, None, x, None),
  )
  injection = Injection(cross_kv=(keys[:, 0], values[:, 0]))
  rest = *targets, encoded[:, 3:], source[:, 3:], injection
  assert_close(_apply(module, params, *rest, method='decode'), whole, 1e-5)


def test_an_encoder_prefix_of_a_first_layer_s_words_is_reading_them():
  # In deeper layers the words would have seen the text, which a prefix has not.
  module, params = make(ONE_LAYER)
  words, text = np.array([[7, 9, 11]], np.int32), np.array([[30, 41, 5, 1]], np.int32)
  whole = _apply(module, params, np.concatenate([words, text], axis=1), method='encode')
  computed = module.keys_and_values(params, words[0])
  injection = Injection(encoder_kv=computed.encoder_kv)
  assert_close(_apply(module, params, text, injection, method='encode'), whole[:, 3:], 1e-5)


def test_keys_and_values_of_a_text_are_those_of_its_layers(tiny):
  module, params = tiny
  text = np.array([7, 9, 11, 1], np.int32)
  injection = module.keys_and_values(params, text)
  injection.check(module.spec)
  encoded = _apply(module, params, text[None], method='encode')
  kernels = params['decoder']['layers']['encoder_decoder_attention']
  for part, name in zip(injection.cross_kv, ('key', 'value')):
    expected = np.einsum('SD,LDQ->LSQ', encoded[0], kernels[name]['kernel'])
    assert_close(part, expected.reshape(part.shape), 1e-5)


# Laws that hold for every prefix.


@pytest.mark.parametrize('site', KV_FIELDS)
def test_every_site_of_a_prefix_changes_the_logits(site, tiny, tiny_batch):
  plain = _apply(*tiny, tiny_batch)
  counted = tiny_batch.decoder_loss_weights > 0
  changed = _apply(*tiny, tiny_batch, prefix(TINY_CONFIG, [site]))
  assert np.abs(changed - plain)[counted].min(axis=-1).max() > 1e-5


@pytest.mark.parametrize('positions', POSITIONS)
@pytest.mark.parametrize('config', [TINY_CONFIG, PER_LAYER], ids=['shared', 'bias per layer'])
def test_decoding_with_a_cache_equals_teacher_forcing(config, positions, tiny_batch):
  module, params = make(config, seed=2)
  injection = prefix(config, positions=positions)
  assert_cached_decoding_is_forced(module, params, tiny_batch, injection)


@pytest.mark.slow
@pytest.mark.parametrize('change', [*({'remat': r} for r in REMAT_POLICIES), {'unroll': True}])
def test_scan_and_remat_change_no_loss_and_no_gradient_of_a_prefix(tiny, tiny_batch, change):
  module, params = tiny

  def loss(injection, module):
    return jnp.sum(module.apply({'params': params}, tiny_batch, injection) ** 2)

  gradient_of = jax.jit(jax.value_and_grad(loss), static_argnums=1)
  injection = prefix(TINY_CONFIG)
  expected = gradient_of(injection, module)
  actual = gradient_of(injection, module.clone(**change))
  assert_close(actual[0], expected[0], 1e-6)
  jax.tree.map(lambda one, other: assert_close(one, other, 1e-5), actual[1], expected[1])
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(expected[1]))


@pytest.mark.parametrize('positions', POSITIONS)
def test_padding_changes_no_logit_of_a_real_token_behind_a_prefix(tiny, tiny_batch, positions):
  injection = prefix(TINY_CONFIG, positions=positions)
  padded = Batch(*(np.pad(x, ((0, 0), (0, 4))) for x in jax.tree.leaves(tiny_batch)))
  counted = tiny_batch.decoder_loss_weights > 0
  length = counted.shape[1]
  assert_close(
      _apply(*tiny, padded, injection)[:, :length][counted],
      _apply(*tiny, tiny_batch, injection)[counted],
      1e-6,
  )


def test_bias_per_layer_of_equal_tables_equals_a_shared_one_behind_a_prefix(tiny, tiny_batch):
  module, params = tiny
  per_layer = jax.tree.map(lambda x: x, params)
  for stack in ('encoder', 'decoder'):
    depth = per_layer[stack]['layers']['pre_mlp_layer_norm']['scale'].shape[0]
    table = per_layer[stack].pop('relpos_bias')['rel_embedding']
    per_layer[stack]['layers']['relpos_bias'] = {'rel_embedding': jnp.tile(table, (depth, 1, 1))}
  for positions in POSITIONS:
    injection = prefix(TINY_CONFIG, positions=positions)
    assert_close(
        _apply(T5(PER_LAYER), per_layer, tiny_batch, injection),
        _apply(module, params, tiny_batch, injection),
        1e-6,
    )


def test_a_soft_prompt_and_a_prefix_go_together(tiny, tiny_batch):
  rows = np.random.default_rng(0).normal(size=(3, 16)).astype(np.float32)
  batch = prepend_virtual(tiny_batch, TINY_CONFIG.vocab_size, 3)
  both = prefix(TINY_CONFIG).replace(virtual_embeddings=rows)
  logits = _apply(*tiny, batch, both)
  for part in (Injection(rows), prefix(TINY_CONFIG)):
    other = _apply(*tiny, batch if part.virtual_embeddings is not None else tiny_batch, part)
    assert np.abs(logits - other).max() > 1e-3


@pytest.mark.parametrize(
    ('shape', 'message'),
    [
        ((2, 2, 3, 4), r'layers=3, prefix length, heads=3, d_kv=4'),
        ((3, 2, 4, 4), r'shape \(3, 2, 4, 4\)'),
        ((3, 2, 3, 5), r'shape \(3, 2, 3, 5\)'),
        ((3, 0, 3, 4), r'shape \(3, 0, 3, 4\)'),
        ((3, 3, 4), r'shape \(3, 3, 4\)'),
    ],
)
def test_a_prefix_for_another_backbone_is_refused(shape, message, tiny, tiny_batch):
  keys = jnp.zeros(shape)
  with pytest.raises(ValueError, match=f'Injection.decoder_kv .*{message}'):
    _apply(*tiny, tiny_batch, Injection(decoder_kv=(keys, keys)))


def test_keys_without_as_many_values_and_unknown_positions_are_refused(tiny, tiny_batch):
  keys = jnp.zeros((3, 2, 3, 4))
  with pytest.raises(ValueError, match=r'for keys and \(3, 1, 3, 4\) for values'):
    _apply(*tiny, tiny_batch, Injection(cross_kv=(keys, keys[:, :1])))
  with pytest.raises(ValueError, match="positions is 'behind'; .* 'before' or 'none'"):
    _apply(*tiny, tiny_batch, Injection(cross_kv=(keys, keys), positions='behind'))


# Virtual tokens in the decoder.


def decoder_prompt(batch, ids):
  """The batch with ids before the decoder's start token."""
  prompt = np.tile(np.asarray(ids, np.int32), (len(batch.decoder_input_tokens), 1))
  inputs = np.concatenate([prompt, batch.decoder_input_tokens], axis=1)
  targets = np.concatenate([prompt * 0, batch.decoder_target_tokens], axis=1)
  return batch.replace(decoder_input_tokens=inputs, decoder_target_tokens=targets)


def test_virtual_tokens_in_the_decoder_made_of_words_act_like_the_words(tiny, tiny_batch):
  words = np.array([7, 9], np.int32)
  spoken = decoder_prompt(tiny_batch, words)
  # Words have targets of their own, or they are padding; the logits do not depend on which.
  targets = spoken.decoder_target_tokens.copy()
  targets[:, :2] = 3
  spoken = spoken.replace(decoder_target_tokens=targets)
  injected = decoder_prompt(tiny_batch, TINY_CONFIG.vocab_size + np.arange(2))
  injection = Injection(
      tiny[1]['token_embedder']['embedding'][words], num_decoder_virtual_tokens=2
  )
  counted = injected.decoder_target_tokens > 0
  assert_close(_apply(*tiny, injected, injection)[counted], _apply(*tiny, spoken)[counted], 1e-6)


@pytest.mark.parametrize('length', [1, 3])
def test_decoding_behind_a_prompt_in_the_decoder_equals_teacher_forcing(length, tiny, tiny_batch):
  rows = np.random.default_rng(0).normal(size=(5, 16)).astype(np.float32)
  injection = prefix(TINY_CONFIG).replace(
      virtual_embeddings=rows, num_decoder_virtual_tokens=3
  )
  batch = prepend_virtual(tiny_batch, TINY_CONFIG.vocab_size, 2)
  module, params = tiny
  found = greedy(module, params, batch.encoder_input_tokens, injection, max_length=length)
  # Nothing ends early: what it wrote is forced upon it again.
  targets = np.asarray(found.tokens_BKT)[:, 0]
  shifted = np.pad(targets[:, :-1], ((0, 0), (1, 0)))
  forced = decoder_prompt(
      batch.replace(decoder_input_tokens=shifted, decoder_target_tokens=targets),
      injection.decoder_prompt(TINY_CONFIG.vocab_size),
  )
  assert forced.decoder_input_tokens[0, :4].tolist() == [66, 67, 68, 0]
  logits = _apply(module, params, forced, injection)[:, 3:]
  np.testing.assert_array_equal(np.argmax(logits, axis=-1)[targets > 0], targets[targets > 0])
  scores = sequence_scores(logits, targets)
  assert_close(found.scores_BK[:, 0], scores, 1e-5)
  chosen = score_choices(module, params, batch.encoder_input_tokens, targets, injection)
  assert_close(np.diag(chosen), scores, 1e-5)
