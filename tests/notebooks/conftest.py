"""What every run of a notebook needs."""

from __future__ import annotations

import tempfile

import matplotlib
import pytest

from prompt_tuning_jax.data import buckets


@pytest.fixture
def figures(monkeypatch, tmp_path):
  """Figures go to no screen, temporary folders to pytest's; they are drawn at the end."""
  monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
  before = matplotlib.get_backend()
  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  yield
  assert plt.get_fignums()
  for number in plt.get_fignums():
    plt.figure(number).canvas.draw()
  plt.close('all')
  matplotlib.use(before)


@pytest.fixture
def one_width(monkeypatch):
  """Batches of one width, so that each program is compiled once."""
  monkeypatch.setattr(buckets.choose, '__defaults__', (1,))
