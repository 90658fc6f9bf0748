"""Notebook 1, a first prompt: from top to bottom on the packaged model, in a few steps."""

from __future__ import annotations

import pytest

from tests.notebooks import notebook


@pytest.mark.slow
@pytest.mark.usefixtures('figures', 'one_width')
def test_it_runs_from_top_to_bottom(capsys):
  scope = notebook.run('1_first_prompt', train_steps=12, eval_period=12)
  printed = capsys.readouterr().out
  # Untrained, it has 56.4.
  assert scope['after'].metrics['accuracy'] > 57
  assert 48 < scope['before'].metrics['accuracy'] < 50
  assert scope['losses'][-1] < scope['losses'][0]
  assert '0 ▁animal ' in printed
