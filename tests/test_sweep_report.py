"""Tables and plots of a sweep over models of several sizes, from its results alone."""

import json
import re

import numpy as np
import pytest

from prompt_tuning_jax import sweep_report
from prompt_tuning_jax.sweep_report import SweepResult

SIZES = {'pico': 825_344, 'nano': 3_884_320, 'micro': 7_574_784}


def record(parameters, accuracy, **settings):
  return {
      'run': ','.join(f'{name}={value}' for name, value in settings.items()),
      'settings': settings,
      'metrics': {'accuracy': accuracy},
      'step': 4,
      'stopped_at': None,
      'prompt': None,
      **({} if parameters is None else {'parameters': parameters}),
  }


@pytest.fixture
def over_sizes():
  """Sizes × methods × two seeds; a method gains 10 from size to size."""
  return SweepResult([
      record(count, 40 + 10 * step + 20 * number + seed, MODEL=model, METHOD=method,
             RANDOM_SEED=seed)
      for step, (model, count) in enumerate(SIZES.items())
      for number, method in enumerate(('prompt tuning', 'model tuning'))
      for seed in (0, 2)
  ])  # fmt: skip


def lines_of(result, **settings):
  """What is drawn: for each line its name, places and means; and the axes."""
  axes = sweep_report._draw(
      result.cells(),
      'accuracy',
      settings['x'],
      [name for name, values in result.axes.items() if name != settings['x'] and len(values) > 1],
      result.sizes(settings['x']),
  ).axes[0]
  handles, labels = axes.get_legend_handles_labels()
  drawn = {
      label: np.array(handle[0].get_xydata()).tolist() for handle, label in zip(handles, labels)
  }
  return drawn, axes


def test_a_setting_that_chooses_models_of_several_sizes_is_known(over_sizes):
  assert over_sizes.sizes('MODEL') == SIZES
  assert over_sizes.sizes('METHOD') is None
  # Several steps of adaptation of one model are of one size.
  steps = SweepResult([record(5, 50, ADAPTATION_STEPS=n, RANDOM_SEED=0) for n in (0, 100)])
  assert steps.sizes('ADAPTATION_STEPS') is None
  # Results of before sizes were recorded.
  old = SweepResult([record(None, 50, MODEL=name) for name in SIZES])
  assert old.sizes('MODEL') is None and 'parameters' not in repr(old)


def test_a_line_for_each_method_over_the_parameters(over_sizes):
  assert over_sizes._default_x() == 'MODEL'
  drawn, axes = lines_of(over_sizes, x='MODEL')
  assert drawn == {
      'prompt tuning': [[825_344, 41], [3_884_320, 51], [7_574_784, 61]],
      'model tuning': [[825_344, 61], [3_884_320, 71], [7_574_784, 81]],
  }
  assert axes.get_xscale() == 'log'
  assert axes.get_xlabel() == 'parameters of the model'
  assert [tick.get_text() for tick in axes.get_xticklabels()] == [
      'pico\n825K', 'nano\n3.9M', 'micro\n7.6M'
  ]  # fmt: skip


def test_steps_of_adaptation_are_lines_over_sizes_or_an_axis_of_one_size():
  grid = SweepResult([
      record(count, 10 * number + steps / 100, MODEL=model, ADAPTATION_STEPS=steps)
      for number, (model, count) in enumerate(SIZES.items())
      for steps in (0, 400)
  ])
  drawn, axes = lines_of(grid, x=grid._default_x())
  assert drawn['adaptation steps 400'] == [[825_344, 4], [3_884_320, 14], [7_574_784, 24]]
  assert axes.get_legend().get_title().get_text() == 'adaptation steps'
  one = SweepResult([r for r in grid.records if r['settings']['MODEL'] == 'pico'])
  assert one._default_x() == 'ADAPTATION_STEPS'
  assert 'parameters' not in repr(one)


def test_what_chose_the_steps_is_drawn(tmp_path, monkeypatch):
  of_run = record(825_344, 1, PROMPT_LENGTH=1)
  of_run['metrics'] = {'accuracy': 1.0, 'f1': 2.0}
  drawn, draw = [], sweep_report._draw
  def drawing(cells, metric, *rest):
    drawn.append(metric)
    return draw(cells, metric, *rest)
  monkeypatch.setattr(sweep_report, '_draw', drawing)
  for best in ({}, {'best_metric': 'f1'}, {'best_metric': None}, {'best_metric': 'gone'}):
    SweepResult([of_run | best]).plot(tmp_path / 'sweep.png')
  SweepResult([of_run | {'best_metric': 'f1'}]).plot(tmp_path / 'sweep.png', metric='accuracy')
  assert drawn == ['accuracy', 'f1', 'accuracy', 'accuracy', 'accuracy']


def test_names_are_side_by_side_without_a_line():
  grid = SweepResult([
      record(825_344, size + start, METHOD=method, PROMPT_INIT=init)
      for size, method in enumerate(['soft prompt', 'prefix'])
      for start, init in enumerate(['uniform', 'class_labels'])
  ])
  figure = sweep_report._draw(grid.cells(), 'accuracy', 'PROMPT_INIT', ['METHOD'], None)
  axes = figure.axes[0]
  assert [label.get_text() for label in axes.get_xticklabels()] == ['uniform', 'class labels']
  series = [container.lines[0] for container in axes.containers]
  assert [line.get_linewidth() for line in series] == [0, 0]
  assert not set(series[0].get_xdata()) & set(series[1].get_xdata())


def test_the_table_says_how_large_the_models_are(over_sizes, tmp_path):
  header = repr(over_sizes).splitlines()[0]
  assert re.findall(r'\w+', header) == ['MODEL', 'METHOD', 'parameters', 'accuracy', 'runs']
  assert '3,884,320' in repr(over_sizes) and '51.00 ± 1.41' in repr(over_sizes)
  (tmp_path / 'results.jsonl').write_text(
      ''.join(json.dumps(record) + '\n' for record in over_sizes.records)
  )
  SweepResult.read(tmp_path).write(tmp_path)
  assert (tmp_path / 'sweep.png').read_bytes().startswith(b'\x89PNG')


def test_where_nothing_was_measured_there_is_a_table_and_no_picture(tmp_path):
  result = SweepResult([record(825_344, 0, MODEL='pico') | {'metrics': {}, 'stopped_at': 3}])
  with pytest.warns(UserWarning, match='No run of the sweep was measured'):
    result.write(tmp_path)
  assert 'Went out of bounds' in (tmp_path / 'table.md').read_text()
  assert not (tmp_path / 'sweep.png').exists()
