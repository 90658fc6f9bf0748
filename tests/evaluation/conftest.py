"""Models for decoding: the recorded one with 32 tokens, and one without weights."""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax.backbones.t5 import T5
from prompt_tuning_jax.checkpoints import names
from prompt_tuning_jax.checkpoints.load import load_backbone
from prompt_tuning_jax.typing import Injection


@pytest.fixture(scope='session')
def mini32(golden):
  """The recorded T5 1.1 with a vocabulary of 32: (module, params)."""
  flat = dict(np.load(golden / 't5x' / 'mini32_params.npz'))
  config = names.config_from_shapes(flat)
  return T5(config), names.stack_from_t5x(flat, config)


@flax.struct.dataclass
class HistoryCache:
  """All that the model below needs to remember: the tokens so far, twice."""

  self_keys: jax.Array  # [1, B, T]
  self_values: jax.Array  # [1, B, T]
  index: jax.Array


class HistoryModel(nn.Module):
  """A decoder whose logits are arbitrary but fixed numbers for every history.

  It has no weights, so that every sequence can be scored by hand.
  """

  vocab_size: int = 4
  eos_bias: float = 0.0
  count_steps: bool = False

  calls = []  # one entry for each step of a `count_steps` model

  def encode(self, inputs_BS, injection=None):
    return jnp.zeros((*inputs_BS.shape, 1))

  def init_cache(self, encoded_BSD, inputs_BS, max_length, injection=None):
    empty = jnp.zeros((1, len(inputs_BS), max_length), jnp.int32)
    return HistoryCache(empty, empty, jnp.zeros((), jnp.int32))

  def decode_step(self, token_B, cache):
    if self.count_steps:
      jax.debug.callback(lambda: self.calls.append(1), ordered=True)
    keys = cache.self_keys.at[0, :, cache.index].set(token_B)
    values = cache.self_values.at[0, :, cache.index].set(token_B)
    weights_T = 1.0 + jnp.arange(keys.shape[-1])
    history_B = jnp.where(weights_T - 1 <= cache.index, keys[0] * weights_T, 0).sum(-1)
    history_B += 0.5 * values[0].sum(-1)
    logits_BV = 2.0 * jnp.sin(history_B[:, None] + 2.0 * jnp.arange(self.vocab_size))
    logits_BV = logits_BV.at[:, 1].add(self.eos_bias)
    return logits_BV, HistoryCache(keys, values, cache.index + 1)


def history_sequences(model, max_length):
  """Every sequence that `model` can decode, with its log-probability."""
  step = jax.jit(lambda token_B, cache: model.apply({}, token_B, cache, method='decode_step'))
  found = {}

  def extend(tokens, score, cache):
    last = jnp.array([tokens[-1] if tokens else 0])
    logits, cache = step(last, cache)
    for token, log_prob in enumerate(np.asarray(jax.nn.log_softmax(logits[0]))):
      longer = (*tokens, token)
      if token == 1 or len(longer) == max_length:
        found[longer] = score + float(log_prob)
      else:
        extend(longer, score + float(log_prob), cache)

  extend((), 0.0, model.apply({}, None, jnp.ones((1, 1)), max_length, method='init_cache'))
  return found


@pytest.fixture(scope='session')
def backbone(golden):
  """A random T5 1.1 with a vocabulary that reads text."""
  return load_backbone(
      golden / 'hf' / 't5v11' / 'hf',
      vocabulary=golden / 'hf' / 'tokenizer' / 'spiece.model',
  )


@pytest.fixture(scope='session')
def soft_prompt(backbone):
  """Five virtual tokens of the size of words."""
  shape = (5, backbone.spec.d_model)
  return Injection(jax.random.normal(jax.random.key(1), shape))
