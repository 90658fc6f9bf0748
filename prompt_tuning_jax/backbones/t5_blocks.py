"""One layer of T5's encoder and one of its decoder, which `t5_stacks.py` scans.

What differs from other implementations, and is kept because the published models were
trained with it: the normed inputs of padded positions are zeroed.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from prompt_tuning_jax.backbones import t5_layers
from prompt_tuning_jax.backbones.t5_config import T5Config
from prompt_tuning_jax.partitioning import constrain_rows
from prompt_tuning_jax.typing import Array, KeysValues

# Keys and values [L, P, N, H] that the decoder's layers see in self- and cross-attention.
# Of several prompts they are [L, K, P, N, H], and `prompt_ids_B` says which each row sees.
Prefixes = tuple[KeysValues | None, KeysValues | None]


class KeyPositions(NamedTuple):
  """Where the K keys of self-attention stand, for the relative position bias.

  Attributes:
    positions_K: int32, the first token at 0 and a prefix at negative positions.
    has_position_K: 0 for keys that get no bias, else 1; None where all get it.
    in_segment_BT: int32, the position of each token within its segment, where the prefix
      stands before every segment of a packed row; else None.
  """

  positions_K: Array
  has_position_K: Array | None
  in_segment_BT: Array | None = None

  @classmethod
  def of(
      cls,
      length: int,
      prefix: KeysValues | None,
      prefix_positions: str,
      segment_ids_BT: Array | None = None,
  ) -> KeyPositions:
    """`length` tokens behind a prefix (`typing.Injection.positions`)."""
    positions_K = jnp.arange(-t5_layers.prefix_length(prefix), length)
    if prefix is None:
      return cls(positions_K, None)
    if prefix_positions == 'before':
      in_segment_BT = None if segment_ids_BT is None else segment_positions(segment_ids_BT)
      return cls(positions_K, None, in_segment_BT)
    return cls(positions_K, (positions_K >= 0).astype(jnp.float32))

  def bias(
      self, relpos: t5_layers.RelativePositionBias, queries_T: Array
  ) -> Array | tuple[Array, Array]:
    """The bias [1, N, T, K] of queries at these positions, by which `add_bias` takes it.

    Only distances count, so that it holds within every segment of a packed row, but for a
    prefix that stands before each of them: then it is that of the prefix, [B, N, T, P], and
    that of the other keys, [1, N, T, T].
    """
    bias_1NTK = relpos(queries_T, self.positions_K, self.has_position_K)
    if self.in_segment_BT is None:
      return bias_1NTK
    length = bias_1NTK.shape[-1] - bias_1NTK.shape[-2]
    prefix_NBTP = bias_1NTK[0, :, :, :length][:, self.in_segment_BT]
    return jnp.moveaxis(prefix_NBTP, 0, 1), bias_1NTK[..., length:]


def segment_positions(segment_ids_BT: Array) -> Array:
  """Positions [B, T] within the segments of packed rows, from 0."""
  columns_T = jnp.arange(segment_ids_BT.shape[1])
  before_BT = jnp.pad(segment_ids_BT[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
  starts_BT = jnp.where(segment_ids_BT != before_BT, columns_T[None], 0)
  return columns_T[None] - jax.lax.cummax(starts_BT, axis=1)


def add_bias(mask_bias_B1TK: Array, relpos_bias: Array | tuple[Array, Array]) -> Array:
  """The mask and what `KeyPositions.bias` gives as one bias [B, N, T, K]."""
  if not isinstance(relpos_bias, tuple):
    return mask_bias_B1TK + relpos_bias
  # Made in every layer anew, so that it is fused and nowhere kept. All see the prefix.
  prefix_BNTP, own_1NTT = relpos_bias
  own_BNTT = mask_bias_B1TK[..., prefix_BNTP.shape[-1] :] + own_1NTT
  return jnp.concatenate([prefix_BNTP, own_BNTT], axis=-1)


class _Layer(nn.Module):
  """What encoder and decoder layers share: sizes and ways to build their parts."""

  config: T5Config
  dtype: jnp.dtype
  dropout_rate: float
  attention_implementation: str

  def _norm(self) -> t5_layers.RMSNorm:
    return t5_layers.RMSNorm(dtype=self.dtype)

  def _attention(self) -> t5_layers.Attention:
    config = self.config
    return t5_layers.Attention(
        num_heads=config.num_heads,
        d_kv=config.d_kv,
        d_model=config.d_model,
        dtype=self.dtype,
        dropout_rate=self.dropout_rate,
        implementation=self.attention_implementation,
    )

  def _mlp(self) -> t5_layers.MLP:
    config = self.config
    return t5_layers.MLP(
        config.d_ff, config.mlp_activations, self.dtype, self.dropout_rate
    )

  def _relpos_bias(self, *, bidirectional: bool) -> t5_layers.RelativePositionBias:
    return relative_position_bias(self.config, bidirectional, self.dtype)

  def _dropout_rng(self, enable_dropout: bool) -> Array | None:
    if enable_dropout and self.dropout_rate > 0.0:
      return self.make_rng('dropout')
    return None

  def _residual(self, x: Array, update: Array, enable_dropout: bool) -> Array:
    update = t5_layers.dropout(update, self.dropout_rate, self._dropout_rng(enable_dropout))
    return constrain_rows(x + update)


def relative_position_bias(
    config: T5Config, bidirectional: bool, dtype: jnp.dtype
) -> t5_layers.RelativePositionBias:
  """The bias of a stack, or of a layer where each has its own."""
  return t5_layers.RelativePositionBias(
      num_heads=config.num_heads,
      num_buckets=config.relpos_buckets,
      max_distance=config.relpos_max_distance,
      bidirectional=bidirectional,
      dtype=dtype,
  )


class EncoderLayer(_Layer):
  """Self-attention over all valid positions, then the MLP; norms come first."""

  def setup(self) -> None:
    self.pre_attention_layer_norm = self._norm()
    self.attention = self._attention()
    self.pre_mlp_layer_norm = self._norm()
    self.mlp = self._mlp()
    if self.config.relpos_per_layer:
      self.relpos_bias = self._relpos_bias(bidirectional=True)

  def __call__(
      self,
      x_BSD: Array,
      prefix: KeysValues | None,
      rows_PD: Array | None,
      virtual_BS: Array | None,
      valid_BS: Array,
      mask_bias_B1SK: Array,
      relpos_bias: Array | tuple[Array, Array] | None,
      keys: KeyPositions,
      enable_dropout: bool,
      prompt_ids_B: Array | None = None,
  ) -> tuple[Array, None]:
    """Returns the layer's output and, for the scan, nothing."""
    if rows_PD is not None:
      x_BSD = t5_layers.place_virtual(x_BSD, rows_PD, virtual_BS)
    if relpos_bias is None:
      relpos_bias = keys.bias(self.relpos_bias, jnp.arange(x_BSD.shape[1]))
    with jax.named_scope('self_attention'):
      normed_BSD = self.pre_attention_layer_norm(x_BSD) * valid_BS[..., None]
      keys_values = self.attention.keys_and_values(normed_BSD)
      update_BSD = self.attention(
          normed_BSD,
          *t5_layers.prepend(prefix, keys_values, prompt_ids_B),
          add_bias(mask_bias_B1SK, relpos_bias),
          self._dropout_rng(enable_dropout),
      )
      x_BSD = self._residual(x_BSD, update_BSD, enable_dropout)
    with jax.named_scope('mlp'):
      update_BSD = self.mlp(
          self.pre_mlp_layer_norm(x_BSD), self._dropout_rng(enable_dropout)
      )
      return self._residual(x_BSD, update_BSD, enable_dropout), None


