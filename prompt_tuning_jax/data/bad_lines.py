"""What is wrong with the lines of a file, said once for the whole file.

A line that cannot be read is an error and never left out: a benchmark with fewer rows is
another benchmark. All lines are looked at first, so that the error says how many are bad.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Sequence

# So many bad lines, or ids, are named; of a reason so many characters are shown.
_NAMED = 5
_SHOWN = 240


class BadLines:
  """Gathers what is wrong with a file, line by line.

      bad = BadLines(path, expected='Expected one JSON object a line with idx and text.')
      for number, line in enumerate(file, start=1):
        try:
          …
        except ValueError as error:
          bad.add(number, error)
      bad.check(number)
  """

  def __init__(self, path: str, expected: str, unit: str = 'line'):
    """`expected` ends the message; `unit` is what `check` counts."""
    self._path = path
    self._expected = expected
    self._unit = unit
    self._count = 0
    self._first: list[tuple[int, str]] = []

  def add(self, number: int, error: Exception) -> None:
    """Notes that a line, counted from 1, cannot be read."""
    self._count += 1
    if len(self._first) < _NAMED:
      self._first.append((number, reason(error)))

  def check(self, total: int) -> None:
    """Ends the file, of which `total` units were looked at.

    Raises:
      ValueError: if there are bad ones; says how many, and what is wrong with the first five.
    """
    if not self._count:
      return
    of = f'{self._count:,} of {total:,} {self._unit}{"" if total == 1 else "s"}'
    if self._count == 1:
      ((number, why),) = self._first
      raise ValueError(f'{self._path}, line {number}: {why}. {of} is bad. {self._expected}')
    named = [f'\n  line {number}: {why}' for number, why in self._first]
    more = self._count - len(named)
    raise ValueError(
        f'{self._path}: {of} are bad:{"".join(named)}'
        + (f'\n  and {more:,} more' if more else '')
        + f'\n{self._expected}'
    )


def reason(error: Exception) -> str:
  """Why a line cannot be read, in words that make sense beside its number."""
  if isinstance(error, KeyError):
    text = f'no field {error}'
  elif isinstance(error, UnicodeError):
    text = f'not UTF-8: {error}'
  elif isinstance(error, json.JSONDecodeError):
    text = f'not JSON: {error.msg} at column {error.colno}'
  elif isinstance(error, RecursionError):
    text = 'nested too deeply'
  else:
    text = str(error)
  return text if len(text) <= _SHOWN else text[:_SHOWN] + '…'


def decode_lines(path: str, data: bytes, expected: str) -> str:
  """Decodes a file's UTF-8; a byte order mark is passed over.

  Raises:
    ValueError: if lines of it are not UTF-8; says which.
  """
  try:
    return data.decode('utf-8-sig')
  except UnicodeDecodeError:
    bad = BadLines(path, expected)
    lines = data.removesuffix(b'\n').split(b'\n')
    for number, line in enumerate(lines, start=1):
      try:
        line.decode()
      except UnicodeDecodeError as error:
        bad.add(number, error)
    bad.check(len(lines))
    raise


def warn_of_shared_ids(
    path: str, ids: Iterable[tuple[int, ...]], lines: Sequence[int]
) -> None:
  """Warns where examples of a split have the same id.

  Args:
    path: the file of the split.
    ids: id of each example, with its parts.
    lines: line of the file of each example.
  """
  lines_of: dict[tuple[int, ...], list[int]] = {}
  for index, number in zip(ids, lines, strict=True):
    lines_of.setdefault(index, []).append(number)
  shared = {index: numbers for index, numbers in lines_of.items() if len(numbers) > 1}
  if not shared:
    return
  named = [
      f'{"/".join(map(str, index))} '
      f'(lines {", ".join(map(str, numbers[:_NAMED]))}{", …" if numbers[_NAMED:] else ""})'
      for index, numbers in list(shared.items())[:_NAMED]
  ]
  count = sum(map(len, shared.values()))
  warnings.warn(
      f'{path}: {count:,} of {len(lines):,} examples share their idx with another: '
      f'{", ".join(named)}{", …" if len(shared) > _NAMED else ""}. All of them are kept.',
      stacklevel=2,
  )
