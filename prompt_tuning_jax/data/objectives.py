"""Pretraining objectives: from a run of tokens to an (inputs, targets) pair.

Pure numpy functions; all randomness comes from the generator that is passed in.

  span_corruption  T5's own objective (Raffel et al., 2020, section 3.1.4)
  prefix_lm        LM adaptation (Lester et al., 2021, section 2.2; Raffel et al.,
                   2020, section 3.2.3): a prefix is given, its continuation asked for

Letters: N tokens of a chunk, I tokens of the inputs, T of the targets, B rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Example = dict[str, np.ndarray]


def noise_counts(
    length: int, noise_density: float, mean_noise_span_length: float
) -> tuple[int, int]:
  """How many tokens of `length` are noise, and in how many spans."""
  # T5 computes these two in float32 and rounds half to even; so do we, since one
  # token more or less changes every length that follows from it.
  density = np.float32(noise_density)
  num_noise = int(np.round(np.float32(length) * density))
  num_noise = min(max(num_noise, 1), length - 1)
  num_spans = int(np.round(np.float32(num_noise) / np.float32(mean_noise_span_length)))
  # Every noise span follows a span of kept tokens that is not empty.
  return num_noise, min(max(num_spans, 1), length - num_noise)


def span_corruption_lengths(
    input_length: int,
    noise_density: float = 0.15,
    mean_noise_span_length: float = 3.0,
) -> tuple[int, int]:
  """How long a chunk fills `input_length` exactly, and how long its targets are.

  T5's `random_spans_helper`: inputs hold the kept tokens, a sentinel for each noise
  span and an end-of-sequence token; targets hold the noise, a sentinel for each
  span and an end-of-sequence token. (512 → 568 tokens, 114 targets.)

  Args:
    input_length: wanted length of the inputs, end-of-sequence token included.
    noise_density: share of the tokens that are masked out.
    mean_noise_span_length: mean length of a masked span.

  Returns:
    Length of the raw chunk, and length of its targets.

  Raises:
    ValueError: if a parameter is out of its range, or `input_length` cannot hold
      one token, one sentinel and the end-of-sequence token.
  """
  _check_noise(noise_density, mean_noise_span_length)
  if input_length < 3:
    raise ValueError(
        f'input_length={input_length} is too short for span corruption: inputs hold at '
        'least one token, one sentinel and the end-of-sequence token. Use 3 or more.'
    )

  def lengths(length: int) -> tuple[int, int]:
    num_noise, num_spans = noise_counts(length, noise_density, mean_noise_span_length)
    return length - num_noise + num_spans + 1, num_noise + num_spans + 1

  raw_length = 2
  while lengths(raw_length + 1)[0] <= input_length:
    raw_length += 1
  target_length = lengths(raw_length)[1]
  # T5's own exception, so that a density of one half gives targets that are not
  # longer than the inputs.
  if noise_density == 0.5 and target_length > lengths(raw_length)[0]:
    raw_length -= 1
    target_length -= 1
  return raw_length, target_length


def random_spans_noise_masks(
    length: int,
    rngs: Sequence[np.random.Generator],
    noise_density: float = 0.15,
    mean_noise_span_length: float = 3.0,
) -> np.ndarray:
  """Which tokens to mask out: T5's `random_spans_noise_mask`, for several rows.

  Kept and noise tokens are each cut at random into the same number of spans, none
  of them empty, which then alternate; the first span is kept.

  Args:
    length: number of tokens, at least 2.
    rngs: source of the randomness of each row.
    noise_density: share of the tokens that are masked out.
    mean_noise_span_length: mean length of a masked span.

  Returns:
    bool array [rows, length], True where a token is noise; every row has the same
    number of noise tokens and of spans.

  Raises:
    ValueError: if a parameter is out of its range.
  """
  _check_noise(noise_density, mean_noise_span_length)
  if length < 2:
    raise ValueError(
        'Span corruption needs at least 2 tokens, one to keep and one to mask; got '
        f'{length}.'
    )
  num_noise, num_spans = noise_counts(length, noise_density, mean_noise_span_length)
  noise_ends = _random_segment_ends(num_noise, num_spans, rngs)
  kept_ends = _random_segment_ends(length - num_noise, num_spans, rngs)
  # Noise span i begins where kept span i ends, behind i earlier noise spans.
  starts = kept_ends.copy()
  starts[:, 1:] += noise_ends[:, :-1]
  change = np.zeros((len(rngs), length + 1), np.int8)
  row = np.arange(len(rngs))[:, None]
  change[row, starts] = 1
  change[row, kept_ends + noise_ends] = -1
  return np.cumsum(change[:, :length], axis=1, dtype=np.int8).astype(bool)


def _random_segment_ends(
    num_items: int, num_segments: int, rngs: Sequence[np.random.Generator]
) -> np.ndarray:
  """Ends of `num_segments` non-empty segments that partition the items, by row.

  Every partition is equally likely: the cuts are a random subset of the gaps.
  """
  ends = np.empty((len(rngs), num_segments), np.int64)
  for row, rng in enumerate(rngs):
    ends[row, :-1] = rng.permutation(num_items - 1)[: num_segments - 1]
  ends[:, :-1] += 1
  ends[:, -1] = num_items
  ends.sort(axis=1)
  return ends


def check_sentinels(num_spans: int, sentinel_ids: Sequence[int]) -> None:
  """Raises ValueError unless there is a sentinel for each span."""
  if num_spans > len(sentinel_ids):
    raise ValueError(
        f'{num_spans} noise spans need as many sentinels, but the vocabulary has '
        f'{len(sentinel_ids)}. Use a shorter input_length, longer spans, or a '
        'vocabulary with more extra ids.'
    )


def replace_spans_with_sentinels(
    tokens_BN: np.ndarray, noise_BN: np.ndarray, sentinel_ids: Sequence[int]
) -> np.ndarray:
  """Puts a sentinel of its own for each run of noise: T5's `noise_span_to_unique_sentinel`.

  With the mask inverted it gives the targets (`nonnoise_span_to_unique_sentinel`).

  Args:
    tokens_BN: token ids.
    noise_BN: True on noise; every row has as many noise tokens and as many spans
      as the others, so that the result is rectangular.
    sentinel_ids: `<extra_id_0>`, `<extra_id_1>`, … in this order.

  Returns:
    int32 array [B, N - noise tokens + noise spans].

  Raises:
    ValueError: if there are more spans than sentinels.
  """
  previous_BN = np.zeros_like(noise_BN)
  previous_BN[:, 1:] = noise_BN[:, :-1]
  first_BN = noise_BN & ~previous_BN
  span_BN = np.cumsum(first_BN, axis=1)
  check_sentinels(int(span_BN.max(initial=0)), sentinel_ids)
  # Index 0 stands for "before the first span", where no sentinel is read.
  sentinels = np.array([0, *sentinel_ids], np.int32)
  replaced_BN = np.where(first_BN, sentinels[span_BN], tokens_BN).astype(np.int32)
  kept_BN = ~noise_BN | first_BN
  return replaced_BN[kept_BN].reshape(len(tokens_BN), -1)


def corrupt_spans(
    tokens_BN: np.ndarray,
    rngs: Sequence[np.random.Generator],
    *,
    noise_density: float = 0.15,
    mean_noise_span_length: float = 3.0,
    sentinel_ids: Sequence[int],
    eos_id: int,
) -> tuple[np.ndarray, np.ndarray]:
  """`span_corruption` of rows of equal length, each with its own generator.

  Returns:
    inputs [B, I] and targets [B, T], int32, without padding.
  """
  length = tokens_BN.shape[1]
  noise_BN = random_spans_noise_masks(
      length, rngs, noise_density, mean_noise_span_length
  )
  eos_B1 = np.full((len(tokens_BN), 1), eos_id, np.int32)
  inputs_BI = replace_spans_with_sentinels(tokens_BN, noise_BN, sentinel_ids)
  targets_BT = replace_spans_with_sentinels(tokens_BN, ~noise_BN, sentinel_ids)
  return (
      np.concatenate([inputs_BI, eos_B1], axis=1),
      np.concatenate([targets_BT, eos_B1], axis=1),
  )


def span_corruption(
    tokens: np.ndarray,
    rng: np.random.Generator,
    *,
    noise_density: float = 0.15,
    mean_noise_span_length: float = 3.0,
    sentinel_ids: Sequence[int],
    eos_id: int,
) -> Example:
  """T5's pretraining task (Raffel et al., 2020, section 3.1.4).

  Spans of the tokens are dropped out; in the inputs a sentinel stands for each, and
  the targets are the dropped spans, each behind its sentinel. For the tokens
  `a b c d e f` and noise on `b c` and `f`:

    inputs   a <extra_id_0> d e <extra_id_1> </s>
    targets  <extra_id_0> b c <extra_id_1> f </s>

  Args:
    tokens: [N] token ids.
    rng: source of the randomness.
    noise_density: share of the tokens that are dropped.
    mean_noise_span_length: mean length of a dropped span.
    sentinel_ids: `<extra_id_0>`, `<extra_id_1>`, … in this order.
    eos_id: end-of-sequence id, put after inputs and targets.

  Returns:
    {'inputs': [I] int32, 'targets': [T] int32}.

  Raises:
    ValueError: for fewer than 2 tokens, more spans than sentinels, or a parameter
      out of its range.
  """
  inputs_BI, targets_BT = corrupt_spans(
      np.asarray(tokens, np.int32)[None],
      [rng],
      noise_density=noise_density,
      mean_noise_span_length=mean_noise_span_length,
      sentinel_ids=sentinel_ids,
      eos_id=eos_id,
  )
  return {'inputs': inputs_BI[0], 'targets': targets_BT[0]}


def prefix_lm(
    tokens: np.ndarray,
    rng: np.random.Generator,
    *,
    eos_id: int,
    max_input_length: int | None = None,
    max_target_length: int | None = None,
    sentinel_id: int | None = None,
) -> Example:
  """LM adaptation: the continuation of a text, given its beginning.

  The split is uniform over all places that leave a token on either side, as in
  T5's `prefix_lm`, and that respect the two maximal lengths.

  Args:
    tokens: [N] token ids.
    rng: source of the randomness.
    eos_id: end-of-sequence id, put after inputs and targets.
    max_input_length: longest inputs, end-of-sequence token included.
    max_target_length: longest targets, end-of-sequence token (and sentinel) included.
    sentinel_id: put before the targets, for the "span corruption + sentinel" ablation
      (Lester et al., 2021, figure 3).

  Returns:
    {'inputs': [I] int32, 'targets': [T] int32}.

  Raises:
    ValueError: if no split fits.
  """
  num_tokens = len(tokens)
  before = [] if sentinel_id is None else [sentinel_id]
  first, last = 1, num_tokens - 1
  if max_input_length is not None:
    last = min(last, max_input_length - 1)
  if max_target_length is not None:
    first = max(first, num_tokens - (max_target_length - 1 - len(before)))
  if first > last:
    raise ValueError(
        f'{num_tokens} tokens cannot be split into a prefix and a continuation with '
        f'max_input_length={max_input_length}, max_target_length={max_target_length}. '
        'Use longer lengths, or chunks of at least 2 and at most '
        'max(input, target length) - 1 tokens.'
    )
  split = int(rng.integers(first, last + 1))
  return {
      'inputs': np.array([*tokens[:split], eos_id], np.int32),
      'targets': np.array([*before, *tokens[split:], eos_id], np.int32),
  }


def _check_noise(noise_density: float, mean_noise_span_length: float) -> None:
  if not 0.0 < noise_density < 1.0:
    raise ValueError(
        f'noise_density={noise_density} must lie between 0 and 1 (T5 uses 0.15).'
    )
  if mean_noise_span_length < 1.0:
    raise ValueError(
        f'mean_noise_span_length={mean_noise_span_length} must be at least 1 (T5 uses 3).'
    )
