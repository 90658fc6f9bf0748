"""Arrays and a manifest in one safetensors file, written whole and checked on reading."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from prompt_tuning_jax.writing import written_whole


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
  with written_whole(path) as unfinished:
    safetensors.numpy.save_file(dict(arrays), unfinished, metadata)


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


def _sha256(manifest: str, arrays: Mapping[str, np.ndarray]) -> str:
  return sum_of_arrays(sorted(arrays.items()), manifest)


def sum_of_arrays(arrays: Iterable[tuple[str, Any]], text: str = '') -> str:
  """sha256, in hexadecimal, of a text and of arrays in their order: names, types, shapes, values.

  Args:
    arrays: (name, array) of each; they may be made one at a time.
    text: what is summed before them.
  """
  digest = hashlib.sha256(text.encode())
  for name, array in arrays:
    array = np.ascontiguousarray(array)
    digest.update(f'{name} {array.dtype.str} {array.shape}'.encode())
    digest.update(array.reshape(-1).view(np.uint8))
  return digest.hexdigest()
