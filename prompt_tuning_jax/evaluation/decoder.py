"""What every way of decoding shares: the model with its cache, and the result."""

from __future__ import annotations

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from prompt_tuning_jax.typing import Array, Injection, PyTree


class Decoded(NamedTuple):
  """Decoded sequences, the best of each row last.

  Attributes:
    tokens_BKT: token ids, end-of-sequence included, then 0.
    scores_BK: log-probabilities; from beam search divided by the brevity penalty.
  """

  tokens_BKT: Array
  scores_BK: Array


class CachedDecoder:
  """The calls that decoding makes of a model, with what stays the same filled in."""

  def __init__(
      self,
      module: nn.Module,
      params: PyTree,
      inputs_BS: Array,
      injection: Injection | None,
  ):
    self._apply = functools.partial(module.apply, {'params': params})
    self._inputs_BS = inputs_BS
    self._injection = injection

  def init_cache(self, max_length: int, copies: int) -> PyTree:
    """A cache whose row b · copies + k belongs to sequence k of input b."""
    with jax.named_scope('encode'):
      encoded_BSD = self._apply(self._inputs_BS, self._injection, method='encode')
    cache = self._apply(
        encoded_BSD, self._inputs_BS, max_length, self._injection, method='init_cache'
    )
    # Axis 1 is the batch in every array of a cache; its index is a scalar.
    return jax.tree.map(
        lambda x: jnp.repeat(x, copies, axis=1) if x.ndim > 1 else x, cache
    )

  def step(self, token_B: Array, cache: PyTree) -> tuple[Array, PyTree]:
    """Logits [B, V] of the next token in float32, and the new cache."""
    logits_BV, cache = self._apply(token_B, cache, method='decode_step')
    return logits_BV.astype(jnp.float32), cache


def check_counts(**counts: int) -> None:
  """Raises ValueError unless every count, given by its name, is at least 1."""
  for name, count in counts.items():
    if count < 1:
      raise ValueError(f'{name}={count} must be at least 1.')
