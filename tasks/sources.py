"""Where the examples of tasks come from: official files on disk, else TFDS.

Set PTJ_LOCAL_DATA to a folder that holds the official files (SuperGLUE's zips unpacked
under `superglue/`, GLUE's under `glue/`, DPR under `dpr/`, SST-2 as jsonl under `sst2/`, E2E
under `e2e/`, WebNLG under `webnlg_2017/`, DART under `dart/`, XSum under `xsum/`, SQuAD under
`squad/`, MRQA under `mrqa/`, LAMA under `lama_trex/`), plain or gzipped, and the tasks read
those, without a network. A file that is not there is looked for in TensorFlow Datasets, where
that has the data set.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json
import os
import socket
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import seqio
import tensorflow as tf

from prompt_tuning_jax.data import field_texts, gzipped
from prompt_tuning_jax.data.bad_lines import BadLines, decode_lines, warn_of_shared_ids
from prompt_tuning_jax.data.provenance import LOCAL_DATA_VARIABLE

# TensorFlow's types for the values of columns.
_DTYPES = {str: tf.string, bool: tf.int64, int: tf.int64, float: tf.float32}


class Files(Protocol):
  """The files of a data set, and how they become columns of examples."""

  @property
  def splits(self) -> Sequence[str]:
    """Names of the splits."""

  def names(self, split: str) -> Sequence[Sequence[str]]:
    """The files below $PTJ_LOCAL_DATA that a split is made of, each as its possible names.

    The first name that is there is read, with or without `.gz` behind it.
    """

  def read(self, paths: Sequence[str], split: str) -> dict[str, list[Any]]:
    """Reads a split as columns; `paths` are those of `names`, in order.

    A column of lists of texts becomes a feature of another length in each example; of a
    column `idx/question` becomes the entry `question` of the feature `idx`.
    """


@dataclasses.dataclass(frozen=True)
class Jsonl:
  """The official files of a data set, a JSON object a line, and what is made of the lines.

  Attributes:
    folder: folder of the files below $PTJ_LOCAL_DATA.
    files: split → name of its file.
    expected: the fields of a line, for messages.
    parse: makes the examples of a line, as TFDS has them, of it and its number. May raise
      ValueError, TypeError or KeyError (a missing field).
  """

  folder: str
  files: Mapping[str, str]
  expected: str
  parse: Callable[[Mapping[str, Any], int], Iterable[Mapping[str, Any]]]

  @property
  def splits(self) -> Sequence[str]:
    return tuple(self.files)

  def names(self, split: str) -> Sequence[Sequence[str]]:
    return [[os.path.join(self.folder, self.files[split])]]

  def read(self, paths: Sequence[str], split: str) -> dict[str, list[Any]]:
    """Reads a split's file as columns.

    Raises:
      ValueError: if a line is not what is expected, or there is none; the file is named.
    """
    (path,) = paths
    examples: list[Mapping[str, Any]] = []
    lines: list[int] = []
    for number, found in parse_jsonl(path, self._numbered, self.expected):
      examples += found
      lines += [number] * len(found)
    if not examples:
      raise ValueError(
          f'{path}, the file of the split {split!r}, is empty. Expected one JSON object a '
          f'line with {self.expected}. Copy the official file there again, or use another '
          'split.'
      )
    if index := [name for name in examples[0] if name.partition('/')[0] == 'idx']:
      ids = [tuple(example[name] for name in index) for example in examples]
      warn_of_shared_ids(path, ids, lines)
    return {name: [example[name] for example in examples] for name in examples[0]}

  def _numbered(self, row: Mapping[str, Any], number: int) -> tuple[int, list[Any]]:
    return number, list(self.parse(row, number))


@dataclasses.dataclass(frozen=True)
class LabelledTexts:
  """Makes the example of a line that holds texts and a label, for `Jsonl.parse`.

  Attributes:
    texts: fields that are copied.
    label_names: names of the labels; a line's label is one of them or its number, and -1
      where it is missing.
    numbers: fields with whole numbers, which are copied too.
  """

  texts: Sequence[str]
  label_names: Sequence[str]
  numbers: Sequence[str] = ()

  @property
  def expected(self) -> str:
    fields = ', '.join([*self.texts, *self.numbers])
    return f'{fields} and label (of {", ".join(self.label_names)})'

  def __call__(self, row: Mapping[str, Any], number: int) -> list[dict[str, Any]]:
    texts = {name: text_field(row, name) for name in self.texts}
    numbers = {name: whole_number(row, name) for name in self.numbers}
    label = self._label(row.get('label', -1))
    return [texts | numbers | {'label': label, 'idx': index_of(row, number)}]

  def _label(self, label: Any) -> int:
    if isinstance(label, str):
      return named_label(label, self.label_names)
    return label_number(label, len(self.label_names))


def named_label(label: str, label_names: Sequence[str]) -> int:
  """The number of a label that a file gives by its name."""
  if label not in label_names:
    raise ValueError(
        f'unknown label {label!r:.80}, expected one of {", ".join(label_names)} (or its number)'
    )
  return list(label_names).index(label)


def label_number(label: Any, num_labels: int = 2) -> int:
  """The number of a label that a file gives as such, or as true or false."""
  if not isinstance(label, int) or not -1 <= label < num_labels:
    raise ValueError(
        f'unknown label {label!r:.80}, expected one of {", ".join(map(str, range(num_labels)))} '
        '(or -1, no label)'
    )
  return int(label)


def index_of(row: Mapping[str, Any], number: int) -> int:
  """A row's `idx`, or its place in the file where it has none."""
  return whole_number(row, 'idx') if 'idx' in row else number - 1


