"""Gin for the commands: T5X's flags and macros, the search path, the operative config.

The core of the library knows nothing of gin: `registry.py` names its functions. This
file reads gin files and flags and answers wrong names with the nearest right one. What
it returns are the keyword arguments of a command's function, built, ready to be passed.

The order of gin files matters only where two of them set the same name (the later one
wins): the defaults of a command, `runs/<command>.gin`, are read first whether a file
includes them or not; an include of a file that was read is passed over; flags come last.

A gin file is code: it can import and call anything. Files are only read when they are
named by the user, by a file that the user named, or belong to this library; none is
ever taken from a downloaded model or prompt.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import inspect
import io
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gin

from prompt_tuning_jax import registry

# Includes become names with this prefix, which only the reader below can open.
_SCHEME = 'once:'
_INCLUDE = re.compile(r'^(\s*include\s+)([\'"])(.+?)\2', re.MULTILINE)
_IN_CALL = re.compile(r"\n  In call to configurable '([^']+)' \([^\n]*\)[^\n]*")
_BINDING = re.compile(r'^([\w./-]+)\s*=(.*)$', re.DOTALL)
_PLAIN_TEXT = re.compile(r'^[\w./:~@+-][\w./:~@+ -]*$')


class ConfigError(ValueError):
  """Something is wrong with a gin file or flag; the message says what to do."""


def gin_folder() -> Path:
  """The library's gin files: `gin/` of a checkout, or those installed with it."""
  package = Path(__file__).resolve().parent
  installed = package / 'gin_configs'
  return installed if installed.is_dir() else package.parent / 'gin'


def packaged_files(folder: str = '') -> list[str]:
  """Names of the library's gin files, such as 'recipes/demo.gin', sorted."""
  root = gin_folder()
  return sorted(
      path.relative_to(root).as_posix() for path in (root / folder).rglob('*.gin')
  )


@dataclasses.dataclass(frozen=True)
class Config:
  """A parsed configuration of one command; gin itself holds the bindings.

  Attributes:
    command: the command's name.
    files: every gin file that was read, in order.
    notes: what the user should know but need not change, for example a flag that
      nothing in this run reads.
  """

  command: str
  files: tuple[str, ...]
  notes: tuple[str, ...]

  def kwargs(self) -> dict[str, Any]:
    """Builds the keyword arguments of the command's function.

    Raises:
      ConfigError: if an argument without a default has no value.
      ValueError, OSError: whatever building the objects finds wrong.
    """
    target = registry.command_function(self.command)
    with _gin_errors(_BUILDING_ERRORS):
      values = gin.get_configurable(self.command)()
    missing = [
        name
        for name, parameter in inspect.signature(target).parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind is not parameter.VAR_KEYWORD
        and name not in values
    ]
    if missing:
      raise ConfigError(
          f'{self.command} needs a value for {", ".join(missing)}. Set '
          + ', '.join(f'--gin.{self.command}.{name}=…' for name in missing)
          + f', or use the defaults of runs/{self.command}.gin.'
      )
    return values

  def operative(self) -> str:
    """All values that counted so far, as a gin file that sets them again."""
    return gin.operative_config_str(max_line_length=90)

  def full(self) -> str:
    """All values of all files and flags, whether used or not, as a gin file."""
    return gin.config_str(max_line_length=90)


