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
most of the work.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from prompt_tuning_jax.data import buckets as buckets_lib
from prompt_tuning_jax.data.order import ExampleOrder
from prompt_tuning_jax.data.tokenized_task import TokenizedTask
from prompt_tuning_jax.data.virtual_tokens import Placement, as_placement, unknown_field
from prompt_tuning_jax.typing import Batch


def make_batch(
    examples: Sequence[Mapping[str, Any]],
    *,
    input_length: int,
    target_length: int,
    vocab_size: int,
    num_virtual_tokens: int = 0,
    num_decoder_virtual_tokens: int = 0,
    placement: Placement | str = 'prefix',
    batch_size: int | None = None,
    encoder_width: int | None = None,
) -> Batch:
  """Makes one batch of NumPy arrays from tokenised examples.

  Args:
    examples: `{'inputs': ids, 'targets': ids}` each, and token ids of further fields
      that a template names. A missing 'targets' leaves the decoder's row empty.
    input_length: inputs are cut to this many ordinary tokens.
    target_length: T, targets are cut and padded to this many.
    vocab_size: V, rows of the embedding table, the first virtual id.
    num_virtual_tokens: P, length of the prompt; 0 for none.
    num_decoder_virtual_tokens: Q, length of one before the decoder's start token, whose ids
      follow those of the other.
    placement: where the prompt stands (`virtual_tokens.py`).
    batch_size: B; rows beyond the examples are empty. Default: as many as examples.
    encoder_width: S, what the encoder's rows are padded to. Default: input_length + P.

  Returns:
    A Batch of int32 arrays [B, S] and [B, Q + T]. The decoder's input is the targets
    shifted right behind a 0; loss weights are 1 where there is a target token.

  Raises:
    ValueError: if there are more examples than rows, a row does not fit, or a token
      id lies beyond the vocabulary.
  """
  placement = as_placement(placement)
  width = input_length + num_virtual_tokens if encoder_width is None else encoder_width
  batch_size = len(examples) if batch_size is None else batch_size
  if len(examples) > batch_size:
    raise ValueError(f'{len(examples)} examples do not fit a batch of {batch_size} rows.')
  encoder_BS = np.zeros((batch_size, width), np.int32)
  targets_BT = np.zeros((batch_size, target_length), np.int32)
  for row, example in enumerate(examples):
    ids = example.get('inputs', ())
    if num_virtual_tokens or placement.fields != ('inputs',):
      ids = placement(
          ids, num_virtual_tokens, vocab_size, length=input_length, fields=example
      )
    else:
      ids = np.asarray(ids, np.int32)[:input_length]
    if len(ids) > width:
      raise ValueError(
          f'Row {row} has {len(ids)} encoder tokens, virtual ones included, but the '
          f'batch is {width} wide. Use a longer width or a shorter prompt.'
      )
    encoder_BS[row, : len(ids)] = ids
    targets = example.get('targets', ())[:target_length]
    targets_BT[row, : len(targets)] = targets
  highest = int(encoder_BS.max(initial=0))
  if highest >= vocab_size + num_virtual_tokens:
    row = int(encoder_BS.max(axis=1).argmax())
    raise ValueError(
        f'Row {row} has the token id {highest}, but the embedding table has {vocab_size} '
        f'rows (and the prompt {num_virtual_tokens}). The text was tokenised with '
        "another vocabulary than the model's."
    )
  if targets_BT.max(initial=0) >= vocab_size:
    raise ValueError(
        f'A target has the token id {int(targets_BT.max())}, but the embedding table has '
        f"{vocab_size} rows: the text was tokenised with another vocabulary."
    )
  first = vocab_size + num_virtual_tokens
  prompt_Q = np.arange(first, first + num_decoder_virtual_tokens, dtype=np.int32)
  prompt_BQ = np.tile(prompt_Q, (batch_size, 1))
  shifted_BT = np.pad(targets_BT, ((0, 0), (1, 0)))[:, :-1]
  targets_BT = np.concatenate([np.zeros_like(prompt_BQ), targets_BT], axis=1)
  return Batch(
      encoder_input_tokens=encoder_BS,
      decoder_input_tokens=np.concatenate([prompt_BQ, shifted_BT], axis=1),
      decoder_target_tokens=targets_BT,
      decoder_loss_weights=(targets_BT > 0).astype(np.int32),
  )


