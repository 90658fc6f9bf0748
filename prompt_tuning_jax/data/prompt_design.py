"""Prompt design: words and solved examples around each input, and nothing that trains.

The baseline of prompt tuning (Brown et al., 2020, section 2.1; "prompt design" in figure 1 of
Lester et al., 2021). The frozen model reads, for example,

    definition: a small dog answer: animal; definition: a tall tree answer:

and its answers are ranked or decoded as ever: a design makes another task of a tokenised one,
with the same targets and metrics, whose inputs are these.

    few_shot = PromptDesign('{examples}{inputs} answer:', examples=4)
    evaluate(backbone, None, 'demo_gloss_category', design=few_shot)

Line breaks, which GPT-3's designs are laid out by, do not reach T5: its SentencePiece models
read each as a space, and several spaces as one. What divides here has to be a word or a sign
that the vocabulary has, such as `; `. Only ByT5 reads line breaks.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from prompt_tuning_jax.data import field_texts
from prompt_tuning_jax.data.cache import load_task, load_task_or_mixture
from prompt_tuning_jax.data.file_task import FileTask
from prompt_tuning_jax.data.order import permutation
from prompt_tuning_jax.data.templates import ANSWERS
from prompt_tuning_jax.data.tokenized_task import NoSplitError, TokenizedTask
from prompt_tuning_jax.data.vocabulary import Vocabulary

# Longest inputs, in tokens, where TASK_FEATURE_LENGTHS is not set.
INPUT_LENGTH = 512

_EXAMPLES = 'examples'


@dataclasses.dataclass(frozen=True)
class PromptDesign:
  """What stands around the input of every example; the task's words are fields in braces.

  Attributes:
    template: what the model reads: words, fields of the example such as {inputs}, and
      {examples} where the solved ones stand. `{{` and `}}` are braces to be read.
    examples: k, how many examples of the training split are shown solved.
    example_template: one of these, likewise; {targets} is its answer.
    separator: what follows each of them, also the last.
    seed: which examples, and in which order.
  """

  template: str = '{examples}{inputs} answer:'
  examples: int = 0
  example_template: str = '{inputs} answer: {targets}'
  separator: str = '; '
  seed: int = 0

  def __post_init__(self):
    for name in ('examples', 'seed'):
      value = getattr(self, name)
      if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(
            f'PromptDesign.{name} is {value!r}; expected a whole number, 0 or more.'
        )
    if not isinstance(self.separator, str):
      raise ValueError(
          f"PromptDesign.separator is {self.separator!r}; expected a text, such as '; '."
      )
    for name in self._parsed('template').fields:
      if name in ANSWERS:
        raise ValueError(
            f'PromptDesign.template={self.template!r} puts the field {name!r} into the input: '
            'the model would read the answer that it is to give. The answers of solved examples '
            'belong into PromptDesign.example_template.'
        )
    if not self.fields:
      raise ValueError(
          f'PromptDesign.template={self.template!r} names no field of the example, so that '
          'every input would be the same. Put {inputs} where its text belongs.'
      )
    if self.examples and _EXAMPLES not in self._parsed('template').fields:
      raise ValueError(
          f'PromptDesign.examples={self.examples}, but PromptDesign.template='
          f'{self.template!r} has no place for them. Put {{examples}} where they belong, in '
          "front as a rule: '{examples}{inputs} answer:'."
      )
    if _EXAMPLES in self._parsed('example_template').fields:
      raise ValueError(
          f'PromptDesign.example_template={self.example_template!r} is one example, and '
          '{examples} are all of them: that belongs into PromptDesign.template.'
      )
    if not set(ANSWERS) & set(self._parsed('example_template').fields):
      raise ValueError(
          f'PromptDesign.example_template={self.example_template!r} shows no answer. Put '
          '{targets} where it belongs.'
      )

  def _parsed(self, parameter: str) -> field_texts.FieldText:
    text = getattr(self, parameter)
    if not isinstance(text, str):
      raise ValueError(
          f'PromptDesign.{parameter} is {text!r}; expected a text with fields in braces, such '
          "as '{inputs}'."
      )
    if not set('{}') & set(text):
      return field_texts.FieldText(parameter, ((text, None),))
    return field_texts.parse(parameter, text, 'PromptDesign')

  @property
  def fields(self) -> tuple[str, ...]:
    """The fields of an example that the template reads."""
    named = dict.fromkeys(self._parsed('template').fields)
    return tuple(name for name in named if name != _EXAMPLES)

  def text(self, fields: Mapping[str, str], shots: Sequence[str] = ()) -> str:
    """What the model reads of one example.

    Args:
      fields: the texts of the fields that the template reads.
      shots: solved examples, the nearest to the question last.

    Raises:
      ValueError: if a field is missing.
    """
    missing = [name for name in self.fields if name not in fields]
    if missing:
      raise ValueError(
          f'PromptDesign.template={self.template!r} reads the field {missing[0]!r}, but the '
          f'fields given are {", ".join(fields) or "none"}.'
      )
    solved = ''.join(shot + self.separator for shot in shots)
    return self._parsed('template').joined({**fields, _EXAMPLES: solved})

  def draw(
      self, train: TokenizedTask, questions: TokenizedTask | None = None
  ) -> list[int]:
    """Which training examples are shown, the nearest to the question last.

    Where the task has classes, these take turns, in an order of each turn's own: of every
    class there are as many, up to one, or all there are. The k examples of a seed are the
    last k of those that a larger k has, so that leaving out the first ones is a smaller k.

    Args:
      train: the training split.
      questions: examples whose inputs are among these are never shown.

    Raises:
      ValueError: if there are fewer than k.
    """
    asked = set()
    if questions is not None:
      asked = {questions[index]['inputs'].tobytes() for index in range(len(questions))}
    classes: dict[bytes, list[int]] = {}
    for number in permutation(f'{self.seed}/{train.name}/examples', len(train)).tolist():
      example = train[number]
      if example['inputs'].tobytes() not in asked:
        key = example['targets'].tobytes() if train.label_classes else b''
        classes.setdefault(key, []).append(number)
    available = sum(map(len, classes.values()))
    if available < self.examples:
      raise ValueError(
          f'PromptDesign.examples={self.examples}, but {train.name}, split {train.split!r}, has '
          f'only {available} examples'
          + (f' that are not in the split {questions.split!r}' if available < len(train) else '')
          + '. Lower it'
          + (
              ', or evaluate on another split: the examples that are shown come from train.'
              if available < len(train)
              else '.'
          )
      )
    drawn: list[int] = []
    names = sorted(classes)
    for turn in itertools.count():
      if len(drawn) >= self.examples:
        break
      for place in permutation(f'{self.seed}/{train.name}/classes/{turn}', len(names)):
        drawn += classes[names[place]][turn : turn + 1]
    return drawn[: self.examples][::-1]

  def __call__(
      self,
      task: TokenizedTask,
      train: TokenizedTask | None = None,
      *,
      length: int = INPUT_LENGTH,
  ) -> TokenizedTask:
    """The same task with the inputs of this design.

    Where an input would have more tokens than `length`, its first examples are left out, the
    question never; how many is one warning.

    Args:
      task: the questions.
      train: its training split, where there are examples to be shown.
      length: most tokens of an input, the end-of-sequence token included.

    Raises:
      ValueError: if a template names a field that an example does not have, or one that
        holds the answer; if examples are to be shown and `train` is missing, too small or
        without labels.
    """
    self.warn_of_line_breaks(task.vocabulary)
    of_question = self._parsed('template')
    asked = [_texts(task, index, of_question) for index in range(len(task))]
    self._check_answers(task, asked)
    shots: list[str] = []
    if self.examples:
      if train is None:
        raise ValueError(
            f'PromptDesign.examples={self.examples} are drawn from the training split of '
            f'{task.name}, which is not there. Name the task instead of giving a loaded split, '
            'or give design(task, train) both splits.'
        )
      train.require_labels()
      of_example = self._parsed('example_template')
      shots = [
          of_example.joined(_texts(train, number, of_example))
          for number in self.draw(train, task)
      ]
    counts = self._fitting(asked, shots, task.vocabulary, length)
    _warn_of_left_out(task, counts, len(shots), length)
    return task.with_inputs(
        [
            self.text(fields, shots[len(shots) - count :])
            for fields, count in zip(asked, counts.tolist(), strict=True)
        ],
        design=repr(self),
    )

  def _check_answers(self, task: TokenizedTask, asked: Sequence[Mapping[str, str]]) -> None:
    """Refuses a field that is the answer under another name."""
    others = [name for name in self.fields if name != 'inputs']
    if not others:
      return
    answers = []
    for index in range(len(task)):
      target = task.target(index) if task.has_labels else None
      answers.append((task.text('targets', index), str(target)))
    for name in others:
      if all(fields[name] in answer for fields, answer in zip(asked, answers, strict=True)):
        raise ValueError(
            f'PromptDesign.template={self.template!r} names the field {name!r}, which in '
            f'{task.name}, split {task.split!r}, is the answer: the model would read what it is '
            'to say.'
        )

  def _fitting(
      self,
      asked: Sequence[Mapping[str, str]],
      shots: Sequence[str],
      vocabulary: Vocabulary,
      length: int,
  ) -> np.ndarray:
    """How many of the last shots fit in front of each question; 0 where not even it fits."""
    fewest = np.zeros(len(asked), int)
    most = np.full(len(asked), len(shots))
    tried = most
    while (open_ones := np.flatnonzero(fewest < most)).size:
      texts = [self.text(asked[i], shots[len(shots) - tried[i] :]) for i in open_ones]
      counts = np.array([len(ids) + 1 for ids in vocabulary.encode_many(texts)])
      fits = counts <= length
      fewest[open_ones[fits]] = tried[open_ones[fits]]
      most[open_ones[~fits]] = tried[open_ones[~fits]] - 1
      # All of them first, as a rule they fit; then halfway: more examples are more tokens.
      tried = (fewest + most + 1) // 2
    return fewest

  def check_words_alone(self) -> None:
    """Raises ValueError if there are examples, where no task is known to draw them from."""
    if self.examples:
      raise ValueError(
          f'PromptDesign.examples={self.examples}, but infer knows no task to draw them from. '
          'Set --gin.PromptDesign.examples=0; solved examples may stand in '
          'PromptDesign.template as words.'
      )

  def warn_of_line_breaks(self, vocabulary: Vocabulary) -> None:
    """Warns where the design has line breaks that the vocabulary reads as spaces."""
    if '\n' not in self.template + self.example_template + self.separator:
      return
    if vocabulary.encode('a\nb') == vocabulary.encode('a b'):
      warnings.warn(
          'The line breaks of PromptDesign are spaces to this model: its vocabulary has none. '
          "Divide by words or signs that it reads, such as '; '.",
          stacklevel=3,
      )


def _texts(
    task: TokenizedTask, index: int, of_text: field_texts.FieldText
) -> dict[str, str]:
  """The fields of an example that a text of a design names."""
  known = task.example(index) | {name: task.text(name, index) for name in task.features}
  names = dict.fromkeys(name for name in of_text.fields if name != _EXAMPLES)
  try:
    return {name: field_texts.field_text(known, name) for name in names}
  except ValueError as error:
    missing = [n for n in names if field_texts.find(known, n) is field_texts.MISSING]
    near = difflib.get_close_matches(missing[0], known, n=1) if missing else []
    hint = f' Did you mean {near[0]!r}?' if near else ''
    raise ValueError(
        f'PromptDesign.{of_text.parameter} cannot be filled by example {index} of {task.name}, '
        f'split {task.split!r}: {error}.{hint} Fields: {", ".join(known)}.'
    ) from error


def _warn_of_left_out(task: TokenizedTask, counts: np.ndarray, k: int, length: int) -> None:
  short = counts < k
  if short.any():
    warnings.warn(
        f'{int(short.sum()):,} of the {len(task):,} inputs of {task.name}, split '
        f'{task.split!r}, have fewer than the {k} examples of PromptDesign.examples in front, so '
        f'that they fit {length} tokens: {int((k - counts).sum()):,} are left out in all, and '
        f"the fewest that an input has is {int(counts.min())}. Raise 'inputs' in "
        'TASK_FEATURE_LENGTHS, or lower PromptDesign.examples.',
        stacklevel=3,
    )


def load_designed(
    design: PromptDesign | None,
    task: str | FileTask,
    split: str,
    vocabulary: Vocabulary,
    *,
    length: int = INPUT_LENGTH,
    target_prefix: str | None = None,
    **settings: Any,
) -> list[tuple[TokenizedTask, float]]:
  """`load_task_or_mixture` with the inputs of a design, if there is one.

  The design comes after the cache, which holds the inputs as the task has them. Every task
  of a mixture shows examples of its own training split.

  Args:
    design: the design, or None.
    task: name of a seqio task or mixture, or a task of files.
    split: the split of the questions.
    vocabulary: the model's vocabulary.
    length: most tokens of an input.
    target_prefix: what stands before every target; before the answers of solved examples only
      the design's own words do.
    **settings: as `load_task` takes them.

  Raises:
    ValueError: if a task has no training split to draw examples from; else as `load_task`
      and `PromptDesign`.
  """
  loaded = load_task_or_mixture(
      task, split, vocabulary, target_prefix=target_prefix, **settings
  )
  if design is None:
    return loaded
  designed = []
  for questions, rate in loaded:
    train = None
    if design.examples:
      of_task = task if isinstance(task, FileTask) else questions.name
      try:
        train = load_task(of_task, 'train', vocabulary, **settings)
      except NoSplitError as error:
        raise ValueError(
            f'PromptDesign.examples={design.examples} are drawn from train, but {error} Set '
            'PromptDesign.examples=0 to evaluate the words alone.'
        ) from error
    designed.append((design(questions, train, length=length), rate))
  return designed
