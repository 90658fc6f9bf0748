"""Tokenised tasks: read by index, kept in one plain file each.

seqio and TensorFlow are needed once, to tokenise a task (`seqio_source.py`). From
then on the examples come from a safetensors file: flat token arrays with offsets,
and a JSON manifest in the file's metadata that says what they are (task, split,
vocabulary, code, source files) and sums that are checked on reading.

    task = load_task('taskless_super_glue_cb_v102', 'train', vocabulary)
    task[0]            # {'inputs': array([...], int32), 'targets': array([...])}
    task.example(0)    # {'inputs_pretokenized': 'hypothesis: …', 'idx': 0, …}
    task.target(0)     # 1, what the metrics compare predictions with

A file can be made on one machine and used on another that has no TensorFlow:

    python -m prompt_tuning_jax.data.cache TASK SPLIT --vocabulary=spiece.model
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import urllib.parse
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prompt_tuning_jax.data import provenance, text_files
from prompt_tuning_jax.data.file_task import FileTask
from prompt_tuning_jax.data.target_prefix import with_target_prefix
from prompt_tuning_jax.data.tokenized_task import (
    FORMAT,
    CacheError,
    EmptySplitError,
    NoSplitError,
    TokenizedTask,
    make_manifest,
    seqio_is_installed,
)
from prompt_tuning_jax.data.vocabularies import open_vocabulary
from prompt_tuning_jax.data.vocabulary import Vocabulary
from prompt_tuning_jax.writing import check_local, written_whole

DEFAULT_TASK_MODULE = 'prompt_tuning_jax.tasks'

_logger = logging.getLogger(__name__)


def default_cache_dir() -> str:
  """Where tokenised tasks are kept: $PTJ_CACHE_DIR or a folder in the user's cache."""
  home = os.path.join('~', '.cache', 'prompt_tuning_jax', 'tokenized')
  return os.environ.get('PTJ_CACHE_DIR') or os.path.expanduser(home)


def _folder(cache_dir: str | None) -> str:
  folder = cache_dir or default_cache_dir()
  check_local(folder)
  return folder


def load_task(
    name: str | FileTask,
    split: str,
    vocabulary: Vocabulary,
    *,
    cache_dir: str | None = None,
    task_module: str = DEFAULT_TASK_MODULE,
    tfds_data_dir: str | None = None,
) -> TokenizedTask:
  """Loads a split of a seqio task, tokenised with a model's vocabulary.

  A current cache file is read without importing seqio or TensorFlow. Otherwise the
  task is tokenised through seqio and the file is written.

  Args:
    name: name of the seqio task, for example 'taskless_super_glue_cb_v102', or a task of
      files of one's own.
    split: name of the split.
    vocabulary: the model's vocabulary; it replaces the one the task was registered
      with.
    cache_dir: folder of the cache; default: `default_cache_dir()`.
    task_module: module whose import registers the task.
    tfds_data_dir: folder of TensorFlow Datasets, for tasks that read from it.

  Raises:
    FileNotFoundError: if there is no cache file and seqio is not installed.
    CacheError: if the cache file is damaged or out of date and seqio is not
      installed to make it again.
    ValueError: if there is no such task or split, or the split is empty.
  """
  if isinstance(name, FileTask):
    return _load_file_task(name, split, vocabulary, cache_dir)
  path = cache_path(name, split, vocabulary, cache_dir)
  make_it = (
      f'Make it on a machine that has seqio (pip install prompt_tuning_jax) with\n'
      f'  python -m prompt_tuning_jax.data.cache {name} {split} '
      f'--vocabulary={vocabulary.path} --extra_ids={vocabulary.extra_ids} '
      f'--task_module={task_module} --cache_dir={os.path.dirname(os.path.dirname(path))}'
      f'\nand carry the file here.'
  )
  if os.path.exists(path):
    try:
      task = TokenizedTask.read(path, vocabulary, task_module=task_module)
      _check_current(path, task.manifest, tfds_data_dir)
      return task
    except CacheError as error:
      if not seqio_is_installed():
        raise CacheError(f'{error} {make_it}') from error
      if not isinstance(error, _OutOfDateError):
        warnings.warn(f'{error} It is made again.', stacklevel=2)
      _logger.info('Tokenising %s, split %s, again: %s', name, split, error)
  elif not seqio_is_installed():
    raise FileNotFoundError(
        f'No tokenised {name}, split {split!r}: expected at {path}, and seqio is not '
        f'installed to make it. {make_it}'
    )
  from prompt_tuning_jax.data import seqio_source

  task = seqio_source.tokenize_task(
      name, split, vocabulary, task_module=task_module, tfds_data_dir=tfds_data_dir
  )
  _write_if_possible(path, lambda: task.save(path))
  return task


