"""The runs of a sweep: the points of a grid, and what each of them is.

A point is the arguments of `train`, or of an evaluation with words around the input. Here it is
decided which points are the same run, which can share a program, and by what their results are
known again; `sweep.py` trains them.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from prompt_tuning_jax.checkpoints.load import load_backbone
from prompt_tuning_jax.data.cache import describe_data, load_task_or_mixture
from prompt_tuning_jax.data.prompt_design import PromptDesign
from prompt_tuning_jax.evaluation.evaluator import Evaluator
from prompt_tuning_jax.sweep_report import SEEDS
from prompt_tuning_jax.training import together
from prompt_tuning_jax.training.description import describe
from prompt_tuning_jax.training.run_evaluation import RunEvaluation

# What the arguments of `train` say of the data, and of an evaluation.
_OF_DATA = ('task', 'eval_task', 'eval_split', 'target_prefix', 'task_module')
_OF_EVALUATION = ('backbone', *_OF_DATA, 'eval_method', 'feature_lengths', 'decoding')


@dataclasses.dataclass(frozen=True)
class SweepRun:
  """A point of a grid.

  Attributes:
    settings: what the point sets, by the names and values that tables and plots show.
    arguments: the arguments of `train` that this amounts to, without model_dir; with a `design`
      among them nothing is trained, and the backbone is evaluated with that.
  """

  settings: dict[str, Any]
  arguments: dict[str, Any]

  @property
  def design(self) -> PromptDesign | None:
    """Words and solved examples, of a run in which nothing trains."""
    return self.arguments.get('design')

  @property
  def values(self) -> dict[str, Any]:
    """All arguments of `train`, with the defaults of those that are not given."""
    given = {name: value for name, value in self.arguments.items() if name != 'design'}
    return together.completed(given)

  @property
  def name(self) -> str:
    """'PROMPT_LENGTH=5,RANDOM_SEED=0', also the name of the run's folder."""
    text = ','.join(f'{name}={value}' for name, value in self.settings.items())
    short = re.sub(r'[^\w=,.+-]+', '_', text)
    if short == text and len(short) <= 120:
      return short
    # Two texts may become the same file name.
    return f'{short[:110]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}'


def grid_points(grid: Mapping[str, Any]) -> list[dict[str, Any]]:
  """All combinations of a grid's values, the last name varying fastest.

  Raises:
    ValueError: if there is no name, a name has no values, or a value is there twice.
  """
  if not isinstance(grid, Mapping) or not grid:
    raise ValueError(
        f'The grid of a sweep is {grid!r}; a dict of lists of values was expected, such as '
        "SWEEP = {'PROMPT_LENGTH': [1, 20, 100], 'RANDOM_SEED': [0, 1, 2]}."
    )
  for name, values in grid.items():
    if not isinstance(values, (list, tuple, Mapping)) or not values:
      raise ValueError(
          f'The grid of a sweep has {values!r} for {name}; a list of its values was expected, '
          f"such as {{'{name}': [{values!r}]}}."
      )
    shown = [str(value) for value in values]
    if twice := sorted({value for value in shown if shown.count(value) > 1}):
      raise ValueError(f'{name} has the value {", ".join(twice)} more than once in the grid.')
  return [dict(zip(grid, values)) for values in itertools.product(*grid.values())]


def runs_of_grid(grid: Mapping[str, Any], arguments: Mapping[str, Any]) -> list[SweepRun]:
  """The runs of a grid over arguments of `train`, and the arguments that all of them have."""

  def labels(values: Any) -> Any:
    return list(map(label_of, values)) if isinstance(values, (list, tuple)) else values

  points = grid_points({name: labels(values) for name, values in grid.items()})
  labelled = {
      name: values if isinstance(values, Mapping) else dict(zip(labels(values), values))
      for name, values in grid.items()
  }
  # Of a backbone that is named there is one copy of the weights.
  opened = functools.cache(load_backbone)
  runs = []
  for point in points:
    of_run = {**arguments, **{n: labelled[n][label] for n, label in point.items()}}
    if isinstance(of_run.get('backbone'), str):
      of_run['backbone'] = opened(of_run['backbone'])
    runs.append(SweepRun(point, of_run))
  return runs


def label_of(value: Any) -> Any:
  """What stands for a value in tables: itself, or what it is made of."""
  if value is None or isinstance(value, (bool, int, float, str)):
    return value
  return json.dumps(describe(value), sort_keys=True, default=str)


