"""Descriptions tell runs apart, and are the same for the same run."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from prompt_tuning_jax import initializers
from prompt_tuning_jax.data.vocabulary import Vocabulary
from prompt_tuning_jax.methods.p_tuning import PTuning
from prompt_tuning_jax.methods.soft_prompt import SoftPrompt
from prompt_tuning_jax.training.description import describe, differences
from prompt_tuning_jax.training.optimizers import adafactor, adam, adamw, muon, warmup_linear
from tests.saved_backbone import VOCABULARY


def _own_schedule(version):
  """A user's function, and what it is after an edit."""
  if version == 0:

    def schedule(step):
      return 0.3 * 0.99**step
  elif version == 1:

    def schedule(step):
      return 0.3 * 0.98**step
  else:

    def schedule(step):
      return _RATE * 0.98**step

  return schedule


_RATE = 0.1


def _variants():
  """Makers of things that runs are made of; no two describe the same thing."""
  return [
      lambda: adafactor(0.3),
      lambda: adafactor(0.1),
      lambda: adafactor(warmup_linear(0.3, warmup_steps=5, train_steps=10)),
      lambda: adafactor(warmup_linear(0.3, warmup_steps=5, train_steps=20)),
      lambda: adamw(0.3, clip_norm=1.0),
      lambda: muon(0.3),
      lambda: optax.adam(0.3),
      lambda: optax.adam(0.1),
      lambda: optax.adam(optax.cosine_decay_schedule(0.1, 100)),
      lambda: optax.adam(optax.cosine_decay_schedule(0.1, 200)),
      lambda: optax.adam(optax.exponential_decay(0.1, 100, 0.98)),
      lambda: optax.adam(optax.exponential_decay(0.1, 100, 0.99)),
      lambda: adam(0.3),
      lambda: adam(0.3, weight_decay=0.1),
      lambda: optax.chain(optax.clip(1.0), adafactor(0.3)),
      lambda: optax.chain(optax.clip(1.0), adafactor(0.1)),
      lambda: optax.sgd(lambda step: 0.1),
      lambda: optax.sgd(lambda step: 0.2),
      lambda: optax.sgd(lambda step, rate=0.1: rate),
      lambda: optax.sgd(lambda step, rate=0.2: rate),
      lambda: optax.sgd(_own_schedule(0)),
      lambda: optax.sgd(_own_schedule(1)),
      lambda: optax.sgd(_own_schedule(2)),
      lambda: optax.MultiSteps(optax.sgd(0.1), 4),
      lambda: optax.MultiSteps(optax.sgd(0.1), 8),
      lambda: {'prompt': adafactor(0.3), 'backbone': adafactor(0.001)},
      lambda: SoftPrompt(20),
      lambda: SoftPrompt(20, initializers.uniform(0.1)),
      lambda: SoftPrompt(20, initializers.from_array(np.ones((20, 4)))),
      lambda: SoftPrompt(20, initializers.from_array(np.zeros((20, 4)))),
      lambda: SoftPrompt(20, jax.nn.initializers.zeros),
      lambda: SoftPrompt(20, functools.partial(jax.nn.initializers.zeros, dtype=jnp.float32)),
      lambda: PTuning(20),
      lambda: PTuning(20, lstm_width=1.0),
      lambda: PTuning(20, mlp_widths=(1.0, 1.0)),
      lambda: PTuning(20, embedding_init=jax.nn.initializers.normal(0.5)),
      lambda: Vocabulary(VOCABULARY, extra_ids=100),
      lambda: Vocabulary(VOCABULARY, extra_ids=50),
  ]


def test_equal_things_are_described_alike_and_others_are_not():
  texts = [json.dumps(describe(make())) for make in _variants()]
  assert texts == [json.dumps(describe(make())) for make in _variants()]
  assert len(set(texts)) == len(texts)
  for text in texts:
    assert ' at 0x' not in text


def test_our_optimisers_are_described_by_their_arguments():
  described = describe({'prompt': adafactor(warmup_linear(0.3, warmup_steps=5, train_steps=9))})
  assert described['prompt']['adafactor']['learning_rate'] == {
      'warmup_linear': {'peak': 0.3, 'warmup_steps': 5, 'train_steps': 9, 'end': 0.0}
  }
  assert described['prompt']['adafactor']['step_offset'] == 0


def test_a_thing_that_refers_to_itself_is_described():
  def schedule(step):
    return schedule(step - 1) if step else 0.0

  assert 'schedule' in json.dumps(describe(schedule))


@pytest.mark.parametrize(
    ('before', 'now', 'answer'),
    [
        ({'a': 1}, {'a': 1}, []),
        ({'a': {'b': [1, 2]}}, {'a': {'b': [1, 3]}}, ['a.b.1: 2 there, 3 here']),
        ({'a': {'b': 1}}, {'a': {}}, ['a: nothing there, {} here', 'a.b: 1 there, nothing here']),
        ({}, {'a': 'x'}, ["a: nothing there, 'x' here"]),
    ],
)
def test_differences_name_the_place(before, now, answer):
  assert differences(before, now) == answer
