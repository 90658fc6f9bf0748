"""zarr arrays of a checkpoint, each a directory of chunks, through tensorstore.

To zarr a chunk that is missing is one of zeros. In a checkpoint it is a file that was not
copied, so that `check_array` demands all of them.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import tensorstore

from prompt_tuning_jax.checkpoints.source import Box
from prompt_tuning_jax.checkpoints.storage import Folder

# The file that describes an array, in zarr's versions 2 and 3, and tensorstore's driver.
METADATA_FILES = {'.zarray': 'zarr', 'zarr.json': 'zarr3'}
_CHUNK_BYTES = 64 * 1024 * 1024  # before compression


def check_array(
    folder: Folder, store: str, *, metadata_file: str = '.zarray'
) -> jax.ShapeDtypeStruct:
  """Shape and type of the array `store` of a directory, all of whose chunks are there.

  Raises:
    FileNotFoundError: if its description or a chunk is missing.
    ValueError: if the description is damaged.
  """
  metadata_path = folder.path(store, metadata_file)
  try:
    metadata = json.loads(folder.read(store, metadata_file))
    is_v2 = METADATA_FILES[metadata_file] == 'zarr'
    shape, dtype, chunk_shape, name_chunk = (_version_2 if is_v2 else _version_3)(metadata)
  except FileNotFoundError:
    raise FileNotFoundError(
        f'{metadata_path} is missing: the checkpoint was not copied completely. Copy it '
        'again.'
    ) from None
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(
        f'{metadata_path} does not describe a zarr array ({error!r}); it was probably cut '
        'off. Copy the checkpoint again.'
    ) from error
  if any(chunk < 1 for chunk in chunk_shape) or len(chunk_shape) != len(shape):
    raise ValueError(
        f'{metadata_path} says chunks of {list(chunk_shape)} for the shape {list(shape)}; it '
        'is damaged. Copy the checkpoint again.'
    )
  counts = [math.ceil(n / chunk) for n, chunk in zip(shape, chunk_shape, strict=True)]
  if math.prod(counts) > len(folder.files):
    raise FileNotFoundError(
        f'{folder.path(store)} should have {math.prod(counts):,} chunks, and most are missing: '
        'the checkpoint was not copied completely. Copy it again.'
    )
  for position in itertools.product(*map(range, counts)):
    chunk = name_chunk(position)
    if f'{store}/{chunk}' not in folder.files:
      raise FileNotFoundError(
          f'{folder.path(store, chunk)} is missing, one of {math.prod(counts)} chunks of '
          'the array: the checkpoint was not copied completely. Copy it again.'
      )
  return jax.ShapeDtypeStruct(shape, dtype)


def _version_2(metadata):
  separator = metadata.get('dimension_separator', '.')

  def name_chunk(position):
    return separator.join(map(str, position)) or '0'

  shape = tuple(metadata['shape'])
  return shape, jnp.dtype(metadata['dtype']), metadata['chunks'], name_chunk


def _version_3(metadata):
  encoding = metadata['chunk_key_encoding']
  separator = encoding.get('configuration', {}).get('separator', '/')

  def name_chunk(position):
    return separator.join(['c', *map(str, position)])

  shape = tuple(metadata['shape'])
  chunk_shape = metadata['chunk_grid']['configuration']['chunk_shape']
  return shape, jnp.dtype(metadata['data_type']), chunk_shape, name_chunk


def read_array(
    folder: Folder, store: str, box: Box = ..., *, metadata_file: str = '.zarray'
) -> np.ndarray:
  """The array `store` of a directory, or what lies in a box of it.

  Raises:
    ValueError: if a chunk cannot be read.
  """
  spec = {'driver': METADATA_FILES[metadata_file], 'kvstore': folder.spec(store)}
  try:
    return tensorstore.open(spec, open=True).result()[box].read().result()
  except (ValueError, OSError) as error:
    raise ValueError(
        f'{folder.path(store)} cannot be read ({error}). A chunk of it was probably cut off: '
        'copy the checkpoint again.'
    ) from error


def write_array(store: str | os.PathLike[str], array: np.ndarray) -> dict[str, Any]:
  """Writes an array as T5X writes its own, in zarr's version 2.

  Returns:
    Its description, as T5X's index repeats it.
  """
  row_bytes = array.itemsize * math.prod(array.shape[1:])
  rows = min(max(_CHUNK_BYTES // row_bytes, 1), array.shape[0])
  is_bfloat16 = array.dtype == ml_dtypes.bfloat16
  metadata = {
      'shape': list(array.shape),
      'chunks': [rows, *array.shape[1:]],
      'dtype': 'bfloat16' if is_bfloat16 else array.dtype.newbyteorder('<').str,
      'compressor': {'id': 'gzip', 'level': 1},
  }
  spec = {
      'driver': 'zarr',
      'kvstore': {'driver': 'file', 'path': os.fspath(store)},
      'metadata': metadata,
      # A chunk of zeros is a file too: a missing one is an error, not zeros.
      'store_data_equal_to_fill_value': True,
  }
  tensorstore.open(spec, create=True).result().write(array).result()
  return metadata
