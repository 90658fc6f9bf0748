"""Where files may be written, and how: whole or not at all, and their sums."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator

import safetensors


def is_remote(where: str | os.PathLike[str]) -> bool:
  """Whether a directory is named by a URL (`gs://bucket/path`)."""
  return '://' in os.fspath(where)


def check_local(where: str | os.PathLike[str]) -> None:
  """Raises ValueError for a URL: only what is on this machine is written to."""
  if is_remote(where):
    raise ValueError(
        f'{os.fspath(where)} is not on this machine, and buckets are only read from. Name a folder '
        'here and copy what is in it, or one in which the bucket is mounted (gcsfuse).'
    )


@contextlib.contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[str]:
  """Gives a temporary name beside `path`, which becomes `path` if all goes well.

  After an exception, or a kill, `path` is what it was before.

  Raises:
    ValueError: if `path` is not on this machine.
    OSError: if it cannot be written.
  """
  check_local(path)
  path = os.path.realpath(path)
  unfinished = sibling(path, 'tmp')
  try:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    yield unfinished
    with open(unfinished, 'rb') as file:
      os.fsync(file.fileno())
    os.replace(unfinished, path)
  except (OSError, safetensors.SafetensorError) as error:
    raise OSError(
        f'Could not write {path}: {error}. What was there before is unchanged; check '
        'free space and permissions.'
    ) from error
  finally:
    with contextlib.suppress(OSError):
      os.remove(unfinished)


def check_vacant(directory: str | os.PathLike[str]) -> None:
  """Raises FileExistsError if something is there, unless it is an empty directory."""
  if not os.path.lexists(directory):
    return
  if not os.path.isdir(directory) or os.listdir(directory):
    raise FileExistsError(
        f'{os.fspath(directory)} exists already and is not overwritten. Name another '
        'directory, or remove that one.'
    )


@contextlib.contextmanager
def directory_written_whole(path: str | os.PathLike[str]) -> Iterator[str]:
  """Gives a temporary directory beside `path`, which becomes `path` if all goes well.

  Raises:
    ValueError: if `path` is not on this machine.
    FileExistsError: if something is at `path`, unless it is an empty directory.
    OSError: if it cannot be written; nothing is left behind.
  """
  check_local(path)
  path = os.path.realpath(path)
  check_vacant(path)
  unfinished = sibling(path, 'tmp')
  try:
    os.makedirs(unfinished)
    yield unfinished
    for folder, _, names in os.walk(unfinished):
      for name in names:
        with open(os.path.join(folder, name), 'rb') as file:
          os.fsync(file.fileno())
    os.replace(unfinished, path)
  except OSError as error:
    raise OSError(
        f'Could not write {path}: {error}. Nothing is left of it; check free space and '
        'permissions.'
    ) from error
  finally:
    shutil.rmtree(unfinished, ignore_errors=True)


def sibling(path: str, purpose: str) -> str:
  """A hidden, unused name beside `path`, on the same file system."""
  folder, name = os.path.split(path)
  return os.path.join(folder, f'.{name}.{purpose}-{uuid.uuid4().hex[:8]}')


def file_sha256(path: str | os.PathLike[str]) -> str:
  """sha256 of a file, in hexadecimal."""
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()
