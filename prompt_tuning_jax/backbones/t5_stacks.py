"""T5's encoder and decoder: their layers, scanned, and the cache for decoding.

Equal layers (`t5_blocks.py`) are stacked on a leading axis [L] of their parameters and
scanned, so that XXL compiles as fast as one layer. What differs from other implementations,
and is kept because the published models were trained with it: a padded position is hidden
as a key *and* attends evenly as a query.

In packed rows (`typing.Batch`) a position sees those of its own segment alone, and the
prefix, which all segments share.
"""

from __future__ import annotations

import difflib

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from prompt_tuning_jax.backbones import t5_layers
from prompt_tuning_jax.backbones.t5_blocks import (
    DecoderLayer,
    EncoderLayer,
    KeyPositions,
    Prefixes,
    relative_position_bias,
    segment_positions,
)
from prompt_tuning_jax.backbones.t5_config import T5Config
from prompt_tuning_jax.typing import Array, KeysValues


@flax.struct.dataclass
class DecoderCache:
  """What decoding keeps between tokens, for B sequences of I inputs, B / I of each.

  What the sequences of an input share is there once; `self_keys` and `self_values` alone have a
  row for each of them.

  Attributes:
    self_keys, self_values: [L, B, P + T, N, H], a prefix and then tokens up to `index`.
    cross_keys, cross_values: [L, I, P + S, N, H], a prefix and the encoder's output.
    encoder_valid: [1, I, P + S], True where the encoder's input is not padding.
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


# Rematerialisation policies by name, for gin; None keeps every residual. What a step of the
# published sizes costs then, over its forward pass, and what it keeps: docs/scaling.md.
REMAT_POLICIES = {
    'none': None,
    # The products with kernels; those inside attention are computed again.
    'dots_with_no_batch_dims': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    # Of those, the ones that a mesh splits over `model`, by the names that `t5_layers` gives
    # them; the layer's sums, whole on every device, are computed again.
    'qkv_and_mlp': jax.checkpoint_policies.save_only_these_names('qkv', 'mlp'),
    'full': jax.checkpoint_policies.nothing_saveable,
}


def _scanned(layer_class: type[nn.Module], length: int, remat: str, unroll: bool):
  """The stack of `length` equal layers as one module with parameters [L, …]."""
  if remat not in REMAT_POLICIES:
    near = difflib.get_close_matches(str(remat), REMAT_POLICIES, n=1)
    hint = f' Did you mean {near[0]!r}?' if near else ''
    raise ValueError(
        f'REMAT is {remat!r} (T5.remat); it may be {", ".join(map(repr, REMAT_POLICIES))}.{hint}'
    )
  if remat != 'none':
    layer_class = nn.remat(
        layer_class,
        policy=REMAT_POLICIES[remat],
        prevent_cse=unroll,
        static_argnums=(9,),  # enable_dropout, of both kinds of layers
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
    return nn.scan(layer_class, methods={'__call__': method(scanned=2, broadcast=7)})
  return nn.scan(
      layer_class,
      methods={
          '__call__': method(scanned=1, broadcast=8),
          'cross_keys_and_values': method(scanned=1, broadcast=2),
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
  attention: str = 'xla'

  def _layers(self, layer_class: type[nn.Module], length: int) -> nn.Module:
    return _scanned(layer_class, length, self.remat, self.unroll)(
        config=self.config,
        dtype=self.dtype,
        dropout_rate=self.dropout_rate,
        attention_implementation=self.attention,
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
      self.relpos_bias = relative_position_bias(self.config, True, self.dtype)
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
      segment_ids_BS: Array | None = None,
      prompt_ids_B: Array | None = None,
  ) -> Array:
    """Encodes all positions; `valid_BS` is False on padding.

    `layer_rows` are rows [L, P, D] that stand at virtual tokens before every layer, and
    which of them stands at each position, negative where none does.

    Of several prompts `prefix` is [L, K, P, N, H], of which each row sees that of its id.
    """
    length = x_BSD.shape[1]
    keys = KeyPositions.of(length, prefix, prefix_positions, segment_ids_BS)
    relpos_bias = None
    if not self.config.relpos_per_layer:
      relpos_bias = keys.bias(self.relpos_bias, jnp.arange(length))
    both_valid_B1SS = _in_segment(
        (valid_BS[:, :, None] & valid_BS[:, None, :])[:, None], segment_ids_BS, segment_ids_BS
    )
    mask_bias_B1SK = _mask_bias(_prefix_visible(both_valid_B1SS, prefix), self.dtype)
    valid_BS = valid_BS.astype(self.dtype)

    x_BSD = self._dropout(x_BSD, enable_dropout)
    x_BSD, _ = self.layers(
        x_BSD,
        prefix,
        *layer_rows,
        valid_BS,
        mask_bias_B1SK,
        relpos_bias,
        keys,
        enable_dropout,
        prompt_ids_B,
    )
    return self._dropout(
        self.encoder_norm(x_BSD) * valid_BS[..., None], enable_dropout
    )


class Decoder(_Stack):
  """The decoder stack with its output layer, on embedded inputs."""

  def setup(self) -> None:
    if not self.config.relpos_per_layer:
      self.relpos_bias = relative_position_bias(self.config, False, self.dtype)
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
      segment_ids: tuple[Array | None, Array | None] = (None, None),
      prompt_ids_B: Array | None = None,
  ) -> Array:
    """Returns the normed outputs [B, T, D]; those of padding are zero.

    `segment_ids` are those of the encoder's positions [B, S] and of the decoder's [B, T].
    `prompt_ids_B` is as in the encoder.
    """
    prefix, cross_prefix = prefixes
    encoder_segments_BS, segments_BT = segment_ids
    length = x_BTD.shape[1]
    keys = KeyPositions.of(length, prefix, prefix_positions, segments_BT)
    relpos_bias = None
    if not self.config.relpos_per_layer:
      relpos_bias = keys.bias(self.relpos_bias, jnp.arange(length))
    # A virtual token has no target, but is no padding.
    is_virtual_BT = decoder_input_tokens_BT >= self.config.vocab_size
    target_valid_BT = (decoder_target_tokens_BT > 0) | is_virtual_BT
    visible_B1TT = (
        target_valid_BT[:, :, None]
        & target_valid_BT[:, None, :]
        & jnp.tril(jnp.ones((length, length), bool))
    )[:, None]
    visible_B1TT = _in_segment(visible_B1TT, segments_BT, segments_BT)
    cross_visible_B1TS = (
        target_valid_BT[:, :, None] & encoder_valid_BS[:, None, :]
    )[:, None]
    cross_visible_B1TS = _in_segment(cross_visible_B1TS, segments_BT, encoder_segments_BS)

    x_BTD = self._dropout(x_BTD, enable_dropout)
    valid_BT = _decoder_valid(decoder_input_tokens_BT, is_virtual_BT, segments_BT)
    valid_BT = valid_BT.astype(self.dtype)
    x_BTD, _ = self.layers(
        x_BTD,
        prefixes,
        encoded_BSD,
        valid_BT,
        _mask_bias(_prefix_visible(visible_B1TT, prefix), self.dtype),
        relpos_bias,
        keys,
        _mask_bias(_prefix_visible(cross_visible_B1TS, cross_prefix), self.dtype),
        enable_dropout,
        prompt_ids_B,
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
      prompt_ids_B: Array | None = None,
  ) -> DecoderCache:
    """A cache for `max_length` tokens that holds the prefixes and the encoder's output."""
    config = self.config
    prefix, cross_prefix = prefixes
    _, (cross_keys, cross_values) = self.layers.cross_keys_and_values(
        None, cross_prefix, encoded_BSD, prompt_ids_B
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
    self_keys, self_values = jax.vmap(t5_layers.prepend, (0, 0, None))(
        prefix, (empty_LBTNH, empty_LBTNH), prompt_ids_B
    )
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
      relpos_bias_1N1K = cache.key_positions.bias(self.relpos_bias, cache.index[None])
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
  widths = [(0, 0)] * (visible.ndim - 1) + [(t5_layers.prefix_length(prefix), 0)]
  return jnp.pad(visible, widths, constant_values=True)


def _in_segment(
    visible_B1TS: Array, segments_BT: Array | None, segments_BS: Array | None
) -> Array:
  """What is visible of the keys [S] to the queries [T] if they see their own segment alone."""
  if segments_BT is None:
    return visible_B1TS
  return visible_B1TS & (segments_BT[:, :, None] == segments_BS[:, None, :])[:, None]


def _mask_bias(visible: Array, dtype: jnp.dtype) -> Array:
  return jnp.where(visible, 0.0, t5_layers.MASKED).astype(dtype)


def _decoder_valid(
    tokens_BT: Array, is_virtual_BT: Array, segments_BT: Array | None = None
) -> Array:
  """Positions that T5X does not zero: the first, tokens, and those before a token.

  The padding id 0 also starts a sequence, which it does behind virtual tokens too, and may
  stand before a token. In a packed row every segment has a first.
  """
  has_token_BT = tokens_BT > 0
  next_is_token_BT = jnp.pad(has_token_BT[:, 1:], ((0, 0), (0, 1)))
  starts_BT = jnp.pad(is_virtual_BT[:, :-1], ((0, 0), (1, 0)), constant_values=True)
  if segments_BT is not None:
    starts_BT = starts_BT | (segment_positions(segments_BT) == 0)
  return has_token_BT | next_is_token_BT | starts_BT
