"""Several prompts as one Injection: where their rows lie, and what cannot be stacked."""

import jax
import numpy as np
import pytest

from prompt_tuning_jax.artifact import save_prompt
from prompt_tuning_jax.injection_stack import merge_prompt_axis, stack_injections
from prompt_tuning_jax.methods.prefix import Prefix
from prompt_tuning_jax.typing import BackboneSpec, Injection
from tests.conftest import TINY_CONFIG

SPEC = BackboneSpec(
    vocab_size=64, d_model=16, num_heads=3, d_kv=4, num_encoder_layers=2, num_decoder_layers=3
)


def rows(length, seed=0, width=16):
  return np.random.default_rng(seed).normal(size=(length, width)).astype(np.float32)


def pair(length=2, layers=3, seed=0):
  shape = (2, layers, length, 3, 4)
  return tuple(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def test_soft_prompts_are_filled_up_to_the_longest():
  stacked = stack_injections([Injection(rows(2)), None, Injection(rows(3, seed=1))])
  assert (stacked.num_prompts, stacked.num_virtual_tokens, stacked.prompt_stride) == (3, 3, 3)
  table = np.asarray(stacked.virtual_embeddings)
  np.testing.assert_array_equal(table[:2], rows(2))
  np.testing.assert_array_equal(table[2:6], 0)
  np.testing.assert_array_equal(table[6:], rows(3, seed=1))
  stacked.check(SPEC)
  assert '3 prompts' in str(stacked)


def test_the_decoder_s_own_rows_stay_last_in_every_prompt():
  prompts = [
      Injection(rows(3), num_decoder_virtual_tokens=2),
      Injection(rows(5, seed=1), num_decoder_virtual_tokens=2),
  ]
  stacked = stack_injections(prompts)
  assert (stacked.num_virtual_tokens, stacked.prompt_stride) == (3, 5)
  table = np.asarray(stacked.virtual_embeddings).reshape(2, 5, 16)
  np.testing.assert_array_equal(table[0, [0, 3, 4]], rows(3))
  np.testing.assert_array_equal(table[0, 1:3], 0)
  np.testing.assert_array_equal(table[1], rows(5, seed=1))
  ids = stacked.decoder_prompt(64, np.array([1, 0, 1]))
  np.testing.assert_array_equal(ids, [[72, 73], [67, 68], [72, 73]])


def test_prefixes_and_rows_before_every_layer_have_an_axis_of_prompts():
  prompts = [
      Injection(
          encoder_kv=pair(layers=2, seed=n), cross_kv=pair(seed=9 + n), positions='none'
      )
      for n in range(3)
  ]
  stacked = stack_injections(prompts)
  stacked.check(SPEC)
  assert stacked.positions == 'none'
  for number, prompt in enumerate(prompts):
    for name in ('encoder_kv', 'cross_kv'):
      for part, of_all in zip(getattr(prompt, name), getattr(stacked, name)):
        np.testing.assert_array_equal(of_all[:, number], part)
  layers = [np.stack([rows(n, seed=n), rows(n, seed=9 + n)]) for n in (2, 3)]
  stacked = stack_injections([Injection(layer_embeddings=of) for of in layers])
  stacked.check(SPEC)
  table = np.asarray(stacked.layer_embeddings)
  assert table.shape == (2, 6, 16)
  np.testing.assert_array_equal(table[:, :2], layers[0])
  np.testing.assert_array_equal(table[:, 3:], layers[1])


def test_parameters_with_an_axis_of_prompts_give_what_stacking_gives():
  method = Prefix(2, hidden=4)
  keys = jax.random.split(jax.random.key(0), 3)
  params = jax.vmap(lambda key: method.init(key, SPEC)['params'])(keys)
  together = merge_prompt_axis(jax.vmap(lambda p: method.apply({'params': p}, SPEC))(params))
  each = [
      method.apply({'params': jax.tree.map(lambda x, n=n: x[n], params)}, SPEC) for n in range(3)
  ]
  stacked = stack_injections(each)
  assert jax.tree.structure(together) == jax.tree.structure(stacked)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), together, stacked)
  alone = merge_prompt_axis(jax.tree.map(lambda x: x[None], each[1]))
  assert alone.num_prompts == 1
  jax.tree.map(np.testing.assert_array_equal, alone, each[1])
  with pytest.raises(ValueError, match='has 2, 3 prompts on the first axes'):
    merge_prompt_axis(Injection(rows(2), layer_embeddings=np.zeros((3, 2, 2, 16))))


def test_one_prompt_is_itself():
  prompt = Injection(rows(2))
  assert stack_injections([prompt]) is prompt
  assert stack_injections([None, None]).num_prompts == 2


@pytest.mark.parametrize(
    ('prompts', 'message'),
    [
        ([], 'no prompt to stack'),
        ([Injection(rows(2)), Injection(rows(2, width=8))], '0 and 1, .* in virtual_embeddings'),
        ([Injection(rows(2)), Injection(encoder_kv=pair())], 'of one kind'),
        ([Injection(encoder_kv=pair()), None], r'0 and 1, .* in encoder_kv'),
        ([Injection(encoder_kv=pair()), Injection(encoder_kv=pair(length=3))], 'in encoder_kv'),
        (
            [Injection(encoder_kv=pair()), Injection(encoder_kv=pair(), positions='none')],
            'in positions',
        ),
        (
            [Injection(rows(3)), Injection(rows(3), num_decoder_virtual_tokens=1)],
            'in num_decoder_virtual_tokens',
        ),
        ([Injection(rows(3), num_decoder_virtual_tokens=1), None], 'in virtual_embeddings, num_'),
        (
            [Injection(rows(2)), Injection(layer_embeddings=np.zeros((2, 2, 16)))],
            'in virtual_embeddings, layer_embeddings',
        ),
        ([Injection(rows(4), num_prompts=2), Injection(rows(2))], 'Prompt 0 .* 2 prompts already'),
    ],
)
def test_prompts_of_another_kind_are_refused(prompts, message):
  with pytest.raises(ValueError, match=message):
    stack_injections(prompts)


@pytest.mark.parametrize(
    ('injection', 'message'),
    [
        (Injection(rows(5), num_prompts=2), '5 rows, which do not divide among its 2 prompts'),
        (Injection(rows(4), num_prompts=0), 'num_prompts is 0'),
        (
            Injection(rows(4), num_prompts=2, num_decoder_virtual_tokens=3),
            'has 2 rows of each prompt',
        ),
        (
            Injection(rows(4, width=8), num_prompts=2),
            r'needs \[2 prompts × prompt length, d_model=16',
        ),
        (
            Injection(rows(4), layer_embeddings=np.zeros((2, 2, 16)), num_prompts=2),
            r'\[encoder layers=2, 2 prompts × prompt length=2',
        ),
        (Injection(decoder_kv=pair(), num_prompts=2), r'\[layers=3, prompts=2, prefix length'),
        (
            Injection(decoder_kv=(np.zeros((3, 3, 2, 3, 4)),) * 2, num_prompts=2),
            r'has shape \(3, 3, 2, 3, 4\)',
        ),
    ],
)
def test_several_prompts_that_do_not_fit_the_backbone_are_refused(injection, message):
  with pytest.raises(ValueError, match=message):
    injection.check(SPEC)


def test_a_file_holds_one_prompt(tmp_path):
  assert SPEC.d_model == TINY_CONFIG.d_model
  stacked = stack_injections([Injection(rows(2)), Injection(rows(2, seed=1))])
  with pytest.raises(ValueError, match='holds 2 prompts, and a file holds one'):
    save_prompt(tmp_path / 'p.safetensors', stacked)
