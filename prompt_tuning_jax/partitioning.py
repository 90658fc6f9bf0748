"""The one file that names mesh axes: where the arrays of a model lie on its devices.

Parameters carry T5X's logical axis names (`embed`, `mlp`, `heads`, …). Rules map those to
the axes of a mesh, `data` and `model`, so that the same model runs on one device, or split
over many. Batches are split over `data`, and so are activations where layers meet
(`constrain_rows`): without that, XLA follows parameters that are split over `data` into
computing every example on every device. Prompts are small and are copied everywhere.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from prompt_tuning_jax import processes
from prompt_tuning_jax.typing import Array, PyTree

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
# Parameters are split over `data` as well, and gathered layer by layer: for models too large
# for the devices of `model` (T5X's parameter_partitioning_dims=2).
FULLY_SHARDED_RULES: Rules = tuple(
    (axis, 'data' if axis == 'embed' else of_mesh) for axis, of_mesh in DEFAULT_RULES
)
# By PARAMETER_PARTITIONING_DIMS: how many axes of the mesh split parameters.
RULES = {1: DEFAULT_RULES, 2: FULLY_SHARDED_RULES}
MESH_AXES = ('data', 'model')


def make_mesh(model: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh ('data', 'model') over devices.

  Args:
    model: devices that share one copy of the model; the rest of their number is `data`.
    devices: all there are, of every process, by default.

  Of several slices of TPUs each holds whole copies of the model, for the links between them
  are slow.

  Raises:
    ValueError: if `model` does not divide the number of devices, of a slice if there are
      several.
  """
  devices = jax.devices() if devices is None else list(devices)
  slices = 1
  if devices[0].platform == 'tpu':
    # The compiler's own description of a single slice has no numbers of slices.
    slices = len({getattr(device, 'slice_index', 0) for device in devices})
  count = len(devices) // slices
  if model < 1 or count % model:
    raise ValueError(
        f'NUM_PARTITIONS={model} (make_mesh.model), the devices that share a copy of the '
        f'model, does not divide the {count} devices there are'
        + (f' in each of the {slices} slices' if slices > 1 else '')
        + f'. It may be {", ".join(map(str, divisors(count)))}.'
    )
  shape = (count // model, model)
  # Without leave to split an axis of a torus, most divisors have no mesh on a TPU v4, v5p or v6e.
  if slices == 1:
    of_devices = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  else:
    of_devices = mesh_utils.create_hybrid_device_mesh(
        shape, (slices, 1), devices, allow_split_physical_axes=True
    )
  return Mesh(of_devices, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def divisors(count: int) -> list[int]:
  """The numbers that divide `count`, ascending."""
  return [n for n in range(1, count + 1) if count % n == 0]


def check_rules(rules: Rules) -> None:
  """Raises ValueError for rules that could not hold; warns of axes that no array has.

  Batches are always split over `data`: every process brings its part of them.
  """
  known, found = dict(DEFAULT_RULES), dict(rules)
  for axis, mesh_axis in found.items():
    if mesh_axis is not None and mesh_axis not in MESH_AXES:
      raise ValueError(
          f'LOGICAL_AXIS_RULES splits {axis!r} over {mesh_axis!r}; it may be '
          f'{" or ".join(map(repr, MESH_AXES))}, the axes of the mesh, or None.'
      )
  if missing := [axis for axis in known if axis not in found]:
    raise ValueError(
        f'LOGICAL_AXIS_RULES has no rule for {", ".join(missing)}. Every axis needs one: '
        f'{(missing[0], known[missing[0]])} is T5X\'s, and None splits over nothing.'
    )
  if found['batch'] != 'data':
    raise ValueError(
        f"LOGICAL_AXIS_RULES splits 'batch' over {found['batch']!r}; batches are always split "
        "over 'data': leave ('batch', 'data') as it is."
    )
  if unknown := [axis for axis in found if axis not in known]:
    near = difflib.get_close_matches(unknown[0], known, n=1)
    warnings.warn(
        f'LOGICAL_AXIS_RULES names {", ".join(unknown)}, which no array of this model has'
        + (f'. Did you mean {near[0]!r}?' if near else '.'),
        stacklevel=2,
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


def shardings(
    mesh: Mesh, axes: PyTree, shapes: PyTree, rules: Rules = DEFAULT_RULES
) -> PyTree:
  """`sharding` of every array of a tree.

  Args:
    mesh: the devices.
    axes: the logical names of each array's axes, as a PartitionSpec.
    shapes: the arrays, or their shapes.
    rules: the mesh axis of each logical name.
  """
  return jax.tree.map(lambda x, names: sharding(mesh, tuple(names), x.shape, rules), shapes, axes)


def not_split(
    mesh: Mesh, axes: PyTree, shapes: PyTree, rules: Rules = DEFAULT_RULES
) -> dict[str, dict[str, int]]:
  """Logical axes, with their sizes, that rules would split and the mesh does not divide.

  Returns:
    By each axis of the mesh that has several devices and is named by a rule.

  Raises:
    ValueError: if such an axis of the mesh splits no array at all.
  """
  divided: dict[str, dict[str, int]] = {}
  undivided: dict[str, dict[str, int]] = {}
  for names, x in zip(
      jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, PartitionSpec)),
      jax.tree.leaves(shapes),
      strict=True,
  ):
    for name, size in zip(tuple(names), x.shape, strict=True):
      mesh_axis = dict(rules).get(name)
      if mesh_axis in mesh.shape and mesh.shape[mesh_axis] > 1:
        fits = size % mesh.shape[mesh_axis] == 0
        (divided if fits else undivided).setdefault(mesh_axis, {})[name] = size
  for mesh_axis, sizes in undivided.items():
    if mesh_axis not in divided:
      named = ', '.join(f'{name} {size:,}' for name, size in sizes.items())
      raise ValueError(
          f'The {mesh.shape[mesh_axis]} devices of the mesh axis {mesh_axis!r} divide none of the '
          f'sizes of this model that are split over it ({named}), so that each would hold all of '
          'it. Choose NUM_PARTITIONS among the divisors of these sizes, or 1.'
      )
  return undivided


def constrain_rows(x: Array) -> Array:
  """`x` [B, …] split by rows over the devices of the current mesh; without one as it is.

  So it is where the devices do not divide the rows.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or x.shape[0] % mesh.shape['data']:
    return x
  return jax.lax.with_sharding_constraint(x, PartitionSpec('data', *(None,) * (x.ndim - 1)))


@contextlib.contextmanager
def on(mesh: Mesh | None) -> Iterator[None]:
  """Programs that are traced in this context know the mesh; None is one device."""
  with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
    yield


def count_of_parts(mesh: Mesh | None) -> int:
  """Into how many parts the devices split the rows of a batch."""
  return 1 if mesh is None else mesh.shape['data']


def check_rows(mesh: Mesh | None, rows: int, what: str, also: str = '') -> None:
  """Raises ValueError unless the devices of `data` divide the rows of a batch.

  Args:
    mesh: the devices.
    rows: rows of a batch, over all of them.
    what: how the message names the rows, `{}` for their number.
    also: what else the message advises.
  """
  count = count_of_parts(mesh)
  if rows % count:
    rows_that_fit = [n for n in (rows // count * count, -(-rows // count) * count) if n]
    that_share = [n for n in divisors(mesh.size) if rows % (mesh.size // n) == 0]
    raise ValueError(
        f'{what.format(rows)} does not divide among the {count} parts into which the mesh '
        f'{dict(mesh.shape)} splits a batch. Use {" or ".join(map(str, rows_that_fit))} rows, or '
        'let more devices share a copy of the model: NUM_PARTITIONS='
        f'{" or ".join(map(str, that_share))}{also}.'
    )


def check_microbatches(microbatches: int, rows: int, what: str) -> None:
  """Raises ValueError unless `rows` can be cut into so many parts.

  Args:
    microbatches: number of parts.
    rows: rows of the batch.
    what: how the message names the rows, `{}` for their number.
  """
  if microbatches < 1 or rows % microbatches:
    raise ValueError(
        f'MICROBATCHES={microbatches} does not divide {what.format(rows)}. Choose a divisor.'
    )


def check_batch(mesh: Mesh | None, rows: int, microbatches: int, what: str) -> None:
  """`check_rows` of the batch of a train step and of its parts, of which there may be several.

  Raises:
    ValueError: also where they are not equal parts, or where several processes have no mesh, and
      would each train a model of their own.
  """
  check_microbatches(microbatches, rows, what)
  if mesh is None and jax.process_count() > 1:
    raise ValueError(
        f'{jax.process_count()} processes train together only on a mesh of all devices: load '
        'the backbone with mesh=partitioning.make_mesh().'
    )
  check_rows(mesh, rows, what)
  if microbatches > 1:
    of_part = f'a part of {{}} rows ({what.format(rows)} in MICROBATCHES={microbatches})'
    parts = count_of_parts(mesh)
    check_rows(
        mesh,
        rows // microbatches,
        of_part,
        f', or MICROBATCHES={" or ".join(map(str, divisors(rows // parts)))}',
    )


def data_share(mesh: Mesh | None) -> tuple[int, int]:
  """(index, count): which part of every batch this process brings, of how many.

  Processes whose devices hold the same rows, for they share a copy of the model, bring the
  same part. Without a mesh each process has a model of its own.
  """
  if mesh is None:
    return jax.process_index(), jax.process_count()
  rows_of = _rows_of_processes(mesh)
  parts = _parts(mesh)
  return parts.index(rows_of[jax.process_index()]), len(parts)


def placed_order(mesh: Mesh | None, count: int) -> np.ndarray:
  """Which row of a batch lies where, once `place_rows` has placed it.

  Devices that are near to each other are neighbours in a mesh, so that the rows of one process
  need not be.

  Args:
    mesh: the devices.
    count: rows of the whole batch, B.

  Returns:
    int [B]: of each row of the placed array, its number in the order in which the processes,
    by their `data_share`, bring the rows.
  """
  order = np.arange(count)
  if mesh is None or count % mesh.shape['data']:
    return order
  per_device = count // mesh.shape['data']
  by_device = order.reshape(-1, per_device)
  placed = np.empty_like(by_device)
  placed[[row for part in _parts(mesh) for row in part]] = by_device
  return placed.reshape(-1)


def _rows_of_processes(mesh: Mesh) -> dict[int, tuple[int, ...]]:
  """The rows of the mesh in which each process has devices."""
  found: dict[int, set[int]] = {}
  for (row, *_), device in np.ndenumerate(mesh.devices):
    found.setdefault(device.process_index, set()).add(row)
  return {process: tuple(sorted(rows)) for process, rows in found.items()}


def _parts(mesh: Mesh) -> list[tuple[int, ...]]:
  """The rows of the mesh that belong together, each part with the processes that hold it."""
  rows_of = _rows_of_processes(mesh)
  parts = sorted(set(rows_of.values()))
  if sum(map(len, parts)) != mesh.shape['data']:
    raise ValueError(
        f'The mesh {dict(mesh.shape)} lies across {len(rows_of)} processes so that they hold '
        f'rows of batches that overlap in part: {parts}. Let NUM_PARTITIONS divide the devices '
        'of a process, or be a multiple of them.'
    )
  return parts


def place_rows(tree: PyTree, mesh: Mesh | None) -> PyTree:
  """Arrays [B, …] of this process's rows, split over the devices; None leaves them alone.

  Rows that the devices do not divide are copied to all of them, in one process.
  """
  if mesh is None:
    return tree
  _, count = data_share(mesh)

  def place(rows: Any) -> Array:
    rows = np.asarray(rows)
    whole = (rows.shape[0] * count, *rows.shape[1:])
    divides = whole[0] % mesh.shape['data'] == 0
    spec = PartitionSpec('data' if divides else None, *(None,) * (rows.ndim - 1))
    return jax.make_array_from_process_local_data(NamedSharding(mesh, spec), rows, whole)

  return jax.tree.map(place, tree)


def split_rows(x: Any, mesh: Mesh | None) -> Any:
  """`x` [B, …], the same in every process, split by rows over the devices.

  Rows that the devices do not divide are copied to all of them. None leaves it alone.
  """
  if mesh is None:
    return x
  x = np.asarray(x)
  divides = len(x) % mesh.shape['data'] == 0
  spec = PartitionSpec('data' if divides else None, *(None,) * (x.ndim - 1))
  return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda index: x[index])


class PlacedBatches:
  """Batches by their step, each with its rows split over the devices."""

  def __init__(self, batches: Any, mesh: Mesh | None):
    self._batches = batches
    self._mesh = mesh

  def __getitem__(self, step: int) -> PyTree:
    return place_rows(self._batches[step], self._mesh)


def own_rows(x: Array) -> np.ndarray:
  """The rows of `x` [B, …] that this process's devices hold, in their order."""
  if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
    return np.asarray(x)
  parts = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
  return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])


