"""The few widths to which the encoder's rows are padded, so that little is padding.

Every width is a compilation of the model more, so there are at most four. They are
multiples of 8 and chosen once, from the lengths of all examples. Only the encoder's
width varies: the decoder's is the feature length in every batch, for T5X's
NUM_TOTAL_TARGET_TOKENS divides the loss by it.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

LENGTHS = ('pad', 'bucket', 'pack')

# Widths are multiples of this: fused attention wants even lengths, lanes come in 8s.
_MULTIPLE = 8
_MOST_BUCKETS = 4
# A further bucket must make the average batch narrower by this share.
_WORTHWHILE = 0.02


def encoder_widths(
    longest: int,
    lengths: str,
    buckets: Sequence[int] | None,
    batch_widths: tuple[np.ndarray, np.ndarray],
    feature_lengths: Mapping[str, int],
    num_virtual_tokens: int,
) -> tuple[int, ...]:
  """The encoder widths that batches are padded to, ascending.

  Args:
    longest: tokens of the longest row, virtual ones included.
    lengths: 'pad' or 'bucket'.
    buckets: the user's choice of widths, if any.
    batch_widths: widths that batches need, and how often.
    feature_lengths: lengths of the features.
    num_virtual_tokens: P.

  Raises:
    ValueError: if `lengths` is not known or the longest row fits no bucket.
  """
  most = feature_lengths['inputs'] + num_virtual_tokens
  if lengths == 'pad':
    return (most,)
  if lengths != 'bucket':
    raise ValueError(f'lengths={lengths!r}; use one of {", ".join(LENGTHS)}.')
  if buckets is None:
    widths, weights = batch_widths
    return choose(np.minimum(round_up(widths), most), weights)
  if max(buckets) < longest:
    raise ValueError(
        f'buckets={tuple(buckets)}: the widest holds {max(buckets)} tokens, but the '
        f'longest row has {longest}, its {num_virtual_tokens} virtual tokens included. '
        f'Add a bucket of {longest} or more, or lower feature_lengths.'
    )
  return tuple(sorted(set(buckets)))


def narrowest(widths: Sequence[int], longest: int) -> int:
  """The first of the ascending widths that holds a row of `longest` tokens."""
  return widths[bisect.bisect_left(widths, longest)]


def random_batch_widths(
    row_widths: Sequence[np.ndarray], weights: Sequence[float], batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
  """Widths of random batches and their probabilities: each is that of its longest row.

  Args:
    row_widths: widths of the examples of each task.
    weights: share of each task in a batch, relative.
    batch_size: rows of a batch.
  """
  widths = np.concatenate(row_widths)
  weights = np.concatenate([
      np.full(len(of_task), weight / len(of_task))
      for of_task, weight in zip(row_widths, weights, strict=True)
  ])
  order = np.argsort(widths, kind='stable')
  up_to = np.cumsum(weights[order]) / weights.sum()
  return widths[order], np.diff(up_to**batch_size, prepend=0.0)


def choose(
    widths: np.ndarray, weights: np.ndarray, most: int = _MOST_BUCKETS
) -> tuple[int, ...]:
  """The few of the widths to which batches can be padded with the least padding.

  Dynamic programming over the ascending widths. A bucket more is a compilation more,
  so one is added only while it makes the average batch noticeably narrower.

  Args:
    widths: what batches need.
    weights: how often each of the widths is needed.
    most: how many may be chosen.
  """
  candidates, index = np.unique(widths, return_inverse=True)
  share = np.cumsum(np.bincount(index, weights)) / np.sum(weights)
  # cost[j]: average width of the batches that need at most candidates[j], with the
  # chosen buckets up to that one.
  cost = share * candidates
  chosen = [(int(width),) for width in candidates]
  best = chosen[-1]
  for _ in range(most - 1):
    lowest = cost[-1]
    # [i, j]: what the next bucket costs at j if the one before is at i.
    table = cost[:, None] + (share[None, :] - share[:, None]) * candidates[None, :]
    table[np.tril_indices_from(table)] = np.inf
    before = np.argmin(table, axis=0)
    cost = table[before, np.arange(len(candidates))]
    chosen = [(*chosen[i], int(width)) for i, width in zip(before, candidates)]
    if not cost[-1] < (1 - _WORTHWHILE) * lowest:
      break
    best = chosen[-1]
  return best


def round_up(length: Any, multiple: int = _MULTIPLE) -> Any:
  """The next multiple from `length` on."""
  return -(-length // multiple) * multiple
