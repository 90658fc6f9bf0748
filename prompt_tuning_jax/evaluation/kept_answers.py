"""Answers as they are found: an evaluation that was interrupted goes on where it stopped.

Batches are the same whenever they are made, so that what is kept is a line for each of them, in
their order. The file is named by a sum of all that its answers depend on: whatever differs looks
for a file of its own, and what is there is not trusted because of where it lies.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from prompt_tuning_jax import partitioning
from prompt_tuning_jax.backbones.backbone import Backbone
from prompt_tuning_jax.injection_arrays import SETTINGS, named_arrays
from prompt_tuning_jax.json_files import as_json, canonical_json, read_jsonl, write_jsonl
from prompt_tuning_jax.typing import Array, Injection

_FOLDER = '.unfinished'


class KeptAnswers:
  """The answers to the first batches of an evaluation; without a folder, to none of them.

  Of several processes each has only its share of a batch's answers: nothing is kept.
  """

  def __init__(
      self,
      folder: str | os.PathLike[str] | None,
      depends_on: Callable[[], Mapping[str, Any]] = dict,
  ):
    """Names the file.

    Args:
      folder: where it lies, in a hidden folder of its own; None keeps nothing.
      depends_on: gives all that decides the answers, as values that JSON can hold; called where
        something is kept.
    """
    self._path = None
    if folder is not None and jax.process_count() == 1:
      name = hashlib.sha256(canonical_json(as_json(depends_on())).encode()).hexdigest()[:16]
      self._path = os.path.join(folder, _FOLDER, f'{name}.jsonl')

  def read(self) -> list[list[Any]]:
    """The answers to each batch that was done, in their order."""
    if self._path is None or not os.path.exists(self._path):
      return []
    records = read_jsonl(self._path, needs=['answers'])
    write_jsonl(self._path, records)  # A line that a crash cut short is no beginning of the next.
    return [record['answers'] for record in records]

  def add(self, answers: list[Any]) -> None:
    """Keeps the answers to the next batch.

    Raises:
      OSError: if they cannot be written.
    """
    if self._path is not None:
      os.makedirs(os.path.dirname(self._path), exist_ok=True)
      with open(self._path, 'a', encoding='utf-8') as file:
        file.write(json.dumps({'answers': answers}) + '\n')

  def forget(self) -> None:
    """Removes the file, once the answers are somewhere else."""
    if self._path is not None:
      with contextlib.suppress(OSError):
        os.remove(self._path)
        os.rmdir(os.path.dirname(self._path))


def forget_all(folder: str | os.PathLike[str]) -> None:
  """Removes all that is kept in a folder."""
  shutil.rmtree(os.path.join(folder, _FOLDER), ignore_errors=True)


def describe_backbone(backbone: Backbone) -> dict[str, Any]:
  """What tells a backbone from others, without reading its weights."""
  files = []
  if os.path.isdir(backbone.source):
    with os.scandir(backbone.source) as entries:
      files = sorted((e.name, e.stat().st_size, e.stat().st_mtime_ns) for e in entries)
  return {
      'source': backbone.source,
      'files': files,
      'dtype': str(backbone.module.dtype),
      'weights': backbone.held_as,
  }


def describe_injection(injection: Injection | None) -> dict[str, Any] | None:
  """What tells a prompt from others: sums of its arrays, and its settings."""
  if injection is None:
    return None
  sums = {name: sum_of_arrays([array]) for name, array in named_arrays(injection).items()}
  settings = (*SETTINGS, 'num_prompts')
  return sums | {name: getattr(injection, name) for name in settings}


def sum_of_arrays(arrays: Iterable[np.ndarray | Array]) -> str:
  """sha256 of arrays, their types and shapes."""
  digest = hashlib.sha256()
  for array in arrays:
    array = np.ascontiguousarray(partitioning.whole(array))
    digest.update(f'{array.dtype} {array.shape}'.encode())
    digest.update(array.reshape(-1).view(np.uint8))
  return digest.hexdigest()
