"""Several prompts on several tasks: scores as mean ± deviation, and averages over tasks.

    report = evaluate_prompts(backbone, ['seed_0.safetensors', 'seed_1.safetensors'], 'lama_trex')
    print(report)                 # a table
    report.averages               # {'mean of 41 tasks, hit_at_1': [45.1, 45.6]}
"""

from __future__ import annotations

import dataclasses
import functools
import glob
import json
import math
import os
import statistics
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from prompt_tuning_jax import screen
from prompt_tuning_jax.backbones.backbone import Backbone
from prompt_tuning_jax.checkpoints.source import written_whole
from prompt_tuning_jax.data.file_task import FileTask
from prompt_tuning_jax.data.provenance import library_version
from prompt_tuning_jax.data.tokenized_task import TokenizedTask
from prompt_tuning_jax.evaluation import evaluate as evaluate_lib
from prompt_tuning_jax.evaluation import super_glue
from prompt_tuning_jax.evaluation.evaluate import AnyPrompt
from prompt_tuning_jax.evaluation.leaderboard import remove_leaderboard, write_leaderboard
from prompt_tuning_jax.evaluation.results import EvalResult

SUPER_GLUE_SCORE = 'SuperGLUE, mean of 8 tasks'

_TASK_SETTINGS = ('task_module', 'tfds_data_dir', 'cache_dir')


@dataclasses.dataclass(frozen=True, repr=False)
class Report:
  """Results of several prompts, or none, on one or several tasks.

  Attributes:
    results: for each task's name the result of each prompt, in the order of the prompts.
  """

  results: Mapping[str, Sequence[EvalResult]]

  def scores(self, task: str) -> dict[str, list[float]]:
    """A task's metrics, each with its value for every prompt."""
    results = self.results[task]
    return {name: [r.metrics[name] for r in results] for name in results[0].metrics}

  @functools.cached_property
  def averages(self) -> dict[str, list[float]]:
    """Means over tasks: SuperGLUE's score, or of each metric that all tasks have.

    There is a value for every prompt where all tasks have as many, the first prompts of all
    tasks together, the second ones, and so on; else one, of the means over prompts.
    """
    counts = {len(results) for results in self.results.values()}
    rows = [
        {task: results[number].metrics for task, results in self.results.items()}
        for number in range(counts.pop() if len(counts) == 1 else 0)
    ] or [
        {
            task: {name: statistics.fmean(values) for name, values in self.scores(task).items()}
            for task in self.results
        }
    ]
    if not self._without_score:
      return {SUPER_GLUE_SCORE: [super_glue.super_glue_score(row) for row in rows]}
    names = [*map(set, rows[0].values())]
    if len(names) < 2 or self._super_glue_tasks:
      return {}
    return {
        f'mean of {len(names)} tasks, {name}': [
            statistics.fmean(metrics[name] for metrics in row.values()) for row in rows
        ]
        for name in rows[0][next(iter(rows[0]))]
        if all(name in metrics for metrics in names)
    }

  @property
  def _super_glue_tasks(self) -> dict[str, list[str]]:
    """Task of SuperGLUE → the names under which it is there, of which it has one for each split."""
    found: dict[str, list[str]] = {}
    for name in self.results:
      if (task := super_glue.task_of(name)) is not None:
        found.setdefault(task, []).append(name)
    return found

  @property
  def _without_score(self) -> list[str]:
    """What keeps SuperGLUE's score from being made."""
    found = self._super_glue_tasks
    missing = [task for task in super_glue.METRICS if task not in found]
    problems = [f'{", ".join(missing)} missing'] if missing else []
    for task in super_glue.METRICS:
      names = found.get(task, [])
      if len(names) > 1:
        problems.append(f'{task} is there as {" and as ".join(names)}')
      elif names and not self.results[names[0]][0].metrics:
        problems.append(f'{task} has no labels')
    return problems

  @property
  def notes(self) -> list[str]:
    """What the table does not say of itself."""
    notes = []
    if any(len(results) > 1 for results in self.results.values()):
      notes.append('± is the standard deviation of the sample, over prompts.')
    if len(self._super_glue_tasks) > 1 and self._without_score:
      notes.append(f'No SuperGLUE score: {"; ".join(self._without_score)}.')
    unlabelled = [task for task, results in self.results.items() if not results[0].metrics]
    if unlabelled:
      notes.append(f'Predicted, not scored, having no labels: {", ".join(unlabelled)}.')
    return notes

  def __repr__(self) -> str:
    all_results = [result for results in self.results.values() for result in results]
    if len(all_results) == 1:
      return repr(all_results[0])
    return '\n'.join([self._table(), *(['', *self.notes] if self.notes else [])])

  def _table(self) -> str:
    return screen.table(self._rows(), numbers=('score', 'examples', 'prompts'))

  def _rows(self) -> list[tuple[str, ...]]:
    rows = [('task', 'split', 'metric', 'score', 'examples', 'prompts')]
    for task, results in self.results.items():
      counts = f'{len(results[0].predictions):,}', f'{len(results)}'
      scores = {name: mean_and_deviation(v) for name, v in self.scores(task).items()}
      for name, score in (scores or {'none': ''}).items():
        rows.append((task, results[0].split, name, score, *counts))
    for name, values in self.averages.items():
      rows.append((name, '', '', mean_and_deviation(values), '', f'{len(values)}'))
    return rows

  def as_dict(self) -> dict[str, Any]:
    """The same as plain data, for `report.json`."""
    return {
        'tasks': {
            task: {
                'split': results[0].split,
                'examples': len(results[0].predictions),
                'prompts': [result.prompt for result in results],
                'metrics': {name: _described(v) for name, v in self.scores(task).items()},
            }
            for task, results in self.results.items()
        },
        'averages': {name: _described(values) for name, values in self.averages.items()},
        'notes': self.notes,
        'library_version': library_version(),
    }

  def write(self, folder: str | os.PathLike[str]) -> None:
    """Writes `report.md`, `report.json` and, of SuperGLUE, the files of the leaderboard.

    Those lie in `super_glue/`, or of several prompts in `prompt_0/super_glue/` and so on, in
    place of what an earlier evaluation left there.
    Where a task has nothing that can be submitted, a warning says why.
    """
    text = '\n'.join([self._table(), *(f'\n{note}' for note in self.notes)])
    for name, content in (
        ('report.md', text + '\n'),
        ('report.json', json.dumps(self.as_dict(), indent=1, ensure_ascii=False) + '\n'),
    ):
      with written_whole(os.path.join(folder, name)) as unfinished:
        Path(unfinished).write_text(content, encoding='utf-8')
    for earlier in (folder, *glob.glob(os.path.join(glob.escape(folder), 'prompt_*'))):
      remove_leaderboard(os.path.join(earlier, 'super_glue'))
    count = max(map(len, self.results.values()))
    for number in range(count):
      of_prompt = [results[number] for results in self.results.values() if number < len(results)]
      # Nobody submits the examples that were trained on, and their numbers may repeat.
      submitted = [r for r in of_prompt if not r.split.startswith('train')]
      of_leaderboard = os.path.join(prompt_folder(folder, number, count), 'super_glue')
      for task in super_glue.TASKS:
        try:
          write_leaderboard(
              [r for r in submitted if super_glue.task_of(r.task) == task], of_leaderboard
          )
        except ValueError as error:
          # The scores stand whether or not they can be submitted.
          warnings.warn(f'There is no file of {task} for the leaderboard: {error}', stacklevel=2)


