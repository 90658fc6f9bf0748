"""T5 1.0 and 1.1, LM-adapted or not, as a frozen backbone that takes an Injection.

Raffel et al. (2020); the 1.1 form is Shazeer (2020). Parameter names are T5X's, but for
the layers, which are stacked under `layers` and scanned; `checkpoints/names.py` maps the
stack to T5X's `layers_0`, `layers_1`, … on disk. From the top: this file is the model,
`t5_stacks.py` its encoder and decoder, `t5_blocks.py` a layer of each, `t5_layers.py` what
layers are made of.
"""

from __future__ import annotations

import functools
import numbers

import flax.linen as nn
import jax
import jax.numpy as jnp

from prompt_tuning_jax.backbones import int8
from prompt_tuning_jax.backbones.t5_config import T5Config
from prompt_tuning_jax.backbones.t5_layers import (
    ATTENTIONS,
    check_cudnn,
    float32_product,
    place_virtual,
)
from prompt_tuning_jax.backbones.t5_stacks import Decoder, DecoderCache, Encoder
from prompt_tuning_jax.partitioning import constrain_rows
from prompt_tuning_jax.typing import (
    Array,
    BackboneSpec,
    Batch,
    Injection,
    KeysValues,
    PyTree,
)


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
    x = jnp.asarray(self.embedding).at[tokens].get(mode='clip')
    scale_V = self.get_variable('params', 'embedding_scale')
    if scale_V is not None:
      x = x * scale_V.at[tokens].get(mode='clip')[..., None]
    x = x.astype(self.dtype)
    if virtual_embeddings_PD is not None:
      x = place_virtual(x, virtual_embeddings_PD, tokens - self.vocab_size)
    return constrain_rows(x)

  def attend(self, x_BTD: Array) -> Array:
    """Logits [B, T, V] in float32 of an output layer that is the table itself."""
    logits_BTV = float32_product(x_BTD, self.embedding.T.astype(self.dtype))
    scale_V = self.get_variable('params', 'embedding_scale')
    return logits_BTV if scale_V is None else logits_BTV * scale_V


