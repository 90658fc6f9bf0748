"""One split of a task as token ids, read by index; what the cache keeps in a file."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from prompt_tuning_jax.data import array_file, functions, labels, provenance, text_files
from prompt_tuning_jax.data.vocabulary import Vocabulary
from prompt_tuning_jax.json_files import as_json

# Raised when what the file holds, or how, changes: 2 counts the examples without a label, 3 has
# seqio's ids behind a sentinel and the metrics of its tasks that take scores.
FORMAT = 3


class CacheError(ValueError):
  """A cached task cannot be used: damaged, of another format, or out of date."""


class NoSplitError(ValueError):
  """A task has no split of the name that was asked for."""


class EmptySplitError(NoSplitError):
  """A task has a split of that name, but the files at hand hold nothing of it."""


class TokenizedTask:
  """The tokenised examples of one split of one task, untrimmed, read by index.

  Attributes:
    name: name of the task.
    split: name of the split.
    manifest: what is known of the data, as plain data.
    vocabulary: the vocabulary of the token ids.
  """

  def __init__(
      self,
      manifest: dict[str, Any],
      arrays: Mapping[str, np.ndarray],
      vocabulary: Vocabulary,
      *,
      task_module: str | None = None,
  ):
    """Use `load_task` or one of the `from_…` constructors instead.

    Args:
      manifest: see `manifest`.
      arrays: `<feature>/tokens` (int32, flat) and `<feature>/offsets` (int64) for
        every feature; `rows/json` and `rows/offsets` with the raw fields.
      vocabulary: the vocabulary of the token ids.
      task_module: module that the caller named as the one that registers the task;
        it may be imported to find metrics that are not part of this library.
    """
    self.manifest = manifest
    self.vocabulary = vocabulary
    self._arrays = arrays
    self._task_module = task_module
    self._live_functions: dict[str, Any] | None = None

  name = property(lambda self: self.manifest['task'])
  split = property(lambda self: self.manifest['split'])

  def __repr__(self) -> str:
    return f'TokenizedTask({self.name!r}, {self.split!r}, {len(self):,} examples)'

  @property
  def features(self) -> tuple[str, ...]:
    """Names of the tokenised features, usually ('inputs', 'targets')."""
    return tuple(self.manifest['features'])

  @property
  def vocabulary_fingerprint(self) -> str:
    """Fingerprint of the vocabulary that made the ids."""
    return self.manifest['vocabulary']['fingerprint']

  def __len__(self) -> int:
    return self.manifest['num_examples']

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    """Token ids of one example, 1-D int32 for each feature."""
    index = self._checked(index)
    return {name: self._tokens(name, index) for name in self.features}

  def _checked(self, index: int) -> int:
    if not 0 <= index < len(self):
      raise IndexError(
          f'{self.name}, split {self.split!r}, has examples 0 to {len(self) - 1}; '
          f'example {index} was asked for.'
      )
    return int(index)

  def _tokens(self, feature: str, index: int) -> np.ndarray:
    start, end = self._arrays[f'{feature}/offsets'][index : index + 2]
    return self._arrays[f'{feature}/tokens'][start:end]

  def flat_tokens(self, feature: str) -> tuple[np.ndarray, np.ndarray]:
    """All ids of a feature, one after the other, and the n + 1 offsets of examples."""
    self._check_feature(feature)
    return self._arrays[f'{feature}/tokens'], self._arrays[f'{feature}/offsets']

  def _check_feature(self, feature: str) -> None:
    if feature not in self.features:
      raise ValueError(
          f'{self.name} has no feature {feature!r}; it has {", ".join(self.features)}.'
      )

  def _row(self, index: int) -> list[Any]:
    index = self._checked(index)
    if 'rows/json' not in self._arrays:
      return [{}, None]
    start, end = self._arrays['rows/offsets'][index : index + 2]
    return json.loads(self._arrays['rows/json'][start:end].tobytes())

  def example(self, index: int) -> dict[str, Any]:
    """The example's raw fields: texts before tokenising, idx and the like."""
    return self._row(index)[0]

  def text(self, feature: str, index: int) -> str:
    """A feature as text, decoded where the task has only its ids."""
    text = self.example(index).get(f'{feature}_pretokenized')
    return self.vocabulary.decode(self._tokens(feature, index)) if text is None else text

  def target(self, index: int) -> Any:
    """What the metrics compare a prediction with: the postprocessed target."""
    self.require_labels()
    return self._row(index)[1]

  @property
  def has_labels(self) -> bool:
    """False where no example of the split has a label (the test sets of SuperGLUE)."""
    return self.manifest['unlabelled']['count'] < len(self)

  def require_labels(self) -> None:
    """Raises ValueError unless every example has a label.

    Without one an example cannot be scored, and would teach the answer `<unk>`.
    """
    labels.require(self.manifest)

  @property
  def label_classes(self) -> list[str] | None:
    """The texts to choose from in a classification task, None where there are none."""
    return self.manifest['label_classes']

  @property
  def target_prefix(self) -> str:
    """What stands before every target (`target_prefix.py`), '' where nothing does."""
    return self.manifest.get('target_prefix', '')

  @functools.cached_property
  def postprocess_fn(self) -> Callable[..., Any] | None:
    """`(prediction text, example=…, is_target=…) → value that metrics compare`."""
    if self.manifest['postprocess_fn'] is None:
      return None
    return self._function('postprocess_fn', self.manifest['postprocess_fn'])

  @functools.cached_property
  def metric_fns(self) -> list[Callable[..., Any]]:
    """The task's metrics, each `(targets, predictions) → {name: value}`."""
    return [
        self._function('metric_fns', description, position)
        for position, description in enumerate(self.manifest['metric_fns'])
    ]

  def _function(
      self, kind: str, description: dict[str, Any], position: int | None = None
  ) -> Callable[..., Any]:
    """The task's own function: live if built here, else by name, else from seqio."""
    if self._live_functions is None:
      if functions.is_trusted(description):
        return functions.resolve(description)
      # Importing is fine here: the module was named by the caller, not by the file.
      if self._task_module is None or not seqio_is_installed():
        raise ValueError(
            f'{self.name} uses {description["function"]}, which is not part of this '
            'library'
            + (f' ({description["problem"]})' if 'problem' in description else '')
            + '. It can be used only where seqio is installed and task_module '
            '(MIXTURE_OR_TASK_MODULE) names the module that registers the task.'
        )
      from prompt_tuning_jax.data import seqio_source

      self._live_functions = seqio_source.task_functions(self.name, self._task_module)
    live = self._live_functions[kind]
    return live if position is None else live[position]

  @property
  def arrays(self) -> Mapping[str, np.ndarray]:
    """All that the examples hold: tokens of each feature, raw fields and targets."""
    return types.MappingProxyType(self._arrays)

  def lengths(self, feature: str) -> np.ndarray:
    """Number of tokens of each example, end-of-sequence included."""
    return np.diff(self.flat_tokens(feature)[1])

  def longest(self, feature: str) -> int:
    """Tokens of the longest example."""
    return int(self.lengths(feature).max(initial=0))

  def share_longer_than(self, feature: str, length: int) -> float:
    """Share of the examples, in [0, 1], that `length` would cut."""
    lengths = self.lengths(feature)
    return float(np.mean(lengths > length)) if len(lengths) else 0.0

  def with_inputs(self, texts: Sequence[str], **manifest: Any) -> TokenizedTask:
    """The same examples with other inputs, which are tokenised; all else stays.

    Args:
      texts: one for each example; an end-of-sequence token follows it.
      **manifest: further entries of the manifest.
    """
    tokens, rows = text_files.RaggedTokens(), text_files.RaggedBytes()
    for index, ids in enumerate(self.vocabulary.encode_many(texts)):
      tokens.append([*ids, self.vocabulary.eos_id])
      raw, target = self._row(index)
      raw = raw | {'inputs_pretokenized': texts[index]}
      rows.append(json.dumps([raw, target], ensure_ascii=False).encode())
    arrays = {
        **tokens.arrays('inputs'),
        'rows/json': rows.values(),
        'rows/offsets': rows.offsets(),
    }
    return self.with_arrays(arrays, **manifest)

  def with_arrays(self, arrays: Mapping[str, np.ndarray], **manifest: Any) -> TokenizedTask:
    """The same task with some other arrays and entries of the manifest."""
    task = TokenizedTask(
        self.manifest | manifest,
        {**self._arrays, **arrays},
        self.vocabulary,
        task_module=self._task_module,
    )
    task._live_functions = self._live_functions
    return task

  def save(self, path: str | os.PathLike[str]) -> None:
    """Writes the file that `read` reads; it appears whole or not at all."""
    array_file.write(os.fspath(path), self.manifest, self._arrays)

  @classmethod
  def read(
      cls,
      path: str | os.PathLike[str],
      vocabulary: Vocabulary,
      *,
      task_module: str | None = None,
  ) -> TokenizedTask:
    """Reads a file that `save` wrote and checks its sums.

    Raises:
      FileNotFoundError: if there is no such file.
      CacheError: if the file is truncated or changed, of another format, or holds
        ids of another vocabulary.
    """
    try:
      manifest, arrays = array_file.read(os.fspath(path))
    except array_file.DamagedFileError as error:
      raise CacheError(f'The tokenised task {error}') from error
    if manifest.get('format') != FORMAT:
      raise CacheError(
          f'The tokenised task {os.fspath(path)} has format {manifest.get("format")}; '
          f'this version of the library reads format {FORMAT}.'
      )
    found = manifest['vocabulary']
    if found['fingerprint'] != vocabulary.fingerprint:
      raise CacheError(
          f'{os.fspath(path)} holds ids of another vocabulary ({found["size"]:,} ids, '
          f'fingerprint {found["fingerprint"][:12]}) than {vocabulary.path} '
          f'({vocabulary.size:,} ids, {vocabulary.fingerprint[:12]}). Tokenise the task '
          'again with the vocabulary of the model.'
      )
    return cls(manifest, arrays, vocabulary, task_module=task_module)

  @classmethod
  def from_examples(
      cls,
      examples: Iterable[Mapping[str, Any]],
      vocabulary: Vocabulary,
      *,
      name: str = 'examples',
      split: str = 'train',
      features: Sequence[str] = ('inputs', 'targets'),
      postprocess_fn: Callable[..., Any] | None = None,
      metric_fns: Sequence[Callable[..., Any]] = (),
      label_classes: Sequence[str] | None = None,
      minus_one_is_none: bool = True,
      source: dict[str, Any] | None = None,
      code: dict[str, str] | None = None,
  ) -> TokenizedTask:
    """Makes a task of examples in memory.

    Args:
      examples: one mapping each. A feature is a text, which is tokenised and gets an
        end-of-sequence token, or a sequence of ids, which is taken as it is. All
        other entries are kept as raw fields.
      vocabulary: the vocabulary of the ids.
      name: name of the task, for messages and result files.
      split: name of the split.
      features: entries of the examples that are token features.
      postprocess_fn: text of a prediction → what metrics compare; None: the text.
      metric_fns: `(targets, predictions) → {name: value}`.
      label_classes: texts of the classes. Without a `postprocess_fn`, predictions
        become class ids and the metric is the accuracy.
      minus_one_is_none: whether a target of -1 is a label that is not public.
      source: where the examples come from (see `provenance.py`).
      code: sums of the modules that made them (see `provenance.py`).

    Raises:
      ValueError: if there are no examples, or one lacks a feature.
    """
    if label_classes is not None and postprocess_fn is None:
      from prompt_tuning_jax.evaluation import metrics, postprocessors

      postprocess_fn = functools.partial(
          postprocessors.string_label_to_class_id, label_classes=list(label_classes)
      )
      metric_fns = metric_fns or [metrics.accuracy]
    ragged = {feature: text_files.RaggedTokens() for feature in features}
    rows = text_files.RaggedBytes()
    targets: list[Any] = []
    target_texts: list[str | None] = []
    for index, example in enumerate(examples):
      raw = {k: v for k, v in example.items() if k not in features}
      for feature in features:
        if feature not in example:
          raise ValueError(
              f'Example {index} of {name} has no {feature!r}; it has '
              f'{", ".join(map(repr, example))}.'
          )
        tokens = example[feature]
        if isinstance(tokens, str):
          raw.setdefault(f'{feature}_pretokenized', tokens)
          tokens = vocabulary.encode(tokens) + [vocabulary.eos_id]
        ragged[feature].append(tokens)
      raw = {key: as_json(value) for key, value in raw.items()}
      text = raw.get('targets_pretokenized')
      if text is None and 'targets' in ragged:
        text = vocabulary.decode(ragged['targets'].last)
      target_texts.append(text)
      target = text
      if postprocess_fn is not None:
        target = postprocess_fn(text, example=raw, is_target=True)
      targets.append(as_json(target))
      try:
        rows.append(json.dumps([raw, targets[-1]], ensure_ascii=False).encode())
      except (TypeError, ValueError) as error:
        raise ValueError(
            f'Example {index} of {name} holds a field that JSON cannot keep: {error}.'
        ) from error
    if not targets:
      raise ValueError(
          f'{name}, split {split!r}, has no examples, so there is nothing to train on '
          'or to score. Check the split and the files behind it.'
      )
    arrays = {'rows/json': rows.values(), 'rows/offsets': rows.offsets()}
    for feature, tokens in ragged.items():
      arrays |= tokens.arrays(feature)
    if label_classes is None and isinstance(postprocess_fn, functools.partial):
      label_classes = postprocess_fn.keywords.get('label_classes')
    manifest = make_manifest(
        name, split, vocabulary, features, len(targets), source=source, code=code
    ) | {
        'unlabelled': labels.count_unlabelled(
            targets, target_texts, minus_one_is_none=minus_one_is_none
        ),
        'label_classes': None if label_classes is None else list(label_classes),
        'postprocess_fn': functions.describe(postprocess_fn),
        'metric_fns': [functions.describe(metric) for metric in metric_fns],
    }
    task = cls(manifest, arrays, vocabulary)
    task._live_functions = {
        'postprocess_fn': postprocess_fn,
        'metric_fns': list(metric_fns),
    }
    return task

  @classmethod
  def from_text_files(
      cls,
      paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
      vocabulary: Vocabulary,
      *,
      name: str | None = None,
      split: str = 'train',
      cache_dir: str | None = None,
  ) -> TokenizedTask:
    """Reads plain text, one document a line, as the single feature 'targets'.

    Every document ends in an end-of-sequence token. Empty lines are skipped and
    counted in a warning. The tokens are cached until a file changes.

    Args:
      paths: one or several text files, UTF-8, gzipped where the name ends in .gz.
      vocabulary: the vocabulary to tokenise with.
      name: name of the task; default: the name of the first file.
      split: name of the split.
      cache_dir: folder of the cache; default: `default_cache_dir()`.

    Raises:
      FileNotFoundError: if a file does not exist.
      ValueError: if no line holds text.
    """
    from prompt_tuning_jax.data import cache

    return cache.load_files(
        paths, vocabulary, text_files.TEXT, name=name, split=split, cache_dir=cache_dir
    )

  @classmethod
  def from_jsonl(
      cls,
      path: str | os.PathLike[str],
      vocabulary: Vocabulary,
      *,
      name: str | None = None,
      split: str = 'train',
      cache_dir: str | None = None,
  ) -> TokenizedTask:
    """Reads pairs of texts, one `{"inputs": …, "targets": …}` a line.

    Lines that are not such an object, or whose texts are empty, are skipped and
    counted in a warning that names the first few. The tokens are cached until the
    file changes.

    Raises:
      FileNotFoundError: if the file does not exist.
      ValueError: if no line can be used.
    """
    from prompt_tuning_jax.data import cache

    return cache.load_files(
        path, vocabulary, text_files.PAIRS, name=name, split=split, cache_dir=cache_dir
    )


def make_manifest(
    name: str,
    split: str,
    vocabulary: Vocabulary,
    features: Sequence[str],
    num_examples: int,
    *,
    source: dict[str, Any] | None = None,
    code: dict[str, str] | None = None,
) -> dict[str, Any]:
  return {
      'format': FORMAT,
      'task': name,
      'split': split,
      'num_examples': num_examples,
      'features': list(features),
      'vocabulary': {
          'fingerprint': vocabulary.fingerprint,
          'size': vocabulary.size,
          'file': os.path.basename(vocabulary.path),
      },
      'unlabelled': labels.NONE_UNLABELLED,
      'label_classes': None,
      'postprocess_fn': None,
      'metric_fns': [],
      'library_version': provenance.library_version(),
      'code': code or {},
      'source': source or {'description': 'memory', 'files': []},
  }


def own_numbers(example: Mapping[str, Any]) -> dict[str, Any]:
  """What a data set calls an example by: `idx`, or its parts `idx/question` and the like."""
  return {n: value for n, value in example.items() if n == 'idx' or n.startswith('idx/')}


def seqio_is_installed() -> bool:
  return importlib.util.find_spec('seqio') is not None
