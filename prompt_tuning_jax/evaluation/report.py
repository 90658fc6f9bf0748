"""Several prompts on several tasks: scores as mean ± deviation, and averages over tasks.

    report = evaluate_prompts(backbone, ['seed_0.safetensors', 'seed_1.safetensors'], 'lama_trex')
    print(report)                 # a table
    report.averages               # {'mean of 41 tasks, hit_at_1': [45.1, 45.6]}
    evaluate_prompts(…, ensemble='vote')      # and what the prompts answer together
"""

from __future__ import annotations

import dataclasses
import functools
import glob
import itertools
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
from prompt_tuning_jax.data.file_task import FileTask
from prompt_tuning_jax.data.provenance import library_version
from prompt_tuning_jax.data.tokenized_task import TokenizedTask
from prompt_tuning_jax.evaluation import evaluate as evaluate_lib
from prompt_tuning_jax.evaluation import super_glue
from prompt_tuning_jax.evaluation.ensemble import EnsembleEvaluator
from prompt_tuning_jax.evaluation.evaluate import AnyPrompt
from prompt_tuning_jax.evaluation.kept_answers import AnswerFolder
from prompt_tuning_jax.evaluation.leaderboard import remove_leaderboard, write_leaderboard
from prompt_tuning_jax.evaluation.results import EvalResult, write_result
from prompt_tuning_jax.writing import written_whole

SUPER_GLUE_SCORE = 'SuperGLUE, mean of 8 tasks'

# What the answers of an ensemble are, for the notes.
_ENSEMBLES = {
    'vote': 'what most prompts answer; of equally many what has the higher mean log-probability',
    'mean': 'the class with the highest log-probability, averaged over prompts',
}

# The folder of what prompts answer together, beside those of each.
ENSEMBLE_FOLDER = 'ensemble'

_TASK_SETTINGS = ('task_module', 'tfds_data_dir', 'cache_dir')

# Columns of numbers in the table.
_NUMBERS = ('score', 'average', 'best', 'ensemble', 'examples', 'prompts')


