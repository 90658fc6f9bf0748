"""`prompt-tuning tasks`: which tasks there are, and a task as the model will see it.

What is shown is what training gets: the rows come out of the same batches
(`data/batches.py`), and what was cut is told by comparing them with batches in which
nothing is. Neither the model's weights nor, for a task that is in the cache, seqio are
needed.
"""

from __future__ import annotations

import collections
import itertools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from prompt_tuning_jax import screen, task_list
from prompt_tuning_jax.backbones.backbone import Backbone
from prompt_tuning_jax.config.building import vocabulary_of
from prompt_tuning_jax.data.batches import EvalBatches
from prompt_tuning_jax.data.cache import DEFAULT_TASK_MODULE
from prompt_tuning_jax.data.file_task import FileTask
from prompt_tuning_jax.data.prompt_design import INPUT_LENGTH, PromptDesign, load_designed
from prompt_tuning_jax.data.tokenized_task import NoSplitError, TokenizedTask, own_numbers
from prompt_tuning_jax.data.virtual_tokens import as_placement
from prompt_tuning_jax.methods.method import Method

# Of a longer row so many tokens are shown at its beginning and at its end.
_HEAD, _TAIL = 48, 16

_NAMED_CLASSES = 20


def tasks(
    *,
    backbone: Backbone | None = None,
    task: str | FileTask | None = None,
    split: str | None = None,
    examples: int = 3,
    method: Method | None = None,
    feature_lengths: Mapping[str, int] | None = None,
    placement: Any = 'prefix',
    design: PromptDesign | None = None,
    target_prefix: str | None = None,
    task_module: str = DEFAULT_TASK_MODULE,
    tfds_data_dir: str | None = None,
    cache_dir: str | None = None,
) -> list[str]:
  """Lists the tasks there are, or shows what the model will see of one.

  Args:
    backbone: whose vocabulary and sizes count; its weights are not loaded.
    task: name of a seqio task or mixture, or a task of files; None lists all names.
    split: its split; the first of train, validation, test that it has where None (of
      validation and test where a design takes its examples from train).
    examples: how many to show; of a mixture the first of each task.
    method: the prompt method, for its virtual tokens; None for none.
    feature_lengths: longest inputs and targets; 512 and the longest target where None.
    placement: where the virtual tokens stand.
    design: words and solved examples around each input, instead of a prompt.
    target_prefix: what stands before every target.
    task_module: module whose import registers the task.
    tfds_data_dir: folder of TensorFlow Datasets.
    cache_dir: folder of tokenised tasks.

  Returns:
    Lines to print.

  Raises:
    ValueError, OSError, ImportError: if there is no such task, or it cannot be read.
  """
  if task is None:
    return task_list.listing(task_module)
  if examples < 0:
    raise ValueError(f'--examples {examples}: it has to be 0 or more.')
  loaded = _load(
      task,
      split,
      vocabulary_of(backbone),
      design=design,
      length=feature_lengths['inputs'] if feature_lengths else INPUT_LENGTH,
      target_prefix=target_prefix,
      task_module=task_module,
      tfds_data_dir=tfds_data_dir,
      cache_dir=cache_dir,
  )
  report = _Report(backbone, method, feature_lengths, placement, design)
  if isinstance(task, FileTask) or [of_task.name for of_task, _ in loaded] == [task]:
    return report.of_task(loaded[0][0], examples)
  return report.of_mixture(task, loaded, examples)


def _load(
    task: str | FileTask,
    split: str | None,
    vocabulary: Any,
    design: PromptDesign | None,
    **kwargs: Any,
) -> list[tuple[TokenizedTask, float]]:
  refused: NoSplitError | None = None
  # Where no split is named, the first that a task has.
  names = task_list.SPLITS if split is None else (split,)
  if split is None and design is not None and design.examples:
    names = [name for name in names if name != 'train']
  for name in names:
    try:
      return load_designed(design, task, name, vocabulary, **kwargs)
    except NoSplitError as error:
      refused = refused or error
  raise refused


# One task.