class T5(nn.Module):
  """T5 as `(params, Batch, Injection) → logits`.

  Attributes:
    config: the architecture.
    dtype: type of the computation; float32 or bfloat16 (T5 overflows in float16).
    dropout_rate: of the frozen model while a prompt trains (Lester et al. keep T5's
      0.1), in [0, 1); active only where `enable_dropout` is passed.
    remat: name of a rematerialisation policy (`t5_stacks.REMAT_POLICIES`).
    unroll: compile every layer for itself instead of scanning them; same parameters.
    attention: how attention is computed (`t5_layers.ATTENTIONS`): 'xla' by products that XLA
      compiles; 'dot_product' by `jax.nn.dot_product_attention`; 'cudnn' by its kernel for
      NVIDIA GPUs, which computes in bfloat16. The latter two know no dropout.
    int8: whether kernels and embeddings are held in int8 (`int8.py`), so far as shapes are
      told and weights are drawn. The layers go by the weights that they are given.
  """

  config: T5Config
  dtype: jnp.dtype = jnp.float32
  dropout_rate: float = 0.0
  remat: str = 'none'
  unroll: bool = False
  attention: str = 'xla'
  int8: bool = False

  def __post_init__(self) -> None:
    rate = self.dropout_rate
    if not (isinstance(rate, numbers.Real) and 0 <= rate < 1):
      raise ValueError(
          f'DROPOUT_RATE is {rate!r} (T5.dropout_rate); it is the share of activations '
          'dropped in training, at least 0 and below 1. Set DROPOUT_RATE = 0.1, as T5 has '
          'it, or 0.0 for none.'
      )
    if self.attention not in ATTENTIONS:
      raise ValueError(
          f'ATTENTION is {self.attention!r} (T5.attention); it may be '
          f'{", ".join(map(repr, ATTENTIONS))}.'
      )
    if self.attention != 'xla' and rate > 0:
      raise ValueError(
          f'ATTENTION={self.attention!r} knows no dropout, but DROPOUT_RATE is {rate}. Set '
          "DROPOUT_RATE=0.0, or ATTENTION='xla'."
      )
    super().__post_init__()

  def setup(self) -> None:
    if jnp.dtype(self.dtype) == jnp.float16:
      raise ValueError(
          'T5 overflows in float16 (its feed-forward outputs exceed 65,504). '
          'Use bfloat16 or float32.'
      )
    if self.attention == 'cudnn':
      check_cudnn(self.dtype)
    self.token_embedder = _TokenEmbedder(
        self.config.vocab_size, self.config.d_model, self.dtype
    )
    stack = dict(
        config=self.config,
        dtype=self.dtype,
        dropout_rate=self.dropout_rate,
        remat=self.remat,
        unroll=self.unroll,
        attention=self.attention,
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
    segment_ids = batch.encoder_segment_ids, batch.decoder_segment_ids
    if (segment_ids[0] is None) != (segment_ids[1] is None):
      raise ValueError(
          'The batch has segments in the '
          + ('decoder' if segment_ids[0] is None else 'encoder')
          + ' alone. Packed rows need both encoder_segment_ids and decoder_segment_ids.'
      )
    encoded_BSD = self.encode(
        batch.encoder_input_tokens,
        injection,
        segment_ids_BS=segment_ids[0],
        prompt_ids_B=batch.prompt_ids,
        enable_dropout=enable_dropout,
    )
    return self.decode(
        batch.decoder_input_tokens,
        batch.decoder_target_tokens,
        encoded_BSD,
        batch.encoder_input_tokens,
        injection,
        segment_ids=segment_ids,
        prompt_ids_B=batch.prompt_ids,
        enable_dropout=enable_dropout,
    )

  def encode(
      self,
      encoder_input_tokens_BS: Array,
      injection: Injection | None = None,
      *,
      segment_ids_BS: Array | None = None,
      prompt_ids_B: Array | None = None,
      enable_dropout: bool = False,
  ) -> Array:
    """The encoder's output [B, S, D]; padded positions are zero.

    `prompt_ids_B`, here and below, are `Batch.prompt_ids`.
    """
    injection, prompt_ids_B = self._check(injection, prompt_ids_B)
    virtual_BS = encoder_input_tokens_BS - self.config.vocab_size
    if prompt_ids_B is not None:
      # Their ids count the decoder's virtual tokens too, the rows before each layer do not.
      virtual_BS = virtual_BS - prompt_ids_B[:, None] * injection.num_decoder_virtual_tokens
    x_BSD = self.token_embedder(encoder_input_tokens_BS, injection.virtual_embeddings)
    return self.encoder(
        x_BSD,
        encoder_input_tokens_BS > 0,
        injection.encoder_kv,
        injection.positions,
        (injection.layer_embeddings, virtual_BS),
        enable_dropout,
        segment_ids_BS,
        prompt_ids_B,
    )

  def decode(
      self,
      decoder_input_tokens_BT: Array,
      decoder_target_tokens_BT: Array,
      encoded_BSD: Array,
      encoder_input_tokens_BS: Array,
      injection: Injection | None = None,
      *,
      segment_ids: tuple[Array | None, Array | None] = (None, None),
      prompt_ids_B: Array | None = None,
      enable_dropout: bool = False,
  ) -> Array:
    """Logits [B, T, V] of targets that are known, given the encoder's output.

    `segment_ids` of packed rows are those of the encoder's and of the decoder's positions.
    """
    injection, prompt_ids_B = self._check(injection, prompt_ids_B)
    x_BTD = self.decoder(
        self.token_embedder(decoder_input_tokens_BT, injection.virtual_embeddings),
        decoder_input_tokens_BT,
        decoder_target_tokens_BT,
        encoded_BSD,
        encoder_input_tokens_BS > 0,
        (injection.decoder_kv, injection.cross_kv),
        injection.positions,
        enable_dropout,
        segment_ids,
        prompt_ids_B,
    )
    return self._logits(x_BTD)

  def init_cache(
      self,
      encoded_BSD: Array,
      encoder_input_tokens_BS: Array,
      max_length: int,
      injection: Injection | None = None,
      prompt_ids_B: Array | None = None,
  ) -> DecoderCache:
    """A cache with which `decode_step` can produce up to `max_length` tokens."""
    injection, prompt_ids_B = self._check(injection, prompt_ids_B)
    return self.decoder.init_cache(
        encoded_BSD,
        encoder_input_tokens_BS > 0,
        max_length,
        (injection.decoder_kv, injection.cross_kv),
        injection.positions,
        prompt_ids_B,
    )

  def decode_step(
      self, token_B: Array, cache: DecoderCache, injection: Injection | None = None
  ) -> tuple[Array, DecoderCache]:
    """Logits [B, V] of the token that follows `token_B`, and the new cache.

    The injection is needed where `token_B` are virtual tokens; prefixes are in the cache.
    """
    rows_PD = None if injection is None else injection.virtual_embeddings
    x_B1D, cache = self.decoder.step(self.token_embedder(token_B[:, None], rows_PD), cache)
    return self._logits(x_B1D)[:, 0], cache

  @functools.partial(jax.named_call, name='logits')
  def _logits(self, x_BTD: Array) -> Array:
    if not self.config.tied_embeddings:
      return self.decoder.logits(x_BTD)
    if self.config.scale_decoder_outputs:
      x_BTD = x_BTD * self.config.d_model**-0.5
    return self.token_embedder.attend(x_BTD)

  def _check(
      self, injection: Injection | None, prompt_ids_B: Array | None
  ) -> tuple[Injection, Array | None]:
    """The injection, and which of its prompts rows have; None where there is one."""
    injection = injection or Injection()
    injection.check(self.spec)
    injection.check_prompt_ids(prompt_ids_B)
    return injection, None if injection.num_prompts == 1 else prompt_ids_B

  def keys_and_values(self, params: PyTree, tokens_S: Array) -> Injection:
    """The keys and values that the frozen model itself computes for a text.

    Those of the encoder for the text as its input; those of cross-attention for the
    encoder's output of it; and those of the decoder for the text as what it has written
    so far, given the text as its input.

    Args:
      params: the weights.
      tokens_S: int32 [P], token ids of the text.

    Returns:
      An Injection of encoder_kv, decoder_kv and cross_kv, each 2 × [L, P, N, H].
    """
    tokens_BS = jnp.asarray(tokens_S)[None]
    batch = Batch(tokens_BS, tokens_BS, tokens_BS, jnp.ones_like(tokens_BS))
    _, seen = self.clone(dropout_rate=0.0).apply(
        {'params': params}, batch, mutable='keys_values'
    )
    encoder, decoder = (seen['keys_values'][stack]['layers'] for stack in ('encoder', 'decoder'))

    def site(attention: PyTree) -> KeysValues:
      return tuple(array_LBPNH[:, 0] for array_LBPNH in attention['own'])

    return Injection(
        encoder_kv=site(encoder['attention']),
        decoder_kv=site(decoder['self_attention']),
        cross_kv=site(decoder['encoder_decoder_attention']),
    )

  def init_params(self, key: Array) -> PyTree:
    """Freshly drawn weights as plain arrays, in T5's own initialisation."""
    params = nn.meta.unbox(self._init(key))
    return int8.quantize_params(params) if self.int8 else params

  def logical_axes(self) -> PyTree:
    """T5X's logical axis names of every weight, as PartitionSpecs of names."""
    boxed = jax.eval_shape(self._init, jax.random.key(0))
    axes = nn.get_partition_spec(boxed)
    return int8.logical_axes(axes) if self.int8 else axes

  def _init(self, key: Array) -> PyTree:
    one = jnp.ones((1, 1), jnp.int32)
    return self.clone(dropout_rate=0.0).init(key, Batch(one, one, one, one))['params']
