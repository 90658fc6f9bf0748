"""Saving and restoring what trains, and nothing else.

Orbax writes each state to `<model_dir>/checkpoint_<step>` and renames it into place
when it is complete, so a run that is killed at any moment leaves its last committed
step intact. Orbax does not notice a flipped bit; the sha256 sums kept beside the arrays
do. A step that cannot be trusted is named and skipped for the one before it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import shutil
import warnings
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from prompt_tuning_jax.typing import PyTree

_NAME = re.compile(r'checkpoint_(\d+)')


class CheckpointError(ValueError):
  """No saved state can be restored; the message says why and what to do."""


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
    keep: how many of the newest states stay.
    best_metric: key of the metrics by which the best state is kept as well; larger is
      better unless `best_mode` is 'min'.
  """

  def __init__(
      self,
      model_dir: str | os.PathLike[str],
      *,
      keep: int = 1,
      best_metric: str | None = None,
      best_mode: str = 'max',
  ):
    if best_mode not in ('max', 'min'):
      raise ValueError(f"best_mode is {best_mode!r}; it may be 'max' or 'min'.")
    self.model_dir = os.path.abspath(model_dir)
    self.keep = keep
    self.best_metric = best_metric
    self.best_mode = best_mode
    self._checkpointer = ocp.Checkpointer(ocp.CompositeCheckpointHandler())

  def path(self, step: int) -> str:
    """Folder of a step's state."""
    return os.path.join(self.model_dir, f'checkpoint_{step}')

  def save(
      self,
      step: int,
      state: PyTree,
      *,
      metrics: dict[str, float] | None = None,
      description: dict[str, Any] | None = None,
  ) -> str:
    """Commits the state of a step and removes those no longer kept.

    Args:
      step: the step the state belongs to; saving it again replaces it.
      state: any pytree of arrays.
      metrics: validation metrics at this step, by which the best is chosen.
      description: what the state belongs to (backbone, method, task); kept beside it.

    Raises:
      OSError: if the state cannot be written; older steps are intact and nothing
        partial stays behind.
    """
    state = jax.device_get(state)
    about = {
        'step': step,
        'metrics': metrics or {},
        'description': description or {},
        'sha256': _sums(state),
    }
    path = self.path(step)
    try:
      self._checkpointer.save(
          path,
          args=ocp.args.Composite(
              state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(about)
          ),
          force=True,
      )
    except Exception as error:
      for name in os.listdir(self.model_dir):
        if name.startswith(f'checkpoint_{step}.') and 'tmp' in name:
          shutil.rmtree(os.path.join(self.model_dir, name), ignore_errors=True)
      kept = ', '.join(str(saved.step) for saved in self.all()) or 'none'
      raise OSError(
          f'Could not save step {step} to {path}: {error}. Steps still intact: {kept}. '
          'Free some space or set MODEL_DIR to another disk and run the same command.'
      ) from error
    self._remove_superseded(step)
    return path

  def all(self) -> list[Saved]:
    """Every committed state, oldest first; stray folders are passed over, with a warning."""
    found = []
    if not os.path.isdir(self.model_dir):
      return found
    for name in os.listdir(self.model_dir):
      match = _NAME.fullmatch(name)
      path = os.path.join(self.model_dir, name)
      if match and os.path.isdir(path):
        about = self._about(path)
        if about is None:
          warnings.warn(f'{path} holds no committed state; it is ignored.', stacklevel=2)
        else:
          found.append(Saved(int(match.group(1)), path, about['metrics']))
    return sorted(found, key=lambda saved: saved.step)

  def best(self) -> Saved | None:
    """The state with the best metric, the later one where two are equal."""
    if self.best_metric is None:
      return None
    sign = 1.0 if self.best_mode == 'max' else -1.0
    measured = [saved for saved in self.all() if self.best_metric in saved.metrics]
    return max(
        measured, key=lambda s: (sign * s.metrics[self.best_metric], s.step), default=None
    )

  def latest(self) -> Saved | None:
    """The newest committed state."""
    saved = self.all()
    return saved[-1] if saved else None

  def restore(self, template: PyTree, saved: Saved | None = None) -> tuple[PyTree, int] | None:
    """Restores a state and its step.

    Args:
      template: a pytree of arrays or ShapeDtypeStructs like the state that was saved.
      saved: which state; the newest that is whole where None.

    Returns:
      (state, step), or None where nothing was ever saved.

    Raises:
      CheckpointError: if states exist but none can be trusted, or their arrays are not
        those of `template`; every mismatch is listed.
    """
    candidates = [saved] if saved else list(reversed(self.all()))
    problems = []
    for candidate in candidates:
      try:
        return self._restore(template, candidate.path), candidate.step
      except CheckpointError as error:
        problems.append(str(error))
        if candidate is not candidates[-1]:
          warnings.warn(f'{error} Falling back to the step before it.', stacklevel=2)
    if problems:
      raise CheckpointError(
          ' '.join(problems)
          + f' No usable state is left in {self.model_dir}: delete its checkpoint folders '
          'to start again, or set MODEL_DIR to a new folder.'
      )
    return None

  def description(self, saved: Saved) -> dict[str, Any]:
    """What `save` was told the state belongs to."""
    return (self._about(saved.path) or {}).get('description', {})

  def _about(self, path: str) -> dict[str, Any] | None:
    try:
      restored = self._checkpointer.restore(
          path, args=ocp.args.Composite(about=ocp.args.JsonRestore())
      )
      about = restored['about']
      return about if about and 'sha256' in about else None
    except Exception:  # Whatever Orbax raises on a folder that is not a checkpoint.
      return None

  def _restore(self, template: PyTree, path: str) -> PyTree:
    about = self._about(path)
    if about is None:
      raise CheckpointError(f'{path} holds no committed state.')
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), template
    )
    expected = {name: leaf.shape for name, leaf in _named_leaves(abstract)}
    missing = sorted(set(expected) ^ set(about['sha256']))
    if missing:
      raise CheckpointError(
          f'{path} belongs to another run: the arrays {", ".join(missing)} are in only one '
          'of this run and that state.'
      )
    try:
      restored = self._checkpointer.restore(
          path, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
      )['state']
    except Exception as error:
      raise CheckpointError(f'{path} cannot be read ({error}).') from error
    sums = _sums(jax.device_get(restored))
    wrong = sorted(name for name, value in sums.items() if about['sha256'][name] != value)
    if wrong:
      shapes = ', '.join(f'{name} {list(expected[name])}' for name in wrong)
      raise CheckpointError(
          f'{path} is damaged or of another shape: the sha256 sums of {shapes} do not match.'
      )
    return restored

  def _remove_superseded(self, current: int) -> None:
    saved = self.all()
    stay = {s.step for s in saved[-self.keep :]} | {current}
    best = self.best()
    if best is not None:
      stay.add(best.step)
    for old in saved:
      if old.step not in stay:
        shutil.rmtree(old.path, ignore_errors=True)


def _named_leaves(tree: PyTree) -> list[tuple[str, Any]]:
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return [(jax.tree_util.keystr(path, simple=True, separator='/'), leaf) for path, leaf in leaves]


def _sums(tree: PyTree) -> dict[str, str]:
  sums = {}
  for name, leaf in _named_leaves(tree):
    array = np.ascontiguousarray(leaf)
    digest = hashlib.sha256(f'{array.dtype} {array.shape}'.encode())
    digest.update(array.tobytes())
    sums[name] = digest.hexdigest()
  return sums
