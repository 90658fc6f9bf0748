"""The trial axis: several runs that train their prompts on one frozen model, in one program.

The runs of an ablation differ in length, initialisation, seed, optimiser or the method's own
parameters, all of which end at the Injection. So the model sees one Injection of all their
prompts and a batch of all their rows (`data/trial_batches.py`), and since the loss is a sum
over rows, each prompt's gradient is that of its own rows. Runs with parameters of the same
shapes and the same optimiser are stacked and mapped over; those of other shapes stand beside
them, so that an optimiser sees what it would see in the run alone.

A run whose loss, gradient or prompt is no longer finite stays at its last good state, and the
others go on: no row ever meets a row of another run.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from prompt_tuning_jax import partitioning
from prompt_tuning_jax.injection_stack import stack_injections
from prompt_tuning_jax.methods import method as method_lib
from prompt_tuning_jax.methods.method import Method
from prompt_tuning_jax.training import losses
from prompt_tuning_jax.training import trainable as trainable_lib
from prompt_tuning_jax.training.description import describe
from prompt_tuning_jax.training.loop import is_finite
from prompt_tuning_jax.training.step import accumulate, position_values
from prompt_tuning_jax.typing import Array, BackboneSpec, Batch, Injection, PyTree


@dataclasses.dataclass(frozen=True)
class Trial:
  """What one of the runs has of its own, besides its data.

  Attributes:
    method: the prompt method.
    trainable: the optimiser of the prompt, or a labelling of `prompt` alone.
    seed: of the prompt's initialisation.
  """

  method: Method
  trainable: optax.GradientTransformation | trainable_lib.Labelling
  seed: int = 0


@dataclasses.dataclass(frozen=True)
class _Group:
  """Trials that are mapped over: their numbers, and the method and optimiser of all."""

  members: tuple[int, ...]
  method: Method
  tx: optax.GradientTransformation


@flax.struct.dataclass
class TrialsState:
  """All that changes while trials train.

  Attributes:
    step: number of updates so far.
    trainable: for each group, by its number, the tree of its trials' prompts, each array with
      the trials in front.
    opt_state: the optimisers' states, likewise.
    stopped_at: [K] int32, the step at which a trial went out of bounds; -1 while it goes on.
  """

  step: Array
  trainable: dict[str, PyTree]
  opt_state: dict[str, PyTree]
  stopped_at: Array


class Trials:
  """Trials that share a program.

  Attributes:
    num_virtual_tokens: P, virtual tokens in the encoder's input of the longest prompt.
    num_decoder_virtual_tokens: Q, those before the decoder's start token, of each.
    count: K, the number of trials.
    have_dropout: whether the method of one of them drops anything while it trains.
  """

  def __init__(self, trials: Sequence[Trial], spec: BackboneSpec):
    """Groups the trials.

    Raises:
      ValueError: if one trains more than a prompt.
    """
    self._trials = list(trials)
    self._spec = spec
    self.count = len(self._trials)
    members = collections.defaultdict(list)
    for number, trial in enumerate(self._trials):
      if why := why_alone(trial.method, trial.trainable):
        raise ValueError(f'Trial {number} cannot share a program: {why}.')
      members[_shape_key(trial)].append(number)
    self._groups = {str(n): self._group(of_group) for n, of_group in enumerate(members.values())}
    methods = [trial.method for trial in self._trials]
    self.num_virtual_tokens = max(method.num_virtual_tokens for method in methods)
    self.num_decoder_virtual_tokens = max(m.num_decoder_virtual_tokens for m in methods)
    self.have_dropout = any(method.has_dropout for method in methods)

  def _group(self, members: Sequence[int]) -> _Group:
    first = self._trials[members[0]]
    shapes = {'prompt': method_lib.shapes(first.method, self._spec)[0]}
    labelling = trainable_lib.as_labelling(first.trainable, first.method)
    trainable_lib.split(shapes, labelling)
    return _Group(tuple(members), first.method, trainable_lib.make_optimizer(labelling, shapes))

  def initial_state(self) -> TrialsState:
    """The state before the first step; each prompt is drawn as in its run alone."""

    def drawn(number: int) -> PyTree:
      trial = self._trials[number]
      params = trial.method.init(jax.random.key(trial.seed), self._spec)['params']
      return {'prompt': jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)}

    trainable = {
        name: jax.tree.map(lambda *x: jnp.stack(x), *map(drawn, group.members))
        for name, group in self._groups.items()
    }
    # A start that is not finite ends that trial alone, and no state holds it.
    good_K = self.of_each(is_finite, trainable)
    trainable = self.chosen(good_K, trainable, jax.tree.map(jnp.zeros_like, trainable))
    return TrialsState(
        step=jnp.zeros((), jnp.int32),
        trainable=trainable,
        opt_state={
            name: jax.vmap(group.tx.init)(trainable[name]) for name, group in self._groups.items()
        },
        stopped_at=jnp.where(good_K, -1, 1).astype(jnp.int32),
    )

  @property
  def state_bytes(self) -> int:
    """What trains in all trials, in float32, and what their optimisers keep; nothing is drawn."""
    held = 0
    for group in self._groups.values():
      shapes = method_lib.shapes(group.method, self._spec)[0]
      trained = {
          'prompt': jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), shapes)
      }
      kept = [trained, jax.eval_shape(group.tx.init, trained)]
      of_one = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(kept))
      held += of_one * len(group.members)
    return held

  def placed_state(self, mesh: Mesh | None) -> TrialsState:
    """The same on the devices of a mesh, all of which hold all prompts."""
    return partitioning.replicate(self.initial_state(), mesh)

  def params_of(self, trainable: dict[str, PyTree], number: int) -> PyTree:
    """The trainable tree of one trial, as its run alone has it."""
    for name, group in self._groups.items():
      if number in group.members:
        place = group.members.index(number)
        return jax.tree.map(lambda x: x[place], trainable[name])
    raise IndexError(f'There are {self.count} trials, and no trial {number}.')

  def injection_of(self, trainable: dict[str, PyTree], number: int) -> Injection:
    """What inference needs of one trial."""
    params = self.params_of(trainable, number)['prompt']
    return self._trials[number].method.apply({'params': params}, self._spec)

  def injections(
      self, trainable: dict[str, PyTree], dropout_rng: Array | None = None
  ) -> list[Injection]:
    """The Injection of each trial; methods drop where a key is given."""
    found: list[Any] = [None] * self.count
    for name, group in self._groups.items():

      def one(params, number, method=group.method):
        rngs = {}
        if dropout_rng is not None and method.has_dropout:
          rngs['dropout'] = jax.random.fold_in(dropout_rng, number)
        return method.apply({'params': params['prompt']}, self._spec, rngs=rngs)

      of_group = jax.vmap(one)(trainable[name], jnp.array(group.members))
      for place, number in enumerate(group.members):
        found[number] = jax.tree.map(lambda x: x[place], of_group)
    return found

  def of_each(
      self, function: Callable[[PyTree], Array], trees: dict[str, PyTree]
  ) -> Array:
    """[K]: a number for each trial, by a function of its tree."""
    values = [jax.vmap(function)(trees[name]) for name in self._groups]
    order = [number for group in self._groups.values() for number in group.members]
    return jnp.zeros(self.count, values[0].dtype).at[jnp.array(order)].set(
        jnp.concatenate(values)
    )

  def updated(
      self, gradient: dict[str, PyTree], state: TrialsState
  ) -> tuple[dict[str, PyTree], dict[str, PyTree]]:
    """Prompts and optimiser states after an update of every trial."""
    trainable, opt_state = {}, {}
    for name, group in self._groups.items():
      updates, opt_state[name] = jax.vmap(group.tx.update)(
          gradient[name], state.opt_state[name], state.trainable[name]
      )
      trainable[name] = optax.apply_updates(state.trainable[name], updates)
    return trainable, opt_state

  def chosen(
      self, condition_K: Array, new: dict[str, PyTree], old: dict[str, PyTree]
  ) -> dict[str, PyTree]:
    """The new trees of those trials for which the condition holds, the old ones of the others."""

    def choose(group: _Group, one: Array, other: Array) -> Array:
      of_group = condition_K[jnp.array(group.members)]
      return jnp.where(of_group.reshape(-1, *(1,) * (one.ndim - 1)), one, other)

    return {
        name: jax.tree.map(functools.partial(choose, group), new[name], old[name])
        for name, group in self._groups.items()
    }


def why_alone(method: Method | None, trainable: Any) -> str:
  """Why a run cannot share a program with others; '' where it can."""
  if method is None:
    return 'it trains the model'
  labels = trainable_lib.as_labelling(trainable, method)
  beside = [prefix for prefix in labels if prefix.split('/')[0] != 'prompt']
  if beside:
    return f'it trains {beside[0]!r} as well'
  return ''


def _shape_key(trial: Trial) -> str:
  """What trials that are mapped over have in common: optimiser, and method but for its start."""
  method = method_lib.without_initializers(trial.method)
  labelling = trainable_lib.as_labelling(trial.trainable, trial.method)
  return json.dumps([describe(method), describe(labelling)], sort_keys=True)


def make_trials_step(
    trials: Trials,
    module: nn.Module,
    *,
    loss: losses.LossConfig = losses.LossConfig(),
    microbatches: Sequence[int] = (1,),
    seed: int = 0,
    placement: tuple[Any, Any] | None = None,
) -> Callable[[TrialsState, PyTree, Sequence[Batch]], tuple[TrialsState, dict[str, Any]]]:
  """Builds the compiled step of all trials; the state is donated.

  Args:
    trials: the trials.
    module: the backbone's module; its `dropout_rate` applies.
    loss: z-loss, smoothing and normalisation, of each trial's loss by itself.
    microbatches: for each section of a batch, into how many parts it is split to save memory.
    seed: of dropout.
    placement: shardings of the state and of the metrics, on a mesh.

  Returns:
    `(state, frozen, sections) → (state, metrics)`, with a Batch for each section. Metrics are
    those of `make_train_step`, of the trials that go on together, and under `trials` [K] for
    each by itself.
  """
  dropout = getattr(module, 'dropout_rate', 0.0) > 0.0 or trials.have_dropout
  counts = loss.normalizing_factor in ('AVERAGE_PER_SEQUENCE', 'NUM_REAL_TARGET_TOKENS')

  @functools.partial(jax.jit, donate_argnums=0, out_shardings=placement)
  def trials_step(state, frozen, sections):
    weights, factors = zip(
        *(losses.weights_and_factor(batch, loss.normalizing_factor) for batch in sections)
    )

    def of_trials(x_BT: Array, ids_B: Array) -> Array:
      return jax.ops.segment_sum(jnp.sum(x_BT, axis=-1), ids_B, trials.count)

    factor_K = jnp.full(trials.count, factors[0])
    if counts:
      ids = [batch.prompt_ids for batch in sections]
      factor_K = sum(map(of_trials, weights, ids))
    rng = jax.random.fold_in(jax.random.key(seed), state.step) if dropout else None

    def scaled_loss(trainable, batch, weights_BT, rng):
      method_rng = None if rng is None else jax.random.fold_in(rng, 1)
      injection = stack_injections(trials.injections(trainable, method_rng))
      logits_BTV = module.apply(
          {'params': frozen['backbone']},
          batch,
          injection,
          enable_dropout=rng is not None,
          rngs={} if rng is None else {'dropout': rng},
      )
      sums = {
          name: of_trials(value_BT, batch.prompt_ids)
          for name, value_BT in position_values(logits_BTV, batch, weights_BT, loss).items()
      }
      return jnp.sum(sums['loss'] / factor_K), sums

    gradient_of = jax.grad(scaled_loss, has_aux=True)
    of_sections = [
        accumulate(
            gradient_of,
            state.trainable,
            batch,
            weights_BT,
            None if rng is None else jax.random.fold_in(rng, number),
            parts,
        )
        for number, (batch, weights_BT, parts) in enumerate(
            zip(sections, weights, microbatches, strict=True)
        )
    ]
    gradient, sums = jax.tree.map(lambda *x: sum(x), *of_sections)
    with jax.named_scope('optimizer'):
      trainable, opt_state = trials.updated(gradient, state)
      norms_K = trials.of_each(optax.tree.norm, gradient)
      good_K = (
          (state.stopped_at < 0)
          & jnp.isfinite(sums['loss'])
          & jnp.isfinite(norms_K)
          & trials.of_each(is_finite, trainable)
      )
      new_state = TrialsState(
          step=state.step + 1,
          trainable=trials.chosen(good_K, trainable, state.trainable),
          opt_state=trials.chosen(good_K, opt_state, state.opt_state),
          stopped_at=jnp.where(
              good_K | (state.stopped_at >= 0), state.stopped_at, state.step + 1
          ),
      )
    of_each = dict(sums, loss_factor=factor_K, gradient_norm=norms_K)
    of_all = {name: jnp.sum(jnp.where(good_K, x, 0)) for name, x in of_each.items()}
    of_all['gradient_norm'] /= jnp.maximum(jnp.sum(good_K), 1)
    return new_state, of_all | {'trials': of_each, 'stopped_at': new_state.stopped_at}

  return trials_step