class _Report:
  """Tells of tasks, all of them for one model, prompt and limits."""

  def __init__(
      self,
      backbone: Backbone,
      method: Method | None,
      feature_lengths: Mapping[str, int] | None,
      placement: Any,
      design: PromptDesign | None,
  ):
    self._backbone = backbone
    self._method = method
    self._design = design
    self._given_lengths = feature_lengths
    self._placement = as_placement(placement)
    self._first_id = backbone.spec.vocab_size
    self._num_virtual = 0 if method is None else method.num_virtual_tokens
    self._num_in_decoder = 0 if method is None else method.num_decoder_virtual_tokens

  def of_task(self, task: TokenizedTask, num_examples: int) -> list[str]:
    seen = _Seen(self, task, num_examples)
    lines = [
        screen.colored(
            f'{task.name}, split {task.split!r}, {screen.number(len(task), "example")}',
            screen.TITLE,
        ),
        *self._setting(seen.lengths),
        *_answers(task),
    ]
    for index in range(seen.num_examples):
      lines += ['', *self._example(seen, index)]
    return [*lines, '', *_statistics(seen)]

  def of_mixture(
      self,
      name: str | FileTask,
      loaded: Sequence[tuple[TokenizedTask, float]],
      num_examples: int,
  ) -> list[str]:
    total = sum(rate for _, rate in loaded)
    members = screen.number(len(loaded), 'task')
    title = f'{name}, a mixture: {members} with the split {loaded[0][0].split!r}'
    lines = [screen.colored(title, screen.TITLE), *self._setting(self._given_lengths)]
    for task, rate in loaded:
      seen = _Seen(self, task, min(num_examples, 1))
      share = f'{rate / total:.1%} of the examples that training draws'
      title = f'{task.name}, {screen.number(len(task), "example")}, {share}'
      lines += [
          '',
          screen.colored(title, screen.TITLE),
          *_answers(task),
      ]
      for feature in ('inputs', 'targets'):
        lines += screen.wrapped(f'{feature:11}', ' ' * 11, _summary(seen, feature))
      if seen.num_examples:
        lines += ['', *self._example(seen, 0)]
    return lines

  def layout(self, lengths: Mapping[str, int]) -> dict[str, Any]:
    return dict(
        feature_lengths=lengths,
        vocab_size=self._first_id,
        num_virtual_tokens=self._num_virtual,
        num_decoder_virtual_tokens=self._num_in_decoder,
        placement=self._placement,
    )

  def limits(self, task: TokenizedTask) -> Mapping[str, int]:
    """TASK_FEATURE_LENGTHS, or what stands for it where it is not set."""
    if self._given_lengths is not None:
      return self._given_lengths
    return {'inputs': INPUT_LENGTH, 'targets': task.longest('targets')}

  @property
  def num_virtual_tokens(self) -> int:
    return self._num_virtual

  def _setting(self, lengths: Mapping[str, int] | None) -> list[str]:
    vocabulary = self._backbone.vocabulary
    limits = 'inputs 512, targets the longest of each'
    if lengths is not None:
      limits = f'inputs {lengths["inputs"]}, targets {lengths["targets"]} tokens'
    if self._given_lengths is None:
      limits += ' (TASK_FEATURE_LENGTHS is not set)'
    prompt = 'none (PROMPT is None)'
    if self._method is not None:
      placement = self._placement.description
      prompt = f'{type(self._method).__name__}, {self._num_virtual} virtual tokens'
      prompt += f', placed {placement!r}' if self._num_virtual else ' in the input'
      if self._num_in_decoder:
        prompt += f', {self._num_in_decoder} in the decoder'
    if self._design is not None:
      prompt = f'words, {self._design}'
    vocabulary = (
        f'of {self._backbone.name}: {vocabulary.size:,} ids, {self._first_id:,} rows in the '
        'embedding table'
    )
    return [
        line
        for name, text in (('vocabulary', vocabulary), ('limits', limits), ('prompt', prompt))
        for line in screen.wrapped(f'{name:11}', ' ' * 11, text)
    ]

  def _example(self, seen: _Seen, index: int) -> list[str]:
    raw, batch, whole = seen.task.example(index), seen.batch, seen.whole
    title = f'example {index}' + (f', {_id_text(raw)}' if _id(raw) is not None else '')
    lines = [screen.colored(title, screen.TITLE)]
    for name, feature in (('input', 'inputs'), ('target', 'targets')):
      text = seen.task.text(feature, index)
      lines += screen.wrapped(f'{name:11}', ' ' * 11, repr(text))
    encoder = _row(batch.encoder_input_tokens[index])
    num_virtual = int(np.sum(encoder >= self._first_id))
    lines += self._tokens(
        f'encoder, {num_virtual} virtual and {len(encoder) - num_virtual} other tokens', encoder
    )
    lines += self._lost(encoder, _row(whole.encoder_input_tokens[index]), seen.lengths['inputs'])
    targets = _row(batch.decoder_target_tokens[index])
    lines += self._tokens('decoder, input', batch.decoder_input_tokens[index][: len(targets)])
    # Where its virtual tokens stand, the decoder has nothing to say.
    lines += self._tokens('decoder, target', targets[self._num_in_decoder :])
    return lines + self._lost(
        targets, _row(whole.decoder_target_tokens[index]), seen.lengths['targets']
    )

  def _lost(self, kept: np.ndarray, whole: np.ndarray, limit: int) -> list[str]:
    """The tokens of a row that a limit cut, marked; nothing where it cut none."""
    kept, whole = (row[(row > 0) & (row < self._first_id)] for row in (kept, whole))
    # What is kept stands in the whole row in the same order.
    lost, remaining = [], list(kept)
    for token in whole:
      if remaining and token == remaining[0]:
        del remaining[0]
      else:
        lost.append(token)
    if not lost:
      return []
    title = f'✂ cut: {len(lost)} of {len(whole)} tokens, the limit is {limit}'
    return self._tokens(title, lost, screen.CUT)

  def _tokens(self, title: str, ids: Sequence[int], color: str = '') -> list[str]:
    """A row of pieces above their ids, as many lines as the screen needs."""
    cells = _shortened([(self._piece(int(token)), str(int(token))) for token in ids])
    lines = [screen.colored(f'  {title}', color)]
    for chunk in screen.fitting(cells, screen.width() - 4):
      above, below = [], []
      for piece, number in chunk:
        width = max(screen.columns(piece), len(number))
        own = screen.VIRTUAL if piece.startswith('⟨') else color
        above.append(screen.colored(piece, own) + ' ' * (width - screen.columns(piece)))
        below.append(number.ljust(width))
      lines += ['    ' + ' '.join(cells).rstrip() for cells in (above, below)]
    return lines

  def _piece(self, token: int) -> str:
    if token >= self._first_id:
      position = token - self._first_id
      in_decoder = position - self._num_virtual
      return f'⟨P{position}⟩' if in_decoder < 0 else f'⟨D{in_decoder}⟩'
    return self._backbone.vocabulary.piece(token)


