"""MODEL_DIR: one run's folder, which no other run may write to or silently resume."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from prompt_tuning_jax import processes
from prompt_tuning_jax.training.description import differences
from prompt_tuning_jax.writing import check_local, written_whole

_LOCK = 'run.lock'
_DESCRIPTION = 'run.json'

# What flock says where the file system has no locks, as some network ones.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)


class ModelDir:
  """Holds the folder of a run for as long as the run lasts (a context manager).

      with ModelDir(path) as folder:
        folder.claim(description)
        …

  Entering creates the folder, finds out whether it can be written, and takes its lock.
  The lock is the kernel's, so it is gone with the process however that ends. Of several
  processes the main one does all that; an error is every process's.

  Attributes:
    path: the folder.
  """

  def __init__(self, path: str | os.PathLike[str]):
    """Raises ValueError if the folder is not on this machine."""
    check_local(path)
    self.path = os.path.abspath(path)
    self._lock: TextIO | None = None
    self._is_new = False

  def __enter__(self) -> ModelDir:
    processes.from_main(self._enter)
    return self

  def _enter(self) -> None:
    try:
      os.makedirs(self.path, exist_ok=True)
      self._take_lock()
    except OSError as error:
      raise OSError(
          f'MODEL_DIR {self.path} cannot be written: {error}. Set MODEL_DIR to a folder '
          'that you may write to.'
      ) from error

  def __exit__(self, *exception: object) -> None:
    if self._lock is None:
      return
    with contextlib.suppress(FileNotFoundError):
      if self._is_new and not self._holds_states():
        os.unlink(os.path.join(self.path, _DESCRIPTION))
    with contextlib.suppress(FileNotFoundError):
      # Removed while it is held: whoever opened it meanwhile sees that it is gone.
      os.unlink(self._lock.name)
    self._lock.close()

  def claim(self, description: Mapping[str, Any]) -> None:
    """Says what the run is; `run.json` keeps it for those that come later.

    May be called again as more becomes known. A run that ended, or was killed, before it
    had a state to keep does not bind the next one.

    Args:
      description: what may not change between a run and its resumption (backbone,
        method, optimiser, task, batch size, seed, …), as JSON values.

    Raises:
      ValueError: if the folder holds a run of another description, or another process has
        another; says what differs.
    """
    # Through JSON and back, so that tuples and lists compare as what they become.
    description = json.loads(json.dumps(description))
    processes.check_same(description, 'what they run')
    processes.from_main(lambda: self._claim(description))

  def _claim(self, description: dict[str, Any]) -> None:
    path = os.path.join(self.path, _DESCRIPTION)
    if os.path.exists(path) and not self._is_new and self._holds_states():
      before = _read(path)
      # What `before` lacks, an older version did not say, or a run killed early.
      known = [name for name in description if name in before]
      different = differences(
          {name: before[name] for name in known},
          {name: description[name] for name in known},
      )
      if different:
        raise ValueError(
            f'MODEL_DIR {self.path} holds a run of another configuration:\n  '
            + '\n  '.join(different)
            + '\nSet MODEL_DIR to a new folder, or restore the configuration to resume that '
            f'run. If the difference does not matter, delete {path}.'
        )
      return
    self._is_new = True
    with written_whole(path) as unfinished:
      Path(unfinished).write_text(json.dumps(description, indent=1) + '\n', encoding='utf-8')

  def _holds_states(self) -> bool:
    return any(name.startswith('checkpoint_') for name in os.listdir(self.path))

  def _take_lock(self) -> None:
    path = os.path.join(self.path, _LOCK)
    while self._lock is None:
      lock = open(path, 'a+', encoding='utf-8')
      try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        lock.seek(0)
        owner = lock.read().strip() or 'which has only just started'
        lock.close()
        raise ValueError(
            f'MODEL_DIR {self.path} is in use by another run ({owner}). Wait for it, stop '
            'it, or choose another MODEL_DIR.'
        ) from None
      except OSError as error:
        if error.errno not in _NO_LOCKS:
          lock.close()
          raise
        warnings.warn(
            f'The file system of MODEL_DIR {self.path} has no locks ({error}): make sure '
            'that no other run writes there.',
            stacklevel=3,
        )
      # A run that has just ended may have removed the file after it was opened here.
      if _is_file(lock, path):
        self._lock = lock
      else:
        lock.close()
    self._lock.truncate(0)
    self._lock.write(
        f'pid {os.getpid()} on {socket.gethostname()}, started '
        f'{time.strftime("%Y-%m-%d %H:%M:%S")}\n'
    )
    self._lock.flush()


def _read(path: str) -> dict[str, Any]:
  try:
    with open(path, encoding='utf-8') as file:
      return json.load(file)
  except ValueError as error:
    raise ValueError(
        f'{path}, which says what run the folder holds, is damaged ({error}). If you know '
        'that this command is the one to resume it, delete the file.'
    ) from error


def _is_file(file: TextIO, path: str) -> bool:
  """Whether an open file is the one that `path` names."""
  try:
    return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
  except FileNotFoundError:
    return False
