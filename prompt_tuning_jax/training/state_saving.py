"""Saving and restoring what trains, and nothing else.

Orbax writes a state's arrays into `checkpoint_<step>.tmp`; a manifest with the sha256
sum of every file and of itself joins them, and the folder gets its name. So a run that is
killed at any moment leaves its last committed step intact, and a flipped bit, which Orbax
does not notice, is found before anything is restored. A step that is damaged is named and
passed over for the one before it.

Of several processes the main one alone reads and writes; every process calls the public
methods, and is told what that found.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding

from prompt_tuning_jax import partitioning, processes
from prompt_tuning_jax.json_files import as_json, canonical_json
from prompt_tuning_jax.typing import PyTree
from prompt_tuning_jax.writing import file_sha256, written_whole

_NAME = re.compile(r'checkpoint_(\d+)')
_UNFINISHED = re.compile(r'checkpoint_\d+(\.old)?\.tmp')
_MANIFEST = 'manifest.json'
_ARRAYS = 'state'


class CheckpointError(ValueError):
  """No saved state can be restored; the message says why and what to do."""


class DamagedError(CheckpointError):
  """A state was whole once and is so no more."""


@dataclasses.dataclass(frozen=True)
class Saved:
  """One state on disk: its step, its folder and the metrics measured at that step."""

  step: int
  path: str
  metrics: dict[str, float]


class StateSaver:
  """Saves a run's states, keeps the newest and the best, and restores.

  Attributes:
    model_dir: the folder of the run.
    keep: how many of the newest states stay; with two, a damaged one has a predecessor.
    best_metric: key of the metrics by which the best state is kept as well; larger is
      better unless `best_mode` is 'min'.
  """

  def __init__(
      self,
      model_dir: str | os.PathLike[str],
      *,
      keep: int = 2,
      best_metric: str | None = None,
      best_mode: str = 'max',
  ):
    if best_mode not in ('max', 'min'):
      raise ValueError(f"best_mode is {best_mode!r}; it may be 'max' or 'min'.")
    if keep < 1:
      raise ValueError(f'keep_checkpoints is {keep}; at least 1 state has to stay.')
    self.model_dir = os.path.abspath(model_dir)
    self.keep = keep
    self.best_metric = best_metric
    self.best_mode = best_mode
    self._checkpointer = _checkpointer()

  def path(self, step: int) -> str:
    """Folder of a step's state."""
    return os.path.join(self.model_dir, f'checkpoint_{step}')

  def save(
      self, step: int, state: PyTree, *, description: Mapping[str, Any] | None = None
  ) -> str:
    """Commits the state of a step and removes those no longer kept.

    Args:
      step: the step the state belongs to; a state of that step or beyond, left by a run
        that had to go back, is replaced.
      state: any pytree of arrays.
      description: what the state belongs to (backbone, method, task); kept beside it.

    Returns:
      The folder of the state.

    Raises:
      OSError: if the state cannot be written; older steps are intact and nothing
        partial stays behind.
    """
    held = partitioning.whole_in_main(state)
    return processes.from_main(
        lambda: self._save(step, dict(_named_leaves(held)), description)
    )

  def _save(
      self, step: int, arrays: dict[str, np.ndarray], description: Mapping[str, Any] | None
  ) -> str:
    path = self.path(step)
    unfinished = path + '.tmp'
    self._remove_unfinished()
    try:
      os.makedirs(unfinished)
      self._checkpointer.save(
          os.path.join(unfinished, _ARRAYS), args=ocp.args.PyTreeSave(arrays)
      )
      manifest = {
          'step': step,
          'metrics': {},
          'description': as_json(description or {}),
          'arrays': {name: [str(a.dtype), *a.shape] for name, a in arrays.items()},
          'files': {
              name: file_sha256(os.path.join(unfinished, name)) for name in _files(unfinished)
          },
      }
      _write_manifest(unfinished, manifest)
      self._remove(path)
      os.rename(unfinished, path)
    except Exception as error:  # Whatever Orbax and TensorStore raise on a full disk.
      kept = ', '.join(str(saved.step) for saved in self._committed()) or 'none'
      raise OSError(
          f'Could not save step {step} to {path}: {error}. Steps still intact: {kept}. '
          'Free some space, or move MODEL_DIR to another disk, and run the same command '
          'again.'
      ) from error
    finally:
      self._remove_unfinished()
    self._remove_superseded(step)
    return path

  def record_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
    """Keeps what was measured at a saved step; the best state is chosen by it."""

    def record() -> None:
      path = self.path(step)
      manifest = _read_manifest(path)
      _write_manifest(path, manifest | {'metrics': as_json(metrics)})
      self._remove_superseded(step)

    processes.from_main(record)

  def all(self) -> list[Saved]:
    """Every committed state, oldest first; what else lies there is named in a warning."""

    def committed() -> list[Saved]:
      for why in self._others().values():
        warnings.warn(f'{why} It is ignored.', stacklevel=4)
      return self._committed()

    return processes.from_main(committed)

  def best(self) -> Saved | None:
    """The state with the best metric, the later one where two are equal."""
    return processes.from_main(lambda: self._best(self._committed()))

  def latest(self) -> Saved | None:
    """The newest committed state."""
    return next(reversed(processes.from_main(self._committed)), None)

  def metrics(self, step: int) -> dict[str, float]:
    """What was measured at a step; nothing where it is not saved or not measured."""
    committed = processes.from_main(self._committed)
    return next((saved.metrics for saved in committed if saved.step == step), {})

  def description(self, saved: Saved) -> dict[str, Any]:
    """What `save` was told the state belongs to."""
    return processes.from_main(lambda: _read_manifest(saved.path)['description'])

  def restore(self, template: PyTree, saved: Saved | None = None) -> tuple[PyTree, int] | None:
    """Restores a state and its step.

    Args:
      template: a pytree of arrays or ShapeDtypeStructs like the state that was saved.
      saved: which state; the newest that is whole where None.

    Returns:
      (state, step), or None where nothing was ever saved.

    Raises:
      CheckpointError: if states exist but all are damaged, or their arrays are not
        those of `template`; every mismatch is listed.
    """
    leaves = _named_leaves(template)
    arrays: dict[str, np.ndarray] = {}

    def read() -> int | None:
      step, found = self._read(leaves, saved) or (None, {})
      arrays.update(found)
      return step

    step = processes.from_main(read)
    if step is None:
      return None
    restored = [
        _like(leaf, processes.broadcast(arrays.pop(name, None), leaf.shape, leaf.dtype))
        for name, leaf in leaves
    ]
    return jax.tree.unflatten(jax.tree.structure(template), restored), step

  def restore_best(self, template: PyTree) -> tuple[PyTree, Saved]:
    """Restores the best state that is whole; where none was measured, the newest.

    Raises:
      CheckpointError: if none is whole, or as `restore`.
    """
    problems = []
    for saved in processes.from_main(lambda: self._best_first(self._committed())):
      try:
        return self.restore(template, saved)[0], saved
      except DamagedError as error:
        problems.append(str(error))
        warnings.warn(f'{error} It is passed over for the next best.', stacklevel=2)
    raise CheckpointError(
        f'No state in {self.model_dir} can be restored. {" ".join(problems)} To start again, '
        'delete its checkpoint folders or set MODEL_DIR to a new folder.'
    )

  def _read(
      self, leaves: list[tuple[str, Any]], saved: Saved | None
  ) -> tuple[int, dict[str, np.ndarray]] | None:
    """The step and the arrays of a state; the newest that is whole where `saved` is None."""
    if saved is not None:
      return saved.step, self._read_arrays(leaves, saved.path)
    problems = [
        why
        for path, why in self._others().items()
        if os.path.exists(os.path.join(path, _MANIFEST)) and not path.endswith('.tmp')
    ]
    for candidate in reversed(self.all()):
      try:
        return candidate.step, self._read_arrays(leaves, candidate.path)
      except DamagedError as error:
        problems.append(str(error))
        warnings.warn(f'{error} It is passed over for the step before it.', stacklevel=5)
    if problems:
      raise CheckpointError(
          f'No state in {self.model_dir} can be restored. {" ".join(problems)} To start '
          'again, delete its checkpoint folders or set MODEL_DIR to a new folder.'
      )
    return None

  def _read_arrays(self, leaves: list[tuple[str, Any]], path: str) -> dict[str, np.ndarray]:
    manifest = _read_manifest(path)
    _check_arrays(
        {name: [str(leaf.dtype), *leaf.shape] for name, leaf in leaves},
        manifest['arrays'],
        path,
    )
    _check_files(path, manifest['files'])
    return self._checkpointer.restore(
        os.path.join(path, _ARRAYS),
        args=ocp.args.PyTreeRestore(
            restore_args={name: ocp.RestoreArgs(np.ndarray) for name, _ in leaves}
        ),
    )

  def _committed(self) -> list[Saved]:
    found = []
    for name in _entries(self.model_dir):
      path = os.path.join(self.model_dir, name)
      if _NAME.fullmatch(name):
        try:
          manifest = _read_manifest(path)
        except CheckpointError:
          continue
        found.append(Saved(manifest['step'], path, manifest['metrics']))
    return sorted(found, key=lambda saved: saved.step)

  def _others(self) -> dict[str, str]:
    """Why what is called like a state is none, by path."""
    committed = {saved.path for saved in self._committed()}
    paths = [
        os.path.join(self.model_dir, name)
        for name in sorted(_entries(self.model_dir))
        if _NAME.fullmatch(name) or _UNFINISHED.fullmatch(name)
    ]
    return {path: _why_not_committed(path) for path in paths if path not in committed}

  def _best(self, states: list[Saved]) -> Saved | None:
    first = next(iter(self._best_first(states)), None)
    return first if first and self._is_measured(first) else None

  def _best_first(self, states: list[Saved]) -> list[Saved]:
    """From best to worst, later ones first where two are equal; then what was not measured."""
    sign = 1.0 if self.best_mode == 'max' else -1.0

    def rank(saved: Saved) -> tuple[bool, float, int]:
      measured = self._is_measured(saved)
      return measured, sign * saved.metrics[self.best_metric] if measured else 0.0, saved.step

    return sorted(states, key=rank, reverse=True)

  def _is_measured(self, saved: Saved) -> bool:
    return math.isfinite(saved.metrics.get(self.best_metric, math.nan))

  def _remove_superseded(self, current: int) -> None:
    committed = self._committed()
    # A run that had to go back to an older state writes the later ones anew.
    valid = [saved for saved in committed if saved.step <= current]
    stay = [*valid[-self.keep :], self._best(valid)]
    for saved in committed:
      if saved not in stay:
        self._remove(saved.path)

  def _remove(self, path: str) -> None:
    """Removes a state; a run that is killed meanwhile leaves no half of one."""
    if os.path.lexists(path):
      doomed = path + '.old.tmp'
      shutil.rmtree(doomed, ignore_errors=True)
      os.rename(path, doomed)
      shutil.rmtree(doomed, ignore_errors=True)

  def _remove_unfinished(self) -> None:
    """Removes what a run that was killed while saving has left, and our own remains."""
    for name in _entries(self.model_dir):
      if name.startswith('checkpoint_') and name.endswith('.tmp'):
        shutil.rmtree(os.path.join(self.model_dir, name), ignore_errors=True)