def load_task_or_mixture(
    name: str | FileTask,
    split: str,
    vocabulary: Vocabulary,
    *,
    cache_dir: str | None = None,
    task_module: str = DEFAULT_TASK_MODULE,
    tfds_data_dir: str | None = None,
    target_prefix: str | None = None,
) -> list[tuple[TokenizedTask, float]]:
  """Loads a task, or the tasks of a seqio mixture with their sampling rates.

  Takes the arguments of `load_task` and raises what it raises. What a mixture is
  made of is cached too, so that neither seqio nor TensorFlow is needed later. Of a
  mixture only the tasks that have the split are loaded, as seqio does: one may be there
  to train on, another to evaluate on. Tasks of whose split the files at hand hold nothing
  are left out too, with a warning that names them.

  Args:
    target_prefix: what stands before every target (`target_prefix.py`); the cache holds the
      targets without it.

  Returns:
    Pairs (task, rate); one pair with rate 1 for a plain task. Rates are relative.
  """
  kwargs: dict[str, Any] = dict(
      cache_dir=cache_dir, task_module=task_module, tfds_data_dir=tfds_data_dir
  )

  def prefixed(tasks: list[tuple[TokenizedTask, float]]) -> list[tuple[TokenizedTask, float]]:
    return [(with_target_prefix(task, target_prefix), rate) for task, rate in tasks]

  if isinstance(name, FileTask):
    return prefixed([(load_task(name, split, vocabulary, **kwargs), 1.0)])
  # seqio keeps one namespace for tasks and mixtures, so at most one of these exists.
  path = os.path.join(_folder(cache_dir), _quoted(name), 'mixture.json')
  mixture = _read_mixture(path)
  is_cached_task = os.path.exists(cache_path(name, split, vocabulary, cache_dir))
  if mixture is None and not is_cached_task and seqio_is_installed():
    from prompt_tuning_jax.data import seqio_source

    mixture = seqio_source.mixture_members(name, task_module)
    if mixture is not None:
      text = json.dumps({'format': FORMAT, **mixture}, indent=1)
      _write_if_possible(
          path, lambda: _write_text(path, text)
      )
  if mixture is None:
    return prefixed([(load_task(name, split, vocabulary, **kwargs), 1.0)])
  loaded, empty = [], {}
  for member, rate in mixture['members']:
    splits = mixture['splits'].get(member)
    if splits is not None and split.partition('[')[0] not in splits:
      continue
    try:
      loaded.append((load_task(member, split, vocabulary, **kwargs), float(rate)))
    except EmptySplitError as error:
      empty[member] = error
    except NoSplitError:
      # Where the splits are known the task has this one, and its file is missing.
      if splits is not None:
        raise
  if not loaded:
    if empty:
      raise next(iter(empty.values()))
    raise NoSplitError(
        f'No task of the mixture {name} has a split {split!r}. Its tasks: '
        f'{", ".join(member for member, _ in mixture["members"])}.'
    )
  if empty:
    warnings.warn(
        f'{name}, split {split!r}: {len(empty)} of its {len(empty) + len(loaded)} tasks have '
        f'no examples and are left out: {", ".join(empty)}. {next(iter(empty.values()))}',
        stacklevel=2,
    )
  return prefixed(loaded)


def _write_text(path: str, text: str) -> None:
  with written_whole(path) as unfinished:
    Path(unfinished).write_text(text, encoding='utf-8')


def load_files(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    vocabulary: Vocabulary,
    form: text_files.Form,
    *,
    name: str | None = None,
    split: str = 'train',
    cache_dir: str | None = None,
) -> TokenizedTask:
  """Loads local text, from the cache as long as the files stay as they are.

  See `TokenizedTask.from_text_files` and `from_jsonl`, which say what the lines hold.
  """
  if isinstance(paths, (str, os.PathLike)):
    paths = [paths]
  paths = [os.path.abspath(os.fspath(path)) for path in paths]
  if not paths:
    raise ValueError('No text files were named; give at least one path.')
  for path in paths:
    if not os.path.isfile(path):
      raise FileNotFoundError(f'No text file {path}.')
  name = name or os.path.basename(paths[0]).partition('.')[0]
  # Files of one name may lie in several folders, so the folders are part of the key.
  key = hashlib.sha256('\0'.join(paths).encode()).hexdigest()[:8]
  cached = cache_path(f'{form.name}-{name}-{key}', split, vocabulary, cache_dir)
  task = _read_if_current(cached, vocabulary)
  if task is None:
    # Described before it is read: a file that grows meanwhile counts as changed.
    source = provenance.describe_files(paths)
    arrays, num_examples, skipped = text_files.tokenize(paths, vocabulary, form)
    manifest = make_manifest(
        name,
        split,
        vocabulary,
        form.features,
        num_examples,
        source=source,
        code=provenance.describe_modules([text_files.__name__, *provenance.VOCABULARY_CODE]),
    )
    task = TokenizedTask(manifest | {'skipped': skipped}, arrays, vocabulary)
    _write_if_possible(cached, lambda: task.save(cached))
  _warn_of_skipped(task)
  return task


def _load_file_task(
    task: FileTask, split: str, vocabulary: Vocabulary, cache_dir: str | None
) -> TokenizedTask:
  """A split of a task of files, from the cache as long as they and its settings stay."""
  settings = json.dumps([task.description(), task.paths(split)], sort_keys=True)
  key = hashlib.sha256(settings.encode()).hexdigest()[:8]
  cached = cache_path(f'files-{task.name}-{key}', split, vocabulary, cache_dir)
  loaded = _read_if_current(cached, vocabulary)
  if loaded is None:
    loaded = task.tokenize(split, vocabulary)
    _write_if_possible(cached, lambda: loaded.save(cached))
  _warn_of_skipped(loaded)
  return loaded


