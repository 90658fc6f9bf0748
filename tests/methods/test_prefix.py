"""Prefix tuning: recorded values, the network behind a prefix, and where it starts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from prompt_tuning_jax import initializers, peft
from prompt_tuning_jax.checkpoints.load import load_backbone
from prompt_tuning_jax.methods.deep_prompt import DeepPrompt
from prompt_tuning_jax.methods.prefix import Prefix
from prompt_tuning_jax.prompt_files import load_prompt
from prompt_tuning_jax.training.losses import LossConfig
from prompt_tuning_jax.training.step import make_loss_fn
from prompt_tuning_jax.typing import KV_FIELDS, BackboneSpec
from tests.checkpoints import samples
from tests.conftest import assert_close

SPEC = BackboneSpec(64, 16, 3, 4, 2, 3)


@functools.partial(jax.jit, static_argnums=(0, 1))
def mean_loss_and_gradient(method, module, params, frozen, batch):
  """transformers' loss, the mean over all target tokens, and what it is differentiated by."""
  loss_fn = make_loss_fn(method, module, LossConfig(z_loss=0.0))
  weights = batch.decoder_loss_weights / jnp.sum(batch.decoder_loss_weights)

  def loss(params):
    return loss_fn({'prompt': params}, {'backbone': frozen}, batch, weights)[0]

  return jax.value_and_grad(loss)(params)


def by_peft_s_slots(columns, layers):
  """[…, 2L · N · H] in PEFT's order of slots as [2, L, …, N · H]: keys, then values."""
  slots = np.stack(np.split(columns, 2 * layers, axis=-1))
  return np.moveaxis(slots[peft._slots(layers)], 1, 0)


@pytest.mark.parametrize('adapter', ['t5v11.prefix5', 't5v11.prefix5_proj'])
def test_a_recorded_adapter_gives_peft_s_logits(golden, adapter):
  folder = golden / 'hf' / 'peft_t5' / adapter
  recorded = load_file(folder / 'io.safetensors')
  backbone = load_backbone(golden / 'hf' / 't5v11' / 'hf')
  logits = jax.jit(backbone.module.apply)(
      {'params': backbone.params}, samples.recorded_batch(recorded), load_prompt(folder).injection
  )
  predicted = recorded['labels'] >= 0
  assert_close(logits[predicted], recorded['logits'][predicted], 1e-5)


def test_free_keys_and_values_give_peft_s_loss_and_gradient(golden):
  recorded = load_file(golden / 'hf' / 'peft_t5' / 't5v11.prefix5' / 'io.safetensors')
  backbone = load_backbone(golden / 'hf' / 't5v11' / 'hf')
  method = Prefix(5, sites=('decoder',), hidden=None)
  shape = (2, 3, 5, 4, 16)
  params = by_peft_s_slots(recorded['param.embedding.weight'], 3).reshape(shape)
  batch = samples.recorded_batch(recorded)
  loss, gradient = mean_loss_and_gradient(
      method, backbone.module, {'decoder': params}, backbone.params, batch
  )
  assert_close(loss[None], recorded['loss'], 1e-5)
  expected = by_peft_s_slots(recorded['grad.embedding.weight'], 3).reshape(shape)
  assert_close(gradient['decoder'], expected, 1e-5)


def test_a_network_gives_peft_s_loss_and_the_gradient_of_every_parameter(golden):
  recorded = load_file(golden / 'hf' / 'peft_t5' / 't5v11.prefix5_proj' / 'io.safetensors')
  backbone = load_backbone(golden / 'hf' / 't5v11' / 'hf')
  method = Prefix(5, sites=('decoder',), hidden=48)

  def ours(kind):
    """PEFT's arrays of the network, its last layer's columns in our order."""

    def columns(array):
      pairs = by_peft_s_slots(array, 3)  # [2, L, …, N · H]
      return np.concatenate([pairs[part, i] for i in range(3) for part in range(2)], axis=-1)

    return {
        'embedding': recorded[f'{kind}.embedding.weight'],
        'into': {
            'kernel': recorded[f'{kind}.transform.0.weight'].T,
            'bias': recorded[f'{kind}.transform.0.bias'],
        },
        'out': {
            'kernel': columns(recorded[f'{kind}.transform.2.weight'].T),
            'bias': columns(recorded[f'{kind}.transform.2.bias']),
        },
    }

  params = {'decoder': ours('param')}
  # What the network makes of them is what PEFT saved.
  made = method.apply({'params': params}, backbone.spec).decoder_kv
  saved = load_prompt(golden / 'hf' / 'peft_t5' / 't5v11.prefix5_proj').injection.decoder_kv
  for one, other in zip(made, saved, strict=True):
    assert_close(one, other, 1e-5)
  loss, gradient = mean_loss_and_gradient(
      method, backbone.module, params, backbone.params, samples.recorded_batch(recorded)
  )
  assert_close(loss[None], recorded['loss'], 1e-5)
  jax.tree.map(
      lambda one, other: assert_close(one, other, 1e-5), gradient['decoder'], ours('grad')
  )


def test_the_network_has_the_published_shapes_and_starts_as_pytorch_does():
  method = Prefix(10, hidden=512)
  params = jax.jit(lambda key: method.init(key, SPEC)['params'])(jax.random.key(0))
  outputs = {'encoder': 2 * 2 * 12, 'decoder': 2 * 3 * 12, 'cross': 2 * 3 * 12}
  assert {
      site: (
          network['embedding'].shape,
          network['into']['kernel'].shape,
          network['out']['kernel'].shape,
          network['out']['bias'].shape,
      )
      for site, network in params.items()
  } == {site: ((10, 16), (16, 512), (512, n), (n,)) for site, n in outputs.items()}
  for layer, features in (('into', 16), ('out', 512)):
    for array in jax.tree.leaves(params['cross'][layer]):
      bound = features**-0.5
      assert np.abs(array).max() <= bound
      assert_close(np.std(array), bound / np.sqrt(3), 0.2)
  assert_close(np.std(params['encoder']['embedding']), 1.0, 0.2)
  # The three networks are independent.
  assert not np.array_equal(params['decoder']['embedding'], params['cross']['embedding'])
  assert method.num_virtual_tokens == 0


