"""Adapters of PEFT, Hugging Face's library: read as prompts, and prompts written as them.

An adapter is a directory of adapter_config.json and adapter_model.safetensors, which holds
one array `prompt_embeddings`. PEFT's sequence-to-sequence models put a PROMPT_TUNING or
P_TUNING prompt in front of the encoder's input; a PREFIX_TUNING prefix reaches nothing but
the decoder's self-attention. The rules for its slots are PEFT 0.21's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax.artifact import Manifest, Prompt
from prompt_tuning_jax.checkpoints import hub
from prompt_tuning_jax.checkpoints.source import Weights, open_safetensors, write_safetensors
from prompt_tuning_jax.checkpoints.torch_pickle import open_torch
from prompt_tuning_jax.injection_arrays import check_numbers
from prompt_tuning_jax.json_files import read_json, write_json
from prompt_tuning_jax.typing import Injection
from prompt_tuning_jax.writing import directory_written_whole

if TYPE_CHECKING:
  from prompt_tuning_jax.backbones.backbone import Backbone

CONFIG_FILE = 'adapter_config.json'
_WEIGHTS_FILES = {
    'adapter_model.safetensors': lambda path: open_safetensors(path)[0],
    'adapter_model.bin': open_torch,
}
_ARRAY = 'prompt_embeddings'
_TASK_TYPE = 'SEQ_2_SEQ_LM'
# What PEFT calls a method, and the one of ours whose prompt it is once it is folded.
_METHODS = {'PROMPT_TUNING': 'SoftPrompt', 'P_TUNING': 'PTuning', 'PREFIX_TUNING': 'Prefix'}


def is_adapter(directory: str | os.PathLike[str]) -> bool:
  """Whether a directory says of itself that it is a PEFT adapter."""
  return os.path.isfile(os.path.join(directory, CONFIG_FILE))


def load_adapter(directory: str | os.PathLike[str]) -> Prompt:
  """Reads a prompt adapter of a sequence-to-sequence model.

  Of the 2P rows that PEFT saves by default (one prompt for the encoder, one for the
  decoder) it uses the first P, and so does this. P_TUNING adapters hold the encoded
  prompt. A prefix becomes `decoder_kv` [L, P, N, H]; in PEFT's layout layers l and
  l + L/2 of an even L share theirs.

  Raises:
    FileNotFoundError: if a file of the adapter is missing.
    ValueError: if it is damaged, of another kind (LoRA, a decoder-only model, …), its
      array is not what its config says, or holds numbers that are not finite.
  """
  directory = os.fspath(directory)
  path = os.path.join(directory, CONFIG_FILE)
  described = _read_config(path)
  kind, length = described['peft_type'], described['num_virtual_tokens']
  array = _read_array(directory)
  if kind == 'PREFIX_TUNING':
    injection = Injection(decoder_kv=_prefix(array, described, path))
  else:
    # PEFT's own default, which it fills in only when it trains.
    rows = length * (described.get('num_transformer_submodules') or 2)
    width = described.get('token_dim')
    if array.shape not in ((length, width), (rows, width)):
      raise _misfit(path, array, f'[{length} or {rows}, token_dim {width}]')
    injection = Injection(virtual_embeddings=jnp.asarray(array[:length]))
  check_numbers({_ARRAY: array}, directory)
  manifest = Manifest(
      backbone=described.get('base_model_name_or_path') or '',
      method=_METHODS[kind],
      num_virtual_tokens=0 if kind == 'PREFIX_TUNING' else length,
      placement='prefix',
      created_by=f'PEFT {described.get("peft_version", "")}'.strip(),
  )
  return Prompt(injection, manifest, source=directory)


def save_adapter(
    directory: str | os.PathLike[str],
    prompt: Prompt,
    backbone: Backbone,
    *,
    base_model: str | None = None,
) -> None:
  """Writes a prompt as an adapter that PEFT loads on the same model.

  Args:
    directory: where to; it must not exist yet.
    prompt: a soft prompt in front of the input, or a prefix that PEFT can express.
    backbone: the model it belongs to.
    base_model: the model's Hugging Face name or folder, for `base_model_name_or_path`;
      the name that the prompt's manifest gives where None.

  Raises:
    ValueError: if the prompt is of another model, or PEFT cannot express it, saying why.
    FileExistsError, OSError: if it cannot be written; nothing is left behind.
  """
  prompt.check(backbone)
  injection, spec = prompt.injection, backbone.spec
  _check_expressible(prompt)
  if injection.decoder_kv is None:
    kind, array = 'PROMPT_TUNING', injection.virtual_embeddings
    others = {'prompt_tuning_init': 'RANDOM', 'token_dim': spec.d_model}
  else:
    kind, array = 'PREFIX_TUNING', _flat(injection.decoder_kv, prompt)
    # PEFT takes token_dim / num_attention_heads for the width of a head.
    others = {
        'prefix_projection': False,
        'encoder_hidden_size': spec.d_model,
        'token_dim': spec.num_heads * spec.d_kv,
    }
  model = base_model or prompt.manifest.backbone or backbone.name
  described = {
      'peft_type': kind,
      'task_type': _TASK_TYPE,
      'base_model_name_or_path': hub.repository(model) or model,
      'inference_mode': True,
      'num_virtual_tokens': prompt.length,
      'num_transformer_submodules': 1 if kind == 'PROMPT_TUNING' else 2,
      'num_attention_heads': spec.num_heads,
      'num_layers': spec.num_decoder_layers,
      **others,
  }
  weights = Weights.of({_ARRAY: np.asarray(array, np.float32)})
  with directory_written_whole(directory) as unfinished:
    path = os.path.join(unfinished, 'adapter_model.safetensors')
    write_safetensors(path, weights, {'format': 'pt'})
    write_json(os.path.join(unfinished, CONFIG_FILE), described)


def _check_expressible(prompt: Prompt) -> None:
  """Refuses what PEFT's adapters have no place for."""
  injection = prompt.injection
  reason = ''
  if injection.layer_embeddings is not None:
    reason = 'it has rows for every layer, and a PEFT prompt has rows for the first alone'
  if injection.num_decoder_virtual_tokens:
    reason = 'it has virtual tokens in the decoder, and PEFT reads those of the encoder alone'
  if injection.decoder_kv is not None and injection.positions != 'before':
    reason = (
        f'its keys have positions {injection.positions!r}, and a PEFT prefix stands before '
        'the text'
    )
  if injection.encoder_kv is not None or injection.cross_kv is not None:
    reason = (
        'it has keys and values for the encoder or for cross-attention, and a PEFT prefix '
        "reaches nothing but the decoder's self-attention"
    )
  elif injection.decoder_kv is not None and injection.virtual_embeddings is not None:
    reason = 'it is a soft prompt and a prefix together, and a PEFT adapter is one of them'
  elif injection.decoder_kv is None and prompt.manifest.placement not in ('', 'prefix'):
    reason = (
        f'its virtual tokens stand elsewhere ({prompt.manifest.placement}), and PEFT puts '
        'them in front of the input'
    )
  if reason:
    raise ValueError(
        f'{prompt.source or "The prompt"} cannot be written as a PEFT adapter: {reason}. '
        'Keep the artifact; this library reads it.'
    )


