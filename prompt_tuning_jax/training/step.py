"""The train step: `(state, frozen, batch) → (state, metrics)`, differentiating one tree."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from prompt_tuning_jax import partitioning
from prompt_tuning_jax.backbones.backbone import Backbone
from prompt_tuning_jax.methods.method import Method
from prompt_tuning_jax.training import losses
from prompt_tuning_jax.training import trainable as trainable_lib
from prompt_tuning_jax.typing import Array, Batch, PyTree


@flax.struct.dataclass
class TrainState:
  """All that changes during training: what is donated, saved and restored.

  Attributes:
    step: number of optimiser updates so far in this run.
    trainable: the tree that is differentiated.
    opt_state: the optimiser's state for it.
  """

  step: Array
  trainable: PyTree
  opt_state: PyTree

  @classmethod
  def create(cls, trainable: PyTree, tx: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return cls(jnp.zeros((), jnp.int32), trainable, tx.init(trainable))


def make_loss_fn(
    method: Method | None, module: nn.Module, loss: losses.LossConfig
) -> Callable[..., tuple[Array, dict[str, Array]]]:
  """Returns `(trainable, frozen, batch, weights_BT, dropout_rng) → (sum of losses, sums)`.

  `method` may be None: then the backbone runs without a prompt. Dropout is off where
  `dropout_rng` is None.
  """

  def loss_fn(trainable, frozen, batch, weights_BT, dropout_rng=None):
    params = trainable_lib.merge(trainable, frozen)
    injection = None
    if method is not None:
      rngs = {} if dropout_rng is None else {'dropout': jax.random.fold_in(dropout_rng, 1)}
      injection = method.apply({'params': params['prompt']}, module.spec, rngs=rngs)
    logits_BTV = module.apply(
        {'params': params['backbone']},
        batch,
        injection,
        enable_dropout=dropout_rng is not None,
        rngs={} if dropout_rng is None else {'dropout': dropout_rng},
    )
    sums = {
        name: jnp.sum(value_BT)
        for name, value_BT in position_values(logits_BTV, batch, weights_BT, loss).items()
    }
    return sums['loss'], sums

  return loss_fn


def position_values(
    logits_BTV: Array, batch: Batch, weights_BT: Array, loss: losses.LossConfig
) -> dict[str, Array]:
  """What steps sum up, for each position [B, T]; all but `loss` whatever the weights are."""
  loss_BT, z_loss_BT = losses.cross_entropy(
      logits_BTV,
      batch.decoder_target_tokens,
      z_loss=loss.z_loss,
      label_smoothing=loss.label_smoothing,
  )
  right_BT = jnp.argmax(logits_BTV, axis=-1) == batch.decoder_target_tokens
  counted_BT = batch.decoder_loss_weights > 0
  return {
      'loss': loss_BT * weights_BT,
      'token_loss': loss_BT * counted_BT,
      'token_z_loss': z_loss_BT * counted_BT,
      'tokens': counted_BT,
      'right_tokens': right_BT & counted_BT,
  }


def make_train_step(
    method: Method | None,
    module: nn.Module,
    tx: optax.GradientTransformation,
    *,
    loss: losses.LossConfig = losses.LossConfig(),
    microbatches: int = 1,
    seed: int = 0,
    placement: tuple[Any, Any] | None = None,
) -> Callable[[TrainState, PyTree, Batch], tuple[TrainState, dict[str, Array]]]:
  """Builds the compiled train step; the state is donated, the frozen tree is not.

  Dropout's randomness is a function of (seed, step), so a resumed run repeats it.

  Args:
    method: the prompt method, or None to train without one.
    module: the backbone's module; its `dropout_rate` applies.
    tx: optimiser of the trainable tree.
    loss: z-loss, smoothing and normalisation.
    microbatches: parts into which each batch is split to save memory; gradients add up
      exactly because losses are sums.
    seed: of dropout.
    placement: shardings of the state and of the metrics that a step returns, on a mesh:
      those of its own state, so that the next step is the same program.

  Returns:
    `(state, frozen, batch) → (state, metrics)`; metrics are sums over the batch: `loss`,
    which is differentiated after division by `loss_factor`, and over its real tokens,
    whatever their weights, `token_loss`, `token_z_loss`, `tokens` and `right_tokens`;
    and `gradient_norm`.
  """
  loss_fn = make_loss_fn(method, module, loss)
  dropout = getattr(module, 'dropout_rate', 0.0) > 0.0 or (
      method is not None and method.has_dropout
  )

  @functools.partial(jax.jit, donate_argnums=0, out_shardings=placement)
  def train_step(state, frozen, batch):
    weights_BT, factor = losses.weights_and_factor(batch, loss.normalizing_factor)
    rng = jax.random.fold_in(jax.random.key(seed), state.step) if dropout else None

    def scaled_loss(trainable, batch, weights_BT, rng):
      total, sums = loss_fn(trainable, frozen, batch, weights_BT, rng)
      return total / factor, sums

    gradient_of = jax.grad(scaled_loss, has_aux=True)
    gradient, sums = accumulate(
        gradient_of, state.trainable, batch, weights_BT, rng, microbatches
    )
    with jax.named_scope('optimizer'):
      updates, opt_state = tx.update(gradient, state.opt_state, state.trainable)
      new_state = state.replace(
          step=state.step + 1,
          trainable=optax.apply_updates(state.trainable, updates),
          opt_state=opt_state,
      )
    metrics = dict(
        sums, loss_factor=factor, gradient_norm=optax.tree.norm(gradient)
    )
    return new_state, metrics

  return train_step


def accumulate(
    gradient_of: Callable[..., tuple[PyTree, PyTree]],
    trainable: PyTree,
    batch: Batch,
    weights_BT: Array,
    rng: Array | None,
    microbatches: int,
) -> tuple[PyTree, PyTree]:
  """Gradients and sums of all microbatches, one after the other in one program."""
  if microbatches == 1:
    return gradient_of(trainable, batch, weights_BT, rng)
  rows = weights_BT.shape[0]
  partitioning.check_microbatches(microbatches, rows, 'the batch of {} rows')
  # Every n-th row, so that each device has its share of every part.
  parts = jax.tree.map(
      lambda x: jnp.reshape(x, (rows // microbatches, microbatches, *x.shape[1:])).swapaxes(0, 1),
      (batch, weights_BT),
  )

  def one_part(total, part):
    i, (part_batch, part_weights) = part
    part_rng = None if rng is None else jax.random.fold_in(rng, i)
    part_result = gradient_of(trainable, part_batch, part_weights, part_rng)
    return jax.tree.map(jnp.add, total, part_result), None

  zero = jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype),
      jax.eval_shape(
          gradient_of, trainable, *jax.tree.map(lambda x: x[0], parts), rng
      ),
  )
  total, _ = jax.lax.scan(one_part, zero, (jnp.arange(microbatches), parts))
  return total


def loss_and_grad(
    backbone: Backbone,
    method: Method,
    params: PyTree,
    batch: Batch,
    loss: losses.LossConfig = losses.LossConfig(),
) -> tuple[Array, PyTree]:
  """The loss of a batch and its gradient by the method's parameters, for notebooks.

  Args:
    backbone: the frozen model.
    method: the prompt method.
    params: its parameters, `method.init(key, backbone.spec)['params']`.
    batch: with the method's virtual tokens placed.
    loss: z-loss, smoothing and normalisation; without dropout.

  Returns:
    (loss, gradient); the gradient has the structure of `params`.
  """
  weights_BT, factor = losses.weights_and_factor(batch, loss.normalizing_factor)
  total_of = make_loss_fn(method, backbone.module, loss)

  def loss_fn(params):
    total, _ = total_of(
        {'prompt': params}, {'backbone': backbone.params}, batch, weights_BT
    )
    return total / factor

  return jax.value_and_grad(loss_fn)(params)
