"""T5 1.0 and 1.1, LM-adapted or not, as a frozen backbone that takes an Injection.

Raffel et al. (2020); the 1.1 form is Shazeer (2020). Parameter names are T5X's;
equal layers are stacked on a leading axis [L] under `layers` and scanned, so that
XXL compiles as fast as one layer. `checkpoints/names.py` maps the stack to T5X's
`layers_0`, `layers_1`, … on disk.

What differs from other implementations, and is kept because the published models
were trained with it: attention logits are not divided by sqrt(d_kv); a padded
position is hidden as a key *and* attends evenly as a query; the normed inputs of
padded positions are zeroed.
"""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from prompt_tuning_jax.backbones import t5_layers
from prompt_tuning_jax.typing import Array, BackboneSpec, Batch, Injection, PyTree


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
    scale_decoder_outputs: whether tied logits are scaled by d_model**-0.5 (T5 1.0).
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


@flax.struct.dataclass
class DecoderCache:
  """What decoding keeps between tokens; axis 1 is the batch in every array.

  Attributes:
    self_keys, self_values: [L, B, T, N, H], filled up to `index`.
    cross_keys, cross_values: [L, B, S, N, H], of the encoder's output.
    encoder_valid: [1, B, S], True where the encoder's input is not padding.
    index: position of the next token.
  """

  self_keys: Array
  self_values: Array
  cross_keys: Array
  cross_values: Array
  encoder_valid: Array
  index: Array


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
      valid_BS: Array,
      mask_bias_B1SS: Array,
      relpos_bias_1NSS: Array | None,
      enable_dropout: bool,
  ) -> tuple[Array, None]:
    """Returns the layer's output and, for the scan, nothing."""
    if relpos_bias_1NSS is None:
      positions_S = jnp.arange(x_BSD.shape[1])
      relpos_bias_1NSS = self.relpos_bias(positions_S, positions_S)
    with jax.named_scope('self_attention'):
      normed_BSD = self.pre_attention_layer_norm(x_BSD) * valid_BS[..., None]
      update_BSD = self.attention(
          normed_BSD,
          *self.attention.keys_and_values(normed_BSD),
          mask_bias_B1SS + relpos_bias_1NSS,
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
      encoded_BSD: Array,
      valid_BT: Array,
      mask_bias_B1TT: Array,
      relpos_bias_1NTT: Array | None,
      cross_bias_B1TS: Array,
      enable_dropout: bool,
  ) -> tuple[Array, None]:
    """All target positions at once (teacher forcing)."""
    if relpos_bias_1NTT is None:
      positions_T = jnp.arange(x_BTD.shape[1])
      relpos_bias_1NTT = self.relpos_bias(positions_T, positions_T)
    normed_BTD = self._normed_inputs(x_BTD, valid_BT)
    keys_values = self.self_attention.keys_and_values(normed_BTD)
    x_BTD = self._after_self_attention(
        x_BTD, normed_BTD, keys_values, mask_bias_B1TT + relpos_bias_1NTT, enable_dropout
    )
    cross_keys_values = self.encoder_decoder_attention.keys_and_values(encoded_BSD)
    x_BTD = self._after_cross_attention_and_mlp(
        x_BTD, valid_BT, cross_keys_values, cross_bias_B1TS, enable_dropout
    )
    return x_BTD, None

  def cross_keys_and_values(
      self, carry: None, encoded_BSD: Array
  ) -> tuple[None, tuple[Array, Array]]:
    """Keys and values of the encoder's output, computed once for all tokens."""
    return carry, self.encoder_decoder_attention.keys_and_values(encoded_BSD)

  def step(
      self,
      x_B1D: Array,
      self_keys_values: tuple[Array, Array],
      cross_keys_values: tuple[Array, Array],
      index: Array,
      relpos_bias_1N1T: Array | None,
      cross_bias_B11S: Array,
  ) -> tuple[Array, tuple[Array, Array]]:
    """One token against the cache; returns its output and the filled cache."""
    length = self_keys_values[0].shape[1]
    positions_T = jnp.arange(length)
    if relpos_bias_1N1T is None:
      relpos_bias_1N1T = self.relpos_bias(index[None], positions_T)
    valid_B1 = jnp.ones(x_B1D.shape[:2], x_B1D.dtype)
    normed_B1D = self._normed_inputs(x_B1D, valid_B1)
    new = self.self_attention.keys_and_values(normed_B1D)
    self_keys_values = tuple(
        jax.lax.dynamic_update_slice_in_dim(cached, update.astype(cached.dtype), index, 1)
        for cached, update in zip(self_keys_values, new)
    )
    causal_bias_T = jnp.where(positions_T <= index, 0.0, t5_layers.MASKED)
    x_B1D = self._after_self_attention(
        x_B1D, normed_B1D, self_keys_values, relpos_bias_1N1T + causal_bias_T, False
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
        static_argnums=(5,) if layer_class is EncoderLayer else (7,),
    )
  shared = dict(
      variable_axes={'params': 0},
      split_rngs={'params': True, 'dropout': True},
      length=length,
      unroll=length if unroll else 1,
      metadata_params={nn.PARTITION_NAME: 'layers'},
  )
  broadcast = nn.broadcast
  if issubclass(layer_class, EncoderLayer):
    return nn.scan(layer_class, methods={'__call__': dict(in_axes=broadcast, **shared)})
  return nn.scan(
      layer_class,
      methods={
          '__call__': dict(in_axes=broadcast, **shared),
          'cross_keys_and_values': dict(in_axes=broadcast, **shared),
          'step': dict(in_axes=(0, 0, broadcast, broadcast, broadcast), **shared),
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
      self, x_BSD: Array, valid_BS: Array, enable_dropout: bool = False
  ) -> Array:
    """Encodes all positions; `valid_BS` is False on padding."""
    relpos_bias_1NSS = None
    if not self.config.relpos_per_layer:
      positions_S = jnp.arange(x_BSD.shape[1])
      relpos_bias_1NSS = self.relpos_bias(positions_S, positions_S)
    both_valid_B1SS = (valid_BS[:, :, None] & valid_BS[:, None, :])[:, None]
    mask_bias_B1SS = _mask_bias(both_valid_B1SS, self.dtype)
    valid_BS = valid_BS.astype(self.dtype)

    x_BSD = self._dropout(x_BSD, enable_dropout)
    x_BSD, _ = self.layers(
        x_BSD, valid_BS, mask_bias_B1SS, relpos_bias_1NSS, enable_dropout
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
      )

  def __call__(
      self,
      x_BTD: Array,
      decoder_input_tokens_BT: Array,
      decoder_target_tokens_BT: Array,
      encoded_BSD: Array,
      encoder_valid_BS: Array,
      enable_dropout: bool = False,
  ) -> tuple[Array, Array]:
    """Returns the normed outputs [B, T, D] and which positions are not padding."""
    length = x_BTD.shape[1]
    relpos_bias_1NTT = None
    if not self.config.relpos_per_layer:
      positions_T = jnp.arange(length)
      relpos_bias_1NTT = self.relpos_bias(positions_T, positions_T)
    target_valid_BT = decoder_target_tokens_BT > 0
    visible_B1TT = (
        target_valid_BT[:, :, None]
        & target_valid_BT[:, None, :]
        & jnp.tril(jnp.ones((length, length), bool))
    )[:, None]
    cross_visible_B1TS = (
        target_valid_BT[:, :, None] & encoder_valid_BS[:, None, :]
    )[:, None]

    x_BTD = self._dropout(x_BTD, enable_dropout)
    valid_BT = _decoder_valid(decoder_input_tokens_BT).astype(self.dtype)
    x_BTD, _ = self.layers(
        x_BTD,
        encoded_BSD,
        valid_BT,
        _mask_bias(visible_B1TT, self.dtype),
        relpos_bias_1NTT,
        _mask_bias(cross_visible_B1TS, self.dtype),
        enable_dropout,
    )
    x_BTD = self._dropout(self.decoder_norm(x_BTD), enable_dropout)
    return x_BTD * valid_BT[..., None]

  def init_cache(
      self, encoded_BSD: Array, encoder_valid_BS: Array, max_length: int
  ) -> DecoderCache:
    """An empty cache for `max_length` tokens, cross-attention already computed."""
    config = self.config
    _, (cross_keys, cross_values) = self.layers.cross_keys_and_values(None, encoded_BSD)
    empty = jnp.zeros(
        (
            config.num_decoder_layers,
            encoded_BSD.shape[0],
            max_length,
            config.num_heads,
            config.d_kv,
        ),
        self.dtype,
    )
    return DecoderCache(
        self_keys=empty,
        self_values=empty,
        cross_keys=cross_keys,
        cross_values=cross_values,
        encoder_valid=encoder_valid_BS[None],
        index=jnp.zeros((), jnp.int32),
    )

  def step(self, x_B1D: Array, cache: DecoderCache) -> tuple[Array, DecoderCache]:
    """One token's normed output [B, 1, D] and the cache that now holds it."""
    relpos_bias_1N1T = None
    if not self.config.relpos_per_layer:
      positions_T = jnp.arange(cache.self_keys.shape[2])
      relpos_bias_1N1T = self.relpos_bias(cache.index[None], positions_T)
    x_B1D, (self_keys, self_values) = self.layers.step(
        x_B1D,
        (cache.self_keys, cache.self_values),
        (cache.cross_keys, cache.cross_values),
        cache.index,
        relpos_bias_1N1T,
        _mask_bias(cache.encoder_valid[0][:, None, None, :], self.dtype),
    )
    cache = cache.replace(
        self_keys=self_keys, self_values=self_values, index=cache.index + 1
    )
    return self.decoder_norm(x_B1D), cache

  def logits(self, x_BTD: Array) -> Array:
    """Logits [B, T, V] of an untied output layer."""
    return self.logits_dense(x_BTD)


def _mask_bias(visible: Array, dtype: jnp.dtype) -> Array:
  return jnp.where(visible, 0.0, t5_layers.MASKED).astype(dtype)


def _decoder_valid(tokens_BT: Array) -> Array:
  """Positions that T5X does not zero: the first, tokens, and those before a token.

  The padding id 0 also starts a sequence and may stand before a token.
  """
  has_token_BT = tokens_BT > 0
  next_is_token_BT = jnp.pad(has_token_BT[:, 1:], ((0, 0), (0, 1)))
  first_T = jnp.arange(tokens_BT.shape[1]) == 0
  return has_token_BT | next_is_token_BT | first_T


class _TokenEmbedder(nn.Module):
  """The embedding table; rows beyond it are virtual tokens."""

  vocab_size: int
  d_model: int
  dtype: jnp.dtype

  def setup(self) -> None:
    self.embedding = self.param(
        'embedding',
        nn.with_logical_partitioning(nn.initializers.normal(1.0), ('vocab', 'embed')),
        (self.vocab_size, self.d_model),
    )

  def __call__(self, tokens: Array, virtual_embeddings_PD: Array | None = None) -> Array:
    # mode='clip' is what the hardware does anyway; ids beyond the table are refused
    # where batches are made, with the name of the example.
    x = jnp.asarray(self.embedding).at[tokens].get(mode='clip').astype(self.dtype)
    if virtual_embeddings_PD is not None:
      with jax.named_scope('virtual_tokens'):
        virtual = jnp.asarray(virtual_embeddings_PD, self.dtype)
        rows = jnp.clip(tokens - self.vocab_size, 0, len(virtual) - 1)
        x = jnp.where((tokens >= self.vocab_size)[..., None], virtual[rows], x)
    return x

  def attend(self, x_BTD: Array) -> Array:
    return x_BTD @ self.embedding.T.astype(self.dtype)


class T5(nn.Module):
  """T5 as `(params, Batch, Injection) → logits`.

  Attributes:
    config: the architecture.
    dtype: type of the computation; float32 or bfloat16 (T5 overflows in float16).
    dropout_rate: of the frozen model while a prompt trains (Lester et al. keep T5's
      0.1); active only where `enable_dropout` is passed.
    remat: name of a rematerialisation policy (`REMAT_POLICIES`).
    unroll: compile every layer for itself instead of scanning them; same parameters.
  """

  config: T5Config
  dtype: jnp.dtype = jnp.float32
  dropout_rate: float = 0.0
  remat: str = 'none'
  unroll: bool = False

  def setup(self) -> None:
    if jnp.dtype(self.dtype) == jnp.float16:
      raise ValueError(
          'T5 overflows in float16 (its feed-forward outputs exceed 65,504). '
          'Use bfloat16 or float32.'
      )
    self.token_embedder = _TokenEmbedder(
        self.config.vocab_size, self.config.d_model, self.dtype
    )
    stack = dict(
        config=self.config,
        dtype=self.dtype,
        dropout_rate=self.dropout_rate,
        remat=self.remat,
        unroll=self.unroll,
    )
    self.encoder = Encoder(**stack)
    self.decoder = Decoder(**stack)

  @property
  def spec(self) -> BackboneSpec:
    """The sizes that a prompt method may know."""
    config = self.config
    return BackboneSpec(
        vocab_size=config.vocab_size,
        d_model=config.d_model,
        num_heads=config.num_heads,
        d_kv=config.d_kv,
        num_encoder_layers=config.num_encoder_layers,
        num_decoder_layers=config.num_decoder_layers,
    )

  def __call__(
      self,
      batch: Batch,
      injection: Injection | None = None,
      *,
      enable_dropout: bool = False,
  ) -> Array:
    """Logits [B, T, V] in float32 for the batch's targets (teacher forcing)."""
    encoded_BSD = self.encode(
        batch.encoder_input_tokens, injection, enable_dropout=enable_dropout
    )
    return self.decode(
        batch.decoder_input_tokens,
        batch.decoder_target_tokens,
        encoded_BSD,
        batch.encoder_input_tokens,
        injection,
        enable_dropout=enable_dropout,
    )

  def encode(
      self,
      encoder_input_tokens_BS: Array,
      injection: Injection | None = None,
      *,
      enable_dropout: bool = False,
  ) -> Array:
    """The encoder's output [B, S, D]; padded positions are zero."""
    injection = self._check(injection)
    x_BSD = self.token_embedder(encoder_input_tokens_BS, injection.virtual_embeddings)
    return self.encoder(x_BSD, encoder_input_tokens_BS > 0, enable_dropout)

  def decode(
      self,
      decoder_input_tokens_BT: Array,
      decoder_target_tokens_BT: Array,
      encoded_BSD: Array,
      encoder_input_tokens_BS: Array,
      injection: Injection | None = None,
      *,
      enable_dropout: bool = False,
  ) -> Array:
    """Logits [B, T, V] of targets that are known, given the encoder's output."""
    injection = self._check(injection)
    x_BTD = self.decoder(
        self.token_embedder(decoder_input_tokens_BT, injection.virtual_embeddings),
        decoder_input_tokens_BT,
        decoder_target_tokens_BT,
        encoded_BSD,
        encoder_input_tokens_BS > 0,
        enable_dropout,
    )
    return self._logits(x_BTD)

  def init_cache(
      self,
      encoded_BSD: Array,
      encoder_input_tokens_BS: Array,
      max_length: int,
      injection: Injection | None = None,
  ) -> DecoderCache:
    """A cache with which `decode_step` can produce up to `max_length` tokens."""
    self._check(injection)
    return self.decoder.init_cache(encoded_BSD, encoder_input_tokens_BS > 0, max_length)

  def decode_step(
      self, token_B: Array, cache: DecoderCache
  ) -> tuple[Array, DecoderCache]:
    """Logits [B, V] of the token that follows `token_B`, and the new cache."""
    x_B1D, cache = self.decoder.step(self.token_embedder(token_B[:, None]), cache)
    return self._logits(x_B1D)[:, 0], cache

  @functools.partial(jax.named_call, name='logits')
  def _logits(self, x_BTD: Array) -> Array:
    if not self.config.tied_embeddings:
      return self.decoder.logits(x_BTD).astype(jnp.float32)
    if self.config.scale_decoder_outputs:
      x_BTD = x_BTD * self.config.d_model**-0.5
    return self.token_embedder.attend(x_BTD).astype(jnp.float32)

  def _check(self, injection: Injection | None) -> Injection:
    injection = injection or Injection()
    injection.check(self.spec)
    for field in ('encoder_kv', 'decoder_kv', 'cross_kv'):
      if getattr(injection, field) is not None:
        raise ValueError(
            f'The T5 backbone cannot take Injection.{field}: it takes '
            'virtual_embeddings (soft prompts) only.'
        )
    return injection

  def init_params(self, key: Array) -> PyTree:
    """Freshly drawn weights as plain arrays, in T5's own initialisation."""
    return nn.meta.unbox(self._init(key))

  def logical_axes(self) -> PyTree:
    """T5X's logical axis names of every weight, as PartitionSpecs of names."""
    boxed = jax.eval_shape(self._init, jax.random.key(0))
    return nn.get_partition_spec(boxed)

  def _init(self, key: Array) -> PyTree:
    one = jnp.ones((1, 1), jnp.int32)
    return self.clone(dropout_rate=0.0).init(key, Batch(one, one, one, one))['params']
