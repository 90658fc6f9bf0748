"""Tables and plots of a sweep, from its results alone.

  result = SweepResult.read('/tmp/length')
  print(result)                        # mean ± standard deviation over the seeds
  result.write('/tmp/length')          # table.md and sweep.png again
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prompt_tuning_jax import screen
from prompt_tuning_jax.evaluation.report import mean_and_deviation
from prompt_tuning_jax.json_files import read_jsonl
from prompt_tuning_jax.writing import written_whole

RESULTS = 'results.jsonl'

# Points of a percentage that a plot shows at least, so that noise does not look like a finding.
_LEAST_SPAN = 5.0

# Over these settings means are taken.
SEEDS = ('RANDOM_SEED', 'random_seed')


@dataclasses.dataclass(frozen=True)
class Cell:
  """The runs that differ in their seeds alone.

  Attributes:
    settings: what they have in common.
    values: metric → its value in each run that has one.
    runs: how many there are.
    stopped: how many of them went out of bounds.
    parameters: of the backbone of the first, None where it is not known.
  """

  settings: dict[str, Any]
  values: dict[str, list[float]]
  runs: int
  stopped: int
  parameters: int | None = None


@dataclasses.dataclass(frozen=True, repr=False)
class SweepResult:
  """What the runs of a sweep ended with.

  Attributes:
    records: of each run its name `run`, its `settings`, the best `step` and the `metrics` there,
      `stopped_at` (the step at which it went out of bounds, or None), the path of its `prompt`
      in the sweep's folder (None where nothing was trained), the `parameters` of its backbone,
      and the `best_metric` that chose the step.
  """

  records: list[dict[str, Any]]

  @classmethod
  def read(cls, model_dir: str) -> SweepResult:
    """Reads a sweep's folder.

    Raises:
      FileNotFoundError: if there are no results.
      ValueError: if they are damaged.
    """
    path = os.path.join(model_dir, RESULTS)
    records = read_jsonl(path, needs=['run', 'settings', 'metrics'])
    if not records:
      raise FileNotFoundError(
          f'{path} holds no results. Name the MODEL_DIR of a sweep of which a run has ended.'
      )
    return cls(records)

  @property
  def axes(self) -> dict[str, list[Any]]:
    """What the runs differ in, seeds left out, with its values in their order."""
    values: dict[str, dict[Any, None]] = {}
    for record in self.records:
      for name, value in record['settings'].items():
        values.setdefault(name, {})[value] = None
    return {name: list(found) for name, found in values.items() if name not in SEEDS}

  @property
  def metrics(self) -> list[str]:
    """Names of all metrics that were measured."""
    return list(dict.fromkeys(name for record in self.records for name in record['metrics']))

  def sizes(self, axis: str) -> dict[Any, int] | None:
    """Parameters of the backbone by the values of a setting; None where it chooses no size."""
    found: dict[Any, set[int | None]] = {}
    for record in self.records:
      found.setdefault(record['settings'].get(axis), set()).add(record.get('parameters'))
    if any(len(counts) > 1 or None in counts for counts in found.values()):
      return None
    sizes = {value: counts.pop() for value, counts in found.items()}
    return sizes if 1 < len(sizes) == len(set(sizes.values())) else None

  def cells(self) -> list[Cell]:
    """The points of the grid, each with all its seeds."""
    points: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in self.records:
      key = tuple(record['settings'].get(name) for name in self.axes)
      points.setdefault(key, []).append(record)
    return [
        Cell(
            dict(zip(self.axes, key)),
            {
                name: [r['metrics'][name] for r in records if name in r['metrics']]
                for name in self.metrics
            },
            len(records),
            sum(record['stopped_at'] is not None for record in records),
            records[0].get('parameters'),
        )
        for key, records in points.items()
    ]

  def __repr__(self) -> str:
    cells = self.cells()
    # Where it is the same everywhere it is no news.
    sizes = ['parameters'] if len({cell.parameters for cell in cells}) > 1 else []
    numbers = [*sizes, *self.metrics, 'runs']
    rows = [(*self.axes, *numbers)]
    for cell in cells:
      scores = [mean_and_deviation(v) if v else '' for v in cell.values.values()]
      size = [f'{cell.parameters or 0:,}'] * len(sizes)
      rows.append((*map(str, cell.settings.values()), *size, *scores, str(cell.runs)))
    notes = []
    if any(cell.runs > 1 for cell in cells):
      notes.append('± is the standard deviation of the sample, over seeds.')
    if stopped := [record for record in self.records if record['stopped_at'] is not None]:
      # Where all runs of a program did, it is not known when each of them did.
      named = ', '.join(
          r['run'] + (f' at step {r["stopped_at"]}' if r['stopped_at'] else '') for r in stopped
      )
      notes.append(
          f'Went out of bounds, and count with what was measured before, if anything was: {named}.'
      )
    table = screen.table(rows, numbers=numbers)
    return '\n'.join([table, *(['', *notes] if notes else [])])

  def write(self, folder: str | os.PathLike[str]) -> None:
    """Writes `table.md`, and `sweep.png` where anything was measured and matplotlib is there."""
    with written_whole(os.path.join(folder, 'table.md')) as unfinished:
      Path(unfinished).write_text(f'{self!r}\n', encoding='utf-8')
    if not self.metrics:
      warnings.warn('No run of the sweep was measured: there is nothing to draw.', stacklevel=2)
      return
    try:
      import matplotlib  # noqa: F401
    except ImportError:
      warnings.warn(
          f'sweep.png needs matplotlib: pip install matplotlib, then prompt-tuning sweep '
          f'--report={folder}.',
          stacklevel=2,
      )
      return
    self.plot(os.path.join(folder, 'sweep.png'))

  def plot(
      self, path: str | os.PathLike[str], *, metric: str | None = None, x: str | None = None
  ) -> None:
    """Draws a metric in the style of Lester et al. (2021), figure 3: a line for each setting.

    Args:
      path: the picture, whose ending says its format.
      metric: what is drawn; where None the one that chose the steps, else the first.
      x: the setting along the axis: a number, or names side by side; one that chooses models
        of several sizes is drawn by their parameters. Default: the first that does, else the
        first that is a number, else the first, of those that have more than one value.

    Raises:
      ValueError: if there is no such metric or setting.
      ImportError: if matplotlib is not installed.
    """
    chosen = self.records[0].get('best_metric')
    metric = metric or (chosen if chosen in self.metrics else self.metrics[0])
    metric = _known(metric, self.metrics, 'metric')
    x = _known(x or self._default_x(), list(self.axes) or ['runs'], 'setting')
    # What is the same on all lines tells none from another.
    others = [name for name, values in self.axes.items() if name != x and len(values) > 1]
    figure = _draw(self.cells(), metric, x, others, self.sizes(x))
    ending = os.path.splitext(path)[1].removeprefix('.')
    with written_whole(path) as unfinished:
      figure.savefig(unfinished, format=ending or 'png', dpi=150)

  def _default_x(self) -> str:
    varied = [name for name, values in self.axes.items() if len(values) > 1]
    sized = [name for name in varied if self.sizes(name)]
    numeric = [name for name in varied if all(map(_is_number, self.axes[name]))]
    return next(iter([*sized, *numeric, *varied, *self.axes, 'runs']))


def _known(name: str, names: Sequence[str], what: str) -> str:
  if name not in names:
    raise ValueError(f'The sweep has no {what} {name!r}; it has {", ".join(names)}.')
  return name


def _is_number(value: Any) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool)


def _draw(
    cells: Sequence[Cell],
    metric: str,
    x: str,
    others: Sequence[str],
    sizes: Mapping[Any, int] | None,
) -> Any:
  """The figure: means (a line through them along numbers), deviations as bars, runs as dots."""
  import numpy as np
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure
  from matplotlib.ticker import FixedLocator, NullLocator

  def place_of(cell: Cell) -> Any:
    place = cell.settings.get(x, '')
    return sizes[place] if sizes else place

  places = list(dict.fromkeys(map(place_of, cells)))
  numeric = all(map(_is_number, places))
  # As in the paper: lengths, sizes and steps grow by factors.
  logarithmic = numeric and min(places) > 0 and (sizes or max(places) >= 5 * min(places))
  lines: dict[str, list[Cell]] = {}
  for cell in cells:
    if cell.values[metric]:
      name = ', '.join(_line_part(other, cell.settings[other]) for other in others)
      lines.setdefault(name, []).append(cell)

  figure = Figure(figsize=(5.2, 3.6), layout='constrained')
  FigureCanvasAgg(figure)
  axes = figure.subplots()
  markers = 'osD^vPX*<>'
  for number, (name, of_line) in enumerate(lines.items()):
    at = [place_of(cell) for cell in of_line]
    if not numeric:
      # Between names is nothing: no line, and the series side by side.
      aside = 0.12 * (number - (len(lines) - 1) / 2)
      at = [places.index(place) + aside for place in at]
    order = np.argsort(at, kind='stable')
    at = np.asarray(at, float)[order]
    values = [of_line[i].values[metric] for i in order]
    means = [np.mean(v) for v in values]
    spread = [np.std(v, ddof=1) if len(v) > 1 else 0.0 for v in values]
    drawn = axes.errorbar(
        at, means, yerr=spread, marker=markers[number % len(markers)], markersize=5,
        linewidth=1.6 if numeric else 0, capsize=2.5, elinewidth=1, label=name or None, zorder=3,
    )  # fmt: skip
    for place, of_point in zip(at, values):
      if len(of_point) > 1:
        colour = drawn[0].get_color()
        axes.scatter([place] * len(of_point), of_point, s=9, alpha=0.35, color=colour, zorder=2)
  if logarithmic:
    axes.set_xscale('log')
  if numeric:
    axes.xaxis.set_major_locator(FixedLocator(sorted(places)))
    axes.xaxis.set_minor_locator(NullLocator())
    names = {size: f'{name}\n{_short(size)}' for name, size in (sizes or {}).items()}
    axes.set_xticklabels([names.get(place, f'{place:g}') for place in sorted(places)])
  else:
    axes.set_xticks(range(len(places)), [str(place).replace('_', ' ') for place in places])
    axes.margins(x=0.15)
  shown = [value for cell in cells for value in cell.values[metric]]
  is_percentage = 1 < max(shown) <= 100 and min(shown) >= 0
  low, high = axes.get_ylim()
  if is_percentage and (missing := _LEAST_SPAN - (high - low)) > 0:
    axes.set_ylim(low - missing / 2, high + missing / 2)
  axes.set_xlabel('parameters of the model' if sizes else _title(x))
  axes.set_ylabel(f'{_title(metric)} (%)' if is_percentage else _title(metric))
  axes.grid(alpha=0.3, linewidth=0.6)
  axes.spines[['top', 'right']].set_visible(False)
  if len(lines) > 1:
    # The points alone: what has no deviation is not to look as if it had.
    points = [container[0] for container in axes.containers]
    title = ', '.join(map(_title, others))
    axes.legend(points, list(lines), fontsize=8, frameon=False, title=title, title_fontsize=8)
  return figure


def _short(count: int) -> str:
  """'3.9M' of 3,884,320."""
  for unit, letter in ((1e9, 'B'), (1e6, 'M'), (1e3, 'K')):
    if count >= unit:
      return f'{count / unit:.3g}{letter}' if count >= 10 * unit else f'{count / unit:.1f}{letter}'
  return str(count)


def _line_part(name: str, value: Any) -> str:
  return f'{_title(name)} {value:g}' if _is_number(value) else str(value)


def _title(name: str) -> str:
  """'prompt length' of PROMPT_LENGTH."""
  return name.replace('_', ' ').lower() if name.isupper() else name.replace('_', ' ')
