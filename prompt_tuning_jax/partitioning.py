"""The one file that names mesh axes: where the arrays of a model lie on its devices.

Parameters and activations carry T5X's logical axis names (`embed`, `mlp`, `heads`, …).
Rules map those to the axes of a mesh, `data` and `model`, so that the same model runs on
one device, or split over many.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# Logical axis → mesh axis; None replicates. T5X's rules for parameters that are split over
# `model` and batches that are split over `data`.
Rules = Sequence[tuple[str, str | None]]
DEFAULT_RULES: Rules = (
    ('batch', 'data'),
    ('vocab', 'model'),
    ('mlp', 'model'),
    ('heads', 'model'),
    ('joined_kv', 'model'),
    ('embed', None),
    ('layers', None),
    ('relpos_buckets', None),
)
MESH_AXES = ('data', 'model')


def make_mesh(model: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh ('data', 'model') over devices.

  Args:
    model: devices that share one copy of the model; the rest of their number is `data`.
    devices: all of this process's by default.

  Raises:
    ValueError: if `model` does not divide the number of devices.
  """
  devices = jax.devices() if devices is None else list(devices)
  count = len(devices)
  if model < 1 or count % model:
    valid = [n for n in range(1, count + 1) if count % n == 0]
    raise ValueError(
        f'model={model} does not divide the {count} devices there are. It may be '
        f'{", ".join(map(str, valid))}.'
    )
  return jax.make_mesh(
      (count // model, model),
      MESH_AXES,
      axis_types=(AxisType.Auto,) * len(MESH_AXES),
      devices=devices,
  )


def sharding(
    mesh: Mesh,
    axes: Sequence[str],
    shape: Sequence[int],
    rules: Rules = DEFAULT_RULES,
) -> NamedSharding:
  """Where an array lies on a mesh.

  An axis of the array that its mesh axis does not divide is replicated, as is one whose
  mesh axis an earlier axis took.

  Args:
    mesh: the devices.
    axes: the logical name of each axis of the array.
    shape: its sizes.
    rules: the mesh axis of each logical name.

  Raises:
    ValueError: if a logical axis has no rule, or a rule names an axis the mesh lacks.
  """
  known = dict(rules)
  unknown = [axis for axis in axes if axis not in known]
  if unknown:
    raise ValueError(
        f'No rule for the logical axis {unknown[0]!r}. There are rules for '
        f'{", ".join(known)}.'
    )
  partitions: list[str | None] = []
  for axis, size in zip(axes, shape, strict=True):
    mesh_axis = known[axis]
    if mesh_axis is not None and mesh_axis not in mesh.shape:
      raise ValueError(
          f'The rule for {axis!r} names the mesh axis {mesh_axis!r}, but the mesh has '
          f'{", ".join(mesh.shape)}.'
      )
    fits = mesh_axis and mesh_axis not in partitions and size % mesh.shape[mesh_axis] == 0
    partitions.append(mesh_axis if fits else None)
  return NamedSharding(mesh, PartitionSpec(*partitions))
