"""Opening a vocabulary by what names it: a SentencePiece file, or 'bytes'."""

from __future__ import annotations

import os

from prompt_tuning_jax.data import byte_vocabulary
from prompt_tuning_jax.data.byte_vocabulary import ByteVocabulary
from prompt_tuning_jax.data.vocabulary import Vocabulary


def open_vocabulary(path: str | os.PathLike[str], extra_ids: int = 100) -> Vocabulary:
  """A SentencePiece model with `extra_ids` sentinels, or ByT5's bytes for the path 'bytes'.

  Raises:
    FileNotFoundError, ValueError: as `Vocabulary`.
  """
  if os.fspath(path) == byte_vocabulary.NAME:
    return ByteVocabulary()
  return Vocabulary(path, extra_ids)
