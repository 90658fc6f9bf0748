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
      prompt_ids_B: Array | None = None,
  ):
    self._apply = functools.partial(module.apply, {'params': params})
    self._module = module
    self._inputs_BS = inputs_BS
    self._injection = injection
    # A model of one prompt need not know of several.
    self._of_rows = {} if prompt_ids_B is None else {'prompt_ids_B': prompt_ids_B}

  def init_cache(self, max_length: int, copies: int) -> PyTree:
    """A cache whose row b · copies + k belongs to sequence k of input b.

    What the decoder reads of the encoder is there once for each input, whatever the copies.
    """
    with jax.named_scope('encode'):
      encoded_BSD = self._apply(
          self._inputs_BS, self._injection, method='encode', **self._of_rows
      )
    count = 0 if self._injection is None else self._injection.num_decoder_virtual_tokens
    cache = self._apply(
        encoded_BSD,
        self._inputs_BS,
        count + max_length,
        self._injection,
        method='init_cache',
        **self._of_rows,
    )
    if count:
      cache = self._after_decoder_prompt(cache)
    return cache.replace(
        self_keys=jnp.repeat(cache.self_keys, copies, axis=1),
        self_values=jnp.repeat(cache.self_values, copies, axis=1),
    )

  def _after_decoder_prompt(self, cache: PyTree) -> PyTree:
    """The cache once the decoder has read the virtual tokens before its start token."""

    def read(cache, token):
      tokens_B = jnp.broadcast_to(token, self._inputs_BS.shape[:1])
      _, cache = self._apply(tokens_B, cache, self._injection, method='decode_step')
      return cache, None

    with jax.named_scope('decoder_prompt'):
      prompt = self._injection.decoder_prompt(self._module.spec.vocab_size, **self._of_rows)
      return jax.lax.scan(read, cache, prompt.T)[0]

  def step(self, token_B: Array, cache: PyTree) -> tuple[Array, PyTree]:
    """Logits [B, V] of the next token in float32, and the new cache."""
    logits_BV, cache = self._apply(token_B, cache, method='decode_step')
    return logits_BV.astype(jnp.float32), cache


def check_counts(**counts: int) -> None:
  """Raises ValueError unless every count, given by its name, is at least 1."""
  for name, count in counts.items():
    if count < 1:
      raise ValueError(f'{name}={count} must be at least 1.')
