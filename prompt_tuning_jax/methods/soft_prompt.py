"""Prompt tuning: P free vectors beside the embedded input (Lester et al., 2021, section 2)."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn

from prompt_tuning_jax import initializers
from prompt_tuning_jax.methods.method import VirtualTokens
from prompt_tuning_jax.typing import Array, BackboneSpec, Injection


class SoftPrompt(VirtualTokens):
  """A soft prompt: the matrix [P, D] itself is what trains.

  Where its rows stand among an example's tokens is the data pipeline's affair
  (`data/virtual_tokens.py`); the published method puts them in front.

  Attributes:
    length: P, the number of virtual tokens, at least 1 (the paper's default is 100).
    prompt_init: `(key, (P, D), dtype) → array`, see `initializers.py`.
  """

  length: int = 100
  prompt_init: Callable[..., Array] = initializers.uniform()

  @nn.compact
  def __call__(self, spec: BackboneSpec) -> Injection:
    """The prompt as an Injection for a backbone of these sizes."""
    prompt_PD = self.param('prompt', self.prompt_init, (self.length, spec.d_model))
    return Injection(virtual_embeddings=prompt_PD)