def whole_number(row: Mapping[str, Any], name: str) -> int:
  """A field of a row, which must be a whole number of at most 32 bits, as in TFDS."""
  if not isinstance(row[name], int) or isinstance(row[name], bool):
    raise ValueError(f'{name!r} is {row[name]!r:.80}, not a whole number')
  if not -(2**31) <= row[name] < 2**31:
    raise ValueError(f'{name!r} is {row[name]!r:.80}, more than 32 bits hold')
  return row[name]


def text_field(row: Mapping[str, Any], name: str) -> str:
  """A field of a row, which must be a text."""
  if not isinstance(row[name], str):
    raise ValueError(f'{name!r} is not a text')
  return field_texts.whole_text(row[name], name)


def parse_jsonl(
    path: str, parse: Callable[[Mapping[str, Any], int], Any], expected: str
) -> list[Any]:
  """Returns `parse(row, line number)` of every line of a jsonl file, plain or gzipped.

  Args:
    path: the file.
    parse: may raise ValueError, TypeError or KeyError (a missing field).
    expected: the fields of a row, for the message.

  Raises:
    ValueError: if the file is damaged or lines are not what is expected; says how many, and
      what is wrong with the first five.
  """
  expected = f'Expected one JSON object a line with {expected}.'
  bad, parsed, number = BadLines(path, expected), [], 0
  try:
    with gzipped.open_bytes(path) as file:
      for number, line in enumerate(file, start=1):
        try:
          if not line.strip():
            raise ValueError('the line is empty')
          row = json.loads(line.decode())
          if not isinstance(row, dict):
            raise ValueError(f'{row!r:.40} is no object')
          parsed.append(parse(row, number))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
          bad.add(number, error)
  except gzipped.DAMAGED as error:
    raise ValueError(f'{path}, line {number + 1}: {error}. {expected}') from error
  bad.check(number)
  return parsed


