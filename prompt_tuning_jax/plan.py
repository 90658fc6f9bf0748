"""`prompt-tuning plan`: what a run will cost, from shapes alone: no weights are made or read.

A device's part of the run is the same run with its share of the rows, heads and hidden
units, whose costs are counted in its jaxpr (`costs.py`). Heads that do not divide are counted
whole on every device. With --compile XLA's own figures stand beside the estimate
(`plan_compiled.py`).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh

from prompt_tuning_jax import costs, partitioning, plan_compiled, targets
from prompt_tuning_jax.backbones import int8, t5_stacks
from prompt_tuning_jax.backbones.backbone import Backbone
from prompt_tuning_jax.backbones.t5 import T5, T5Config
from prompt_tuning_jax.data import buckets, packing
from prompt_tuning_jax.methods import method as method_lib
from prompt_tuning_jax.methods.method import Method
from prompt_tuning_jax.plan_compiled import CompiledStep
from prompt_tuning_jax.targets import Target
from prompt_tuning_jax.training import trainable as trainable_lib
from prompt_tuning_jax.training.optimizers import default_optimizer
from prompt_tuning_jax.training.step import TrainState, check_microbatches, make_train_step
from prompt_tuning_jax.typing import Batch, PyTree

# Share of a device's memory that a run may plan with: the rest is the runtime's, and what
# the estimate of the activations may be wrong by.
_USABLE = 0.9


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

  batch = batch_shapes(method, rows, input_length, target_length)

  def forward(params, batch):
    injection = method.apply({'params': params['prompt']}, module.spec)
    return module.apply({'params': params['backbone']}, batch, injection)

  programs = (
      make_train_step(method, module, tx).lower(state, frozen, batch),
      jax.jit(forward).lower(params, batch),
  )
  return Flops(*(program.compile().cost_analysis()['flops'] for program in programs))


def batch_shapes(method: Method | None, rows: int, input_length: int, target_length: int) -> Batch:
  """Shapes of a batch with the virtual tokens of a method."""

  def tokens(length: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((rows, length), jnp.int32)

  if method is not None:
    input_length += method.num_virtual_tokens
    target_length += method.num_decoder_virtual_tokens
  targets_BT = tokens(target_length)
  return Batch(tokens(input_length), targets_BT, targets_BT, targets_BT)


@dataclasses.dataclass(frozen=True)
class Setting:
  """What of a run decides whether it fits, and may be changed so that it does.

  Attributes:
    dtype: of the computation and of frozen weights.
    remat: what the backward pass computes again (`t5_stacks.REMAT_POLICIES`).
    microbatches: parts of a batch, one after the other.
    num_partitions: devices that share a copy of the model.
    rules: which axes of the weights are split over which axis of the mesh.
    param_dtype: type the weights are held in; None where it is `dtype`. 'int8' is of kernels and
      embeddings.
  """

  dtype: str
  remat: str
  microbatches: int
  num_partitions: int
  rules: partitioning.Rules
  param_dtype: str | None = None

  @property
  def held_as(self) -> str:
    """Type of the weights, of those that int8 leaves alone where it is int8."""
    return self.dtype if self.param_dtype in (None, 'int8') else self.param_dtype

  @property
  def gathers_weights(self) -> bool:
    """Whether weights are split over the devices that split the batch, too."""
    return any(to == 'data' for axis, to in self.rules if axis != 'batch')

  def shares_heads(self, config: T5Config) -> bool:
    """Whether devices that share a copy of the model compute each of its heads together."""
    splits = dict(self.rules).get('joined_kv') == 'model'
    return splits and config.num_heads % self.num_partitions != 0

  def part(self, axis: str, size: int) -> int:
    """A device's share of an axis of the weights, while it computes with them."""
    splits = dict(self.rules).get(axis) == 'model' and size % self.num_partitions == 0
    return size // self.num_partitions if splits else size

  def changes(self, other: Setting) -> str:
    """What another setting has that this one has not, as flags."""
    flags = {
        'DTYPE': other.dtype != self.dtype and other.dtype,
        'PARAM_DTYPE': other.param_dtype != self.param_dtype and other.param_dtype,
        'REMAT': other.remat != self.remat and other.remat,
        'MICROBATCHES': other.microbatches != self.microbatches and other.microbatches,
        'NUM_PARTITIONS': other.num_partitions != self.num_partitions and other.num_partitions,
    }
    if other.rules != self.rules:
      if self.rules not in partitioning.RULES.values():
        # Rules of one's own would stay, whatever is said of the dims.
        flags['LOGICAL_AXIS_RULES'] = '@logical_axis_rules()'
      flags['PARAMETER_PARTITIONING_DIMS'] = next(
          dims for dims, rules in partitioning.RULES.items() if rules == other.rules
      )
    return ' '.join(f'--gin.{macro}={value}' for macro, value in flags.items() if value)


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a step of a run costs on a target.

  Attributes:
    target: the devices.
    setting: how the run lies on them.
    trained: numbers that train.
    frozen: numbers that do not.
    weights: bytes of the weights on each device, those included that were copied to be trained.
    state: bytes of what trains there, with its optimiser's state.
    activations: bytes of what a step computes there, the gradient included; an estimate.
    flops: of a step, on all devices together.
    transfers: bytes that a device sends in a step, by what for.
    description: the run, in a line.
    advice: the flags that would make it fit, where it does not; '' where nothing would.
    compiled: what XLA says of the same step, where it was asked.
    shares_heads: whether devices compute each head of attention together, for their number
      does not divide the heads; what they send for that is not counted.
  """

  target: Target
  setting: Setting
  trained: int
  frozen: int
  weights: int
  state: int
  activations: int
  flops: float
  transfers: Mapping[str, int]
  description: str = ''
  advice: str = ''
  compiled: CompiledStep | None = None
  shares_heads: bool = False

  @property
  def total(self) -> int:
    """Bytes on each device."""
    return self.weights + self.state + self.activations

  @property
  def fits(self) -> bool:
    """Whether that is surely there."""
    return self.total <= _USABLE * self.target.memory

  def __repr__(self) -> str:
    setting, target = self.setting, self.target
    partitions = setting.num_partitions
    data = target.count // partitions
    share = 100 * self.trained / max(self.trained + self.frozen, 1)
    seconds = ''
    if target.flops:
      least = self.flops / target.count / target.flops
      seconds = f'; {least:.3g} s at the full speed of the devices in bfloat16'
    held_as = setting.dtype
    if setting.param_dtype not in (None, setting.dtype):
      held_as = f'{setting.param_dtype}, computed in {setting.dtype}'
    verdict = 'fits'
    if not self.fits:
      verdict = 'does not fit' + (
          f'; would with {self.advice}' if self.advice else ', whatever is changed: use more '
          'or larger devices'
      )
    sent = ', '.join(f'{what} {_shown(size)}' for what, size in self.transfers.items() if size)
    if self.shares_heads:
      sent = f'at least {sent or "something"}: the heads do not divide among {partitions}'
    return '\n'.join([
        *([self.description] if self.description else []),
        f'target       {target.name}: {target.count} × {_shown(target.memory)}, mesh data {data} '
        f'× model {setting.num_partitions}',
        f'trains       {self.trained:,} of {self.trained + self.frozen:,} numbers ({share:.3g} %)',
        f'each device  weights      {_shown(self.weights)} ({held_as})',
        f'             state        {_shown(self.state)}',
        f'             activations  {_shown(self.activations)} (estimate; REMAT={setting.remat}, '
        f'MICROBATCHES={setting.microbatches})',
        f'             together     {_shown(self.total)} of {_shown(target.memory)}: {verdict}',
        f'a step       {self.flops / 1e12:.4g} TFLOP{seconds}',
        f'each sends   {sent or "nothing"}',
        *(self._compiled_lines() if self.compiled else []),
    ])

  def _compiled_lines(self) -> list[str]:
    """XLA's figures beside the estimate."""
    found = self.compiled
    lines = [f'compiled     by {found.compiler} in {found.seconds:.0f} s']
    arguments = (
        f'             arguments    {_shown(found.arguments)} (weights, state and batch; '
        f'estimate {_shown(self.weights + self.state)} without the batch)'
    )
    if found.refusal:
      return [*lines, arguments, f'             does not fit: {found.refusal}']
    sent = [
        f'{kind} {_shown(of.bytes)} in {of.count:,}' for kind, of in sorted(found.sent.items())
    ]
    fits = 'fits' if found.total <= self.target.memory else 'does not fit'
    return [
        *lines,
        arguments,
        f'             temporaries  {_shown(found.temporaries)} (estimate '
        f'{_shown(self.activations)})',
        f'             results      {_shown(found.results)}, beside what takes the place of '
        'arguments',
        f'             at once      {_shown(found.total)} of {_shown(self.target.memory)}: {fits}',
        # XLA's own count of FLOPs takes the body of a loop once, however often it runs.
        f'             each sends   {", ".join(sent) or "nothing"} (estimate '
        f'{_shown(sum(self.transfers.values()))})',
    ]


