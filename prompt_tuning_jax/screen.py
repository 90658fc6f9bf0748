"""Text on a screen: wrapped to its width, aligned by what it shows, coloured, drawn as bars."""

from __future__ import annotations

import math
import os
import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Collection, Iterator, Sequence

import numpy as np

TITLE, CUT, VIRTUAL = '\x1b[1m', '\x1b[31m', '\x1b[36m'
_PLAIN = '\x1b[0m'

_BINS = 10


def number(count: int, what: str) -> str:
  return f'{count:,} {what}' + 's' * (count != 1)


def histogram(lengths: np.ndarray, limit: int) -> list[str]:
  """How many examples have which length, a bar for each of a few ranges."""
  longest = int(lengths.max())
  width = _nice(longest / _BINS)
  numbers = np.maximum(lengths - 1, 0) // width
  counts = np.bincount(numbers)
  first = int(numbers.min())
  scale = 40 / counts.max()
  lines = []
  for number in range(first, len(counts)):
    low, high = number * width + 1, (number + 1) * width
    name = f'{low}' if width == 1 else f'{low}–{high}'
    note = ''
    if high > limit and counts[number]:
      over = int(np.sum((lengths > limit) & (lengths >= low) & (lengths <= high)))
      note = f'  ✂ {over:,} longer than {limit}' if over else ''
    bar = counted_bar(counts[number] * scale, counts[number])
    lines.append(f'{" " * 11}{name:>11} {bar}' + colored(note, CUT))
  return lines


def _nice(width: float) -> int:
  """The smallest of 1, 2, 5, 10, 20, … that is not below `width`."""
  power = 10 ** max(math.ceil(math.log10(max(width, 1))) - 1, 0)
  return next(power * step for step in (1, 2, 5, 10) if power * step >= width)


def counted_bar(length: float, count: int) -> str:
  """A bar of eighths of a character, of which the least is visible, and the count."""
  if not count:
    return '0'
  whole, eighths = divmod(max(round(length * 8), 1), 8)
  return '█' * whole + (chr(0x2590 - eighths) if eighths else '') + f' {count:,}'


def fitting(
    cells: Sequence[tuple[str, str]], width: int
) -> Iterator[list[tuple[str, str]]]:
  """The cells in chunks that are at most `width` columns wide."""
  chunk: list[tuple[str, str]] = []
  used = 0
  for piece, number in cells:
    needed = max(columns(piece), len(number)) + 1
    if chunk and used + needed > width + 1:
      yield chunk
      chunk, used = [], 0
    chunk.append((piece, number))
    used += needed
  if chunk:
    yield chunk


def columns(text: str) -> int:
  """How many columns of a screen a text takes."""
  return sum(
      0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in 'WF')
      for c in text
  )


def table(rows: Sequence[Sequence[str]], numbers: Collection[str] = ()) -> str:
  """Rows, the first of them names, as a table that Markdown knows.

  Args:
    rows: the cells.
    numbers: names of the columns that are set to the right.
  """
  widths = [max(map(columns, column)) for column in zip(*rows, strict=True)]
  numeric = [name in numbers for name in rows[0]]

  def line(cells: Sequence[str]) -> str:
    padded = []
    for cell, width, right in zip(cells, widths, numeric, strict=True):
      space = ' ' * (width - columns(cell))
      padded.append(space + cell if right else cell + space)
    return f'| {" | ".join(padded)} |'

  ruler = [
      '-' * (width - 1) + ':' if right else '-' * width
      for width, right in zip(widths, numeric, strict=True)
  ]
  return '\n'.join([line(rows[0]), line(ruler), *map(line, rows[1:])])


def width() -> int:
  return min(shutil.get_terminal_size((100, 24)).columns, 120)


def wrapped(first: str, others: str, text: str) -> list[str]:
  return textwrap.wrap(
      text,
      width(),
      initial_indent=first,
      subsequent_indent=others,
      break_long_words=False,
      break_on_hyphens=False,
  ) or [first.rstrip()]


def colored(text: str, color: str) -> str:
  """The text in colour, if it goes to a terminal that shows it."""
  if not color or not text or not sys.stdout.isatty() or os.environ.get('NO_COLOR'):
    return text
  return f'{color}{text}{_PLAIN}'
