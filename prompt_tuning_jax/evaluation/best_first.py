"""The likeliest of very many given texts, found without scoring them all.

Choices that begin alike share their first tokens, so together they are a tree, and a text's
log-probability is that of its beginning plus what its further tokens add, which is never
more than 0. A search that always goes on from the likeliest beginning therefore meets the
likeliest choice before any other: its answer is that of ranking all choices
(`ranking.score_choices`), for a few passes of the decoder instead of thousands.
"""

from __future__ import annotations

import functools
import heapq
from collections.abc import Iterator, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax import partitioning
from prompt_tuning_jax.evaluation import ranking
from prompt_tuning_jax.typing import Array, Injection, PyTree

# Beginnings that are looked at together for each input. More need fewer passes, and more
# of what they compute is for nothing.
_AT_ONCE = 8

# A beginning, and its negative score: the least is the likeliest.
_Start = tuple[float, tuple[int, ...]]


class ChoiceTree:
  """Choices as a tree: the tokens that may follow each beginning."""

  def __init__(self, choices_CT: np.ndarray):
    """Takes what `ranking.encode_choices` makes."""
    self._numbers: dict[tuple[int, ...], int] = {}
    following: dict[tuple[int, ...], set[int]] = {}
    for number, row in enumerate(choices_CT.tolist()):
      tokens = tuple(token for token in row if token)
      # Of equal choices the first counts, as in ranking.
      self._numbers.setdefault(tokens, number)
      for length in range(len(tokens)):
        following.setdefault(tokens[:length], set()).add(tokens[length])
    self._following = {start: np.array(sorted(found)) for start, found in following.items()}

  def number(self, tokens: tuple[int, ...]) -> int | None:
    """The number of the choice that the tokens are; None if they are only a beginning."""
    return self._numbers.get(tokens)

  def continued(self, start: _Start, log_probs_V: np.ndarray) -> Iterator[_Start]:
    """The beginnings that are longer by a token, likeliest first."""
    negative, tokens = start
    following = self._following[tokens]
    added = log_probs_V[following]
    for index in np.argsort(-added, kind='stable'):
      yield negative - float(added[index]), (*tokens, int(following[index]))


def best_choices(
    module: nn.Module,
    params: PyTree,
    encoder_input_tokens_BS: Array,
    tree: ChoiceTree,
    injection: Injection | None = None,
    prompt_ids_B: Array | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """The best choice for every input, and its score.

  Args:
    module: the backbone's module.
    params: its weights.
    encoder_input_tokens_BS: inputs, virtual tokens included. Where processes share it, each of
      them searches for all of its rows, so that they ask for the same passes.
    tree: the choices.
    injection: the prompt, or None.
    prompt_ids_B: which of several prompts a row has (`typing.Batch`).

  Returns:
    numbers [B] of the choices and their log-probabilities [B], natural logarithms. For a row
    of padding nothing is searched: it has choice 0 and the score 0.
  """
  inputs_BS = partitioning.whole(encoder_input_tokens_BS)
  encoded_BSD = _encode(module, params, encoder_input_tokens_BS, injection, prompt_ids_B)
  best_B, scores_B = np.zeros(len(inputs_BS), int), np.zeros(len(inputs_BS))
  searches = {row: _Search(tree) for row, tokens in enumerate(inputs_BS) if tokens.any()}
  while searches:
    chosen = {row: search.likeliest(_AT_ONCE) for row, search in searches.items()}
    log_probs_KBV = partitioning.whole(
        _next_log_probs(
            module,
            params,
            encoder_input_tokens_BS,
            encoded_BSD,
            *_padded(chosen, len(inputs_BS)),
            injection,
            prompt_ids_B,
        )
    )
    for row, starts in chosen.items():
      for k, start in enumerate(starts):
        searches[row].go_on(start, log_probs_KBV[k, row])
      if (found := searches[row].found()) is not None:
        best_B[row], scores_B[row] = found
        del searches[row]
  return best_B, scores_B


class _Search:
  """The beginnings that one input is yet to go on from, in the order of their scores.

  Of those that go on from the same one only the likeliest stands in the heap; it brings the
  next when it is taken.
  """

  def __init__(self, tree: ChoiceTree):
    self._tree = tree
    self._heap = [(0.0, (), iter(()))]

  def likeliest(self, count: int) -> list[_Start]:
    """Takes up to `count` beginnings, none of them less likely than a whole choice."""
    taken = []
    while len(taken) < count and self._heap and self.found() is None:
      negative, tokens, others = heapq.heappop(self._heap)
      taken.append((negative, tokens))
      self._push(others)
    return taken

  def go_on(self, start: _Start, log_probs_V: np.ndarray) -> None:
    """Puts back the beginnings that are longer by a token."""
    self._push(self._tree.continued(start, log_probs_V))

  def found(self) -> tuple[int, float] | None:
    """Number and score of the best choice, once it is sure to be the best."""
    negative, tokens, _ = self._heap[0]
    number = self._tree.number(tokens)
    return None if number is None else (number, -negative)

  def _push(self, starts: Iterator[_Start]) -> None:
    if start := next(starts, None):
      heapq.heappush(self._heap, (*start, starts))


def _padded(
    chosen: Mapping[int, list[_Start]], num_rows: int
) -> tuple[np.ndarray, np.ndarray]:
  """Beginnings as tokens [K, B, T], an arbitrary one behind each, and their lengths [K, B].

  K is 1 at first, where there is only the empty one.
  """
  starts = [(k, row, tokens) for row in chosen for k, (_, tokens) in enumerate(chosen[row])]
  count = _AT_ONCE if any(k for k, _, _ in starts) else 1
  longest = max(len(tokens) for _, _, tokens in starts)
  tokens_KBT = np.zeros((count, num_rows, longest + 1), np.int32)
  lengths_KB = np.zeros((count, num_rows), np.int32)
  # What stands behind a beginning is not seen by the position that predicts it.
  tokens_KBT[:, :, 0] = 1
  for k, row, tokens in starts:
    tokens_KBT[k, row, : len(tokens) + 1] = [*tokens, 1]
    lengths_KB[k, row] = len(tokens)
  return tokens_KBT, lengths_KB


@functools.partial(jax.jit, static_argnums=0)
def _encode(
    module: nn.Module,
    params: PyTree,
    inputs_BS: Array,
    injection: Injection | None,
    prompt_ids_B: Array | None,
) -> Array:
  return module.apply(
      {'params': params}, inputs_BS, injection, method='encode', prompt_ids_B=prompt_ids_B
  )


@functools.partial(jax.jit, static_argnums=0)
def _next_log_probs(
    module: nn.Module,
    params: PyTree,
    inputs_BS: Array,
    encoded_BSD: Array,
    tokens_KBT: Array,
    lengths_KB: Array,
    injection: Injection | None,
    prompt_ids_B: Array | None,
) -> Array:
  """Log-probabilities [K, B, V] of the token behind each of K beginnings of every row."""

  def of_one(tokens_BT: Array, lengths_B: Array) -> Array:
    logits_BTV = ranking.teacher_forced_logits(
        module, params, tokens_BT, encoded_BSD, inputs_BS, injection, prompt_ids_B
    )
    logits_BV = jnp.take_along_axis(logits_BTV, lengths_B[:, None, None], axis=1)[:, 0]
    return jax.nn.log_softmax(logits_BV.astype(jnp.float32))

  return jax.vmap(of_one)(tokens_KBT, lengths_KB)