def _checkpointer() -> ocp.Checkpointer:
  """Of several processes only the main one calls it, so that it must not wait for others."""
  options = ocp.options.MultiprocessingOptions()
  if jax.process_count() > 1:
    options = ocp.options.MultiprocessingOptions(
        primary_host=0, active_processes={0}, barrier_sync_key_prefix='main'
    )
  return ocp.Checkpointer(
      ocp.PyTreeCheckpointHandler(multiprocessing_options=options),
      multiprocessing_options=options,
  )


def run_and_step(path: str | os.PathLike[str]) -> tuple[str, bool]:
  """The run's folder that a CHECKPOINT_PATH is in, and whether it names one state of it."""
  folder, name = os.path.split(os.path.abspath(path))
  is_step = name.startswith('checkpoint_')
  return (folder if is_step else os.path.abspath(path)), is_step


def nothing_saved(path: str | os.PathLike[str]) -> FileNotFoundError:
  """The error of a CHECKPOINT_PATH that leads to no state."""
  return FileNotFoundError(
      f'CHECKPOINT_PATH {os.path.abspath(path)} holds no saved state. Name the MODEL_DIR of a '
      'run, or a checkpoint_<step> in it.'
  )


def _entries(folder: str) -> list[str]:
  return os.listdir(folder) if os.path.isdir(folder) else []


