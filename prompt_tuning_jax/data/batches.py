"""Batches of token ids as a pure function of (seed, step), and batches for scoring.

    batches = TrainBatches(task, batch_size=32, vocab_size=32128, num_virtual_tokens=100,
                           feature_lengths={'inputs': 512, 'targets': 8}, seed=0)
    batches[1000]     # the batch of step 1000, whatever was asked for before

An epoch is a seeded permutation of the examples, and epochs follow each other without
a gap: row r of a step is example step · batch_size + r of an endless sequence
(`order.py`). Resuming needs the step and nothing else, on any number of hosts.

Lengths: 'pad' gives every batch the same shape, feature length + prompt length, as
the original code does; 'bucket' gives *the same batches* padded to the smallest of a
few encoder widths that holds them (`buckets.py`), which changes no result and saves
most of the work; 'pack' lays *the same examples* into fewer rows, several in each
(`packing.py`), which changes no result either and saves more.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from prompt_tuning_jax.data import buckets as buckets_lib
from prompt_tuning_jax.data import packing as packing_lib
from prompt_tuning_jax.data.examples import Examples
from prompt_tuning_jax.data.order import ExampleOrder
from prompt_tuning_jax.data.several_prompts import ExamplesOfPrompts, PromptLayout
from prompt_tuning_jax.data.tokenized_task import TokenizedTask
from prompt_tuning_jax.data.virtual_tokens import Placement
from prompt_tuning_jax.typing import Batch


class TrainBatches:
  """`batches[step]` is the training batch of that step.

  Attributes:
    batch_size: B, examples over all hosts; as many rows, unless they are packed.
    widths: the encoder widths that occur, prompt included, ascending; with 'bucket' several.
    target_length: T, the decoder's width without its prompt: the feature length. Packed rows
      have a width of their own.
    packing: the shapes of packed batches; None where each row is one example.
    num_virtual_tokens: P, of each example in the encoder's input.
    longest: tokens of the longest example for the encoder, virtual ones included.
    longest_target: the same for the decoder.
    examples_per_epoch: examples of all tasks together.
  """

  def __init__(
      self,
      tasks: TokenizedTask | Sequence[tuple[TokenizedTask, float]],
      batch_size: int,
      *,
      feature_lengths: Mapping[str, int],
      vocab_size: int,
      num_virtual_tokens: int = 0,
      num_decoder_virtual_tokens: int = 0,
      placement: Placement | str = 'prefix',
      seed: int = 0,
      lengths: str = 'pad',
      buckets: Sequence[int] | None = None,
      packed_length: int | None = None,
      row_multiple: int = 1,
      process_index: int = 0,
      process_count: int = 1,
  ):
    """Checks the examples against the model and the lengths.

    Args:
      tasks: a task, or a mixture as pairs (task, relative weight). A mixture takes
        its examples in turn, in proportion to the weights, each task in an order of
        its own.
      batch_size: examples of a batch, over all hosts.
      feature_lengths: {'inputs': most ordinary tokens, 'targets': …}.
      vocab_size: V, rows of the embedding table.
      num_virtual_tokens: P, length of the prompt.
      num_decoder_virtual_tokens: Q, length of a prompt before the decoder's start token.
      placement: where the prompt stands among the inputs.
      seed: of the order; the same seed gives the same batches, whatever `lengths`.
      lengths: 'pad', 'bucket' or 'pack'.
      buckets: encoder widths for 'bucket', prompt included. Default: the four or
        fewer that pad batches of these examples least.
      packed_length: the encoder's width for 'pack', prompts included. Default: the cheapest
        for these examples, up to twice the longest that feature_lengths allow. Rows that no
        batch fills are narrower.
      row_multiple: what divides the number of rows with 'pack'.
      process_index: which host this is: it gets the process_index-th of
        `process_count` equal, contiguous slices of the rows.
      process_count: number of hosts.

    Raises:
      ValueError: if an id lies beyond the vocabulary, batch_size does not divide
        among the hosts, the placement does not fit the prompt, an example has no label,
        or one does not fit packed_length.
    """
    if isinstance(tasks, TokenizedTask):
      tasks = [(tasks, 1.0)]
    if not tasks:
      raise ValueError('There is no task to train on.')
    for task, weight in tasks:
      task.require_labels()
      if weight <= 0:
        raise ValueError(
            f'The weight of {task.name} is {weight}; weights are positive. Leave a task '
            'out to switch it off.'
        )
    self.batch_size = batch_size
    self.num_virtual_tokens = num_virtual_tokens
    self._rows = local_rows(batch_size, process_index, process_count)
    self._sources = [
        Examples(
            task,
            feature_lengths,
            vocab_size,
            num_virtual_tokens,
            num_decoder_virtual_tokens,
            placement,
            trains=True,
        )
        for task, _ in tasks
    ]
    self._order = ExampleOrder(
        [f'{task.name}/{task.split}' for task, _ in tasks],
        [len(task) for task, _ in tasks],
        [weight for _, weight in tasks],
        seed,
    )
    row_widths = [source.widths for source in self._sources]
    self.longest = max(int(widths.max()) for widths in row_widths)
    self.longest_target = max(int(source.target_widths.max()) for source in self._sources)
    self.target_length = feature_lengths['targets']
    self.packing = None
    if lengths == 'pack':
      self.packing = packing_lib.Packing.choose(
          map(self.needs, map(self.rows, itertools.count())),
          widths=packing_lib.packed_widths(
              packed_length, self.longest, feature_lengths, num_virtual_tokens
          ),
          longest=self.longest,
          longest_target=self.longest_target,
          batch_size=batch_size,
          multiple=math.lcm(row_multiple, process_count),
      )
      self.widths = (self.packing.width,)
      self._share = process_index, process_count
      return
    self.widths = buckets_lib.encoder_widths(
        self.longest,
        lengths,
        buckets,
        buckets_lib.random_batch_widths(
            row_widths, [weight for _, weight in tasks], batch_size
        ),
        feature_lengths,
        num_virtual_tokens,
    )

  @property
  def examples_per_epoch(self) -> int:
    return sum(len(source.task) for source in self._sources)

  def epoch(self, step: int) -> float:
    """How many times the data were seen when `step` begins."""
    return step * self.batch_size / self.examples_per_epoch

  def rows(self, step: int) -> list[tuple[int, int]]:
    """(task, example) of each example of the batch of a step, over all hosts."""
    if step < 0:
      raise IndexError(f'There is no step {step}; steps begin at 0.')
    start = step * self.batch_size
    return [self._order[index] for index in range(start, start + self.batch_size)]

  def __getitem__(self, step: int) -> Batch:
    """The batch of a step: this host's rows."""
    rows = self.rows(step)
    # All hosts must agree on the shape, so it is that of the whole batch.
    widths, target_widths = self.needs(rows)
    if self.packing is not None:
      packed, count = self.packing.lay(widths, target_widths)
      own = local_rows(count, *self._share)
      return self.packed_rows(
          [[rows[number] for number in row] for row in packed[own]],
          encoder_width=self.packing.width,
          decoder_width=self.packing.decoder_width,
          batch_size=own.stop - own.start,
      )
    longest = int(widths.max())
    return self._sources[0].padded(
        [self.example(*row) for row in rows[self._rows]],
        encoder_width=buckets_lib.narrowest(self.widths, longest),
    )

  def packed_rows(
      self, rows: Sequence[Sequence[tuple[int, int]]], **shape: int
  ) -> Batch:
    """A packed batch of rows of (task, example); `shape` as `packing.packed_batch` takes it."""
    return self._sources[0].packed([[self.example(*one) for one in row] for row in rows], **shape)

  def needs(self, rows: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of each example for the encoder and for the decoder."""
    sources = [self._sources[task] for task, _ in rows]
    return (
        np.array([source.widths[index] for source, (_, index) in zip(sources, rows)]),
        np.array([source.target_widths[index] for source, (_, index) in zip(sources, rows)]),
    )

  def example(self, task: int, index: int) -> dict[str, np.ndarray]:
    """The tokens of an example of `rows`."""
    return self._sources[task].example(index)


class EvalBatches:
  """All examples of a split once; iterate for pairs (Batch, example numbers).

  Every batch has `batch_size` rows; the last one is filled up with empty rows. Each example
  has a row of its own, so that 'pack' is 'bucket' here. With that the examples come longest
  first, so that batches hold examples of alike lengths and too little memory shows at once.

  Where several prompts answer (`prompts`), each example has a row for every one of them, in
  their order: a batch then holds batch_size examples in as many times more rows.

  Attributes:
    batch_size: examples of a batch, over all hosts; as many rows for each prompt.
    rows: which of the examples are this host's.
    widths: the encoder widths that may occur, prompt included, ascending.
    target_length: T, the decoder's width without its prompt: the feature length.
  """

  def __init__(
      self,
      task: TokenizedTask,
      batch_size: int,
      *,
      feature_lengths: Mapping[str, int],
      vocab_size: int,
      num_virtual_tokens: int = 0,
      num_decoder_virtual_tokens: int = 0,
      placement: Placement | str = 'prefix',
      lengths: str = 'pad',
      buckets: Sequence[int] | None = None,
      prompts: Sequence[PromptLayout] = (),
      process_index: int = 0,
      process_count: int = 1,
  ):
    """See `TrainBatches` for the arguments and what is raised.

    Of `prompts`, where there are any, each brings its own counts of virtual tokens and placement.

    The numbers that come with a batch are those of the whole batch, in the order of
    its rows over all hosts; rows beyond them are empty.
    """
    lengths = 'bucket' if lengths == 'pack' else lengths
    self.batch_size = batch_size
    self.rows = local_rows(batch_size, process_index, process_count)
    self._source: Examples | ExamplesOfPrompts
    if prompts:
      self._source = ExamplesOfPrompts(task, feature_lengths, vocab_size, prompts)
      num_virtual_tokens = self._source.num_virtual_tokens
      feature_lengths = {**feature_lengths, 'inputs': self._source.input_length}
    else:
      self._source = Examples(
          task,
          feature_lengths,
          vocab_size,
          num_virtual_tokens,
          num_decoder_virtual_tokens,
          placement,
      )
    self._order = np.arange(len(task))
    if lengths == 'bucket':
      self._order = np.argsort(-self._source.widths, kind='stable')
    row_widths = self._source.widths[self._order]
    starts = np.arange(0, len(task), batch_size)
    self.widths = buckets_lib.encoder_widths(
        int(row_widths.max()),
        lengths,
        buckets,
        (np.maximum.reduceat(row_widths, starts), np.ones(len(starts))),
        feature_lengths,
        num_virtual_tokens,
    )
    self.target_length = feature_lengths['targets']

  @property
  def row_widths(self) -> np.ndarray:
    """Tokens of each example's encoder row, virtual ones included, by example number."""
    return self._source.widths

  def __len__(self) -> int:
    return math.ceil(len(self._order) / self.batch_size)

  def __iter__(self) -> Iterator[tuple[Batch, np.ndarray]]:
    for start in range(0, len(self._order), self.batch_size):
      indices = self._order[start : start + self.batch_size]
      longest = int(self._source.widths[indices].max())
      batch = self._source.padded(
          [self._source.example(index) for index in indices[self.rows]],
          encoder_width=buckets_lib.narrowest(self.widths, longest),
          batch_size=self.rows.stop - self.rows.start,
      )
      yield batch, indices


def local_rows(batch_size: int, process_index: int, process_count: int) -> slice:
  if batch_size < 1:
    raise ValueError(
        f'BATCH_SIZE={batch_size}, but a batch has at least one row. Use '
        + ('1 or more.' if process_count == 1 else f'a multiple of {process_count}.')
    )
  if batch_size % process_count:
    raise ValueError(
        f'BATCH_SIZE={batch_size} does not divide among {process_count} processes. '
        f'Use a multiple of {process_count}.'
    )
  if not 0 <= process_index < process_count:
    raise ValueError(
        f'process_index={process_index} is not one of 0 to {process_count - 1}.'
    )
  local = batch_size // process_count
  return slice(process_index * local, (process_index + 1) * local)
