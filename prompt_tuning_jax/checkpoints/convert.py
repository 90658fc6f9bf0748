"""`prompt-tuning convert`: a backbone from one format into another."""

from __future__ import annotations

import os

from prompt_tuning_jax.checkpoints import hf, load, native, t5x
from prompt_tuning_jax.checkpoints.source import cast
from prompt_tuning_jax.data.vocabulary import Vocabulary

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
  checkpoint = load.open_checkpoint(load.find(where), max_distance)
  vocabulary = load.vocabulary_of(checkpoint, vocabulary)
  weights = cast(checkpoint.weights, dtype)
  if format == 'native':
    native.write_native(output_dir, checkpoint.config, weights, vocabulary)
  elif format == 'hf':
    hf.write_hf(output_dir, checkpoint.config, weights, vocabulary)
  else:
    t5x.write_t5x(output_dir, checkpoint.config, weights, step=checkpoint.step or 0)
  return os.fspath(output_dir)
