"""Optimisers and schedules with the published settings as defaults.

Everything returned is an optax transformation, so that any optax optimiser can take
its place in gin or Python.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from prompt_tuning_jax.training.description import keeps_arguments


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
  only where both dimensions are at least 128, so a prompt of 100 tokens is not.

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
  return optax.adafactor(
      learning_rate,
      decay_rate=decay_rate,
      decay_offset=-step_offset,
      multiply_by_parameter_scale=multiply_by_parameter_scale,
      clipping_threshold=clipping_threshold,
      weight_decay_rate=weight_decay_rate,
      eps=1e-30,
  )


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
    # Stacked kernels are the only arrays with three axes.
    return jax.tree.map(
        lambda leaf: contrib.MuonDimensionNumbers(reduction_axis=(1,), output_axis=(2,))
        if leaf.ndim == 3
        else None,
        params,
    )

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
  """Linear warm-up to `peak`, then linear decay to `end` at `train_steps`."""
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
