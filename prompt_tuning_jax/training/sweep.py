"""`sweep`: an ablation as one command, its runs trained together as far as they can be.

  result = sweep(
      {'method': {1: SoftPrompt(1), 20: SoftPrompt(20)}, 'random_seed': [0, 1, 2]},
      model_dir='/tmp/length', backbone=backbone, task='demo_gloss_category', train_steps=600, …)
  print(result)                  # a table of mean ± standard deviation over the seeds

The runs are the points of a grid (`sweep_runs.py`). Those that differ in their prompts alone share
a program (`together.py`); the others run in turn, and those with a prompt design
(`data/prompt_design.py`) are evaluated as they are. What a run ended with is written at once, so
that an interrupted sweep goes on where it stopped, and tables and plots can be made from the
results alone (`sweep_report.py`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from prompt_tuning_jax.evaluation.evaluate import evaluate
from prompt_tuning_jax.export import export
from prompt_tuning_jax.json_files import read_json, read_jsonl, write_jsonl
from prompt_tuning_jax.sweep_report import RESULTS, SweepResult
from prompt_tuning_jax.training import loop, together
from prompt_tuning_jax.training.description import differences
from prompt_tuning_jax.training.model_dir import ModelDir
from prompt_tuning_jax.training.run_evaluation import joined
from prompt_tuning_jax.training.state_saving import StateSaver
from prompt_tuning_jax.training.sweep_runs import (
    SweepRun,
    announced,
    data_of,
    description_of,
    distinct,
    label_of,
    programs_of,
    runs_of_grid,
    sum_of,
)
from prompt_tuning_jax.training.train import train
from prompt_tuning_jax.writing import written_whole


def sweep(
    grid: Mapping[str, Sequence[Any] | Mapping[Any, Any]] | Sequence[SweepRun],
    *,
    model_dir: str,
    created_by: str = 'prompt_tuning_jax.sweep',
    progress: bool = True,
    **arguments: Any,
) -> SweepResult:
  """Trains every point of a grid, evaluates it, and makes a table and plots of all.

  Args:
    grid: argument of `train` → its values: a list, or a dict from what tables show to the
      value ({'MLP': PTuning(…)}); or the runs themselves. Values of `backbone` may be names, and
      those of `design` are evaluated without training, but for None.
    model_dir: folder of the sweep: `results.jsonl`, `sweep.json` (what each run was),
      `table.md`, `sweep.png`, and in `runs/` the artifact of each run. Run again, the same
      sweep goes on where it stopped, and one with more points trains those.
    created_by: the command, for the artifacts' manifests.
    progress: whether to show what is trained and the progress lines.
    **arguments: the arguments of `train` that all runs have.

  Returns:
    The results, which print as a table.

  Raises:
    ValueError: if the grid or an argument makes no sense, model_dir holds results of the
      same points with other arguments, or this is one of several processes.
    training.loop.Interrupted: after SIGTERM or SIGINT, once the state is saved.
    OSError, MemoryError: as `train`. A run whose loss is not finite is part of the results,
      and stops no other.
  """
  if jax.process_count() > 1:
    raise ValueError(
        f'A sweep runs in one process, on all devices that it has, and this is one of '
        f'{jax.process_count()}. Train the runs one after another (`train`), or give each '
        'process a part of the grid and a MODEL_DIR of its own, without joining them.'
    )
  runs = runs_of_grid(grid, arguments) if isinstance(grid, Mapping) else list(grid)
  if not runs:
    raise ValueError('A sweep of no runs: its grid has no points.')
  # Nothing is trained before all of them, and their data, were looked at.
  runs = distinct(runs)
  programs = programs_of(runs)
  data = data_of(runs)
  with ModelDir(model_dir):
    os.makedirs(os.path.join(model_dir, 'runs'), exist_ok=True)
    results = _Results(model_dir, runs, data)
    left = [[run for run in program if run.name not in results.done] for program in programs]
    left = [part for program in left for part in _begun_first(program, model_dir)]
    if progress:
      print(announced(left, len(runs) - sum(map(len, left))), file=sys.stderr)
    for number, program in enumerate(left):
      start = time.monotonic()
      found = _train(program, model_dir, created_by=created_by, progress=progress)
      results.add(program, found, time.monotonic() - start)
      result = results.report()
      _let_go(program, left[number + 1 :])
    return result if left else results.report()


def _let_go(program: Sequence[SweepRun], later: Sequence[Sequence[SweepRun]]) -> None:
  """Makes room for other models, where the one of a program is done with."""
  backbone = program[0].values['backbone']
  needed = [run.values['backbone'] for runs in later for run in runs]
  if needed and all(backbone is not other for other in needed):
    backbone.let_go()


def _begun_first(program: list[SweepRun], model_dir: str) -> list[list[SweepRun]]:
  """Of a sweep that was stopped and got more points, what had begun goes on as it was."""
  if len(program) < 2 or program[0].design is not None:
    return [program] if program else []
  descriptions = []
  paths = sorted(Path(model_dir).glob('together_*/run.json'))
  # One that is damaged is dealt with where it is needed.
  with contextlib.suppress(ValueError):
    descriptions = [read_json(path) for path in paths if any(path.parent.glob('checkpoint_*'))]
  for before in descriptions:
    names = list(before.get('trials', ()))
    begun = [run for name in names for run in program if run.name == name]
    if 0 < len(begun) == len(names):
      now = together.described([run.values for run in begun], names)
      now |= begun[0].values['backbone'].description()
      if json.loads(json.dumps(now)).items() <= before.items():
        rest = [run for run in program if run.name not in names]
        return [begun, *_begun_first(rest, model_dir)]
  return [program]


def _train(
    program: Sequence[SweepRun], model_dir: str, **how: Any
) -> list[dict[str, Any]]:
  """Trains the runs of a program; what each ended with."""
  folders = [os.path.join(model_dir, 'runs', run.name) for run in program]
  if program[0].design is not None:
    metrics = _evaluated(program[0], progress=how['progress'])
    return [{'step': 0, 'metrics': metrics, 'stopped_at': None, 'prompt': None}]
  if len(program) == 1:
    return [_train_alone(program[0], folders[0], model_dir, **how)]
  names = [run.name for run in program]
  # A sweep that got more points since trains what is left in another folder.
  number = hashlib.sha256('\n'.join(names).encode()).hexdigest()[:8]
  paths = [os.path.join(folder, 'prompt.safetensors') for folder in folders]
  found = together.train_together(
      [run.values for run in program],
      names,
      model_dir=os.path.join(model_dir, f'together_{number}'),
      prompt_paths=paths,
      **how,
  )
  return [
      result | {'prompt': None if result['step'] is None else os.path.relpath(path, model_dir)}
      for result, path in zip(found, paths, strict=True)
  ]


def _train_alone(run: SweepRun, folder: str, model_dir: str, **how: Any) -> dict[str, Any]:
  """Trains one run; what it ended with, or what was measured before it went out of bounds."""
  values = run.values
  try:
    result = train(**{**values, 'model_dir': folder, **how})
    step, metrics, path, stopped_at = result.step, result.metrics, result.path, None
  except loop.OutOfBounds as error:
    warnings.warn(f'{run.name}: {error}', stacklevel=2)
    step, metrics, path, stopped_at = None, {}, None, error.step
    chosen = {name: values[name] for name in ('best_metric', 'best_mode')}
    saver = StateSaver(folder, **chosen)
    if measured := [saved for saved in saver.all() if saved.metrics]:
      saved = saver.best() or measured[-1]
      step, metrics = saved.step, saved.metrics
      path = export(
          backbone=values['backbone'],
          checkpoint_path=saved.path,
          output=os.path.join(folder, 'prompt.safetensors' if values['method'] else 'backbone'),
          method=values['method'],
          trainable=values['trainable'],
          created_by=how['created_by'],
          **chosen,
      )
  return {
      'step': step,
      'metrics': metrics,
      'stopped_at': stopped_at,
      'prompt': path and os.path.relpath(path, model_dir),
  }


def _evaluated(run: SweepRun, *, progress: bool) -> dict[str, float]:
  """The metrics of a run in which nothing trains, measured as those of the others."""
  values = run.values
  found = evaluate(
      values['backbone'],
      None,
      values['eval_task'] or values['task'],
      split=values['eval_split'],
      batch_size=values['eval_batch_size'] or values['batch_size'],
      feature_lengths=values['feature_lengths'],
      method=values['eval_method'],
      lengths=values['lengths'],
      decoding=values['decoding'],
      design=run.design,
      target_prefix=values['target_prefix'],
      progress=progress,
      **{name: values[name] for name in ('task_module', 'tfds_data_dir', 'cache_dir')},
  )
  results = found.values() if isinstance(found, Mapping) else [found]
  return joined({result.task: result.metrics for result in results})


class _Results:
  """`results.jsonl`: a line for each run that has ended; `sweep.json`: what each of them was.

  Attributes:
    done: names of the runs that have.
  """

  def __init__(
      self, model_dir: str, runs: Sequence[SweepRun], data: Mapping[str, Mapping[str, Any]]
  ):
    self._model_dir = model_dir
    self._path = os.path.join(model_dir, RESULTS)
    self._records = read_jsonl(self._path, needs=['run', 'arguments'])
    self._descriptions_path = os.path.join(model_dir, 'sweep.json')
    known = read_json(self._descriptions_path) if os.path.exists(self._descriptions_path) else {}
    self._own = {run.name: description_of(run) | {'data': data[run.name]} for run in runs}
    before = {record['run']: record['arguments'] for record in self._records}
    for name, description in self._own.items():
      if name in before and before[name] != sum_of(description):
        different = differences(known.get(name, {}), description) if name in known else []
        raise ValueError(
            f'MODEL_DIR {model_dir} holds a result of {name} with other settings than these'
            + ''.join(f'\n  {line}' for line in different)
            + '\nSet MODEL_DIR to a new folder, or restore the settings.'
        )
    self._descriptions = known | self._own
    self.done = set(before)
    if others := [name for name in before if name not in self._own]:
      # Nothing says that they had the same recipe.
      warnings.warn(
          f'{self._path} holds results of {len(others)} other points, such as {others[0]}. They '
          f'are not in the table; prompt-tuning sweep --report={model_dir} shows all.',
          stacklevel=3,
      )

  def add(
      self, program: Sequence[SweepRun], found: Sequence[Mapping[str, Any]], seconds: float
  ) -> None:
    """Keeps what the runs of a program ended with."""
    for run, result in zip(program, found, strict=True):
      self._records.append({
          'run': run.name,
          'settings': {name: label_of(value) for name, value in run.settings.items()},
          **result,
          # Of a program the share of each of its runs.
          'seconds': round(seconds / len(program), 1),
          'together': len(program),
          'parameters': run.values['backbone'].num_params,
          'best_metric': run.values['best_metric'],
          'arguments': sum_of(self._own[run.name]),
      })
      self.done.add(run.name)
    self._write()

  def _write(self) -> None:
    with written_whole(self._descriptions_path) as unfinished:
      Path(unfinished).write_text(json.dumps(self._descriptions, indent=1), encoding='utf-8')
    write_jsonl(self._path, self._records)

  def report(self) -> SweepResult:
    """What has ended of this sweep, written as table and plot."""
    result = SweepResult([record for record in self._records if record['run'] in self._own])
    result.write(self._model_dir)
    return result
