"""Several methods as one, prompts in the decoder, and what is no method."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax.initializers import uniform
from prompt_tuning_jax.methods.combined import Combined, InDecoder, combine
from prompt_tuning_jax.methods.deep_prompt import DeepPrompt
from prompt_tuning_jax.methods.layer_prompt import LayerPrompt
from prompt_tuning_jax.methods.p_tuning import PTuning
from prompt_tuning_jax.methods.prefix import Prefix
from prompt_tuning_jax.methods.soft_prompt import SoftPrompt
from prompt_tuning_jax.typing import BackboneSpec, Injection

SPEC = BackboneSpec(64, 16, 3, 4, 2, 3)


def test_rows_of_the_encoder_come_first_whatever_the_order_of_the_methods():
  method = Combined([InDecoder(SoftPrompt(2)), SoftPrompt(3), InDecoder(PTuning(1))])
  params = method.init(jax.random.key(0), SPEC)['params']
  injection = method.apply({'params': params}, SPEC)
  assert (method.num_virtual_tokens, method.num_decoder_virtual_tokens) == (3, 3)
  assert (injection.num_virtual_tokens, injection.num_decoder_virtual_tokens) == (3, 3)
  rows = injection.virtual_embeddings
  np.testing.assert_array_equal(rows[:3], params['methods_1']['prompt'])
  np.testing.assert_array_equal(rows[3:5], params['methods_0']['prompt']['prompt'])
  np.testing.assert_array_equal(injection.decoder_prompt(64), [67, 68, 69])


def test_prefixes_of_a_site_lie_one_after_the_other():
  pieces = [Prefix(2, sites=('decoder',), hidden=None), DeepPrompt(3)]
  params = [piece.init(jax.random.key(i), SPEC) for i, piece in enumerate(pieces)]
  injections = [piece.apply(param, SPEC) for piece, param in zip(pieces, params)]
  both = combine(injections)
  for part in range(2):
    expected = np.concatenate([x.decoder_kv[part] for x in injections], axis=1)
    np.testing.assert_array_equal(both.decoder_kv[part], expected)
  np.testing.assert_array_equal(both.encoder_kv[0], injections[1].encoder_kv[0])
  assert both.cross_kv is None and both.virtual_embeddings is None


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda: Combined([SoftPrompt(2)]), 'two or more methods'),
        (lambda: Combined(), r'Combined.methods is \(\)'),
        (lambda: Combined(SoftPrompt(2)), 'it is a list of two or more methods'),
        (lambda: Combined(None), 'Combined.methods is None'),
        (lambda: Combined([SoftPrompt(2), Prefix]), r'methods\[1\] is .*with its parentheses'),
        (lambda: InDecoder(), 'InDecoder.prompt is None; a prompt method was expected'),
        (lambda: InDecoder(SoftPrompt), 'with its parentheses in gin'),
        (lambda: InDecoder(LayerPrompt(2)), 'InDecoder.prompt is LayerPrompt'),
        (lambda: InDecoder(InDecoder(SoftPrompt(2))), 'InDecoder.prompt is InDecoder'),
        (lambda: InDecoder(Prefix(2)), r"set Prefix.sites = \('decoder',\)"),
        (lambda: SoftPrompt(2, 'uniform'), "prompt_init is 'uniform'; an initialiser was"),
        (lambda: SoftPrompt(2, None), 'prompt_init is None; an initialiser was expected'),
        (lambda: SoftPrompt(True), 'PROMPT_LENGTH is True'),
        (lambda: Prefix(2, hidden=True), 'hidden is True'),
        (lambda: Prefix(2, sites=None), 'sites is None'),
        (lambda: Prefix(2, sites=[['encoder']]), r"sites is \[\['encoder'\]\]"),
        (lambda: DeepPrompt(2, dropout_rate='0.1'), "dropout_rate is '0.1'"),
        (lambda: DeepPrompt(2, dropout_rate=None), 'dropout_rate is None'),
        (lambda: Prefix(2, keys_values_init=uniform()), 'does not know of attention sites'),
    ],
)
def test_what_makes_no_method_is_refused_by_the_name_of_its_setting(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_prefixes_of_different_positions_and_rows_of_every_layer_do_not_combine():
  apart = Combined([Prefix(2, hidden=4), Prefix(2, hidden=4, positions='none')])
  with pytest.raises(ValueError, match='differ in positions .before and none.'):
    apart.init(jax.random.key(0), SPEC)
  with pytest.raises(ValueError, match='a prompt in every layer|A prompt in every layer'):
    Combined([SoftPrompt(2), LayerPrompt(2)]).init(jax.random.key(0), SPEC)


@pytest.mark.parametrize(
    'injection',
    [
        Injection(num_decoder_virtual_tokens=3),
        Injection(jnp.ones((2, 16)), num_decoder_virtual_tokens=3),
        Injection(layer_embeddings=jnp.ones((2, 4, 16)), num_decoder_virtual_tokens=1),
    ],
)
def test_rows_of_the_decoder_that_are_not_there_are_refused(injection):
  with pytest.raises(ValueError, match='num_decoder_virtual_tokens is'):
    injection.check(SPEC)