def _files(folder: str) -> list[str]:
  """Relative paths of all files in a folder, the manifest aside."""
  found = [
      os.path.relpath(os.path.join(parent, name), folder)
      for parent, _, names in os.walk(folder)
      for name in names
  ]
  return sorted(name for name in found if name != _MANIFEST)


def _named_leaves(tree: PyTree) -> list[tuple[str, Any]]:
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return [(jax.tree_util.keystr(path, simple=True, separator='/'), leaf) for path, leaf in leaves]


def _like(template: Any, array: np.ndarray) -> jax.Array:
  """The array where the template's lies, on a mesh or not."""
  # Copied, for what is donated to a train step must be JAX's own memory.
  array = np.array(array)
  place = getattr(template, 'sharding', None)
  if isinstance(place, NamedSharding):
    return jax.make_array_from_callback(array.shape, place, lambda index: array[index])
  return jnp.array(array)


def _write_manifest(folder: str, manifest: dict[str, Any]) -> None:
  manifest = {name: value for name, value in manifest.items() if name != 'sha256'}
  manifest['sha256'] = _sum(manifest)
  with written_whole(os.path.join(folder, _MANIFEST)) as unfinished:
    with open(unfinished, 'w', encoding='utf-8') as file:
      json.dump(manifest, file, indent=1)


