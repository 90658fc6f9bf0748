"""Tokenising seqio tasks: the one place of the library that needs seqio.

seqio brings TensorFlow, which takes seconds to import, so this happens inside the
functions. What they return is plain data; see `cache.py` for who asks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import importlib
import os
import sys
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from prompt_tuning_jax.data import provenance
from prompt_tuning_jax.data.byte_vocabulary import ByteVocabulary
from prompt_tuning_jax.data.tokenized_task import NoSplitError, TokenizedTask
from prompt_tuning_jax.data.vocabulary import Vocabulary

# So many names are listed where an unknown one was asked for.
_LISTED_NAMES = 40


@functools.cache
def import_seqio() -> Any:
  """Imports seqio, quietly, and keeps TensorFlow off the accelerators.

  Raises:
    ImportError: if seqio is not installed.
  """
  # Without this TFDS looks for Google's metadata server for a minute elsewhere.
  os.environ.setdefault('NO_GCE_CHECK', 'true')
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
  try:
    with _without_stderr(), warnings.catch_warnings():
      warnings.simplefilter('ignore')
      import seqio
      import tensorflow as tf

      try:
        tf.config.set_visible_devices([], 'GPU')
      except RuntimeError:
        # Somebody has started TensorFlow already, and decides about its devices.
        pass
  except ImportError as error:
    raise ImportError(
        f'Tokenising a task needs seqio ({error}): pip install seqio. A task that was '
        'tokenised on another machine needs only its cache file.'
    ) from error
  return seqio


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
  """Silences what TensorFlow's C++ code prints while it is being imported."""
  sys.stderr.flush()
  kept = os.dup(2)
  with open(os.devnull, 'wb') as nowhere:
    os.dup2(nowhere.fileno(), 2)
  try:
    yield
  finally:
    os.dup2(kept, 2)
    os.close(kept)


def tokenize_task(
    name: str,
    split: str,
    vocabulary: Vocabulary,
    *,
    task_module: str,
    tfds_data_dir: str | None = None,
) -> TokenizedTask:
  """Runs a task's preprocessors on a split, untrimmed and in a fixed order.

  Every feature is tokenised with `vocabulary` instead of the vocabulary that the task
  was registered with, so that one task serves all models.

  Args:
    name: name of the seqio task.
    split: name of the split.
    vocabulary: the model's vocabulary.
    task_module: module whose import registers the task.
    tfds_data_dir: folder of TensorFlow Datasets.

  Raises:
    ImportError: if seqio or the task's module cannot be imported.
    ValueError: if there is no such task or split, or the split is empty.
  """
  seqio = import_seqio()
  task = _get_task(name, task_module)
  with _tfds_data_dir(seqio, tfds_data_dir):
    splits = tuple(_splits(task))
    # A TFDS data set that is not prepared yet does not know its splits.
    if splits and split.partition('[')[0] not in splits:
      nearest = difflib.get_close_matches(split, splits, n=1)
      hint = f' Did you mean {nearest[0]!r}?' if nearest else ''
      raise NoSplitError(
          f'{name} has no split {split!r}.{hint} Its splits: {", ".join(splits)}.'
      )
    bound = task.replace(output_features=_with_vocabulary(seqio, task, vocabulary))
    dataset = bound.get_dataset(
        sequence_length=None,
        split=split,
        shuffle=False,
        seed=0,
        try_in_mem_cache=False,
    )
    examples = list(dataset.as_numpy_iterator())
    source = _describe_source(seqio, task.source, split)
  if not examples:
    raise ValueError(
        f'{name}, split {split!r}, is empty: there is nothing to train on or to score. '
        f'Its splits: {", ".join(splits)}.'
    )
  functions = _functions(task)
  return TokenizedTask.from_examples(
      examples,
      vocabulary,
      name=name,
      split=split,
      features=[feature for feature in bound.output_features if feature in examples[0]],
      postprocess_fn=functions['postprocess_fn'],
      metric_fns=functions['metric_fns'],
      source=source,
      code=_code_of_task(task, task_module),
  )


def task_functions(name: str, task_module: str) -> dict[str, Any]:
  """The `postprocess_fn` and `metric_fns` that a task was registered with."""
  return _functions(_get_task(name, task_module))


