"""From SWEEP, a grid of macros in gin, to the runs of a sweep.

A point of the grid is a configuration of `train`: the same files and flags, with the point's
values as flags behind them. So whatever a recipe makes depend on a macro does so in a sweep.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prompt_tuning_jax.config import bindings as bindings_lib
from prompt_tuning_jax.config import building, checks
from prompt_tuning_jax.config.errors import ConfigError
from prompt_tuning_jax.config.files import packaged_files
from prompt_tuning_jax.config.parsing import parse
from prompt_tuning_jax.training.sweep import SweepRun, grid_points

# Names in a grid whose values are gin files, and the folders of those.
FILE_AXES: Mapping[str, str] = {
    'MODEL': 'models',
    'METHOD': 'methods',
    'PROMPT_INIT': 'initializers',
}
# Of the sweep itself.
_REFUSED = ('MODEL_DIR', 'SWEEP')


def runs_of(
    grid: Mapping[str, Sequence[Any]],
    files: Sequence[str],
    bindings: Sequence[str],
    search_paths: Sequence[str] = (),
) -> tuple[list[SweepRun], list[str]]:
  """The runs of a grid, each with the arguments of `train`, and notes on them.

  Args:
    grid: macro → its values, as gin files write them; also the names in `FILE_AXES`, whose
      values are files of those folders without ending: {'PROMPT_INIT': ['uniform', 'text']}.
    files: the gin files of the command.
    bindings: its flags.
    search_paths: folders in which files are looked for as well.

  Raises:
    ConfigError: if a name is not known, set by a flag as well, or nothing reads it.
    ValueError, OSError: what is wrong with the configuration of a point, which is named.
  """
  set_by_flags = {binding.split('=')[0].strip() for binding in bindings}
  for name in grid:
    if name in _REFUSED:
      raise ConfigError(f'SWEEP varies {name}, which is that of the whole sweep.')
    if name in set_by_flags:
      raise ConfigError(
          f'--gin.{name} is set, and SWEEP varies {name}. Leave one of them out.'
      )
  kept = [binding for binding in bindings if binding.split('=')[0].strip() != 'SWEEP']
  runs, notes = [], []
  with building.shared_backbones():
    for point in grid_points(grid):
      of_point = [
          f'{FILE_AXES[name]}/{_file(name, value)}'
          for name, value in point.items()
          if name in FILE_AXES
      ]
      flags = [f'{name}={value!r}' for name, value in point.items() if name not in FILE_AXES]
      try:
        parsed = parse('train', [*files, *of_point], [*kept, *flags], search_paths)
        _check_read(point)
        arguments = parsed.kwargs()
        found = checks.check('train', arguments)
      except (ValueError, OSError) as error:
        named = ', '.join(f'{name}={value}' for name, value in point.items())
        raise type(error)(f'At the point {named} of SWEEP: {error}') from error
      notes += [note for note in (*parsed.notes, *found) if note not in notes]
      del arguments['model_dir']
      runs.append(SweepRun(dict(point), arguments))
  return runs, notes


def _file(name: str, value: Any) -> str:
  folder = FILE_AXES[name]
  known = [path.split('/')[-1].removesuffix('.gin') for path in packaged_files(folder)]
  if not isinstance(value, str):
    raise ConfigError(
        f'SWEEP has {value!r} for {name}; the name of a file of gin/{folder}/ was expected: '
        f'{", ".join(known)}.'
    )
  return value


def _check_read(point: Mapping[str, Any]) -> None:
  """Refuses what would make all points the same."""
  read = bindings_lib.reached_by('train').macros
  for name in point:
    if name not in read and name not in FILE_AXES and '.' not in name:
      raise ConfigError(
          f'SWEEP varies {name}, but nothing in this run uses it: all its values would be '
          'the same run.'
      )
