"""What `prompt-tuning --help` prints: the commands, and of each its macros and recipes."""

from __future__ import annotations

import re

from prompt_tuning_jax import config
from prompt_tuning_jax.cli_commands import COMMANDS, gin_name
from prompt_tuning_jax.config.files import is_overlay
from prompt_tuning_jax.config.macros import MACROS

# A macro and its value, where they stand on one line of a gin file.
_MACRO = re.compile(r'^([A-Z][A-Z_]+) = (.+?)\s*$', re.MULTILINE)


def general_help() -> str:
  """The commands, a line each."""
  width = max(map(len, COMMANDS))
  lines = [
      'usage: prompt-tuning COMMAND [flags]',
      '',
      'Prompt tuning of frozen T5 models in JAX.',
      '',
      *(f'  {name:{width}}  {command.summary}' for name, command in COMMANDS.items()),
      '',
      'prompt-tuning COMMAND --help shows the flags, macros and recipes of a command.',
  ]
  return '\n'.join(lines)


def macros_and_recipes(name: str) -> str:
  """What `runs/<name>.gin` reads and sets, and the recipes with their first lines."""
  root = config.gin_folder()
  text = _with_includes(f'runs/{gin_name(name)}.gin')
  used = dict.fromkeys(re.findall(r'%([A-Z][A-Z_]+)', text))
  values = dict(_MACRO.findall(text))
  lines = ['macros (--gin.NAME=VALUE), with their defaults:']
  for macro in used:
    about = MACROS.get(macro)
    default = f' [{values[macro]}]' if macro in values else ' (to be set)'
    lines.append(f'  {macro}{default}')
    if about:
      lines.append(f'      {about.meaning}')
  overlays = [file for file in config.packaged_files() if is_overlay(root / file)]
  sweeps = config.packaged_files('sweeps') if name == 'sweep' else []
  for title, files in (
      *([('grids (--gin_file=sweeps/NAME, behind a recipe)', sweeps)] if sweeps else []),
      ('recipes (--gin_file=NAME)', config.packaged_files('recipes')),
      ('overlays (--gin_file=NAME as well; read after all others wherever named)', overlays),
  ):
    lines += ['', f'{title}:']
    for file in files:
      text = (root / file).read_text(encoding='utf-8')
      first = text.splitlines()[0].lstrip('#').strip().removeprefix('overlay: ')
      lines.append(f'  {file.split("/")[-1].removesuffix(".gin")}\n      {first}')
      if file in sweeps:
        lines += [
            f'      --gin.{macro} [{default}]: {MACROS[macro].meaning}'
            for macro, default in _MACRO.findall(text) if macro != 'SWEEP'
        ]
  return '\n'.join(lines)


def _with_includes(name: str) -> str:
  """The text of a gin file of the library with those it includes."""
  path = config.gin_folder() / name
  if not path.is_file():
    return ''
  text = path.read_text(encoding='utf-8')
  included = re.findall(r"^include '(.+)'", text, re.MULTILINE)
  return '\n'.join([*map(_with_includes, included), text])
