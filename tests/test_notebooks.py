"""Every notebook runs from top to bottom on the packaged model."""

import json

import pytest

from tests.conftest import ROOT

NOTEBOOKS = sorted((ROOT / 'notebooks').glob('*.ipynb'))


def test_there_is_a_notebook():
  assert NOTEBOOKS


@pytest.mark.slow
@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path):
  cells = json.loads(path.read_text(encoding='utf-8'))['cells']
  scope = {}
  for number, cell in enumerate(cells):
    assert not cell.get('outputs'), f'cell {number} was saved with its output'
    if cell['cell_type'] == 'code':
      exec(compile(''.join(cell['source']), f'{path.name}, cell {number}', 'exec'), scope)
  assert scope['after'].metrics['accuracy'] > scope['before'].metrics['accuracy'] + 15
