"""Small checkpoints in every format, made from random weights."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import flax.serialization
import flax.traverse_util
import jax
import numpy as np
import sentencepiece
import tensorstore
from safetensors.numpy import save_file

from prompt_tuning_jax.backbones.t5 import T5, T5Config
from prompt_tuning_jax.checkpoints import names
from prompt_tuning_jax.data.vocabulary import Vocabulary
from prompt_tuning_jax.typing import Batch
from tests.conftest import TINY_CONFIG

# The families that differ in their arrays.
CONFIGS = {
    'T5 1.1, unequal depths': TINY_CONFIG,
    'T5 1.0': dataclasses.replace(
        TINY_CONFIG,
        mlp_activations=('relu',),
        tied_embeddings=True,
        scale_decoder_outputs=True,
    ),
    'bias in every layer': dataclasses.replace(TINY_CONFIG, relpos_per_layer=True),
}


# Recorded soft prompts of PEFT: folders of golden/hf/peft_t5.
PEFT_PROMPTS = [
    't5v11.prompt5_random',
    't5v11.prompt5_random_1sub',
    't5v11.ptuning5_mlp',
    't5v10.prompt5_random',
]


def recorded_batch(recorded, prefix: str = '') -> Batch:
  """What transformers or PEFT was given; its labels of -100 are padding."""
  targets = np.maximum(recorded[f'{prefix}labels'], 0).astype(np.int32)
  inputs = recorded[f'{prefix}input_ids'] * recorded[f'{prefix}attention_mask']
  shifted = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]
  return Batch(inputs.astype(np.int32), shifted, targets, (targets > 0).astype(np.float32))


def random_params(config: T5Config, seed: int = 0) -> dict:
  """Random weights in the shapes of `T5`, as numpy arrays (nothing is compiled)."""
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(T5(config).init_params, jax.random.key(0))
  return jax.tree.map(
      lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes
  )


def hf_description(config: T5Config, **changes) -> dict:
  """config.json as transformers writes it; None removes a key."""
  description = {
      'model_type': 't5',
      'd_model': config.d_model,
      'd_kv': config.d_kv,
      'd_ff': config.d_ff,
      'num_heads': config.num_heads,
      'num_layers': config.num_encoder_layers,
      'num_decoder_layers': config.num_decoder_layers,
      'vocab_size': config.vocab_size,
      'feed_forward_proj': 'relu' if config.mlp_activations == ('relu',) else 'gated-gelu',
      'relative_attention_num_buckets': config.relpos_buckets,
      'relative_attention_max_distance': config.relpos_max_distance,
      'layer_norm_epsilon': 1e-6,
      'tie_word_embeddings': config.tied_embeddings,
  } | changes
  return {key: value for key, value in description.items() if value is not None}


def hf_tensors(config: T5Config, params: dict) -> dict[str, np.ndarray]:
  """The weights under Hugging Face's names, Linear weights [out, in]."""
  flat = names.flatten_to_t5x(params, config)
  return {
      entry.hf: np.ascontiguousarray(flat[entry.t5x].T if entry.transposed else flat[entry.t5x])
      for entry in names.entries(config)
  }


def write_hf(folder: Path, description: dict, tensors: dict, shards: int = 1) -> Path:
  """A Hugging Face folder, in one file or sharded."""
  folder.mkdir(exist_ok=True)
  (folder / 'config.json').write_text(json.dumps(description))
  if shards == 1:
    save_file(tensors, folder / 'model.safetensors', metadata={'format': 'pt'})
    return folder
  weight_map = {}
  for number in range(shards):
    shard = f'model-{number + 1:05}-of-{shards:05}.safetensors'
    held = {name: tensors[name] for name in list(tensors)[number::shards]}
    save_file(held, folder / shard, metadata={'format': 'pt'})
    weight_map |= dict.fromkeys(held, shard)
  index = {'metadata': {}, 'weight_map': weight_map}
  (folder / 'model.safetensors.index.json').write_text(json.dumps(index))
  return folder


def write_t5x(folder: Path, flat: dict, step: int = 7, version: int = 3) -> Path:
  """A T5X checkpoint: vectors inline, matrices as zarr arrays of several chunks."""
  folder.mkdir()
  leaves = {}
  for name, array in flat.items():
    if array.ndim < 2:
      leaves[name] = array
      continue
    store = 'target.' + name.replace('/', '.')
    metadata = {
        'shape': list(array.shape),
        'chunks': [-(-array.shape[0] // 2), *array.shape[1:]],
        'dtype': 'bfloat16' if array.dtype.name == 'bfloat16' else array.dtype.str,
        'compressor': {'id': 'gzip', 'level': 1},
    }
    spec = {
        'driver': 'zarr',
        'kvstore': {'driver': 'file', 'path': str(folder / store)},
        'metadata': metadata,
    }
    tensorstore.open(spec, create=True).result().write(array).result()
    # The path is as the machine that trained it saw it.
    kvstore = {'driver': 'gfile', 'path': f'gs://bucket/model/{store}'}
    leaves[name] = {'driver': 'zarr', 'kvstore': kvstore, 'metadata': metadata}
  index = {
      'version': version,
      'optimizer': {
          'state': {'step': np.int32(step), 'param_states': {}},
          'target': flax.traverse_util.unflatten_dict(leaves, sep='/'),
      },
  }
  (folder / 'checkpoint').write_bytes(flax.serialization.msgpack_serialize(index))
  return folder


def scanned(flat: dict, config: T5Config) -> dict:
  """The arrays as T5X's scalable_t5 keeps them: layers on axis 1, heads apart from d_kv."""
  heads = (config.num_heads, config.d_kv)
  stacked: dict[str, list] = {}
  for name, array in flat.items():
    stack, *rest = name.split('/')
    if not rest[0].startswith('layers_'):
      stacked[name] = array
      continue
    if rest[-2] in ('query', 'key', 'value'):
      array = array.reshape(-1, *heads)
    elif rest[-2] == 'out':
      array = array.reshape(*heads, -1)
    stacked.setdefault('/'.join([stack, stack, *rest[1:]]), []).append(array)
  return {
      name: np.stack(arrays, 1) if isinstance(arrays, list) else arrays
      for name, arrays in stacked.items()
  }


def train_vocabulary(path: Path, text: str = 'a small vocabulary of letters') -> Vocabulary:
  """A SentencePiece model of a few characters with T5's special ids and 5 sentinels."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter([text] * 4),
      model_writer=model,
      model_type='char',
      vocab_size=len(set(text)) + 3,
      pad_id=0,
      eos_id=1,
      unk_id=2,
      bos_id=-1,
      minloglevel=2,
  )
  path.write_bytes(model.getvalue())
  return Vocabulary(path, extra_ids=5)


def assert_same_trees(actual, expected) -> None:
  """Same structure, types and bits."""
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
    assert one.dtype == other.dtype
    np.testing.assert_array_equal(one, other)


def flip_byte(path: Path, position: int) -> None:
  """Changes one byte of a file; negative positions count from its end."""
  content = bytearray(path.read_bytes())
  content[position] ^= 0x10
  path.write_bytes(content)
