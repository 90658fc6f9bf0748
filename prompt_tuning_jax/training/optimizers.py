"""Optimisers and schedules with the published settings as defaults.

Everything returned is an optax transformation, so that any optax optimiser can take
its place in gin or Python.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from prompt_tuning_jax.training.description import keeps_arguments
from prompt_tuning_jax.typing import Array, PyTree


@keeps_arguments
def adafactor(
    learning_rate: optax.ScalarOrSchedule = 0.3,
    *,
    step_offset: int = 0,
    decay_rate: float = 0.8,
    weight_decay_rate: float | None = 1e-5,
    clipping_threshold: float | None = 1.0,
    multiply_by_parameter_scale: bool = False,
) -> optax.GradientTransformation:
  """Adafactor (Shazeer & Stern, 2018) as Lester et al. (2021, section 3) train prompts.

  Constant learning rate 0.3, no parameter scaling, no momentum, updates clipped to RMS 1;
  the weight decay is not multiplied by the learning rate. Second moments are factored
  only where both dimensions are at least 128, so a prompt of 100 tokens is not. Each layer
  of a stack (`[L, …]` under `layers`) is a parameter of its own, as in T5X: it is factored,
  clipped and scaled by itself.

  Args:
    learning_rate: a number or an optax schedule.
    step_offset: optimiser steps that came before this run. The original code continues
      the pretrained checkpoint's count (1,100,000), which makes the second-moment decay
      almost 1 from the first step on: every update then has RMS `learning_rate`. 0, the
      default here, starts Adafactor afresh.
    decay_rate: exponent of the second-moment decay 1 − t^−decay_rate.
    weight_decay_rate: decoupled weight decay; None for none.
    clipping_threshold: RMS to which an update is clipped; None for none.
    multiply_by_parameter_scale: scale updates by the parameter's RMS (T5's pretraining).
  """
  # The parts of optax.adafactor in its order, so that the states are the same too.
  parts = [_factored_rms_per_layer(decay_rate=decay_rate, step_offset=-step_offset)]
  if clipping_threshold is not None:
    parts.append(_per_layer(optax.clip_by_block_rms(clipping_threshold)))
  parts.append(optax.scale_by_learning_rate(learning_rate, flip_sign=False))
  if multiply_by_parameter_scale:
    parts.append(_per_layer(optax.scale_by_param_block_rms()))
  if weight_decay_rate is not None:
    parts.append(optax.add_decayed_weights(weight_decay_rate))
  parts.append(optax.scale(-1))
  return optax.chain(*parts)


def default_optimizer(method: Any) -> optax.GradientTransformation:
  """What trains where nothing is said: the paper's Adafactor, slower for a model (None)."""
  return adafactor(0.001 if method is None else 0.3)


# What `optax.scale_by_factored_rms` keeps of a stack: one count, moments for each layer.
_STATE_AXES = optax.FactoredState(count=None, v_row=0, v_col=0, v=0)


def _factored_rms_per_layer(**settings: Any) -> optax.GradientTransformation:
  """`optax.scale_by_factored_rms`, with the moments of each layer of a stack by itself."""
  tx = optax.scale_by_factored_rms(**settings)

  def init(params: PyTree) -> optax.FactoredState:
    states = _map_layers(tx.init, (0,), _STATE_AXES, params)
    return _joined(jnp.zeros((), jnp.int32), states, params)

  def update(gradients, state, params):
    states = jax.tree.map(
        lambda *moments: optax.FactoredState(state.count, *moments),
        *(state.v_row, state.v_col, state.v),
    )
    results = _map_layers(
        tx.update, (0, _STATE_AXES, 0), (0, _STATE_AXES), gradients, states, params
    )
    updates, states = (
        jax.tree.map(lambda _, result, i=i: result[i], gradients, results) for i in (0, 1)
    )
    return updates, _joined(optax.safe_increment(state.count), states, gradients)

  return optax.GradientTransformation(init, update)


def _joined(count: Array, states: PyTree, like: PyTree) -> optax.FactoredState:
  """One state of trees, as optax has it, from a tree of states with a leaf each."""
  moments = (
      jax.tree.map(lambda _, state, name=name: getattr(state, name), like, states)
      for name in ('v_row', 'v_col', 'v')
  )
  return optax.FactoredState(count, *moments)


