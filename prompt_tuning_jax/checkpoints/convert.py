"""`prompt-tuning convert`: a backbone from one format into another."""

from __future__ import annotations

import os
import warnings

from prompt_tuning_jax.checkpoints import hf, load, native, t5x
from prompt_tuning_jax.checkpoints.source import cast
from prompt_tuning_jax.data.vocabulary import Vocabulary
from prompt_tuning_jax.writing import check_local, check_vacant

FORMATS = ('native', 'hf', 't5x')


def convert(
    where: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    format: str,
    *,
    dtype: str | None = None,
    max_distance: int | None = None,
    vocabulary: Vocabulary | str | os.PathLike[str] | None = None,
) -> str:
  """Writes a backbone in another format, holding one array at a time.

  Unless `dtype` changes them, the numbers stay the same to the bit, and so does the
  fingerprint, by which prompts know their backbone.

  Args:
    where: the backbone, as `load_backbone` takes it.
    output_dir: the directory to write; only a backbone in the library's own layout is
      replaced, anything else that exists is refused.
    format: 'native' (the library's own layout), 'hf' (Hugging Face) or 't5x' (version 3).
    dtype: 'float32' or 'bfloat16'; None keeps the type of every array.
    max_distance: of a T5X checkpoint without T5's 32 buckets, as `load_backbone` takes it.
    vocabulary: the SentencePiece model; by default the one beside the weights. 'native'
      and 'hf' get a copy; T5X keeps vocabularies apart from checkpoints.

  Returns:
    The directory.

  Raises:
    ValueError: if there is no such format, or the backbone cannot be read or written.
    FileNotFoundError, FileExistsError, OSError: if files are missing, in the way, or
      cannot be written; nothing is left half-written.
  """
  if format not in FORMATS:
    raise ValueError(f'format is {format!r}; it may be {", ".join(map(repr, FORMATS))}.')
  if dtype is not None:
    load.check_dtype('dtype', dtype)
  check_output(output_dir, format)
  checkpoint = load.open_checkpoint(load.find(where), max_distance)
  vocabulary = load.vocabulary_of(checkpoint, vocabulary)
  if checkpoint.prompts:
    warnings.warn(
        f'{checkpoint.path} holds a prompt ({", ".join(checkpoint.prompts)}), which is not '
        'part of the backbone and is left out. `prompt-tuning import` makes an artifact of '
        'it.',
        stacklevel=2,
    )
  if vocabulary is None and format != 't5x':
    warnings.warn(
        f'No vocabulary lies beside {checkpoint.path}, so that none goes along. Name its '
        'SentencePiece model (VOCABULARY) to have it written too.',
        stacklevel=2,
    )
  weights = cast(checkpoint.weights, dtype)
  if format == 'native':
    native.write_native(output_dir, checkpoint.config, weights, vocabulary)
  elif format == 'hf':
    hf.write_hf(output_dir, checkpoint.config, weights, vocabulary)
  else:
    t5x.write_t5x(output_dir, checkpoint.config, weights, step=checkpoint.step or 0)
  return os.fspath(output_dir)


def check_output(output_dir: str | os.PathLike[str], format: str) -> None:
  """Refuses a place that is not on this machine, or has something else in it.

  Raises:
    ValueError: if it is a URL.
    FileExistsError: if it is a file, or a directory with anything in it but, where that is
      written, a backbone in the library's own layout.
  """
  check_local(output_dir)
  if format != 'native' or not native.is_native(output_dir):
    check_vacant(output_dir)
