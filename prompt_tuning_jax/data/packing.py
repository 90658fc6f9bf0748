"""Several examples in one row, so that little of a batch is padding.

A packed batch holds the same examples as a padded one, laid into fewer rows of one width by
first-fit, the longest first. Each example is a *segment* (`typing.Batch`): it has virtual
tokens, a start token and positions of its own and sees no other, so that loss and gradient
are those of the padded batch, up to rounding. Only what T5's dropout drops differs: one mask
serves all positions of a row, and so all of its examples.

Each number of rows is a compilation of the model more. Batches are therefore filled with empty
rows up to one of a few numbers, chosen once from the batches of the first steps; both widths
are the same in every batch.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from prompt_tuning_jax.data import buckets
from prompt_tuning_jax.data.padding import check_ids, decoder_prompt, example_tokens
from prompt_tuning_jax.data.virtual_tokens import Placement, as_placement
from prompt_tuning_jax.typing import Batch

# Batches from which the shapes are chosen: enough that hardly a later one needs more rows.
_SAMPLED_STEPS = 250
_SAMPLED_EXAMPLES = 2**14
# Widths of the decoder that are tried on them, and of the encoder on the first few.
_DECODER_WIDTHS = 5
_WIDTHS = 8
_FIRST_STEPS = 25
# Tokens of a row at which attention costs as much as all else of a layer. By its FLOPs that is
# 3,000 for T5 1.1 small and 24,000 for XXL; its products are less efficient than the others.
_COSTLY_WIDTH = 2500
# Besides one for a batch that needs a little more than those, and one for any batch.
_MOST_CHOSEN = 6


def packed_widths(
    packed_length: int | None, longest: int, feature_lengths: Mapping[str, int], num_virtual: int
) -> list[int]:
  """The encoder's widths that packed rows may have, ascending.

  Args:
    packed_length: the user's choice; None takes widths from what the longest example needs to
      twice what the longest allowed one would.
    longest: tokens of the longest example there is, virtual ones included.
    feature_lengths: lengths of the features.
    num_virtual: P.

  Raises:
    ValueError: if the longest example does not fit.
  """
  if packed_length is None:
    least, most = longest, 2 * buckets.round_up(feature_lengths['inputs'] + num_virtual)
    return sorted({int(buckets.round_up(math.ceil(n))) for n in np.geomspace(least, most, _WIDTHS)})
  if packed_length < longest:
    raise ValueError(
        f'PACKED_LENGTH={packed_length} (packed_length), but the longest example has {longest} '
        f'tokens, its {num_virtual} virtual tokens included. Set it to {longest} or more, leave '
        "it None, or lower 'inputs' in TASK_FEATURE_LENGTHS."
    )
  return [packed_length]


@dataclasses.dataclass(frozen=True)
class Packing:
  """The shapes of a run's packed batches.

  Attributes:
    width: S, the encoder's width of a row.
    decoder_width: T, the decoder's width of a row.
    row_counts: numbers of rows that may occur, ascending; the last holds any batch.
  """

  width: int
  decoder_width: int
  row_counts: tuple[int, ...]

  @classmethod
  def choose(
      cls,
      batches: Iterable[tuple[np.ndarray, np.ndarray]],
      *,
      widths: Sequence[int],
      longest: int,
      longest_target: int,
      batch_size: int,
      multiple: int,
  ) -> Packing:
    """Chooses the widths and the numbers of rows from what batches need.

    Args:
      batches: tokens of each example of the first batches, for encoder and decoder; no more
        of them are read than are needed.
      widths: what the encoder's width may be, ascending; it is less where no batch fills a
        row.
      longest: tokens of the longest example for the encoder.
      longest_target: tokens of the longest example for the decoder.
      batch_size: examples of a batch.
      multiple: what divides every number of rows.
    """
    steps = max(1, min(_SAMPLED_STEPS, _SAMPLED_EXAMPLES // batch_size))
    sampled = list(itertools.islice(batches, steps))
    fullest = max(int(needed.sum()) for needed, _ in sampled)
    fullest = int(buckets.round_up(max(fullest, longest)))
    unbounded = sum(int(targets.sum()) for _, targets in sampled)
    width = min(
        sorted({min(width, fullest) for width in widths}),
        key=lambda n: _rows(sampled[:_FIRST_STEPS], n, unbounded, multiple) * _row_cost(n),
    )

    def rows_of(decoder_width: int) -> list[list[list[int]]]:
      return [first_fit(*needs, (width, decoder_width)) for needs in sampled]

    # With all the room they want the shortest examples gather in one row, whose targets are
    # many; with less they spread, and may take more rows.
    unbound = rows_of(unbounded)
    in_row = [
        int(targets[row].sum())
        for rows, (_, targets) in zip(unbound, sampled)
        for row in rows
    ]
    candidates = np.linspace(np.mean(in_row), max(in_row), _DECODER_WIDTHS)
    candidates = {
        buckets.round_up(max(math.ceil(n), longest_target)) for n in candidates
    }
    laid = {n: [len(rows) for rows in rows_of(n)] for n in sorted(candidates)}
    # In T5 1.1 a position of the decoder takes about the products that one of the encoder does.
    decoder_width = min(laid, key=lambda n: sum(laid[n]) * (width + n))
    needed = buckets.round_up(np.array(laid[decoder_width]), multiple)
    most = buckets.round_up(batch_size, multiple)
    chosen = buckets.choose(needed, np.ones(steps), _MOST_CHOSEN)
    counts = {*chosen, min(chosen[-1] + multiple, most), most}
    return cls(width, decoder_width, tuple(sorted(counts)))

  def lay(self, widths: np.ndarray, target_widths: np.ndarray) -> tuple[list[list[int]], int]:
    """The examples of each row of a batch, and how many rows it has, empty ones included."""
    rows = first_fit(widths, target_widths, (self.width, self.decoder_width))
    return rows, buckets.narrowest(self.row_counts, len(rows))


def _row_cost(width: int) -> float:
  """What a row of a width costs the encoder, in tokens of a short row."""
  return width * (1 + width / _COSTLY_WIDTH)


def _rows(
    needs: Sequence[tuple[np.ndarray, np.ndarray]], width: int, decoder_width: int, multiple: int
) -> int:
  """Rows that batches take together."""
  counts = [len(first_fit(*of_batch, (width, decoder_width))) for of_batch in needs]
  return int(buckets.round_up(np.array(counts), multiple).sum())


def first_fit(
    widths: np.ndarray, target_widths: np.ndarray, room: tuple[int, int]
) -> list[list[int]]:
  """Lays examples into the first row with room for them, the longest first.

  On SuperGLUE's batches of 32, the longest first takes up to 7 % fewer rows than the examples
  in their order, and hardly more than their tokens fill.

  Args:
    widths: tokens of each example for the encoder.
    target_widths: for the decoder.
    room: what a row has room for, of both.

  Returns:
    Numbers of the examples of each row.
  """
  left = np.tile(np.array(room), (len(widths), 1))
  rows: list[list[int]] = []
  for number in np.argsort(-widths, kind='stable'):
    needed = widths[number], target_widths[number]
    # There are as many rows as examples, so that one has room.
    row = int(np.argmax((left[:, 0] >= needed[0]) & (left[:, 1] >= needed[1])))
    left[row] -= needed
    if row == len(rows):
      rows.append([])
    rows[row].append(int(number))
  return rows


def packed_batch(
    rows: Sequence[Sequence[Mapping[str, Any]]],
    *,
    encoder_width: int,
    decoder_width: int,
    input_length: int,
    target_length: int,
    vocab_size: int,
    num_virtual_tokens: int = 0,
    num_decoder_virtual_tokens: int = 0,
    placement: Placement | str = 'prefix',
    batch_size: int | None = None,
) -> Batch:
  """Makes one batch of NumPy arrays from the tokenised examples of each of its rows.

  Args:
    rows: the examples of each row, as `padding.make_batch` takes them.
    encoder_width: S, tokens of a row for the encoder, virtual ones included.
    decoder_width: T, tokens of a row for the decoder, virtual ones included.
    input_length: inputs are cut to this many ordinary tokens.
    target_length: targets are cut to this many.
    vocab_size: V, rows of the embedding table, the first virtual id.
    num_virtual_tokens: P, length of the prompt, which every example has; 0 for none.
    num_decoder_virtual_tokens: Q, length of one before each example's start token.
    placement: where the prompt stands (`virtual_tokens.py`).
    batch_size: B; rows beyond those given are empty. Default: as many as are given.

  Returns:
    A Batch of int32 arrays [B, S] and [B, T] with segments.

  Raises:
    ValueError: if a row does not fit, or a token id lies beyond the vocabulary.
  """
  placement = as_placement(placement)
  batch_size = len(rows) if batch_size is None else batch_size
  if len(rows) > batch_size:
    raise ValueError(f'{len(rows)} rows of examples do not fit a batch of {batch_size} rows.')
  prompt_Q = decoder_prompt(vocab_size, num_virtual_tokens, num_decoder_virtual_tokens)
  encoder_BS, encoder_segments_BS = np.zeros((2, batch_size, encoder_width), np.int32)
  inputs_BT, targets_BT, segments_BT = np.zeros((3, batch_size, decoder_width), np.int32)
  for row, examples in enumerate(rows):
    s = t = 0
    for segment, example in enumerate(examples, start=1):
      ids, targets = example_tokens(
          example,
          input_length=input_length,
          target_length=target_length,
          vocab_size=vocab_size,
          num_virtual_tokens=num_virtual_tokens,
          placement=placement,
      )
      start, end_s, end_t = t + len(prompt_Q), s + len(ids), t + len(prompt_Q) + len(targets)
      if end_s > encoder_width or end_t > decoder_width:
        raise ValueError(
            f'Row {row} has no room for its example {segment}: it would have {end_s} encoder '
            f'and {end_t} decoder tokens, virtual ones included, and has room for '
            f'{encoder_width} and {decoder_width}. Use longer rows or fewer examples in each.'
        )
      encoder_BS[row, s:end_s] = ids
      encoder_segments_BS[row, s:end_s] = segment
      inputs_BT[row, t:start] = prompt_Q
      # A 0 starts every example, as the first of an unpacked row.
      inputs_BT[row, start + 1 : end_t] = targets[:-1]
      targets_BT[row, start:end_t] = targets
      segments_BT[row, t:end_t] = segment
      s, t = end_s, end_t
  check_ids(encoder_BS, targets_BT, vocab_size, num_virtual_tokens)
  return Batch(
      encoder_input_tokens=encoder_BS,
      decoder_input_tokens=inputs_BT,
      decoder_target_tokens=targets_BT,
      decoder_loss_weights=(targets_BT > 0).astype(np.int32),
      encoder_segment_ids=encoder_segments_BS,
      decoder_segment_ids=segments_BT,
  )
