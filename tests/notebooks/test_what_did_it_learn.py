"""Notebook 2, what a prompt learned: from top to bottom on the packaged model, in a few steps."""

from __future__ import annotations

import pytest

from tests.notebooks import notebook


@pytest.mark.slow
@pytest.mark.usefixtures('figures', 'one_width')
def test_it_runs_from_top_to_bottom(capsys):
  scope = notebook.run('2_what_did_it_learn', train_steps=8)
  printed = capsys.readouterr().out
  accuracies = scope['accuracies']
  assert accuracies['the prompt'] > accuracies['no prompt'] + 5
  assert accuracies['its start'] == pytest.approx(56.4, abs=0.1)
  # After so few steps each position is still near to what it started from.
  assert printed.count('8 of 8 class labels') == 3
  assert scope['said'].shape == (3, 456)
  assert scope['report'].similarities['same position'][0, 1] < 0.99
