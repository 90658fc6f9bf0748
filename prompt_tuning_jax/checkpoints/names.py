"""One table of parameter names: T5X, Hugging Face, and the model's own tree.

T5X's per-layer names are the language of the readers and of files on disk. The
model itself scans over its layers, so there `encoder/layers_0/x`,
`encoder/layers_1/x`, … are one array `encoder/layers/x` with a leading [L] axis.
Hugging Face stores Linear weights as [out, in], the transpose of T5X's kernels.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax.backbones.t5 import T5Config
from prompt_tuning_jax.typing import Array, PyTree


@dataclasses.dataclass(frozen=True)
class _Row:
  """One line of the table; `{i}` stands for the layer."""

  t5x: str
  hf: str
  axes: tuple[str, ...]
  transposed: bool = True  # whether Hugging Face stores the transpose
  when: str = 'always'


def _attention(t5x: str, hf: str) -> list[_Row]:
  return [
      _Row(f'{t5x}/query/kernel', f'{hf}.q.weight', ('embed', 'joined_kv')),
      _Row(f'{t5x}/key/kernel', f'{hf}.k.weight', ('embed', 'joined_kv')),
      _Row(f'{t5x}/value/kernel', f'{hf}.v.weight', ('embed', 'joined_kv')),
      _Row(f'{t5x}/out/kernel', f'{hf}.o.weight', ('joined_kv', 'embed')),
  ]


def _mlp(t5x: str, hf: str) -> list[_Row]:
  return [
      _Row(f'{t5x}/wi/kernel', f'{hf}.wi.weight', ('embed', 'mlp'), when='plain_mlp'),
      _Row(f'{t5x}/wi_0/kernel', f'{hf}.wi_0.weight', ('embed', 'mlp'), when='gated_mlp'),
      _Row(f'{t5x}/wi_1/kernel', f'{hf}.wi_1.weight', ('embed', 'mlp'), when='gated_mlp'),
      _Row(f'{t5x}/wo/kernel', f'{hf}.wo.weight', ('mlp', 'embed')),
  ]


def _norm(t5x: str, hf: str) -> _Row:
  return _Row(f'{t5x}/scale', f'{hf}.weight', ('embed',), transposed=False)


def _relpos(stack: str) -> list[_Row]:
  hf = f'{stack}.block.{{}}.layer.0.SelfAttention.relative_attention_bias.weight'
  axes = ('heads', 'relpos_buckets')
  return [
      _Row(f'{stack}/relpos_bias/rel_embedding', hf.format(0), axes, when='shared_relpos'),
      _Row(
          f'{stack}/layers_{{i}}/relpos_bias/rel_embedding',
          hf.format('{i}'),
          axes,
          when='layer_relpos',
      ),
  ]


_E, _D = 'encoder/layers_{i}', 'decoder/layers_{i}'
_HF_E, _HF_D = 'encoder.block.{i}.layer', 'decoder.block.{i}.layer'

_TABLE: tuple[_Row, ...] = (
    _Row('token_embedder/embedding', 'shared.weight', ('vocab', 'embed'), transposed=False),
    *_relpos('encoder'),
    _norm(f'{_E}/pre_attention_layer_norm', f'{_HF_E}.0.layer_norm'),
    *_attention(f'{_E}/attention', f'{_HF_E}.0.SelfAttention'),
    _norm(f'{_E}/pre_mlp_layer_norm', f'{_HF_E}.1.layer_norm'),
    *_mlp(f'{_E}/mlp', f'{_HF_E}.1.DenseReluDense'),
    _norm('encoder/encoder_norm', 'encoder.final_layer_norm'),
    *_relpos('decoder'),
    _norm(f'{_D}/pre_self_attention_layer_norm', f'{_HF_D}.0.layer_norm'),
    *_attention(f'{_D}/self_attention', f'{_HF_D}.0.SelfAttention'),
    _norm(f'{_D}/pre_cross_attention_layer_norm', f'{_HF_D}.1.layer_norm'),
    *_attention(f'{_D}/encoder_decoder_attention', f'{_HF_D}.1.EncDecAttention'),
    _norm(f'{_D}/pre_mlp_layer_norm', f'{_HF_D}.2.layer_norm'),
    *_mlp(f'{_D}/mlp', f'{_HF_D}.2.DenseReluDense'),
    _norm('decoder/decoder_norm', 'decoder.final_layer_norm'),
    _Row('decoder/logits_dense/kernel', 'lm_head.weight', ('embed', 'vocab'), when='untied'),
)

# (d_model, d_kv, heads, encoder layers, decoder layers, d_ff) of the published models.
SIZES = {
    'T5 1.1 small': (512, 64, 6, 8, 8, 1024),
    'T5 1.1 base': (768, 64, 12, 12, 12, 2048),
    'T5 1.1 large': (1024, 64, 16, 24, 24, 2816),
    'T5 1.1 xl': (2048, 64, 32, 24, 24, 5120),
    'T5 1.1 xxl': (4096, 64, 64, 24, 24, 10240),
    'T5 1.0 small': (512, 64, 8, 6, 6, 2048),
    'T5 1.0 base': (768, 64, 12, 12, 12, 3072),
    'T5 1.0 large': (1024, 64, 16, 24, 24, 4096),
    'T5 1.0 3B': (1024, 128, 32, 24, 24, 16384),
    'T5 1.0 11B': (1024, 128, 128, 24, 24, 65536),
    'ByT5 small': (1472, 64, 6, 12, 4, 3584),
    'ByT5 base': (1536, 64, 12, 18, 6, 3968),
    'ByT5 large': (1536, 64, 16, 36, 12, 3840),
    'ByT5 xl': (2560, 64, 32, 36, 12, 6720),
    'ByT5 xxl': (4672, 64, 64, 36, 12, 12352),
}


@dataclasses.dataclass(frozen=True)
class Entry:
  """One array of a model, under all its names.

  Attributes:
    t5x: per-layer T5X name, `encoder/layers_3/mlp/wo/kernel`.
    hf: Hugging Face name.
    path: path in the model's tree, `('encoder', 'layers', 'mlp', 'wo', 'kernel')`.
    layer: index on the leading [L] axis of the array at `path`; None if it has none.
    axes: T5X's logical names of the axes, without the layer axis.
    shape: sizes of those axes, in T5X's orientation.
    transposed: whether Hugging Face stores the transpose.
  """

  t5x: str
  hf: str
  path: tuple[str, ...]
  layer: int | None
  axes: tuple[str, ...]
  shape: tuple[int, ...]
  transposed: bool


def entries(config: T5Config) -> list[Entry]:
  """Every array of the model described by `config`, layers in order."""
  gated = len(config.mlp_activations) > 1
  present = {
      'always': True,
      'gated_mlp': gated,
      'plain_mlp': not gated,
      'layer_relpos': config.relpos_per_layer,
      'shared_relpos': not config.relpos_per_layer,
      'untied': not config.tied_embeddings,
  }
  sizes = {
      'vocab': config.vocab_size,
      'embed': config.d_model,
      'heads': config.num_heads,
      'joined_kv': config.num_heads * config.d_kv,
      'mlp': config.d_ff,
      'relpos_buckets': config.relpos_buckets,
  }
  depth = {'encoder': config.num_encoder_layers, 'decoder': config.num_decoder_layers}
  found = []
  for row in _TABLE:
    if not present[row.when]:
      continue
    path = tuple(row.t5x.replace('layers_{i}', 'layers').split('/'))
    layers = range(depth[path[0]]) if '{i}' in row.t5x else [None]
    for i in layers:
      found.append(
          Entry(
              t5x=row.t5x.replace('{i}', str(i)),
              hf=row.hf.replace('{i}', str(i)),
              path=path,
              layer=i,
              axes=row.axes,
              shape=tuple(sizes[axis] for axis in row.axes),
              transposed=row.transposed,
          )
      )
  return found


def flatten_to_t5x(params: PyTree, config: T5Config) -> dict[str, Any]:
  """The model's tree as a flat dict of per-layer T5X names.

  Args:
    params: the tree of `T5`, numpy or jax arrays, layers stacked on axis 0.
    config: the model's architecture.

  Raises:
    ValueError: listing every array that is missing, unexpected, or misshapen.
  """
  stacked = flax.traverse_util.flatten_dict(dict(params))
  flat = {}
  known = set()
  depths = {}
  for entry in entries(config):
    known.add(entry.path)
    if entry.layer is not None:
      depths[entry.path] = entry.layer + 1
    if entry.path not in stacked:
      continue
    array = stacked[entry.path]
    if entry.layer is None:
      flat[entry.t5x] = array
    elif entry.layer < array.shape[0]:
      flat[entry.t5x] = array[entry.layer]
  for path, array in stacked.items():
    if path not in known:
      flat['/'.join(path)] = array
    elif path in depths:
      for layer in range(depths[path], array.shape[0]):
        flat['/'.join(path).replace('/layers/', f'/layers_{layer}/')] = array[layer]
  check_shapes(flat, config, 'The parameter tree')
  return flat


def stack_layers(flat: Mapping[str, Any], layers: list[Entry], dtype: Any = None) -> Any:
  """The array at one path of the model's tree: its layers on a leading [L] axis."""
  first = flat[layers[0].t5x]
  if layers[0].layer is None:
    return first if dtype is None else first.astype(dtype)
  if isinstance(first, jax.Array):
    arrays = [flat[entry.t5x] for entry in layers]
    return jnp.stack(arrays).astype(dtype or first.dtype)
  stacked = np.empty((len(layers), *first.shape), dtype or first.dtype)
  stacked[0] = first
  for entry in layers[1:]:
    stacked[entry.layer] = flat[entry.t5x]
  return stacked


