"""Arrays and a manifest in one safetensors file, written whole and checked on reading."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy


class DamagedFileError(ValueError):
  """The file is truncated, was changed, or is something else."""


def write(
    path: str, manifest: dict[str, Any], arrays: Mapping[str, np.ndarray]
) -> None:
  """Writes a file that `read` reads; it appears whole or not at all.

  Raises:
    OSError: if the disk is full or the folder cannot be written to.
  """
  text = json.dumps(manifest, ensure_ascii=False, sort_keys=True)
  metadata = {'manifest': text, 'sha256': _sha256(text, arrays)}
  content = safetensors.numpy.save(dict(arrays), metadata)
  replace(path, lambda file: file.write(content))


def read(path: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """Reads the manifest and the arrays of a file that `write` wrote.

  Raises:
    FileNotFoundError: if there is no such file.
    DamagedFileError: if the file is truncated or changed.
  """
  if not os.path.isfile(path):
    raise FileNotFoundError(f'No tokenised task at {path}.')
  try:
    with safetensors.safe_open(path, framework='np') as file:
      metadata = file.metadata() or {}
      arrays = {name: file.get_tensor(name) for name in file.keys()}
  except (safetensors.SafetensorError, OSError, ValueError, TypeError) as error:
    raise DamagedFileError(
        f'{path} is truncated, damaged or not a safetensors file ({error}).'
    ) from error
  text = metadata.get('manifest', '')
  if metadata.get('sha256') != _sha256(text, arrays):
    raise DamagedFileError(
        f'{path} does not have the sha256 sum it was written with: it was changed or '
        'damaged.'
    )
  return json.loads(text), arrays


def replace(path: str, write_to: Callable[[Any], Any]) -> None:
  """Writes beside `path` and renames, so that no reader ever sees half a file."""
  folder = os.path.dirname(os.path.abspath(path))
  os.makedirs(folder, exist_ok=True)
  handle, partial = tempfile.mkstemp(dir=folder, prefix='partial-')
  try:
    with os.fdopen(handle, 'wb') as file:
      write_to(file)
    os.chmod(partial, 0o644)
    os.replace(partial, path)
  finally:
    if os.path.exists(partial):
      os.remove(partial)


def _sha256(manifest: str, arrays: Mapping[str, np.ndarray]) -> str:
  digest = hashlib.sha256(manifest.encode())
  for name in sorted(arrays):
    array = np.ascontiguousarray(arrays[name])
    digest.update(f'{name} {array.dtype.str} {array.shape}'.encode())
    digest.update(array.tobytes())
  return digest.hexdigest()
