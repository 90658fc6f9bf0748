"""A linear layer that starts as PyTorch's does, which the published methods were run with."""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from prompt_tuning_jax.typing import Array


class Linear(nn.Module):
  """`x @ kernel + bias`, both drawn from U(−1/√in, 1/√in): `torch.nn.Linear`'s default.

  Flax's Dense starts from a normal distribution of √3 times that deviation, and from a bias
  of zero.

  Attributes:
    features: size of the output.
    output_init: initialiser `(key, shape) → array` of the output [P, features] for the
      input [P, in] that the layer first sees; the kernel is then the one nearest to the
      drawn one that gives it (exactly, where P ≤ in). None leaves the kernel as drawn.
  """

  features: int
  output_init: Callable[..., Array] | None = None

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """[…, in] → […, features]."""
    uniform = uniform_within(x.shape[-1] ** -0.5)

    def kernel_init(key, shape):
      kernel = uniform(key, shape)
      if self.output_init is None:
        return kernel
      wanted = self.output_init(key, (*x.shape[:-1], self.features))
      rest = wanted - bias - _matmul(x, kernel)
      return kernel + _matmul(jnp.linalg.pinv(x), rest)

    bias = self.param('bias', uniform, (self.features,))
    kernel = self.param('kernel', kernel_init, (x.shape[-1], self.features))
    return _matmul(x, kernel) + bias


# Accelerators multiply float32 in fewer digits unless they are told; so little costs nothing.
_matmul = functools.partial(jnp.matmul, precision='highest')


def uniform_within(bound: float) -> Callable[..., Array]:
  """An initialiser that draws uniformly from [-bound, bound)."""

  def init(key, shape, dtype=jnp.float32):
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init