def stack_from_t5x(
    flat: Mapping[str, np.ndarray | Array],
    config: T5Config,
    dtype: Any = None,
    *,
    stack: Callable[[Mapping[str, Any], list[Entry], Any], Any] = stack_layers,
) -> PyTree:
  """The model's tree from per-layer T5X names: the inverse of `flatten_to_t5x`.

  Arrays are taken out of `flat` one at a time, so a lazy mapping is never held
  twice. jax arrays give jax arrays, all else gives numpy arrays.

  Args:
    flat: arrays under their per-layer T5X names.
    config: the model's architecture.
    dtype: type to cast to; None keeps each array's own.
    stack: makes the array at one path of the tree from `flat`, its layers in order, and
      `dtype`; where it lies is its choice (`placing.py`).

  Raises:
    ValueError: listing every array that is missing, unexpected, or misshapen.
  """
  check_shapes(flat, config, 'The flat parameters')
  return stack_entries(flat, entries(config), dtype, stack=stack)


def stack_entries(
    flat: Mapping[str, np.ndarray | Array],
    entries: list[Entry],
    dtype: Any = None,
    *,
    stack: Callable[[Mapping[str, Any], list[Entry], Any], Any] = stack_layers,
) -> PyTree:
  """`stack_from_t5x` of the arrays of these entries, whatever shapes they have."""
  layers: dict[tuple[str, ...], list[Entry]] = {}
  for entry in entries:
    layers.setdefault(entry.path, []).append(entry)
  tree = {path: stack(flat, group, dtype) for path, group in layers.items()}
  return flax.traverse_util.unflatten_dict(tree)


