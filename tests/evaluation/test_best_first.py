"""The best of very many choices is the one that scoring all of them finds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax.evaluation import best_first, ranking
from prompt_tuning_jax.typing import Injection
from tests.conftest import TINY_CONFIG, random_batch

VOCAB_SIZE = TINY_CONFIG.vocab_size


def random_choices(count, longest, seed=0):
  """Different choices of unequal length, of few tokens, so that many begin alike."""
  rng = np.random.default_rng(seed)
  choices_CT = np.zeros((count, longest + 1), np.int32)
  for row in choices_CT:
    length = rng.integers(1, longest + 1)
    row[:length] = rng.integers(2, 12, length)
    row[length] = 1
  return np.unique(choices_CT, axis=0)


def sharpened(params, factor):
  """The model with logits of another scale: sure of itself, or sure of nothing."""
  return jax.tree_util.tree_map_with_path(
      lambda path, x: x * factor if 'logits' in jax.tree_util.keystr(path) else x, params
  )


@pytest.fixture(scope='module')
def inputs():
  return random_batch(VOCAB_SIZE, [7, 4, 5, 6, 3], [2] * 5).encoder_input_tokens


@pytest.mark.parametrize('factor', [0.0, 1.0, 30.0])
@pytest.mark.parametrize('longest', [1, 4])
def test_the_best_choice_and_its_score_are_those_of_scoring_all(tiny, inputs, factor, longest):
  module, params = tiny
  params = sharpened(params, factor)
  choices_CT = random_choices(150, longest)
  scores_BC = np.asarray(ranking.score_choices(module, params, inputs, choices_CT))
  tree = best_first.ChoiceTree(choices_CT)
  best_B, scores_B = best_first.best_choices(module, params, inputs, tree)
  np.testing.assert_allclose(scores_B, scores_BC.max(axis=-1), rtol=1e-5)
  if factor:
    np.testing.assert_array_equal(best_B, ranking.best_choice(scores_BC))
  np.testing.assert_allclose(scores_BC[np.arange(len(inputs)), best_B], scores_B, rtol=1e-5)


def test_virtual_tokens_of_the_input_and_the_decoder_count(tiny, inputs):
  module, params = tiny
  injection = Injection(
      virtual_embeddings=jax.random.normal(jax.random.key(1), (5, TINY_CONFIG.d_model)),
      num_decoder_virtual_tokens=2,
  )
  virtual = np.tile(VOCAB_SIZE + np.arange(3, dtype=np.int32), (len(inputs), 1))
  prompted = np.concatenate([virtual, inputs], axis=1)
  choices_CT = random_choices(80, 3)
  scores_BC = np.asarray(
      ranking.score_choices(module, params, prompted, choices_CT, injection)
  )
  best_B, scores_B = best_first.best_choices(
      module, params, prompted, best_first.ChoiceTree(choices_CT), injection
  )
  np.testing.assert_array_equal(best_B, ranking.best_choice(scores_BC))
  np.testing.assert_allclose(scores_B, scores_BC.max(axis=-1), rtol=1e-5)
  without = ranking.score_choices(module, params, prompted, choices_CT, injection.replace(
      virtual_embeddings=jnp.zeros_like(injection.virtual_embeddings)
  ))
  assert not np.allclose(scores_BC, without)


def test_of_equal_choices_the_first_is_named_and_padding_is_not_searched(tiny, inputs):
  choices_CT = np.array([[5, 6, 1], [7, 1, 0], [5, 6, 1], [7, 1, 0]], np.int32)
  padded = np.pad(inputs, ((0, 2), (0, 3)))
  best_B, scores_B = best_first.best_choices(*tiny, padded, best_first.ChoiceTree(choices_CT))
  expected_B, expected_scores_B = best_first.best_choices(
      *tiny, inputs, best_first.ChoiceTree(choices_CT[:2])
  )
  assert best_B.tolist() == [*expected_B.tolist(), 0, 0]
  np.testing.assert_allclose(scores_B, [*expected_scores_B, 0, 0], rtol=1e-5)


def test_a_sure_model_needs_few_passes(tiny, inputs, monkeypatch):
  module, params = tiny
  params = sharpened(params, 30.0)
  choices_CT = random_choices(2000, 4)
  passes = []
  original = best_first._next_log_probs
  monkeypatch.setattr(
      best_first, '_next_log_probs', lambda *args: passes.append(1) or original(*args)
  )
  best_first.best_choices(module, params, inputs, best_first.ChoiceTree(choices_CT))
  assert len(passes) <= 12
