"""Batches of one example a row, padded to one width: how an example becomes token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from prompt_tuning_jax.data.virtual_tokens import Placement, as_placement
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
    ids, targets = example_tokens(
        example,
        input_length=input_length,
        target_length=target_length,
        vocab_size=vocab_size,
        num_virtual_tokens=num_virtual_tokens,
        placement=placement,
    )
    if len(ids) > width:
      raise ValueError(
          f'Row {row} has {len(ids)} encoder tokens, virtual ones included, but the '
          f'batch is {width} wide. Use a longer width or a shorter prompt.'
      )
    encoder_BS[row, : len(ids)] = ids
    targets_BT[row, : len(targets)] = targets
  check_ids(encoder_BS, targets_BT, vocab_size, num_virtual_tokens)
  prompt_Q = decoder_prompt(vocab_size, num_virtual_tokens, num_decoder_virtual_tokens)
  prompt_BQ = np.tile(prompt_Q, (batch_size, 1))
  shifted_BT = np.pad(targets_BT, ((0, 0), (1, 0)))[:, :-1]
  targets_BT = np.concatenate([np.zeros_like(prompt_BQ), targets_BT], axis=1)
  return Batch(
      encoder_input_tokens=encoder_BS,
      decoder_input_tokens=np.concatenate([prompt_BQ, shifted_BT], axis=1),
      decoder_target_tokens=targets_BT,
      decoder_loss_weights=(targets_BT > 0).astype(np.int32),
  )


def decoder_prompt(
    vocab_size: int, num_virtual_tokens: int, num_decoder_virtual_tokens: int
) -> np.ndarray:
  """Ids [Q] before the decoder's start token; they follow those in the encoder's input."""
  first = vocab_size + num_virtual_tokens
  return np.arange(first, first + num_decoder_virtual_tokens, dtype=np.int32)


def example_tokens(
    example: Mapping[str, Any],
    *,
    input_length: int,
    target_length: int,
    vocab_size: int,
    num_virtual_tokens: int,
    placement: Placement,
) -> tuple[np.ndarray, Sequence[int]]:
  """An example's tokens for the encoder, virtual ones included, and its targets, both cut."""
  # Without virtual tokens too: a template's words are for any prompt, or for none.
  ids = placement(
      example.get('inputs', ()), num_virtual_tokens, vocab_size, length=input_length, fields=example
  )
  return ids, example.get('targets', ())[:target_length]


def check_ids(
    encoder_BS: np.ndarray, targets_BT: np.ndarray, vocab_size: int, num_virtual_tokens: int
) -> None:
  """Raises ValueError if a token id lies beyond the vocabulary and the prompt."""
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