@dataclasses.dataclass(frozen=True, repr=False)
class Report:
  """Results of several prompts, or none, on one or several tasks.

  Attributes:
    results: for each task's name the result of each prompt, in the order of the prompts.
    ensembles: for each task's name the result of all its prompts together, if they were asked.
    ensemble: how they answer together, 'vote' or 'mean'; '' where nobody asked.
  """

  results: Mapping[str, Sequence[EvalResult]]
  ensembles: Mapping[str, EvalResult] = dataclasses.field(default_factory=dict)
  ensemble: str = ''

  def scores(self, task: str) -> dict[str, list[float]]:
    """A task's metrics, each with its value for every prompt."""
    results = self.results[task]
    return {name: [r.metrics[name] for r in results] for name in results[0].metrics}

  @functools.cached_property
  def _best(self) -> dict[str, dict[str, float]]:
    """Of each task the highest value that a prompt has, of each metric for itself."""
    return {
        task: {name: max(values) for name, values in self.scores(task).items()}
        for task in self.results
    }

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
    return self._averaged(rows)

  def _averaged(
      self, rows: Sequence[Mapping[str, Mapping[str, float]]]
  ) -> dict[str, list[float]]:
    """The averages of each row, in which every task has its metrics."""
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
    if self.ensembles:
      notes.append('best: the highest score of a prompt on these examples, metric by metric.')
      notes.append(f'ensemble: {_ENSEMBLES[self.ensemble]}.')
    unlabelled = [task for task, results in self.results.items() if not results[0].metrics]
    if unlabelled:
      notes.append(f'Predicted, not scored, having no labels: {", ".join(unlabelled)}.')
    return notes

  def __repr__(self) -> str:
    all_results = [result for results in self.results.values() for result in results]
    if len(all_results) == 1 and not self.ensembles:
      return repr(all_results[0])
    return '\n'.join([self._table(), *(['', *self.notes] if self.notes else [])])

  def _table(self) -> str:
    return screen.table(self._rows(), numbers=_NUMBERS)

  @functools.cached_property
  def _averages_together(self) -> dict[str, tuple[float, float]]:
    """Of each average that of the tasks' best scores, and that of their ensembles."""
    if not self.ensembles:
      return {}
    of_ensembles = {task: result.metrics for task, result in self.ensembles.items()}
    averages = self._averaged([self._best, of_ensembles])
    return {name: (best, together) for name, (best, together) in averages.items()}

  def _rows(self) -> list[tuple[str, ...]]:
    scores = ('average', 'best', 'ensemble') if self.ensembles else ('score',)
    rows = [('task', 'split', 'metric', *scores, 'examples', 'prompts')]

    def score(values: Sequence[float], *others: float) -> tuple[str, ...]:
      others = others if self.ensembles else ()
      return mean_and_deviation(values), *(f'{value:.2f}' for value in others)

    for task, results in self.results.items():
      counts = f'{len(results[0].predictions):,}', f'{len(results)}'
      together = self.ensembles[task].metrics if self.ensembles else {}
      of_metrics = {
          name: score(values, self._best[task][name], together.get(name, math.nan))
          for name, values in self.scores(task).items()
      }
      for name, of_metric in (of_metrics or {'none': ('',) * len(scores)}).items():
        rows.append((task, results[0].split, name, *of_metric, *counts))
    for name, values in self.averages.items():
      others = self._averages_together.get(name, ())
      rows.append((name, '', '', *score(values, *others), '', f'{len(values)}'))
    return rows

  def as_dict(self) -> dict[str, Any]:
    """The same as plain data, for `report.json`."""
    together = {
        name: {'best': _number(best), 'ensemble': _number(ensemble)}
        for name, (best, ensemble) in self._averages_together.items()
    }
    return {
        'tasks': {
            task: {
                'split': results[0].split,
                'examples': len(results[0].predictions),
                'prompts': [result.prompt for result in results],
                'metrics': {name: _described(v) for name, v in self.scores(task).items()},
                **(
                    {'ensemble': {n: _number(v) for n, v in self.ensembles[task].metrics.items()}}
                    if self.ensembles
                    else {}
                ),
            }
            for task, results in self.results.items()
        },
        'averages': {
            name: _described(values) | together.get(name, {})
            for name, values in self.averages.items()
        },
        **({'ensemble': self.ensemble} if self.ensembles else {}),
        'notes': self.notes,
        'library_version': library_version(),
    }

  def write(self, folder: str | os.PathLike[str]) -> None:
    """Writes `report.md`, `report.json` and, of SuperGLUE, the files of the leaderboard.

    Those lie in `super_glue/`, or of several prompts in `prompt_0/super_glue/` and so on and of
    all together in `ensemble/super_glue/`, in place of what an earlier evaluation left there.
    Where a task has nothing that can be submitted, a warning says why.
    """
    text = '\n'.join([self._table(), *(f'\n{note}' for note in self.notes)])
    for name, content in (
        ('report.md', text + '\n'),
        ('report.json', json.dumps(self.as_dict(), indent=1, ensure_ascii=False) + '\n'),
    ):
      with written_whole(os.path.join(folder, name)) as unfinished:
        Path(unfinished).write_text(content, encoding='utf-8')
    places = [os.path.join(glob.escape(folder), name) for name in ('prompt_*', ENSEMBLE_FOLDER)]
    for earlier in (folder, *itertools.chain(*map(glob.glob, places))):
      remove_leaderboard(os.path.join(earlier, 'super_glue'))
    count = max(map(len, self.results.values()))
    written = {
        prompt_folder(folder, number, count): [
            results[number] for results in self.results.values() if number < len(results)
        ]
        for number in range(count)
    }
    if self.ensembles:
      written[os.path.join(folder, ENSEMBLE_FOLDER)] = list(self.ensembles.values())
    for place, of_prompt in written.items():
      # Nobody submits the examples that were trained on, and their numbers may repeat.
      submitted = [r for r in of_prompt if not r.split.startswith('train')]
      of_leaderboard = os.path.join(place, 'super_glue')
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
    ensemble: str | None = None,
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
    ensemble: 'vote' or 'mean' lets the prompts of a task answer together too (`voting.agreed`),
      in one pass over it for all of them; None leaves each to itself.
    output_dir: receives metrics and predictions as each is done (of several prompts in
      `prompt_0/` and so on, of all together in `ensemble/`), then what `Report.write` writes.
      Interrupted, the same evaluation goes on there where it stopped.
    progress: whether to show progress, and every result as it comes.
    **settings: as `evaluate` takes them.

  Raises:
    ValueError: if a task has no prompts; else as `evaluate`, or as `EnsembleEvaluator`.
  """
  of_tasks = {name: settings.pop(name) for name in _TASK_SETTINGS if name in settings}
  design = settings.pop('design', None)
  given = prompts.values() if isinstance(prompts, Mapping) else [prompts]
  evaluate_lib.check_alone(design, itertools.chain(*given))
  loaded = evaluate_lib.load_tasks(
      backbone, tasks, split, of_tasks, design, settings.get('feature_lengths')
  )
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
  ensembles: dict[str, EvalResult] = {}
  answer_folder = AnswerFolder(output_dir)
  if ensemble:
    params = settings.pop('params', None)
    evaluators = {
        name: EnsembleEvaluator(
            backbone,
            own[name],
            task,
            ensemble=ensemble,
            keep_in=answer_folder,
            progress=progress,
            **settings,
        )
        for name, task in loaded.items()
    }
    for name, evaluator in evaluators.items():
      results[name], ensembles[name] = evaluator(params)
      if output_dir is not None and jax.process_index() == 0:
        for number, result in enumerate(results[name]):
          write_result(result, prompt_folder(output_dir, number, count))
        write_result(ensembles[name], os.path.join(output_dir, ENSEMBLE_FOLDER))
      if progress and len(loaded) > 1:
        print(f'{ensembles[name]}, of {len(results[name])} prompts', file=sys.stderr)
  else:
    for name, task in loaded.items():
      for number, prompt in enumerate(own[name]):
        result = evaluate_lib.evaluate(
            backbone,
            prompt,
            task,
            output_dir=output_dir and prompt_folder(output_dir, number, count),
            keep_in=answer_folder,
            progress=progress,
            **settings,
        )
        results.setdefault(name, []).append(result)
        if progress and len(loaded) * count > 1:
          print(result, file=sys.stderr)
  report = Report(results, ensembles, ensemble or '')
  if output_dir is not None and jax.process_index() == 0:
    report.write(output_dir)
  answer_folder.forget()
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


def _number(value: float) -> float | None:
  return value if math.isfinite(value) else None  # JSON has no NaN.


def _described(values: Sequence[float]) -> dict[str, Any]:
  return {
      'mean': _number(statistics.fmean(values)),
      'std': _number(_deviation(values)) if len(values) > 1 else None,
      'values': list(map(_number, values)),
  }
