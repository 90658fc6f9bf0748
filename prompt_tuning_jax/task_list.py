"""The list of `prompt-tuning tasks`: names, splits and kinds, without reading any data."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prompt_tuning_jax import screen

# Training comes first and tests last.
SPLITS = ('train', 'validation', 'test')


def listing(task_module: str) -> list[str]:
  """Lines with all tasks and mixtures that a module registers, by family.

  Raises:
    ImportError: if seqio or the module cannot be imported.
  """
  from prompt_tuning_jax.data import seqio_source

  families: dict[str, list[dict[str, Any]]] = {}
  for entry in _without_twins(seqio_source.registered(task_module)):
    families.setdefault(entry['family'], []).append(entry)
  lines = []
  for family, entries in families.items():
    alike: dict[tuple[str, str], list[str]] = {}
    for entry in sorted(entries, key=lambda entry: 'members' in entry):
      splits = ', '.join(sorted(entry['splits'] or ['(its source knows)'], key=_order))
      alike.setdefault((splits, _kind(entry)), []).append(entry['name'])
    lines += ['', screen.colored(family, screen.TITLE)]
    for (splits, kind), names in alike.items():
      lines += screen.wrapped('  ', '    ', _joined_names(names))
      lines += screen.wrapped('      ', '        ', f'{splits} · {kind}')
  about = [
      'prompt-tuning tasks NAME shows the examples of one as the model will see them.',
      f'{task_module} registers these; MIXTURE_OR_TASK_MODULE names a module of your own, and '
      'FileTask makes a task of your files without any.',
  ]
  if any('[taskless_]' in line for line in lines):
    about.insert(0, '[taskless_] is for two names: so called, the text begins without the task.')
  return [*lines[1:], '', *(line for text in about for line in screen.wrapped('', '  ', text))]


def _order(split: str) -> tuple[int, str]:
  """Sorts training first and tests last."""
  kinds = [number for number, name in enumerate(SPLITS) if split.startswith(name)]
  return (kinds or [len(SPLITS)])[0], split


def _without_twins(entries: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
  """The entries, `x` and `taskless_x` as the one entry `[taskless_]x`."""
  names = {entry['name'] for entry in entries}
  for entry in entries:
    name = entry['name']
    if name.removeprefix('taskless_') != name and name.removeprefix('taskless_') in names:
      continue
    has_twin = f'taskless_{name}' in names
    yield {**entry, 'name': f'[taskless_]{name}' if has_twin else name}


def _kind(entry: Mapping[str, Any]) -> str:
  if 'members' in entry:
    return f'mixture of {", ".join(entry["members"])}'
  classes = entry['classes']
  if classes is True:
    return 'classes, known from its files'
  if classes:
    return f'{len(classes)} classes: {", ".join(classes)}'
  return 'text'


def _joined_names(names: Sequence[str]) -> str:
  """Names with what they share written once where there are many: `lama_{P17, P19}`."""
  before = os.path.commonprefix(list(names))
  if len(names) < 4 or len(before) < 4:
    return ', '.join(names)
  return f'{before}{{{", ".join(name[len(before):] for name in names)}}}'
