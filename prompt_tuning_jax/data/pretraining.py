"""Batches for pretraining and LM adaptation: a mixture of texts and pairs.

A batch is made from its step number alone, so that a run resumes from the step.
All of its rows belong to one component of the mixture, which has lengths and a
batch size of its own: nothing is wasted on padding short pairs to the length of
running text, and there is one compilation for each component.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from prompt_tuning_jax.data import objectives
from prompt_tuning_jax.data.tokenized_task import TokenizedTask
from prompt_tuning_jax.data.vocabulary import Vocabulary
from prompt_tuning_jax.typing import Batch

OBJECTIVES = ('span_corruption', 'prefix_lm', 'supervised')

# Fractional parts of its multiples fill [0, 1) more evenly than any other number's.
_GOLDEN_RATIO = 0.6180339887498949

# What a random generator is for: the order of an epoch, where it begins to cut the
# stream, the noise or split of a row. Part of the seed, so that none repeats another.
_ORDER, _OFFSET, _NOISE = 1, 2, 3


@dataclasses.dataclass(frozen=True)
class Component:
  """One part of a pretraining mixture.

  Attributes:
    name: for the log.
    source: tokenised text (the feature 'targets') or pairs ('inputs' and 'targets'),
      whose examples end in the end-of-sequence token.
    objective: 'span_corruption' or 'prefix_lm' on text, 'supervised' on pairs.
    weight: share of the steps, relative to the other components.
    input_length: length of the encoder's input, end-of-sequence token included.
    target_length: length of the targets; None computes it for span corruption.
    batch_size: rows of a batch.
    noise_density: share of masked tokens (span corruption).
    mean_noise_span_length: mean length of a masked span (span corruption).
    sentinel: put `<extra_id_0>` before the targets (prefix LM and supervised).
  """

  name: str
  source: TokenizedTask
  objective: str
  weight: float
  input_length: int
  target_length: int | None
  batch_size: int
  noise_density: float = 0.15
  mean_noise_span_length: float = 3.0
  sentinel: bool = False

  def __post_init__(self):
    if self.objective not in OBJECTIVES:
      raise ValueError(
          f'Component {self.name!r}: no objective {self.objective!r}. '
          f'Use one of {", ".join(OBJECTIVES)}.'
      )
    if self.weight <= 0:
      raise ValueError(
          f'Component {self.name!r}: weight={self.weight} must be positive; leave the '
          'component out to switch it off.'
      )
    if self.batch_size < 1:
      raise ValueError(
          f'Component {self.name!r}: batch_size={self.batch_size} must be at least 1.'
      )
    if self.target_length is None and self.objective != 'span_corruption':
      raise ValueError(
          f'Component {self.name!r}: {self.objective} needs a target_length; only span '
          'corruption can compute it.'
      )

  def noise_lengths(self) -> tuple[int, int]:
    """Of span corruption, tokens of a chunk that fills the inputs, and of its targets."""
    return objectives.span_corruption_lengths(
        self.input_length, self.noise_density, self.mean_noise_span_length
    )

  def describe(self) -> dict[str, Any]:
    """The settings and the size of the source, as JSON can hold them."""
    settings = {
        field.name: getattr(self, field.name)
        for field in dataclasses.fields(self)
        if field.name != 'source'
    }
    return {**settings, 'num_examples': len(self.source)}


class PretrainingBatches:
  """`batches[step]` is the batch of that step, whatever was asked for before.

  Text is one stream of tokens (the documents one after the other, as T5 packs
  them), cut into chunks that fill `input_length` exactly. An epoch cuts the stream
  at an offset of its own and visits the chunks in a permutation of its own; pairs
  are visited in a permutation. Which component a step takes follows the golden
  ratio sequence, which keeps the shares over any stretch of steps.
  """

  def __init__(
      self,
      components: Sequence[Component],
      vocabulary: Vocabulary,
      *,
      seed: int = 0,
      process_index: int = 0,
      process_count: int = 1,
  ):
    """Reads the sources and checks that they fit the vocabulary and the lengths.

    Args:
      components: the mixture.
      vocabulary: of the model; its sentinels and end-of-sequence id are used.
      seed: of the order, the masks and the splits.
      process_index: which rows this host takes: the `process_index`-th of
        `process_count` equal, contiguous slices.
      process_count: number of hosts.

    Raises:
      ValueError: if the mixture is empty or repeats a name, a source is too short for
        one chunk, tokenised with another vocabulary or without the features its
        objective needs, `target_length` cannot hold the targets of span corruption,
        an example of a supervised component has no label, or a batch size does not
        divide among the processes.
    """
    if not components:
      raise ValueError('The pretraining mixture has no components.')
    names = [component.name for component in components]
    if len(set(names)) < len(names):
      raise ValueError(f'Components need different names; got {", ".join(names)}.')
    self.components = tuple(components)
    self._parts: list[_Part] = []
    for number, component in enumerate(components):
      part = _PARTS[component.objective](component, vocabulary, (seed, number))
      self._parts.append(part)
      if component.batch_size % process_count:
        raise ValueError(
            f'Component {component.name!r}: batch_size={component.batch_size} does not '
            f'divide among {process_count} processes.'
        )
    self._process = (process_index, process_count)
    weights = np.array([component.weight for component in components], np.float64)
    self._upper = np.cumsum(weights)[:-1] / weights.sum()
    self._start = np.random.default_rng((seed, len(components))).random()
    # Extended on demand: a memo of a pure function of the step.
    self._component_of_step = np.zeros(0, np.int16)
    self._earlier_steps = np.zeros(0, np.int64)

  def __getitem__(self, step: int) -> Batch:
    """The batch of `step` (numpy arrays), this process's rows of it."""
    number, earlier = self._schedule(step)
    component, part = self.components[number], self._parts[number]
    index, count = self._process
    rows = component.batch_size // count
    first = earlier * component.batch_size + index * rows
    inputs_BS, targets_BT = part.rows(range(first, first + rows))
    shifted_BT = np.zeros_like(targets_BT)
    shifted_BT[:, 1:] = targets_BT[:, :-1]
    return Batch(
        encoder_input_tokens=inputs_BS,
        decoder_input_tokens=shifted_BT,
        decoder_target_tokens=targets_BT,
        decoder_loss_weights=(targets_BT > 0).astype(np.int32),
    )

  def component_name(self, step: int) -> str:
    """Which component the batch of `step` comes from."""
    return self.components[self._schedule(step)[0]].name

  def tokens_per_step(self, step: int) -> int:
    """Positions that `step` computes over all processes, inputs and targets."""
    number, _ = self._schedule(step)
    part = self._parts[number]
    return self.components[number].batch_size * (part.input_length + part.target_length)

  def epochs(self, step: int) -> dict[str, float]:
    """How often each component's data have been seen when `step` begins."""
    if step == 0:
      return {component.name: 0.0 for component in self.components}
    self._schedule(step - 1)
    counts = np.bincount(self._component_of_step[:step], minlength=len(self.components))
    return {
        component.name: int(count) * component.batch_size / part.epoch_size
        for component, part, count in zip(self.components, self._parts, counts)
    }

  def _schedule(self, step: int) -> tuple[int, int]:
    """The component of `step`, and how many earlier steps took the same."""
    if step < 0:
      raise IndexError(f'Steps count from 0; got {step}.')
    if step >= len(self._component_of_step):
      steps = np.arange(max(4096, 2 * (step + 1)))
      places = (self._start + steps * _GOLDEN_RATIO) % 1.0
      chosen = np.searchsorted(self._upper, places, side='right')
      earlier = np.zeros(len(steps), np.int64)
      for number in range(len(self.components)):
        mine = chosen == number
        earlier[mine] = np.arange(np.count_nonzero(mine))
      self._component_of_step, self._earlier_steps = chosen.astype(np.int16), earlier
    return int(self._component_of_step[step]), int(self._earlier_steps[step])


