"""From SWEEP, a grid of macros in gin, to the runs of a sweep.

A point of the grid is a configuration of `train`: the same files and flags, with the point's
values as flags behind them. So whatever a recipe makes depend on a macro does so in a sweep. A
point with a prompt design and nothing that trains is one of `evaluate`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prompt_tuning_jax.config import bindings as bindings_lib
from prompt_tuning_jax.config import building, checks, sources
from prompt_tuning_jax.config.errors import ConfigError
from prompt_tuning_jax.config.files import packaged_files
from prompt_tuning_jax.config.parsing import parse
from prompt_tuning_jax.training import trainable as trainable_lib
from prompt_tuning_jax.training.sweep_runs import SweepRun, grid_points

# Names in a grid whose values are gin files, and the folders of those.
FILE_AXES: Mapping[str, str] = {
    'MODEL': 'models',
    'METHOD': 'methods',
    'PROMPT_INIT': 'initializers',
}
# Of the sweep itself, and macros of gin/sweeps/ that only its grid is made of.
_REFUSED = ('MODEL_DIR', 'SWEEP')
_OF_GRID = ('SWEEP', 'MODELS', 'DESIGN')


def runs_of(
    grid: Mapping[str, Any],
    files: Sequence[str],
    bindings: Sequence[str],
    search_paths: Sequence[str] = (),
) -> tuple[list[SweepRun], list[str]]:
  """The runs of a grid, each with the arguments of `train`, and notes on them.

  Args:
    grid: macro → its values, as gin files write them; also the names in `FILE_AXES`, whose
      values are files of those folders without ending ({'PROMPT_INIT': ['uniform', 'text']}), or
      with a folder of their own. What takes several settings at once has a name of its own and
      a dict: {'OBJECTIVE': {'span corruption': {'ADAPTATION_STEPS': 0}, 'LM adaptation': {}}}.
    files: the gin files of the command.
    bindings: its flags.
    search_paths: folders in which files are looked for as well.

  Raises:
    ConfigError: if a name is not known, set by a flag as well or twice in a point, or nothing
      reads it.
    ValueError, OSError: what is wrong with the configuration of a point, which is named.
  """
  points = [(point, _settings(grid, point)) for point in grid_points(grid)]
  set_by_flags = {binding.split('=')[0].strip() for binding in bindings}
  for name in {**grid, **{name: None for _, settings in points for name in settings}}:
    if name in _REFUSED:
      raise ConfigError(f'SWEEP varies {name}, which is that of the whole sweep.')
    if name in set_by_flags:
      raise ConfigError(
          f'--gin.{name} is set, and SWEEP varies {name}. Leave one of them out.'
      )
  kept = [binding for binding in bindings if binding.split('=')[0].strip() not in _OF_GRID]
  runs, notes = [], []
  with building.shared_backbones():
    for point, settings in points:
      of_point = [
          _file(name, value) for name, value in settings.items() if name in FILE_AXES
      ]
      flags = [f'{name}={value!r}' for name, value in settings.items() if name not in FILE_AXES]
      try:
        arguments, of_run = _arguments(
            [*files, *of_point], [*kept, *flags], search_paths, settings
        )
      except (ValueError, OSError) as error:
        named = ', '.join(f'{name}={value}' for name, value in point.items())
        # Gin raises errors of classes of its own making.
        kind = OSError if isinstance(error, OSError) else ConfigError
        raise kind(f'At the point {named} of SWEEP: {error}') from error
      notes += [note for note in of_run if note not in notes]
      runs.append(SweepRun(dict(point), arguments))
  return runs, notes


def check_sources(runs: Sequence[SweepRun]) -> None:
  """Looks for the tasks of all runs before the first of them is trained.

  Raises:
    ValueError, ImportError: if there is no such task.
  """
  looked_for = set()
  for run in runs:
    tasks = repr([run.arguments.get(name) for name in ('task', 'eval_task', 'eval_split')])
    if tasks not in looked_for:
      sources.check_sources('train', run.arguments)
      looked_for.add(tasks)


def _settings(grid: Mapping[str, Any], point: Mapping[str, Any]) -> dict[str, Any]:
  """The macros, and the names in `FILE_AXES`, that a point sets, with their values."""
  settings: dict[str, Any] = {}
  for axis, value in point.items():
    of_axis = {axis: value}
    if isinstance(grid[axis], Mapping):
      of_axis = grid[axis][value]
      if not isinstance(of_axis, Mapping) or not all(isinstance(n, str) for n in of_axis):
        raise ConfigError(
            f'SWEEP has {of_axis!r} for {axis}, {value!r}; a dict of settings was expected, such '
            "as {'ADAPTATION_STEPS': 0}, or {} for the recipe as it is."
        )
    for name, setting in of_axis.items():
      if name in settings:
        raise ConfigError(
            f'Two names in SWEEP set {name}, {axis} and another one. Leave it to one of them.'
        )
      settings[name] = setting
  return settings


def _arguments(
    files: Sequence[str],
    flags: Sequence[str],
    search_paths: Sequence[str],
    settings: Mapping[str, Any],
) -> tuple[dict[str, Any], list[str]]:
  """The arguments of a run, and notes on them."""
  parsed = parse('train', files, flags, search_paths)
  _check_read(settings)
  arguments = parsed.kwargs()
  notes = list(parsed.notes)
  method, trainable = arguments['method'], arguments['trainable']
  if bindings_lib.value_of('PROMPT_DESIGN') and trainable_lib.is_nothing(trainable, method):
    evaluated = parse('evaluate', files, flags, search_paths)
    of_evaluation = evaluated.kwargs()
    checks.check('evaluate', of_evaluation)
    # Of what neither of the two uses.
    notes = [note for note in notes if note in evaluated.notes]
    arguments['design'] = of_evaluation['design']
    del arguments['trainable']
  else:
    notes += checks.check('train', arguments)
  del arguments['model_dir']
  return arguments, notes


def _file(name: str, value: Any) -> str:
  """The gin file that a value names."""
  folder = FILE_AXES[name]
  known = [path.split('/')[-1].removesuffix('.gin') for path in packaged_files(folder)]
  if not isinstance(value, str):
    raise ConfigError(
        f'SWEEP has {value!r} for {name}; the name of a file of gin/{folder}/ was expected: '
        f'{", ".join(known)}.'
    )
  return value if '/' in value else f'{folder}/{value}'


def _check_read(settings: Mapping[str, Any]) -> None:
  """Refuses what would make all points the same."""
  read = bindings_lib.reached_by('train').macros
  for name in settings:
    if name not in read and name not in FILE_AXES and '.' not in name:
      raise ConfigError(
          f'SWEEP varies {name}, but nothing in this run uses it: all its values would be '
          'the same run.'
      )
