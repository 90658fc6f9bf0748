"""What flags and files set, what of it a command reads, and whether it can be right."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import re
import tokenize
from collections.abc import Mapping, Sequence
from typing import Any

import gin

from prompt_tuning_jax.config import registry
from prompt_tuning_jax.config.errors import (
    ConfigError,
    did_you_mean,
    example_flag,
    how_to_set,
    what_is_wrong,
)
from prompt_tuning_jax.config.macros import MACROS, RETIRED

_BINDING = re.compile(r'^([\w./-]+)\s*=(.*)$', re.DOTALL)
_PLAIN_TEXT = re.compile(r'^[\w./:~@+-][\w./:~@+ -]*$')


def parse_flag(binding: str) -> str:
  """Hands a flag's 'NAME=VALUE' to gin and returns NAME: a macro's, or a parameter's."""
  match = _BINDING.match(binding)
  if not match:
    raise ConfigError(f'--gin.{binding}: expected --gin.NAME=VALUE.')
  name, value = match[1], match[2].strip()
  if not value:
    raise ConfigError(f'--gin.{name}= has no value.{how_to_set(name)}')
  macro = MACROS.get(name)
  takes_text = registry.takes_text(name) if macro is None else macro.is_text
  if takes_text and _is_bare_text(value):
    value = repr(value)
  try:
    gin.parse_config(f'{name} = {value}')
  except (SyntaxError, tokenize.TokenError) as error:
    _check_name(name, set(MACROS) | macros_that_are_set())
    if macro is not None:
      remedy = f'expected {macro.kind.expected}:{how_to_set(name)}'
    elif _PLAIN_TEXT.match(value):
      remedy = f'{what_is_wrong(error)}. A text needs quotes: --gin.{name}="\'{value}\'".'
    else:
      remedy = f'{what_is_wrong(error)}.{how_to_set(name)}'
    raise ConfigError(f'Cannot read --gin.{name}={value}: {remedy}') from error
  return name


def _is_bare_text(value: str) -> bool:
  """Whether a flag's value is a text whose quotes were left out: a path, also '2024'."""
  # A template may begin with a brace, as a dict does; only the dict can be read.
  if value[0] in '\'"@%([':
    return False
  try:
    literal = ast.literal_eval(value)
  except (ValueError, SyntaxError):
    return True
  return isinstance(literal, int | float) and not isinstance(literal, bool)


def macros_that_are_set() -> set[str]:
  """Names of all macros that have a value, unscoped ones."""
  lines = gin.config_str(max_line_length=10**6).splitlines()
  names = (re.match(r'^([A-Za-z_]\w*) = ', line) for line in lines)
  return {match[1] for match in names if match}


@dataclasses.dataclass
class Reached:
  """What a command reads: all that it refers to, directly or through others.

  Attributes:
    macros: names of macros.
    functions: (scope, name) of each function, the command's own first.
    missing: those of the macros that have no value.
  """

  macros: set[str] = dataclasses.field(default_factory=set)
  functions: set[tuple[str, str]] = dataclasses.field(default_factory=set)
  missing: dict[str, None] = dataclasses.field(default_factory=dict)

  def uses(self, scope: str, function: str) -> bool:
    """Whether a value set for a function in a scope is read."""
    return any(
        function == name and f'{within}/'.startswith(f'{scope}/' if scope else '')
        for within, name in self.functions
    )


def reached_by(command: str) -> Reached:
  """Walks all that a command will read, without building any of it."""
  reached = Reached()

  def visit_function(selector: Any, scopes: Sequence[str]) -> None:
    key = ('/'.join(scopes), str(selector))
    if key in reached.functions:
      return
    reached.functions.add(key)
    with gin.config_scope(list(scopes) or None):
      bound = gin.get_bindings(selector, resolve_references=False)
    for value in bound.values():
      visit(value, scopes)

  def visit(value: Any, scopes: Sequence[str]) -> None:
    if isinstance(value, gin.config.ConfigurableReference):
      name = repr(value)
      if name == '%gin.REQUIRED':
        return
      if name.startswith('%') and value.selector.endswith('macro'):
        macro = '/'.join(value.scopes)
        if macro in reached.macros:
          return
        reached.macros.add(macro)
        bound = _macro_value(value.scopes)
        if 'value' not in bound or repr(bound['value']) == '%gin.REQUIRED':
          reached.missing[macro] = None
        else:
          visit(bound['value'], value.scopes)
      else:
        # As gin does: a reference's own scope replaces the one it stands in.
        visit_function(value.configurable.selector, value.scopes or scopes)
    elif isinstance(value, Mapping):
      for item in [*value.keys(), *value.values()]:
        visit(item, scopes)
    elif isinstance(value, (list, tuple)):
      for item in value:
        visit(item, scopes)

  visit_function(command, [])
  return reached


