"""Producing text token by token: greedy, beam search and sampling, with a KV cache.

All three take a backbone's module, its weights and encoder inputs, run as one
program (`jax.lax.while_loop`, compiled once for each module and shape) that stops
when every row is done, and return `Decoded`.

Rows whose encoder input is all padding (the rows that fill up a last batch) never
keep the loop going; what is decoded for them means nothing.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax.typing import Array, Injection, PyTree

# T5X's score of a beam that was never filled.
UNFILLED = -1.0e7

STRATEGIES = ('greedy', 'beam', 'sample')


class Decoded(NamedTuple):
  """Decoded sequences, the best of each row last.

  Attributes:
    tokens_BKT: token ids, end-of-sequence included, then 0.
    scores_BK: log-probabilities; from beam search divided by the brevity penalty.
  """

  tokens_BKT: Array
  scores_BK: Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding:
  """How text is to be decoded: a strategy and its settings.

  Attributes:
    strategy: 'greedy', 'beam' or 'sample'. T5X's default is 'beam' with num_beams=1.
    max_length: most tokens of an answer, end-of-sequence included.
    num_beams: of 'beam'.
    alpha: of 'beam', exponent of the brevity penalty.
    temperature, top_k, top_p: of 'sample', see `sample`.
    seed: of 'sample'; with it and its number, a row's answer is determined.
  """

  strategy: str = 'greedy'
  max_length: int = 64
  num_beams: int = 4
  alpha: float = 0.6
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  seed: int = 0

  def __post_init__(self):
    if self.strategy not in STRATEGIES:
      near = difflib.get_close_matches(str(self.strategy), STRATEGIES, n=1)
      hint = f' Did you mean {near[0]!r}?' if near else ''
      raise ValueError(
          f'No decoding strategy {self.strategy!r}.{hint} There are '
          f'{", ".join(map(repr, STRATEGIES))}.'
      )

  def __call__(
      self,
      module: nn.Module,
      params: PyTree,
      encoder_input_tokens_BS: Array,
      injection: Injection | None = None,
      *,
      eos_id: int = 1,
      numbers: Sequence[int] | None = None,
  ) -> Decoded:
    """Decodes a batch.

    Args:
      module: the backbone's module.
      params: its weights.
      encoder_input_tokens_BS: inputs, virtual tokens included.
      injection: the prompt, or None.
      eos_id: the token that ends a sequence.
      numbers: of 'sample', the number of each row among all inputs, which with the
        seed gives its randomness; default 0, 1, …
    """
    arguments = (module, params, encoder_input_tokens_BS, injection)
    common = dict(max_length=self.max_length, eos_id=eos_id)
    if self.strategy == 'greedy':
      return greedy(*arguments, **common)
    if self.strategy == 'beam':
      return beam_search(
          *arguments, num_beams=self.num_beams, alpha=self.alpha, **common
      )
    if numbers is None:
      numbers = range(len(encoder_input_tokens_BS))
    # Rows that fill up a batch have no number; what they sample means nothing.
    numbers_B = np.zeros(len(encoder_input_tokens_BS), np.uint32)
    numbers_B[: len(numbers)] = numbers
    return sample(
        *arguments,
        keys_B=jax.vmap(jax.random.fold_in, (None, 0))(
            jax.random.key(self.seed), numbers_B
        ),
        temperature=self.temperature,
        top_k=self.top_k,
        top_p=self.top_p,
        **common,
    )


def greedy(
    module: nn.Module,
    params: PyTree,
    encoder_input_tokens_BS: Array,
    injection: Injection | None = None,
    *,
    max_length: int,
    eos_id: int = 1,
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
  )


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

  Returns:
    num_samples sequences for each row, in ascending order of their log-probability
    under the model itself (temperature 1, nothing cut off).

  Raises:
    ValueError: if a parameter is out of its range.
  """
  _check_counts(max_length=max_length, num_samples=num_samples)
  if temperature < 0.0:
    raise ValueError(f'temperature={temperature} must not be negative.')
  if top_k < 0:
    raise ValueError(f'top_k={top_k} must not be negative; 0 switches it off.')
  if not 0.0 < top_p <= 1.0:
    raise ValueError(f'top_p={top_p} must lie in (0, 1]; 1 switches it off.')
  if temperature > 0.0 and keys_B is None:
    raise ValueError(
        f'Sampling at temperature={temperature} needs keys_B, a random key for each row.'
    )
  return _sample(
      module,
      params,
      encoder_input_tokens_BS,
      injection,
      None if temperature == 0.0 else keys_B,
      temperature,
      top_p,
      max_length=max_length,
      num_samples=num_samples,
      top_k=top_k,
      cut_top_p=top_p < 1.0,
      eos_id=eos_id,
  )


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

  Returns:
    The finished sequences of each row in ascending order of their score, unfilled
    places (score -1e7, all 0) first. A row without any finished sequence gives its
    live ones, with log-probabilities that are not penalised.
  """
  _check_counts(max_length=max_length, num_beams=num_beams)
  return _beam_search(
      module,
      params,
      encoder_input_tokens_BS,
      injection,
      alpha,
      max_length=max_length,
      num_beams=num_beams,
      eos_id=eos_id,
  )


def _check_counts(**counts: int) -> None:
  for name, count in counts.items():
    if count < 1:
      raise ValueError(f'{name}={count} must be at least 1.')


class _Decoder:
  """The calls that decoding makes of a model, with what stays the same filled in."""

  def __init__(self, module, params, inputs_BS, injection):
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
  decoder = _Decoder(module, params, inputs_BS, injection)
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
    alpha: Array | float,
    *,
    max_length: int,
    num_beams: int,
    eos_id: int,
) -> Decoded:
  B, K = inputs_BS.shape[0], num_beams
  decoder = _Decoder(module, params, inputs_BS, injection)
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