def _read_if_current(path: str, vocabulary: Vocabulary) -> TokenizedTask | None:
  """A tokenised task of local files; None if it is to be made (again)."""
  if not os.path.exists(path):
    return None
  try:
    task = TokenizedTask.read(path, vocabulary)
    _check_current(path, task.manifest)
    return task
  except CacheError as error:
    if not isinstance(error, _OutOfDateError):
      warnings.warn(f'{error} It is made again.', stacklevel=4)
    return None


def _warn_of_skipped(task: TokenizedTask) -> None:
  skipped = task.manifest['skipped']
  if skipped['count']:
    warnings.warn(
        f'{skipped["count"]:,} of {skipped["lines"]:,} lines of {task.name} were skipped: '
        + '; '.join(skipped['first'])
        + (' …' if skipped['count'] > len(skipped['first']) else ''),
        stacklevel=4,
    )


def cache_path(
    name: str, split: str, vocabulary: Vocabulary, cache_dir: str | None = None
) -> str:
  """The file in which a tokenised task is kept: one for each split and vocabulary."""
  return os.path.join(
      _folder(cache_dir),
      _quoted(name),
      f'{_quoted(split)}-{vocabulary.fingerprint[:12]}.safetensors',
  )


class _OutOfDateError(CacheError):
  """The file is whole, but what it was made from has changed."""


def _check_current(
    path: str, manifest: dict[str, Any], tfds_data_dir: str | None = None
) -> None:
  change = provenance.code_change(manifest['code']) or provenance.source_change(
      manifest['source'], tfds_data_dir
  )
  if change:
    raise _OutOfDateError(f'{path} is out of date: {change}.')


def _write_if_possible(path: str, write: Callable[[], None]) -> None:
  """Writes to the cache; a full or read-only disk costs the cache, not the run."""
  try:
    write()
  except OSError as error:
    warnings.warn(
        f'The tokenised task cannot be kept at {path} ({error}); it will be tokenised '
        'again next time. Name a writable folder with PTJ_CACHE_DIR.',
        stacklevel=4,
    )


def _read_mixture(path: str) -> dict[str, Any] | None:
  """Members and splits of a cached mixture; None if there is none that is current."""
  if not os.path.isfile(path):
    return None
  try:
    with open(path, encoding='utf-8') as file:
      mixture = json.load(file)
    current = mixture['format'] == FORMAT and not provenance.code_change(
        mixture['code']
    )
    members = [(str(name), float(rate)) for name, rate in mixture['members']]
    splits = dict(mixture.get('splits', {}))
  except (ValueError, KeyError, TypeError) as error:
    warnings.warn(f'{path} is damaged and is ignored ({error}).', stacklevel=3)
    return None
  is_usable = current or not seqio_is_installed()
  return {'members': members, 'splits': splits} if is_usable else None


def _quoted(name: str) -> str:
  """A name as part of a path; slices such as train[:90%] keep their own file."""
  return urllib.parse.quote(name, safe='')


def main(argv: Sequence[str] | None = None) -> None:
  """Tokenises splits of a task or mixture into the cache and prints the files."""
  parser = argparse.ArgumentParser(
      prog='python -m prompt_tuning_jax.data.cache', description=main.__doc__
  )
  parser.add_argument('task', help='name of a seqio task or mixture')
  parser.add_argument('split', nargs='+', help='one or several splits')
  parser.add_argument('--vocabulary', required=True, help="SentencePiece model file, or 'bytes'")
  parser.add_argument('--extra_ids', type=int, default=100, help='number of sentinels')
  parser.add_argument('--task_module', default=DEFAULT_TASK_MODULE)
  parser.add_argument('--tfds_data_dir')
  parser.add_argument('--cache_dir')
  flags = parser.parse_args(argv)
  vocabulary = open_vocabulary(flags.vocabulary, flags.extra_ids)
  for split in flags.split:
    tasks = load_task_or_mixture(
        flags.task,
        split,
        vocabulary,
        cache_dir=flags.cache_dir,
        task_module=flags.task_module,
        tfds_data_dir=flags.tfds_data_dir,
    )
    for task, _ in tasks:
      path = cache_path(task.name, split, vocabulary, flags.cache_dir)
      print(f'{task.name} {split}: {len(task):,} examples in {path}')


if __name__ == '__main__':
  main()


def describe_data(
    task: str | FileTask, tasks: Sequence[tuple[TokenizedTask, float]]
) -> dict[str, Any]:
  """How many examples a run trains on, with their weights, and what files of one's own hold."""
  found: dict[str, Any] = {
      'examples': {f'{one.name}/{one.split}': [len(one), weight] for one, weight in tasks}
  }
  if isinstance(task, FileTask):
    # They are edited more often than data sets are.
    ((of_task, _),) = tasks
    found['files'] = [file['sha256'] for file in of_task.manifest['source']['files']]
  return found
