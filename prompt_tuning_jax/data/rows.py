"""Reading jsonl, tsv and csv files line by line, bad lines numbered instead of raised."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Iterator
from typing import Any

from prompt_tuning_jax.data import gzipped

KINDS = ('.jsonl', '.tsv', '.csv')


def kind_of(path: str) -> str:
  """Which of `KINDS` a file is, by the end of its name."""
  kind = os.path.splitext(path.removesuffix('.gz'))[1].lower()
  if kind not in KINDS:
    raise ValueError(
        f'FileTask.files: {path} is none of {", ".join(KINDS)} (or these with .gz), by '
        'its name. Rename it, or write its examples as one JSON object a line.'
    )
  return kind


def read(path: str) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
  """(line number, its fields, or what is wrong with it) of a file, header left out.

  Blank lines at the end are none.

  Raises:
    ValueError: if the file is empty, has no header or is damaged.
  """
  parse = {'.jsonl': _jsonl_rows, '.tsv': _tsv_rows, '.csv': _csv_rows}[kind_of(path)]
  blank: list[int] = []
  try:
    with gzipped.open_bytes(path) as file:
      for number, row in parse(path, _decoded(file)):
        if row is None:
          blank.append(number)
          continue
        yield from ((other, ValueError('empty')) for other in blank)
        blank = []
        yield number, row
  except gzipped.DAMAGED as error:
    raise ValueError(f'{path} is truncated or damaged: {error}.') from error


def _decoded(lines: Iterable[bytes]) -> Iterator[str]:
  """Lines as text; bytes that are not UTF-8 become what `_is_utf8` tells."""
  for number, line in enumerate(lines):
    text = line.decode('utf-8', errors='surrogateescape')
    yield text.removeprefix('\ufeff') if number == 0 else text


def _is_utf8(text: str) -> bool:
  try:
    text.encode()
  except UnicodeEncodeError:
    return False
  return True


def _jsonl_rows(path: str, lines: Iterable[str]) -> Iterator[tuple[int, Any]]:
  del path
  for number, line in enumerate(lines, start=1):
    yield number, _json_row(line) if line.strip() else None


def _json_row(line: str) -> dict[str, Any] | ValueError:
  if not _is_utf8(line):
    return ValueError('not UTF-8')
  try:
    row = json.loads(line)
  except (ValueError, RecursionError) as error:
    return ValueError(f'not JSON ({str(error) or type(error).__name__})')
  return row if isinstance(row, dict) else ValueError('not a JSON object')


def _tsv_rows(path: str, lines: Iterable[str]) -> Iterator[tuple[int, Any]]:
  split = (line.rstrip('\r\n').split('\t') for line in lines)
  yield from _table(path, ((n, cells) for n, cells in enumerate(split, start=1)))


def _csv_rows(path: str, lines: Iterable[str]) -> Iterator[tuple[int, Any]]:
  yield from _table(path, _csv_cells(lines))


def _csv_cells(lines: Iterable[str]) -> Iterator[tuple[int, list[str] | ValueError]]:
  """(first line, cells) of each row: a quoted cell may hold line breaks.

  A quote that nothing closes takes all lines behind it: each of them is a bad one.
  """
  csv.field_size_limit(2**31 - 1)  # Python's own limit, 128 KiB, is for no reason of ours.
  rows = csv.reader(lines, strict=True)
  while True:
    number = rows.line_num + 1
    try:
      cells = next(rows)
    except StopIteration:
      return
    except csv.Error as error:
      taken = range(number, rows.line_num + 1)
      where = f' in the row of lines {taken[0]} to {taken[-1]}' if len(taken) > 1 else ''
      for number in taken:
        yield number, ValueError(f'not csv ({error}{where})')
    else:
      yield number, cells


def _table(
    path: str, rows: Iterable[tuple[int, list[str] | ValueError]]
) -> Iterator[tuple[int, dict[str, str] | ValueError | None]]:
  header: list[str] | None = None
  for number, cells in rows:
    if header is None:
      header = _checked_header(path, cells)
    elif isinstance(cells, ValueError):
      yield number, cells
    elif not any(cell.strip() for cell in cells):
      yield number, None
    elif not all(map(_is_utf8, cells)):
      yield number, ValueError('not UTF-8')
    elif len(cells) != len(header):
      yield number, ValueError(
          f'{len(cells)} columns, but the first line names {len(header)}'
      )
    else:
      yield number, dict(zip(header, cells, strict=True))
  if header is None:
    raise ValueError(f'{path} is empty: not even the names of its columns are there.')


def _checked_header(path: str, cells: list[str] | ValueError) -> list[str]:
  expected = 'The first line of a tsv or csv file names its columns.'
  if isinstance(cells, ValueError) or not all(map(_is_utf8, cells)):
    reason = cells if isinstance(cells, ValueError) else 'not UTF-8'
    raise ValueError(f'{path}, line 1: {reason}. {expected}')
  names = [cell.strip() for cell in cells]
  if not any(names):
    raise ValueError(f'{path}, line 1, is blank. {expected}')
  repeated = sorted({name for name in names if name and names.count(name) > 1})
  if repeated:
    raise ValueError(
        f'{path}, line 1: {", ".join(map(repr, repeated))} names two columns. {expected}'
    )
  return names
