"""Beam search, step for step as T5X does it."""

from __future__ import annotations

import functools

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from prompt_tuning_jax.evaluation.decoder import CachedDecoder, Decoded, check_counts
from prompt_tuning_jax.typing import Array, Injection, PyTree

# T5X's score of a beam that was never filled.
UNFILLED = -1.0e7


def check_beams(num_beams: int, alpha: float) -> None:
  """Raises ValueError unless there are beams, and their penalty grows with their length."""
  check_counts(num_beams=num_beams)
  if not alpha >= 0.0:
    raise ValueError(f'alpha={alpha} must not be negative; 0 switches the penalty off.')


def beam_search(
    module: nn.Module,
    params: PyTree,
    encoder_input_tokens_BS: Array,
    injection: Injection | None = None,
    *,
    max_length: int,
    num_beams: int = 4,
    alpha: float = 0.6,
    eos_id: int = 1,
    prompt_ids_B: Array | None = None,
) -> Decoded:
  """Beam search as T5X does it; with one beam, T5X's default decoder.

  At every step the 2K likeliest continuations of the K live beams are looked at:
  those that end are scored by log-probability / ((5 + length) / 6)^alpha (Wu et al.,
  2016) and compete for the K finished places, the best K of the others live on. A
  row is done when no live beam can beat its worst finished one.

  Args:
    module: the backbone's module.
    params: its weights.
    encoder_input_tokens_BS: inputs, virtual tokens included.
    injection: the prompt, or None.
    max_length: T, most tokens to decode, end-of-sequence included.
    num_beams: K.
    alpha: exponent of the brevity penalty; 0 switches it off.
    eos_id: the token that ends a sequence.
    prompt_ids_B: which of several prompts a row has (`typing.Batch`).

  Returns:
    The finished sequences of each row in ascending order of their score, unfilled
    places (score -1e7, all 0) first. A row without any finished sequence gives its
    live ones, with log-probabilities that are not penalised.

  Raises:
    ValueError: if a setting is out of its range.
  """
  check_counts(max_length=max_length)
  check_beams(num_beams, alpha)
  return _beam_search(
      module,
      params,
      encoder_input_tokens_BS,
      injection,
      prompt_ids_B,
      alpha,
      max_length=max_length,
      num_beams=num_beams,
      eos_id=eos_id,
  )


@flax.struct.dataclass
class _Beams:
  """The state of `_beam_search`; beams stand in ascending order of their score.

  Sequences begin with a 0, the token that starts decoding: [B, K, 1 + T].
  """

  index: Array  # tokens decoded so far
  live_scores_BK: Array  # log-probabilities
  live_tokens_BKT: Array
  finished_scores_BK: Array  # divided by the brevity penalty
  finished_tokens_BKT: Array
  is_finished_BK: Array  # False where a finished place was never filled
  cache: PyTree


