"""Token cross entropy with z-loss, label smoothing and T5X's normalisations."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax.typing import Array, Batch

NORMALIZATIONS = (
    'NUM_REAL_TARGET_TOKENS',
    'NUM_TOTAL_TARGET_TOKENS',
    'AVERAGE_PER_SEQUENCE',
)


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """How the loss of a batch is computed; the defaults are Lester et al.'s.

  Attributes:
    z_loss: weight of log²Z, which keeps the logits' normaliser near 1.
    label_smoothing: probability spread over the wrong tokens.
    normalizing_factor: what the summed loss is divided by: None (a plain sum, the
      paper's), a number, or one of T5X's names in `NORMALIZATIONS`.
  """

  z_loss: float = 1e-4
  label_smoothing: float = 0.0
  normalizing_factor: float | str | None = None

  def __post_init__(self):
    factor = self.normalizing_factor
    if isinstance(factor, str) and factor not in NORMALIZATIONS:
      raise ValueError(
          f'LOSS_NORMALIZING_FACTOR is {factor!r}; it may be None (sum), a number, or '
          f'one of {", ".join(NORMALIZATIONS)}.'
      )
    if isinstance(factor, int | float) and not 0.0 < factor < math.inf:
      raise ValueError(
          f'LOSS_NORMALIZING_FACTOR is {factor}; the loss is divided by it, so it has to be '
          'a positive number. None leaves the loss a sum.'
      )
    if not 0.0 <= self.z_loss < math.inf:
      raise ValueError(f'Z_LOSS is {self.z_loss}; it has to be a number from 0 on.')
    if not 0.0 <= self.label_smoothing < 1.0:
      raise ValueError(f'LABEL_SMOOTHING is {self.label_smoothing}, not in [0, 1).')

  def of_rows(self, rows: int, target_length: int) -> LossConfig:
    """The same with the number in place of 'NUM_TOTAL_TARGET_TOKENS', for packed batches.

    Args:
      rows: rows of the batch, were it padded.
      target_length: T, the decoder's width there.
    """
    if self.normalizing_factor != 'NUM_TOTAL_TARGET_TOKENS':
      return self
    return dataclasses.replace(self, normalizing_factor=rows * target_length)


def cross_entropy(
    logits_BTV: Array, targets_BT: Array, *, z_loss: float = 0.0, label_smoothing: float = 0.0
) -> tuple[Array, Array]:
  """Loss of each position [B, T], z-loss included, and the z-loss alone.

  With smoothing, the entropy of the smoothed targets is subtracted, so that a
  perfect prediction has loss 0 as without (T5X's convention).
  """
  vocab_size = logits_BTV.shape[-1]
  logits_BTV = logits_BTV.astype(jnp.float32)
  log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
  # A comparison fuses into the sums forward and backward; a gather's gradient
  # would scatter into an array of the logits' size.
  is_target_BTV = targets_BT[..., None] == jnp.arange(vocab_size)
  target_logit_BT = jnp.sum(jnp.where(is_target_BTV, logits_BTV, 0.0), axis=-1)
  loss_BT = log_z_BT - target_logit_BT
  if label_smoothing:
    right = 1.0 - label_smoothing
    wrong = label_smoothing / (vocab_size - 1)
    all_losses_BT = vocab_size * log_z_BT - jnp.sum(logits_BTV, axis=-1)
    entropy = -(
        right * np.log(right) + (vocab_size - 1) * wrong * np.log(wrong + 1e-20)
    )
    loss_BT = (right - wrong) * loss_BT + wrong * all_losses_BT - entropy
  z_loss_BT = z_loss * jnp.square(log_z_BT)
  return loss_BT + z_loss_BT, z_loss_BT


def weights_and_factor(
    batch: Batch, normalizing_factor: float | str | None
) -> tuple[Array, Array]:
  """Weight of each target position [B, T] and the number the loss is divided by.

  Taken over the whole batch, before it is split into microbatches.
  """
  weights_BT = jnp.asarray(batch.decoder_loss_weights, jnp.float32)
  segments_BT = batch.decoder_segment_ids
  if normalizing_factor == 'AVERAGE_PER_SEQUENCE':
    if segments_BT is None:
      count = jnp.sum(weights_BT, axis=-1, keepdims=True)
    else:
      same_BTT = segments_BT[:, :, None] == segments_BT[:, None, :]
      count = jnp.sum(same_BTT * weights_BT[:, None, :], axis=-1)
    weights_BT = jnp.where(count > 0, weights_BT / jnp.maximum(count, 1.0), 0.0)
    factor = jnp.sum(weights_BT)
  elif normalizing_factor == 'NUM_REAL_TARGET_TOKENS':
    factor = jnp.sum(weights_BT)
  elif normalizing_factor == 'NUM_TOTAL_TARGET_TOKENS':
    # Padding counts, so `TrainBatches` keeps T at the feature length in every batch.
    if segments_BT is not None:
      raise ValueError(
          "LOSS_NORMALIZING_FACTOR='NUM_TOTAL_TARGET_TOKENS' counts padding, of which a packed "
          'batch has another amount. Give the number: rows × target length of the padded '
          'batch, as LossConfig.of_rows does.'
      )
    factor = jnp.float32(weights_BT.size)
  else:
    factor = jnp.float32(1.0 if normalizing_factor is None else normalizing_factor)
  return weights_BT, factor