def _per_layer(tx: optax.GradientTransformation) -> optax.GradientTransformation:
  """`tx`, which has no state, with each layer of a stack as a parameter of its own."""

  def update(updates, state, params):
    def one(update, param):
      return tx.update(update, state, param)[0]

    return _map_layers(one, (0, 0), 0, updates, params), state

  return optax.GradientTransformation(tx.init, update)


def _map_layers(
    function: Callable[..., Any], in_axes: Any, out_axes: Any, tree: PyTree, *others: PyTree
) -> PyTree:
  """Maps `function` over the leaves, and over the layers of those that stack layers.

  Those lie under a key `layers` (`backbones/t5_stacks.py`) and have the layers on axis 0.
  """

  def one(path, *leaves):
    is_stacked = any(getattr(key, 'key', None) == 'layers' for key in path)
    mapped = jax.vmap(function, in_axes, out_axes) if is_stacked else function
    return mapped(*leaves)

  return jax.tree.map_with_path(one, tree, *others)


@keeps_arguments
def adam(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
) -> optax.GradientTransformation:
  """Adam with PyTorch's `weight_decay`: `weight_decay` × parameter joins the gradient.

  Both moments see it, so the step that it makes depends on the gradients' size; in `adamw`
  it does not.
  """
  tx = optax.adam(learning_rate, b1=b1, b2=b2)
  return optax.chain(optax.add_decayed_weights(weight_decay), tx) if weight_decay else tx


@keeps_arguments
def adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
    b1: float = 0.9,
    b2: float = 0.999,
) -> optax.GradientTransformation:
  """AdamW, after clipping the gradients' global norm where `clip_norm` is given."""
  tx = optax.adamw(learning_rate, b1=b1, b2=b2, weight_decay=weight_decay)
  return tx if clip_norm is None else optax.chain(optax.clip_by_global_norm(clip_norm), tx)


@keeps_arguments
def muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    weight_decay: float = 0.0,
    clip_norm: float | None = 1.0,
) -> optax.GradientTransformation:
  """Muon (Jordan et al., 2024) on the layers' kernels, AdamW on everything else.

  Meant for pretraining small backbones: each kernel's update is orthogonalised, layer by
  layer in the stacked [L, in, out] arrays; embeddings, the output layer, norms and bias
  tables train with AdamW.

  Args:
    learning_rate: of the orthogonalised updates.
    adam_learning_rate: of the others; `learning_rate` where None.
    weight_decay: decoupled weight decay of the kernels.
    clip_norm: global norm to which gradients are clipped first; None for none.
  """

  def dimension_numbers(params):
    def of(path, leaf):
      # umT5's bias tables are stacked as well, and no kernels.
      if path[-1] == jax.tree_util.DictKey('kernel') and leaf.ndim == 3:
        return contrib.MuonDimensionNumbers(reduction_axis=(1,), output_axis=(2,))
      return None

    return jax.tree_util.tree_map_with_path(of, params)

  tx = contrib.muon(
      learning_rate,
      adam_learning_rate=adam_learning_rate,
      weight_decay=weight_decay,
      muon_weight_dimension_numbers=dimension_numbers,
  )
  return tx if clip_norm is None else optax.chain(optax.clip_by_global_norm(clip_norm), tx)


@keeps_arguments
def warmup_linear(
    peak: float, *, warmup_steps: int, train_steps: int, end: float = 0.0
) -> optax.Schedule:
  """Linear warm-up to `peak`, then linear decay to `end` at `train_steps`.

  Raises:
    ValueError: if `peak` is a schedule itself.
  """
  if callable(peak):
    raise ValueError(
        'warmup_linear.peak is a schedule, but it is the number from which this schedule '
        'falls. Where it is LEARNING_RATE, set that to a number; for another schedule, set '
        "the optimiser's: --gin.adamw.learning_rate=@optax.constant_schedule() for example."
    )
  return optax.join_schedules(
      [
          optax.linear_schedule(0.0, peak, warmup_steps),
          optax.linear_schedule(peak, end, train_steps - warmup_steps),
      ],
      [warmup_steps],
  )


@keeps_arguments
def warmup_rsqrt(base: float = 1.0, *, warmup_steps: int = 10_000) -> optax.Schedule:
  """T5's pretraining schedule: base / sqrt(max(step, warmup_steps))."""
  return lambda step: base / jnp.sqrt(jnp.maximum(step, warmup_steps))
