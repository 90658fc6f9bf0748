"""Answers as they are found: an evaluation that was interrupted goes on where it stopped.

    with kept_in('/tmp/eval') as folder:
      kept = folder.answers(backbone, params, depends_on)
      found = kept.read()      # The batches that were done before it was interrupted,
      kept.add(batch)          # then each of the others. At the end all are forgotten.

Batches are the same whenever they are made, so that what is kept is a line for each of them. The
file is named by a sum of all that its answers depend on: whatever differs looks for a file of its
own, and what is there is not trusted because of where it lies.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from prompt_tuning_jax.backbones.backbone import Backbone
from prompt_tuning_jax.data import array_file, provenance
from prompt_tuning_jax.injection_arrays import SETTINGS, named_arrays
from prompt_tuning_jax.json_files import as_json, canonical_json, read_jsonl, write_jsonl
from prompt_tuning_jax.typing import Injection, PyTree
from prompt_tuning_jax.writing import check_local, is_remote

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
    # The last weights that were summed: those of a run answer many tasks and prompts.
    self._params: PyTree | None = None
    self._sum_of_params = ''

  def answers(
      self,
      backbone: Backbone,
      params: PyTree | None,
      depends_on: Callable[[], Mapping[str, Any]],
  ) -> KeptAnswers:
    """The answers of one evaluation.

    Args:
      backbone: the model.
      params: its weights, where they are not its own.
      depends_on: gives all else that decides the answers, as values that JSON can hold; called
        where something is kept.
    """
    if self._folder is None:
      return KeptAnswers(None)
    all_of_it = as_json({
        'library_version': provenance.library_version(),
        'weights': self._weights_of(backbone, params),
        'computation': backbone.computation(),
        **depends_on(),
    })
    name = hashlib.sha256(canonical_json(all_of_it).encode()).hexdigest()[:16]
    self._kept.append(KeptAnswers(os.path.join(self._folder, _FOLDER, f'{name}.jsonl')))
    return self._kept[-1]

  def _weights_of(self, backbone: Backbone, params: PyTree | None) -> Any:
    """What tells weights from others; where they lie in files, these are not read for it.

    Of a bucket the name counts alone.
    """
    if params is None:
      if is_remote(backbone.source):
        return backbone.source
      if os.path.exists(backbone.source):
        return [backbone.source, _files(backbone.source, self._folder)]
      if backbone.fingerprint:
        return backbone.fingerprint
      params = backbone.params
    if params is not self._params:
      self._params, self._sum_of_params = params, _sum_of_tree(params)
    return self._sum_of_params

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


def _files(path: str, without: str | os.PathLike[str]) -> list[tuple[str, int, int]]:
  """Name, size and time of each file below a path, but for hidden ones and one folder's."""
  found = [path] if os.path.isfile(path) else []
  without = os.path.realpath(without)
  for folder, folders, names in os.walk(path):
    folders[:] = [
        name
        for name in folders
        if not name.startswith('.') and os.path.realpath(os.path.join(folder, name)) != without
    ]
    found += [os.path.join(folder, name) for name in names if not name.startswith('.')]
  described = []
  for name in sorted(found):
    with contextlib.suppress(FileNotFoundError):  # A link to nothing, or gone meanwhile.
      stat = os.stat(name)
      described.append((os.path.relpath(name, path), stat.st_size, stat.st_mtime_ns))
  return described


def describe_injection(injection: Injection | None) -> dict[str, Any] | None:
  """What tells a prompt from others: a sum of its arrays, and its settings."""
  if injection is None:
    return None
  settings = {name: getattr(injection, name) for name in (*SETTINGS, 'num_prompts')}
  return {'arrays': array_file.sum_of_arrays(named_arrays(injection).items()), **settings}


def _sum_of_tree(tree: PyTree) -> str:
  # JAX keeps what was fetched of an array beside it, as long as that lives: of copies, no longer.
  return array_file.sum_of_arrays(
      (jax.tree_util.keystr(path), jnp.copy(leaf) if isinstance(leaf, jax.Array) else leaf)
      for path, leaf in jax.tree.leaves_with_path(tree)
  )
