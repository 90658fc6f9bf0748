"""P-tuning: virtual tokens that come out of a small encoder (Liu et al., 2021).

The encoder exists to train the tokens together: it is folded away on export, and
inference sees its P output vectors alone. Where they stand among an example's words says a
template (`data/virtual_tokens.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from prompt_tuning_jax.methods.linear import Linear, uniform_within
from prompt_tuning_jax.methods.method import VirtualTokens, is_whole
from prompt_tuning_jax.typing import Array, BackboneSpec, Injection

# A number of units where it is whole, else a multiple of the model's width.
Width = int | float


class PTuning(VirtualTokens):
  """A prompt that a bidirectional LSTM and an MLP make of an embedding table.

  Table [P, D] → `lstm_layers` bidirectional LSTM layers → a linear layer with ReLU for
  each of `mlp_widths` → a linear layer to D, the width of the model. Widths are whole
  numbers of units, or floats that are multiplied by D, so that one setting fits models of
  every size. The published encoders:

    PTuning(P)                                      LAMA (section 3.2 and the code)
    PTuning(P, lstm_width=1.0)                      few-shot SuperGLUE
    PTuning(P, lstm_layers=0)                       the same, an MLP alone
    PTuning(P, lstm_layers=0, mlp_widths=(E, E))    PEFT's MLP, encoder_hidden_size=E
    PTuning(P, lstm_width=E, mlp_widths=(2 * E,))   PEFT's LSTM

  All weights start as in PyTorch. Flax's LSTM has one bias where PyTorch's has two that
  are added; it starts as their sum would. PyTorch's optimisers move both, so under Adam
  their sum is twice as fast as our bias.

  Attributes:
    length: P, the number of virtual tokens, at least 1. A template's slots must hold as
      many.
    lstm_layers: bidirectional layers; 0 for an MLP alone.
    lstm_width: units in each direction.
    mlp_widths: outputs of the MLP's hidden layers.
    embedding_init: `(key, (P, D), dtype) → array`, where the table starts.
  """

  length: int = 100
  lstm_layers: int = 2
  lstm_width: Width = 0.5
  mlp_widths: Sequence[Width] = (1.0,)
  embedding_init: Callable[..., Array] = nn.initializers.normal(1.0)

  def __post_init__(self) -> None:
    if not is_whole(self.lstm_layers) or self.lstm_layers < 0:
      raise ValueError(
          f'PTuning.lstm_layers is {self.lstm_layers!r}; it may be 2 as published, another '
          'whole number, or 0 for an MLP alone.'
      )
    if not isinstance(self.mlp_widths, Sequence) or isinstance(self.mlp_widths, str):
      raise ValueError(
          f'PTuning.mlp_widths is {self.mlp_widths!r}; it is a list with the width of each '
          'hidden layer. Set (1.0,) for one layer of the width of the model.'
      )
    super().__post_init__()

  @nn.compact
  def __call__(self, spec: BackboneSpec) -> Injection:
    """The encoded prompt as an Injection for a backbone of these sizes.

    Raises:
      ValueError: if a width is no number of units for this backbone.
    """
    x_PE = self.param('embedding', self.embedding_init, (self.length, spec.d_model))
    for layer in range(self.lstm_layers):
      width = _units('lstm_width', self.lstm_width, spec.d_model)
      directions = [_lstm(width, f'lstm_{layer}_{way}') for way in ('forward', 'backward')]
      # Accelerators multiply float32 in fewer digits unless they are told.
      with jax.default_matmul_precision('highest'):
        x_PE = nn.Bidirectional(*directions)(x_PE)
    for layer, width in enumerate(self.mlp_widths):
      width = _units('mlp_widths', width, spec.d_model)
      x_PE = nn.relu(Linear(width, name=f'mlp_{layer}')(x_PE))
    prompt_PD = Linear(spec.d_model, name='output')(x_PE)
    return Injection(virtual_embeddings=prompt_PD)


def _lstm(width: int, name: str) -> nn.RNN:
  """An LSTM over the positions of [P, E] that starts as PyTorch's."""
  init = uniform_within(width**-0.5)

  def both_biases(key, shape, dtype=jnp.float32):
    return sum(init(one, shape, dtype) for one in jax.random.split(key))

  cell = nn.OptimizedLSTMCell(
      width, kernel_init=init, recurrent_kernel_init=init, bias_init=both_biases, name=name
  )
  return nn.RNN(cell)


def _units(attribute: str, width: Width, d_model: int) -> int:
  """The number of units that a width means for a model."""
  if is_whole(width) and width >= 2:
    return int(width)
  if isinstance(width, float) and width > 0 and math.isfinite(width):
    units = width * d_model
    if units.is_integer() and units >= 1:
      return int(units)
    raise ValueError(
        f'PTuning.{attribute}: {width} is a multiple of the width of the model, but {width} '
        f'× d_model={d_model} is {units:g}, which is no number of units. Set a whole number '
        f'instead, such as {max(round(units), 2)}.'
    )
  raise ValueError(
      f'PTuning.{attribute}: {width!r} is no width. Set a whole number of units, at least 2, '
      'or a float, by which the width of the model is multiplied: 1.0 is d_model.'
  )
