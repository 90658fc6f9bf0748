"""Predictions in the form that the leaderboard of SuperGLUE takes, a file for each task.

    results = evaluate(backbone, prompt, 'taskless_super_glue_v102_proportional', split='test')
    write_leaderboard(results.values(), 'submission')
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from prompt_tuning_jax.evaluation.results import EvalResult
from prompt_tuning_jax.evaluation.super_glue import task_of
from prompt_tuning_jax.json_files import write_jsonl

# Task → the name of its file in a submission, and how it calls the classes there, in their
# order. The labels of MultiRC and the answers of ReCoRD are what they are.
_FILES: Mapping[str, tuple[str, Sequence[Any]]] = {
    'boolq': ('BoolQ', ('false', 'true')),
    'cb': ('CB', ('entailment', 'contradiction', 'neutral')),
    'copa': ('COPA', (0, 1)),
    'multirc': ('MultiRC', (0, 1)),
    'record': ('ReCoRD', ()),
    'rte': ('RTE', ('entailment', 'not_entailment')),
    'wic': ('WiC', ('false', 'true')),
    'wsc': ('WSC', ('False', 'True')),
    'axb': ('AX-b', ('entailment', 'not_entailment')),
    'axg': ('AX-g', ('entailment', 'not_entailment')),
}


def write_leaderboard(results: Iterable[EvalResult], folder: str | os.PathLike[str]) -> list[str]:
  """Writes predictions in the form that the leaderboard takes: `CB.jsonl` and so on.

  Lines are `{"idx": 3, "label": "neutral"}`, in the order of the numbers; MultiRC's hold a
  passage with its questions and their answers. An answer that is no class stands as the
  first of them, for the form knows no other, and is counted in a warning.

  Args:
    results: of some tasks; those that are not SuperGLUE's are left out.
    folder: receives the files.

  Returns:
    The paths of the files.

  Raises:
    ValueError: if a prediction lacks its number, two of one number differ in what the file
      has a single line for, or two results belong in one file. Nothing is written of that
      file.
  """
  of_task: dict[str, EvalResult] = {}
  for result in results:
    if (task := task_of(result.task)) is None:
      continue
    if (other := of_task.setdefault(task, result)) is not result:
      raise ValueError(
          f'{_FILES[task][0]}.jsonl is to hold {other.task}, split {other.split!r}, and '
          f'{result.task}, split {result.split!r}. Write each to a folder of its own.'
      )
  paths = []
  for task, result in of_task.items():
    name, labels = _FILES[task]
    invalid = sum(_value(p) not in range(len(labels)) for p in result.predictions)
    if labels and invalid:
      warnings.warn(
          f'{invalid:,} of {len(result.predictions):,} answers to {result.task} are none of '
          f'its classes; {name}.jsonl holds {labels[0]!r} instead.',
          stacklevel=2,
      )
    make = {'multirc': _multirc_lines, 'record': _record_lines}.get(task, _lines)
    lines = make(result, labels)
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, f'{name}.jsonl')
    write_jsonl(path, lines)
    paths.append(path)
  return paths


def remove_leaderboard(folder: str | os.PathLike[str]) -> None:
  """Removes what `write_leaderboard` left in a folder, so that no submission mixes two runs."""
  for name, _ in _FILES.values():
    with contextlib.suppress(FileNotFoundError):
      os.unlink(os.path.join(folder, f'{name}.jsonl'))


def _value(prediction: Mapping[str, Any]) -> Any:
  value = prediction['prediction']
  return value['value'] if isinstance(value, Mapping) else value


def _label(prediction: Mapping[str, Any], labels: Sequence[Any]) -> Any:
  value = _value(prediction)
  return labels[value] if value in range(len(labels)) else labels[0]


def _numbers(result: EvalResult, *names: str) -> list[tuple[int, ...]]:
  """The numbers of every prediction, one for each name of a field."""
  for prediction in result.predictions:
    if missing := [name for name in names if name not in prediction]:
      raise ValueError(
          f'Prediction {prediction.get("index")} of {result.task} has no {missing[0]!r}, by '
          'which the leaderboard knows an example. Evaluate the task again with this version '
          'of the library.'
      )
  return [tuple(prediction[name] for name in names) for prediction in result.predictions]


def _lines(result: EvalResult, labels: Sequence[Any]) -> list[dict[str, Any]]:
  found: dict[int, Any] = {}
  for (number,), prediction in zip(_numbers(result, 'idx'), result.predictions, strict=True):
    label = _label(prediction, labels)
    if found.setdefault(number, label) != label:
      raise _unlike(result, f'examples of the number {number} with unlike answers')
  return [{'idx': number, 'label': found[number]} for number in sorted(found)]


def _unlike(result: EvalResult, what: str) -> ValueError:
  return ValueError(
      f'{result.task}, split {result.split!r}, has two {what}, but a submission has one line '
      'for each number. Number the examples of its file anew.'
  )


def _record_lines(result: EvalResult, labels: Sequence[Any]) -> list[dict[str, Any]]:
  del labels
  # A question with several right answers is there several times, and counts once.
  found: dict[int, tuple[int, str]] = {}
  numbers = _numbers(result, 'idx/passage', 'idx/query')
  for (passage, query), prediction in zip(numbers, result.predictions, strict=True):
    if found.setdefault(query, (passage, _value(prediction)))[0] != passage:
      raise _unlike(result, f'questions of the number {query}, of different passages')
  return [{'idx': query, 'label': found[query][1]} for query in sorted(found)]


def _multirc_lines(result: EvalResult, labels: Sequence[Any]) -> list[dict[str, Any]]:
  passages: dict[int, dict[int, dict[int, Any]]] = {}
  numbers = _numbers(result, 'idx/paragraph', 'idx/question', 'idx/answer')
  for (passage, question, answer), prediction in zip(numbers, result.predictions, strict=True):
    answers = passages.setdefault(passage, {}).setdefault(question, {})
    label = _label(prediction, labels)
    if answers.setdefault(answer, label) != label:
      number = f'{passage}/{question}/{answer}'
      raise _unlike(result, f'examples of the number {number} with unlike answers')
  return [
      {
          'idx': passage,
          'passage': {
              'questions': [
                  {
                      'idx': question,
                      'answers': [
                          {'idx': answer, 'label': label}
                          for answer, label in sorted(answers.items())
                      ],
                  }
                  for question, answers in sorted(questions.items())
              ]
          },
      }
      for passage, questions in sorted(passages.items())
  ]