class DecoderLayer(_Layer):
  """Causal self-attention, attention over the encoder's output, then the MLP."""

  def setup(self) -> None:
    self.pre_self_attention_layer_norm = self._norm()
    self.self_attention = self._attention()
    self.pre_cross_attention_layer_norm = self._norm()
    self.encoder_decoder_attention = self._attention()
    self.pre_mlp_layer_norm = self._norm()
    self.mlp = self._mlp()
    if self.config.relpos_per_layer:
      self.relpos_bias = self._relpos_bias(bidirectional=False)

  def __call__(
      self,
      x_BTD: Array,
      prefixes: Prefixes,
      encoded_BSD: Array,
      valid_BT: Array,
      mask_bias_B1TK: Array,
      relpos_bias: Array | tuple[Array, Array] | None,
      keys: KeyPositions,
      cross_bias_B1TS: Array,
      enable_dropout: bool,
      prompt_ids_B: Array | None = None,
  ) -> tuple[Array, None]:
    """All target positions at once (teacher forcing)."""
    prefix, cross_prefix = prefixes
    if relpos_bias is None:
      relpos_bias = keys.bias(self.relpos_bias, jnp.arange(x_BTD.shape[1]))
    normed_BTD = self._normed_inputs(x_BTD, valid_BT)
    keys_values = t5_layers.prepend(
        prefix, self.self_attention.keys_and_values(normed_BTD), prompt_ids_B
    )
    x_BTD = self._after_self_attention(
        x_BTD, normed_BTD, keys_values, add_bias(mask_bias_B1TK, relpos_bias), enable_dropout
    )
    _, cross_keys_values = self.cross_keys_and_values(
        None, cross_prefix, encoded_BSD, prompt_ids_B
    )
    x_BTD = self._after_cross_attention_and_mlp(
        x_BTD, valid_BT, cross_keys_values, cross_bias_B1TS, enable_dropout
    )
    return x_BTD, None

  def cross_keys_and_values(
      self,
      carry: None,
      prefix: KeysValues | None,
      encoded_BSD: Array,
      prompt_ids_B: Array | None = None,
  ) -> tuple[None, KeysValues]:
    """Keys and values of the encoder's output, the same for all tokens."""
    own = self.encoder_decoder_attention.keys_and_values(encoded_BSD)
    return carry, t5_layers.prepend(prefix, own, prompt_ids_B)

  def step(
      self,
      x_B1D: Array,
      self_keys_values: KeysValues,
      cross_keys_values: KeysValues,
      index: Array,
      relpos_bias_1N1K: Array | None,
      keys: KeyPositions,
      cross_bias_I11S: Array,
  ) -> tuple[Array, KeysValues]:
    """One token against the cache; returns its output and the filled cache.

    Each of the I inputs may have K sequences, B = I · K: the keys and values of its encoding,
    and who may see them, are there once.
    """
    if relpos_bias_1N1K is None:
      relpos_bias_1N1K = keys.bias(self.relpos_bias, index[None])
    valid_B1 = jnp.ones(x_B1D.shape[:2], x_B1D.dtype)
    normed_B1D = self._normed_inputs(x_B1D, valid_B1)
    new = self.self_attention.keys_and_values(normed_B1D)
    # A prefix lies before the first token, at negative positions.
    place = index - keys.positions_K[0]
    self_keys_values = tuple(
        jax.lax.dynamic_update_slice_in_dim(cached, update.astype(cached.dtype), place, 1)
        for cached, update in zip(self_keys_values, new)
    )
    causal_bias_K = jnp.where(keys.positions_K <= index, 0.0, t5_layers.MASKED)
    x_B1D = self._after_self_attention(
        x_B1D,
        normed_B1D,
        self_keys_values,
        relpos_bias_1N1K + causal_bias_K,
        enable_dropout=False,
        decoding=True,
    )
    # Sequences of one input attend to the same keys: they stand side by side, as its queries.
    x_IKD = x_B1D.reshape(len(cross_keys_values[0]), -1, x_B1D.shape[-1])
    x_IKD = self._after_cross_attention_and_mlp(
        x_IKD,
        jnp.ones(x_IKD.shape[:2], x_IKD.dtype),
        cross_keys_values,
        cross_bias_I11S,
        enable_dropout=False,
        decoding=True,
    )
    return x_IKD.reshape(x_B1D.shape), self_keys_values

  def _normed_inputs(self, x_BTD: Array, valid_BT: Array) -> Array:
    return self.pre_self_attention_layer_norm(x_BTD) * valid_BT[..., None]

  def _after_self_attention(
      self, x, normed, keys_values, bias, enable_dropout, *, decoding=False
  ):
    with jax.named_scope('self_attention'):
      update_BTD = self.self_attention(
          normed, *keys_values, bias, self._dropout_rng(enable_dropout), decoding=decoding
      )
      return self._residual(x, update_BTD, enable_dropout)

  def _after_cross_attention_and_mlp(
      self, x, valid, cross_keys_values, cross_bias, enable_dropout, *, decoding=False
  ):
    with jax.named_scope('cross_attention'):
      update_BTD = self.encoder_decoder_attention(
          self.pre_cross_attention_layer_norm(x) * valid[..., None],
          *cross_keys_values,
          cross_bias,
          self._dropout_rng(enable_dropout),
          decoding=decoding,
      )
      x = self._residual(x, update_BTD, enable_dropout)
    with jax.named_scope('mlp'):
      update_BTD = self.mlp(
          self.pre_mlp_layer_norm(x) * valid[..., None], self._dropout_rng(enable_dropout)
      )
      return self._residual(x, update_BTD, enable_dropout)
