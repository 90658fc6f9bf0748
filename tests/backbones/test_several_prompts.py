"""Rows of different prompts in one batch compute what each prompt computes alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from prompt_tuning_jax import partitioning
from prompt_tuning_jax.backbones.t5 import T5
from prompt_tuning_jax.data.packing import packed_batch
from prompt_tuning_jax.data.padding import make_batch
from prompt_tuning_jax.data.several_prompts import for_prompt, joined
from prompt_tuning_jax.evaluation.best_first import ChoiceTree, best_choices
from prompt_tuning_jax.evaluation.decoding import Decoding
from prompt_tuning_jax.evaluation.ranking import score_choices, score_targets
from prompt_tuning_jax.injection_stack import stack_injections
from prompt_tuning_jax.methods.combined import Combined, InDecoder
from prompt_tuning_jax.methods.deep_prompt import DeepPrompt
from prompt_tuning_jax.methods.layer_prompt import LayerPrompt
from prompt_tuning_jax.methods.p_tuning import PTuning
from prompt_tuning_jax.methods.prefix import Prefix
from prompt_tuning_jax.methods.soft_prompt import SoftPrompt
from prompt_tuning_jax.training.losses import cross_entropy
from prompt_tuning_jax.typing import Injection
from tests.conftest import TINY_CONFIG, assert_close

V = TINY_CONFIG.vocab_size
EXAMPLES = [
    {'inputs': [7, 9, 11, 30, 5, 1], 'targets': [33, 12, 1]},
    {'inputs': [8, 40, 1], 'targets': [1]},
    {'inputs': [50, 51, 52, 1], 'targets': [20, 1]},
]
CHOICES_CT = np.array([[33, 12, 1], [20, 1, 0], [9, 9, 1]], np.int32)


def all_at_once(length):
  return Combined(
      [SoftPrompt(length), Prefix(2, hidden=8), InDecoder(SoftPrompt(2)), DeepPrompt(2)]
  )


METHODS = {
    'soft prompts of different lengths': [SoftPrompt(4), SoftPrompt(2)],
    'deep prompts': [DeepPrompt(3)] * 2,
    'prefixes without positions': [Prefix(2, hidden=None, positions='none')] * 2,
    'P-tuning': [PTuning(4), PTuning(3, lstm_layers=0)],
    'prompts in every layer': [LayerPrompt(2), LayerPrompt(4)],
    'all together': [all_at_once(3), all_at_once(1)],
}
KINDS = pytest.mark.parametrize(
    'kind',
    # Where much is compiled, one of them stands for all among the quick tests.
    [
        pytest.param(name, marks=[] if name == 'all together' else pytest.mark.slow)
        for name in METHODS
    ],
)


@functools.cache
def prompts_of(kind):
  """The Injection of each method of a kind, from parameters of its own."""
  return [
      method.apply(method.init(jax.random.key(seed), T5(TINY_CONFIG).spec), T5(TINY_CONFIG).spec)
      for seed, method in enumerate(METHODS[kind])
  ]


def batch_of(prompt, examples=EXAMPLES):
  return make_batch(
      examples,
      input_length=6,
      target_length=3,
      vocab_size=V,
      num_virtual_tokens=prompt.num_virtual_tokens,
      num_decoder_virtual_tokens=prompt.num_decoder_virtual_tokens,
      encoder_width=11,
  )


def together(prompts, batches):
  """The prompts as one, and the batch of all their rows, those of different prompts mixed."""
  stacked = stack_injections(prompts)
  batch = joined([
      for_prompt(
          of_one,
          number,
          vocab_size=V,
          num_virtual_tokens=stacked.num_virtual_tokens,
          num_decoder_virtual_tokens=stacked.num_decoder_virtual_tokens,
          own_virtual_tokens=prompt.num_virtual_tokens,
      )
      for number, (prompt, of_one) in enumerate(zip(prompts, batches))
  ])
  order = np.random.default_rng(0).permutation(len(batch.prompt_ids))
  return stacked, jax.tree.map(lambda x: x[order], batch), np.argsort(order)


@functools.partial(jax.jit, static_argnums=0)
def _logits(module, params, batch, injection):
  return module.apply({'params': params}, batch, injection)


@functools.partial(jax.jit, static_argnums=0)
def _loss_and_grad(module, params, injection, batch):
  def loss(injection):
    logits = module.apply({'params': params}, batch, injection)
    loss_BT, _ = cross_entropy(logits, batch.decoder_target_tokens)
    return jnp.sum(loss_BT * batch.decoder_loss_weights)

  return jax.value_and_grad(loss)(injection)


@KINDS
def test_logits_of_a_mixed_batch_are_those_of_separate_runs(kind, tiny):
  prompts = prompts_of(kind)
  batches = [batch_of(prompt) for prompt in prompts]
  stacked, batch, back = together(prompts, batches)
  mixed = _logits(*tiny, batch, stacked)[back]
  alone = [_logits(*tiny, of_one, prompt) for of_one, prompt in zip(batches, prompts)]
  counted = np.concatenate([of_one.decoder_loss_weights > 0 for of_one in batches])
  assert_close(mixed[counted], np.concatenate(alone)[counted], 1e-5)
  assert np.abs(np.asarray(alone[0]) - np.asarray(alone[1])).max() > 1e-3


@KINDS
def test_each_prompt_gets_the_loss_and_the_gradient_of_its_own_rows(kind, tiny):
  prompts = prompts_of(kind)
  batches = [batch_of(prompt) for prompt in prompts]
  _, batch, _ = together(prompts, batches)

  @jax.jit
  def mixed(prompts):
    def loss(prompts):
      injection = stack_injections(prompts)
      logits = tiny[0].apply({'params': tiny[1]}, batch, injection)
      loss_BT, _ = cross_entropy(logits, batch.decoder_target_tokens)
      return jnp.sum(loss_BT * batch.decoder_loss_weights)

    return jax.value_and_grad(loss)(prompts)

  loss, gradients = mixed(prompts)
  alone = [_loss_and_grad(*tiny, prompt, of) for prompt, of in zip(prompts, batches)]
  assert_close(loss, sum(of_one for of_one, _ in alone), 1e-5)
  for gradient, (_, expected) in zip(gradients, alone, strict=True):
    jax.tree.map(lambda one, other: assert_close(one, other, 1e-5), gradient, expected)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


@KINDS
def test_choices_are_scored_as_in_separate_runs(kind, tiny):
  prompts = prompts_of(kind)
  batches = [batch_of(prompt) for prompt in prompts]
  stacked, batch, back = together(prompts, batches)
  inputs_BS = batch.encoder_input_tokens
  mixed = score_choices(*tiny, inputs_BS, CHOICES_CT, stacked, prompt_ids_B=batch.prompt_ids)
  alone = np.concatenate([
      score_choices(*tiny, of.encoder_input_tokens, CHOICES_CT, prompt)
      for of, prompt in zip(batches, prompts)
  ])
  assert_close(mixed[back], alone, 1e-5)
  best_B, scores_B = best_choices(
      *tiny, inputs_BS, ChoiceTree(CHOICES_CT), stacked, batch.prompt_ids
  )
  np.testing.assert_array_equal(best_B[back], alone.argmax(axis=1))
  assert_close(scores_B[back], alone.max(axis=1), 1e-5)
  targets = score_targets(*tiny, batch, stacked)[back]
  of_targets = [score_targets(*tiny, of, prompt) for of, prompt in zip(batches, prompts)]
  assert_close(targets, np.concatenate(of_targets), 1e-5)


@KINDS
@pytest.mark.parametrize(
    'decoding',
    [
        Decoding(max_length=3),
        pytest.param(
            Decoding(strategy='beam', max_length=3, num_beams=2), marks=pytest.mark.slow
        ),
        pytest.param(Decoding(strategy='sample', max_length=3, seed=4), marks=pytest.mark.slow),
    ],
    ids=['greedy', 'beam', 'sample'],
)
def test_what_is_decoded_is_what_separate_runs_decode(kind, decoding, tiny):
  prompts = prompts_of(kind)
  batches = [batch_of(prompt) for prompt in prompts]
  stacked, batch, back = together(prompts, batches)
  numbers = np.tile(np.arange(3), len(prompts))
  mixed = decoding(
      *tiny, batch.encoder_input_tokens, stacked,
      prompt_ids_B=batch.prompt_ids, numbers=numbers[np.argsort(back)],
  )  # fmt: skip
  alone = [
      decoding(*tiny, of.encoder_input_tokens, prompt) for of, prompt in zip(batches, prompts)
  ]
  tokens = np.concatenate([of.tokens_BKT for of in alone])
  np.testing.assert_array_equal(np.asarray(mixed.tokens_BKT)[back], tokens)
  scores = np.concatenate([of.scores_BK for of in alone])
  assert_close(np.asarray(mixed.scores_BK)[back], scores, 1e-5)


@pytest.mark.slow
def test_rows_before_every_layer_know_of_virtual_tokens_in_the_decoder(tiny):
  """By hand: no method has both, but an Injection may."""
  rng = np.random.default_rng(0)

  def prompt(length):
    rows = rng.normal(size=(length + 2, 16)).astype(np.float32)
    layers = rng.normal(size=(2, length, 16)).astype(np.float32)
    return Injection(rows, layer_embeddings=layers, num_decoder_virtual_tokens=2)

  prompts = [prompt(2), prompt(3)]
  batches = [batch_of(one) for one in prompts]
  stacked, batch, back = together(prompts, batches)
  mixed = _logits(*tiny, batch, stacked)[back]
  alone = [_logits(*tiny, of, one) for of, one in zip(batches, prompts)]
  counted = np.concatenate([of.decoder_loss_weights > 0 for of in batches])
  assert_close(mixed[counted], np.concatenate(alone)[counted], 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['soft prompts of different lengths', 'all together'])
def test_packed_rows_have_one_prompt_each(kind, tiny):
  prompts = prompts_of(kind)
  packed = [
      packed_batch(
          [EXAMPLES[:2], EXAMPLES[2:]],
          encoder_width=20,
          decoder_width=9,
          input_length=6,
          target_length=3,
          vocab_size=V,
          num_virtual_tokens=prompt.num_virtual_tokens,
          num_decoder_virtual_tokens=prompt.num_decoder_virtual_tokens,
      )
      for prompt in prompts
  ]
  stacked, batch, _ = together(prompts, packed)
  loss, gradient = _loss_and_grad(*tiny, stacked, batch)
  alone = [_loss_and_grad(*tiny, prompt, batch_of(prompt)) for prompt in prompts]
  assert_close(loss, sum(of_one for of_one, _ in alone), 1e-5)
  expected = stack_injections([of_one for _, of_one in alone])
  jax.tree.map(lambda one, other: assert_close(one, other, 2e-5), gradient, expected)


@pytest.mark.slow
def test_rows_stay_where_they_are_on_a_mesh(tiny):
  module, params = tiny
  mesh = partitioning.make_mesh()
  prompts = prompts_of('all together') * 2
  batches = [batch_of(prompt) for prompt in prompts]
  stacked, batch, _ = together(prompts, batches)
  expected = _loss_and_grad(module, params, stacked, batch)
  everywhere = NamedSharding(mesh, PartitionSpec())
  placed = jax.device_put((params, stacked), everywhere)
  with partitioning.on(mesh):
    lowered = _loss_and_grad.lower(module, *placed, partitioning.place_rows(batch, mesh))
    compiled = lowered.compile()
    actual = compiled(*placed, partitioning.place_rows(batch, mesh))
  # The loss, the tables and the prefixes' gradients are added up; no row goes elsewhere.
  text = compiled.as_text()
  for moved in ('all-gather', 'all-to-all', 'collective-permute'):
    assert f' {moved}(' not in text and f' {moved}-start(' not in text
  assert_close(actual[0], expected[0], 1e-5)
  jax.tree.map(lambda one, other: assert_close(one, other, 1e-5), actual[1], expected[1])


def test_the_program_of_one_prompt_does_not_change(tiny):
  """Ids of rows cost nothing where there is one prompt to name."""
  module, params = tiny
  prompt = prompts_of('all together')[0]
  batch = batch_of(prompt)
  ids = np.zeros(len(EXAMPLES), np.int32)
  texts = [
      jax.jit(lambda p, i, tokens: module.apply({'params': p}, of_rows.replace(
          encoder_input_tokens=tokens), i))
      .lower(params, prompt, batch.encoder_input_tokens).as_text()
      for of_rows in (batch, batch.replace(prompt_ids=ids))
  ]  # fmt: skip
  assert texts[0] == texts[1]


def test_rows_that_do_not_say_which_prompt_is_theirs_are_refused(tiny):
  prompts = prompts_of('deep prompts')
  batch = batch_of(prompts[0])
  stacked = stack_injections(prompts)
  with pytest.raises(ValueError, match='holds 2 prompts, but the batch does not say which'):
    _logits(*tiny, batch, stacked)
  with pytest.raises(ValueError, match='Batch.prompt_ids'):
    score_choices(*tiny, batch.encoder_input_tokens, CHOICES_CT, stacked)
