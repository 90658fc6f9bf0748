"""A prompt in every layer of the encoder: hidden states replaced, not only embeddings."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from prompt_tuning_jax import initializers
from prompt_tuning_jax.methods.method import VirtualTokens
from prompt_tuning_jax.typing import Array, BackboneSpec, Injection


class LayerPrompt(VirtualTokens):
  """Rows [L, P, D] that replace the virtual tokens' hidden states before each layer.

  A variant in the original code of prompt tuning (its per-layer prompts, replaced). Unlike
  a deep prompt's keys and values, the rows pass through each layer's norm and kernels.

  Attributes:
    length: P, the number of virtual tokens, at least 1.
    prompt_init: `(key, (P, D), dtype) → array`, drawn anew for each layer.
  """

  length: int = 20
  prompt_init: Callable[..., Array] = initializers.uniform()

  @nn.compact
  def __call__(self, spec: BackboneSpec) -> Injection:
    """The rows as an Injection for a backbone of these sizes."""

    def init(key, shape):
      return jnp.stack([self.prompt_init(k, shape[1:]) for k in jax.random.split(key, shape[0])])

    shape = (spec.num_encoder_layers, self.length, spec.d_model)
    return Injection(layer_embeddings=self.param('prompt', init, shape))