def parse(
    command: str,
    files: Sequence[str] = (),
    bindings: Sequence[str] = (),
    search_paths: Sequence[str] = (),
) -> Config:
  """Reads the defaults of a command, then gin files, then bindings from flags.

  Any earlier configuration of this process is dropped first.

  Args:
    command: name of a command that gin configures, such as 'train'.
    files: gin files or recipes; folder and ending may be left out ('demo').
    bindings: 'NAME=VALUE' or 'scope/function.parameter=VALUE'.
    search_paths: folders in which files are looked for as well.

  Raises:
    ConfigError: on an unknown file, name or macro, a value that cannot be read, or a
      macro that the command needs and nothing sets.
  """
  if command not in registry.commands():
    raise ConfigError(
        f'No command {command!r}.{_did_you_mean(command, registry.commands())}'
    )
  gin.clear_config()
  registry.register()
  with _reading(search_paths) as reader, _gin_errors(_READING_ERRORS):
    reader.parse(gin_folder() / 'runs' / f'{command}.gin')
    for name in files:
      reader.parse(reader.find(name))
    in_files = _set_macros()
    from_flags = [_parse_binding(binding) for binding in bindings]
  flags = [name for name in from_flags if name is not None]
  reached = _check_macros(command)
  _check_names(flags, in_files, reached)
  notes = tuple(
      f'{name} is set, but nothing in this run uses it.'
      for name in dict.fromkeys(flags)
      if name not in reached
  )
  return Config(command, tuple(reader.read), notes)


# What gin raises while it reads a file, and while it builds what files describe.
_READING_ERRORS = (ValueError, KeyError, TypeError, ImportError, NameError, AttributeError)
_BUILDING_ERRORS = (ValueError, TypeError)


@contextlib.contextmanager
def _gin_errors(kinds: tuple[type[Exception], ...]) -> Iterator[None]:
  """Turns gin's errors into ours: the nearest names added, no function addresses."""
  try:
    yield
  except ConfigError:
    raise
  except SyntaxError as error:
    where = f'{error.filename or "a flag"}, line {error.lineno}'
    raise ConfigError(
        f'Cannot read {where}: {(error.text or "").strip()}\n{error.msg}\nA value is a '
        "Python literal, @function() or %MACRO; texts need quotes: NAME = 'text'."
    ) from error
  except kinds as error:
    message = error.args[0] if isinstance(error, KeyError) and error.args else str(error)
    message = without_gin_calls(str(message))
    raise ConfigError(message + _nearest_name(message)) from error


def without_gin_calls(message: str) -> str:
  """An error's message with one line for gin's calls: the innermost, where it arose."""
  calls = _IN_CALL.findall(message)
  message = _IN_CALL.sub('', message)
  return f'{message}\n  (while gin built {calls[0]})' if calls else message


class _Reader:
  """Finds gin files and reads each of them once, includes resolved on the way."""

  def __init__(self, search_paths: Sequence[str]):
    self.folders = [
        Path.cwd(),
        *(Path(path).expanduser() for path in search_paths),
        gin_folder(),
    ]
    for folder in self.folders[1:]:
      if not folder.is_dir():
        raise ConfigError(f'--gin_search_paths: {folder} is not a folder.')
    self.read: list[str] = []

  def parse(self, path: Path) -> None:
    """Parses a file and those of its includes that were not read before.

    A file that was only included so far is read again, for the user may mean it to win;
    the defaults of the command, always the first, are not.
    """
    if str(path) in self.read[1:]:
      self.read.remove(str(path))
    gin.parse_config_file(_SCHEME + str(path))

  def find(self, name: str, within: Path | None = None) -> Path:
    """The file that is meant: as named, or without folder or ending.

    Args:
      name: what the user wrote, or an include in the file `within`. The library's own
        files include each other and never a file that happens to lie in the working
        folder: it would be code that nobody asked for.
    """
    folders = self.folders
    if within is not None:
      ours = within.is_relative_to(gin_folder())
      folders = [gin_folder()] if ours else [within.parent, *folders]
    names = [name] if name.endswith('.gin') else [name + '.gin', name]
    for folder in folders:
      for candidate in names:
        if (path := folder / Path(candidate).expanduser()).is_file():
          return path.resolve()
    if '/' not in name:
      for folder in self.folders[1:]:
        found = sorted(folder.glob(f'*/{names[0]}'))
        if len(found) > 1:
          raise ConfigError(
              f'{name!r} may be {" or ".join(map(str, found))}: name the folder too.'
          )
        if found:
          return found[0].resolve()
    raise ConfigError(self._not_found(name))

  def open(self, path: Path) -> io.StringIO:
    """A file's text for gin; nothing if it was read before in this parse."""
    text = ''
    if str(path) not in self.read:
      self.read.append(str(path))
      text = _INCLUDE.sub(
          lambda match: f'{match[1]}{match[2]}{_SCHEME}'
          f'{self.find(match[3], within=path)}{match[2]}',
          path.read_text(encoding='utf-8'),
      )
    stream = io.StringIO(text)
    stream.name = str(path)  # Gin names it in its messages.
    return stream

  def _not_found(self, name: str) -> str:
    known = {}
    for folder in self.folders[1:]:
      for path in folder.rglob('*.gin'):
        known.setdefault(path.relative_to(folder).as_posix(), path)
    # A name may be near with its folder, or by its last part alone.
    near = difflib.get_close_matches(name, known, n=3)
    stems = {Path(other).stem: other for other in known}
    near += [stems[s] for s in difflib.get_close_matches(Path(name).stem, stems, n=3)]
    hint = f' Did you mean {" or ".join(dict.fromkeys(near))}?' if near else ''
    recipes = ', '.join(Path(other).stem for other in known if other.startswith('recipes/'))
    return (
        f'No gin file {name!r}.{hint} Looked in {", ".join(map(str, self.folders))}. '
        f'Recipes: {recipes or "none"}.'
    )


