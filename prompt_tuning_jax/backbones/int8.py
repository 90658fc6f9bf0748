"""Frozen weights in int8: a whole number for each weight, a float32 scale for each channel.

A kernel [in, out] has a scale for each output, an embedding table one for each row. A scale
multiplies what the product gives, so that kernels are never held in another type than int8:
only a layer's own is converted, while it is used (where layers are scanned, that is; of
unrolled ones XLA may convert several at once). Norms and relative position biases are small and
stay as they are. A tree of such weights holds a `kernel_scale` beside every int8 `kernel`, and
an `embedding_scale` beside the `embedding`; the layers tell by these what they are given.

Numbers are rounded to the nearest, symmetrically around zero, the largest of a channel to 127:
the error of a weight is at most 1/254 of that. Nothing is calibrated, so that weights can be
converted while they are read.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import PartitionSpec

from prompt_tuning_jax.typing import Array, PyTree

LARGEST = 127
SCALE = '_scale'
# What is held in int8, by the last part of its name, and the axis that a scale spans.
REDUCED_AXES = {'kernel': -2, 'embedding': -1}


def quantize(weights: Any, axis: int, largest: int = LARGEST) -> tuple[Any, Any]:
  """Weights in int8, and their scales.

  Args:
    weights: a numpy or jax array.
    axis: the axis that a scale spans.
    largest: the number that stands for the largest of a channel; 7 is what int4 would hold.

  Returns:
    int8 numbers of the same shape, and the scales in float32, without that axis; numpy arrays
    where `weights` is one.
  """
  xp = jnp if isinstance(weights, jax.Array) else np
  weights = weights.astype(np.float32)
  scale = xp.maximum(weights.max(axis), -weights.min(axis)) / largest
  # A channel of zeros, or of numbers so small that their scale would be zero.
  scale = xp.where(scale == 0, 1, scale).astype(np.float32)
  return xp.rint(weights / xp.expand_dims(scale, axis)).astype(np.int8), scale


def dequantize(weights: Array, scale: Array, axis: int, dtype: Any) -> Array:
  """The weights again, as near as int8 keeps them."""
  return (weights.astype(jnp.float32) * jnp.expand_dims(scale, axis)).astype(dtype)


def quantize_params(params: PyTree) -> PyTree:
  """A model's tree with its kernels and embeddings in int8, each with its scales beside it."""
  tree = {}
  for path, leaf in traverse_util.flatten_dict(params).items():
    if path[-1] in REDUCED_AXES:
      tree[path], tree[scale_path(path)] = quantize(leaf, REDUCED_AXES[path[-1]])
    else:
      tree[path] = leaf
  return traverse_util.unflatten_dict(tree)


def count(tree: PyTree) -> int:
  """Number of parameters in a tree of arrays or shapes; scales are not counted."""
  return sum(
      math.prod(leaf.shape)
      for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
      if not jax.tree_util.keystr(path[-1:], simple=True).endswith(SCALE)
  )


def logical_axes(axes: PyTree) -> PyTree:
  """The logical axes of `quantize_params`, from those of the model's tree."""
  tree = traverse_util.flatten_dict(axes)
  for path, names in list(tree.items()):
    if path[-1] in REDUCED_AXES:
      tree[scale_path(path)] = PartitionSpec(*without_axis(names, REDUCED_AXES[path[-1]]))
  return traverse_util.unflatten_dict(tree)


def held_as(shapes: PyTree, dtype: Any) -> PyTree:
  """Shapes of a model's tree, with what is neither int8 nor a scale of it in another type."""
  tree = traverse_util.flatten_dict(shapes)
  for path, leaf in tree.items():
    if leaf.dtype != jnp.int8 and not path[-1].endswith(SCALE):
      tree[path] = jax.ShapeDtypeStruct(leaf.shape, dtype)
  return traverse_util.unflatten_dict(tree)


def scale_path(path: tuple[str, ...]) -> tuple[str, ...]:
  """Where in the tree the scales of an array are."""
  return (*path[:-1], path[-1] + SCALE)


def without_axis(items: Any, axis: int) -> tuple[Any, ...]:
  """Names or sizes of axes, without one of them."""
  items = list(items)
  del items[axis]
  return tuple(items)