def test_the_network_s_output_is_a_layer_s_keys_then_its_values():
  method = Prefix(5, sites=('encoder',), hidden=7)
  params = method.init(jax.random.key(0), SPEC)['params']
  keys, values = method.apply({'params': params}, SPEC).encoder_kv
  network = jax.tree.map(np.float64, params['encoder'])
  hidden = np.tanh(
      network['embedding'] @ network['into']['kernel'] + network['into']['bias']
  )
  flat = hidden @ network['out']['kernel'] + network['out']['bias']
  for layer in range(2):
    for position in range(5):
      row = flat[position].reshape(2, 2, 3, 4)[layer]
      assert_close(keys[layer, position], row[0], 1e-5)
      assert_close(values[layer, position], row[1], 1e-5)


@pytest.mark.parametrize('hidden', [pytest.param(None, marks=pytest.mark.slow), 16])
def test_a_prefix_may_start_from_what_the_model_computes_for_words(hidden, backbone_dir):
  backbone = load_backbone(backbone_dir)
  words = 'the cat saw the dog'
  method = Prefix(
      7, hidden=hidden, keys_values_init=initializers.keys_values_of(words, backbone)
  )
  params = method.init(jax.random.key(0), backbone.spec)
  injection = method.apply(params, backbone.spec)
  tokens = backbone.vocabulary.encode(words)
  expected = backbone.module.keys_and_values(backbone.params, np.resize(tokens, 7))
  for field in KV_FIELDS.values():
    for one, other in zip(getattr(injection, field), getattr(expected, field), strict=True):
      assert_close(one, other, 1e-4, field)
  if hidden:
    # The network still is a random one: it was not made to forget its input.
    kernel = params['params']['cross']['out']['kernel']
    assert np.linalg.matrix_rank(kernel) > 7


def test_words_for_a_prefix_are_checked(backbone_dir):
  backbone = load_backbone(backbone_dir)
  init = initializers.keys_values_of('   ', backbone)
  with pytest.raises(ValueError, match='has no tokens .* PROMPT_TEXT'):
    Prefix(5, keys_values_init=init).init(jax.random.key(0), backbone.spec)
  init = initializers.keys_values_of('the cat', backbone)
  with pytest.raises(ValueError, match='Initialise from the backbone that the run uses'):
    Prefix(5, keys_values_init=init).init(jax.random.key(0), SPEC)


def test_dropout_hits_a_prefix_only_while_it_trains():
  method = DeepPrompt(50, dropout_rate=0.5)
  params = method.init(jax.random.key(0), SPEC)
  kept = method.apply(params, SPEC)
  np.testing.assert_array_equal(kept.encoder_kv[0], params['params']['encoder'][0])
  dropped = method.apply(params, SPEC, rngs={'dropout': jax.random.key(1)})
  for one, other in zip(jax.tree.leaves(dropped), jax.tree.leaves(kept), strict=True):
    is_zero = np.asarray(one == 0)
    assert 0.4 < is_zero.mean() < 0.6
    np.testing.assert_allclose(one[~is_zero], 2 * other[~is_zero], rtol=1e-6)
  assert method.has_dropout and not Prefix().has_dropout


def test_a_deep_prompt_is_free_keys_and_values_of_self_attention():
  params = DeepPrompt(4).init(jax.random.key(0), SPEC)['params']
  assert jax.tree.map(np.shape, params) == {
      'encoder': (2, 2, 4, 3, 4), 'decoder': (2, 3, 4, 3, 4)
  }
  injection = DeepPrompt(4).apply({'params': params}, SPEC)
  assert injection.cross_kv is None
  np.testing.assert_array_equal(injection.decoder_kv[1], params['decoder'][1])
  assert 'into' in DeepPrompt(4, hidden=8).init(jax.random.key(0), SPEC)['params']['encoder']


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'length': 0}, r'PROMPT_LENGTH is 0 \(Prefix.length\)'),
        ({'sites': ()}, r"Prefix.sites is \(\); .*'encoder', 'decoder', 'cross'"),
        ({'sites': ('encoder', 'encoder')}, 'each once'),
        ({'sites': ('encoder', 'croos')}, 'croos'),
        ({'positions': 'after'}, "positions is 'after'; .* 'before' or 'none'"),
        ({'hidden': 0}, 'hidden is 0; it is the width of a layer'),
        ({'dropout_rate': 1.0}, 'dropout_rate is 1.0'),
    ],
)
def test_settings_of_a_prefix_are_checked_when_it_is_made(changes, message):
  with pytest.raises(ValueError, match=message):
    Prefix(**changes)


def test_one_site_may_be_named_without_a_tuple():
  assert Prefix(sites='cross').sites == ('cross',)


def test_words_for_a_prefix_outlive_a_traced_program(backbone_dir):
  backbone = load_backbone(backbone_dir)
  init = initializers.keys_values_of('the cat', backbone)
  method = Prefix(3, hidden=None, keys_values_init=init)
  traced = jax.jit(lambda key: method.init(key, backbone.spec))(jax.random.key(0))
  eager = method.init(jax.random.key(0), backbone.spec)
  jax.tree.map(lambda one, other: assert_close(one, other, 1e-6), traced, eager)