_reader: _Reader | None = None


def _open_once(name: str) -> contextlib.AbstractContextManager[io.StringIO]:
  return contextlib.closing(_reader.open(Path(name.removeprefix(_SCHEME))))


@contextlib.contextmanager
def _reading(search_paths: Sequence[str]) -> Iterator[_Reader]:
  """The reader that gin's includes go through for the length of one parse."""
  global _reader
  gin.config.register_file_reader(_open_once, lambda name: name.startswith(_SCHEME))
  _reader = _Reader(search_paths)
  # Gin tries its own readers first, and they log what they cannot find as an error.
  logging.getLogger().addFilter(_not_about_includes)
  try:
    yield _reader
  finally:
    logging.getLogger().removeFilter(_not_about_includes)
    _reader = None


def _not_about_includes(record: logging.LogRecord) -> bool:
  return _SCHEME not in record.getMessage()


def _parse_binding(binding: str) -> str | None:
  """Hands a flag's binding to gin; returns the macro's name if it sets one."""
  match = _BINDING.match(binding)
  if not match:
    raise ConfigError(f'--gin.{binding}: expected --gin.NAME=VALUE.')
  name, value = match[1], match[2].strip()
  macro = None if '.' in name else name
  if not value:
    raise ConfigError(f'--gin.{name}= has no value.{_how_to_set(name)}')
  known = registry.MACROS.get(macro)
  if known is not None and known.is_text and _is_bare_text(value):
    value = repr(value)
  try:
    gin.parse_config(f'{name} = {value}')
  except SyntaxError as error:
    quotes = f' A text needs quotes: --gin.{name}="\'{value}\'".'
    raise ConfigError(
        f'Cannot read --gin.{name}={value}: {error.msg.splitlines()[0]}'
        + (quotes if _PLAIN_TEXT.match(value) else _how_to_set(name))
    ) from error
  return macro


def _is_bare_text(value: str) -> bool:
  """Whether a flag's value is a text whose quotes were left out, such as a path."""
  if not _PLAIN_TEXT.match(value) or value[0] == '@':
    return False
  try:
    ast.literal_eval(value)
  except (ValueError, SyntaxError):
    return True
  return False


def _set_macros() -> set[str]:
  """Names of all macros that have a value, unscoped ones."""
  lines = gin.config_str(max_line_length=10**6).splitlines()
  names = (re.match(r'^([A-Za-z_]\w*) = ', line) for line in lines)
  return {match[1] for match in names if match}


