"""What a T5 is made of, as far as its weights depend on it."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class T5Config:
  """The architecture, as far as the weights depend on it.

  Attributes:
    vocab_size: V, rows of the embedding table (T5: 32,128 for 32,100 ids).
    d_model: D, width of the residual stream.
    num_heads: N, attention heads.
    d_kv: H, width of a head; T5 1.1 small has N·H = 384 beside D = 512.
    d_ff: F, feed-forward width.
    num_encoder_layers: encoder depth.
    num_decoder_layers: decoder depth.
    relpos_buckets: rows of the relative position bias tables.
    relpos_max_distance: distance from which all positions share a bucket. No
      checkpoint stores it; every published T5 uses 128.
    mlp_activations: ('gelu', 'linear') for T5 1.1, ('relu',) for T5 1.0.
    tied_embeddings: whether the output layer is the embedding table (T5 1.0).
    scale_decoder_outputs: whether outputs are scaled by d_model**-0.5 before the logits
      (T5 1.0, whose embeddings are tied).
    relpos_per_layer: whether every layer has its own bias table (umT5).
  """

  vocab_size: int
  d_model: int
  num_heads: int
  d_kv: int
  d_ff: int
  num_encoder_layers: int
  num_decoder_layers: int
  relpos_buckets: int = 32
  relpos_max_distance: int = 128
  mlp_activations: tuple[str, ...] = ('gelu', 'linear')
  tied_embeddings: bool = False
  scale_decoder_outputs: bool = False
  relpos_per_layer: bool = False

  def __post_init__(self):
    # Gin and JSON hand over lists; the module must stay hashable.
    object.__setattr__(self, 'mlp_activations', tuple(self.mlp_activations))
    unknown = set(self.mlp_activations) - {'relu', 'gelu', 'linear'}
    if unknown:
      raise ValueError(
          f"mlp_activations names {sorted(unknown)}; T5 knows 'relu', 'gelu', 'linear'."
      )
