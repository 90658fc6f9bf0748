"""A task of one's own: examples from jsonl, tsv or csv files, by a few lines of gin.

    MIXTURE_OR_TASK_NAME = @FileTask()
    FileTask.name = 'reviews'
    FileTask.files = {'train': 'reviews/train.tsv', 'validation': 'reviews/dev.tsv'}
    FileTask.inputs = 'review: {text}'
    FileTask.targets = 'label'
    FileTask.label_names = {'0': 'negative', '1': 'positive'}

In the texts, braces hold the name of a column (tsv, csv) or of a field (jsonl;
`{passage.title}` is the field `title` of the object `passage`); `{{` and `}}` are braces to
be read. A text without braces is itself such a name. A tsv file has no quotes, a csv file
the usual ones; both begin with the names of their columns.

Every line is read and every bad one counted: an error names the first few, or a warning
where `on_bad_line` is 'skip'. Neither seqio nor TensorFlow is needed.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from prompt_tuning_jax.data import field_texts, provenance, rows
from prompt_tuning_jax.data.labels import UNKNOWN
from prompt_tuning_jax.data.tokenized_task import NoSplitError, TokenizedTask
from prompt_tuning_jax.data.vocabulary import Vocabulary

_BAD_LINES = ('error', 'skip')

# How many bad lines a message names.
_NAMED_LINES = 5

# Texts tokenised at a time, on several threads.
_EXAMPLES_AT_A_TIME = 8192

_LABEL_METRICS = ('accuracy', 'f1', 'mean_f1', 'matthews_corrcoef')
_NUMBER_METRICS = ('pearson_corrcoef', 'spearman_corrcoef')
_TEXT_METRICS = ('accuracy', 'bleu', 'rouge')
_REFERENCE_METRICS = ('squad', 'bleu', 'rouge')

# The modules that decide what becomes of a line.
_CODE = (
    __name__,
    rows.__name__,
    field_texts.__name__,
    *provenance.VOCABULARY_CODE,
    'prompt_tuning_jax.evaluation.postprocessors',
)


@dataclasses.dataclass(frozen=True)
class FileTask:
  """A task whose examples are lines of files; stands wherever a task's name does.

  Attributes:
    name: name of the task, for messages and result files.
    files: for each split the path of a file, or a list of paths: `.jsonl`, `.tsv` or
      `.csv`, gzipped where `.gz` follows. Relative paths start at the working folder.
    inputs: what the model reads, with fields in braces, or the name of one field.
    targets: the answer, written likewise.
    label_names: for a choice between labels, from the answer in the file to its text, or
      a list of the texts where the file holds these. An answer with the text `<unk>`
      counts as unknown (a test set without labels). None: the answers are free texts.
    metrics: names of metrics. Default: 'accuracy' of labels; of free texts 'accuracy'
      (the same text), 'bleu' and 'rouge'; where there are references 'bleu' and 'rouge'.
      Labels also have 'f1' (of the second of two labels; of more the mean over all),
      'mean_f1' and 'matthews_corrcoef'; texts with references 'squad'; numbers
      'pearson_corrcoef' and 'spearman_corrcoef'.
    references: field with all right answers (a list in jsonl, or a text), with one of
      which a prediction is compared instead of the target.
    id: field with the example's name, which no two lines may share. Default: its place.
    on_bad_line: 'error', or 'skip' to leave bad lines out with a warning.
  """

  name: str
  files: Mapping[str, str | Sequence[str]]
  inputs: str
  targets: str
  label_names: Mapping[str, str] | Sequence[str] | None = None
  metrics: Sequence[str] | None = None
  references: str | None = None
  id: str | None = None
  on_bad_line: str = 'error'

  def __post_init__(self):
    if not isinstance(self.name, str) or not self.name.strip():
      raise ValueError(f'FileTask.name is {self.name!r}; give the task a name.')
    if not isinstance(self.files, Mapping) or not self.files:
      raise ValueError(
          f'FileTask.files is {self.files!r}; expected the files of each split, for example '
          "{'train': 'reviews/train.tsv', 'validation': 'reviews/dev.tsv'}."
      )
    for split in self.files:
      for path in self._named(split):
        rows.kind_of(path)
    if self.on_bad_line not in _BAD_LINES:
      raise ValueError(
          f'FileTask.on_bad_line is {self.on_bad_line!r}; it may be '
          f'{" or ".join(map(repr, _BAD_LINES))}.'
      )
    for parameter in ('inputs', 'targets'):
      self._text(parameter)
    if self.label_names is not None and self.references is not None:
      raise ValueError(
          'FileTask.label_names makes a choice of the task, which has one right answer, but '
          'FileTask.references is set too. Leave one of them out.'
      )
    if self.label_names is not None:
      self._check_labels()
    self._check_metrics()

  def _check_labels(self) -> None:
    if isinstance(self.label_names, str) or not all(map(str.strip, self._labels.values())):
      raise ValueError(
          f'FileTask.label_names is {self.label_names!r}; expected the texts of the labels by '
          "what stands in the file, such as {'0': 'negative', '1': 'positive'}, or a list of "
          'texts, none of them empty.'
      )
    if len(self.label_classes) < 2:
      raise ValueError(
          f'FileTask.label_names={self.label_names!r} leaves nothing to choose from. Name '
          'two labels or more, or leave it out for free text.'
      )

  def _check_metrics(self) -> None:
    known = self._known_metrics
    if isinstance(self.metrics, str) or (self.metrics is not None and not self.metrics):
      raise ValueError(
          f'FileTask.metrics is {self.metrics!r}; expected a list of {", ".join(known)}.'
      )
    for name in self.metrics or ():
      if name not in known:
        near = difflib.get_close_matches(str(name), known, n=1)
        hint = f' Did you mean {near[0]!r}?' if near else ''
        raise ValueError(
            f'FileTask.metrics names {name!r}, which {self._kind_of_answers} cannot be scored '
            f'by.{hint} Metrics of these: {", ".join(known)}.'
        )
    numeric = [name for name in self.metrics or () if name in _NUMBER_METRICS]
    if numeric and len(numeric) < len(self.metrics):
      raise ValueError(
          f'FileTask.metrics={list(self.metrics)} compares numbers ({", ".join(numeric)}) and '
          'texts; a task has one or the other.'
      )

  @property
  def _kind_of_answers(self) -> str:
    if self.label_names is not None:
      return 'labels (FileTask.label_names)'
    return 'answers with references' if self.references else 'free texts'

  @property
  def _known_metrics(self) -> tuple[str, ...]:
    if self.label_names is not None:
      return _LABEL_METRICS
    return _REFERENCE_METRICS if self.references else (*_TEXT_METRICS, *_NUMBER_METRICS)

  @property
  def metric_names(self) -> tuple[str, ...]:
    """The metrics, those by default where none were named."""
    if self.metrics is not None:
      return tuple(self.metrics)
    if self.label_names is not None:
      return ('accuracy',)
    return ('bleu', 'rouge') if self.references else _TEXT_METRICS

  @property
  def splits(self) -> tuple[str, ...]:
    """Names of the splits."""
    return tuple(self.files)

  @property
  def label_classes(self) -> list[str] | None:
    """The texts to choose from, in the order of their names; None for free text."""
    if self.label_names is None:
      return None
    return [text for text in dict.fromkeys(self._labels.values()) if text != UNKNOWN]

  @property
  def _labels(self) -> dict[str, str]:
    """From what stands in a file to the text of the label."""
    names = self.label_names
    if not isinstance(names, Mapping):
      names = {name: name for name in names}
    return {field_texts.scalar(key): str(text) for key, text in names.items()}

  def description(self) -> dict[str, Any]:
    """All settings but the files, as JSON holds them; equal where the examples are."""
    settings = dataclasses.asdict(self)
    del settings['files']
    if self.label_names is not None:
      settings['label_names'] = self._labels
    return settings | {'metrics': list(self.metric_names)}

  def paths(self, split: str) -> list[str]:
    """The files of a split, as absolute paths.

    Raises:
      NoSplitError: if there is no such split.
      FileNotFoundError: if a file is not there.
    """
    if split not in self.files:
      near = difflib.get_close_matches(split, self.splits, n=1)
      hint = f' Did you mean {near[0]!r}?' if near else ''
      raise NoSplitError(
          f'{self.name} has no split {split!r}.{hint} FileTask.files has '
          f'{", ".join(self.splits)}.'
      )
    paths = [os.path.abspath(os.path.expanduser(path)) for path in self._named(split)]
    for path in paths:
      if not os.path.isfile(path):
        raise FileNotFoundError(
            f'There is no file {path}, which FileTask.files names for the split {split!r} of '
            f'{self.name}.'
        )
    return paths

  def _named(self, split: str) -> list[str]:
    named = self.files[split]
    named = [named] if isinstance(named, (str, os.PathLike)) else list(named or ())
    if not named:
      raise ValueError(f'FileTask.files names no file for the split {split!r}.')
    return [os.fspath(path) for path in named]

  def tokenize(self, split: str, vocabulary: Vocabulary) -> TokenizedTask:
    """Reads and tokenises a split; its manifest says what was skipped.

    Raises:
      NoSplitError, FileNotFoundError: as `paths`.
      ValueError: if a file is empty or damaged, a text names a field that no line has, or
        a line is bad and `on_bad_line` is 'error'.
    """
    paths = self.paths(split)
    # Described before they are read: a file that grows meanwhile counts as changed.
    source = provenance.describe_files(paths)
    lines = _Lines(self, paths)
    examples = list(lines)
    skipped = lines.checked(split, len(examples))
    task = TokenizedTask.from_examples(
        _encoded(examples, vocabulary),
        vocabulary,
        name=self.name,
        split=split,
        postprocess_fn=self._postprocess_fn(),
        metric_fns=[self._metric_fn(name) for name in self.metric_names],
        minus_one_is_none=not self._compares_numbers,
        source=source,
        code=provenance.describe_modules(_CODE),
    )
    task.manifest['skipped'] = skipped
    return task

  def _postprocess_fn(self) -> Callable[..., Any] | None:
    from prompt_tuning_jax.evaluation import postprocessors

    if self.label_names is not None:
      return functools.partial(
          postprocessors.string_label_to_class_id, label_classes=self.label_classes
      )
    if self.references is not None:
      return postprocessors.all_references
    if not self._compares_numbers:
      return None
    return functools.partial(postprocessors.string_to_float, default=None)

  @property
  def _compares_numbers(self) -> bool:
    return self.metric_names[0] in _NUMBER_METRICS

  def _metric_fn(self, name: str) -> Callable[..., Any]:
    from prompt_tuning_jax.evaluation import metrics

    if name == 'f1' and len(self.label_classes) == 2:
      return metrics.f1_score_with_invalid
    if name in ('f1', 'mean_f1'):
      return functools.partial(
          metrics.mean_multiclass_f1, num_classes=len(self.label_classes)
      )
    if name in _NUMBER_METRICS:
      return functools.partial(getattr(metrics, name), minus_one_is_none=False)
    return getattr(metrics, name)

  def example(self, row: Mapping[str, Any], place: int) -> dict[str, Any]:
    """The example that a line of a file makes.

    Args:
      row: the line's fields.
      place: how many lines came before it.

    Raises:
      ValueError: with the reason, if the line cannot be used.
    """
    of_inputs = self._text('inputs')
    inputs = of_inputs.filled(row)
    answer = self._text('targets').filled(row)
    target = answer
    if self.label_names is not None:
      if answer.strip() not in self._labels:
        expected = ', '.join(map(repr, self._labels))
        raise ValueError(f'the label {answer!r} is none of {expected} (FileTask.label_names)')
      target = self._labels[answer.strip()]
    if self._compares_numbers:
      field_texts.check_number(answer)
    # Fields of the input stay, for templates (PLACEMENT) that name them.
    fields = {name: field_texts.field_text(row, name) for name in of_inputs.fields}
    example = fields | {'inputs': inputs, 'targets': target, 'idx': place}
    if self.references is not None:
      example['references'] = field_texts.field_texts(row, self.references)
    if self.id is not None:
      example['idx'] = field_texts.find(row, self.id)
      if not field_texts.field_text(row, self.id).strip():
        raise ValueError(f'the id ({self.id!r}) is empty')
    return example

  def _text(self, parameter: str) -> field_texts.FieldText:
    """`inputs` or `targets`, parsed."""
    text = getattr(self, parameter)
    if not isinstance(text, str) or not text.strip():
      raise ValueError(
          f'FileTask.{parameter} is {text!r}; expected a text with fields in braces, such as '
          "'review: {text}', or the name of a field."
      )
    return field_texts.parse(parameter, text)

  def named_fields(self) -> dict[str, str]:
    """The fields that the task reads, each with the parameter that names it."""
    named: dict[str, str] = {}
    for parameter in ('inputs', 'targets'):
      for name in self._text(parameter).fields:
        named.setdefault(name, parameter)
    for parameter in ('references', 'id'):
      if getattr(self, parameter) is not None:
        named.setdefault(getattr(self, parameter), parameter)
    return named


def describe_task(task: str | FileTask) -> str | dict[str, Any]:
  """What tells a task from others, as JSON holds it."""
  return task.description() if isinstance(task, FileTask) else task


class _Lines:
  """Iterates over the examples of files, and remembers which lines made none."""

  def __init__(self, task: FileTask, paths: Sequence[str]):
    self._task = task
    self._paths = paths
    self._bad: dict[str, Any] = {'lines': 0, 'count': 0, 'first': []}
    self._named = task.named_fields()
    # Those of them that a line had, and all that lines had, in the order of appearance.
    self._found: set[str] = set()
    self._fields: dict[str, None] = {}
    self._first_of_id: dict[Any, str] = {}

  def __iter__(self) -> Iterator[dict[str, Any]]:
    for path in self._paths:
      before = self._bad['lines']
      for number, row in rows.read(path):
        place = self._bad['lines']
        self._bad['lines'] += 1
        where = f'{path}, line {number}'
        try:
          if isinstance(row, ValueError):
            raise row
          self._note_fields(row)
          example = self._task.example(row, place)
          if self._task.id is not None:
            self._check_id(example['idx'], where)
        except ValueError as error:
          self._bad['count'] += 1
          if len(self._bad['first']) < _NAMED_LINES:
            self._bad['first'].append(f'{where}: {error}')
        else:
          yield example
      if self._bad['lines'] == before:
        raise ValueError(f'{path} holds no examples.')

  def _note_fields(self, row: Mapping[str, Any]) -> None:
    self._fields.update(dict.fromkeys(row))
    for name in self._named:
      if field_texts.find(row, name) is not field_texts.MISSING:
        self._found.add(name)

  def _check_id(self, identifier: Any, where: str) -> None:
    first = self._first_of_id.setdefault(identifier, where)
    if first != where:
      raise ValueError(f'the id {identifier!r} is that of {first} too')

  def checked(self, split: str, num_examples: int) -> dict[str, Any]:
    """What was skipped: `{'lines': all, 'count': skipped, 'first': ['file, line 3: …']}`.

    Raises:
      ValueError: if it is too much.
    """
    task, bad = self._task, self._bad
    whose = f'{task.name}, split {split!r}'
    for name, parameter in self._named.items():
      if self._fields and name not in self._found:
        raise ValueError(_unknown_field(name, parameter, self._fields, self._paths))
    if bad['count'] and (task.on_bad_line == 'error' or not num_examples):
      shown = '\n  '.join(bad['first']) + ('\n  …' * (bad['count'] > len(bad['first'])))
      raise ValueError(
          f'{whose}: {bad["count"]:,} of {bad["lines"]:,} lines cannot be used:\n  {shown}\n'
          'Correct them'
          + (
              ", or set FileTask.on_bad_line='skip' to leave them out."
              if num_examples
              else ': not one is left.'
          )
      )
    return bad


def _unknown_field(
    name: str, parameter: str, known: Iterable[str], paths: Sequence[str]
) -> str:
  known = list(known)
  near = difflib.get_close_matches(name, known, n=1)
  hint = f' Did you mean {near[0]!r}?' if near else ''
  return (
      f'FileTask.{parameter} names the field {name!r}, which no line of {", ".join(paths)} '
      f'has.{hint} Fields: {", ".join(known)}.'
      + (
          ' Words to be read stand beside a field in braces.'
          if parameter in ('inputs', 'targets')
          else ''
      )
  )


def _encoded(
    examples: Sequence[dict[str, Any]], vocabulary: Vocabulary
) -> Iterator[dict[str, Any]]:
  """The examples with token ids in place of texts, which stay beside them."""
  for start in range(0, len(examples), _EXAMPLES_AT_A_TIME):
    chunk = examples[start : start + _EXAMPLES_AT_A_TIME]
    columns = {
        feature: vocabulary.encode_many([example[feature] for example in chunk])
        for feature in ('inputs', 'targets')
    }
    for number, example in enumerate(chunk):
      yield {
          **example,
          **{f'{feature}_pretokenized': example[feature] for feature in columns},
          **{
              feature: [*column[number], vocabulary.eos_id]
              for feature, column in columns.items()
          },
      }
