"""The examples of a task, checked against the model, and what their limits cut."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from prompt_tuning_jax.data.packing import packed_batch
from prompt_tuning_jax.data.padding import make_batch
from prompt_tuning_jax.data.tokenized_task import TokenizedTask
from prompt_tuning_jax.data.virtual_tokens import Placement, as_placement, unknown_field
from prompt_tuning_jax.typing import Batch


class Examples:
  """A task, checked against the model, with the lengths its rows will have.

  Attributes:
    task: the task.
    widths: tokens of each example for the encoder, virtual ones included.
    target_widths: tokens of each example for the decoder, virtual ones included.
  """

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
    input_length, target_length = feature_lengths['inputs'], feature_lengths['targets']
    placement = as_placement(placement).bind(task.vocabulary)
    placement.check(num_virtual_tokens, input_length)
    self._layout = dict(
        input_length=input_length,
        target_length=target_length,
        vocab_size=vocab_size,
        num_virtual_tokens=num_virtual_tokens,
        num_decoder_virtual_tokens=num_decoder_virtual_tokens,
        placement=placement,
    )
    # Fields of a template that are not token features: tokenised once, here.
    self._fields = {
        name: _tokenized_field(task, name)
        for name in placement.fields
        if name not in task.features
    }
    ordinary = placement.num_anchor_tokens + sum(
        task.lengths(name)
        if name in task.features
        else np.array([len(ids) for ids in self._fields[name]])
        for name in placement.fields
    )
    if task.has_labels:
      _warn_of_cuts(task, 'targets', task.lengths('targets'), feature_lengths, trains)
    _warn_of_cuts(task, 'inputs', ordinary, feature_lengths, trains)
    self.widths = np.minimum(ordinary, input_length) + num_virtual_tokens
    self.target_widths = (
        np.minimum(task.lengths('targets'), target_length) + num_decoder_virtual_tokens
    )

  def example(self, index: int) -> dict[str, np.ndarray]:
    index = int(index)
    fields = {name: column[index] for name, column in self._fields.items()}
    return self.task[index] | fields

  def padded(self, examples: Sequence[Mapping[str, Any]], **shape: int) -> Batch:
    """A batch of one example a row; `shape` is further arguments of `make_batch`."""
    return make_batch(examples, **self._layout, **shape)

  def packed(self, rows: Sequence[Sequence[Mapping[str, Any]]], **shape: int) -> Batch:
    """A batch of several examples a row; `shape` is further arguments of `packed_batch`."""
    return packed_batch(rows, **self._layout, **shape)


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
