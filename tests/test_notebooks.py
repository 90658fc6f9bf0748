"""Every notebook runs from top to bottom on the packaged model, in a few steps of training."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prompt_tuning_jax.data import buckets
from tests.conftest import ROOT

NOTEBOOKS = sorted((ROOT / 'notebooks').glob('*.ipynb'))

# What stands for the numbers of the cell tagged `parameters`.
QUICK = {
    '1_first_prompt': {'train_steps': 12, 'eval_period': 12},
    '2_what_did_it_learn': {'train_steps': 8},
    '3_your_own_task': {'train_steps': 20, 'eval_period': 10},
    '4_three_methods': {'train_steps': 10, 'eval_period': 10},
    '5_scaling_up': {},
}


def _cells(path: Path, kind: str) -> list[dict[str, Any]]:
  cells = json.loads(path.read_text(encoding='utf-8'))['cells']
  return [cell for cell in cells if cell['cell_type'] == kind]


def _source(cell: dict[str, Any]) -> str:
  return ''.join(cell['source'])


def _tags(cell: dict[str, Any]) -> list[str]:
  return cell['metadata'].get('tags', [])


def _run(path: Path, parameters: dict[str, Any]) -> dict[str, Any]:
  """Runs the cells but for the one that installs; what they leave behind."""
  scope: dict[str, Any] = {}
  for number, cell in enumerate(_cells(path, 'code')):
    if 'install' in _tags(cell):
      continue
    exec(compile(_source(cell), f'{path.name}, code cell {number}', 'exec'), scope)
    if 'parameters' in _tags(cell):
      assert parameters.keys() <= scope.keys()
      scope.update(parameters)
  return scope


def test_there_is_a_test_for_every_notebook():
  assert [path.stem for path in NOTEBOOKS] == list(QUICK) == list(CHECKS)


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_saved_as_it_is_to_be_opened(path):
  code, texts = _cells(path, 'code'), _cells(path, 'markdown')
  title, _, opening = _source(texts[0]).partition('\n')
  assert re.fullmatch(r'# .+: .+\?', title)
  assert re.search(r'Takes about\s', opening)
  assert not any(cell['outputs'] or cell['execution_count'] for cell in code)
  installs = [_source(cell) for cell in code if 'install' in _tags(cell)]
  assert installs == [_source(code[0])] == [_source(_cells(NOTEBOOKS[0], 'code')[0])]
  assert f'notebooks/{path.name}' in (ROOT / 'README.md').read_text(encoding='utf-8')


@pytest.fixture
def figures(monkeypatch, tmp_path):
  """Figures go to no screen, temporary folders to pytest's; gives pyplot."""
  import matplotlib

  monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
  before = matplotlib.get_backend()
  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  yield plt
  plt.close('all')
  matplotlib.use(before)


@pytest.mark.slow
@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path, figures, capsys, monkeypatch):
  if 'train_steps' in QUICK[path.stem]:
    # Batches of one width, so that each program is compiled once.
    monkeypatch.setattr(buckets.choose, '__defaults__', (1,))
  scope = _run(path, QUICK[path.stem])
  assert figures.get_fignums()
  for number in figures.get_fignums():
    figures.figure(number).canvas.draw()
  CHECKS[path.stem](scope, capsys.readouterr().out)


def _first_prompt(scope, printed):
  # Untrained, it has 56.4.
  assert scope['after'].metrics['accuracy'] > 57
  assert 48 < scope['before'].metrics['accuracy'] < 50
  assert scope['losses'][-1] < scope['losses'][0]
  assert '0 ▁animal ' in printed


def _what_did_it_learn(scope, printed):
  accuracies = scope['accuracies']
  assert accuracies['the prompt'] > accuracies['no prompt'] + 5
  assert accuracies['its start'] == pytest.approx(56.4, abs=0.1)
  # After so few steps each position is still near to what it started from.
  assert printed.count('8 of 8 class labels') == 3
  assert scope['said'].shape == (3, 456)
  assert scope['report'].similarities['same position'][0, 1] < 0.99


def _your_own_task(scope, printed):
  assert scope['after'].metrics['accuracy'] > scope['before'].metrics['accuracy'] + 10
  assert "line 3: the label 'maybe' is none of 'no', 'yes'" in printed
  assert "line 4: 'definition' is empty" in printed
  assert scope['difference'] < 1e-6


def _three_methods(scope, printed):
  layers, length, width = 4 + 3 + 3, 10, 160
  assert scope['kept'] == {
      'soft prompt': 20 * width, 'prefix': 2 * layers * length * width, 'P-tuning': 20 * width
  }
  assert scope['trained']['soft prompt'] == 20 * width
  assert scope['trained']['prefix'] > 10 * scope['kept']['prefix']
  assert set(scope['scores']) == set(scope['results']) == set(scope['kept'])
  assert scope['scores']['soft prompt'] > scope['plain']
  assert f'{scope["kept"]["prefix"]:,}' in printed


def _scaling_up(scope, printed):
  frozen = [plan.frozen for plan in scope['plans']['v5e-8'].values()]
  assert frozen[1] == 247_577_856 and frozen[-1] == 11_135_332_352
  assert all(plan.fits for plans in scope['plans'].values() for plan in plans.values())
  remats = scope['of_remat'].values()
  assert sorted(remats, key=lambda plan: -plan.activations) == list(remats)
  assert sorted(remats, key=lambda plan: plan.flops) == list(remats)
  held = {name: scope['held'](scope[name].params) for name in ('whole', 'split')}
  devices = len(scope['devices'])
  assert max(held['split'].values()) < 1.1 * max(held['whole'].values()) / devices
  np.testing.assert_allclose(*scope['scores'], atol=1e-4)
  losses, flops = (list(scope[name].values()) for name in ('losses', 'flops'))
  np.testing.assert_allclose(losses, losses[0], rtol=1e-5)
  assert flops[0] > 1.2 * flops[1] > 1.2 * 1.2 * flops[2]
  assert 'int8     weights 10.4 GiB, together 20.1 GiB: fits a card of 24 GiB' in printed


CHECKS = {
    '1_first_prompt': _first_prompt,
    '2_what_did_it_learn': _what_did_it_learn,
    '3_your_own_task': _your_own_task,
    '4_three_methods': _three_methods,
    '5_scaling_up': _scaling_up,
}
