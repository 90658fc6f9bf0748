"""What a soft prompt is near to: the vocabulary words of each position.

Lester et al. (2021, section 7) read prompts this way: the nearest rows of the embedding
table by cosine similarity.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax.backbones.backbone import Backbone
from prompt_tuning_jax.typing import Array, Injection


def nearest_words(
    backbone: Backbone, injection: Injection, k: int = 5
) -> list[list[tuple[str, float]]]:
  """The `k` nearest vocabulary words of each prompt position, with their cosines.

  Rows of the table that no id of the vocabulary names are left out.

  Raises:
    ValueError: if the injection has no virtual tokens, or does not fit the backbone.
  """
  if injection.virtual_embeddings is None:
    raise ValueError(
        'Only a soft prompt has nearest words; this Injection holds no virtual_embeddings.'
    )
  injection.check(backbone.spec)
  vocabulary = backbone.vocabulary
  cosines, rows = _nearest(
      jnp.asarray(backbone.embedding_VD)[: vocabulary.size],
      jnp.asarray(injection.virtual_embeddings),
      k,
  )
  return [
      [(vocabulary.piece(int(row)), float(cosine)) for row, cosine in zip(*position)]
      for position in zip(np.asarray(rows), np.asarray(cosines))
  ]


def _nearest(table_VD: Array, prompt_PD: Array, k: int) -> tuple[Array, Array]:
  def unit(x):
    x = x.astype(jnp.float32)
    # Norms first: released prompts have norms near 1,000, their squares overflow nothing
    # in float32 but would in lower precision.
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)

  return jax.lax.top_k(unit(prompt_PD) @ unit(table_VD).T, k)
