"""Files that may be gzipped: their names, how they are opened, and what damage raises."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Sequence
from typing import BinaryIO

# What reading a gzipped file raises that is truncated or changed.
DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile)


def open_bytes(path: str) -> BinaryIO:
  """Opens a file for reading, gunzipping it where its name ends in .gz."""
  return gzip.open(path) if path.endswith('.gz') else open(path, 'rb')


def with_gz(names: Sequence[str]) -> list[str]:
  """The names, each followed by its gzipped one: where a file is looked for, in order."""
  return [full for name in names for full in (name, name + '.gz')]
