"""`prompt-tuning plan --compile`: what XLA makes of a run's train step on its devices.

XLA's TPU compiler needs no TPU: libtpu describes the chips of a slice, and the step is
compiled for them from shapes. No weights are made or read.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import importlib.util
import math
import os
import re
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from prompt_tuning_jax import collectives, partitioning
from prompt_tuning_jax.backbones import int8
from prompt_tuning_jax.backbones.t5 import T5
from prompt_tuning_jax.collectives import Sent
from prompt_tuning_jax.methods import method as method_lib
from prompt_tuning_jax.methods.method import Method
from prompt_tuning_jax.targets import Target
from prompt_tuning_jax.training import trainable as trainable_lib
from prompt_tuning_jax.training.step import TrainState, make_train_step
from prompt_tuning_jax.typing import Batch, PyTree

# Generation → dimensions of its torus, and the most chips of a slice.
_SLICES = {
    'v2': (2, 256), 'v3': (2, 1024), 'v4': (3, 4096), 'v5e': (2, 256), 'v5p': (3, 8192),
    'v6e': (2, 256),
}  # fmt: skip
# One process after the other may load libtpu, it looks for the machine that it is on, and
# it writes what it did not find on the screen: unless it is told all that.
_QUIET = {
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1', 'TPU_ACCELERATOR_TYPE': 'v5litepod-8',
    'TPU_LOG_DIR': 'disabled', 'TPU_MIN_LOG_LEVEL': '3', 'TPU_SKIP_MDS_QUERY': '1',
    'TPU_STDERR_LOG_LEVEL': '3', 'TPU_WORKER_HOSTNAMES': 'localhost', 'TPU_WORKER_ID': '0',
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class CompiledStep:
  """XLA's account of a train step; bytes are of each device.

  Attributes:
    compiler: who compiled it, for which devices.
    arguments: bytes of weights, state and batch.
    temporaries: bytes of all that the step computes.
    results: bytes of what it returns, without the state, which takes the place of the old.
    total: bytes that are taken at once; on TPUs less than the sum of these, for there
      temporaries share memory.
    sent: what a device sends in a step, by kind of collective.
    seconds: that the compilation took.
    refusal: what XLA said where the step does not fit the devices; then there are no
      numbers but `arguments`.
  """

  compiler: str
  arguments: int
  temporaries: int = 0
  results: int = 0
  total: int = 0
  sent: Mapping[str, Sent] = dataclasses.field(default_factory=dict)
  seconds: float = 0.0
  refusal: str = ''


class Flops(NamedTuple):
  """FLOPs of a batch, as XLA counts them in the compiled program.

  Attributes:
    step: of a train step of the prompt, the optimiser included.
    forward: of a forward pass with the prompt.
  """

  step: float
  forward: float


def count_flops(
    module: nn.Module,
    method: Method,
    tx: optax.GradientTransformation,
    *,
    rows: int,
    input_length: int,
    target_length: int,
) -> Flops:
  """Compiles the step and the forward pass of a frozen model, and counts.

  XLA counts the body of a scan once: give a module with `unroll=True`.

  Args:
    module: the backbone's module.
    method: the prompt method, whose parameters train.
    tx: their optimiser.
    rows: rows of the batch.
    input_length: tokens of an input; virtual tokens come on top.
    target_length: tokens of a target.
  """
  params = {
      'prompt': method_lib.shapes(method, module.spec)[0],
      'backbone': jax.eval_shape(module.init_params, jax.random.key(0)),
  }
  trainable, frozen = trainable_lib.split(params, {'prompt': tx})
  state = jax.eval_shape(lambda tree: TrainState.create(tree, tx), trainable)

  batch = method_lib.batch_shapes(method, rows, input_length, target_length)

  def forward(params, batch):
    injection = method.apply({'params': params['prompt']}, module.spec)
    return module.apply({'params': params['backbone']}, batch, injection)

  programs = (
      make_train_step(method, module, tx).lower(state, frozen, batch),
      jax.jit(forward).lower(params, batch),
  )
  return Flops(*(program.compile().cost_analysis()['flops'] for program in programs))


def quiet_libtpu() -> None:
  """Keeps libtpu, loaded after this, off the screen of a machine that has no TPU."""
  # JAX sets this where it finds none.
  if 'TPU_SKIP_MDS_QUERY' in os.environ:
    os.environ.update(_QUIET)


def mesh_of(target: Target, num_partitions: int) -> Mesh | None:
  """The devices of a target to compile for, as a run lays its mesh over them.

  Returns:
    None for the one device of this machine.

  Raises:
    ImportError: if they are TPUs and libtpu is not installed.
    ValueError: if they are GPUs that are not here, or no slice of TPUs has their number.
  """
  if target.kind == 'here':
    return None if target.count == 1 else partitioning.make_mesh(num_partitions)
  if target.kind not in _SLICES:
    raise ValueError(
        f'--compile: only a machine with a {target.kind} can compile for it. Run the same command '
        'there with --gin.PLAN_TARGET=here, or leave --compile out: the estimate needs no GPU.'
    )
  return partitioning.make_mesh(num_partitions, _tpus(target))


def _tpus(target: Target) -> list[jax.Device]:
  name, of_host = _slice_of(target)
  if importlib.util.find_spec('libtpu') is None:
    raise ImportError(
        f'--compile: for {target.name} it takes the TPU compiler, libtpu, which is not installed. '
        "It needs no TPU: pip install 'prompt-tuning-jax[tpu]' (or 'jax[tpu]')."
    )
  options: dict[str, Any] = {'num_slices': target.slices} if target.slices > 1 else {}
  if of_host:
    options['chips_per_host_bounds'] = of_host
  if target.kind == 'v4':
    # As runs see it, a chip's two cores are one device.
    options['chip_config_name'] = 'megacore'
  quiet_libtpu()
  return topologies.get_topology_desc(name, 'tpu', **options).devices


def _slice_of(target: Target) -> tuple[str, list[int] | None]:
  """A slice by the compiler's name ('v5e:2x4'), and the chips of a host that are not 2 × 2."""
  dimensions, most = _SLICES[target.kind]
  chips = target.count // target.slices
  if target.kind in ('v2', 'v3'):
    chips //= 2
  if chips == 1:
    sizes = [1] * dimensions
  elif chips == 4 and dimensions == 3:
    sizes = [2, 2, 1]
  else:
    power = chips.bit_length() - 1
    sizes = [2 ** ((power + i) // dimensions) for i in range(dimensions)]
    if chips != 2**power or chips < 4 or chips > most:
      raise ValueError(
          f'--compile: there is no slice of {chips} chips {target.kind}; there are 1, 4, 8 and so '
          f'on, doubling, up to {most}.'
      )
  name = f'{target.kind}:{"x".join(map(str, sizes))}'
  return name, [1, 1, 1] if chips == 1 else None


def compile_step(
    module: T5,
    method: Method | None,
    labelling: trainable_lib.Labelling,
    batch: Batch,
    *,
    mesh: Mesh | None,
    rules: partitioning.Rules,
    held_as: str,
    microbatches: int = 1,
) -> CompiledStep:
  """Compiles a run's train step from shapes.

  Args:
    module: the backbone's module, as the run has it.
    method: the prompt method; None trains without one.
    labelling: what trains, with which optimiser.
    batch: shapes of the whole batch.
    mesh: the devices; None is this machine's one.
    rules: which axes of the weights are split over which axis of the mesh.
    held_as: type of the frozen weights, but for those in int8.
    microbatches: parts of each batch.
  """
  weights = int8.held_as(
      jax.eval_shape(module.init_params, jax.random.key(0)), jnp.dtype(held_as)
  )
  if mesh is not None:
    where = partitioning.shardings(mesh, module.logical_axes(), weights, rules)
    weights = jax.tree.map(_at, weights, where)
  params = {'backbone': weights}
  if method is not None:
    # Initialisers may read the embeddings of a model that is not here.
    method = method_lib.without_initializers(method)
    params['prompt'] = method_lib.shapes(method, module.spec)[0]
  trained, frozen = trainable_lib.split(params, labelling)
  tx = trainable_lib.make_optimizer(labelling, trained)
  state = state_shapes(trained, tx, mesh)
  placement = None
  if mesh is not None:
    everywhere = partitioning.everywhere(mesh)
    frozen = jax.tree.map(lambda x: _at(x, x.sharding or everywhere), frozen)
    rows = NamedSharding(mesh, PartitionSpec('data', None))
    batch = jax.tree.map(lambda x: _at(x, rows), batch)
    placement = (jax.tree.map(lambda x: x.sharding, state), everywhere)
  step = make_train_step(method, module, tx, microbatches=microbatches, placement=placement)
  arguments = sum(map(_bytes_of_device, jax.tree.leaves((state, frozen, batch))))
  compiler = _compiler(mesh)
  start = time.perf_counter()
  with partitioning.on(mesh):
    lowered = step.lower(state, frozen, batch)
    try:
      compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
      if 'RESOURCE_EXHAUSTED' not in str(error):
        raise
      said = re.sub(r'^\w+: ', '', str(error).splitlines()[0])
      return CompiledStep(
          compiler, arguments, seconds=time.perf_counter() - start, refusal=said
      )
  seconds = time.perf_counter() - start
  memory = compiled.memory_analysis()
  arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
  results = memory.output_size_in_bytes - memory.alias_size_in_bytes
  # The TPU compiler knows the peak; others leave the temporaries out of it.
  on_tpu = mesh is not None and mesh.devices.flat[0].platform == 'tpu'
  total = memory.peak_memory_in_bytes if on_tpu else arguments + temporaries + results
  return CompiledStep(
      compiler=compiler,
      arguments=arguments,
      temporaries=temporaries,
      results=results,
      total=total,
      sent=collectives.count(compiled.as_text(), 1 if mesh is None else mesh.size),
      seconds=seconds,
  )


def state_shapes(trained: PyTree, tx: Any, mesh: Mesh | None) -> TrainState:
  """The state before the first step as shapes, each where `RunParameters` places it.

  Copies of a prompt lie everywhere. Of a model, and of what its optimiser keeps in arrays
  of the same shapes, each device has the part that it has of the weights; but what Adafactor
  keeps of a stack of layers, which is small, is made layer by layer and lies everywhere.
  """
  trained = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding), trained
  )
  state = jax.eval_shape(lambda tree: TrainState.create(tree, tx), trained)
  if mesh is None:
    return state
  everywhere = partitioning.everywhere(mesh)
  of_weights = {
      jax.tree_util.keystr(path): leaf
      for path, leaf in jax.tree_util.tree_flatten_with_path(trained)[0]
      if leaf.sharding is not None
  }

  def is_factored(x: Any) -> bool:
    return isinstance(x, optax.FactoredState)

  def place(path: Any, x: Any, by_layer: bool = False) -> Any:
    if is_factored(x):
      return jax.tree_util.tree_map_with_path(functools.partial(place, by_layer=True), x)
    path = jax.tree_util.keystr(path)
    if by_layer and "['layers']" in path:
      return _at(x, everywhere)
    of = next((leaf for name, leaf in of_weights.items() if path.endswith(name)), None)
    return _at(x, of.sharding if of is not None and of.shape == x.shape else everywhere)

  return jax.tree_util.tree_map_with_path(place, state, is_leaf=is_factored)


def _at(x: jax.ShapeDtypeStruct, where: NamedSharding) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


def _bytes_of_device(x: jax.ShapeDtypeStruct) -> int:
  shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
  return math.prod(shape) * x.dtype.itemsize


def _compiler(mesh: Mesh | None) -> str:
  device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
  version = f'jaxlib {importlib.metadata.version("jaxlib")}'
  if device.platform == 'tpu':
    version = f'libtpu {importlib.metadata.version("libtpu")}'
  return f'XLA for {1 if mesh is None else mesh.size} × {device.device_kind} ({version})'