def evaluate_prompts(
    backbone: Backbone,
    prompts: Sequence[AnyPrompt] | Mapping[str, Sequence[AnyPrompt]],
    tasks: TokenizedTask | FileTask | str | Sequence[TokenizedTask | FileTask | str],
    *,
    split: str = 'validation',
    output_dir: str | None = None,
    progress: bool = True,
    **settings: Any,
) -> Report:
  """Scores several prompts on one or several tasks; see `evaluate`, which does one.

  Args:
    backbone: the model.
    prompts: the prompts, each to be evaluated on every task; or for each task's name its
      own. None among them is the bare model.
    tasks: names of seqio tasks or mixtures, FileTasks, or loaded splits.
    split: the split of what is named.
    output_dir: receives metrics and predictions as each is done (of several prompts in
      `prompt_0/` and so on), then what `Report.write` writes.
    progress: whether to show progress, and every result as it comes.
    **settings: as `evaluate` takes them.

  Raises:
    ValueError: if a task has no prompts; else as `evaluate`.
  """
  of_tasks = {name: settings.pop(name) for name in _TASK_SETTINGS if name in settings}
  loaded = evaluate_lib.load_tasks(backbone, tasks, split, of_tasks)
  own = prompts if isinstance(prompts, Mapping) else dict.fromkeys(loaded, prompts)
  if missing := [name for name in loaded if not own.get(name)]:
    raise ValueError(
        f'There is no prompt for {", ".join(missing)}. Give every task at least one (None is '
        f'the model alone); there are some for {", ".join(own) or "no task"}.'
    )
  # A prompt that does not fit is refused before the first is evaluated.
  for prompt in {id(prompt): prompt for name in loaded for prompt in own[name]}.values():
    evaluate_lib.unpack_prompt(backbone, prompt)
  count = max(len(own[name]) for name in loaded)
  results: dict[str, list[EvalResult]] = {}
  for name, task in loaded.items():
    for number, prompt in enumerate(own[name]):
      result = evaluate_lib.evaluate(
          backbone,
          prompt,
          task,
          output_dir=output_dir and prompt_folder(output_dir, number, count),
          progress=progress,
          **settings,
      )
      results.setdefault(name, []).append(result)
      if progress and len(loaded) * count > 1:
        print(result, file=sys.stderr)
  report = Report(results)
  if output_dir is not None and jax.process_index() == 0:
    report.write(output_dir)
  return report


def prompt_folder(folder: str | os.PathLike[str], number: int, count: int) -> str:
  """Where the files of one of `count` prompts lie."""
  return os.path.join(folder, f'prompt_{number}') if count > 1 else os.fspath(folder)


def mean_and_deviation(values: Sequence[float]) -> str:
  """'71.43 ± 1.79', the mean and the sample's standard deviation; of one value, itself."""
  if len(values) == 1:
    return f'{values[0]:.2f}'
  return f'{statistics.fmean(values):.2f} ± {_deviation(values):.2f}'


def _deviation(values: Sequence[float]) -> float:
  # Not the standard library's, which has no answer where a value is no number.
  return float(np.std(values, ddof=1))


def _described(values: Sequence[float]) -> dict[str, Any]:
  def number(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no NaN.

  return {
      'mean': number(statistics.fmean(values)),
      'std': number(_deviation(values)) if len(values) > 1 else None,
      'values': list(map(number, values)),
  }
