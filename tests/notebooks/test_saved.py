"""Every notebook is saved as it is to be opened, and has a test that runs it."""

from __future__ import annotations

import re

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