def plan(
    *,
    backbone: Backbone,
    target: str | Target = 'here',
    method: Method | None = None,
    trainable: Any = None,
    batch_size: int = 32,
    feature_lengths: Mapping[str, int] | None = None,
    lengths: str = 'pad',
    packed_length: int | None = None,
    microbatches: int = 1,
    dropout_rate: float = 0.0,
    dtype: str | None = None,
    num_partitions: int = 1,
    compiled: bool = False,
) -> Plan:
  """Counts what a step of a training run costs, and whether it fits.

  Args:
    backbone: the model and its rules; its sizes count, its weights are not read.
    target: the devices, or their name as `targets.parse` takes it.
    method: the prompt method; None tunes the model.
    trainable: the run's optimiser or labelling.
    batch_size: examples of a batch over all devices, each taken to be of the longest that
      there are.
    feature_lengths: longest inputs and targets in tokens.
    lengths: of them, 'pack' puts several into a row; shorter ones than the longest need
      fewer rows than are counted. The others are the same for the longest.
    packed_length: tokens of a packed row; None counts the longest that a run may choose.
    microbatches: parts of each batch.
    dropout_rate: of the model while it trains.
    dtype: 'auto' plans for what the target's devices compute in, whatever this machine's do;
      else the backbone's own counts.
    num_partitions: devices that share a copy of the model.
    compiled: whether to compile the step as well, for XLA's own figures; it takes a minute
      or two.

  Raises:
    ValueError: if the target is not known, or the devices, rows and parts do not divide, or
      the step is to be compiled for devices that only a machine with them can compile for.
    ImportError: if it is to be compiled for TPUs, and their compiler is not installed.
  """
  found = targets.parse(target) if isinstance(target, str) else target
  module = backbone.module.clone(dropout_rate=dropout_rate)
  on_accelerators = dtype == 'auto' and found.kind != 'here'
  setting = Setting(
      'bfloat16' if on_accelerators else jnp.dtype(module.dtype).name,
      module.remat,
      microbatches,
      num_partitions,
      tuple(map(tuple, backbone.rules)),
      'int8' if module.int8 else backbone.param_dtype,
  )
  limits = _lengths(feature_lengths)
  if trainable is None:
    trainable = default_optimizer(method)
  labelling = trainable_lib.as_labelling(trainable, method)
  check_divides(found, num_partitions, batch_size, microbatches)
  # What cannot be compiled is said before anything is counted.
  mesh = plan_compiled.mesh_of(found, num_partitions) if compiled else None
  rows, what_rows = batch_size, ''
  if lengths == 'pack':
    rows, limits, what_rows = _packed(method, limits, packed_length, batch_size, found, setting)
  run = _Run(module, method, labelling, rows, limits, packed=lengths == 'pack')
  result = run.plan(found, setting)
  advice = ''
  if not result.fits:
    easier = _easier(setting, found, rows)
    if not any(prefix.split('/')[0] == 'backbone' for prefix in labelling):
      if setting.param_dtype == 'float32' and found.kind != 'here':
        easier = _easier(dataclasses.replace(setting, param_dtype='bfloat16'), found, rows)
      in_int8 = dataclasses.replace(setting, param_dtype='int8')
      easier = itertools.chain(easier, [in_int8], _easier(in_int8, found, rows))
    fitting = (s for s in easier if run.fits(found, s))
    better = next(fitting, None)
    advice = '' if better is None else setting.changes(better)
  what = 'model tuning' if method is None else type(method).__name__
  return dataclasses.replace(
      result,
      description=(
          f'run          {backbone.name}, {what}, {rows} rows of {limits["inputs"]} + '
          f'{run.prompt_length} input and {limits["targets"]} target tokens{what_rows}'
      ),
      advice=advice,
      compiled=run.compile(setting, mesh) if compiled else None,
  )


