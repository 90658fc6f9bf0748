"""The ladder: tiny T5 1.1s of three sizes, made by the library's own commands.

  pico, nano, micro     after span corruption and LM adaptation
  pico_0, pico_100, …   after so many steps of adaptation; 0 is before it

What is worth its size is packaged (`zoo/`). The rest is made by recipes, and found by the same
names in `folder()`, where `adapt` leaves it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from prompt_tuning_jax.checkpoints import native
from prompt_tuning_jax.json_files import read_json

# The smallest first.
SIZES = ('pico', 'nano', 'micro')

_NAME = re.compile(rf'({"|".join(SIZES)})(?:_(\d+))?')


def folder() -> str:
  """Where models that were made here lie: $PTJ_LADDER_DIR, or a folder in the user's cache."""
  home = os.path.join('~', '.cache', 'prompt_tuning_jax', 'ladder')
  return os.environ.get('PTJ_LADDER_DIR') or os.path.expanduser(home)


def is_name(name: str) -> bool:
  """Whether a name is that of a model of the ladder, be it there or not."""
  return _NAME.fullmatch(name) is not None


def made(name: str) -> str | None:
  """The directory of a model that was made on this machine; None if it was not."""
  if (match := _NAME.fullmatch(name)) is None:
    return None
  model, steps = match.groups()
  path = os.path.join(folder(), model, 'backbone' + (f'_{steps}' if steps else ''))
  return path if native.is_native(path) else None


def names_made() -> list[str]:
  """Names of all models that were made on this machine."""
  found = []
  for model in SIZES:
    for name in _entries(os.path.join(folder(), model)):
      steps = name.removeprefix('backbone')
      if steps != name and made(model + steps):
        found.append(model + steps)
  return found


def how_to_make(name: str) -> str:
  """The commands that make a model of the ladder, for an error."""
  model = _NAME.fullmatch(name)[1]
  return (
      f'Make it (the corpus: `prompt_tuning_jax/zoo/nano/README.md`) by\n'
      f'  prompt-tuning pretrain --gin_file=pretrain_{model} --gin.MODEL_DIR=/tmp/{model}\n'
      f'  prompt-tuning adapt --gin_file=adapt_{model} '
      f'--gin.INITIAL_CHECKPOINT_PATH=/tmp/{model}/backbone '
      f'--gin.MODEL_DIR={os.path.join(folder(), model)}'
  )


def adaptation_steps(path: str) -> int | None:
  """After how many steps of LM adaptation a backbone is; None where it does not say."""
  try:
    described = read_json(os.path.join(path, native.CONFIG_FILE))
    return described.get('metadata', {}).get('adaptation_steps')
  except (OSError, ValueError, AttributeError):
    return None


def steps_beside(path: str) -> list[int]:
  """The steps at which `adapt` kept the backbone that ended at a path."""
  parent, name = os.path.split(os.path.abspath(path))
  pattern = re.compile(rf'{re.escape(name)}_(\d+)')
  matches = map(pattern.fullmatch, _entries(parent))
  return sorted(
      int(match[1]) for match in matches if match and native.is_native(f'{path}_{match[1]}')
  )


def at_step(path: str, steps: int, name: str = '', others: Sequence[int] = ()) -> str:
  """The directory of a backbone after fewer steps of adaptation than the one at a path.

  Args:
    path: what `adapt` ended with: `backbone` in its MODEL_DIR, or a packaged model's directory.
    steps: how many steps of it.
    name: its name, where it is a model of the ladder; the error says how to make it.
    others: steps that are known elsewhere, for the error.

  Raises:
    FileNotFoundError: if it was not kept at this step; says at which.
  """
  last = adaptation_steps(path)
  if last == steps:
    return path
  beside = f'{path}_{steps}'
  if native.is_native(beside):
    return beside
  known = sorted({*others, *steps_beside(path), *([] if last is None else [last])})
  raise FileNotFoundError(
      f'ADAPTATION_STEPS is {steps}, but {path} was not kept after so many: there is no '
      f'{beside}. It was after {", ".join(map(str, known)) or "no number that is known"}. '
      '`adapt` keeps it at BACKBONE_STEPS, as backbone_<step> in its MODEL_DIR.'
      + (f' {how_to_make(name)}' if name else '')
  )


def _entries(path: str) -> list[str]:
  try:
    return sorted(os.listdir(path))
  except OSError:
    return []