def distinct(runs: Sequence[SweepRun]) -> list[SweepRun]:
  """The runs without those that only a seed would tell apart, which they do not use.

  Raises:
    ValueError: if two are the same run although they differ in more.
  """
  found: dict[str, SweepRun] = {}
  for run in runs:
    # The same backbone is one object; what it holds need not be read for this.
    key = sum_of(_settings_of(run) | {'backbone': id(run.values['backbone'])})
    first = found.setdefault(key, run)
    different = [n for n, value in run.settings.items() if first.settings.get(n) != value]
    if any(name not in SEEDS for name in different):
      raise ValueError(
          f'{first.name} and {run.name} are the same run: nothing in it depends on '
          f'{", ".join(different)}, or a flag decides it for both. Leave one of them out.'
      )
  return list(found.values())


def programs_of(runs: Sequence[SweepRun]) -> list[list[SweepRun]]:
  """The runs that train together, in their order."""
  names = [run.name for run in runs]
  if twice := sorted({name for name in names if names.count(name) > 1}):
    raise ValueError(f'The sweep has {", ".join(twice)} more than once.')
  programs: dict[str, list[SweepRun]] = {}
  for run in runs:
    key = None if run.design is not None else together.shared_key(run.values)
    # The same backbone is one object.
    key = run.name if key is None else [id(run.values['backbone']), key]
    text = json.dumps(key, sort_keys=True, default=str)
    programs.setdefault(text, []).append(run)
  return list(programs.values())


def description_of(run: SweepRun) -> dict[str, Any]:
  """What decides how a run ends."""
  return _settings_of(run) | {'backbone': run.values['backbone'].description()}


def _settings_of(run: SweepRun) -> dict[str, Any]:
  """The same, but for the backbone."""
  kept = {name: value for name, value in run.values.items() if name not in together.ASIDE}
  if run.design is not None:
    # Without solved examples its seed draws nothing.
    design = run.design if run.design.examples else dataclasses.replace(run.design, seed=0)
    kept = {**{name: kept[name] for name in _OF_EVALUATION}, 'design': design}
  del kept['backbone']
  # As it is read again.
  return json.loads(json.dumps(describe(kept), default=str))


def sum_of(description: Mapping[str, Any]) -> str:
  text = json.dumps(description, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def data_of(runs: Sequence[SweepRun]) -> dict[str, dict[str, Any]]:
  """What the data of each run hold, by its name.

  Raises:
    ValueError, OSError: if they cannot be read, or have no BEST_METRIC.
  """
  found: dict[str, dict[str, Any]] = {}
  data = {}
  for run in runs:
    values = run.values
    names = (*_OF_DATA, 'eval_method', 'feature_lengths', 'best_metric')
    key = describe({name: values[name] for name in names})
    key = json.dumps([key, id(values['backbone']), describe(run.design)], default=str)
    if key not in found:
      found[key] = _data(run)
    data[run.name] = found[key]
  return data


def _data(run: SweepRun) -> dict[str, Any]:
  """How many examples a run is trained and evaluated on, and what files of one's own hold."""
  values = run.values
  vocabulary = values['backbone'].needed_vocabulary('no task can be tokenised for it')
  load = {name: values[name] for name in ('tfds_data_dir', 'cache_dir')}
  load |= {name: values[name] for name in ('task_module', 'target_prefix')}

  def tasks_of(task: Any, split: str) -> Any:
    return load_task_or_mixture(task, split, vocabulary, **load)

  found = {}
  of_evaluation = values['eval_task'] or values['task']
  # A design shows examples of the task that it is evaluated on.
  of_training = values['task'] if run.design is None else of_evaluation
  if run.design is None or run.design.examples:
    found['train'] = describe_data(of_training, tasks_of(of_training, 'train'))
  tasks = tasks_of(of_evaluation, values['eval_split'])
  found['evaluation'] = describe_data(of_evaluation, tasks)
  if run.design is None:
    how = {'feature_lengths': values['feature_lengths'], 'method': values['eval_method']}
    evaluation = RunEvaluation(Evaluator(values['backbone'], task, **how) for task, _ in tasks)
    evaluation.check_metric(values['best_metric'])
  return found


def announced(programs: Sequence[Sequence[SweepRun]], done: int = 0) -> str:
  """How many runs train how, in a line for each program that is left."""
  waiting = sum(map(len, programs))
  lines = [f'sweep      {waiting + done} runs' + f', {waiting} left' * bool(done)]
  for program in programs:
    what = f'{len(program)} in one program' if len(program) > 1 else 'alone'
    if program[0].design is not None:
      what = 'evaluated without training'
    names = [run.name for run in program]
    shown = ', '.join(names[:3]) + f' … {names[-1]}' * (len(names) > 3)
    lines.append(f'  {what}: {shown}')
  return '\n'.join(lines)
