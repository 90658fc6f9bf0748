"""What tokenised examples were made from, and whether that has changed since.

Nothing is imported to find out: a module is a source file whose sum is compared,
and a source file is compared by size and time first and by its sum then. What is
not on this machine cannot have changed here, so a cache carried to another host is
good as it is.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import prompt_tuning_jax

# Folder in which tasks look for the official files before they turn to TFDS.
LOCAL_DATA_VARIABLE = 'PTJ_LOCAL_DATA'

# The modules that decide which ids a text has.
VOCABULARY_CODE = ('prompt_tuning_jax.data.vocabulary', 'prompt_tuning_jax.data.byte_vocabulary')


def library_version() -> str:
  """Version of this library."""
  return prompt_tuning_jax.__version__


def describe_files(
    paths: Iterable[str],
    *,
    local_names: Iterable[str] = (),
    alternatives: Iterable[Sequence[str]] = (),
) -> dict[str, Any]:
  """Describes source files for a manifest.

  Args:
    paths: the files.
    local_names: their names below $PTJ_LOCAL_DATA where they were found through it;
      they are looked for there when the description is checked.
    alternatives: all names that each of them may have there, in the order in which they
      are looked for.

  Raises:
    FileNotFoundError: if a file does not exist.
  """
  paths = [os.path.abspath(path) for path in paths]
  local_names = list(local_names) or [None] * len(paths)
  alternatives = list(alternatives) or [[name] for name in local_names]
  files = []
  for path, local_name, names in zip(paths, local_names, alternatives, strict=True):
    if not os.path.isfile(path):
      raise FileNotFoundError(f'No file {path}.')
    status = os.stat(path)
    files.append({
        'path': path,
        'local_name': local_name,
        'alternatives': list(names),
        'size': status.st_size,
        'mtime_ns': status.st_mtime_ns,
        'sha256': _file_sha256(path),
    })
  return {'description': ', '.join(paths), 'files': files}


def describe_tfds(
    name: str, local_names: Iterable[str] = (), paths: Iterable[str] = ()
) -> dict[str, Any]:
  """Describes a TFDS dataset.

  Args:
    name: its name, with the version.
    local_names: files that would be preferred to it.
    paths: the files of the split in the folder of TFDS, of which those on this disk are
      described: `prepare` may write others there.
  """
  files = describe_files(path for path in paths if os.path.isfile(path))['files']
  return {'description': name, 'files': files, 'absent_local': list(local_names)}


def describe_local(
    tfds_name: str | None, files: Mapping[str, str], alternatives: Iterable[Sequence[str]]
) -> dict[str, Any]:
  """Describes files that were found through $PTJ_LOCAL_DATA.

  Args:
    tfds_name: the TFDS dataset that would be read without them, if there is one.
    files: name below $PTJ_LOCAL_DATA → path.
    alternatives: as `describe_files` takes them.
  """
  described = describe_files(files.values(), local_names=files, alternatives=alternatives)
  return described | {'instead_of': tfds_name}


def source_change(source: dict[str, Any], tfds_data_dir: str | None = None) -> str | None:
  """Says how the source differs from its description; None if it does not.

  Args:
    source: the description.
    tfds_data_dir: the folder of TFDS that is named now, if one is. What it does not hold
      cannot differ.
  """
  local_data = os.environ.get(LOCAL_DATA_VARIABLE)
  if local_data:
    for name in source.get('absent_local', ()):
      if os.path.isfile(os.path.join(local_data, name)):
        return (
            f'it was made from {source["description"]}, but '
            f'{LOCAL_DATA_VARIABLE}={local_data} has {name} now'
        )
  if tfds_data_dir and (change := _tfds_change(source, os.path.expanduser(tfds_data_dir))):
    return change
  for file in source['files']:
    path = file['path']
    if local_data and file['local_name']:
      for name in file.get('alternatives', [file['local_name']]):
        path = os.path.join(local_data, name)
        if os.path.isfile(path):
          break
      if os.path.isfile(path) and name != file['local_name']:
        return (
            f'it was made from {file["local_name"]}, but {LOCAL_DATA_VARIABLE}={local_data} '
            f'has {name} now'
        )
    if not os.path.isfile(path):
      continue
    if change := _file_change(path, file):
      return change
  return None


def _tfds_change(source: dict[str, Any], tfds_data_dir: str) -> str | None:
  """Says how the data set in a folder of TFDS differs from what was read.

  That was the one of another folder, or local files that are no longer named.
  """
  instead_of = source.get('instead_of')
  name = instead_of or ('absent_local' in source and source['description'])
  folder = name and os.path.join(tfds_data_dir, name.replace(':', '/'))
  if not folder or not os.path.isdir(folder):
    return None
  if instead_of:
    local_data = os.environ.get(LOCAL_DATA_VARIABLE, '')
    if all(
        any(os.path.isfile(os.path.join(local_data, other)) for other in file['alternatives'])
        for file in source['files']
    ):
      return None
    return f'it was made from {source["description"]}, but {folder} is read now'
  for file in source['files']:
    path = os.path.join(folder, os.path.basename(file['path']))
    if not os.path.isfile(path):
      return f'it was made from {file["path"]}, which {folder} does not have'
    if change := _file_change(path, file):
      return change
  return None


def _file_change(path: str, described: Mapping[str, Any]) -> str | None:
  status = os.stat(path)
  if status.st_size != described['size']:
    return f'{path} has {status.st_size:,} bytes, was {described["size"]:,}'
  # A copy of the same data has another time; only the content counts then.
  if status.st_mtime_ns != described['mtime_ns'] and _file_sha256(path) != described['sha256']:
    return f'{path} was changed'
  return None


def describe_modules(names: Iterable[str]) -> dict[str, str]:
  """Sums of the source files of modules, for a manifest."""
  found = {name: module_file(name) for name in sorted(set(names))}
  return {name: _file_sha256(path) for name, path in found.items() if path}


def code_change(code: dict[str, str]) -> str | None:
  """Says which module differs from its sum; None if none does."""
  for name, expected in code.items():
    path = module_file(name)
    if path and _file_sha256(path) != expected:
      return f'the module {name} ({path}) was changed'
  return None


@functools.cache
def module_file(name: str) -> str | None:
  """Source file of a module, found without running it; None where there is none."""
  if name in sys.modules:
    path = getattr(sys.modules[name], '__file__', None)
    return path if path and path.endswith('.py') else None
  package, _, last = name.rpartition('.')
  if not package:
    return _origin(name)
  folder = module_file(package)
  if folder and os.path.basename(folder) == '__init__.py':
    below = os.path.join(os.path.dirname(folder), last)
    for path in (below + '.py', os.path.join(below, '__init__.py')):
      if os.path.isfile(path):
        return path
  # A package that is installed from elsewhere than its parent's folder; only the
  # parents are imported to look it up, so keep to the library's own light one.
  return _origin(name) if package == __package__.partition('.')[0] else None


def _origin(name: str) -> str | None:
  try:
    spec = importlib.util.find_spec(name)
  except (ImportError, ValueError):
    return None
  path = spec.origin if spec else None
  return path if path and path.endswith('.py') else None


def _file_sha256(path: str) -> str:
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()
