"""Orbax checkpoints of T5X runs: `checkpoint_<step>/state`, in each of Orbax's layouts.

Arrays are zarr directories called by the path in the tree, `target.encoder.…`; either
plain ones, or in one key-value store over all of them (OCDBT). Checkpoints of older
versions keep small arrays in a msgpack file, with the names of the others in their
places. They are read here without Orbax, array by array and with every chunk accounted
for, neither of which its own restore does.
"""

from __future__ import annotations

import os
from typing import Any

import flax.serialization
import flax.traverse_util
import jax
import msgpack
import numpy as np

from prompt_tuning_jax.checkpoints import t5x, zarr
from prompt_tuning_jax.checkpoints.source import Box, Checkpoint, Weights
from prompt_tuning_jax.checkpoints.storage import Folder

_STATE = 'state'
_MARKS = ('_METADATA', '_CHECKPOINT_METADATA', 'manifest.ocdbt', 'commit_success.txt')
_OCDBT = 'manifest.ocdbt'
_AGGREGATED = 'checkpoint'
_PLACEHOLDER = 'PLACEHOLDER://'
_STEP = 'state/step'
_MODEL = 'target/'


def is_orbax(directory: str | os.PathLike[str]) -> bool:
  """Whether a directory looks like an Orbax checkpoint, or one of T5X's steps with one."""
  if set(os.listdir(directory)) & set(_MARKS):
    return True
  state = os.path.join(directory, _STATE)
  return os.path.isdir(state) and bool(set(os.listdir(state)) & set(_MARKS))


def read_orbax(
    directory: str | os.PathLike[str], *, max_distance: int | None = None
) -> Checkpoint:
  """Opens an Orbax checkpoint of T5X; weights are read on demand.

  Args:
    directory: `…/checkpoint_<step>`, or the `state` in it.
    max_distance: as `t5x.read_t5x` takes it.

  Raises:
    FileNotFoundError: if an array or a chunk of one is missing.
    ValueError: if it is damaged, is no train state of T5X, or shapes do not fit.
  """
  directory = os.fspath(directory)
  arrays, step = _open(directory)
  return t5x.as_checkpoint(
      directory, arrays, format='orbax', step=step, max_distance=max_distance
  )


def read_prompts(directory: str | os.PathLike[str]) -> tuple[Weights, int | None]:
  """The prompts in an Orbax checkpoint of a prompt-tuned run by name, and its step.

  Raises:
    FileNotFoundError, ValueError: as `read_orbax`.
  """
  arrays, step = _open(os.fspath(directory))
  return t5x.without_prompts(arrays)[1], step


def _open(directory: str) -> tuple[Weights, int | None]:
  """The arrays under `target`, and the step."""
  leaves = _leaves(directory)
  model = {
      name.removeprefix(_MODEL): spec
      for name, spec in leaves.specs.items()
      if name.startswith(_MODEL)
  }
  if not model:
    found = sorted({name.split('/')[0] for name in leaves})
    raise ValueError(
        f'{directory} is an Orbax checkpoint, but not of a T5X run, which keeps the model '
        f'under `target`. It holds {", ".join(found[:6]) or "nothing"}.'
    )
  step = int(leaves[_STEP]) if _STEP in leaves.specs else None
  return Weights(model, lambda name, box: leaves.part(_MODEL + name, box)), step


def _leaves(directory: str) -> Weights:
  """All arrays of the tree, by paths such as `target/encoder/encoder_norm/scale`."""
  held = os.listdir(directory)
  root = directory if set(held) & set(_MARKS) or _STATE not in held else (
      os.path.join(directory, _STATE)
  )
  folder = Folder(root)
  if _OCDBT in os.listdir(root):
    folder = folder.ocdbt()
  inline = _inline(root)
  specs = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in inline.items()}
  stores = {}
  for file in sorted(folder.files):
    store, _, metadata_file = file.rpartition('/')
    if store and '/' not in store and metadata_file in zarr.METADATA_FILES:
      # Parameters of T5X have no dots in their names.
      name = store.replace('.', '/')
      stores[name] = store, metadata_file
      specs[name] = zarr.check_array(folder, store, metadata_file=metadata_file)

  of_target = {file.split('/')[0] for file in folder.files if file.startswith('target.')}
  for store in sorted(of_target - {store for store, _ in stores.values()}):
    raise FileNotFoundError(
        f'{folder.path(store)} has chunks, but the file that describes them is missing '
        f'({" or ".join(zarr.METADATA_FILES)}): the checkpoint was not copied completely. '
        'Copy it again.'
    )

  def read(name: str, box: Box) -> np.ndarray:
    if name in inline:
      return inline[name][box]
    store, metadata_file = stores[name]
    return zarr.read_array(folder, store, box, metadata_file=metadata_file)

  return Weights(specs, read)


def _inline(root: str) -> dict[str, np.ndarray]:
  """Arrays of the msgpack file of older versions; each array it only names must exist."""
  path = os.path.join(root, _AGGREGATED)
  if not os.path.isfile(path):
    return {}
  try:
    with open(path, 'rb') as file:
      tree: Any = flax.serialization.msgpack_restore(file.read())
    leaves = flax.traverse_util.flatten_dict(tree, sep='/')
  except (ValueError, TypeError, KeyError, msgpack.exceptions.UnpackException) as error:
    raise ValueError(
        f'{path} cannot be read as the msgpack file of an Orbax checkpoint ({error}). It was '
        'probably cut off: copy the checkpoint again.'
    ) from error
  named = [leaf for leaf in leaves.values() if isinstance(leaf, str)]
  for leaf in named:
    store = leaf.removeprefix(_PLACEHOLDER)
    if not os.path.isdir(os.path.join(root, store)):
      raise FileNotFoundError(
          f'{os.path.join(root, store)} is missing, which {path} names: the checkpoint was '
          'not copied completely. Copy it again.'
      )
  return {
      name: np.asarray(leaf)
      for name, leaf in leaves.items()
      if isinstance(leaf, (np.ndarray, np.generic, int, float))
  }
