"""The official files of GLUE: tab-separated, without quotes, most with a header."""

from __future__ import annotations

import csv
import dataclasses
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prompt_tuning_jax.tasks import sources


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
      ValueError: if a label is unknown, columns are missing, or no line is left.
    """
    (path,) = paths
    if path.removesuffix('.gz').endswith('.jsonl'):
      return self.jsonl.read(paths, split)
    rows, cut = [], []
    for number, row in self._lines(path, split):
      values = {name: row[column] for name, column in self.columns.items()}
      try:
        values['label'] = self._label(row)
      except ValueError as error:
        raise ValueError(f'{path}, line {number}: {error}.') from error
      if None in values.values():
        cut.append(number)
      else:
        rows.append((values, len(rows) + len(cut)))
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

  def _lines(self, path: str, split: str) -> Iterator[tuple[int, Mapping[str, str | None]]]:
    """Numbers and fields of the lines below the header."""
    with sources.open_bytes(path) as file:
      text = io.TextIOWrapper(file, encoding='utf-8-sig')
      reader = csv.DictReader(
          text, self.header.get(split), delimiter='\t', quoting=csv.QUOTE_NONE
      )
      try:
        missing = set(self.columns.values()) - set(reader.fieldnames or ())
        if missing:
          raise ValueError(f'no column {", ".join(sorted(missing))}')
        for row in reader:
          yield reader.line_num, row
      except (ValueError, csv.Error, *sources.DAMAGED) as error:
        raise ValueError(
            f'{path}, line {reader.line_num}: {error}. Expected tab-separated values with '
            f'{", ".join(self.columns.values())}, as in the official file.'
        ) from error

  def _label(self, row: Mapping[str, str | None]) -> int | float | None:
    if self.label not in row:
      return -1 if self.label_names else -1.0
    text = row[self.label]
    if not text:
      return None
    if not self.label_names:
      return float(text)
    if text in self.label_names:
      return list(self.label_names).index(text)
    return sources.label_number(int(text), len(self.label_names))
