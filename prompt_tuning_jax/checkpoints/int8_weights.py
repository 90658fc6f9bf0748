"""A checkpoint's weights in int8, each converted when it is read."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from prompt_tuning_jax.backbones import int8
from prompt_tuning_jax.checkpoints.names import Entry
from prompt_tuning_jax.checkpoints.source import Box, Weights, cast


def quantized(
    weights: Weights, entries: list[Entry], dtype: Any
) -> tuple[Weights, list[Entry]]:
  """Kernels and embeddings in int8, their scales as arrays of their own, the rest in `dtype`.

  A part of an array has the numbers that it has in the whole: the axis that a scale spans is
  always read whole. Scales are kept from when the array was read, so that where they are asked
  for behind it, as `entries` has them, nothing is read twice.

  Args:
    weights: arrays of a model by their per-layer T5X names.
    entries: all of them.
    dtype: type of what is not held in int8.

  Returns:
    The arrays, and their entries with those of the scales.
  """
  # Name of an array → the axis that its scales span.
  axes = {
      entry.t5x: len(entry.shape) + int8.REDUCED_AXES[entry.path[-1]]
      for entry in entries
      if entry.path[-1] in int8.REDUCED_AXES
  }
  scales_of = [_scale_entry(entry, axes[entry.t5x]) for entry in entries if entry.t5x in axes]
  others = cast(weights, dtype)
  specs = dict(others.specs)
  for entry in entries:
    if entry.t5x in axes:
      specs[entry.t5x] = jax.ShapeDtypeStruct(entry.shape, np.dtype(np.int8))
  for entry in scales_of:
    specs[entry.t5x] = jax.ShapeDtypeStruct(entry.shape, np.dtype(np.float32))
  known: dict[tuple[str, tuple[int, ...]], np.ndarray] = {}

  def read(name: str, box: Box) -> np.ndarray:
    array = name.removesuffix(int8.SCALE)
    if array not in axes:
      return others.part(name, box)
    if box is ...:
      box = (slice(None),) * len(specs[name].shape)
    axis = axes[array]
    kept = box if name != array else int8.without_axis(box, axis)
    channels = int8.without_axis(specs[array].shape, axis)
    key = array, tuple(n for part, size in zip(kept, channels) for n in part.indices(size))
    if name != array and key in known:
      return known[key]
    around = [*kept]
    around.insert(axis, slice(None))
    found = weights.part(array, tuple(around))
    if not np.isfinite(found).all():
      raise ValueError(
          f'{array} holds numbers that are not finite, which cannot be held in int8. Fetch or '
          'copy the checkpoint again, or load it with param_dtype=None (PARAM_DTYPE).'
      )
    numbers, scale = int8.quantize(found, axis)
    known[key] = scale
    if name != array:
      return scale
    return numbers[tuple(b if i == axis else slice(None) for i, b in enumerate(box))]

  return Weights(specs, read), [*entries, *scales_of]


def _scale_entry(entry: Entry, axis: int) -> Entry:
  def without(items: Any) -> tuple[Any, ...]:
    return int8.without_axis(items, axis)

  return dataclasses.replace(
      entry,
      t5x=entry.t5x + int8.SCALE,
      hf='',
      path=int8.scale_path(entry.path),
      axes=without(entry.axes),
      shape=without(entry.shape),
  )
