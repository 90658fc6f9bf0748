"""Models by name: which published T5s there are, and how a folder comes from the hub."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
from collections.abc import Sequence

from prompt_tuning_jax.json_files import read_json

_SIZES = ('small', 'base', 'large', 'xl', 'xxl')


def _sized(t5x: str, hub: str, sizes: Sequence[str] = _SIZES) -> dict[str, str]:
  return {t5x.format(size): hub.format(size) for size in sizes}


# T5X's name of a model, as in gs://t5-data/pretrained_models/t5x/<name>, and its repository
# on the Hugging Face hub, which holds the vocabulary as well.
PUBLISHED = {
    **_sized('t5_1_1_{}', 'google/t5-v1_1-{}'),
    **_sized('t5_1_1_lm100k_{}', 'google/t5-{}-lm-adapt'),
    **_sized('t5_{}', 'google-t5/t5-{}', ('small', 'base', 'large')),
    't5_3B': 'google-t5/t5-3b',
    't5_11B': 'google-t5/t5-11b',
    **_sized('flan_t5_{}', 'google/flan-t5-{}'),
    **_sized('mt5_{}', 'google/mt5-{}'),
    **_sized('umt5_{}', 'google/umt5-{}', ('small', 'base', 'xl', 'xxl')),
    **_sized('byt5_{}', 'google/byt5-{}'),
}
_REPOSITORY = re.compile(r'[\w.-]+/[\w.-]+')

# What a backbone needs of a repository, besides the weights in the first form it has.
_DESCRIPTIONS = ('config.json', 'spiece.model', 'tokenizer_config.json')
# One of these says how texts are tokenised.
_VOCABULARIES = {'spiece.model', 'tokenizer_config.json'}
_WEIGHTS = (r'model(-\d+-of-\d+)?\.safetensors(\.index\.json)?',
            r'pytorch_model(-\d+-of-\d+)?\.bin(\.index\.json)?')


def repository(name: str) -> str | None:
  """The hub's repository for a name: T5X's of a published model, or `owner/model`."""
  if name in PUBLISHED:
    return PUBLISHED[name]
  return name if _REPOSITORY.fullmatch(name) else None


def fetched(repository: str) -> str | None:
  """The folder of a repository that was downloaded before, as a whole; None if it was not."""
  with contextlib.suppress(Exception):  # Whatever the client raises: it is not here yet.
    hub = importlib.import_module('huggingface_hub')
    # Not asked for a pattern, the client misses all that a repository has besides.
    folder = hub.snapshot_download(
        repository, local_files_only=True, allow_patterns=['config.json']
    )
    if 'config.json' in os.listdir(folder) and _is_whole(folder):
      return folder
  return None


def fetch(repository: str) -> str:
  """The folder of a repository, downloaded where it is not on this machine yet.

  Raises:
    FileNotFoundError: if huggingface_hub is not installed.
    OSError: if the hub does not answer, or has no such repository.
    ValueError: if the repository holds no weights.
  """
  try:
    hub = importlib.import_module('huggingface_hub')
  except ImportError as error:
    raise FileNotFoundError(
        f'{repository} is a model of the Hugging Face hub, and downloading it needs '
        'huggingface_hub: pip install huggingface_hub. Or name a folder that holds it.'
    ) from error
  if (folder := fetched(repository)) and _VOCABULARIES & set(os.listdir(folder)):
    return folder
  try:
    files = hub.list_repo_files(repository)
    needed = _needed(files, repository)
    return hub.snapshot_download(repository, allow_patterns=needed)
  except ValueError:
    raise
  except Exception as error:  # The client's own, and those of the HTTP library of the day.
    if folder:  # By another program, which had no use for the vocabulary.
      return folder
    reason = (str(error).splitlines() or [''])[0]
    raise OSError(
        f'{repository} could not be fetched from the Hugging Face hub '
        f'({type(error).__name__}: {reason}). Check the name and the network, or name a '
        'folder that holds the model.'
    ) from error


def _needed(files: Sequence[str], repository: str) -> list[str]:
  if weights := _weights(files):
    return [*weights, *(name for name in _DESCRIPTIONS if name in files)]
  raise ValueError(
      f'{repository} holds neither model.safetensors nor pytorch_model.bin. Found '
      f'{", ".join(list(files)[:6])}.'
  )


def _is_whole(folder: str) -> bool:
  """Whether the weights are there: a download may have been stopped between two shards."""
  held = os.listdir(folder)
  found = _weights(held)
  shards: set[str] = set()
  for name in found:
    if name.endswith('.index.json'):
      shards |= set(read_json(os.path.join(folder, name))['weight_map'].values())
  return bool(found) and shards <= set(held)


def _weights(files: Sequence[str]) -> list[str]:
  """The files of the weights, in the first form there is; folders hold others."""
  for pattern in _WEIGHTS:
    if found := [name for name in files if re.fullmatch(pattern, name)]:
      return found
  return []
