"""The library's own layout of a backbone: a directory of three files.

  config.json        architecture, sums, metadata (no code, nothing to execute)
  model.safetensors  weights under their per-layer T5X names, float32 or bfloat16
  spiece.model       the SentencePiece vocabulary
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from prompt_tuning_jax import partitioning, processes
from prompt_tuning_jax.backbones.t5 import T5Config
from prompt_tuning_jax.checkpoints import names
from prompt_tuning_jax.checkpoints.source import (
    Box,
    Checkpoint,
    Weights,
    cast,
    fingerprint,
    open_safetensors,
    write_safetensors,
)
from prompt_tuning_jax.data.byte_vocabulary import ByteVocabulary
from prompt_tuning_jax.data.provenance import library_version
from prompt_tuning_jax.data.vocabulary import Vocabulary
from prompt_tuning_jax.json_files import as_json, canonical_json, write_json
from prompt_tuning_jax.typing import PyTree
from prompt_tuning_jax.writing import check_local, file_sha256, sibling

FORMAT = 'prompt_tuning_jax.backbone'
FORMAT_VERSION = 1
CONFIG_FILE = 'config.json'
WEIGHTS_FILE = 'model.safetensors'
VOCABULARY_FILE = 'spiece.model'
_DTYPES = ('float32', 'bfloat16')


def save_backbone(
    directory: str | os.PathLike[str],
    config: T5Config,
    params: PyTree,
    vocabulary: Vocabulary | None,
    *,
    dtype: str = 'bfloat16',
    metadata: Mapping[str, Any] | None = None,
) -> None:
  """Writes a backbone in the library's own layout.

  A new directory appears as a whole or not at all. A backbone that is already
  there is replaced once the new one is complete. Other files in the directory,
  such as a model card, are kept. Of several processes the main one writes; all have to
  call this.

  Args:
    directory: where to; its parents are made.
    config: the architecture.
    params: the tree of `T5`, layers stacked.
    vocabulary: the vocabulary it was trained with; None leaves it out.
    dtype: how weights are stored, 'float32' or 'bfloat16'.
    metadata: anything that JSON can hold: steps, tokens, data, losses.

  Raises:
    ValueError: if `params` do not fit `config`, the vocabulary has more ids than
      the embedding has rows, they are held in int8, or `dtype` is another.
    TypeError: if `metadata` holds what JSON cannot.
    FileExistsError: if a model of another format is there.
    OSError: if it cannot be written; what was there before is unchanged.
  """
  if dtype not in _DTYPES:
    raise ValueError(
        f'A backbone is stored as {" or ".join(_DTYPES)}, but dtype={dtype!r} was asked '
        'for. T5 overflows in float16; bfloat16 takes the same space.'
    )
  _check_unquantised(params)
  held = partitioning.whole_in_main(params)

  def write() -> None:
    flat = names.flatten_to_t5x(held, config)
    weights = cast(Weights.of(flat), jnp.dtype(dtype))
    write_native(directory, config, weights, vocabulary, metadata=metadata)

  processes.from_main(write)


def _check_unquantised(params: PyTree) -> None:
  for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
      name = jax.tree_util.keystr(path, simple=True, separator='/')
      raise ValueError(
          f'{name} is held in {leaf.dtype}, a rounded copy of the weights that is made where they '
          'are loaded and not stored. Copy the folder they were read from, or load the backbone '
          'with param_dtype=None (PARAM_DTYPE) and save that.'
      )


def write_native(
    directory: str | os.PathLike[str],
    config: T5Config,
    weights: Weights,
    vocabulary: Vocabulary | None,
    *,
    metadata: Mapping[str, Any] | None = None,
) -> None:
  """`save_backbone` for weights by their per-layer T5X names, one array held at a time.

  They are stored in their own type, which must be float32 or bfloat16.
  """
  check_local(directory)
  target = os.path.realpath(directory)
  names.check_shapes(weights, config, 'The model to write')
  dtypes = {spec.dtype.name for spec in weights.specs.values()}
  if len(dtypes) != 1 or not dtypes <= set(_DTYPES):
    raise ValueError(
        f'A backbone is stored as {" or ".join(_DTYPES)}, but its arrays are '
        f'{", ".join(sorted(dtypes))}. Name one dtype for all of them.'
    )
  if vocabulary is not None:
    check_vocabulary(vocabulary, config.vocab_size)
  _check_replaceable(target)
  metadata = as_json(metadata or {})
  canonical_json(metadata)  # What JSON cannot hold is refused before anything is written.
  unfinished = sibling(target, 'tmp')
  try:
    os.makedirs(unfinished)
    _write_files(unfinished, config, weights, vocabulary, metadata)
    _move_into_place(unfinished, target)
  except (OSError, safetensors.SafetensorError) as error:
    raise OSError(
        f'Could not write the backbone to {target}: {error}. What was there before is '
        'unchanged; check free space and permissions.'
    ) from error
  finally:
    shutil.rmtree(unfinished, ignore_errors=True)


def _write_files(
    directory: str,
    config: T5Config,
    weights: Weights,
    vocabulary: Vocabulary | None,
    metadata: dict[str, Any],
) -> None:
  weights_path = os.path.join(directory, WEIGHTS_FILE)
  write_safetensors(weights_path, weights)
  described = {
      'format': FORMAT,
      'format_version': FORMAT_VERSION,
      'library_version': library_version(),
      'architecture': as_json(dataclasses.asdict(config)),
      'weights': {
          'file': WEIGHTS_FILE,
          'dtype': next(iter(weights.specs.values())).dtype.name,
          'parameters': sum(math.prod(spec.shape) for spec in weights.specs.values()),
          'sha256': file_sha256(weights_path),
      },
      'vocabulary': None,
      'fingerprint': fingerprint(weights),
      'metadata': metadata,
  }
  if vocabulary is not None:
    has_file = not isinstance(vocabulary, ByteVocabulary)
    if has_file:
      shutil.copyfile(vocabulary.path, os.path.join(directory, VOCABULARY_FILE))
    described['vocabulary'] = {
        'file': VOCABULARY_FILE if has_file else vocabulary.path,
        'extra_ids': vocabulary.extra_ids,
        'fingerprint': vocabulary.fingerprint,
    }
  described['sha256'] = _description_sha256(described)
  write_json(os.path.join(directory, CONFIG_FILE), described)
  for name in os.listdir(directory):
    with open(os.path.join(directory, name), 'rb') as file:
      os.fsync(file.fileno())


def _check_replaceable(target: str) -> None:
  if not os.path.lexists(target):
    return
  if not os.path.isdir(target):
    raise FileExistsError(f'{target} is a file; a backbone is saved as a directory.')
  held = set(os.listdir(target))
  ours = {CONFIG_FILE, WEIGHTS_FILE}
  if held & ours and not is_native(target):
    raise FileExistsError(
        f'{target} holds a model of another format, which is not overwritten. Save to '
        'another directory, or remove that one.'
    )


def _move_into_place(new: str, target: str) -> None:
  if not os.path.isdir(target):
    os.replace(new, target)
  elif is_native(target):
    _exchange(new, target)
  else:
    # Without config.json the directory is no backbone yet, so that comes last.
    for name in (VOCABULARY_FILE, WEIGHTS_FILE, CONFIG_FILE):
      if os.path.exists(os.path.join(new, name)):
        os.replace(os.path.join(new, name), os.path.join(target, name))


def _exchange(new: str, target: str) -> None:
  """Puts the directory `new` in the place of `target`, with the other files there."""
  ours = {CONFIG_FILE, WEIGHTS_FILE, VOCABULARY_FILE}
  shutil.copytree(
      target,
      new,
      symlinks=True,
      ignore=lambda folder, held: ours if folder == target else (),
      copy_function=_link_or_copy,
      dirs_exist_ok=True,
  )
  old = sibling(target, 'old')
  os.replace(target, old)
  try:
    os.replace(new, target)
  except OSError:
    os.replace(old, target)
    raise
  shutil.rmtree(old, ignore_errors=True)


def _link_or_copy(source: str, copy: str) -> None:
  try:
    os.link(source, copy)
  except OSError:
    shutil.copy2(source, copy)


def is_native(directory: str | os.PathLike[str]) -> bool:
  """Whether the directory says of itself that it is in this layout."""
  try:
    with open(os.path.join(directory, CONFIG_FILE), encoding='utf-8') as file:
      described = json.load(file)
  except (OSError, ValueError):
    return False
  return isinstance(described, dict) and described.get('format') == FORMAT


def read_native(directory: str | os.PathLike[str]) -> Checkpoint:
  """Opens a directory in the library's own layout; weights are read on demand.

  The sum of config.json is checked now, that of the weights when the first array is
  read.

  Raises:
    FileNotFoundError: if one of the files is missing.
    ValueError: if config.json is damaged, incomplete or of a newer version, the
      weights file is cut off, or its shapes do not fit.
  """
  directory = os.fspath(directory)
  config_path = os.path.join(directory, CONFIG_FILE)
  with open(config_path, encoding='utf-8') as file:
    described = json.load(file)
  if described.get('format_version') != FORMAT_VERSION:
    raise ValueError(
        f'{config_path} has format_version {described.get("format_version")!r}; this '
        f'version of the library reads {FORMAT_VERSION}. It was written by version '
        f'{described.get("library_version")!r}: install that one or a newer one.'
    )
  recorded = described.pop('sha256', None)
  if recorded is not None and recorded != _description_sha256(described):
    raise ValueError(
        f'{config_path} is damaged: it does not have the sha256 that it records. Fetch or '
        'copy the directory again; if you edited it on purpose, remove its line "sha256".'
    )
  try:
    config = T5Config(**described['architecture'])
    described['vocabulary'], described['fingerprint']  # Needed when it is loaded.
    expected_sha256 = described['weights']['sha256']
    weights_path = os.path.join(directory, WEIGHTS_FILE)
  except (KeyError, TypeError) as error:
    raise ValueError(
        f'{config_path} does not describe a backbone completely ({error!r}). It was '
        f'written by version {described.get("library_version")!r} of the library, or '
        'edited by hand: fetch or save it again.'
    ) from error
  stored, _ = open_safetensors(weights_path)
  try:
    names.check_shapes(stored, config, weights_path)
  except ValueError:
    # Damage to the file's header looks like another model: say so if it is that.
    _verify(weights_path, expected_sha256)
    raise
  verified = False

  def read(name: str, box: Box) -> np.ndarray:
    nonlocal verified
    if not verified:
      _verify(weights_path, expected_sha256)
      verified = True
    return stored.part(name, box)

  return Checkpoint(
      format='native',
      path=directory,
      config=config,
      weights=Weights(stored.specs, read),
      fingerprint=described['fingerprint'],
      manifest=described,
  )


def _verify(path: str, expected: str) -> None:
  found = file_sha256(path)
  if found != expected:
    raise ValueError(
        f'{path} is damaged: its sha256 is {found}, but config.json beside it says '
        f'{expected}. Fetch or copy the directory again, or save the backbone again.'
    )


def _description_sha256(described: Mapping[str, Any]) -> str:
  return hashlib.sha256(canonical_json(described).encode()).hexdigest()


def check_vocabulary(vocabulary: Vocabulary, vocab_size: int) -> None:
  """Raises ValueError if the vocabulary has ids beyond the embedding's rows."""
  if vocabulary.size > vocab_size:
    raise ValueError(
        f'The vocabulary {vocabulary.path} has {vocabulary.size:,} ids '
        f'({vocabulary.num_pieces:,} pieces + {vocabulary.extra_ids} sentinels), but the '
        f"model's embedding has {vocab_size:,} rows. Give the vocabulary this model was "
        'trained with.'
    )
