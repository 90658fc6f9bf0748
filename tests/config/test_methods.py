"""What the files of gin/methods build: the published methods with their optimisers."""

from __future__ import annotations

import optax
import pytest

from prompt_tuning_jax import config
from prompt_tuning_jax.methods.p_tuning import PTuning
from prompt_tuning_jax.training.description import describe
from prompt_tuning_jax.training.trainable import as_labelling


def _built(flags, *files, **macros):
  values = [f'{name}={value}' for name, value in macros.items()]
  return config.parse('train', files, [*flags, *values]).kwargs()


def _optimisers(kwargs):
  return describe(as_labelling(kwargs['trainable'], kwargs['method']))


@pytest.mark.parametrize(
    ('file', 'method'),
    [
        ('methods/p_tuning', PTuning(6)),
        ('methods/p_tuning_mlp', PTuning(6, lstm_layers=0)),
        ('methods/p_tuning_co_tuning', PTuning(6, lstm_width=1.0)),
    ],
)
def test_p_tuning_has_the_published_encoders(file, method, flags):
  assert _built(flags, file, PROMPT_LENGTH=6)['method'] == method


def test_a_template_gives_p_tuning_its_length(flags):
  flags = [*flags, 'PLACEMENT={3} {inputs} {2}', 'PROMPT_LENGTH=@slots_of()']
  assert _built(flags, 'methods/p_tuning')['method'].length == 5


def test_frozen_p_tuning_trains_the_prompt_as_published(flags):
  trained = _optimisers(_built(flags, 'methods/p_tuning'))
  assert set(trained) == {'prompt'}
  adam = trained['prompt']['adam']
  assert adam['weight_decay'] == 5e-4
  assert adam['learning_rate'] == describe(
      optax.exponential_decay(1e-5, 100, 0.98, staircase=True)
  )
  assert _optimisers(_built(flags, 'methods/p_tuning', LEARNING_RATE=1e-3))['prompt'] == {
      'adam': adam | {'learning_rate': 1e-3}
  }


def test_co_tuning_gives_prompt_and_model_learning_rates_of_their_own(flags):
  trained = _optimisers(_built(flags, 'methods/p_tuning_co_tuning'))
  rates = {label: described['adamw']['learning_rate'] for label, described in trained.items()}
  assert rates == {'prompt': 1e-4, 'backbone': 1e-5}
  assert {described['adamw']['clip_norm'] for described in trained.values()} == {1.0}
  trained = _optimisers(_built(flags, 'methods/p_tuning_co_tuning', LEARNING_RATE=3e-4))
  assert trained['prompt']['adamw']['learning_rate'] == 3e-4
  assert trained['backbone']['adamw']['learning_rate'] == 1e-5