def mixture_members(name: str, task_module: str) -> dict[str, Any] | None:
  """What a mixture is made of, as plain data; None if it is a task.

  Returns:
    `members`, pairs (task, rate); `splits`, the splits of each task or None where only its
    source knows them; `code`, the sums of the modules.

  Raises:
    ImportError: if seqio or `task_module` cannot be imported.
  """
  seqio = import_seqio()
  _import_task_module(task_module)
  if name not in seqio.MixtureRegistry.names():
    return None
  mixture = seqio.MixtureRegistry.get(name)
  return {
      'members': [(task.name, float(mixture.get_rate(task))) for task in mixture.tasks],
      'splits': {task.name: _declared_splits(task.source) for task in mixture.tasks},
      'code': provenance.describe_modules(_loaded_below(task_module)),
  }


def registered(task_module: str) -> list[dict[str, Any]]:
  """All tasks and mixtures that a module registers, as plain data; no data are read.

  Returns:
    For each, sorted by name: `name`, `family` (the module that registers it, by its last
    name), `splits` (those it declares; None where only its source knows them), and
    `classes` (texts; True where they are only known from its files) or None for free text;
    of a mixture also `members`.

  Raises:
    ImportError: if seqio or `task_module` cannot be imported.
  """
  seqio = import_seqio()
  _import_task_module(task_module)
  found = {}
  for name in sorted(seqio.TaskRegistry.names()):
    task = seqio.TaskRegistry.get(name)
    found[name] = {
        'name': name,
        'family': _family(task),
        'splits': _declared_splits(task.source),
        'classes': _classes(task.postprocessor),
    }
  for name in sorted(seqio.MixtureRegistry.names()):
    members = [task.name for task in seqio.MixtureRegistry.get(name).tasks]
    splits = [found[member]['splits'] or () for member in members]
    found[name] = {
        'name': name,
        'family': found[members[0]]['family'],
        'splits': list(dict.fromkeys(split for some in splits for split in some)) or None,
        'classes': None,
        'members': members,
    }
  return list(found.values())


def _family(task: Any) -> str:
  """The last name of the module that registers a task."""
  if task.source_info and task.source_info.file_path:
    return os.path.splitext(os.path.basename(task.source_info.file_path))[0]
  own = [_module_of(step) for step in task.preprocessors]
  own = [name for name in own if name.partition('.')[0] != 'seqio']
  return own[0].rpartition('.')[-1] if own else 'others'


def _classes(postprocessor: Any) -> list[str] | bool | None:
  classes = getattr(postprocessor, 'keywords', {}).get('label_classes')
  # Other sequences may read files when they are looked at.
  return list(classes) if isinstance(classes, (list, tuple)) else classes is not None or None


def _declared_splits(source: Any) -> list[str] | None:
  # Not `source.splits`, which lists the files that are there or looks in the network.
  return list(getattr(source, 'declared_splits', source._splits)) or None


def _get_task(name: str, task_module: str) -> Any:
  seqio = import_seqio()
  _import_task_module(task_module)
  if name in seqio.TaskRegistry.names():
    return seqio.TaskRegistry.get(name)
  if name in seqio.MixtureRegistry.names():
    members = ', '.join(task.name for task in seqio.MixtureRegistry.get(name).tasks)
    raise ValueError(f'{name} is a mixture of {members}, and one task is needed here. Name one.')
  known = sorted({*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()})
  nearest = difflib.get_close_matches(name, known, n=1)
  hint = f' Did you mean {nearest[0]!r}?' if nearest else ''
  listed = ', '.join(known[:_LISTED_NAMES]) + (' …' if known[_LISTED_NAMES:] else '')
  raise ValueError(
      f'No task or mixture {name!r} (MIXTURE_OR_TASK_NAME).{hint} {task_module} '
      f'(MIXTURE_OR_TASK_MODULE) registers: {listed or "nothing"}.'
  )


def _import_task_module(task_module: str) -> None:
  try:
    importlib.import_module(task_module)
  except ModuleNotFoundError as error:
    remedy = 'Give its dotted name, and start where Python finds it.'
    if task_module.startswith('prompt_tuning.'):
      remedy = "The original code's tasks are among this library's own: leave it out."
    raise ImportError(
        f'Cannot import the module {task_module!r} that should register the task '
        f'(MIXTURE_OR_TASK_MODULE): {error}. {remedy}'
    ) from error


