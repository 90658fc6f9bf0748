"""`prompt-tuning prepare`: the official files of a data set as folders of TensorFlow Datasets.

What is written is what TFDS would write of the same files: its features, its keys and thus
its order of rows, its shards and its description of them, so that whatever reads TFDS reads
it, and a run on it sees the batches of a run on downloaded data. (Of MRPC, TFDS numbers the rows
of two splits together, from a file of its own: there keys, and so the order, differ.)

Every row is read back before a folder gets its name, so there is none that is not complete
and checked.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import io
import os
import re
import shutil
import socket
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf
import tensorflow_datasets as tfds
from prompt_tuning_jax.tasks import sources, super_glue

from prompt_tuning_jax.data import gzipped

# So many names of what a wrong folder holds are shown.
_LISTED_NAMES = 8

# So many rows are read back at once.
_READ_ROWS = 1_000

_Rows = Mapping[str, Sequence[Mapping[str, Any]]]


@dataclasses.dataclass(frozen=True)
class PreparedSplit:
  """A split that is in the folder now.

  Attributes:
    config: name of the TFDS configuration ('cb'); the data set's where it has none.
    split: name of the split.
    rows: how many rows it has.
    num_bytes: size of its records; 0 where only the files were checked.
    seconds: for reading its files, writing it and reading it back.
  """

  config: str
  split: str
  rows: int
  num_bytes: int
  seconds: float


@dataclasses.dataclass(frozen=True)
class _Config:
  """One configuration: its full name ('super_glue/cb:1.0.2') and what its splits are of."""

  tfds_name: str
  splits: Mapping[str, sources.Files]

  @property
  def folder(self) -> str:
    """Its folder below that of TensorFlow Datasets."""
    return self.tfds_name.replace(':', '/')


def prepare(
    data_set: str,
    source_dir: str,
    tfds_data_dir: str,
    *,
    configs: Sequence[str] | None = None,
    dry_run: bool = False,
    say: Callable[[str], None] = print,
) -> list[PreparedSplit]:
  """Writes a data set's official files as folders that `--tfds_data_dir` names.

  A split whose file is missing is left out, and said to be; bad input of one configuration
  does not keep the others from being written.

  Args:
    data_set: name in TFDS ('super_glue', 'glue', …) of one that a task here reads.
    source_dir: folder that holds the files, as below $PTJ_LOCAL_DATA (`superglue/BoolQ/…`)
      or without the first of these folders.
    tfds_data_dir: folder that receives them; made if need be.
    configs: configurations to prepare ('cb'); all of which there are files where None.
    dry_run: only reads and checks the files.
    say: receives the lines of the report.

  Returns:
    The splits, by configuration.

  Raises:
    FileNotFoundError: if there are no such files.
    ValueError: if there is no such data set or configuration, if lines cannot be read, if a
      folder is there already and differs, or if what was read back differs.
    OSError: if `tfds_data_dir` cannot be written.
  """
  started = time.perf_counter()
  source_dir, tfds_data_dir = map(os.path.expanduser, (source_dir, tfds_data_dir))
  if '://' in tfds_data_dir:
    raise ValueError(
        f'--tfds_data_dir {tfds_data_dir} is no folder of this machine. Name one that is, and '
        'copy what is in it afterwards.'
    )
  chosen = _chosen(data_set, configs)
  files, missing = _find(data_set, chosen, source_dir)
  made = [] if dry_run else _make_folder(tfds_data_dir, say)
  done: list[PreparedSplit] = []
  failed: dict[str, str] = {}
  try:
    for name, of_split in files.items():
      say(f'{name}: {", ".join(path for paths in of_split.values() for path in paths)}')
      try:
        done += _prepare_config(name, chosen[name], of_split, tfds_data_dir, dry_run, say)
      except ValueError as error:
        failed[name] = str(error)
  finally:
    for folder in made:
      # Only those that are still empty.
      with contextlib.suppress(OSError):
        os.rmdir(folder)
  for line in _table(done, time.perf_counter() - started):
    say(line)
  if missing:
    say('left out, for lack of their files:')
    for name in dict.fromkeys(name for name, _, _ in missing):
      lacking = (f'{split} ({file})' for of, split, file in missing if of == name)
      say(f'  {name}: {", ".join(lacking)}')
  if failed:
    raise ValueError(
        f'{len(failed)} of {len(files)} could not be prepared ({", ".join(failed)}).\n'
        + '\n'.join(failed.values())
    )
  if dry_run:
    say(f'nothing was written; without --dry_run these go to {tfds_data_dir}')
  else:
    say(f'to read them: --tfds_data_dir={tfds_data_dir}')
  return done


def data_sets() -> dict[str, dict[str, _Config]]:
  """The data sets that can be prepared, those of which tasks read local files or TFDS."""
  found: dict[str, dict[str, _Config]] = {}
  of_tasks = [seqio.TaskRegistry.get(name).source for name in seqio.TaskRegistry.names()]
  for source in [*of_tasks, super_glue.UNREPAIRED_WSC]:
    if isinstance(source, sources.LocalOrTfds) and getattr(source.files, 'is_complete', True):
      data_set, _, config = source.tfds_name.partition(':')[0].partition('/')
      configs = found.setdefault(data_set, {})
      before = configs.get(config or data_set, _Config(source.tfds_name, {}))
      # Tasks may share a configuration, each with some of its splits.
      splits = dict.fromkeys(source.files.splits, source.files) | before.splits
      in_order = sorted(splits, key=lambda s: (not s.startswith('train'), s.startswith('test')))
      splits = {split: splits[split] for split in in_order}
      configs[config or data_set] = dataclasses.replace(before, splits=splits)
  return found


def _chosen(data_set: str, configs: Sequence[str] | None) -> dict[str, _Config]:
  known = data_sets()
  _require([data_set], known, 'data set to prepare')
  if configs is None:
    return known[data_set]
  _require(configs, known[data_set], f'part of {data_set} (--tasks)')
  return {name: known[data_set][name] for name in dict.fromkeys(configs)}


def _require(names: Sequence[str], known: Mapping[str, Any], what: str) -> None:
  for name in names:
    if name not in known:
      near = difflib.get_close_matches(name, known, n=1)
      hint = f' Did you mean {near[0]}?' if near else ''
      raise ValueError(f'No {what} {name!r}.{hint} There are: {", ".join(sorted(known))}.')


def _find(
    data_set: str, chosen: Mapping[str, _Config], source_dir: str
) -> tuple[dict[str, dict[str, list[str]]], list[tuple[str, str, str]]]:
  """Looks for the files of every split.

  Returns:
    Paths by configuration and split; and (configuration, split, name of the file) of the
    splits that are not there.
  """
  if not os.path.isdir(source_dir):
    raise FileNotFoundError(
        f'--from {source_dir} is not a folder. Name the one that holds the official files '
        f'of {data_set}.'
    )
  tops = Counter(
      name.partition('/')[0]
      for config in data_sets()[data_set].values()
      for split, files in config.splits.items()
      for names in files.names(split)
      for name in names
  )
  tries = [
      _find_below(chosen, source_dir, top) for top in ('', tops.most_common(1)[0][0] + '/')
  ]
  found, missing = max(tries, key=lambda tried: sum(map(len, tried[0].values())))
  if not found:
    held = sorted(os.listdir(source_dir))
    listed = ', '.join(held[:_LISTED_NAMES]) + (', …' if held[_LISTED_NAMES:] else '')
    zipped = any(name.endswith('.zip') for name in held)
    raise FileNotFoundError(
        f'--from {source_dir} holds no file of {data_set}. Expected for example '
        f'{tries[0][1][0][2]} or {tries[1][1][0][2]} below it; it holds {listed or "nothing"}.'
        + (' Unpack the zip files there.' if zipped else '')
    )
  return found, missing


def _find_below(
    chosen: Mapping[str, _Config], source_dir: str, top: str
) -> tuple[dict[str, dict[str, list[str]]], list[tuple[str, str, str]]]:
  """Looks for the files below `source_dir`, without the folder `top` in their names."""
  found: dict[str, dict[str, list[str]]] = {}
  missing = []
  for config_name, config in chosen.items():
    for split, files in config.splits.items():
      paths = []
      for names in files.names(split):
        names = [name.removeprefix(top) for name in names]
        there = [
            path
            for path in (os.path.join(source_dir, name) for name in gzipped.with_gz(names))
            if os.path.isfile(path)
        ]
        if not there:
          missing.append((config_name, split, ' or '.join(names)))
          break
        paths.append(there[0])
      else:
        found.setdefault(config_name, {})[split] = paths
  return found, missing


def _make_folder(folder: str, say: Callable[[str], None]) -> list[str]:
  """Makes the folder and those above it; returns those that were not there, inmost first.

  What an interrupted run on this machine left there is removed.
  """
  made, above = [], os.path.abspath(folder)
  while not os.path.lexists(above):
    made.append(above)
    above = os.path.dirname(above)
  try:
    os.makedirs(folder, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()
  except OSError as error:
    raise OSError(
        f'--tfds_data_dir {folder} cannot be written: {error}. Name a folder that you may '
        'write to.'
    ) from error
  for name in os.listdir(folder):
    of_run = re.fullmatch(rf'\.prepare-{re.escape(socket.gethostname())}-(\d+)-.*', name)
    if of_run and not _is_running(int(of_run[1])):
      say(f'removing {name}, which an interrupted run left in {folder}')
      shutil.rmtree(os.path.join(folder, name), ignore_errors=True)
  return made


def _is_running(pid: int) -> bool:
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except OSError:
    pass
  return True


def _prepare_config(
    name: str,
    config: _Config,
    paths: Mapping[str, Sequence[str]],
    tfds_data_dir: str,
    dry_run: bool,
    say: Callable[[str], None],
) -> list[PreparedSplit]:
  clock = _Clock()
  rows: dict[str, list[dict[str, Any]]] = {}
  for split, of_split in paths.items():
    clock.turn_to(split)
    rows[split] = _read(config.splits[split], of_split, split)
  folder = os.path.join(tfds_data_dir, config.folder)
  sizes = dict.fromkeys(rows, 0)
  if os.path.lexists(folder):
    _require_equal(folder, rows, clock)
    sizes = _sizes(folder)
    say(f'  {folder} is there already, and the same')
  elif not dry_run:
    sizes = _write(config, rows, tfds_data_dir, clock)
  clock.turn_to('')
  return [
      PreparedSplit(name, split, len(rows[split]), sizes[split], clock.seconds[split])
      for split in rows
  ]


class _Clock:
  """The seconds that each split has taken, of which one is worked on at a time."""

  def __init__(self):
    self.seconds: Counter[str] = Counter()
    self._split, self._since = '', time.perf_counter()

  def turn_to(self, split: str) -> None:
    """Ends the time of the split before."""
    now = time.perf_counter()
    self.seconds[self._split] += now - self._since
    self._split, self._since = split, now


def _read(files: sources.Files, paths: Sequence[str], split: str) -> list[dict[str, Any]]:
  """The rows of a split; `idx/question` is the entry `question` of the feature `idx`."""
  columns = files.read(paths, split)
  rows = [
      dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
  ]
  unlabelled = sum(row.get('label') == -1 for row in rows)
  if unlabelled and not split.startswith('test'):
    warnings.warn(
        f'{", ".join(paths)}: {unlabelled:,} of {len(rows):,} rows of the split {split!r} have '
        'no label; they are kept, with -1.',
        stacklevel=2,
    )
  return rows


def _write(
    config: _Config, rows: _Rows, tfds_data_dir: str, clock: _Clock
) -> dict[str, int]:
  """Writes and checks a configuration under another name, then gives it its own.

  Returns:
    The bytes of each split.
  """
  prefix = f'.prepare-{socket.gethostname()}-{os.getpid()}-'
  folder = os.path.join(tfds_data_dir, config.folder)
  try:
    with tempfile.TemporaryDirectory(prefix=prefix, dir=tfds_data_dir) as unfinished:
      _write_with_tfds(config, rows, unfinished, clock)
      written = os.path.join(unfinished, config.folder)
      difference = _difference(written, rows, clock)
      if difference:
        raise ValueError(
            f'What TensorFlow Datasets wrote of {config.tfds_name} is not what was read: '
            f'{difference}. It was removed. Please report this.'
        )
      os.makedirs(os.path.dirname(folder), exist_ok=True)
      _place_defaults(config, unfinished, tfds_data_dir)
      try:
        os.rename(written, folder)
      except OSError:
        if not os.path.lexists(folder):
          raise
        # Another process has written it meanwhile.
        _require_equal(folder, rows, clock)
  except (RuntimeError, tf.errors.OpError) as error:
    # TFDS reports a full disk like this.
    raise OSError(
        f'--tfds_data_dir {tfds_data_dir}: {config.tfds_name} could not be written: {error}. '
        'Nothing of it was kept.'
    ) from error
  return _sizes(folder)


def _write_with_tfds(config: _Config, rows: _Rows, folder: str, clock: _Clock) -> None:
  """Lets the data set's own builder in TFDS write the rows, instead of downloading them."""
  name, _, version = config.tfds_name.partition(':')
  data_set, _, of_data_set = name.partition('/')
  builder = tfds.builder_cls(data_set)(
      data_dir=folder, version=version, **{'config': of_data_set} if of_data_set else {}
  )

  def generate(split: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    # TFDS asks for the splits one after the other, and writes one when its rows end.
    clock.turn_to(split)
    yield from zip(_keys(rows[split]), map(_nested, rows[split]), strict=True)

  # The one thing of the builder that is not to happen: its downloading.
  builder._split_generators = lambda dl_manager: {split: generate(split) for split in rows}
  shown = io.StringIO()
  tfds.display_progress_bar(False)
  try:
    with contextlib.redirect_stdout(shown):
      builder.download_and_prepare(
          download_dir=os.path.join(folder, 'downloads'),
          download_config=tfds.download.DownloadConfig(try_download_gcs=False),
      )
  finally:
    tfds.display_progress_bar(True)


def _keys(rows: Sequence[Mapping[str, Any]]) -> list[Any]:
  """The keys by which TFDS orders the rows; a second row of the same `idx` has another."""
  keys, seen = [], Counter()
  for place, row in enumerate(rows):
    parts = {name: value for name, value in row.items() if name.startswith('idx/')}
    if parts:
      # Questions of ReCoRD have numbers of their own; answers of MultiRC need all three.
      key = parts.get('idx/query', '_'.join(map(str, parts.values())))
    else:
      key = row.get('idx', place)
    seen[key] += 1
    keys.append(key if seen[key] == 1 else f'{key} #{seen[key]}')
  return keys


def _nested(row: Mapping[str, Any]) -> dict[str, Any]:
  nested: dict[str, Any] = {}
  for name, value in row.items():
    parent, _, entry = name.rpartition('/')
    (nested.setdefault(parent, {}) if parent else nested)[entry] = value
  return nested


def _place_defaults(config: _Config, unfinished: str, tfds_data_dir: str) -> None:
  """Moves what TFDS notes about all configurations of a data set to where it looks for it."""
  name = os.path.join(config.tfds_name.partition('/')[0], '.config')
  note, place = (os.path.join(above, name) for above in (unfinished, tfds_data_dir))
  if os.path.isdir(note) and not os.path.lexists(place):
    os.rename(note, place)


def _require_equal(folder: str, rows: _Rows, clock: _Clock) -> None:
  """Raises a ValueError if a folder that is there holds anything but these rows."""
  try:
    difference = _difference(folder, rows, clock)
  except Exception as error:  # What is damaged may raise anything.
    difference = f'it cannot be read ({str(error).splitlines()[0]:.200})'
  if difference:
    raise ValueError(
        f'{folder} is there already and is not what the files hold: {difference}. Remove that '
        'folder to prepare it again, or name another --tfds_data_dir.'
    )


def _difference(folder: str, rows: _Rows, clock: _Clock) -> str | None:
  """Reads a folder through TFDS and says where it differs from the rows; None: nowhere."""
  builder = tfds.builder_from_directory(folder)
  if set(builder.info.splits) != set(rows):
    return f'its splits are {", ".join(builder.info.splits)}, those of the files {", ".join(rows)}'
  for split, expected in rows.items():
    clock.turn_to(split)
    # TFDS keeps rows in an order of its own: what counts is which there are, how often.
    remaining = Counter(map(_digest, expected))
    for row in _rows_of(builder.as_dataset(split=split, shuffle_files=False)):
      digest = _digest(row)
      if not remaining[digest]:
        return f'the split {split!r} holds the row {row!r:.400}'
      remaining[digest] -= 1
    if lacking := +remaining:
      row = next(row for row in expected if _digest(row) in lacking)
      count = sum(lacking.values())
      return f'the split {split!r} lacks {count:,} rows such as {row!r:.400}'
  return None


def _rows_of(dataset: tf.data.Dataset) -> Iterator[dict[str, Any]]:
  """The rows of a TFDS data set in the form of `_read`; many at once, as that is faster."""
  for batch in dataset.ragged_batch(_READ_ROWS):
    columns = {
        f'{name}/{entry}' if entry else name: column
        for name, part in batch.items()
        for entry, column in (part if isinstance(part, Mapping) else {'': part}).items()
    }
    lists = [
        column.to_list() if isinstance(column, tf.RaggedTensor) else column.numpy().tolist()
        for column in columns.values()
    ]
    for values in zip(*lists, strict=True):
      yield dict(zip(columns, map(_plain, values), strict=True))


def _digest(row: Mapping[str, Any]) -> bytes:
  """A sum over the fields and values of a row, whether it came from a file or TFDS."""
  fields = sorted((name, _plain(value)) for name, value in row.items())
  return hashlib.blake2b(repr(fields).encode(), digest_size=16).digest()


def _plain(value: Any) -> Any:
  if isinstance(value, list):
    return [_plain(part) for part in value]
  if isinstance(value, bytes):
    return value.decode()
  # TFDS keeps 32 bits of a number with a fraction.
  return float(np.float32(value)) if isinstance(value, float) else value


def _sizes(folder: str) -> dict[str, int]:
  splits = tfds.builder_from_directory(folder).info.splits
  return {name: info.num_bytes for name, info in splits.items()}


def _table(done: Sequence[PreparedSplit], seconds: float) -> Iterator[str]:
  width = max([len('config'), *(len(split.config) for split in done)])
  yield f'\n{"config":{width}}  {"split":21} {"rows":>9} {"bytes":>13} {"seconds":>8}'
  for index, split in enumerate(done):
    is_first = index == 0 or done[index - 1].config != split.config
    size = f'{split.num_bytes:,}' if split.num_bytes else '–'
    yield (
        f'{split.config if is_first else "":{width}}  {split.split:21} {split.rows:>9,} '
        f'{size:>13} {split.seconds:>8.1f}'
    )
  rows = sum(split.rows for split in done)
  size = sum(split.num_bytes for split in done)
  yield f'{"total":{width}}  {"":21} {rows:>9,} {size:>13,} {seconds:>8.1f}'
