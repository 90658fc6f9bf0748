"""Hugging Face folders of T5, mT5 and umT5: config.json, weights in one file or in shards.

The traps of the format are handled here and nowhere else: transformers 5 writes
`tie_word_embeddings: true` for untied models too, so what the file holds decides;
old Hub files carry a relative bias in the first cross-attention that no model uses.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from prompt_tuning_jax.backbones.t5 import T5Config
from prompt_tuning_jax.checkpoints import names
from prompt_tuning_jax.checkpoints.source import (
    Box,
    Checkpoint,
    Weights,
    open_safetensors,
    write_safetensors,
)
from prompt_tuning_jax.checkpoints.torch_pickle import open_torch
from prompt_tuning_jax.data.byte_vocabulary import ByteVocabulary
from prompt_tuning_jax.data.vocabulary import Vocabulary
from prompt_tuning_jax.json_files import read_json, write_json
from prompt_tuning_jax.writing import directory_written_whole

_EMBEDDING = 'shared.weight'
_OUTPUT = 'lm_head.weight'
# The same tensor as `shared.weight`, written again by some versions.
_EMBEDDING_COPIES = ('encoder.embed_tokens.weight', 'decoder.embed_tokens.weight')
# Written by old versions of transformers, used by none.
_STRAY = 'decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight'

# The weights' files by name, in the order in which they are looked for, each in one file or
# in shards that `<name>.index.json` lists.
_FORMS = {
    'model.safetensors': lambda path: open_safetensors(path)[0],
    'pytorch_model.bin': open_torch,
}

_MODEL_TYPES = {
    't5': 'T5 1.0 and 1.1, LM-adapted T5, Flan-T5, ByT5',
    'mt5': 'mT5',
    'umt5': 'umT5, with a relative bias in every layer',
}
_SIZES = (
    'vocab_size',
    'd_model',
    'd_kv',
    'd_ff',
    'num_heads',
    'num_layers',
    'num_decoder_layers',
    'relative_attention_num_buckets',
    'relative_attention_max_distance',
)
_ACTIVATIONS = {'relu': ('relu',), 'gated-gelu': ('gelu', 'linear')}
_EPSILON = 1e-6
# What a tokenizer_config.json calls ByT5's vocabulary, which needs no file.
BYTE_TOKENIZER = 'ByT5Tokenizer'


def read_hf(directory: str | os.PathLike[str]) -> Checkpoint:
  """Opens a Hugging Face T5 folder; weights are read on demand, with T5X's names.

  The output layer is untied iff `lm_head.weight` is in the file and differs from the
  embedding. Tied logits are scaled iff config.json says so, or, where it does not
  say, iff they are tied (T5 1.0).

  Raises:
    FileNotFoundError: if config.json, the weights, or a shard is missing.
    ValueError: if the model is not a T5 that this version reads, a file is damaged or holds
      anything but tensors, or shapes do not fit.
  """
  directory = os.fspath(directory)
  description = read_json(os.path.join(directory, 'config.json'))
  _check_description(description, directory)
  stored = _open_weights(directory)
  for name in (_EMBEDDING, *_EMBEDDING_COPIES):
    if name in stored.specs:
      embedding = name
      break
  else:
    raise ValueError(
        f'{directory} holds no {_EMBEDDING}, the embedding table of every T5. Found '
        f'{", ".join(list(stored)[:4])}, … Is it another kind of model?'
    )
  tied = _is_tied(stored, embedding, description, directory)
  config = _config(description, tied, directory)
  if max(config.num_encoder_layers, config.num_decoder_layers) > len(stored):
    raise ValueError(
        f'{directory}/config.json says {config.num_encoder_layers:,} and '
        f'{config.num_decoder_layers:,} layers, but there are {len(stored):,} arrays. They '
        'are not of one model.'
    )

  used = {embedding, _OUTPUT if tied else embedding, _STRAY}
  for copy in _EMBEDDING_COPIES:
    if copy in stored.specs:
      _check_same(stored, embedding, copy, directory)
      used.add(copy)
  source: dict[str, tuple[str, bool]] = {}
  specs: dict[str, jax.ShapeDtypeStruct] = {}
  for entry in names.entries(config):
    name = embedding if entry.hf == _EMBEDDING else entry.hf
    if name in stored.specs:
      spec = stored.specs[name]
      shape = spec.shape[::-1] if entry.transposed else spec.shape
      specs[entry.t5x] = jax.ShapeDtypeStruct(shape, spec.dtype)
      source[entry.t5x] = (name, entry.transposed)
      used.add(name)
  # What the table does not know is listed under its own name.
  specs |= {name: spec for name, spec in stored.specs.items() if name not in used}
  names.check_shapes(Weights(specs, stored.part), config, directory)

  def read(t5x_name: str, box: Box) -> np.ndarray:
    return _part(stored, *source[t5x_name], box)

  return Checkpoint(
      format='hf',
      path=directory,
      config=config,
      weights=Weights(specs, read),
      manifest=description,
  )


def write_hf(
    directory: str | os.PathLike[str],
    config: T5Config,
    weights: Weights,
    vocabulary: Vocabulary | None = None,
    *,
    shard_bytes: int = 5_000_000_000,
) -> None:
  """Writes a Hugging Face T5 folder that transformers 4 and 5 load alike.

  One array is held at a time. An output layer of its own is written as such, with
  `tie_word_embeddings: false`, which is what makes transformers 4 look for it.

  Args:
    directory: where to; it must not exist yet.
    config: the architecture.
    weights: the arrays under their per-layer T5X names.
    vocabulary: copied as spiece.model; None leaves it out.
    shard_bytes: most bytes in one file of weights.

  Raises:
    ValueError: if the weights do not fit `config`, or Hugging Face has no such T5.
    FileExistsError: if there is something at `directory`.
    OSError: if it cannot be written; nothing is left behind.
  """
  names.check_shapes(weights, config, 'The model to write')
  stored = _under_hf_names(config, weights)
  with directory_written_whole(directory) as unfinished:
    write_json(os.path.join(unfinished, 'config.json'), _describe(config, stored))
    shards = _shards(stored, shard_bytes)
    for file, held in shards.items():
      write_safetensors(os.path.join(unfinished, file), stored.only(held), {'format': 'pt'})
    if len(shards) > 1:
      where = {name: file for file, held in shards.items() for name in held}
      total = {'total_size': sum(_num_bytes(spec) for spec in stored.specs.values())}
      index = {'metadata': total, 'weight_map': where}
      write_json(os.path.join(unfinished, 'model.safetensors.index.json'), index)
    if vocabulary is not None:
      if not isinstance(vocabulary, ByteVocabulary):
        shutil.copyfile(vocabulary.path, os.path.join(unfinished, 'spiece.model'))
      path = os.path.join(unfinished, 'tokenizer_config.json')
      write_json(path, _describe_tokenizer(vocabulary))


def _under_hf_names(config: T5Config, weights: Weights) -> Weights:
  entries = {entry.hf: entry for entry in names.entries(config)}
  if config.tied_embeddings and not config.scale_decoder_outputs:
    # transformers 4 scales what is tied: the table is written again, as the output layer.
    embedding = entries[_EMBEDDING]
    entries[_OUTPUT] = dataclasses.replace(embedding, hf=_OUTPUT)
  specs = {}
  for name, entry in entries.items():
    spec = weights.specs[entry.t5x]
    shape = spec.shape[::-1] if entry.transposed else spec.shape
    specs[name] = jax.ShapeDtypeStruct(shape, spec.dtype)

  def read(name: str, box: Box) -> np.ndarray:
    return _part(weights, entries[name].t5x, entries[name].transposed, box)

  return Weights(specs, read)


def _part(weights: Weights, name: str, transposed: bool, box: Box) -> np.ndarray:
  """A box of an array, or of its transpose."""
  if not transposed:
    return weights.part(name, box)
  assert box is ... or len(box) == len(weights.specs[name].shape), box
  return weights.part(name, box if box is ... else box[::-1]).T


def _describe(config: T5Config, stored: Weights) -> dict[str, Any]:
  """config.json for the model."""
  activation = next(
      (name for name, known in _ACTIVATIONS.items() if known == config.mlp_activations), None
  )
  if activation is None:
    raise ValueError(
        f'A T5 with the activations {config.mlp_activations} cannot be written as a Hugging '
        f'Face model, which knows {", ".join(map(str, _ACTIVATIONS.values()))}.'
    )
  scaled = config.scale_decoder_outputs
  if scaled and not config.tied_embeddings:
    raise ValueError(
        'An output layer of its own with scaled outputs is a T5 that transformers 4 and 5 '
        "compute differently. Write it as 'native'."
    )
  model_type = 'umt5' if config.relpos_per_layer else 't5'
  return {
      'architectures': [f'{model_type.upper()}ForConditionalGeneration'],
      'model_type': model_type,
      'is_encoder_decoder': True,
      'vocab_size': config.vocab_size,
      'd_model': config.d_model,
      'd_kv': config.d_kv,
      'd_ff': config.d_ff,
      'num_heads': config.num_heads,
      'num_layers': config.num_encoder_layers,
      'num_decoder_layers': config.num_decoder_layers,
      'feed_forward_proj': activation,
      'relative_attention_num_buckets': config.relpos_buckets,
      'relative_attention_max_distance': config.relpos_max_distance,
      'layer_norm_epsilon': _EPSILON,
      'dropout_rate': 0.1,
      'tie_word_embeddings': scaled,
      'scale_decoder_outputs': scaled,
      'pad_token_id': Vocabulary.pad_id,
      'eos_token_id': Vocabulary.eos_id,
      'decoder_start_token_id': Vocabulary.pad_id,
      'torch_dtype': stored.specs[_EMBEDDING].dtype.name,
  }


def _describe_tokenizer(vocabulary: Vocabulary) -> dict[str, Any]:
  if isinstance(vocabulary, ByteVocabulary):
    return {'tokenizer_class': BYTE_TOKENIZER}
  sentinels = [f'<extra_id_{i}>' for i in range(vocabulary.extra_ids)]
  return {
      'tokenizer_class': 'T5Tokenizer',
      'extra_ids': vocabulary.extra_ids,
      'additional_special_tokens': sentinels,
      'pad_token': '<pad>',
      'eos_token': '</s>',
      'unk_token': '<unk>',
  }


def _shards(stored: Weights, shard_bytes: int) -> dict[str, list[str]]:
  """Names of the arrays by the file that holds them."""
  groups: list[list[str]] = [[]]
  size = 0
  for name, spec in stored.specs.items():
    if groups[-1] and size + _num_bytes(spec) > shard_bytes:
      groups.append([])
      size = 0
    groups[-1].append(name)
    size += _num_bytes(spec)
  if len(groups) == 1:
    return {'model.safetensors': groups[0]}
  count = len(groups)
  return {
      f'model-{number:05}-of-{count:05}.safetensors': group
      for number, group in enumerate(groups, start=1)
  }


def _num_bytes(spec: jax.ShapeDtypeStruct) -> int:
  return math.prod(spec.shape) * spec.dtype.itemsize


def _check_description(description: Mapping[str, Any], directory: str) -> None:
  model_type = description.get('model_type')
  if not isinstance(model_type, str) or model_type not in _MODEL_TYPES:
    known = ', '.join(f'{name!r} ({what})' for name, what in _MODEL_TYPES.items())
    raise ValueError(
        f'{directory}/config.json has model_type {model_type!r}; this version reads {known}.'
    )
  for name in _SIZES:
    value = description.get(name)
    # Old files leave out num_decoder_layers and the two of the relative positions.
    if value is not None and (type(value) is not int or value < 1):
      raise ValueError(
          f'{directory}/config.json has {name} {value!r}; a whole number of at least 1 was '
          'expected. Fetch it again.'
      )
  scaled = description.get('scale_decoder_outputs')
  if scaled is not None and not isinstance(scaled, bool):
    raise ValueError(
        f'{directory}/config.json has scale_decoder_outputs {scaled!r}; true or false was '
        'expected. Fetch it again.'
    )
  epsilon = description.get('layer_norm_epsilon', _EPSILON)
  if not isinstance(epsilon, float) or not np.isclose(epsilon, _EPSILON, rtol=1e-3, atol=0):
    raise ValueError(
        f'{directory}/config.json has layer_norm_epsilon {epsilon}; every T5 uses '
        f'{_EPSILON}, and the backbone knows no other.'
    )
  if 'quantization_config' in description:
    raise ValueError(
        f'{directory} holds a quantised model. Use the original in float32 or bfloat16.'
    )


def _config(description: Mapping[str, Any], tied: bool, directory: str) -> T5Config:
  activation = description.get('feed_forward_proj', 'relu')
  if not isinstance(activation, str) or activation not in _ACTIVATIONS:
    raise ValueError(
        f'{directory}/config.json has feed_forward_proj {activation!r}; this version '
        f'knows {", ".join(map(repr, _ACTIVATIONS))}.'
    )
  # transformers scales tied outputs unless the newer key says otherwise; mT5's never.
  said = description.get('scale_decoder_outputs')
  by_default = tied and description.get('tie_word_embeddings', True)
  scaled = description['model_type'] != 'mt5' and (by_default if said is None else said)
  try:
    layers = description['num_layers']
    return T5Config(
        vocab_size=description['vocab_size'],
        d_model=description['d_model'],
        num_heads=description['num_heads'],
        d_kv=description['d_kv'],
        d_ff=description['d_ff'],
        num_encoder_layers=layers,
        # Also missing or null in old files: as deep as the encoder.
        num_decoder_layers=description.get('num_decoder_layers') or layers,
        relpos_buckets=description.get('relative_attention_num_buckets', 32),
        relpos_max_distance=description.get('relative_attention_max_distance', 128),
        mlp_activations=_ACTIVATIONS[activation],
        tied_embeddings=tied,
        scale_decoder_outputs=scaled,
        relpos_per_layer=description['model_type'] == 'umt5',
    )
  except KeyError as error:
    raise ValueError(
        f'{directory}/config.json does not say {error}, which a T5 config needs.'
    ) from error


def _is_tied(
    stored: Weights, embedding: str, description: Mapping[str, Any], directory: str
) -> bool:
  if _OUTPUT in stored.specs:
    return _same(stored, embedding, _OUTPUT)
  if description.get('tie_word_embeddings', True):
    return True
  raise ValueError(
      f'{directory}: config.json says tie_word_embeddings: false, but the output layer '
      f'{_OUTPUT} is not in the weights. Fetch the model again; if the output really is '
      'the embedding table, correct config.json.'
  )


def _same(stored: Weights, first: str, second: str) -> bool:
  if stored.specs[first].shape != stored.specs[second].shape:
    return False
  if first in stored.places and stored.places[first] == stored.places.get(second):
    return True
  # Tables that differ do so in the first rows; the whole of them takes as long as loading.
  return all(
      np.array_equal(stored.part(first, box), stored.part(second, box))
      for box in ((slice(0, 8),), ...)
  )


def _check_same(stored: Weights, embedding: str, copy: str, directory: str) -> None:
  if copy != embedding and not _same(stored, embedding, copy):
    raise ValueError(
        f'{directory}: {copy} differs from {embedding}, but T5 has one embedding table '
        'for encoder and decoder.'
    )


def _open_weights(directory: str) -> Weights:
  """All tensors of the folder under their Hugging Face names."""
  for name, opener in _FORMS.items():
    path = os.path.join(directory, name)
    if os.path.isfile(path):
      return opener(path)
    if os.path.isfile(f'{path}.index.json'):
      return _open_shards(directory, f'{path}.index.json', opener)
  raise FileNotFoundError(
      f'{directory} has config.json but none of {", ".join(_FORMS)} (nor an index of '
      'shards). Fetch the model again.'
  )


def _open_shards(
    directory: str, index_path: str, opener: Callable[[str], Weights]
) -> Weights:
  index = read_json(index_path)
  where = index.get('weight_map')
  if not isinstance(where, dict) or not where:
    raise ValueError(f'{index_path} has no weight_map. Fetch the model again.')
  shards: dict[str, Weights] = {}
  for shard in sorted(set(map(str, where.values()))):
    if os.path.basename(shard) != shard or shard in ('', '.', '..'):
      raise ValueError(
          f'{index_path} names the shard {shard!r}, which is not a plain file name in '
          'its own directory. Do not use this model.'
      )
    shards[shard] = opener(os.path.join(directory, shard))
  absent = [f'{name} ({shard})' for name, shard in where.items() if name not in shards[shard]]
  if absent:
    raise ValueError(
        f'{directory}: {len(absent)} of {len(where)} tensors are not in the shard that '
        f'the index names: {", ".join(absent)}. Fetch the model again.'
    )
  specs = {name: shards[shard].specs[name] for name, shard in where.items()}
  places = {
      name: (shard, shards[shard].places[name])
      for name, shard in where.items()
      if name in shards[shard].places
  }
  return Weights(specs, lambda name, box: shards[where[name]].part(name, box), places)
