"""Answers as they are found: an evaluation that was interrupted goes on where it stopped.

    with kept_in('/tmp/eval') as folder:
      kept = folder.answers(depends_on)
      found = kept.read()      # The batches that were done before it was interrupted,
      kept.add(batch)          # then each of the others. At the end all are forgotten.

Batches are the same whenever they are made, so that what is kept is a line for each of them. The
file is named by a sum of all that its answers depend on: whatever differs looks for a file of its
own, and what is there is not trusted because of where it lies.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from prompt_tuning_jax import partitioning
from prompt_tuning_jax.backbones.backbone import Backbone
from prompt_tuning_jax.data import provenance
from prompt_tuning_jax.injection_arrays import SETTINGS, named_arrays
from prompt_tuning_jax.json_files import as_json, canonical_json, read_jsonl, write_jsonl
from prompt_tuning_jax.typing import Array, Injection, PyTree
from prompt_tuning_jax.writing import check_local

_FOLDER = '.unfinished'


class AnswerFolder:
  """Where evaluations keep their answers; it knows those that were kept for its owner."""

  def __init__(self, folder: str | os.PathLike[str] | None):
    """Names the folder, in which there will be a hidden one; None keeps nothing.

    Of several processes each has only its share of a batch's answers: nothing is kept.

    Raises:
      ValueError: if the folder is not on this machine.
    """
    if folder is not None:
      check_local(folder)
    self._folder = folder if jax.process_count() == 1 else None
    self._kept: list[KeptAnswers] = []

  def answers(self, depends_on: Callable[[], Mapping[str, Any]]) -> KeptAnswers:
    """The answers of one evaluation.

    Args:
      depends_on: gives all that decides them, as values that JSON can hold; called where
        something is kept.
    """
    if self._folder is None:
      return KeptAnswers(None)
    all_of_it = {'library_version': provenance.library_version()} | as_json(depends_on())
    name = hashlib.sha256(canonical_json(all_of_it).encode()).hexdigest()[:16]
    self._kept.append(KeptAnswers(os.path.join(self._folder, _FOLDER, f'{name}.jsonl')))
    return self._kept[-1]

  def forget(self) -> None:
    """Removes what was kept for this owner, once the answers are somewhere else.

    What others keep there, and what they left, stays.
    """
    for kept in self._kept:
      kept.forget()


class KeptAnswers:
  """The answers to the first batches of one evaluation."""

  def __init__(self, path: str | None):
    """Names the file; None keeps nothing."""
    self._path = path
    self._count = 0

  def read(self) -> list[list[Any]]:
    """The answers to each batch that was done, in their order.

    Raises:
      ValueError: if the file is damaged elsewhere than at its end; names the line.
    """
    if self._path is None or not os.path.exists(self._path):
      return []
    of_batches: list[dict[str, Any]] = []
    for record in read_jsonl(self._path, needs=['batch', 'answers']):
      # Two processes that were started at once have written some twice.
      if record['batch'] == len(of_batches):
        of_batches.append(record)
    write_jsonl(self._path, of_batches)  # A line that was cut short is no beginning of the next.
    self._count = len(of_batches)
    return [record['answers'] for record in of_batches]

  def add(self, answers: list[Any]) -> None:
    """Keeps the answers to the next batch.

    Raises:
      OSError: if they cannot be written.
    """
    if self._path is not None:
      os.makedirs(os.path.dirname(self._path), exist_ok=True)
      with open(self._path, 'a', encoding='utf-8') as file:
        file.write(json.dumps({'batch': self._count, 'answers': answers}) + '\n')
      self._count += 1

  def forget(self) -> None:
    """Removes the file."""
    if self._path is not None:
      with contextlib.suppress(OSError):
        os.remove(self._path)
        os.rmdir(os.path.dirname(self._path))


# Where answers are to be kept: the folder, or what its owner made of it.
KeepIn = AnswerFolder | str | os.PathLike[str] | None


@contextlib.contextmanager
def kept_in(folder: KeepIn) -> Iterator[AnswerFolder]:
  """A folder for answers, which are forgotten at the end, unless somebody else owns it."""
  if isinstance(folder, AnswerFolder):
    yield folder
  else:
    own = AnswerFolder(folder)
    yield own
    own.forget()


def describe_backbone(backbone: Backbone, params: PyTree | None = None) -> dict[str, Any]:
  """What tells a backbone from others, so far as that is to be had without reading its weights.

  Args:
    backbone: the model.
    params: its weights, where they are not its own.
  """
  weights: Any
  if params is not None:
    weights = _sum_of_tree(params)
  elif os.path.exists(backbone.source):
    weights = [backbone.source, _files(backbone.source)]
  else:  # In a bucket, or in memory alone.
    weights = backbone.fingerprint or _sum_of_tree(backbone.params)
  return {'weights_of': weights, **backbone.computation()}


def _files(path: str) -> list[tuple[str, int, int]]:
  """Each file's name, size and time."""
  found = [path] if os.path.isfile(path) else []
  for folder, _, names in os.walk(path):
    found += [os.path.join(folder, name) for name in names]
  stats = ((name, os.stat(name)) for name in sorted(found))
  return [(os.path.relpath(name, path), stat.st_size, stat.st_mtime_ns) for name, stat in stats]


def describe_injection(injection: Injection | None) -> dict[str, Any] | None:
  """What tells a prompt from others: sums of its arrays, and its settings."""
  if injection is None:
    return None
  sums = {name: sum_of_arrays([array]) for name, array in named_arrays(injection).items()}
  settings = (*SETTINGS, 'num_prompts')
  return sums | {name: getattr(injection, name) for name in settings}


def _sum_of_tree(tree: PyTree) -> str:
  paths, arrays = zip(*jax.tree.leaves_with_path(tree), strict=True)
  names = np.array([jax.tree_util.keystr(path) for path in paths])
  return sum_of_arrays(itertools.chain([names], arrays))


def sum_of_arrays(arrays: Iterable[np.ndarray | Array]) -> str:
  """sha256 of arrays, their types and shapes."""
  digest = hashlib.sha256()
  for array in arrays:
    array = np.ascontiguousarray(partitioning.whole(array))
    digest.update(f'{array.dtype} {array.shape}'.encode())
    digest.update(array.reshape(-1).view(np.uint8))
  return digest.hexdigest()