def _packed(
    method: Method | None,
    limits: Mapping[str, int],
    packed_length: int | None,
    batch_size: int,
    target: Target,
    setting: Setting,
) -> tuple[int, dict[str, int], str]:
  """Packed rows of the longest examples: how many, what is in each, and that in words."""
  prompt, in_decoder = 0, 0
  if method is not None:
    prompt, in_decoder = method.num_virtual_tokens, method.num_decoder_virtual_tokens
  longest = limits['inputs'] + prompt
  # The examples there are may be shorter than allowed, and rows too.
  longest = min(longest, packed_length or longest)
  width = packing.packed_widths(packed_length, longest, limits, prompt)[-1]
  in_row = width // longest
  multiple = target.count // setting.num_partitions * setting.microbatches
  rows = buckets.round_up(-(-batch_size // in_row), multiple)
  # Each row gets one prompt from `batch_shapes`; those of the others are part of the rest.
  of_row = {
      'inputs': width - prompt,
      'targets': in_row * (limits['targets'] + in_decoder) - in_decoder,
  }
  return rows, of_row, f', of {batch_size} packed examples of the longest'


def check_memory(*, backbone: Backbone, **run: Any) -> None:
  """Looks whether a run fits on this machine's devices, before its weights are read.

  Args:
    backbone: the model, on the mesh of the run.
    **run: what `plan` takes of a run.

  Raises:
    MemoryError: if weights and state alone are larger than an accelerator's memory. Of what
      is an estimate, and of a CPU, which may swap, it warns.
  """
  known = targets.memory_here() is not None
  if not known and jax.default_backend() != 'cpu':
    return
  mesh = backbone.mesh
  here = targets.parse('here')
  if _at_most(backbone, **run) < here.memory:
    return
  if mesh is None:
    here = dataclasses.replace(here, count=1)
  partitions = 1 if mesh is None else mesh.shape['model']
  found = plan(backbone=backbone, target=here, num_partitions=partitions, **run)
  if found.total <= here.memory:
    return
  message = f'The devices of this machine are too small for this run:\n{found}'
  if known and found.weights + found.state > here.memory:
    raise MemoryError(message)
  warnings.warn(f'{message}\nIt is tried all the same.', stacklevel=2)


def _at_most(
    backbone: Backbone,
    method: Method | None = None,
    batch_size: int = 32,
    feature_lengths: Mapping[str, int] | None = None,
    packed_length: int | None = None,
    **others: Any,
) -> float:
  """Bytes that no step of a run reaches on one device, in no time: counting takes seconds.

  As if all of the model trained by Adam, in float32, and a step kept all that it computes.
  """
  del others
  config, lengths = backbone.module.config, _lengths(feature_lengths)
  of_token = 30 * (config.d_model + config.num_heads * config.d_kv) + 10 * config.d_ff
  tokens = lengths['inputs'] + lengths['targets'] + (packed_length or 0)
  trained = 0
  if method is not None:
    tokens += method.num_virtual_tokens + method.num_decoder_virtual_tokens
    trained = trainable_lib.count(method_lib.shapes(method, backbone.spec)[0])
  layers = config.num_encoder_layers + config.num_decoder_layers
  activations = layers * (of_token + 10 * config.num_heads * tokens) + 10 * config.vocab_size
  return 4.0 * (6 * (backbone.num_params + trained) + batch_size * tokens * activations)


def _lengths(given: Mapping[str, int] | None) -> dict[str, int]:
  """The lengths of a run, those of `train` where they are not given."""
  return {'inputs': 512, 'targets': 8, **(given or {})}


def mesh_of(target: Target, num_partitions: int) -> AbstractMesh:
  """The mesh of a run on a target, as far as its sizes go."""
  return AbstractMesh(
      (target.count // num_partitions, num_partitions), partitioning.MESH_AXES
  )


def check_divides(target: Target, partitions: int, rows: int, microbatches: int) -> None:
  """Raises ValueError unless a batch divides among a target's devices and its parts."""
  count = target.of_slice
  if count % partitions:
    valid = [n for n in range(1, count + 1) if count % n == 0]
    raise ValueError(
        f'NUM_PARTITIONS={partitions} does not divide the {count} devices of '
        + ('each slice of ' if target.slices > 1 else '')
        + f'{target.name}. It may be {", ".join(map(str, valid))}.'
    )
  data = target.count // partitions
  if rows % data:
    raise ValueError(
        f'BATCH_SIZE={rows} does not divide among the {data} copies of the model on '
        f'{target.name}. Use a multiple of {data}, or a larger NUM_PARTITIONS.'
    )
  check_microbatches(microbatches, rows // data, 'the {} rows of a device')


def _easier(setting: Setting, target: Target, rows: int) -> Iterator[Setting]:
  """Settings that need less memory, those that cost the least speed first."""
  replace = dataclasses.replace
  start = setting if target.kind == 'here' else replace(setting, dtype='bfloat16')
  if start != setting:
    yield start
  remats = list(t5_stacks.REMAT_POLICIES)  # From the fastest to the one that keeps least.
  partitions = setting.num_partitions
  while partitions <= target.of_slice:
    of_size = replace(start, num_partitions=partitions)
    wider = [partitioning.DEFAULT_RULES, partitioning.FULLY_SHARDED_RULES]
    for rules in dict.fromkeys([setting.rules, *wider[: 1 + (partitions < target.count)]]):
      split = replace(of_size, rules=rules)
      for remat in remats[remats.index(setting.remat) :]:
        yield replace(split, remat=remat)
      parts = 2 * setting.microbatches
      of_device = rows * partitions // target.count
      while of_device % parts == 0:
        yield replace(split, remat='full', microbatches=parts)
        parts *= 2
    partitions *= 2
    while partitions <= target.of_slice and target.of_slice % partitions:
      partitions += 1


class _Held(NamedTuple):
  """What lies on a device before a step.

  Attributes:
    trained: numbers that train.
    frozen: numbers that do not.
    weights: bytes of the weights.
    state: bytes of what trains, with its optimiser's state.
    local_frozen: shapes of the frozen weights that a device computes with.
    tx: the optimiser.
    train_state: shapes of the state that a device computes with.
  """

  trained: int
  frozen: int
  weights: int
  state: int
  local_frozen: PyTree
  tx: optax.GradientTransformation
  train_state: TrainState


class _Run:
  """A run as a device sees it, for any setting."""

  def __init__(
      self,
      module: T5,
      method: Method | None,
      labelling: Any,
      batch_size: int,
      lengths: Mapping[str, int],
      packed: bool,
  ):
    self._module = module
    # Initialisers may read the embeddings of a model that is not here.
    self._method = method and method_lib.without_initializers(method)
    self._labelling = labelling
    self._batch_size = batch_size
    self._lengths = lengths
    self._packed = packed
    self._held: dict[Any, _Held] = {}
    self.prompt_length = 0 if method is None else method.num_virtual_tokens
    self._in_decoder = 0 if method is None else method.num_decoder_virtual_tokens

  def plan(self, target: Target, setting: Setting) -> Plan:
    """Costs of a step on the target."""
    held = self._hold(target, setting)
    local = self._module_of(setting).clone(
        config=_config_of_device(self._module.config, setting)
    )
    data = target.count // setting.num_partitions
    rows = self._batch_size // data
    step = make_train_step(self._method, local, held.tx, microbatches=setting.microbatches)
    counted = costs.count(step, held.train_state, held.local_frozen, self._batch(rows))
    gathered = 0
    if setting.gathers_weights:
      gathered = 2 * _bytes(held.local_frozen) // self._num_layers
    return Plan(
        target=target,
        setting=setting,
        trained=held.trained,
        frozen=held.frozen,
        weights=held.weights,
        state=held.state,
        activations=counted.peak_bytes + gathered,
        flops=counted.flops * target.count,
        transfers=self._transfers(setting, data, rows, held),
        shares_heads=setting.shares_heads(self._module.config),
    )

  def fits(self, target: Target, setting: Setting) -> bool:
    """Whether a step fits; what is larger without any activation is not counted further."""
    held = self._hold(target, setting)
    if held.weights + held.state > _USABLE * target.memory:
      return False
    return self.plan(target, setting).fits

  def _hold(self, target: Target, setting: Setting) -> _Held:
    """What lies on a device before a step."""
    # What else a setting says has no part in it.
    key = (target.count, dataclasses.replace(setting, remat='none', microbatches=1))
    if key in self._held:
      return self._held[key]
    whole = self._module_of(setting)
    trained, frozen = trainable_lib.split(
        self._shapes(whole, setting.held_as), self._labelling
    )
    mesh = mesh_of(target, setting.num_partitions)
    part = _Parts(mesh, setting.rules, {'backbone': whole.logical_axes()})
    local = whole.clone(config=_config_of_device(whole.config, setting))
    local_trained, local_frozen = trainable_lib.split(
        self._shapes(local, setting.held_as), self._labelling
    )
    tx = trainable_lib.make_optimizer(self._labelling, local_trained)
    in_float32 = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), local_trained
    )
    state = jax.eval_shape(lambda tree: TrainState.create(tree, tx), in_float32)
    self._held[key] = _Held(
        trained=trainable_lib.count(trained),
        frozen=trainable_lib.count(frozen),
        # The run trains a copy, and the backbone keeps its own.
        weights=part.bytes(frozen) + part.bytes({'backbone': trained.get('backbone')}),
        # Of a trained model the state is split as its weights are.
        state=int(_bytes(state) * part.bytes(trained) / max(_bytes(local_trained), 1)),
        local_frozen=local_frozen,
        tx=tx,
        train_state=state,
    )
    return self._held[key]

  def compile(self, setting: Setting, mesh: jax.sharding.Mesh | None) -> CompiledStep:
    """The same step as XLA compiles it for the devices of a mesh."""
    return plan_compiled.compile_step(
        self._module_of(setting),
        self._method,
        self._labelling,
        self._batch(self._batch_size),
        mesh=mesh,
        rules=setting.rules,
        held_as=setting.held_as,
        microbatches=setting.microbatches,
    )

  def _module_of(self, setting: Setting) -> T5:
    return self._module.clone(
        dtype=jnp.dtype(setting.dtype),
        remat=setting.remat,
        int8=setting.param_dtype == 'int8',
    )

  def _batch(self, rows: int) -> Batch:
    batch = batch_shapes(
        self._method, rows, self._lengths['inputs'], self._lengths['targets']
    )
    if not self._packed:
      return batch
    return batch.replace(
        encoder_segment_ids=batch.encoder_input_tokens,
        decoder_segment_ids=batch.decoder_input_tokens,
    )

  @property
  def _num_layers(self) -> int:
    config = self._module.config
    return config.num_encoder_layers + config.num_decoder_layers

  def _shapes(self, module: T5, dtype: Any) -> PyTree:
    weights = jax.eval_shape(module.init_params, jax.random.key(0))
    shapes = {'backbone': int8.held_as(weights, dtype)}
    if self._method is not None:
      shapes['prompt'], _ = method_lib.shapes(self._method, module.spec)
    return shapes

  def _transfers(
      self, setting: Setting, data: int, rows: int, held: _Held
  ) -> dict[str, int]:
    """Bytes that a device sends in a step, in rings."""
    config, width = self._module.config, jnp.dtype(setting.dtype).itemsize
    model = setting.num_partitions
    inputs = rows * (self._lengths['inputs'] + self.prompt_length) * config.d_model * width
    outputs = rows * (self._lengths['targets'] + self._in_decoder) * config.d_model * width
    # An all-reduce sends everything but a device's own part twice, a gathering once.
    reduced, gathered_part = 2 * (model - 1) / model, (data - 1) / data
    # Where the backward pass computes a layer's sums again, but for the last, which it needs not.
    again = setting.remat in ('full', 'qkv_and_mlp')
    # Behind attention and MLP, and in the backward pass before them, where they are split;
    # there cross-attention's gradient by the encoder's output is a sum in every layer, too.
    attention = setting.part('joined_kv', config.num_heads) < config.num_heads
    mlp = setting.part('mlp', config.d_ff) < config.d_ff
    sums = inputs * (2 * (attention + mlp) + again * attention) * config.num_encoder_layers
    sums += inputs * attention * config.num_decoder_layers
    sums += outputs * (2 * (2 * attention + mlp) + 2 * again * attention) * (
        config.num_decoder_layers
    )
    weights = 0
    if setting.gathers_weights:
      passes = (2 + again) * setting.microbatches
      weights = int(gathered_part * passes * _bytes(held.local_frozen))
    return {
        'sums of the model axis': int(reduced * sums),
        'weights': weights,
        'gradients': int(2 * gathered_part * 4 * trainable_lib.count(held.train_state.trainable)),
    }


class _Parts:
  """What of a tree of weights lies on each device."""

  def __init__(self, mesh: AbstractMesh, rules: partitioning.Rules, axes: PyTree):
    self._mesh = mesh
    self._rules = rules
    self._axes = {
        jax.tree_util.keystr(path): tuple(spec)
        for path, spec in jax.tree_util.tree_flatten_with_path(
            axes, is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec)
        )[0]
    }

  def bytes(self, tree: PyTree) -> int:
    """Bytes of the tree on a device; what has no axes, a prompt, is everywhere."""
    total = 0
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
      shape = leaf.shape
      if axes := self._axes.get(jax.tree_util.keystr(path)):
        place = partitioning.sharding(self._mesh, axes, shape, self._rules)
        shape = place.shard_shape(shape)
      total += math.prod(shape) * leaf.dtype.itemsize
    return total


def _config_of_device(config: T5Config, setting: Setting) -> T5Config:
  """The sizes that a device computes with: its share of the heads, units and vocabulary."""
  return dataclasses.replace(
      config,
      num_heads=setting.part('joined_kv', config.num_heads),
      d_ff=setting.part('mlp', config.d_ff),
      vocab_size=setting.part('vocab', config.vocab_size),
  )


def _bytes(tree: PyTree) -> int:
  return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _shown(size: float) -> str:
  for unit, name in ((2**30, 'GiB'), (2**20, 'MiB'), (2**10, 'KiB')):
    if size >= unit:
      return f'{size / unit:.3g} {name}'
  return f'{size:.0f} bytes'
