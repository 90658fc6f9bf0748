"""T5X version-3 checkpoint directories, read and written without T5X.

A checkpoint is a Flax msgpack file `checkpoint`, which holds small arrays and, for
the large ones, placeholders that name a zarr array in a directory beside it.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from typing import Any

import flax.serialization
import flax.traverse_util
import jax
import jax.numpy as jnp
import msgpack
import numpy as np

from prompt_tuning_jax.backbones.t5 import T5Config
from prompt_tuning_jax.checkpoints import names, zarr
from prompt_tuning_jax.checkpoints.source import Box, Checkpoint, Weights
from prompt_tuning_jax.checkpoints.storage import Folder
from prompt_tuning_jax.writing import directory_written_whole

_VERSION = 3
_INDEX_FILE = 'checkpoint'
# 'encoder/encoder/mlp/wo/kernel', but not 'encoder/encoder_norm/scale'.
_SCANNED = re.compile(r'(encoder|decoder)/\1/(.+)')


def read_t5x(
    directory: str | os.PathLike[str], *, max_distance: int | None = None
) -> Checkpoint:
  """Opens a T5X checkpoint directory; weights are read on demand.

  Args:
    directory: `…/checkpoint_<step>`, on this machine or in a bucket (`gs://…`).
    max_distance: maximal relative distance of the attention bias, which is not in
      the checkpoint. May be left out for T5's 32 buckets, which go with 128.

  Returns:
    The checkpoint; arrays of a prompt-tuned run that belong to its prompt (such as
    `encoder/prompt/prompt/prompt`) are not in `weights` but in `prompts`.

  Raises:
    FileNotFoundError: if the index, an array, or a chunk of one is missing. zarr
      itself would read a missing chunk as zeros.
    ValueError: if the index is cut off or of another version, or shapes do not fit.
  """
  directory = os.fspath(directory)
  arrays, step = _open(directory)
  return as_checkpoint(
      directory, arrays, format='t5x', step=step, max_distance=max_distance
  )


def as_checkpoint(
    directory: str, arrays: Weights, *, format: str, step: int | None, max_distance: int | None
) -> Checkpoint:
  """A checkpoint of the arrays that T5X keeps under `target`, by their T5X names.

  Raises:
    ValueError: if they are not of one T5, or need a `max_distance` that is not given.
  """
  arrays = _unscanned(arrays)
  weights, prompts = without_prompts(arrays)
  for name, spec in weights.specs.items():
    if not jnp.issubdtype(spec.dtype, jnp.floating):
      raise ValueError(
          f'{directory}: {name} is stored as {spec.dtype}, but weights are floating-point '
          'numbers. Use a copy of the model that is not quantised.'
      )
  config = names.config_from_shapes(
      weights, relpos_max_distance=128 if max_distance is None else max_distance
  )
  if max_distance is None and config.relpos_buckets != 32:
    raise ValueError(
        f'{directory} has {config.relpos_buckets} buckets of relative position, not '
        "T5's 32, and a T5X checkpoint does not say up to which distance they reach. "
        'Give max_distance (relative_attention_max_distance in its gin file).'
    )
  names.check_shapes(weights, config, directory)
  return Checkpoint(
      format=format,
      path=directory,
      config=config,
      weights=weights,
      prompts=prompts,
      step=step,
  )


def read_prompts(directory: str | os.PathLike[str]) -> tuple[Weights, int]:
  """The prompts in a T5X checkpoint of a prompt-tuned run by name, and its step.

  Raises:
    FileNotFoundError, ValueError: as `read_t5x`.
  """
  arrays, step = _open(directory)
  return without_prompts(arrays)[1], step


def is_t5x(directory: str | os.PathLike[str]) -> bool:
  """Whether a directory looks like a T5X checkpoint."""
  return os.path.isfile(os.path.join(directory, _INDEX_FILE))


def _open(directory: str | os.PathLike[str]) -> tuple[Weights, int]:
  """All arrays of a checkpoint by the names in its index, and its step."""
  folder = Folder(directory)
  index_path = folder.path(_INDEX_FILE)
  optimizer = _read_index(folder)
  leaves = flax.traverse_util.flatten_dict(
      optimizer['target'], sep='/', is_leaf=lambda _, node: _is_placeholder(node)
  )
  specs: dict[str, jax.ShapeDtypeStruct] = {}
  stores: dict[str, str] = {}
  for name, leaf in leaves.items():
    if _is_placeholder(leaf):
      stores[name] = _store_name(leaf, name, index_path)
      specs[name] = zarr.check_array(folder, stores[name])
      if list(specs[name].shape) != leaf['metadata'].get('shape'):
        raise ValueError(
            f'{folder.path(stores[name])} has shape {list(specs[name].shape)}, but the index '
            f'beside it says {leaf["metadata"].get("shape")}: they are of different '
            'checkpoints.'
        )
    elif hasattr(leaf, 'shape'):
      specs[name] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    else:
      raise ValueError(f'{index_path}: {name} is neither an array nor names one: {leaf!r}')

  def read(name: str, box: Box) -> np.ndarray:
    if name in stores:
      return zarr.read_array(folder, stores[name], box)
    return np.asarray(leaves[name])[box]

  step = int(optimizer.get('state', {}).get('step', 0))
  return Weights(specs, read), step


def without_prompts(arrays: Weights) -> tuple[Weights, Weights]:
  """The model's arrays, and those that belong to a prompt."""
  prompts = [name for name in arrays if 'prompt' in name.split('/')]
  return arrays.only(name for name in arrays if name not in prompts), arrays.only(prompts)


