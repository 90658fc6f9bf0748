"""Where the examples of tasks come from: official files on disk, else TFDS.

Set PTJ_LOCAL_DATA to a folder that holds the official jsonl files (SuperGLUE's zips
unpacked under `superglue/`, SST-2 under `sst2/`) and the tasks read those, without a
network. A file that is not there is looked for in TensorFlow Datasets.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

import seqio
import tensorflow as tf

from prompt_tuning_jax.data.provenance import LOCAL_DATA_VARIABLE

# Of the columns that are not text.
_DTYPES = {'label': tf.int64, 'idx': tf.int64}


@dataclasses.dataclass(frozen=True)
class Jsonl:
  """The official files of a data set and how their rows become those of TFDS.

  Attributes:
    folder: folder of the files below $PTJ_LOCAL_DATA.
    files: split → name of its file.
    texts: fields that are copied.
    label_names: names of the labels; a row's label is one of them or its number.
  """

  folder: str
  files: Mapping[str, str]
  texts: Sequence[str]
  label_names: Sequence[str]

  def read(self, path: str, split: str) -> dict[str, list[Any]]:
    """Reads a split's file as columns: the texts, `label` (-1 where missing) and `idx`.

    Raises:
      ValueError: if a line is not what is expected, or there is none; the file is named.
    """
    columns: dict[str, list[Any]] = {name: [] for name in (*self.texts, 'label', 'idx')}
    with open(path, encoding='utf-8') as file:
      for number, line in enumerate(file, start=1):
        try:
          row = json.loads(line)
          for name in self.texts:
            if not isinstance(row[name], str):
              raise ValueError(f'{name!r} is not a text')
            columns[name].append(row[name])
          columns['label'].append(self._label(row.get('label', -1)))
          index = row.get('idx', number - 1)
          if not isinstance(index, int):
            raise ValueError(f"'idx' is {index!r}, not a whole number")
          columns['idx'].append(index)
        except (ValueError, TypeError, KeyError) as error:
          reason = f'no field {error}' if isinstance(error, KeyError) else error
          raise ValueError(
              f'{path}, line {number}: {reason}. Expected one JSON object a line with '
              f'{", ".join(self.texts)} and label (of {", ".join(self.label_names)}).'
          ) from error
    if not columns['idx']:
      raise ValueError(
          f'{path}, the file of the split {split!r}, is empty. Expected one JSON object a '
          f'line with {", ".join(self.texts)} and label. Copy the official file there '
          'again, or use another split.'
      )
    return columns

  def _label(self, label: Any) -> int:
    if isinstance(label, str):
      if label not in self.label_names:
        raise ValueError(f'unknown label {label!r}')
      return list(self.label_names).index(label)
    if not -1 <= int(label) < len(self.label_names):
      raise ValueError(f'unknown label {label!r}')
    return int(label)


class LocalOrTfds(seqio.DataSource):
  """The official files if PTJ_LOCAL_DATA has them, TensorFlow Datasets otherwise.

  Which of the two is decided when data are asked for, not when a task is registered.
  """

  def __init__(self, tfds_name: str, jsonl: Jsonl):
    """`tfds_name` names data set, configuration and version ('super_glue/cb:1.0.2')."""
    self.tfds_name = tfds_name
    self._jsonl = jsonl
    super().__init__(splits=())

  @property
  def _tfds(self) -> seqio.TfdsDataSource:
    # A new one each time: seqio's keeps the first folder that --tfds_data_dir names.
    return seqio.TfdsDataSource(self.tfds_name)

  @property
  def supports_arbitrary_sharding(self) -> bool:
    return False

  @property
  def splits(self) -> Sequence[str]:
    local = [split for split in self._jsonl.files if self.local_file(split)]
    return local or tuple(self._tfds.splits)

  def local_name(self, split: str) -> str | None:
    """Name of a split's file below $PTJ_LOCAL_DATA, whether it is there or not."""
    name = self._jsonl.files.get(split)
    return os.path.join(self._jsonl.folder, name) if name else None

  def local_file(self, split: str) -> str | None:
    """Path of a split's file, None if there is none."""
    folder = os.environ.get(LOCAL_DATA_VARIABLE)
    name = self.local_name(split)
    if not folder or not name:
      return None
    if not os.path.isdir(folder):
      raise FileNotFoundError(
          f'{LOCAL_DATA_VARIABLE}={folder} is not a folder. Name the folder that holds '
          f'{name}, or unset it to read from TensorFlow Datasets.'
      )
    path = os.path.join(folder, name)
    return path if os.path.isfile(path) else None

  def num_input_examples(self, split: str) -> int | None:
    if path := self.local_file(split):
      return len(self._jsonl.read(path, split)['idx'])
    return self._tfds.num_input_examples(split)

  def list_shards(self, split: str) -> Sequence[str]:
    if path := self.local_file(split):
      return [path]
    return self._tfds.list_shards(split)

  def get_dataset(
      self,
      split: str,
      shuffle: bool = True,
      seed: int | None = None,
      shard_info: seqio.ShardInfo | None = None,
  ) -> tf.data.Dataset:
    if path := self.local_file(split):
      # Named, for TensorFlow guesses a type from the first values.
      dataset = tf.data.Dataset.from_tensor_slices({
          name: tf.constant(column, _DTYPES.get(name, tf.string))
          for name, column in self._jsonl.read(path, split).items()
      })
      if shuffle:
        dataset = dataset.shuffle(len(dataset), seed=seed)
      if shard_info:
        dataset = dataset.shard(shard_info.num_shards, shard_info.index)
      return dataset
    if not tuple(self._tfds.splits) and _is_offline():
      raise ConnectionError(
          f'{self.tfds_name} is neither on this machine nor to be downloaded (no '
          f'network). Set {LOCAL_DATA_VARIABLE} to a folder that holds '
          f'{self.local_name(split) or self._jsonl.folder}, or --tfds_data_dir to one '
          'where TensorFlow Datasets has prepared it.'
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