class _Part:
  """The rows of one component, numbered through all epochs."""

  input_length: int
  target_length: int
  epoch_size: int  # rows of an epoch

  def __init__(self, component: Component, vocabulary: Vocabulary, seed: tuple[int, int]):
    self.component = component
    self.vocabulary = vocabulary
    self.seed = seed
    self.input_length = component.input_length
    _check_source(component, vocabulary)
    # A batch reads at most two epochs, neighbours of each other.
    self._permutation = functools.lru_cache(2)(self._make_permutation)

  def rows(self, numbers: range) -> tuple[np.ndarray, np.ndarray]:
    """Inputs [B, S] and targets [B, T] of these rows, padded with 0."""
    raise NotImplementedError

  def _locate(self, number: int) -> tuple[int, int, int]:
    """Epoch of a row, its place in the epoch, and the example that stands there."""
    epoch, place = divmod(number, self.epoch_size)
    return epoch, place, int(self._permutation(epoch)[place])

  def _make_permutation(self, epoch: int) -> np.ndarray:
    return self._rng(_ORDER, epoch).permutation(self.epoch_size)

  def _rng(self, purpose: int, epoch: int, place: int = 0) -> np.random.Generator:
    return np.random.default_rng((*self.seed, purpose, epoch, place))

  def _pad(self, examples: list[objectives.Example]) -> tuple[np.ndarray, np.ndarray]:
    inputs_BS = np.zeros((len(examples), self.input_length), np.int32)
    targets_BT = np.zeros((len(examples), self.target_length), np.int32)
    for row, example in enumerate(examples):
      inputs_BS[row, : len(example['inputs'])] = example['inputs']
      targets_BT[row, : len(example['targets'])] = example['targets']
    return inputs_BS, targets_BT


