"""The official files of GLUE: tab-separated, without quotes, most with a header."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prompt_tuning_jax.tasks import sources

from prompt_tuning_jax.data.bad_lines import BadLines, decode_lines


@dataclasses.dataclass(frozen=True)
class GlueTsv:
  """The files of one task, and how their lines become the rows of TFDS.

  Attributes:
    files: split → names of its file below $PTJ_LOCAL_DATA, of which the first that is there
      is read.
    columns: field of the row → column of the file.
    label: column of the label; a file without it (a test set) has no labels: -1.
    label_names: names of the labels, which files give by name or number; () where the label
      is a number with a fraction.
    header: the columns of a file that does not name them itself.
    jsonl: reads names that end in .jsonl.
  """

  files: Mapping[str, Sequence[str]]
  columns: Mapping[str, str]
  label: str
  label_names: Sequence[str]
  header: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
  jsonl: sources.Jsonl | None = None

  @property
  def splits(self) -> Sequence[str]:
    return tuple(self.files)

  def names(self, split: str) -> Sequence[Sequence[str]]:
    return [list(self.files[split])]

  def read(self, paths: Sequence[str], split: str) -> dict[str, list[Any]]:
    """Reads the columns of `columns`, `label` and `idx`, the number of the line.

    A line that lacks a field is left out, as TFDS does (QQP has some), with a warning.

    Raises:
      ValueError: if labels are unknown, columns are missing, or no line is left.
    """
    (path,) = paths
    if path.removesuffix('.gz').endswith('.jsonl'):
      return self.jsonl.read(paths, split)
    expected = (
        f'Expected tab-separated values with {", ".join(self.columns.values())}, as in the '
        'official file.'
    )
    bad = BadLines(path, expected)
    rows, cut, total = [], [], 0
    for total, (number, row) in enumerate(self._lines(path, split, expected, bad), start=1):
      values = {name: row[column] for name, column in self.columns.items()}
      try:
        values['label'] = self._label(row)
      except ValueError as error:
        bad.add(number, error)
        continue
      if None in values.values():
        cut.append(number)
      else:
        rows.append((values, total - 1))
    bad.check(total)
    if not rows:
      raise ValueError(
          f'{path}, the file of the split {split!r}, holds no complete line. Copy the '
          'official file there again, or use another split.'
      )
    if cut:
      warnings.warn(
          f'{path}: {len(cut):,} of {len(rows) + len(cut):,} lines lack a field and are left '
          f'out, as TFDS does (the first is line {cut[0]}).',
          stacklevel=2,
      )
    names = [*self.columns, 'label']
    return {name: [values[name] for values, _ in rows] for name in names} | {
        'idx': [index for _, index in rows]
    }

  def _lines(
      self, path: str, split: str, expected: str, bad: BadLines
  ) -> Iterator[tuple[int, Mapping[str, str | None]]]:
    """Numbers and fields of the lines below the header."""
    text = decode_lines(path, sources.read_bytes(path, expected), expected)
    reader = csv.DictReader(
        io.StringIO(text, newline=None),
        self.header.get(split),
        delimiter='\t',
        quoting=csv.QUOTE_NONE,
    )
    missing = set(self.columns.values()) - set(reader.fieldnames or ())
    if missing:
      raise ValueError(f'{path}, line 1: no column {", ".join(sorted(missing))}. {expected}')
    while True:
      try:
        row = next(reader, None)
      except csv.Error as error:
        bad.add(reader.line_num, error)
        continue
      if row is None:
        return
      yield reader.line_num, row

  def _label(self, row: Mapping[str, str | None]) -> int | float | None:
    if self.label not in row:
      return -1 if self.label_names else -1.0
    text = row[self.label]
    if not text:
      return None
    if not self.label_names:
      if not math.isfinite(float(text)):
        raise ValueError(f'the label is {text}, not a number')
      return float(text)
    if text.removeprefix('-').isdecimal():
      return sources.label_number(int(text), len(self.label_names))
    return sources.named_label(text, self.label_names)