def _check_macros(command: str) -> set[str]:
  """Walks all that the command will read and returns the macros in it.

  Raises:
    ConfigError: naming every macro that is used but has no value.
  """
  missing: dict[str, None] = {}
  reached: set[str] = set()
  seen = set()

  def visit_configurable(selector: Any, scopes: Sequence[str]) -> None:
    key = ('/'.join(scopes), str(selector))
    if key in seen:
      return
    seen.add(key)
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
        reached.add(macro)
        with gin.config_scope(value.scopes):
          bound = gin.get_bindings('gin.macro', resolve_references=False)
        if 'value' not in bound or repr(bound['value']) == '%gin.REQUIRED':
          missing[macro] = None
        else:
          visit(bound['value'], value.scopes)
      else:
        # As gin does: a reference's own scope replaces the one it stands in.
        visit_configurable(value.configurable.selector, value.scopes or scopes)
    elif isinstance(value, Mapping):
      for item in [*value.keys(), *value.values()]:
        visit(item, scopes)
    elif isinstance(value, (list, tuple)):
      for item in value:
        visit(item, scopes)

  visit_configurable(command, [])
  if missing:
    raise ConfigError(
        f'`prompt-tuning {command}` needs a value for:\n'
        + '\n'.join(f'  {name}:{_how_to_set(name)}' for name in missing)
    )
  return reached


def _check_names(flags: Sequence[str], in_files: set[str], reached: set[str]) -> None:
  """Refuses macros from flags that nobody knows: they would change nothing."""
  known = set(registry.MACROS) | in_files | reached
  for name in flags:
    if name in known:
      continue
    advice = registry.RETIRED.get(name)
    if advice is None:
      advice = _did_you_mean(name, known).strip() or (
          'Macros: ' + ', '.join(sorted(registry.MACROS)) + '.'
      )
    raise ConfigError(f'--gin.{name}: there is no macro {name}. {advice}')
  # A typing error in a file changes nothing either.
  for name in sorted(in_files - reached - set(registry.MACROS)):
    near = difflib.get_close_matches(name, registry.MACROS, n=1, cutoff=0.85)
    if near:
      raise ConfigError(
          f'A gin file sets {name}, which nothing uses. Did you mean {near[0]}?'
      )


def _how_to_set(name: str) -> str:
  macro = registry.MACROS.get(name)
  if macro is None:
    near = difflib.get_close_matches(name, registry.MACROS, n=1)
    hint = f' Did you mean {near[0]}?' if near else ''
    return f'{hint} Set it in a gin file or with --gin.{name}=VALUE.'
  value = ast.literal_eval(macro.example) if macro.is_text else macro.example
  quoted = f'"{value}"' if re.search(r"[\s'@()\[\]{}]", value) else value
  return f' {macro.meaning}. For example --gin.{name}={quoted}'


def _did_you_mean(name: str, known: Iterable[str]) -> str:
  near = difflib.get_close_matches(name, sorted(known), n=2, cutoff=0.6)
  return f'\nDid you mean {" or ".join(near)}?' if near else ''


def _nearest_name(message: str) -> str:
  """What to add to gin's message about an unknown function or parameter."""
  match = re.search(r"No configurable matching (?:reference )?'@?([^'()]+)", message)
  if match:
    name = match[1].split('/')[-1]
    hint = _did_you_mean(name, registry.names())
    return hint or (
        '\nFunctions of this library: ' + ', '.join(sorted(registry.names())) + '; and '
        'optax.…, or whatever a gin file imports.'
    )
  match = re.search(r"Configurable '([^']+)' doesn't have a parameter named '([^']+)'", message)
  if match:
    known = registry.parameters(match[1])
    return _did_you_mean(match[2], known) or f'\nIt has {", ".join(known)}.'
  return ''