def config_from_shapes(
    flat: Mapping[str, Any], *, relpos_max_distance: int = 128
) -> T5Config:
  """The architecture of a T5X checkpoint, from the shapes of its arrays.

  Two things are not in the shapes. The maximal relative distance is an argument.
  The activations follow T5's two generations: two input kernels are a gated GELU
  (T5 1.1), one is a ReLU (T5 1.0). A tied output is scaled, as in T5 1.0.

  Args:
    flat: arrays, or anything with a `shape`, by per-layer T5X name.
    relpos_max_distance: largest distance that the relative positions tell apart.

  Raises:
    ValueError: if arrays that determine the sizes are missing, or contradict
      each other.
  """
  specs = _specs(flat)
  relpos_per_layer = 'encoder/layers_0/relpos_bias/rel_embedding' in specs
  gated = 'encoder/layers_0/mlp/wi_0/kernel' in specs
  needed = {
      'embedding': 'token_embedder/embedding',
      'relpos': 'encoder/layers_0/relpos_bias/rel_embedding'
      if relpos_per_layer
      else 'encoder/relpos_bias/rel_embedding',
      'query': 'encoder/layers_0/attention/query/kernel',
      'wi': f'encoder/layers_0/mlp/{"wi_0" if gated else "wi"}/kernel',
  }
  missing = [name for name in needed.values() if len(specs.get(name, ())) != 2]
  if missing:
    raise ValueError(
        'The sizes of the model cannot be told from the checkpoint: it has no matrix '
        f'{", ".join(missing)}. A T5 encoder-decoder with T5X names was expected; found '
        f'{", ".join(sorted(specs)[:4]) or "nothing"}{", …" if len(specs) > 4 else ""}.'
    )
  vocab_size, d_model = specs[needed['embedding']]
  num_heads, relpos_buckets = specs[needed['relpos']]
  joined_kv = specs[needed['query']][1]
  if joined_kv % num_heads:
    raise ValueError(
        f'{needed["query"]} is {joined_kv} wide, which {num_heads} heads (the rows of '
        f'{needed["relpos"]}) do not divide. The arrays are not of one model.'
    )
  tied = 'decoder/logits_dense/kernel' not in specs
  return T5Config(
      vocab_size=vocab_size,
      d_model=d_model,
      num_heads=num_heads,
      d_kv=joined_kv // num_heads,
      d_ff=specs[needed['wi']][1],
      num_encoder_layers=_depth(specs, 'encoder'),
      num_decoder_layers=_depth(specs, 'decoder'),
      relpos_buckets=relpos_buckets,
      relpos_max_distance=relpos_max_distance,
      mlp_activations=('gelu', 'linear') if gated else ('relu',),
      tied_embeddings=tied,
      scale_decoder_outputs=tied,
      relpos_per_layer=relpos_per_layer,
  )


