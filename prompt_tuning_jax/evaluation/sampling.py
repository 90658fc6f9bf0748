"""Decoding one token after the other: the likeliest, or one drawn at random."""

from __future__ import annotations

import functools

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from prompt_tuning_jax.evaluation.decoder import CachedDecoder, Decoded, check_counts
from prompt_tuning_jax.typing import Array, Injection, PyTree


def greedy(
    module: nn.Module,
    params: PyTree,
    encoder_input_tokens_BS: Array,
    injection: Injection | None = None,
    *,
    max_length: int,
    eos_id: int = 1,
    prompt_ids_B: Array | None = None,
) -> Decoded:
  """The most likely token at every step.

  T5X's default is another search: its `beam_search` with one beam also finishes with
  an end-of-sequence token that is only the second most likely.

  Args:
    module: the backbone's module.
    params: its weights.
    encoder_input_tokens_BS: inputs, virtual tokens included.
    injection: the prompt, or None.
    max_length: T, most tokens to decode, end-of-sequence included.
    eos_id: the token that ends a sequence.
    prompt_ids_B: which of several prompts a row has (`typing.Batch`).

  Returns:
    One sequence for each row (K = 1) with its log-probability.
  """
  return sample(
      module,
      params,
      encoder_input_tokens_BS,
      injection,
      keys_B=None,
      max_length=max_length,
      temperature=0.0,
      eos_id=eos_id,
      prompt_ids_B=prompt_ids_B,
  )


def check_sampling(temperature: float, top_k: int, top_p: float) -> None:
  """Raises ValueError unless a distribution can be sharpened and cut off like this."""
  if not temperature >= 0.0:
    raise ValueError(f'temperature={temperature} must not be negative.')
  if top_k < 0:
    raise ValueError(f'top_k={top_k} must not be negative; 0 switches it off.')
  if not 0.0 < top_p <= 1.0:
    raise ValueError(f'top_p={top_p} must lie in (0, 1]; 1 switches it off.')


def sample(
    module: nn.Module,
    params: PyTree,
    encoder_input_tokens_BS: Array,
    injection: Injection | None = None,
    *,
    keys_B: Array | None,
    max_length: int,
    num_samples: int = 1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos_id: int = 1,
    prompt_ids_B: Array | None = None,
) -> Decoded:
  """Random sequences from the model's distribution, sharpened or cut off.

  What a row samples depends on its own key alone, not on the rows beside it.

  Args:
    module: the backbone's module.
    params: its weights.
    encoder_input_tokens_BS: inputs, virtual tokens included.
    injection: the prompt, or None.
    keys_B: a random key (`jax.random.key`) for each row; not needed at temperature 0.
    max_length: T, most tokens to decode, end-of-sequence included.
    num_samples: K, sequences for each row.
    temperature: divides the logits; 0 is greedy decoding.
    top_k: choose among so many of the likeliest tokens; 0 switches it off.
    top_p: choose among the fewest tokens whose probabilities, at this temperature,
      reach this sum (Holtzman et al., 2020); 1 switches it off.
    eos_id: the token that ends a sequence.
    prompt_ids_B: which of several prompts a row has (`typing.Batch`).

  Returns:
    num_samples sequences for each row, in ascending order of their log-probability
    under the model itself (temperature 1, nothing cut off).

  Raises:
    ValueError: if a parameter is out of its range.
  """
  check_counts(max_length=max_length, num_samples=num_samples)
  check_sampling(temperature, top_k, top_p)
  if temperature > 0.0 and keys_B is None:
    raise ValueError(
        f'Sampling at temperature={temperature} needs keys_B, a random key for each row.'
    )
  return _sample(
      module,
      params,
      encoder_input_tokens_BS,
      injection,
      prompt_ids_B,
      None if temperature == 0.0 else keys_B,
      temperature,
      top_p,
      max_length=max_length,
      num_samples=num_samples,
      top_k=top_k,
      cut_top_p=top_p < 1.0,
      eos_id=eos_id,
  )


@flax.struct.dataclass
class _Samples:
  """The state of `_sample`; B counts rows × samples here."""

  index: Array  # tokens decoded so far
  token_B: Array  # the last one
  tokens_BT: Array
  scores_B: Array
  done_B: Array
  cache: PyTree