@functools.partial(
    jax.jit, static_argnums=0, static_argnames=('max_length', 'num_beams', 'eos_id')
)
def _beam_search(
    module: nn.Module,
    params: PyTree,
    inputs_BS: Array,
    injection: Injection | None,
    prompt_ids_B: Array | None,
    alpha: Array | float,
    *,
    max_length: int,
    num_beams: int,
    eos_id: int,
) -> Decoded:
  B, K = inputs_BS.shape[0], num_beams
  decoder = CachedDecoder(module, params, inputs_BS, injection, prompt_ids_B)
  empty_B = ~jnp.any(inputs_BS > 0, axis=-1)

  def brevity(length: Array | int) -> Array:
    return ((5.0 + length) / 6.0) ** alpha

  def goes_on(state: _Beams) -> Array:
    # Log-probabilities only fall, and the penalty divides them by no more than this.
    best_live_B1 = state.live_scores_BK[:, -1:] / brevity(max_length + 1)
    worst_B1 = jnp.min(state.finished_scores_BK, axis=-1, keepdims=True)
    worst_BK = jnp.where(state.is_finished_BK, worst_B1, UNFILLED)
    done_B = jnp.all(worst_BK > best_live_B1, axis=-1) | empty_B
    return (state.index < max_length) & ~jnp.all(done_B)

  def body(state: _Beams) -> _Beams:
    last_BK = jax.lax.dynamic_index_in_dim(
        state.live_tokens_BKT, state.index, axis=2, keepdims=False
    )
    logits, cache = decoder.step(last_BK.reshape(B * K), state.cache)
    vocab_size = logits.shape[-1]
    log_probs_BKV = jax.nn.log_softmax(logits).reshape(B, K, vocab_size)
    log_probs_BKV = log_probs_BKV + state.live_scores_BK[..., None]

    # The best 2K: should K of them end, K others can still live on. J indexes them.
    scores_BJ, flat_BJ = jax.lax.top_k(log_probs_BKV.reshape(B, -1), 2 * K)
    beam_BJ, token_BJ = flat_BJ // vocab_size, flat_BJ % vocab_size
    tokens_BJT = _take(state.live_tokens_BKT, beam_BJ)
    tokens_BJT = tokens_BJT.at[:, :, state.index + 1].set(token_BJ.astype(jnp.int32))
    ends_BJ = token_BJ == eos_id

    new_live_BJ = scores_BJ + ends_BJ * UNFILLED
    live_BK = _best_last(new_live_BJ, K)
    source_BK = _take(beam_BJ, live_BK)

    finished_scores = jnp.concatenate(
        [
            state.finished_scores_BK,
            scores_BJ / brevity(state.index + 1) + ~ends_BJ * UNFILLED,
        ],
        axis=1,
    )
    finished_BK = _best_last(finished_scores, K)
    finished_tokens = jnp.concatenate([state.finished_tokens_BKT, tokens_BJT], axis=1)
    is_finished = jnp.concatenate([state.is_finished_BK, ends_BJ], axis=1)
    return _Beams(
        index=state.index + 1,
        live_scores_BK=_take(new_live_BJ, live_BK),
        live_tokens_BKT=_take(tokens_BJT, live_BK),
        finished_scores_BK=_take(finished_scores, finished_BK),
        finished_tokens_BKT=_take(finished_tokens, finished_BK),
        is_finished_BK=_take(is_finished, finished_BK),
        cache=_reorder(cache, source_BK),
    )

  tokens_BKT = jnp.zeros((B, K, 1 + max_length), jnp.int32)
  # At first all beams are equal, so that only one may count.
  live_scores_BK = jnp.full((B, K), UNFILLED).at[:, 0].set(0.0)
  state = jax.lax.while_loop(
      goes_on,
      body,
      _Beams(
          index=jnp.zeros((), jnp.int32),
          live_scores_BK=live_scores_BK,
          live_tokens_BKT=tokens_BKT,
          finished_scores_BK=jnp.full((B, K), UNFILLED),
          finished_tokens_BKT=tokens_BKT,
          is_finished_BK=jnp.zeros((B, K), bool),
          cache=decoder.init_cache(max_length, K),
      ),
  )
  any_B1 = jnp.any(state.is_finished_BK, axis=-1, keepdims=True)
  tokens_BKT = jnp.where(
      any_B1[..., None], state.finished_tokens_BKT, state.live_tokens_BKT
  )
  scores_BK = jnp.where(any_B1, state.finished_scores_BK, state.live_scores_BK)
  return Decoded(tokens_BKT[:, :, 1:], scores_BK)


def _best_last(scores_BJ: Array, count: int) -> Array:
  """Indices [B, count] of the best scores, ascending."""
  return jax.lax.top_k(scores_BJ, count)[1][:, ::-1]


def _take(x: Array, index_BK: Array) -> Array:
  """x[b, index[b, k]] for an array [B, J, …]."""
  return jnp.take_along_axis(x, index_BK.reshape(*index_BK.shape, *[1] * (x.ndim - 2)), 1)


def _reorder(cache: PyTree, source_BK: Array) -> PyTree:
  """Lets each live beam go on with the self-attention cache of the beam it extends.

  The encoder's keys and values are those of the row, whichever the beam, and stay.
  """
  B, K = source_BK.shape
  flat = (jnp.arange(B)[:, None] * K + source_BK).reshape(B * K)
  return cache.replace(
      self_keys=cache.self_keys[:, flat], self_values=cache.self_values[:, flat]
  )
