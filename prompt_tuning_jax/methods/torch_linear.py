"""PyTorch's linear layer as it starts there, for methods that were published in it."""

from __future__ import annotations

import flax.linen as nn
import jax

from prompt_tuning_jax.typing import Array


class TorchLinear(nn.Module):
  """A dense layer whose weights and bias start uniformly in ±1/√(inputs).

  This is what `torch.nn.Linear` does by default; Flax's Dense starts from a normal
  distribution of √3 times that deviation, and from a bias of zero.

  Attributes:
    features: width of the output.
  """

  features: int

  @nn.compact
  def __call__(self, inputs: Array) -> Array:
    """[…, inputs] → […, features]."""
    init = uniform_within(inputs.shape[-1] ** -0.5)
    dense = nn.Dense(self.features, kernel_init=init, bias_init=init)
    nn.share_scope(self, dense)  # Its parameters are ours: kernel and bias.
    return dense(inputs)


def uniform_within(bound: float) -> jax.nn.initializers.Initializer:
  """An initialiser that draws uniformly from [-bound, bound)."""

  def init(key, shape, dtype=jax.numpy.float32):
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init