def value_of(macro: str) -> Any:
  """A macro's value, with whatever it refers to unresolved; None where it has none."""
  return _macro_value([macro]).get('value')


def _macro_value(scopes: Sequence[str]) -> dict[str, Any]:
  with gin.config_scope(list(scopes)):
    return gin.get_bindings('gin.macro', resolve_references=False)


def check_names(flags: Sequence[str], in_files: set[str], reached: Reached) -> None:
  """Refuses macros that nobody knows: they would change nothing.

  Args:
    flags: what flags set, as `parse_flag` returns it.
    in_files: the macros that files set.
    reached: what the command reads.
  """
  for name in flags:
    _check_name(name, set(MACROS) | in_files | reached.macros)
  # A typing error in a file changes nothing either.
  for name in sorted(in_files - reached.macros - set(MACROS)):
    near = difflib.get_close_matches(name, MACROS, n=1, cutoff=0.85)
    if near:
      raise ConfigError(
          f'A gin file sets {name}, which nothing uses. Did you mean {near[0]}?'
      )


def _check_name(name: str, known: set[str]) -> None:
  if '.' in name or name in known:
    return
  advice = RETIRED.get(name) or did_you_mean(name, known).strip()
  raise ConfigError(
      f'--gin.{name}: there is no macro {name}. '
      + (advice or f'Macros: {", ".join(sorted(MACROS))}.')
  )


def check_missing(command: str, reached: Reached) -> None:
  """Names every macro that a command reads and nothing sets."""
  if reached.missing:
    raise ConfigError(
        'This command needs a value for:\n'
        + '\n'.join(f'  {name}:{how_to_set(name)}' for name in reached.missing)
    )


def check_values(
    flags: Sequence[str], set_in: Mapping[str, Sequence[tuple[str, str]]]
) -> None:
  """Refuses values that a known macro cannot have, all of them in one message.

  Args:
    flags: what flags set; they win over files.
    set_in: for each macro, where files set it and to what.
  """
  wrong = []
  for name in sorted(macros_that_are_set() & set(MACROS)):
    value = _macro_value([name])['value']
    macro = MACROS[name]
    if macro.allows(value):
      continue
    where = f'--gin.{name}' if name in flags else _place(value, set_in.get(name, ()))
    wrong.append(
        f'{name} is {value!r}' + (f' ({where})' if where else '')
        + f', expected {macro.kind.expected}: {macro.meaning}. For example '
        f'{example_flag(name)}, or {name} = {macro.example} in a gin file.'
        + (f' {macro.advice}' if macro.advice else '')
    )
  if wrong:
    raise ConfigError('\n'.join(wrong))


def _place(value: Any, places: Sequence[tuple[str, str]]) -> str:
  """The last of the places in files where a macro was set to this value."""
  for place, text in reversed(places):
    with contextlib.suppress(ValueError, SyntaxError):
      if ast.literal_eval(text) == value:
        return place
  return ''


def without_effect(flags: Sequence[str], reached: Reached) -> list[str]:
  """What to tell the user of flags that nothing in the run reads."""
  notes = []
  for name in dict.fromkeys(flags):
    if '.' not in name:
      if name not in reached.macros:
        instead = MACROS[name].instead if name in MACROS else ''
        notes.append(f'{name} is set, but nothing in this run uses it. {instead}'.rstrip())
      continue
    key = gin.config.ParsedBindingKey.parse(name)
    function = key.complete_selector
    # Functions of the user's may call each other where gin files do not show it.
    if registry.is_registered(function) and not reached.uses(key.scope, function):
      used = '/'.join(filter(None, [key.scope, function]))
      notes.append(
          f'{name} is set, but nothing in this run uses {used}.{_what_would(function, reached)}'
      )
  return notes


def _what_would(function: str, reached: Reached) -> str:
  """The macro by which the command would use a function, if there is such a macro."""
  for name, macro in MACROS.items():
    if name in reached.macros and macro.example == f'@{function}()':
      return f' Set {name}={macro.example} as well.'
  return ''