class _Seen:
  """A task in batches, as training has them and with nothing cut.

  Attributes:
    task: the task.
    lengths: the limits.
    ordinary: {'inputs': …, 'targets': …}, tokens of each example before anything is cut,
      the words of a template included.
    num_examples: how many of the first examples can be shown.
    batch: these, a row each.
    whole: the same with nothing cut.
  """

  def __init__(self, report: _Report, task: TokenizedTask, num_examples: int):
    self.task = task
    self.lengths = report.limits(task)
    self.num_examples = min(num_examples, len(task))
    longest = {'inputs': 2**30, 'targets': max(task.longest('targets'), 1)}
    rows = max(self.num_examples, 1)
    # The report says itself, and more of it, what the limits cut.
    with warnings.catch_warnings():
      warnings.filterwarnings('ignore', message='TASK_FEATURE_LENGTHS')
      as_trained = EvalBatches(task, rows, **report.layout(self.lengths))
      widths = EvalBatches(task, rows, **report.layout(longest)).row_widths
      of_inputs = widths - report.num_virtual_tokens
      uncut = longest | {'inputs': max(int(of_inputs.max()), self.lengths['inputs'])}
      with_nothing_cut = EvalBatches(task, rows, **report.layout(uncut))
    self.ordinary = {'inputs': of_inputs, 'targets': task.lengths('targets')}
    self.batch, _ = next(iter(as_trained))
    self.whole, _ = next(iter(with_nothing_cut))


def _answers(task: TokenizedTask) -> list[str]:
  classes = task.label_classes
  kind = 'free text'
  if classes:
    named = [*classes[:_NAMED_CLASSES], *['…'] * (len(classes) > _NAMED_CLASSES)]
    kind = f'{len(classes)} classes: {", ".join(named)}'
  described = [_function_text(metric) for metric in task.manifest['metric_fns']]
  return [
      *screen.wrapped('answers    ', ' ' * 11, kind),
      *screen.wrapped('metrics    ', ' ' * 11, ', '.join(described) or 'accuracy (by default)'),
  ]


def _function_text(description: Mapping[str, Any]) -> str:
  name = description['function'].partition(':')[2]
  settings = ', '.join(f'{key}={value!r}' for key, value in description['kwargs'].items())
  return f'{name}({settings})' if settings else name


# The whole split.


