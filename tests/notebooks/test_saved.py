"""Every notebook is saved as it is to be opened, and has a test that runs it."""

from __future__ import annotations

import importlib.util
import re
import shutil

import pytest

from tests.conftest import ROOT
from tests.notebooks.notebook import NOTEBOOKS, cells, source, tags


def test_there_is_a_test_for_every_notebook():
  tests = {path.stem.removeprefix('test_') for path in (ROOT / 'tests/notebooks').glob('test_*')}
  assert {path.stem.split('_', 1)[1] for path in NOTEBOOKS} == tests - {'saved'}


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_saved_as_it_is_to_be_opened(path):
  code, texts = cells(path, 'code'), cells(path, 'markdown')
  title, _, opening = source(texts[0]).partition('\n')
  assert re.fullmatch(r'# .+: .+\?', title)
  assert re.search(r'Takes about\s', opening)
  assert not any(cell['outputs'] or cell['execution_count'] for cell in code)
  installs = [source(cell) for cell in code if 'install' in tags(cell)]
  assert installs == [source(code[0])] == [source(cells(NOTEBOOKS[0], 'code')[0])]
  assert f'notebooks/{path.name}' in (ROOT / 'README.md').read_text(encoding='utf-8')


@pytest.mark.parametrize('place', ['wheel', 'checkout', 'alone'])
def test_the_first_cell_installs_what_is_at_hand(place, monkeypatch, tmp_path):
  (tmp_path / 'notebooks').mkdir()
  wheel = tmp_path / 'notebooks' / 'prompt_tuning_jax-1.0-py3-none-any.whl'
  library = {'wheel': str(wheel), 'checkout': str(tmp_path), 'alone': 'prompt-tuning-jax'}[place]
  if place != 'alone':
    (tmp_path / 'prompt_tuning_jax').mkdir()
  if place == 'wheel':
    wheel.touch()
  monkeypatch.chdir(tmp_path / 'notebooks')
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  for gpu in (None, '/usr/bin/nvidia-smi'):
    monkeypatch.setattr(shutil, 'which', lambda name: gpu)
    cell = source(cells(NOTEBOOKS[0], 'code')[0])
    cell = cell.replace('%pip install -q "{library}"', 'installed.append(library)')
    installed = []
    exec(cell, {'installed': installed})
    (found,) = installed
    extras = re.fullmatch(rf'{re.escape(library)}\[([a-z0-9,]+)\]', found)[1].split(',')
    assert ('cuda12' in extras) == bool(gpu)
    setup = (ROOT / 'setup.py').read_text(encoding='utf-8')
    assert all(f"'{extra}': [" in setup for extra in extras)