def write_t5x(
    directory: str | os.PathLike[str], config: T5Config, weights: Weights, *, step: int = 0
) -> None:
  """Writes a T5X version-3 checkpoint directory, without an optimiser's state.

  Matrices become zarr arrays and vectors lie in the index, as in T5X's own checkpoints.
  One array is held at a time.

  Args:
    directory: where to, customarily `…/checkpoint_<step>`; it must not exist yet.
    config: the architecture. Activations and the maximal relative distance are not in a
      T5X checkpoint but in the gin file that goes with it.
    weights: the arrays under their per-layer T5X names.
    step: training step to record.

  Raises:
    ValueError: if the weights do not fit `config`, or T5X has no such model.
    FileExistsError: if there is something at `directory`.
    OSError: if it cannot be written; nothing is left behind.
  """
  names.check_shapes(weights, config, 'The model to write')
  if config.tied_embeddings and not config.scale_decoder_outputs:
    raise ValueError(
        'T5X scales the output of a tied T5 by 1/sqrt(d_model), which this model does not: '
        "T5X would compute other logits with its weights. Write it as 'hf' or 'native'."
    )
  read_back = names.config_from_shapes(weights)
  if (config.mlp_activations, config.scale_decoder_outputs) != (
      read_back.mlp_activations, read_back.scale_decoder_outputs
  ):
    raise ValueError(
        f'A T5X checkpoint does not say that a model has the activations '
        f'{config.mlp_activations} and scale_decoder_outputs={config.scale_decoder_outputs}; '
        f'read back, this one would have {read_back.mlp_activations} and '
        f"{read_back.scale_decoder_outputs}. Write it as 'hf' or 'native'."
    )
  if config.relpos_max_distance != read_back.relpos_max_distance:
    warnings.warn(
        'A T5X checkpoint does not record the maximal relative distance, which is '
        f'{config.relpos_max_distance} here and not 128: load {os.fspath(directory)} with '
        f'max_distance={config.relpos_max_distance}.',
        stacklevel=2,
    )
  with directory_written_whole(directory) as unfinished:
    leaves = {}
    for name, spec in weights.specs.items():
      array = np.ascontiguousarray(weights[name])
      if len(spec.shape) < 2 or name.endswith('/rel_embedding'):
        leaves[name] = array
        continue
      folder = f'target.{name.replace("/", ".")}'
      metadata = zarr.write_array(os.path.join(unfinished, folder), array)
      # The driver that T5X looks for; the path is relative to the index.
      kvstore = {'driver': 'gfile', 'path': folder}
      leaves[name] = {'driver': 'zarr', 'kvstore': kvstore, 'metadata': metadata}
    index = {
        'version': _VERSION,
        'optimizer': {
            'state': {'step': np.int32(step), 'param_states': {}},
            'target': flax.traverse_util.unflatten_dict(leaves, sep='/'),
        },
    }
    with open(os.path.join(unfinished, _INDEX_FILE), 'wb') as file:
      file.write(flax.serialization.msgpack_serialize(index))