def _statistics(seen: _Seen) -> list[str]:
  task = seen.task
  lines = [screen.colored(f'the whole split, {screen.number(len(task), "example")}', screen.TITLE)]
  for feature in ('inputs', 'targets'):
    lines += screen.wrapped(f'{feature:11}', ' ' * 11, _summary(seen, feature))
    lines += screen.histogram(seen.ordinary[feature], seen.lengths[feature])
  raws = [task.example(index) for index in range(len(task))]
  lines += _shares(task)
  unlabelled = task.manifest['unlabelled']
  text = 'every example has one'
  if unlabelled['count']:
    text = (
        f'{unlabelled["count"]:,} of {len(task):,} examples have none, the first is example '
        f'{unlabelled["first"]}: to be predicted, neither scored nor trained on'
    )
  lines += screen.wrapped('labels     ', ' ' * 11, text)
  lines += screen.wrapped('ids        ', ' ' * 11, _repeated_ids(raws))
  if skipped := task.manifest.get('skipped', {}).get('count'):
    text = f'{screen.number(skipped, "line")} (FileTask.on_bad_line)'
    lines += screen.wrapped('skipped    ', ' ' * 11, text)
  return lines


def _summary(seen: _Seen, feature: str) -> str:
  lengths, limit = seen.ordinary[feature], seen.lengths[feature]
  worst = int(lengths.argmax())
  # A value that occurs, at or above 95 % of all.
  most = np.quantile(lengths, 0.95, method='inverted_cdf')
  text = (
      f'median {np.median(lengths):g} tokens, 95 % have at most {most}, the longest '
      f'{lengths[worst]} (example {worst})'
  )
  num_cut = int(np.sum(lengths > limit))
  if not num_cut:
    return f'{text}; none is longer than {limit}'
  return (
      f'{text}; {num_cut:,} ({num_cut / len(lengths):.1%}) are longer than {limit} and are cut, '
      f'the worst by {lengths[worst] - limit}'
      + (': the model never learns how these end' if feature == 'targets' else '')
  )


def _shares(task: TokenizedTask) -> list[str]:
  """How often each answer occurs."""
  counts = collections.Counter(task.text('targets', index) for index in range(len(task)))
  if task.label_classes:
    # Classes that do not occur are told too.
    counts.update(dict.fromkeys(task.label_classes, 0))
    shown = counts.most_common(_NAMED_CLASSES)
    title = 'answers'
  else:
    shown = counts.most_common(3)
    title = f'{len(counts):,} different answers; the most frequent'
  lines = [title]
  width = min(max(screen.columns(_short(text)) for text, _ in shown), 40)
  for text, count in shown:
    name = _short(text)
    space = ' ' * max(width - screen.columns(name), 0)
    share = count / len(task)
    lines.append(f'{" " * 11}{name}{space} {share:6.1%}  {screen.counted_bar(24 * share, count)}')
  if len(counts) > len(shown) and task.label_classes:
    lines.append(f'{" " * 11}… {len(counts) - len(shown)} more')
  return lines


def _short(text: str) -> str:
  text = ' '.join(text.split())
  return text if len(text) <= 40 else text[:39] + '…'


def _id(raw: Mapping[str, Any]) -> Any:
  """What tells an example from others: `idx`, or its parts `idx/question` and the like."""
  parts = tuple(str(raw[name]) for name in sorted(raw) if name.startswith('idx/'))
  return parts or raw.get('idx')


def _id_text(raw: Mapping[str, Any]) -> str:
  return ', '.join(f'{name} {value!r}' for name, value in sorted(own_numbers(raw).items()))


def _repeated_ids(raws: Sequence[Mapping[str, Any]]) -> str:
  places: dict[str, list[int]] = {}
  for index, raw in enumerate(raws):
    if (identifier := _id(raw)) is not None:
      places.setdefault(repr(identifier), []).append(index)
  if not places:
    return 'examples have none (no field idx)'
  repeated = {name: found for name, found in places.items() if len(found) > 1}
  if not repeated:
    return 'no two examples share one'
  name, (first, second, *_) = next(iter(repeated.items()))
  shared = 'one is' if len(repeated) == 1 else f'{len(repeated):,} are'
  return (
      f'{shared} shared by several examples, {sum(map(len, repeated.values())):,} in all: {name} '
      f'by the examples {first} and {second}'
  )


# Rows.


def _row(row: np.ndarray) -> np.ndarray:
  """A row of a batch without its padding."""
  return row[: int(np.max(np.flatnonzero(row), initial=-1)) + 1]


def _shortened(cells: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
  """Runs of virtual tokens, and the middle of a long row, as their ends with … between."""
  short: list[tuple[str, str]] = []
  for is_virtual, run in itertools.groupby(cells, key=lambda cell: cell[0].startswith('⟨')):
    run = list(run)
    short += [run[0], ('…', '…'), run[-1]] if is_virtual and len(run) > 4 else run
  if len(short) <= _HEAD + _TAIL + 1:
    return short
  middle = len(short) - _HEAD - _TAIL
  return [*short[:_HEAD], (f'… {middle} more …', '…'), *short[-_TAIL:]]