def parse_csv(
    path: str, header: Sequence[str], parse: Callable[[Sequence[str]], Any]
) -> list[Any]:
  """Returns `parse(row)` of every row below the header of a csv file, plain or gzipped.

  Args:
    path: the file.
    header: names of the columns.
    parse: may raise ValueError.

  Raises:
    ValueError: if the file is damaged, its header another, or rows are not what is
      expected; says how many, and the lines on which the first five of them end.
  """
  expected = f'Expected comma-separated values below a first line {",".join(header)}.'
  text = decode_lines(path, read_bytes(path, expected), expected)
  rows = csv.reader(io.StringIO(text, newline=''), strict=True)
  try:
    if (first := next(rows, [])) != list(header):
      raise ValueError(f'the first line is {first!r:.240}')
  except (ValueError, csv.Error) as error:
    raise ValueError(f'{path}, line 1: {error}. {expected}') from error
  bad, parsed = BadLines(path, expected, 'row'), []
  for total in itertools.count():
    try:
      if (row := next(rows, None)) is None:
        break
      if len(row) != len(header):
        raise ValueError(f'{len(row)} fields instead of {len(header)}')
      parsed.append(parse(row))
    except (ValueError, csv.Error) as error:
      bad.add(rows.line_num, error)
  bad.check(total)
  return parsed


def read_bytes(path: str, expected: str) -> bytes:
  """The content of a file, plain or gzipped.

  Raises:
    ValueError: if the file is damaged; `expected` ends the message.
  """
  lines: list[bytes] = []
  try:
    with gzipped.open_bytes(path) as file:
      lines += file
  except gzipped.DAMAGED as error:
    raise ValueError(f'{path}, line {len(lines) + 1}: {error}. {expected}') from error
  return b''.join(lines)


class LocalFiles(seqio.DataSource):
  """Examples made of files below $PTJ_LOCAL_DATA, and nowhere else to be had.

  The files are looked for when data are asked for, not when a task is registered.
  """

  def __init__(self, files: Files, origin: str = ''):
    """`origin` says where to get the files; it ends the error where one is missing."""
    self._files = files
    self._origin = origin
    super().__init__(splits=())

  @property
  def files(self) -> Files:
    """What the examples are made of."""
    return self._files

  @property
  def supports_arbitrary_sharding(self) -> bool:
    return False

  @property
  def splits(self) -> Sequence[str]:
    return self._files.splits

  @property
  def declared_splits(self) -> Sequence[str]:
    """The splits that the data set has, whether or not their files are there."""
    return self._files.splits

  def local_names(self, split: str) -> list[str]:
    """Names below $PTJ_LOCAL_DATA that a split's files may have, there or not."""
    return [name for names in self.alternatives(split) for name in names]

  def alternatives(self, split: str) -> list[list[str]]:
    """For each file of a split the names that it may have, as they are looked for."""
    return [gzipped.with_gz(names) for names in self._names(split)]

  def local_files(self, split: str) -> dict[str, str] | None:
    """Name → path of the files that make a split, in order; None unless all are there."""
    found = [self._found(names) for names in self._names(split)]
    return dict(found) if found and all(found) else None

  def _names(self, split: str) -> Sequence[Sequence[str]]:
    return self._files.names(split) if split in self._files.splits else []

  def _found(self, names: Sequence[str]) -> tuple[str, str] | None:
    """The first of a file's names that is there, and its path."""
    folder = os.environ.get(LOCAL_DATA_VARIABLE)
    if not folder:
      return None
    if not os.path.isdir(folder):
      raise FileNotFoundError(
          f'{LOCAL_DATA_VARIABLE}={folder} is not a folder. Name the folder that holds '
          f'{names[0]}, or unset it to read from TensorFlow Datasets.'
      )
    for name in gzipped.with_gz(names):
      path = os.path.join(folder, name)
      if os.path.isfile(path):
        return name, path
    return None

  def num_input_examples(self, split: str) -> int | None:
    if files := self.local_files(split):
      columns = self._files.read(list(files.values()), split)
      return len(next(iter(columns.values())))
    return None

  def list_shards(self, split: str) -> Sequence[str]:
    return list((self.local_files(split) or {}).values())

  def require_files(self, split: str) -> list[str]:
    """Paths of the files that make a split.

    Raises:
      FileNotFoundError: if one is missing; says which and where to get it.
      ValueError: if there is no such split.
    """
    if files := self.local_files(split):
      return list(files.values())
    if split not in self._files.splits:
      raise ValueError(
          f'There is no split {split!r}, only {", ".join(self._files.splits)}. Slices of '
          'them are for data sets that come from TensorFlow Datasets.'
      )
    missing = [names for names in self._names(split) if not self._found(names)]
    folder = os.environ.get(LOCAL_DATA_VARIABLE)
    where = f'in {LOCAL_DATA_VARIABLE}={folder}' if folder else 'on this machine'
    raise FileNotFoundError(
        f'The split {split!r} needs {", ".join(" or ".join(names) for names in missing)} '
        f'(plain or .gz), not to be found {where}. Set {LOCAL_DATA_VARIABLE} to a folder '
        f'that holds what is missing. {self._origin}'
    )

  def get_dataset(
      self,
      split: str,
      shuffle: bool = True,
      seed: int | None = None,
      shard_info: seqio.ShardInfo | None = None,
  ) -> tf.data.Dataset:
    columns = self._files.read(self.require_files(split), split)
    dataset = tf.data.Dataset.from_tensor_slices(_features(columns))
    if shuffle:
      dataset = dataset.shuffle(len(dataset), seed=seed)
    if shard_info:
      dataset = dataset.shard(shard_info.num_shards, shard_info.index)
    return dataset