def _unscanned(arrays: Weights) -> Weights:
  """Per-layer names and arrays for a checkpoint whose layers are stacked, as umT5's are.

  T5X's scalable_t5 writes `encoder/encoder/attention/query/kernel` [d_model, L, heads,
  d_kv]: the layers on the second axis, and heads apart from d_kv.
  """
  places: dict[str, tuple[str, int | None]] = {}
  per_layer: dict[str, jax.ShapeDtypeStruct] = {}
  for name, spec in arrays.specs.items():
    match = _SCANNED.fullmatch(name)
    if match is None or len(spec.shape) < 2:
      places[name], per_layer[name] = (name, None), spec
      continue
    stack, rest = match.groups()
    shape = _joined(name, spec.shape[:1] + spec.shape[2:])
    for layer in range(spec.shape[1]):
      layer_name = f'{stack}/layers_{layer}/{rest}'
      places[layer_name] = name, layer
      per_layer[layer_name] = jax.ShapeDtypeStruct(shape, spec.dtype)

  held: dict[str, np.ndarray] = {}

  def read_layer(layer_name: str, box: Box) -> np.ndarray:
    name, layer = places[layer_name]
    if layer is None:
      return arrays.part(name, box)
    # Whoever reads in order asks for the layers of an array one after the other; it is
    # kept until the last of them.
    if name not in held:
      held.clear()
      held[name] = arrays[name]
    stacked = held[name] if layer < arrays.specs[name].shape[1] - 1 else held.pop(name)
    return stacked[:, layer].reshape(per_layer[layer_name].shape)[box]

  return Weights(per_layer, read_layer)


def _joined(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  """The shape of an attention kernel with heads and d_kv as one axis."""
  if len(shape) != 3:
    return shape
  first, second, third = shape
  return (first * second, third) if name.endswith('/out/kernel') else (first, second * third)


def _read_index(folder: Folder) -> dict[str, Any]:
  """The tree under `optimizer` in the msgpack index."""
  path = folder.path(_INDEX_FILE)
  try:
    packed = folder.read(_INDEX_FILE)
  except FileNotFoundError:
    raise FileNotFoundError(
        f'No file {path}: this is not a T5X checkpoint directory.'
    ) from None
  try:
    index = flax.serialization.msgpack_restore(packed)
  except (ValueError, TypeError, KeyError, msgpack.exceptions.UnpackException) as error:
    raise ValueError(
        f'{path} cannot be read as a T5X index ({len(packed):,} bytes; '
        f'{type(error).__name__}: {error}). It was probably cut off, or belongs to a '
        'checkpoint of TensorFlow: fetch it again.'
    ) from error
  if not isinstance(index, dict) or index.get('version') != _VERSION:
    version = index.get('version') if isinstance(index, dict) else None
    raise ValueError(
        f'{path} has version {version!r}; T5X checkpoints of version {_VERSION} are read.'
    )
  optimizer = index.get('optimizer')
  if not isinstance(optimizer, dict) or not isinstance(optimizer.get('target'), dict):
    raise ValueError(f'{path} has no parameters under optimizer/target.')
  return optimizer


def _is_placeholder(node: Any) -> bool:
  return isinstance(node, dict) and {'driver', 'kvstore', 'metadata'} <= set(node)


def _store_name(leaf: Mapping[str, Any], name: str, index_path: str) -> str:
  """The directory of a zarr array, beside the index wherever that was moved."""
  store = os.path.basename(str(leaf['kvstore'].get('path', '')).rstrip('/'))
  if leaf['driver'] != 'zarr' or store in ('', '.', '..'):
    raise ValueError(
        f'{index_path}: {name} is stored with driver {leaf["driver"]!r} at '
        f'{leaf["kvstore"]!r}; zarr arrays beside the index are read.'
    )
  return store