def whole(x: Any) -> np.ndarray:
  """All of `x` on the host; where processes share it, every one of them must ask for it."""
  if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
    x = _replicated_on(x.sharding.mesh)(x)
  return np.asarray(x)


def whole_in_main(tree: PyTree) -> PyTree | None:
  """The tree with all arrays `whole` in the main process, which writes it; None in others."""
  leaves, structure = jax.tree.flatten(tree)
  held = []
  for leaf in leaves:
    array = whole(leaf)
    if processes.is_main():
      held.append(array)
  return structure.unflatten(held) if processes.is_main() else None


@functools.cache
def _replicated_on(mesh: Mesh) -> Callable[[Array], Array]:
  return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))


def replicate(tree: PyTree, mesh: Mesh | None) -> PyTree:
  """A tree whose arrays lie on every device of the mesh, but for those that lie on it already.

  Args:
    tree: of arrays that are the same in every process.
    mesh: the devices; None leaves the tree as it is.
  """
  if mesh is None:
    return tree
  where = everywhere(mesh)

  def place(x: Any) -> Array:
    if isinstance(x, jax.Array) and getattr(x.sharding, 'mesh', None) == mesh:
      return x
    if isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
      return jax.device_put(x, where)
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, where, lambda index: x[index])

  return jax.tree.map(place, tree)


def everywhere(mesh: Mesh | None) -> NamedSharding | None:
  """The placement of what every device holds; None without a mesh."""
  return None if mesh is None else NamedSharding(mesh, PartitionSpec())
