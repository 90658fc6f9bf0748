"""What the parts of the library hand each other, and the letters for shapes.

Dimension key, used as suffixes of array names in hot code (`logits_BTV`):

  B  batch rows            S  encoder (source) positions   T  decoder (target) positions
  P  prompt length         D  model width                  N  attention heads
  H  width of one head     F  feed-forward width           V  rows of the embedding table
  L  layers                C  choices (verbalizers)        K  beams, or prompts
  I  inputs that are decoded, each in K rows of the batch

Three types cross the borders between methods, backbones and data: `Batch`,
`Injection` and `BackboneSpec`. The first two are plain pytrees of arrays.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

Array = jax.Array
PyTree = Any
# Keys and values of one attention site: [L, P, N, H] each, or [P, N, H] in one layer; of K
# prompts [L, K, P, N, H] and [K, P, N, H].
KeysValues = tuple[Array, Array]

# Where a prefix's keys stand, see `Injection`.
POSITIONS = ('before', 'none')
# The attention sites a prefix can reach, and where Injection keeps it.
KV_FIELDS = {'encoder': 'encoder_kv', 'decoder': 'decoder_kv', 'cross': 'cross_kv'}


@flax.struct.dataclass
class Batch:
  """One batch of token ids, with T5X's feature names.

  Ids in [0, V) are rows of the backbone's embedding table, 0 is padding. An
  input id V + i is a *virtual token*: position i of the soft prompt, a row of
  `Injection.virtual_embeddings`. The data pipeline places them
  (`data/virtual_tokens.py`); the backbone only looks them up.

  A packed row holds several examples (`data/packing.py`), its *segments*: they are counted
  from 1, each stands in one piece, and 0 is padding. An example is the same segment of the
  same row in the encoder and in the decoder, and sees nothing of the others.
  """

  encoder_input_tokens: Array  # [B, S] int32
  decoder_input_tokens: Array  # [B, T] int32, the targets shifted right
  decoder_target_tokens: Array  # [B, T] int32
  decoder_loss_weights: Array  # [B, T], 0 where a position does not count
  # None where every row is one example. T5X's positions within a segment follow from these.
  encoder_segment_ids: Array | None = None  # [B, S] int32
  decoder_segment_ids: Array | None = None  # [B, T] int32
  # Which prompt of an Injection of several a row has, all its examples; None: there is one.
  prompt_ids: Array | None = None  # [B] int32


@flax.struct.dataclass
class Injection:
  """What a prompt method hands a frozen backbone; `None` means nothing there.

  A prefix has two choices of place where attention has a relative position bias (T5's
  self-attention; cross-attention has none):

    'before'  its P positions come before the text's first, at -P .. -1, and get the bias
              of that distance (what PEFT does in the decoder);
    'none'    its keys have no position, and get no bias.

  An Injection may hold K prompts (`injection_stack.py`), of which each row of a batch has
  one: prompt k's position i is the virtual token V + k·P + i, and `Batch.prompt_ids` says
  which of the K prefixes [L, K, P, N, H] a row sees. The rows of both tables are those of
  prompt 0, then those of prompt 1, and so on: [K·P, D] and [L, K·P, D].

  Attributes:
    virtual_embeddings: [P, D], the embeddings of the virtual tokens V .. V+P-1.
    encoder_kv: keys and values, each [L, P, N, H], which every layer's encoder
      self-attention sees before its own. All positions see them.
    decoder_kv: the same for the decoder's self-attention.
    cross_kv: the same for the decoder's attention over the encoder's output.
    layer_embeddings: [L, P, D], what the encoder's hidden states at the virtual tokens are
      replaced with before each layer.
    positions: the place of a prefix's keys, of `POSITIONS`.
    num_decoder_virtual_tokens: so many of the last rows of virtual_embeddings, of each
      prompt, stand before the decoder's start token; the others are in the encoder's input.
    num_prompts: K, the prompts that it holds.
  """

  virtual_embeddings: Array | None = None
  encoder_kv: KeysValues | None = None
  decoder_kv: KeysValues | None = None
  cross_kv: KeysValues | None = None
  layer_embeddings: Array | None = None
  positions: str = flax.struct.field(pytree_node=False, default='before')
  num_decoder_virtual_tokens: int = flax.struct.field(pytree_node=False, default=0)
  num_prompts: int = flax.struct.field(pytree_node=False, default=1)

  @property
  def num_virtual_tokens(self) -> int:
    """Virtual tokens in the encoder's input, those of one prompt."""
    if self.virtual_embeddings is not None:
      rows = self.virtual_embeddings.shape[0] // self.num_prompts
      return rows - self.num_decoder_virtual_tokens
    if self.layer_embeddings is not None:
      return self.layer_embeddings.shape[1] // self.num_prompts
    return 0

  @property
  def prompt_stride(self) -> int:
    """What the ids of a prompt's virtual tokens differ by from those of the next prompt's."""
    return self.num_virtual_tokens + self.num_decoder_virtual_tokens

  def decoder_prompt(self, vocab_size: int, prompt_ids_B: Array | None = None) -> Array:
    """Ids [Q] of the virtual tokens that stand before the decoder's start token.

    Of several prompts those of each row's own, [B, Q].
    """
    first = vocab_size + self.num_virtual_tokens
    ids_Q = jnp.arange(first, first + self.num_decoder_virtual_tokens, dtype=jnp.int32)
    if self.num_prompts == 1:
      return ids_Q
    return ids_Q + jnp.asarray(prompt_ids_B, jnp.int32)[:, None] * self.prompt_stride

  def check_prompt_ids(self, prompt_ids_B: Array | None) -> None:
    """Raises ValueError where it holds several prompts and rows do not say which is theirs."""
    if self.num_prompts > 1 and prompt_ids_B is None:
      raise ValueError(
          f'The Injection holds {self.num_prompts} prompts, but the batch does not say which of '
          'them each row has. Set Batch.prompt_ids (prompt_ids_B), or make the batch by '
          'data.several_prompts.for_prompt.'
      )

  def __str__(self) -> str:
    parts = []
    for field in dataclasses.fields(self):
      leaves = jax.tree.leaves(getattr(self, field.name))
      if leaves and field.metadata.get('pytree_node', True):
        shape = '×'.join(str(size) for size in leaves[0].shape)
        pair = '2 × ' if len(leaves) == 2 else ''
        parts.append(f'{field.name} {pair}{shape} {leaves[0].dtype}')
    if self.positions != 'before':
      parts.append(f'positions {self.positions}')
    if self.num_decoder_virtual_tokens:
      parts.append(f'the last {self.num_decoder_virtual_tokens} rows in the decoder')
    if self.num_prompts > 1:
      parts.append(f'{self.num_prompts} prompts')
    return f'Injection({", ".join(parts) or "empty"})'

  def check(self, spec: BackboneSpec) -> None:
    """Raises ValueError unless every array fits the backbone described by `spec`."""
    K = self.num_prompts
    if not isinstance(K, int) or K < 1:
      raise ValueError(f'Injection.num_prompts is {K!r}; it holds at least one prompt.')
    of_prompts = '' if K == 1 else f'{K} prompts × '
    rows = 0 if self.virtual_embeddings is None else len(self.virtual_embeddings)
    if rows % K:
      raise ValueError(
          f'Injection.virtual_embeddings has {rows} rows, which do not divide among its {K} '
          'prompts. Make it by injection_stack.stack_injections, which fills shorter prompts up.'
      )
    if not 0 <= self.num_decoder_virtual_tokens <= rows // K:
      raise ValueError(
          f'Injection.num_decoder_virtual_tokens is {self.num_decoder_virtual_tokens}, but '
          f'virtual_embeddings has {rows // K} rows'
          + (' of each prompt' if K > 1 else '')
          + ', of which those would be the last.'
      )
    if self.virtual_embeddings is not None:
      shape = self.virtual_embeddings.shape
      if len(shape) != 2 or shape[1] != spec.d_model:
        raise ValueError(
            f'Injection.virtual_embeddings has shape {shape}; this backbone needs '
            f'[{of_prompts}prompt length, d_model={spec.d_model}]. Train or load a prompt made '
            'for this backbone; a prompt is never broadcast to another width.'
        )
      if shape[0] == 0:
        raise ValueError(
            f'Injection.virtual_embeddings has shape {shape}: a prompt of no positions. '
            'Set PROMPT_LENGTH to at least 1; for no prompt at all, leave the field None.'
        )
    if self.layer_embeddings is not None:
      shape = self.layer_embeddings.shape
      expected = (spec.num_encoder_layers, K * self.num_virtual_tokens, spec.d_model)
      if shape != expected or not self.num_virtual_tokens:
        raise ValueError(
            f'Injection.layer_embeddings has shape {shape}; this backbone needs '
            f'[encoder layers={expected[0]}, {of_prompts}prompt length={expected[1] // K}, '
            f'd_model={expected[2]}]. Train or load a prompt made for this backbone.'
        )
    if self.positions not in POSITIONS:
      raise ValueError(
          f'Injection.positions is {self.positions!r}; the keys of a prefix stand '
          f'{" or ".join(map(repr, POSITIONS))}.'
      )
    layers = {
        'encoder_kv': spec.num_encoder_layers,
        'decoder_kv': spec.num_decoder_layers,
        'cross_kv': spec.num_decoder_layers,
    }
    for name, num_layers in layers.items():
      pair = getattr(self, name)
      if pair is None:
        continue
      keys, values = (array.shape for array in pair)
      before = (num_layers,) if K == 1 else (num_layers, K)
      rest = (spec.num_heads, spec.d_kv)
      length = keys[-3] if len(keys) == len(before) + 3 else 0
      if not length or keys != (*before, length, *rest) or keys != values:
        raise ValueError(
            f'Injection.{name} has shape {keys}'
            + (f' for keys and {values} for values' if keys != values else '')
            + f'; this backbone needs [layers={num_layers}, '
            + (f'prompts={K}, ' if K > 1 else '')
            + f'prefix length, heads={spec.num_heads}, d_kv={spec.d_kv}] for both. A prefix is '
            'made for the layers and heads of one backbone: train one for this, or load the '
            'backbone it was made for.'
        )


@dataclasses.dataclass(frozen=True)
class BackboneSpec:
  """All that a prompt method may know of a backbone: its sizes.

  Attributes:
    vocab_size: V, rows of the embedding table; the first virtual id.
    d_model: D, width of the residual stream.
    num_heads: N, attention heads.
    d_kv: H, width of one head (not always d_model / num_heads).
    num_encoder_layers: encoder depth, 0 for a decoder-only model.
    num_decoder_layers: decoder depth.
  """

  vocab_size: int
  d_model: int
  num_heads: int
  d_kv: int
  num_encoder_layers: int
  num_decoder_layers: int