def _features(columns: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
  features: dict[str, Any] = {}
  for name, column in columns.items():
    parent, _, entry = name.rpartition('/')
    of_parent = features.setdefault(parent, {}) if parent else features
    of_parent[entry] = _tensor(column)
  return features


def _tensor(column: Sequence[Any]) -> tf.Tensor | tf.RaggedTensor:
  if isinstance(column[0], list):
    return tf.ragged.constant(column, tf.string)
  # The type is named, for TensorFlow takes any number of 32 bits where it can.
  return tf.constant(column, _DTYPES[type(column[0])])


class LocalOrTfds(LocalFiles):
  """The official files if PTJ_LOCAL_DATA has them, TensorFlow Datasets otherwise."""

  def __init__(self, tfds_name: str, files: Files):
    """`tfds_name` names data set, configuration and version ('super_glue/cb:1.0.2')."""
    self.tfds_name = tfds_name
    super().__init__(files)

  @property
  def _tfds(self) -> seqio.TfdsDataSource:
    # A new one each time: seqio's keeps the first folder that --tfds_data_dir names.
    return seqio.TfdsDataSource(self.tfds_name)

  @property
  def splits(self) -> Sequence[str]:
    local = [split for split in self._files.splits if self.local_files(split)]
    # Of a data set that several tasks share, this task may have only some.
    return local or tuple(s for s in self._tfds.splits if s in self._files.splits)

  def num_input_examples(self, split: str) -> int | None:
    if self.local_files(split):
      return super().num_input_examples(split)
    return self._tfds.num_input_examples(split)

  def list_shards(self, split: str) -> Sequence[str]:
    return super().list_shards(split) or self._tfds.list_shards(split)

  def get_dataset(
      self,
      split: str,
      shuffle: bool = True,
      seed: int | None = None,
      shard_info: seqio.ShardInfo | None = None,
  ) -> tf.data.Dataset:
    if self.local_files(split):
      return super().get_dataset(split, shuffle, seed, shard_info)
    if not tuple(self._tfds.splits) and _is_offline():
      named = self.local_names(split) or self.local_names(self._files.splits[0])
      raise ConnectionError(
          f'{self.tfds_name} is neither on this machine nor to be downloaded (no '
          f'network). Set {LOCAL_DATA_VARIABLE} to a folder that holds {named[0]}, or '
          '--tfds_data_dir to one where TensorFlow Datasets has prepared it.'
      )
    return self._tfds.get_dataset(split, shuffle, seed, shard_info)


def _is_offline() -> bool:
  """Whether a download must fail, which TFDS finds out after minutes of retries."""
  if urllib.request.getproxies():
    return False
  try:
    socket.getaddrinfo('storage.googleapis.com', 443)
  except OSError:
    return True
  return False