def _read_manifest(folder: str) -> dict[str, Any]:
  path = os.path.join(folder, _MANIFEST)
  try:
    with open(path, encoding='utf-8') as file:
      manifest = json.load(file)
    recorded = manifest.pop('sha256')
  except (OSError, ValueError, KeyError, AttributeError) as error:
    raise DamagedError(f'{path} cannot be read ({error!r}).') from error
  if recorded != _sum(manifest):
    raise DamagedError(f'{path} is damaged: it does not have the sha256 that it records.')
  return manifest


def _sum(manifest: Mapping[str, Any]) -> str:
  return hashlib.sha256(canonical_json(manifest).encode()).hexdigest()


def _why_not_committed(path: str) -> str:
  if path.endswith('.tmp'):
    return f'{path} is being written or removed, or was left by a run that was killed then.'
  if not os.path.exists(os.path.join(path, _MANIFEST)):
    return f'{path} holds no state of a run (it has no {_MANIFEST}).'
  try:
    _read_manifest(path)
  except DamagedError as error:
    return str(error)
  return f'{path} has only just been written.'


def _check_arrays(
    expected: Mapping[str, list], found: Mapping[str, list], path: str
) -> None:
  def shown(arrays: Mapping[str, list], name: str) -> str:
    if name not in arrays:
      return 'nothing'
    dtype, *shape = arrays[name]
    return f'{dtype}{shape}'

  mismatches = [
      f'{name}: {shown(found, name)} there, {shown(expected, name)} in this run'
      for name in sorted(expected.keys() | found.keys())
      if shown(found, name) != shown(expected, name)
  ]
  if mismatches:
    raise CheckpointError(
        f'{path} was saved by another run than this:\n  '
        + '\n  '.join(mismatches)
        + '\nUse the backbone, method and optimiser of the run that saved it, or set '
        'MODEL_DIR to a new folder.'
    )


def _check_files(path: str, sums: Mapping[str, str]) -> None:
  for name, expected in sums.items():
    file = os.path.join(path, name)
    if not os.path.isfile(file):
      raise DamagedError(f'{path} is damaged: its file {name} is missing.')
    if file_sha256(file) != expected:
      raise DamagedError(
          f'{path} is damaged: {name} does not have the sha256 that {_MANIFEST} records.'
      )
