"""What a run will cost, from shapes alone: no weights are made or read."""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from prompt_tuning_jax.methods import method as method_lib
from prompt_tuning_jax.methods.method import Method
from prompt_tuning_jax.training import trainable as trainable_lib
from prompt_tuning_jax.training.step import TrainState, make_train_step
from prompt_tuning_jax.typing import Batch


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

  def tokens(length):
    return jax.ShapeDtypeStruct((rows, length), jnp.int32)

  targets = tokens(target_length + method.num_decoder_virtual_tokens)
  batch = Batch(tokens(input_length + method.num_virtual_tokens), targets, targets, targets)

  def forward(params, batch):
    injection = method.apply({'params': params['prompt']}, module.spec)
    return module.apply({'params': params['backbone']}, batch, injection)

  programs = (
      make_train_step(method, module, tx).lower(state, frozen, batch),
      jax.jit(forward).lower(params, batch),
  )
  return Flops(*(program.compile().cost_analysis()['flops'] for program in programs))