def _slots(num_layers: int) -> np.ndarray:
  """Slots of each layer's keys and values among the 2L of a row: [L, 2].

  PEFT doubles the 2L slots, deals four to a layer (self-attention's two, then two for
  cross-attention that it drops), so that layer l has slots 4l and 4l + 1 modulo 2L.
  """
  first = 4 * np.arange(num_layers)[:, None]
  return (first + np.arange(2)) % (2 * num_layers)


def _prefix(
    array: np.ndarray, described: Mapping[str, Any], path: str
) -> tuple[jax.Array, jax.Array]:
  """PEFT's rows [P, 2L · N · H] as keys and values, each [L, P, N, H]."""
  length, layers = described['num_virtual_tokens'], described['num_layers']
  heads, width = described['num_attention_heads'], described['token_dim']
  if array.shape != (length, 2 * layers * width) or width % heads:
    raise _misfit(path, array, f'[{length}, 2 · {layers} layers · token_dim {width}]')
  slots_PL2NH = array.reshape(length, 2 * layers, heads, width // heads)[:, _slots(layers)]
  keys_LPNH, values_LPNH = slots_PL2NH.transpose(2, 1, 0, 3, 4)
  return jnp.asarray(keys_LPNH), jnp.asarray(values_LPNH)


def _flat(decoder_kv: tuple[jax.Array, jax.Array], prompt: Prompt) -> np.ndarray:
  """The inverse of `_prefix`."""
  pair_2LPNH = np.stack([np.asarray(part, np.float32) for part in decoder_kv])
  _, layers, length, heads, width = pair_2LPNH.shape
  flat = np.zeros((length, 2 * layers, heads, width), np.float32)
  for layer, slots in enumerate(_slots(layers)):
    for part, slot in enumerate(slots):
      flat[:, slot] = pair_2LPNH[part, layer]
  for layer, slots in enumerate(_slots(layers)):
    if not np.array_equal(np.moveaxis(flat[:, slots], 1, 0), pair_2LPNH[:, layer]):
      raise ValueError(
          f'{prompt.source or "The prompt"} cannot be written as a PEFT adapter: in its '
          f'layout layers l and l + {layers // 2} of {layers} read the same keys and '
          f'values, but layer {layer} of this prefix differs from its twin. Keep the '
          'artifact; this library reads it.'
      )
  return flat.reshape(length, -1)


def _read_config(path: str) -> dict[str, Any]:
  """adapter_config.json, once it is known to describe a prompt of an encoder-decoder."""
  if not os.path.isfile(path):
    raise FileNotFoundError(f'No file {path}: a PEFT adapter needs it.')
  described = read_json(path)
  kind = described.get('peft_type')
  if not isinstance(kind, str) or kind not in _METHODS:
    raise ValueError(
        f'{path} is an adapter of kind {kind!r}, which is no prompt. Prompts are '
        f'{", ".join(_METHODS)}.'
    )
  task = described.get('task_type')
  if task != _TASK_TYPE:
    raise ValueError(
        f'{path} has task_type {task!r}; adapters of encoder-decoder models ({_TASK_TYPE}) '
        'are read.'
    )
  needed = ['num_virtual_tokens', 'token_dim']
  if kind == 'PREFIX_TUNING':
    needed += ['num_layers', 'num_attention_heads']
  for name in needed:
    value = described.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
      raise ValueError(f'{path} has {name} {value!r}; a number of at least 1 was expected.')
  return described


def _read_array(directory: str) -> np.ndarray:
  for name, opener in _WEIGHTS_FILES.items():
    path = os.path.join(directory, name)
    if os.path.isfile(path):
      weights = opener(path)
      if list(weights) != [_ARRAY]:
        raise ValueError(
            f'{path} holds {", ".join(list(weights)[:4]) or "nothing"}; a prompt adapter '
            f'holds {_ARRAY} alone.'
        )
      return np.asarray(weights[_ARRAY], np.float32)
  raise FileNotFoundError(
      f'{directory} has {CONFIG_FILE} but none of {", ".join(_WEIGHTS_FILES)}. Fetch or '
      'copy the adapter again.'
  )


def _misfit(path: str, array: np.ndarray, expected: str) -> ValueError:
  return ValueError(
      f'{path} describes {_ARRAY} of shape {expected}, but the file beside it holds '
      f'{list(array.shape)}: they are of different adapters.'
  )
