"""Batches whose rows have different prompts: whose virtual ids, and which prompt.

    of_first = for_prompt(batch, 0, vocab_size=V, num_virtual_tokens=20)
    of_second = for_prompt(batch, 1, vocab_size=V, num_virtual_tokens=20)
    joined([of_first, of_second])       # for an Injection of both (`injection_stack.py`)

A batch is first made as for any prompt, whose virtual ids begin at V, and then moved to the
rows of its prompt among all of them. Each row has one prompt, which all examples share that
are packed into it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from prompt_tuning_jax.data.examples import Examples
from prompt_tuning_jax.data.virtual_tokens import Placement
from prompt_tuning_jax.typing import Batch


def for_prompt(
    batch: Batch,
    number: int,
    *,
    vocab_size: int,
    num_virtual_tokens: int,
    num_decoder_virtual_tokens: int = 0,
    own_virtual_tokens: int | None = None,
) -> Batch:
  """The batch with all its rows for one of several prompts.

  Args:
    batch: of NumPy arrays, made for that prompt alone.
    number: k, the prompt's place among them, from 0.
    vocab_size: V, the first virtual id.
    num_virtual_tokens: P of the Injection of all, which is that of the longest.
    num_decoder_virtual_tokens: Q, those before the decoder's start token, of each.
    own_virtual_tokens: P of this prompt, where it is shorter than the longest.

  Returns:
    The batch with the virtual ids V + k · (P + Q) + i and `prompt_ids`.

  Raises:
    ValueError: if the batch has rows for several prompts already, or its virtual tokens are
      more than those of a prompt.
  """
  if batch.prompt_ids is not None:
    raise ValueError('The batch has prompt_ids already: make its rows for one prompt, as usual.')
  own = num_virtual_tokens if own_virtual_tokens is None else own_virtual_tokens
  inputs, decoder_inputs = (
      np.asarray(ids) for ids in (batch.encoder_input_tokens, batch.decoder_input_tokens)
  )
  highest = int(inputs.max(initial=0))
  if own > num_virtual_tokens or highest >= vocab_size + own:
    raise ValueError(
        f'The batch has the virtual token {highest - vocab_size} of prompt {number}, which has '
        f'{own}, and the longest of all {num_virtual_tokens}. Make the batch with '
        f'num_virtual_tokens={own}, and stack the prompts with injection_stack.stack_injections.'
    )
  by = number * (num_virtual_tokens + num_decoder_virtual_tokens)
  return batch.replace(
      encoder_input_tokens=moved(inputs, vocab_size, by),
      # They follow the encoder's, of which the longest prompt has more.
      decoder_input_tokens=moved(decoder_inputs, vocab_size, by + num_virtual_tokens - own),
      prompt_ids=np.full(len(inputs), number, np.int32),
  )


def moved(ids: np.ndarray, vocab_size: int, by: int) -> np.ndarray:
  """Token ids of which the virtual ones are larger by a number."""
  return np.where(ids >= vocab_size, ids + np.int32(by), ids)


def joined(batches: Sequence[Batch]) -> Batch:
  """The rows of all batches as one, those of the first before those of the second.

  Rows are padded to the longest.

  Raises:
    ValueError: if there are none, or they do not have the same fields: packed rows or not,
      for several prompts or not.
  """
  if not batches:
    raise ValueError('There are no batches to join.')
  fields = [[f.name for f in dataclasses.fields(b) if getattr(b, f.name) is not None]
            for b in batches]
  if any(names != fields[0] for names in fields):
    raise ValueError(
        'Batches to be joined have the same fields; these have '
        + '; '.join(sorted({", ".join(names) for names in fields}))
        + '. Pack the rows of all or of none, and make each by for_prompt.'
    )

  def one(*arrays: np.ndarray) -> np.ndarray:
    if arrays[0].ndim == 1:
      return np.concatenate(arrays)
    width = max(array.shape[1] for array in arrays)
    return np.concatenate(
        [np.pad(array, ((0, 0), (0, width - array.shape[1]))) for array in arrays]
    )

  return jax.tree.map(one, *batches)


@dataclasses.dataclass(frozen=True)
class PromptLayout:
  """What a prompt asks of the examples it is to answer.

  Attributes:
    num_virtual_tokens: P, its virtual tokens in the encoder's input.
    num_decoder_virtual_tokens: Q, those before the decoder's start token.
    placement: where they stand.
    input_length: ordinary tokens that inputs are cut to; None: as the other examples.
  """

  num_virtual_tokens: int = 0
  num_decoder_virtual_tokens: int = 0
  placement: Placement | str = 'prefix'
  input_length: int | None = None


class ExamplesOfPrompts:
  """The examples of a task, each once for every prompt; stands in for `Examples`.

  Attributes:
    task: the task.
    widths: tokens of each example for the encoder, with the prompt that makes it longest.
    num_virtual_tokens: P of the longest prompt.
    input_length: ordinary tokens that leave room for every example and any prompt beside the
      longest prompt.
  """

  def __init__(
      self,
      task: Any,
      feature_lengths: Mapping[str, int],
      vocab_size: int,
      prompts: Sequence[PromptLayout],
  ):
    """Checks the examples against the model and the prompts, see `Examples`."""
    lengths = [prompt.input_length or feature_lengths['inputs'] for prompt in prompts]
    self._sources = [
        Examples(
            task,
            {**feature_lengths, 'inputs': length},
            vocab_size,
            prompt.num_virtual_tokens,
            prompt.num_decoder_virtual_tokens,
            prompt.placement,
        )
        for prompt, length in zip(prompts, lengths, strict=True)
    ]
    self._prompts = prompts
    self._vocab_size = vocab_size
    self.task = task
    self.widths = np.max([source.widths for source in self._sources], axis=0)
    self.num_virtual_tokens = max(prompt.num_virtual_tokens for prompt in prompts)
    self.input_length = (
        max(prompt.num_virtual_tokens + n for prompt, n in zip(prompts, lengths))
        - self.num_virtual_tokens
    )

  def example(self, index: int) -> list[dict[str, np.ndarray]]:
    """The example as each prompt's placement reads it."""
    return [source.example(index) for source in self._sources]

  def padded(self, examples: Sequence[Sequence[Mapping[str, Any]]], **shape: int) -> Batch:
    """A batch in which each example has as many rows, one after the other, as there are prompts.

    `shape` is further arguments of `make_batch`; batch_size counts examples.
    """
    batches = [
        for_prompt(
            source.padded([example[number] for example in examples], **shape),
            number,
            vocab_size=self._vocab_size,
            num_virtual_tokens=self.num_virtual_tokens,
            num_decoder_virtual_tokens=prompt.num_decoder_virtual_tokens,
            own_virtual_tokens=prompt.num_virtual_tokens,
        )
        for number, (source, prompt) in enumerate(zip(self._sources, self._prompts, strict=True))
    ]
    batch = joined(batches)
    count = len(batches)
    by_example = np.arange(len(batch.prompt_ids)).reshape(count, -1).T.ravel()
    return jax.tree.map(lambda array: array[by_example], batch)
