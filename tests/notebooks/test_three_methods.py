"""Notebook 4, three methods: from top to bottom on the packaged model, in a few steps."""

from __future__ import annotations

import pytest

from tests.notebooks import notebook


@pytest.mark.slow
@pytest.mark.usefixtures('figures', 'one_width')
def test_it_runs_from_top_to_bottom(capsys):
  scope = notebook.run('4_three_methods', train_steps=10, eval_period=10)
  printed = capsys.readouterr().out
  layers, length, width = 4 + 3 + 3, 10, 160
  assert scope['kept'] == {
      'soft prompt': 20 * width, 'prefix': 2 * layers * length * width, 'P-tuning': 20 * width
  }
  assert scope['trained']['soft prompt'] == 20 * width
  assert scope['trained']['prefix'] > 10 * scope['kept']['prefix']
  assert set(scope['scores']) == set(scope['results']) == set(scope['kept'])
  assert scope['scores']['soft prompt'] > scope['plain']
  assert f'{scope["kept"]["prefix"]:,}' in printed
