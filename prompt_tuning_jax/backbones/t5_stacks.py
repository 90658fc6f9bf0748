"""T5's encoder and decoder: their layers, scanned, and the cache for decoding.

Equal layers are stacked on a leading axis [L] of their parameters and scanned, so that
XXL compiles as fast as one layer. What differs from other implementations, and is kept
because the published models were trained with it: a padded position is hidden as a key
*and* attends evenly as a query, and the normed inputs of padded positions are zeroed.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from prompt_tuning_jax.backbones import t5_layers
from prompt_tuning_jax.backbones.t5_config import T5Config
from prompt_tuning_jax.typing import Array, KeysValues

# Keys and values [L, P, N, H] that the decoder's layers see in self- and cross-attention.
Prefixes = tuple[KeysValues | None, KeysValues | None]


class KeyPositions(NamedTuple):
  """Where the K keys of self-attention stand, for the relative position bias.

  Attributes:
    positions_K: int32, the first token at 0 and a prefix at negative positions.
    has_position_K: 0 for keys that get no bias, else 1; None where all get it.
  """

  positions_K: Array
  has_position_K: Array | None

  @classmethod
  def of(cls, length: int, prefix: KeysValues | None, prefix_positions: str) -> KeyPositions:
    """`length` tokens behind a prefix (`typing.Injection.positions`)."""
    positions_K = jnp.arange(-_length(prefix), length)
    if prefix is None or prefix_positions == 'before':
      return cls(positions_K, None)
    return cls(positions_K, (positions_K >= 0).astype(jnp.float32))


@flax.struct.dataclass
class DecoderCache:
  """What decoding keeps between tokens; axis 1 is the batch in every array.

  Attributes:
    self_keys, self_values: [L, B, P + T, N, H], a prefix and then tokens up to `index`.
    cross_keys, cross_values: [L, B, P + S, N, H], a prefix and the encoder's output.
    encoder_valid: [1, B, P + S], True where the encoder's input is not padding.
    index: position of the next token.
    key_positions: positions of the keys of self-attention.
  """

  self_keys: Array
  self_values: Array
  cross_keys: Array
  cross_values: Array
  encoder_valid: Array
  index: Array
  key_positions: KeyPositions


class _Layer(nn.Module):
  """What encoder and decoder layers share: sizes and ways to build their parts."""

  config: T5Config
  dtype: jnp.dtype
  dropout_rate: float

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
    )

  def _mlp(self) -> t5_layers.MLP:
    config = self.config
    return t5_layers.MLP(
        config.d_ff, config.mlp_activations, self.dtype, self.dropout_rate
    )

  def _relpos_bias(self, *, bidirectional: bool) -> t5_layers.RelativePositionBias:
    return _relative_position_bias(self.config, bidirectional, self.dtype)

  def _dropout_rng(self, enable_dropout: bool) -> Array | None:
    if enable_dropout and self.dropout_rate > 0.0:
      return self.make_rng('dropout')
    return None

  def _residual(self, x: Array, update: Array, enable_dropout: bool) -> Array:
    return x + t5_layers.dropout(
        update, self.dropout_rate, self._dropout_rng(enable_dropout)
    )


def _relative_position_bias(
    config: T5Config, bidirectional: bool, dtype: jnp.dtype
) -> t5_layers.RelativePositionBias:
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
      relpos_bias_1NSK: Array | None,
      keys: KeyPositions,
      enable_dropout: bool,
  ) -> tuple[Array, None]:
    """Returns the layer's output and, for the scan, nothing."""
    if rows_PD is not None:
      x_BSD = t5_layers.place_virtual(x_BSD, rows_PD, virtual_BS)
    if relpos_bias_1NSK is None:
      relpos_bias_1NSK = self.relpos_bias(jnp.arange(x_BSD.shape[1]), *keys)
    with jax.named_scope('self_attention'):
      normed_BSD = self.pre_attention_layer_norm(x_BSD) * valid_BS[..., None]
      keys_values = self.attention.keys_and_values(normed_BSD)
      update_BSD = self.attention(
          normed_BSD,
          *t5_layers.prepend(prefix, keys_values),
          mask_bias_B1SK + relpos_bias_1NSK,
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
      relpos_bias_1NTK: Array | None,
      keys: KeyPositions,
      cross_bias_B1TS: Array,
      enable_dropout: bool,
  ) -> tuple[Array, None]:
    """All target positions at once (teacher forcing)."""
    prefix, cross_prefix = prefixes
    if relpos_bias_1NTK is None:
      relpos_bias_1NTK = self.relpos_bias(jnp.arange(x_BTD.shape[1]), *keys)
    normed_BTD = self._normed_inputs(x_BTD, valid_BT)
    keys_values = t5_layers.prepend(prefix, self.self_attention.keys_and_values(normed_BTD))
    x_BTD = self._after_self_attention(
        x_BTD, normed_BTD, keys_values, mask_bias_B1TK + relpos_bias_1NTK, enable_dropout
    )
    _, cross_keys_values = self.cross_keys_and_values(None, cross_prefix, encoded_BSD)
    x_BTD = self._after_cross_attention_and_mlp(
        x_BTD, valid_BT, cross_keys_values, cross_bias_B1TS, enable_dropout
    )
    return x_BTD, None

  def cross_keys_and_values(
      self, carry: None, prefix: KeysValues | None, encoded_BSD: Array
  ) -> tuple[None, KeysValues]:
    """Keys and values of the encoder's output, the same for all tokens."""
    own = self.encoder_decoder_attention.keys_and_values(encoded_BSD)
    return carry, t5_layers.prepend(prefix, own)

  def step(
      self,
      x_B1D: Array,
      self_keys_values: KeysValues,
      cross_keys_values: KeysValues,
      index: Array,
      relpos_bias_1N1K: Array | None,
      keys: KeyPositions,
      cross_bias_B11S: Array,
  ) -> tuple[Array, KeysValues]:
    """One token against the cache; returns its output and the filled cache."""
    if relpos_bias_1N1K is None:
      relpos_bias_1N1K = self.relpos_bias(index[None], *keys)
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
        x_B1D, normed_B1D, self_keys_values, relpos_bias_1N1K + causal_bias_K, False
    )
    x_B1D = self._after_cross_attention_and_mlp(
        x_B1D, valid_B1, cross_keys_values, cross_bias_B11S, False
    )
    return x_B1D, self_keys_values

  def _normed_inputs(self, x_BTD: Array, valid_BT: Array) -> Array:
    return self.pre_self_attention_layer_norm(x_BTD) * valid_BT[..., None]

  def _after_self_attention(self, x, normed, keys_values, bias, enable_dropout):
    with jax.named_scope('self_attention'):
      update_BTD = self.self_attention(
          normed, *keys_values, bias, self._dropout_rng(enable_dropout)
      )
      return self._residual(x, update_BTD, enable_dropout)

  def _after_cross_attention_and_mlp(
      self, x, valid, cross_keys_values, cross_bias, enable_dropout
  ):
    with jax.named_scope('cross_attention'):
      update_BTD = self.encoder_decoder_attention(
          self.pre_cross_attention_layer_norm(x) * valid[..., None],
          *cross_keys_values,
          cross_bias,
          self._dropout_rng(enable_dropout),
      )
      x = self._residual(x, update_BTD, enable_dropout)
    with jax.named_scope('mlp'):
      update_BTD = self.mlp(
          self.pre_mlp_layer_norm(x) * valid[..., None], self._dropout_rng(enable_dropout)
      )
      return self._residual(x, update_BTD, enable_dropout)