class TrainBatches:
  """`batches[step]` is the training batch of that step.

  Attributes:
    batch_size: B, rows over all hosts.
    widths: the encoder widths that occur, prompt included, ascending; with 'pad' one.
    target_length: T, the decoder's width without its prompt: the feature length.
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
      process_index: int = 0,
      process_count: int = 1,
  ):
    """Checks the examples against the model and the lengths.

    Args:
      tasks: a task, or a mixture as pairs (task, relative weight). A mixture takes
        its examples in turn, in proportion to the weights, each task in an order of
        its own.
      batch_size: rows of a batch, over all hosts.
      feature_lengths: {'inputs': most ordinary tokens, 'targets': …}.
      vocab_size: V, rows of the embedding table.
      num_virtual_tokens: P, length of the prompt.
      num_decoder_virtual_tokens: Q, length of a prompt before the decoder's start token.
      placement: where the prompt stands among the inputs.
      seed: of the order; the same seed gives the same batches, whatever `lengths`.
      lengths: 'pad' or 'bucket'.
      buckets: encoder widths for 'bucket', prompt included. Default: the four or
        fewer that pad batches of these examples least.
      process_index: which host this is: it gets the process_index-th of
        `process_count` equal, contiguous slices of the rows.
      process_count: number of hosts.

    Raises:
      ValueError: if an id lies beyond the vocabulary, batch_size does not divide
        among the hosts, the placement does not fit the prompt, or an example has no
        label.
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
    self._rows = _local_rows(batch_size, process_index, process_count)
    self._sources = [
        _Source(
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
    self.widths = buckets_lib.encoder_widths(
        max(int(widths.max()) for widths in row_widths),
        lengths,
        buckets,
        buckets_lib.random_batch_widths(
            row_widths, [weight for _, weight in tasks], batch_size
        ),
        feature_lengths,
        num_virtual_tokens,
    )
    self.target_length = feature_lengths['targets']

  @property
  def examples_per_epoch(self) -> int:
    return sum(len(source.task) for source in self._sources)

  def epoch(self, step: int) -> float:
    """How many times the data were seen when `step` begins."""
    return step * self.batch_size / self.examples_per_epoch

  def rows(self, step: int) -> list[tuple[int, int]]:
    """(task, example) of each row of the batch of a step, over all hosts."""
    if step < 0:
      raise IndexError(f'There is no step {step}; steps begin at 0.')
    start = step * self.batch_size
    return [self._order[index] for index in range(start, start + self.batch_size)]

  def __getitem__(self, step: int) -> Batch:
    """The batch of a step: this host's rows."""
    rows = self.rows(step)
    # All hosts must agree on the shape, so it is that of the whole batch.
    longest = max(int(self._sources[t].widths[i]) for t, i in rows)
    sources = self._sources
    return sources[0].batch(
        [sources[task].example(index) for task, index in rows[self._rows]],
        encoder_width=buckets_lib.narrowest(self.widths, longest),
        target_length=self.target_length,
    )


class EvalBatches:
  """All examples of a split once; iterate for pairs (Batch, example numbers).

  Every batch has `batch_size` rows; the last one is filled up with empty rows. With
  'bucket' the examples come longest first, so that batches hold examples of alike
  lengths and too little memory shows at once.

  Attributes:
    batch_size: B, rows over all hosts.
    rows: which of them are this host's.
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
      process_index: int = 0,
      process_count: int = 1,
  ):
    """See `TrainBatches` for the arguments and what is raised.

    The numbers that come with a batch are those of the whole batch, in the order of
    its rows over all hosts; rows beyond them are empty.
    """
    self.batch_size = batch_size
    self.rows = _local_rows(batch_size, process_index, process_count)
    self._source = _Source(
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
      batch = self._source.batch(
          [self._source.example(index) for index in indices[self.rows]],
          encoder_width=buckets_lib.narrowest(self.widths, longest),
          target_length=self.target_length,
          batch_size=self.rows.stop - self.rows.start,
      )
      yield batch, indices


class _Source:
  """A task, checked against the model, with the lengths its rows will have."""

  def __init__(
      self,
      task: TokenizedTask,
      feature_lengths: Mapping[str, int],
      vocab_size: int,
      num_virtual_tokens: int,
      num_decoder_virtual_tokens: int,
      placement: Placement | str,
      trains: bool = False,
  ):
    for feature in ('inputs', 'targets'):
      if feature not in feature_lengths:
        raise ValueError(
            f'feature_lengths={dict(feature_lengths)} does not say how long {feature!r} '
            "may be. Set TASK_FEATURE_LENGTHS, for example {'inputs': 512, 'targets': 8}."
        )
      if feature_lengths[feature] < 1:
        raise ValueError(f'feature_lengths[{feature!r}]={feature_lengths[feature]} < 1.')
      if feature not in task.features:
        raise ValueError(
            f'{task.name} has no {feature!r} (it has {", ".join(task.features)}). Plain '
            'text is for `pretrain` and `adapt`, which make inputs and targets of it.'
        )
      _check_ids(task, feature, vocab_size)
    self.task = task
    self._input_length = feature_lengths['inputs']
    self._vocab_size = vocab_size
    self._num_virtual_tokens = num_virtual_tokens
    self._num_decoder_virtual_tokens = num_decoder_virtual_tokens
    self._placement = as_placement(placement).bind(task.vocabulary)
    self._placement.check(num_virtual_tokens, self._input_length)
    # Fields of a template that are not token features: tokenised once, here.
    self._fields = {
        name: _tokenized_field(task, name)
        for name in self._placement.fields
        if name not in task.features
    }
    ordinary = self._placement.num_anchor_tokens + sum(
        task.lengths(name)
        if name in task.features
        else np.array([len(ids) for ids in self._fields[name]])
        for name in self._placement.fields
    )
    if task.has_labels:
      _warn_of_cuts(task, 'targets', task.lengths('targets'), feature_lengths, trains)
    _warn_of_cuts(task, 'inputs', ordinary, feature_lengths, trains)
    # [examples], tokens of the encoder's rows, virtual ones included.
    self.widths = np.minimum(ordinary, self._input_length) + num_virtual_tokens

  def example(self, index: int) -> dict[str, np.ndarray]:
    index = int(index)
    fields = {name: column[index] for name, column in self._fields.items()}
    return self.task[index] | fields

  def batch(self, examples: Sequence[Mapping[str, Any]], **shape: int) -> Batch:
    return make_batch(
        examples,
        input_length=self._input_length,
        vocab_size=self._vocab_size,
        num_virtual_tokens=self._num_virtual_tokens,
        num_decoder_virtual_tokens=self._num_decoder_virtual_tokens,
        placement=self._placement,
        **shape,
    )


def _warn_of_cuts(
    task: TokenizedTask,
    feature: str,
    token_counts: np.ndarray,
    feature_lengths: Mapping[str, int],
    trains: bool,
) -> None:
  """Says what share of the examples a limit cuts, the worst of them, and what it costs."""
  length = feature_lengths[feature]
  num_cut = int(np.sum(token_counts > length))
  if not num_cut:
    return
  worst = int(token_counts.argmax())
  longest = int(token_counts[worst])
  if feature == 'inputs':
    consequence = 'the model does not see what is cut'
  elif trains:
    consequence = (
        'the model never learns how these answers end, not even that they do (the '
        f"end-of-sequence token is cut). Allow {longest} for 'targets', unless that is meant"
    )
  else:
    consequence = 'answers are neither generated nor scored beyond it'
  warnings.warn(
      f"TASK_FEATURE_LENGTHS['{feature}']={length} cuts the {feature} of "
      f'{num_cut / len(token_counts):.1%} of {task.name}, split {task.split!r} ({num_cut:,} of '
      f'{len(token_counts):,} examples; the longest, example {worst}, has {longest} tokens): '
      f'{consequence}.',
      stacklevel=4,
  )


def _check_ids(task: TokenizedTask, feature: str, vocab_size: int) -> None:
  tokens, offsets = task.flat_tokens(feature)
  bad = np.flatnonzero((tokens >= vocab_size) | (tokens < 0))
  if len(bad):
    example = int(np.searchsorted(offsets, bad[0], side='right')) - 1
    raise ValueError(
        f'{task.name}, split {task.split!r}: the {feature} of example {example} hold the '
        f'token id {int(tokens[bad[0]])}, but the embedding table has {vocab_size} rows. '
        f'{len(bad):,} ids of {len(tokens):,} are out of range: the task was tokenised '
        "with another vocabulary than the model's."
    )


def _tokenized_field(task: TokenizedTask, name: str) -> list[list[int]]:
  first = task.example(0)
  if name not in first:
    known = dict.fromkeys([*task.features, *first])
    raise ValueError(unknown_field(name, f'{task.name}, split {task.split!r},', known))
  texts, is_answer = [], True
  for index in range(len(task)):
    example = task.example(index)
    text = example[name]
    if not isinstance(text, str):
      raise ValueError(
          f'The template (PLACEMENT) names the field {name!r}, which is no text: in example '
          f'{index} of {task.name}, split {task.split!r}, it is {text!r}.'
      )
    texts.append(text)
    is_answer = is_answer and text == example.get('targets_pretokenized')
  if is_answer:
    raise ValueError(
        f'The template (PLACEMENT) names the field {name!r}, which in {task.name}, split '
        f'{task.split!r}, is the answer: the model would read what it is to say. Put '
        "<extra_id_0> where the answer belongs ('text: <extra_id_0>' in a sequence)."
    )
  return task.vocabulary.encode_many(texts)


def _local_rows(batch_size: int, process_index: int, process_count: int) -> slice:
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
