"""Notebook 5, plans, meshes and XXL: from top to bottom on the packaged model, in a few steps."""

from __future__ import annotations

import numpy as np
import pytest

from tests.notebooks import notebook


@pytest.mark.slow
@pytest.mark.usefixtures('figures')
def test_it_runs_from_top_to_bottom(capsys):
  scope = notebook.run('5_scaling_up')
  printed = capsys.readouterr().out
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
