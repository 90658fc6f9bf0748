"""The parameters of a run: what trains, what stays, and what inference makes of both."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from prompt_tuning_jax import partitioning
from prompt_tuning_jax.backbones.backbone import Backbone
from prompt_tuning_jax.methods import method as method_lib
from prompt_tuning_jax.methods.method import Method
from prompt_tuning_jax.training import trainable as trainable_lib
from prompt_tuning_jax.training.step import TrainState
from prompt_tuning_jax.typing import BackboneSpec, Injection, PyTree


class RunParameters:
  """A run's parameters, split by a labelling.

  `train` and `pretrain` start a run from them, and `restore_run` reads a run's states with
  them, so that all have the same idea of what a state holds.

  Attributes:
    tx: the optimiser of the trainable tree.
    frozen: the tree that is not differentiated.
    template: shapes, types and places of a TrainState of the run.
  """

  def __init__(
      self,
      params: PyTree,
      trainable: Any,
      method: Method | None = None,
      spec: BackboneSpec | None = None,
      mesh: Mesh | None = None,
  ):
    """Splits the parameters.

    Args:
      params: `{'backbone': …}`, and `'prompt'` where there is a method.
      trainable: an optimiser or a labelling, see `trainable.as_labelling`.
      method: the prompt method, or None to tune the model.
      spec: sizes of the backbone, where there is a method.
      mesh: the devices that the parameters lie on, if several.

    Raises:
      ValueError: if the labelling leads to no parameter.
    """
    self._method = method
    self._spec = spec
    self._mesh = mesh
    labelling = trainable_lib.as_labelling(trainable, method)
    self._trained, self.frozen = trainable_lib.split(params, labelling)
    self.tx = trainable_lib.make_optimizer(labelling, self._trained)

  @classmethod
  def of(
      cls, backbone: Backbone, method: Method | None, trainable: Any, *, seed: int = 0
  ) -> RunParameters:
    """Loads a backbone's weights and draws a method's prompt from the seed.

    Raises:
      ValueError: before that, if the labelling leads to no parameter, or to weights that
        cannot be trained.
    """
    shapes = {'backbone': backbone.shapes}
    if method is not None:
      shapes['prompt'], _ = method_lib.shapes(method, backbone.spec)
    trainable_lib.split(shapes, trainable_lib.as_labelling(trainable, method))
    params = {'backbone': backbone.params}
    if method is not None:
      params['prompt'] = method.init(jax.random.key(seed), backbone.spec)['params']
    return cls(params, trainable, method, backbone.spec, backbone.mesh)

  @functools.cached_property
  def template(self) -> TrainState:
    if self._mesh is None:
      return jax.eval_shape(self.initial_state)
    return places_of(self.placed_state())

  @property
  def count(self) -> int:
    """How many numbers train."""
    return trainable_lib.count(self._trained)

  def initial_state(self) -> TrainState:
    """The state before the first step."""
    # Copies, for the step donates its state and the backbone keeps its weights; in float32
    # whatever computes, for in bfloat16 most updates would be rounded away.
    trained = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), self._trained)
    return TrainState.create(trained, self.tx)

  def placed_state(self) -> TrainState:
    """The same on the run's mesh: copies of a prompt everywhere, a model in its shards."""
    return partitioning.replicate(self.initial_state(), self._mesh)

  @property
  def placement(self) -> tuple[Any, Any] | None:
    """Where a step is to leave the state and its metrics; None without a mesh."""
    return placement_of(self.template, self._mesh)

  def folded(self, trained: PyTree) -> tuple[Injection | None, PyTree]:
    """What inference needs of a trainable tree: the Injection and the backbone's weights."""
    params = trainable_lib.merge(trained, self.frozen)
    if self._method is None:
      return None, params['backbone']
    injection = self._method.apply({'params': params['prompt']}, self._spec)
    return injection, params['backbone']


def placement_of(state: PyTree, mesh: Mesh | None) -> tuple[Any, Any] | None:
  """Where a step is to leave a state, each array where it lies, and its metrics.

  Args:
    state: arrays, or what `places_of` says of them.
    mesh: the run's; None for one device, where nothing has to be said.
  """
  if mesh is None:
    return None
  return jax.tree.map(lambda x: x.sharding, state), partitioning.everywhere(mesh)


def places_of(state: PyTree) -> PyTree:
  """Shapes, types and places of a state's arrays."""
  return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
  )