@contextlib.contextmanager
def _tfds_data_dir(seqio: Any, folder: str | None) -> Iterator[None]:
  """Points TFDS to a folder for as long as it lasts; None leaves it alone."""
  if folder:
    seqio.set_tfds_data_dir_override(folder)
  try:
    yield
  finally:
    if folder:
      seqio.set_tfds_data_dir_override(None)


def _splits(task: Any) -> Iterable[str]:
  # Not `task.splits`, which refuses a data set that is yet to be downloaded.
  return task.source.splits or ()


def _with_vocabulary(seqio: Any, task: Any, vocabulary: Vocabulary) -> dict[str, Any]:
  if isinstance(vocabulary, ByteVocabulary):
    of_model = seqio.ByteVocabulary(vocabulary.extra_ids)
  else:
    of_model = seqio.SentencePieceVocabulary(vocabulary.path, vocabulary.extra_ids)
  return {
      name: feature
      if isinstance(feature.vocabulary, seqio.PassThroughVocabulary)
      else dataclasses.replace(feature, vocabulary=of_model)
      for name, feature in task.output_features.items()
  }


def _functions(task: Any) -> dict[str, Any]:
  if task.predict_with_aux_metric_fns:
    warnings.warn(
        f'{task.name} has metrics over what else a model puts out beside its predictions; they '
        'are left out.',
        stacklevel=3,
    )
  return {
      'postprocess_fn': task.postprocessor,
      'metric_fns': [*task.predict_metric_fns, *task.score_metric_fns],
  }


def _describe_source(seqio: Any, source: Any, split: str) -> dict[str, Any]:
  """Where a split came from, with the files themselves where they are on this disk."""
  if hasattr(source, 'local_files'):
    files = source.local_files(split)
    if files:
      tfds_name = getattr(source, 'tfds_name', None)
      return provenance.describe_local(tfds_name, files, source.alternatives(split))
    names = source.local_names(split)
    return provenance.describe_tfds(source.tfds_name, names, _shards(source, split))
  if isinstance(source, seqio.TfdsDataSource):
    return provenance.describe_tfds(source.tfds_dataset.name, (), _shards(source, split))
  if isinstance(source, seqio.FileDataSource):
    paths = source.list_shards(split)
    if all(os.path.isfile(path) for path in paths):
      return provenance.describe_files(paths)
  return {'description': repr(source), 'files': []}


def _shards(source: Any, split: str) -> list[str]:
  """The files of a split in the folder of TFDS."""
  # seqio keeps what it knew of a data set before that was downloaded: nothing.
  return list(source.list_shards(split)) if source.splits else []


def _code_of_task(task: Any, task_module: str) -> dict[str, str]:
  """Sums of the modules on which the task's examples depend.

  A task that says where it was registered depends on that module and on those of its
  functions; any other may depend on whatever its task module loads.
  """
  steps = [*task.preprocessors, task.postprocessor, type(task.source)]
  names = {_module_of(step) for step in steps if step is not None}
  file = task.source_info and task.source_info.file_path
  registered_by = [
      name
      for name, module in list(sys.modules.items())
      if file and getattr(module, '__file__', None) == file
  ]
  names.update(registered_by or _loaded_below(task_module))
  names = _with_helpers(names, _loaded_below(task_module))
  own = {n for n in names if n.partition('.')[0] not in ('seqio', 'tensorflow')}
  return provenance.describe_modules(own)


def _with_helpers(names: set[str], candidates: Iterable[str]) -> set[str]:
  """Adds the candidates from which the modules import, and theirs in turn."""
  candidates = set(candidates)
  found: set[str] = set()
  while names - found:
    name = (names - found).pop()
    found.add(name)
    for value in vars(sys.modules[name]).values() if name in sys.modules else ():
      is_module = isinstance(value, types.ModuleType)
      origin = value.__name__ if is_module else getattr(value, '__module__', None)
      if origin in candidates:
        names = names | {origin}
  return found


def _module_of(function: Callable[..., Any]) -> str:
  while isinstance(function, functools.partial):
    function = function.func
  return getattr(function, '__module__', None) or type(function).__module__


def _loaded_below(task_module: str) -> list[str]:
  below = task_module + '.'
  return [name for name in sys.modules if name == task_module or name.startswith(below)]
