"""From a checkpoint's files straight into the devices' memory, one array at a time."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding

from prompt_tuning_jax import partitioning
from prompt_tuning_jax.backbones.t5 import T5Config
from prompt_tuning_jax.checkpoints import int8_weights, names
from prompt_tuning_jax.checkpoints.names import Entry
from prompt_tuning_jax.checkpoints.source import Weights
from prompt_tuning_jax.typing import Array, PyTree


def load_params(
    weights: Weights,
    config: T5Config,
    dtype: Any,
    *,
    int8: bool = False,
    mesh: Mesh | None = None,
    rules: partitioning.Rules = partitioning.DEFAULT_RULES,
) -> PyTree:
  """The model's tree on its devices.

  Each array of the checkpoint is read, cast, put in its place, and let go before the next
  is read. Without a mesh, the layers of a stack are gathered on the host; on a mesh, they
  are written one by one into the stack on the devices, each device getting its shard, so
  that a host never holds more than one layer's array. Of several hosts each reads what its
  own devices hold.

  Args:
    weights: the arrays under their per-layer T5X names.
    config: the model's architecture.
    dtype: type the weights are held in.
    int8: whether kernels and embeddings are held in int8 (`backbones/int8.py`) instead.
    mesh: the devices; the default device where None.
    rules: which mesh axis a logical axis is split over.

  Raises:
    ValueError: listing every array that is missing, unexpected, or misshapen.
  """
  stack = _on_one_device if mesh is None else functools.partial(_on_mesh, mesh, rules)
  names.check_shapes(weights, config, 'The flat parameters')
  entries = names.entries(config)
  if not int8:
    return names.stack_entries(weights, entries, jnp.dtype(dtype), stack=stack)
  held, entries = int8_weights.quantized(weights, entries, dtype)
  return names.stack_entries(held, entries, stack=stack)


def _on_one_device(weights: Weights, layers: list[Entry], dtype: Any) -> Array:
  return jnp.asarray(names.stack_layers(weights, layers, dtype))


def _on_mesh(
    mesh: Mesh, rules: partitioning.Rules, weights: Weights, layers: list[Entry], dtype: Any
) -> Array:
  first = layers[0]
  dtype = dtype or weights.specs[first.t5x].dtype
  place = partitioning.sharding(mesh, first.axes, first.shape, rules)

  def read(entry: Entry) -> Array:
    box = _box_of_this_process(place, entry.shape)
    held = weights.part(entry.t5x, box).astype(dtype, copy=False)

    def shard(index: tuple[slice, ...]) -> np.ndarray:
      within = (
          slice(part.start - around.start, part.stop - around.start)
          for part, around in zip(_filled(index, entry.shape), box)
      )
      return held[tuple(within)]

    return jax.make_array_from_callback(entry.shape, place, shard)

  if first.layer is None:
    return read(first)
  shape = (len(layers), *first.shape)
  stack_place = partitioning.sharding(mesh, ('layers', *first.axes), shape, rules)
  stacked = _zeros(shape, dtype, stack_place)
  for entry in layers:
    stacked = _set_layer(stacked, read(entry), entry.layer)
  # Reading runs ahead of the devices; without this, arrays would pile up on the host.
  return jax.block_until_ready(stacked)


def _box_of_this_process(place: Sharding, shape: tuple[int, ...]) -> tuple[slice, ...]:
  """The smallest box that holds all shards of this process: what it has to read."""
  shards = place.addressable_devices_indices_map(shape).values()
  axes = zip(*(_filled(index, shape) for index in shards))
  return tuple(
      slice(min(part.start for part in parts), max(part.stop for part in parts))
      for parts in axes
  )


def _filled(index: tuple[slice, ...], shape: tuple[int, ...]) -> list[slice]:
  """The slices with both their ends as numbers."""
  return [slice(*part.indices(size)[:2]) for part, size in zip(index, shape)]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _zeros(shape: tuple[int, ...], dtype: Any, place: Sharding) -> Array:
  return jax.lax.with_sharding_constraint(jnp.zeros(shape, dtype), place)


@functools.partial(jax.jit, donate_argnums=0)
def _set_layer(stacked: Array, layer: Array, index: int) -> Array:
  return jax.lax.dynamic_update_index_in_dim(stacked, layer, index, 0)
