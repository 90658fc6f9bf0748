"""Notebook 3, a task of one's own: from top to bottom on the packaged model, in a few steps."""

from __future__ import annotations

import pytest

from tests.notebooks import notebook


@pytest.mark.slow
@pytest.mark.usefixtures('figures', 'one_width')
def test_it_runs_from_top_to_bottom(capsys):
  scope = notebook.run('3_your_own_task', train_steps=20, eval_period=10)
  printed = capsys.readouterr().out
  assert scope['after'].metrics['accuracy'] > scope['before'].metrics['accuracy'] + 10
  assert "line 3: the label 'maybe' is none of 'no', 'yes'" in printed
  assert "line 4: 'definition' is empty" in printed
  assert scope['difference'] < 1e-6