class _Text(_Part):
  """Chunks of a stream of tokens; subclasses set `chunk_length`."""

  chunk_length: int

  def _read_stream(self) -> None:
    self._stream, _ = self.component.source.flat_tokens('targets')
    length = self.chunk_length
    if len(self._stream) < length:
      raise ValueError(
          f'Component {self.component.name!r}: its text has {len(self._stream):,} tokens, '
          f'fewer than one chunk of {length:,} (input_length={self.input_length}). Use '
          'more text or a shorter input_length.'
      )
    # The largest number of chunks that fit whatever the offset; 1 if none does.
    self.epoch_size = max(1, (len(self._stream) - length + 1) // length)
    self._num_offsets = min(length, len(self._stream) - self.epoch_size * length + 1)

  def _chunks(self, numbers: range) -> tuple[np.ndarray, list[np.random.Generator]]:
    """Chunks [B, N] and the generator of each row."""
    starts, rngs = [], []
    for number in numbers:
      epoch, place, chunk = self._locate(number)
      starts.append(self._offset(epoch) + chunk * self.chunk_length)
      rngs.append(self._rng(_NOISE, epoch, place))
    index_BN = np.array(starts)[:, None] + np.arange(self.chunk_length)
    return self._stream[index_BN], rngs

  def _offset(self, epoch: int) -> int:
    return int(self._rng(_OFFSET, epoch).integers(self._num_offsets))


class _SpanCorruption(_Text):
  """T5's objective on text."""

  def __init__(self, component: Component, vocabulary: Vocabulary, seed: tuple[int, int]):
    super().__init__(component, vocabulary, seed)
    self.chunk_length, needed = component.noise_lengths()
    self.target_length = component.target_length or needed
    if self.target_length < needed:
      raise ValueError(
          f'Component {component.name!r}: target_length={component.target_length} would '
          f'cut the targets of span corruption, which are {needed} long for '
          f'input_length={component.input_length}. Use {needed}, or None.'
      )
    _, num_spans = objectives.noise_counts(
        self.chunk_length, component.noise_density, component.mean_noise_span_length
    )
    objectives.check_sentinels(num_spans, vocabulary.sentinel_ids)
    self._read_stream()

  def rows(self, numbers: range) -> tuple[np.ndarray, np.ndarray]:
    tokens_BN, rngs = self._chunks(numbers)
    inputs_BI, targets_BT = objectives.corrupt_spans(
        tokens_BN,
        rngs,
        noise_density=self.component.noise_density,
        mean_noise_span_length=self.component.mean_noise_span_length,
        sentinel_ids=self.vocabulary.sentinel_ids,
        eos_id=self.vocabulary.eos_id,
    )
    return (
        _widen(inputs_BI, self.input_length),
        _widen(targets_BT, self.target_length),
    )


class _PrefixLM(_Text):
  """LM adaptation on text."""

  def __init__(self, component: Component, vocabulary: Vocabulary, seed: tuple[int, int]):
    super().__init__(component, vocabulary, seed)
    self.target_length = component.target_length
    self._sentinel = vocabulary.sentinel_ids[0] if component.sentinel else None
    # With equal lengths this is T5's: a chunk that fits either side whole, and a
    # split anywhere in it.
    room = self.target_length - (self._sentinel is not None)
    self.chunk_length = max(self.input_length, room) - 1
    if self.chunk_length < 2 or min(self.input_length, room) < 2:
      raise ValueError(
          f'Component {component.name!r}: input_length={self.input_length} and '
          f'target_length={self.target_length} leave no room for a token and the '
          'end-of-sequence token on either side.'
      )
    self._read_stream()

  def rows(self, numbers: range) -> tuple[np.ndarray, np.ndarray]:
    tokens_BN, rngs = self._chunks(numbers)
    return self._pad([
        objectives.prefix_lm(
            tokens,
            rng,
            eos_id=self.vocabulary.eos_id,
            max_input_length=self.input_length,
            max_target_length=self.target_length,
            sentinel_id=self._sentinel,
        )
        for tokens, rng in zip(tokens_BN, rngs)
    ])


class _Supervised(_Part):
  """Pairs as they are, as in T5's multi-task pretraining (Raffel et al., section 3.5.3)."""

  def __init__(self, component: Component, vocabulary: Vocabulary, seed: tuple[int, int]):
    super().__init__(component, vocabulary, seed)
    self.target_length = component.target_length
    self.epoch_size = len(component.source)
    self._before = [vocabulary.sentinel_ids[0]] if component.sentinel else []
    self._warn_of_cuts()

  def rows(self, numbers: range) -> tuple[np.ndarray, np.ndarray]:
    return self._pad([self._example(self._locate(number)[2]) for number in numbers])

  def _example(self, index: int) -> objectives.Example:
    example = self.component.source[index]
    return {
        'inputs': self._cut(example['inputs'], self.input_length),
        'targets': self._cut([*self._before, *example['targets']], self.target_length),
    }

  def _cut(self, tokens: Sequence[int], length: int) -> Sequence[int]:
    if len(tokens) <= length:
      return tokens
    return [*tokens[: length - 1], self.vocabulary.eos_id]

  def _warn_of_cuts(self) -> None:
    source = self.component.source
    for feature, length in (
        ('inputs', self.input_length),
        ('targets', self.target_length - len(self._before)),
    ):
      share = source.share_longer_than(feature, length)
      if share:
        warnings.warn(
            f'Component {self.component.name!r}: {share:.1%} of the {feature} are longer '
            f'than {length} tokens and are cut (the longest has '
            f'{source.longest(feature)}).',
            stacklevel=4,
        )


_PARTS = {
    'span_corruption': _SpanCorruption,
    'prefix_lm': _PrefixLM,
    'supervised': _Supervised,
}


def _widen(tokens_BN: np.ndarray, length: int) -> np.ndarray:
  return np.pad(tokens_BN, ((0, 0), (0, length - tokens_BN.shape[1])))


def _check_source(component: Component, vocabulary: Vocabulary) -> None:
  source = component.source
  theirs, ours = source.vocabulary_fingerprint, vocabulary.fingerprint
  if theirs != ours:
    raise ValueError(
        f'Component {component.name!r} was tokenised with another vocabulary '
        f'({theirs[:12]}…) than this run uses ({ours[:12]}…). Tokenise it again with '
        'the vocabulary of the model.'
    )
  needed = {'targets'} | ({'inputs'} if component.objective == 'supervised' else set())
  if not needed <= set(source.features):
    raise ValueError(
        f'Component {component.name!r}: {component.objective} needs examples with '
        f'{" and ".join(sorted(needed))}; its source has {", ".join(source.features)}.'
    )
  if component.objective == 'supervised':
    source.require_labels()
