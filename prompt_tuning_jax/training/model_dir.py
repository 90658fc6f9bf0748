"""MODEL_DIR: one run's folder, which no other run may write to or silently resume."""

from __future__ import annotations

import difflib
import json
import os
import socket
import time
from collections.abc import Mapping
from typing import Any

_LOCK = 'run.lock'
_DESCRIPTION = 'run.json'


class ModelDir:
  """Holds the folder of a run for as long as the run lasts (a context manager).

  Entering creates the folder, checks that it can be written, takes its lock, and
  compares `description` with that of the run that was there before.

  Attributes:
    path: the folder.
    description: what may not change between a run and its resumption (backbone,
      method, task, batch size, seed, …), as JSON values.
  """

  def __init__(self, path: str | os.PathLike[str], description: Mapping[str, Any]):
    self.path = os.path.abspath(path)
    # Through JSON and back, so that tuples and lists compare as what they become.
    self.description = json.loads(json.dumps(description, sort_keys=True))
    self._locked = False

  def __enter__(self) -> ModelDir:
    try:
      os.makedirs(self.path, exist_ok=True)
      self._take_lock()
    except OSError as error:
      raise OSError(
          f'MODEL_DIR {self.path} cannot be written: {error}. Set MODEL_DIR to a folder '
          'that you may write to.'
      ) from error
    try:
      self._compare()
    except BaseException:
      self._release()
      raise
    return self

  def __exit__(self, *exception: object) -> None:
    self._release()

  def _take_lock(self) -> None:
    path = os.path.join(self.path, _LOCK)
    owner = {
        'pid': os.getpid(),
        'host': socket.gethostname(),
        'started': time.strftime('%Y-%m-%d %H:%M:%S'),
    }
    for _ in range(2):
      try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
      except FileExistsError:
        self._remove_dead_lock(path)
        continue
      with os.fdopen(handle, 'w') as file:
        json.dump(owner, file)
      self._locked = True
      return

  def _remove_dead_lock(self, path: str) -> None:
    try:
      with open(path, encoding='utf-8') as file:
        owner = json.load(file)
    except (OSError, json.JSONDecodeError):
      owner = {}
    pid, host = owner.get('pid'), owner.get('host')
    if pid is not None and host == socket.gethostname() and not _is_alive(pid):
      os.unlink(path)
      return
    raise ValueError(
        f'MODEL_DIR {self.path} is in use by another run (pid {pid} on {host}, started '
        f'{owner.get("started")}). Wait for it, stop it, or choose another MODEL_DIR; if '
        f'it is gone for certain, delete {path}.'
    )

  def _compare(self) -> None:
    path = os.path.join(self.path, _DESCRIPTION)
    if os.path.exists(path):
      with open(path, encoding='utf-8') as file:
        before = json.load(file)
      if before != self.description:
        difference = '\n'.join(
            difflib.unified_diff(
                json.dumps(before, indent=1, sort_keys=True).splitlines(),
                json.dumps(self.description, indent=1, sort_keys=True).splitlines(),
                'the run in MODEL_DIR',
                'this run',
                lineterm='',
                n=0,
            )
        )
        raise ValueError(
            f'MODEL_DIR {self.path} holds a run of another configuration:\n{difference}\n'
            'Set MODEL_DIR to a new folder, or restore the configuration to resume that run.'
        )
      return
    with open(path + '.tmp', 'w', encoding='utf-8') as file:
      json.dump(self.description, file, indent=1, sort_keys=True)
    os.replace(path + '.tmp', path)

  def _release(self) -> None:
    if self._locked:
      os.unlink(os.path.join(self.path, _LOCK))
      self._locked = False


def _is_alive(pid: int) -> bool:
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except PermissionError:
    return True
  return True