# Rematerialisation policies by name, for gin; None keeps every residual.
REMAT_POLICIES = {
    'none': None,
    'full': jax.checkpoint_policies.nothing_saveable,
    'dots_with_no_batch_dims': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def _scanned(layer_class: type[nn.Module], length: int, remat: str, unroll: bool):
  """The stack of `length` equal layers as one module with parameters [L, …]."""
  if remat not in REMAT_POLICIES:
    raise ValueError(f'remat is {remat!r}; it may be one of {sorted(REMAT_POLICIES)}.')
  if remat != 'none':
    layer_class = nn.remat(
        layer_class,
        policy=REMAT_POLICIES[remat],
        prevent_cse=unroll,
        static_argnums=(9,) if layer_class is EncoderLayer else (9,),
    )
  shared = dict(
      variable_axes={'params': 0, 'keys_values': 0},
      split_rngs={'params': True, 'dropout': True},
      length=length,
      unroll=length if unroll else 1,
      metadata_params={nn.PARTITION_NAME: 'layers'},
  )

  def method(*, scanned: int, broadcast: int):
    """After what is carried come arguments with a layer axis, then those without."""
    return dict(in_axes=(0,) * scanned + (nn.broadcast,) * broadcast, **shared)

  if issubclass(layer_class, EncoderLayer):
    return nn.scan(layer_class, methods={'__call__': method(scanned=2, broadcast=6)})
  return nn.scan(
      layer_class,
      methods={
          '__call__': method(scanned=1, broadcast=7),
          'cross_keys_and_values': method(scanned=1, broadcast=1),
          'step': method(scanned=2, broadcast=4),
      },
  )


class _Stack(nn.Module):
  """What encoder and decoder share around their layers."""

  config: T5Config
  dtype: jnp.dtype
  dropout_rate: float
  remat: str
  unroll: bool

  def _layers(self, layer_class: type[nn.Module], length: int) -> nn.Module:
    return _scanned(layer_class, length, self.remat, self.unroll)(
        config=self.config, dtype=self.dtype, dropout_rate=self.dropout_rate
    )

  def _dropout(self, x: Array, enable_dropout: bool) -> Array:
    rng = None
    if enable_dropout and self.dropout_rate > 0.0:
      rng = self.make_rng('dropout')
    return t5_layers.dropout(x, self.dropout_rate, rng)


class Encoder(_Stack):
  """The encoder stack on embedded inputs."""

  def setup(self) -> None:
    if not self.config.relpos_per_layer:
      self.relpos_bias = _relative_position_bias(self.config, True, self.dtype)
    self.layers = self._layers(EncoderLayer, self.config.num_encoder_layers)
    self.encoder_norm = t5_layers.RMSNorm(dtype=self.dtype)

  def __call__(
      self,
      x_BSD: Array,
      valid_BS: Array,
      prefix: KeysValues | None = None,
      prefix_positions: str = 'before',
      layer_rows: tuple[Array | None, Array | None] = (None, None),
      enable_dropout: bool = False,
  ) -> Array:
    """Encodes all positions; `valid_BS` is False on padding.

    `layer_rows` are rows [L, P, D] that stand at virtual tokens before every layer, and
    which of them stands at each position, negative where none does.
    """
    length = x_BSD.shape[1]
    keys = KeyPositions.of(length, prefix, prefix_positions)
    relpos_bias_1NSK = None
    if not self.config.relpos_per_layer:
      relpos_bias_1NSK = self.relpos_bias(jnp.arange(length), *keys)
    both_valid_B1SS = (valid_BS[:, :, None] & valid_BS[:, None, :])[:, None]
    mask_bias_B1SK = _mask_bias(_prefix_visible(both_valid_B1SS, prefix), self.dtype)
    valid_BS = valid_BS.astype(self.dtype)

    x_BSD = self._dropout(x_BSD, enable_dropout)
    x_BSD, _ = self.layers(
        x_BSD,
        prefix,
        *layer_rows,
        valid_BS,
        mask_bias_B1SK,
        relpos_bias_1NSK,
        keys,
        enable_dropout,
    )
    return self._dropout(
        self.encoder_norm(x_BSD) * valid_BS[..., None], enable_dropout
    )


class Decoder(_Stack):
  """The decoder stack with its output layer, on embedded inputs."""

  def setup(self) -> None:
    if not self.config.relpos_per_layer:
      self.relpos_bias = _relative_position_bias(self.config, False, self.dtype)
    self.layers = self._layers(DecoderLayer, self.config.num_decoder_layers)
    self.decoder_norm = t5_layers.RMSNorm(dtype=self.dtype)
    if not self.config.tied_embeddings:
      self.logits_dense = t5_layers.Kernel(
          features=self.config.vocab_size,
          axes=('embed', 'vocab'),
          stddev=self.config.d_model**-0.5,
          dtype=self.dtype,
          float32_output=True,
      )

  def __call__(
      self,
      x_BTD: Array,
      decoder_input_tokens_BT: Array,
      decoder_target_tokens_BT: Array,
      encoded_BSD: Array,
      encoder_valid_BS: Array,
      prefixes: Prefixes = (None, None),
      prefix_positions: str = 'before',
      enable_dropout: bool = False,
  ) -> Array:
    """Returns the normed outputs [B, T, D]; those of padding are zero."""
    prefix, cross_prefix = prefixes
    length = x_BTD.shape[1]
    keys = KeyPositions.of(length, prefix, prefix_positions)
    relpos_bias_1NTK = None
    if not self.config.relpos_per_layer:
      relpos_bias_1NTK = self.relpos_bias(jnp.arange(length), *keys)
    # A virtual token has no target, but is no padding.
    is_virtual_BT = decoder_input_tokens_BT >= self.config.vocab_size
    target_valid_BT = (decoder_target_tokens_BT > 0) | is_virtual_BT
    visible_B1TT = (
        target_valid_BT[:, :, None]
        & target_valid_BT[:, None, :]
        & jnp.tril(jnp.ones((length, length), bool))
    )[:, None]
    cross_visible_B1TS = (
        target_valid_BT[:, :, None] & encoder_valid_BS[:, None, :]
    )[:, None]

    x_BTD = self._dropout(x_BTD, enable_dropout)
    valid_BT = _decoder_valid(decoder_input_tokens_BT, is_virtual_BT).astype(self.dtype)
    x_BTD, _ = self.layers(
        x_BTD,
        prefixes,
        encoded_BSD,
        valid_BT,
        _mask_bias(_prefix_visible(visible_B1TT, prefix), self.dtype),
        relpos_bias_1NTK,
        keys,
        _mask_bias(_prefix_visible(cross_visible_B1TS, cross_prefix), self.dtype),
        enable_dropout,
    )
    x_BTD = self._dropout(self.decoder_norm(x_BTD), enable_dropout)
    return x_BTD * valid_BT[..., None]

  def init_cache(
      self,
      encoded_BSD: Array,
      encoder_valid_BS: Array,
      max_length: int,
      prefixes: Prefixes = (None, None),
      prefix_positions: str = 'before',
  ) -> DecoderCache:
    """A cache for `max_length` tokens that holds the prefixes and the encoder's output."""
    config = self.config
    prefix, cross_prefix = prefixes
    _, (cross_keys, cross_values) = self.layers.cross_keys_and_values(
        None, cross_prefix, encoded_BSD
    )
    empty_LBTNH = jnp.zeros(
        (
            config.num_decoder_layers,
            encoded_BSD.shape[0],
            max_length,
            config.num_heads,
            config.d_kv,
        ),
        self.dtype,
    )
    self_keys, self_values = jax.vmap(t5_layers.prepend)(prefix, (empty_LBTNH, empty_LBTNH))
    return DecoderCache(
        self_keys=self_keys,
        self_values=self_values,
        cross_keys=cross_keys,
        cross_values=cross_values,
        encoder_valid=_prefix_visible(encoder_valid_BS[None], cross_prefix),
        index=jnp.zeros((), jnp.int32),
        key_positions=KeyPositions.of(max_length, prefix, prefix_positions),
    )

  def step(self, x_B1D: Array, cache: DecoderCache) -> tuple[Array, DecoderCache]:
    """One token's normed output [B, 1, D] and the cache that now holds it."""
    relpos_bias_1N1K = None
    if not self.config.relpos_per_layer:
      relpos_bias_1N1K = self.relpos_bias(cache.index[None], *cache.key_positions)
    x_B1D, (self_keys, self_values) = self.layers.step(
        x_B1D,
        (cache.self_keys, cache.self_values),
        (cache.cross_keys, cache.cross_values),
        cache.index,
        relpos_bias_1N1K,
        cache.key_positions,
        _mask_bias(cache.encoder_valid[0][:, None, None, :], self.dtype),
    )
    cache = cache.replace(
        self_keys=self_keys, self_values=self_values, index=cache.index + 1
    )
    return self.decoder_norm(x_B1D), cache

  def logits(self, x_BTD: Array) -> Array:
    """Logits [B, T, V] of an untied output layer, in float32."""
    return self.logits_dense(x_BTD)


def _prefix_visible(visible: Array, prefix: KeysValues | None) -> Array:
  """What is visible [..., S] of the keys, behind a prefix that all queries see."""
  if prefix is None:
    return visible
  widths = [(0, 0)] * (visible.ndim - 1) + [(_length(prefix), 0)]
  return jnp.pad(visible, widths, constant_values=True)


def _length(prefix: KeysValues | None) -> int:
  """Positions of a prefix [L, P, N, H]."""
  return 0 if prefix is None else prefix[0].shape[1]


def _mask_bias(visible: Array, dtype: jnp.dtype) -> Array:
  return jnp.where(visible, 0.0, t5_layers.MASKED).astype(dtype)


def _decoder_valid(tokens_BT: Array, is_virtual_BT: Array) -> Array:
  """Positions that T5X does not zero: the first, tokens, and those before a token.

  The padding id 0 also starts a sequence, which it does behind virtual tokens too, and may
  stand before a token.
  """
  has_token_BT = tokens_BT > 0
  next_is_token_BT = jnp.pad(has_token_BT[:, 1:], ((0, 0), (0, 1)))
  starts_BT = jnp.pad(is_virtual_BT[:, :-1], ((0, 0), (1, 0)), constant_values=True)
  return has_token_BT | next_is_token_BT | starts_BT