@functools.partial(
    jax.jit,
    static_argnums=0,
    static_argnames=('max_length', 'num_samples', 'top_k', 'cut_top_p', 'eos_id'),
)
def _sample(
    module: nn.Module,
    params: PyTree,
    inputs_BS: Array,
    injection: Injection | None,
    prompt_ids_B: Array | None,
    keys_B: Array | None,
    temperature: Array | float,
    top_p: Array | float,
    *,
    max_length: int,
    num_samples: int,
    top_k: int,
    cut_top_p: bool,
    eos_id: int,
) -> Decoded:
  """Samples, or takes the most likely token where there are no keys."""
  rows = inputs_BS.shape[0]
  decoder = CachedDecoder(module, params, inputs_BS, injection, prompt_ids_B)
  if keys_B is not None:
    keys_B = jax.vmap(lambda key: jax.random.split(key, num_samples))(keys_B).reshape(-1)

  def body(state: _Samples) -> _Samples:
    logits_BV, cache = decoder.step(state.token_B, state.cache)
    if keys_B is None:
      token_B = jnp.argmax(logits_BV, axis=-1)
    else:
      allowed_BV = _cut_off(logits_BV / temperature, top_k, top_p if cut_top_p else None)
      step_keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, state.index)
      token_B = jax.vmap(jax.random.categorical)(step_keys_B, allowed_BV)
    log_probs_BV = jax.nn.log_softmax(logits_BV)
    score_B = jnp.take_along_axis(log_probs_BV, token_B[:, None], axis=-1)[:, 0]
    token_B = jnp.where(state.done_B, 0, token_B).astype(jnp.int32)
    return _Samples(
        index=state.index + 1,
        token_B=token_B,
        tokens_BT=state.tokens_BT.at[:, state.index].set(token_B),
        scores_B=state.scores_B + jnp.where(state.done_B, 0.0, score_B),
        done_B=state.done_B | (token_B == eos_id),
        cache=cache,
    )

  def goes_on(state: _Samples) -> Array:
    return (state.index < max_length) & ~jnp.all(state.done_B)

  empty_B = ~jnp.any(inputs_BS > 0, axis=-1)
  count = rows * num_samples
  state = jax.lax.while_loop(
      goes_on,
      body,
      _Samples(
          index=jnp.zeros((), jnp.int32),
          token_B=jnp.zeros(count, jnp.int32),
          tokens_BT=jnp.zeros((count, max_length), jnp.int32),
          scores_B=jnp.zeros(count),
          done_B=jnp.repeat(empty_B, num_samples),
          cache=decoder.init_cache(max_length, num_samples),
      ),
  )
  tokens_BKT = state.tokens_BT.reshape(rows, num_samples, max_length)
  scores_BK = state.scores_B.reshape(rows, num_samples)
  order_BK = jnp.argsort(scores_BK, axis=-1)
  return Decoded(
      jnp.take_along_axis(tokens_BKT, order_BK[..., None], axis=1),
      jnp.take_along_axis(scores_BK, order_BK, axis=1),
  )


def _cut_off(logits_BV: Array, top_k: int, top_p: Array | None) -> Array:
  """Logits with -inf on the tokens that top-k and then top-p leave out."""
  if top_k:
    kept_BK, _ = jax.lax.top_k(logits_BV, min(top_k, logits_BV.shape[-1]))
    logits_BV = jnp.where(logits_BV < kept_BK[:, -1:], -jnp.inf, logits_BV)
  if top_p is not None:
    probs_BV = jax.nn.softmax(logits_BV)
    sorted_BV = -jnp.sort(-probs_BV, axis=-1)
    # A token stays if those before it do not reach top_p: the likeliest always does.
    before_BV = jnp.cumsum(sorted_BV, axis=-1) - sorted_BV
    least_B1 = jnp.min(
        jnp.where(before_BV < top_p, sorted_BV, 1.0), axis=-1, keepdims=True
    )
    logits_BV = jnp.where(probs_BV < least_B1, -jnp.inf, logits_BV)
  return logits_BV
