"""What a device holds and does in a step, counted from shapes.

A device's part of a run is the same run with its share of the rows, heads and hidden units, whose
costs are counted in its jaxpr (`costs.py`). Heads that do not divide are counted whole on every
device.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh

from prompt_tuning_jax import costs, partitioning, plan_compiled
from prompt_tuning_jax.backbones import int8
from prompt_tuning_jax.backbones.t5 import T5, T5Config
from prompt_tuning_jax.methods import method as method_lib
from prompt_tuning_jax.methods.method import Method
from prompt_tuning_jax.plan_compiled import CompiledStep
from prompt_tuning_jax.plan_setting import Setting
from prompt_tuning_jax.targets import Target
from prompt_tuning_jax.training import trainable as trainable_lib
from prompt_tuning_jax.training.step import TrainState, make_train_step
from prompt_tuning_jax.typing import Batch, PyTree


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


@dataclasses.dataclass(frozen=True)
class Counts:
  """What a step of a run costs on a target.

  Attributes:
    trained: numbers that train.
    frozen: numbers that do not.
    weights: bytes of the weights on each device, those included that were copied to be trained.
    state: bytes of what trains there, with its optimiser's state.
    activations: bytes of what a step computes there, the gradient included; an estimate.
    flops: of a step, on all devices together.
    transfers: bytes that a device sends in a step, by what for.
  """

  trained: int
  frozen: int
  weights: int
  state: int
  activations: int
  flops: float
  transfers: Mapping[str, int]

  @property
  def total(self) -> int:
    """Bytes on each device."""
    return self.weights + self.state + self.activations


class Run:
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

  def counts(self, target: Target, setting: Setting) -> Counts:
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
    return Counts(
        trained=held.trained,
        frozen=held.frozen,
        weights=held.weights,
        state=held.state,
        activations=counted.peak_bytes + gathered,
        flops=counted.flops * target.count,
        transfers=self._transfers(setting, data, rows, held),
    )

  def fits(self, target: Target, setting: Setting) -> bool:
    """Whether a step fits; what is larger without any activation is not counted further."""
    held = self._hold(target, setting)
    if held.weights + held.state > target.usable:
      return False
    return self.counts(target, setting).total <= target.usable

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
    batch = method_lib.batch_shapes(
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


def mesh_of(target: Target, num_partitions: int) -> AbstractMesh:
  """The mesh of a run on a target, as far as its sizes go."""
  return AbstractMesh(
      (target.count // num_partitions, num_partitions), partitioning.MESH_AXES
  )
