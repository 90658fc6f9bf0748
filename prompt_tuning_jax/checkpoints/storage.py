"""Reading files of a directory, on this machine or in a bucket, through tensorstore."""

from __future__ import annotations

import functools
import os
import posixpath
from typing import Any

import tensorstore

_BUCKET_DRIVERS = {'gs': 'gcs', 's3': 's3'}
# Without a network, tensorstore would try for minutes.
_TIMEOUT_SECONDS = 60


class Folder:
  """A directory to read from: a path of this machine, `gs://…` or `s3://…`.

  Attributes:
    where: the directory as it was named, for messages.
  """

  def __init__(self, where: str | os.PathLike[str]):
    """Names the directory; nothing is read yet.

    Raises:
      ValueError: on a URL of another kind.
    """
    self.where = os.fspath(where).rstrip('/') or '/'
    scheme, separator, rest = self.where.partition('://')
    if not separator:
      self._spec = {'driver': 'file', 'path': os.path.abspath(self.where)}
    elif scheme == 'file':
      self._spec = {'driver': 'file', 'path': rest}
    elif scheme in _BUCKET_DRIVERS:
      bucket, _, path = rest.partition('/')
      self._spec = {'driver': _BUCKET_DRIVERS[scheme], 'bucket': bucket, 'path': path}
    else:
      raise ValueError(
          f'{self.where} is a URL of a kind that is not read. Name a directory, or one in a '
          'bucket: gs://… or s3://…'
      )

  def ocdbt(self) -> Folder:
    """The directory inside the OCDBT database that this one is (Orbax's, in few files)."""
    inside = Folder(self.where)
    inside._spec = {'driver': 'ocdbt', 'base': self.spec(), 'path': ''}
    return inside

  def path(self, *parts: str) -> str:
    """Name of a file in it, for messages."""
    return posixpath.join(self.where, *parts)

  def spec(self, *parts: str) -> dict[str, Any]:
    """What tensorstore calls a directory in it, as the `kvstore` of an array."""
    path = posixpath.join(self._spec['path'], *parts)
    return self._spec | {'path': path and path + '/'}

  @functools.cached_property
  def files(self) -> frozenset[str]:
    """Paths of all files in it, folders included, relative to it."""
    if self._spec['driver'] == 'file':  # tensorstore does not follow links.
      root = self._spec['path']
      return frozenset(
          os.path.relpath(os.path.join(folder, name), root)
          for folder, _, names in os.walk(root, followlinks=True)
          for name in names
      )
    keys = self._result(self._store.list(), '')
    return frozenset(key.decode() for key in keys)

  def read(self, *parts: str) -> bytes:
    """The content of a file.

    Raises:
      FileNotFoundError: if there is no such file.
      OSError: if it cannot be read, or the bucket does not answer.
    """
    name = posixpath.join(*parts)
    found = self._result(self._store.read(name), name)
    if found.state != 'value':
      raise FileNotFoundError(f'No file {self.path(name)}.')
    return found.value

  @functools.cached_property
  def _store(self) -> tensorstore.KvStore:
    return self._result(tensorstore.KvStore.open(self.spec()), '')

  def _result(self, future: Any, name: str) -> Any:
    try:
      return future.result(timeout=_TIMEOUT_SECONDS)
    except TimeoutError:
      raise OSError(
          f'{self.path(name)} did not answer within {_TIMEOUT_SECONDS} seconds. Is there a '
          'network, and are its credentials set? A copy on this machine can be named '
          f'instead (gsutil -m cp -r {self.where} .).'
      ) from None
    except ValueError as error:  # tensorstore's, whatever went wrong.
      raise OSError(f'{self.path(name)} cannot be read: {error}') from error
