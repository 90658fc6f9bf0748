"""Scores of given texts against T5X's `score_batch`, and what ranking promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax.backbones.t5 import T5
from prompt_tuning_jax.evaluation import ranking
from prompt_tuning_jax.typing import Batch, Injection
from tests.conftest import (
    MINI_CONFIG,
    assert_close,
    mini_params,
    prepend_virtual,
    recorded_batch,
)


class WordVocabulary:
  """One id for each word, as far as ranking needs a vocabulary."""

  eos_id = 1

  def encode(self, text):
    return [3 + len(word) for word in text.split()]


def score_targets(*args):
  return np.asarray(ranking.score_targets(*args))


def score_choices(*args, **kwargs):
  return np.asarray(ranking.score_choices(*args, **kwargs))


@pytest.fixture(scope='module')
def mini(golden):
  return T5(MINI_CONFIG), mini_params(golden)


@pytest.mark.parametrize('case', ['mini_P0_A', 'mini_P5_A', 'mini_P5_edge', 'mini_P5_long'])
def test_scores_of_targets_are_those_of_t5x(golden, mini, case):
  recorded = np.load(golden / 't5x' / f'forward_{case}.npz')
  batch, injection = recorded_batch(recorded), None
  if 'P5' in case:
    batch = prepend_virtual(batch, MINI_CONFIG.vocab_size, 5)
    injection = Injection(jnp.asarray(recorded['prompt']))
  scores = score_targets(*mini, batch, injection)
  assert_close(scores, recorded['score_batch'], 1e-5)


CHOICES = np.array([[9, 1, 0, 0], [8, 7, 1, 0], [9, 4, 6, 1], [8, 7, 1, 0]], np.int32)


@pytest.fixture(scope='module')
def inputs(golden):
  recorded = np.load(golden / 't5x' / 'forward_mini_P5_A.npz')
  batch = prepend_virtual(recorded_batch(recorded), MINI_CONFIG.vocab_size, 5)
  return batch.encoder_input_tokens, Injection(jnp.asarray(recorded['prompt']))


def test_each_choice_scores_as_a_teacher_forced_target(mini, inputs):
  tokens, injection = inputs
  scores = score_choices(*mini, tokens, CHOICES, injection)
  for column, choice in enumerate(CHOICES):
    targets = np.tile(choice, (len(tokens), 1))
    shifted = np.pad(targets[:, :-1], ((0, 0), (1, 0)))
    batch = Batch(tokens, shifted, targets, (targets > 0).astype(np.int32))
    np.testing.assert_allclose(
        scores[:, column], score_targets(*mini, batch, injection), rtol=1e-5
    )


def test_padding_of_inputs_and_choices_changes_no_score(mini, inputs):
  tokens, injection = inputs
  scores = score_choices(*mini, tokens, CHOICES, injection)
  wider = score_choices(
      *mini,
      np.pad(tokens, ((0, 2), (0, 5))),
      np.pad(CHOICES, ((0, 0), (0, 3))),
      injection,
  )
  np.testing.assert_allclose(wider[: len(tokens)], scores, rtol=1e-5)


def test_many_choices_score_as_they_do_alone(mini, inputs):
  tokens, injection = inputs
  rng = np.random.default_rng(0)
  many = np.concatenate([CHOICES, rng.integers(2, 200, (15, 4)).astype(np.int32)])
  assert len(many) > ranking._CHOICES_AT_ONCE
  scores = score_choices(*mini, tokens, many, injection)
  few = score_choices(*mini, tokens, CHOICES, injection)
  np.testing.assert_allclose(scores[:, :4], few, rtol=1e-5)


def test_the_encoder_runs_once_for_all_choices(mini, inputs):
  """By XLA's count: two more choices cost far less than another encoder pass."""
  tokens, injection = inputs
  module, params = mini
  module = module.clone(unroll=True)  # A loop over layers would be counted as one.

  def flops(choices):
    lowered = ranking.score_choices.lower(module, params, tokens, choices, injection)
    return lowered.cost_analysis()['flops']

  encode = jax.jit(lambda p, x: module.apply({'params': p}, x, injection, method='encode'))
  encoder = encode.lower(params, tokens).cost_analysis()['flops']
  one, three = flops(CHOICES[:1]), flops(CHOICES[:3])
  assert one > encoder
  assert (three - one) / 2 < one - 0.9 * encoder


def test_normalising_divides_by_the_tokens_of_each_choice(mini, inputs):
  tokens, injection = inputs
  scores = score_choices(*mini, tokens, CHOICES, injection)
  means = score_choices(
      *mini, tokens, CHOICES, injection, normalize_by_length=True
  )
  np.testing.assert_allclose(means, scores / np.array([2, 3, 4, 3]), rtol=1e-6)


def test_equal_scores_go_to_the_lower_index(mini, inputs):
  tokens, injection = inputs
  scores = score_choices(*mini, tokens, CHOICES, injection)
  np.testing.assert_array_equal(scores[:, 1], scores[:, 3])
  best = ranking.best_choice(scores)
  assert best.shape == (len(tokens),) and 3 not in best
  assert ranking.best_choice(np.array([[-1.0, -1.0], [-2.0, -1.0]])).tolist() == [0, 1]


def test_choices_are_encoded_with_their_end_and_padded():
  choices = ranking.encode_choices(['a', 'bb ccc'], WordVocabulary())
  np.testing.assert_array_equal(choices, [[4, 1, 0], [5, 6, 1]])


def test_no_choices_empty_choices_and_a_bare_text_are_refused():
  vocabulary = WordVocabulary()
  with pytest.raises(ValueError, match='no choices to rank'):
    ranking.encode_choices([], vocabulary)
  with pytest.raises(ValueError, match="choice ' ' has no tokens.*Choices: 'a', ' '"):
    ranking.encode_choices(['a', ' '], vocabulary)
  with pytest.raises(ValueError, match="choices is the one text 'yes'"):
    ranking.encode_choices('yes', vocabulary)


def test_scoring_compiles_once_for_each_shape(mini, inputs):
  tokens, injection = inputs
  score_choices(*mini, tokens, CHOICES, injection)
  compiled = ranking.score_choices._cache_size()
  other = jax.tree.map(lambda x: x + 1.0, injection)
  score_choices(*mini, tokens[::-1], CHOICES[::-1], other)
  assert ranking.score_choices._cache_size() == compiled
