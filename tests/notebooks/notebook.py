"""Notebooks as tests read and run them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.conftest import ROOT

NOTEBOOKS = sorted((ROOT / 'notebooks').glob('*.ipynb'))


def cells(path: Path, kind: str) -> list[dict[str, Any]]:
  """Its cells of a kind: `code` or `markdown`."""
  found = json.loads(path.read_text(encoding='utf-8'))['cells']
  return [cell for cell in found if cell['cell_type'] == kind]


def source(cell: dict[str, Any]) -> str:
  return ''.join(cell['source'])


def tags(cell: dict[str, Any]) -> list[str]:
  return cell['metadata'].get('tags', [])


def run(name: str, **parameters: Any) -> dict[str, Any]:
  """Runs the cells but for the one that installs; what they leave behind.

  `parameters` stand for the numbers of the cell tagged `parameters`.
  """
  path = ROOT / 'notebooks' / f'{name}.ipynb'
  scope: dict[str, Any] = {}
  for number, cell in enumerate(cells(path, 'code')):
    if 'install' in tags(cell):
      continue
    exec(compile(source(cell), f'{path.name}, code cell {number}', 'exec'), scope)
    if 'parameters' in tags(cell):
      assert parameters.keys() <= scope.keys()
      scope.update(parameters)
  return scope