def _depth(specs: Mapping[str, tuple[int, ...]], stack: str) -> int:
  layers = (re.match(rf'{stack}/layers_(\d+)/', name) for name in specs)
  depth = max((int(match.group(1)) + 1 for match in layers if match), default=0)
  if depth > len(specs):
    raise ValueError(
        f'The checkpoint names the layer {depth - 1:,} of its {stack}, but holds '
        f'{len(specs):,} arrays. They are not of one model.'
    )
  return depth


def _specs(flat: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
  """Shapes by name; a lazy mapping is asked for its specs, not for its arrays."""
  return {name: tuple(x.shape) for name, x in getattr(flat, 'specs', flat).items()}


def check_shapes(flat: Mapping[str, Any], config: T5Config, where: str) -> None:
  """Checks that `flat` holds exactly the arrays of the model `config` describes.

  Args:
    flat: arrays, or anything with a `shape`, by per-layer T5X name.
    config: the expected architecture.
    where: what `flat` is, for the message ("The checkpoint /models/t5").

  Raises:
    ValueError: listing every array that is missing, unexpected, or of another
      shape, with the published model whose size it looks like.
  """
  found = _specs(flat)
  expected = {entry.t5x: entry for entry in entries(config)}
  lines = []
  for name, entry in expected.items():
    if name not in found:
      lines.append(f'{name}: expected {list(entry.shape)}, but it is missing')
    elif found[name] != entry.shape:
      hint = _looks_like(entry, found[name])
      lines.append(f'{name}: expected {list(entry.shape)}, found {list(found[name])}{hint}')
  for name in found:
    if name not in expected:
      lines.append(f'{name}: unexpected, found {list(found[name])}')
  if lines:
    raise ValueError(
        f'{where} does not fit the model: {len(lines)} of {len(expected)} arrays differ. '
        f'Expected {_describe(config)}.\n  '
        + '\n  '.join(lines)
        + '\nUse the configuration that belongs to the weights, or the weights that '
        'belong to the configuration.'
    )


def _describe(config: T5Config) -> str:
  return (
      f'd_model {config.d_model}, {config.num_heads} heads × {config.d_kv}, '
      f'd_ff {config.d_ff}, {config.num_encoder_layers} + {config.num_decoder_layers} '
      f'layers, {config.vocab_size:,} rows of vocabulary, '
      f'{"tied" if config.tied_embeddings else "untied"} output, '
      f'MLP {"/".join(config.mlp_activations)}'
  )


def _looks_like(entry: Entry, shape: tuple[int, ...]) -> str:
  """The published models in which this array has this shape, for an error."""
  if len(shape) != len(entry.axes):
    return f' ({len(shape)} axes, but it is [{", ".join(entry.axes)}])'
  candidates = []
  for name, (d_model, d_kv, heads, _, _, d_ff) in SIZES.items():
    sizes = {'embed': d_model, 'joined_kv': d_kv * heads, 'heads': heads, 'mlp': d_ff}
    known = [(sizes[axis], n) for axis, n in zip(entry.axes, shape) if axis in sizes]
    if known and all(size == n for size, n in known):
      candidates.append(name)
  if candidates:
    return f' (looks like {", ".join(candidates)})'
  return ' (no published T5 size)'
