"""The arrays of an Injection under the names that a file gives them, and back, checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax.typing import KV_FIELDS, POSITIONS, Injection

# What an Injection says of its arrays; the manifest keeps it beside them.
SETTINGS = ('positions', 'num_decoder_virtual_tokens')


def named_arrays(injection: Injection) -> dict[str, np.ndarray]:
  """The arrays under their names in the file."""
  arrays = {}
  if injection.virtual_embeddings is not None:
    arrays['virtual_embeddings'] = np.ascontiguousarray(injection.virtual_embeddings)
  if injection.layer_embeddings is not None:
    arrays['layer_embeddings'] = np.ascontiguousarray(injection.layer_embeddings)
  for name in KV_FIELDS.values():
    pair = getattr(injection, name)
    if pair is not None:
      for part, array in zip(('keys', 'values'), pair):
        arrays[f'{name}/{part}'] = np.ascontiguousarray(array)
  return arrays


def injection_of(
    arrays: Mapping[str, np.ndarray], settings: Mapping[str, Any], path: str
) -> Injection:
  """The Injection of a file's arrays and of what it says of them.

  Raises:
    ValueError: if an array or a setting is missing, too much or of another kind.
  """
  if not isinstance(settings, dict) or not set(settings) <= set(SETTINGS):
    raise ValueError(
        f'{path} has settings of its arrays that are not known ({settings!r}): it was not '
        'written by this version of the library. Install a newer one.'
    )
  count = settings.get('num_decoder_virtual_tokens', 0)
  if settings.get('positions', 'before') not in POSITIONS or type(count) is not int:
    raise ValueError(
        f'{path} says of its arrays {settings!r}; positions are '
        f'{" or ".join(map(repr, POSITIONS))}, and num_decoder_virtual_tokens is a whole '
        'number. It was not written by this library: export the prompt again.'
    )
  pairs = [name for name in KV_FIELDS.values() if any(k.startswith(f'{name}/') for k in arrays)]
  expected = {f'{name}/{part}' for name in pairs for part in ('keys', 'values')}
  others = set(arrays) - {'virtual_embeddings', 'layer_embeddings'}
  if others != expected:
    raise ValueError(
        f'{path} holds arrays that do not belong together: '
        f'{", ".join(sorted(others ^ expected))} is missing or too much. Export the prompt '
        'again.'
    )
  for name in pairs:
    keys, values = arrays[f'{name}/keys'].shape, arrays[f'{name}/values'].shape
    if keys != values or len(keys) != 4:
      raise ValueError(
          f'{path}: {name} has keys {list(keys)} and values {list(values)}; both are [layers, '
          'prefix length, heads, d_kv]. Export the prompt again.'
      )
  return Injection(
      virtual_embeddings=_pick(arrays, 'virtual_embeddings'),
      layer_embeddings=_pick(arrays, 'layer_embeddings'),
      **{name: tuple(_pick(arrays, f'{name}/{part}') for part in ('keys', 'values'))
         for name in pairs},
      **settings,
  )


def _pick(arrays: Mapping[str, np.ndarray], name: str) -> Any:
  return jnp.asarray(arrays[name]) if name in arrays else None


def prompt_length(injection: Injection) -> int:
  """Rows of the prompt, or positions of the prefix where there is none."""
  if injection.virtual_embeddings is not None:
    return injection.virtual_embeddings.shape[0]
  if injection.layer_embeddings is not None:
    return injection.layer_embeddings.shape[1]
  pairs = (getattr(injection, name) for name in KV_FIELDS.values())
  return max((pair[0].shape[1] for pair in pairs if pair is not None), default=0)


def check_numbers(arrays: Mapping[str, np.ndarray], what: str) -> None:
  """Refuses what would answer with confidence and mean nothing."""
  for name, array in arrays.items():
    if array.size == 0:
      raise ValueError(
          f'{what} holds an empty prompt: {name} has shape {list(array.shape)}. A prompt '
          'has at least one position (PROMPT_LENGTH); for the model without a prompt, '
          'leave PROMPT_FILE unset.'
      )
    bad = array.size - np.count_nonzero(np.isfinite(array))
    if bad:
      raise ValueError(
          f'{what} is no usable prompt: {bad:,} of the {array.size:,} numbers in {name} are '
          'NaN, infinite or beyond float32. The training that made it probably diverged: '
          'export an earlier state of that run (its checkpoint_<step> folders), or train '
          'again with a lower LEARNING_RATE.'
      )
