"""Errors of gin files and flags as users read them: the nearest right names, no addresses."""

from __future__ import annotations

import ast
import contextlib
import difflib
import re
import tokenize
from collections.abc import Iterable, Iterator

from prompt_tuning_jax.config import registry
from prompt_tuning_jax.config.macros import MACROS

_IN_CALL = re.compile(r"\n  In call to configurable '([^']+)' \([^\n]*\)[^\n]*")

# What gin raises while it reads a file, and while it builds what files describe.
READING = (ValueError, KeyError, TypeError, ImportError, NameError, AttributeError)
BUILDING = (ValueError, TypeError)


class ConfigError(ValueError):
  """Something is wrong with a gin file or flag; the message says what to do."""


@contextlib.contextmanager
def explained(kinds: tuple[type[Exception], ...]) -> Iterator[None]:
  """Turns gin's errors into ours: the nearest names added, no function addresses."""
  try:
    yield
  except ConfigError:
    raise
  except SyntaxError as error:
    where = f'{error.filename or "a flag"}, line {error.lineno}'
    raise ConfigError(
        f'Cannot read {where}: {(error.text or "").strip()}\n{what_is_wrong(error)}\nA value '
        "is a Python literal, @function() or %MACRO; texts need quotes: NAME = 'text'."
    ) from error
  except kinds as error:
    message = error.args[0] if isinstance(error, KeyError) and error.args else str(error)
    message = without_gin_calls(str(message))
    raise ConfigError(message + _nearest_name(message)) from error


def what_is_wrong(error: SyntaxError | tokenize.TokenError) -> str:
  """The first line of a syntax error, in words that are not those of Python's parser."""
  if isinstance(error, tokenize.TokenError):
    message = str(error).splitlines()[0]
    if 'EOF in multi-line' not in message:
      return message
    return f'a {"text" if "string" in message else "bracket"} is not closed'
  line = error.msg.splitlines()[0].rstrip('.')
  return 'that is no value' if 'malformed node' in line else line


def without_gin_calls(message: str) -> str:
  """An error's message with one line for gin's calls: the innermost, where it arose."""
  calls = _IN_CALL.findall(message)
  message = _IN_CALL.sub('', message)
  return f'{message}\n  (while gin built {calls[0]})' if calls else message


def how_to_set(name: str) -> str:
  """What a macro means and a flag that sets it, to stand behind its name."""
  macro = MACROS.get(name)
  if macro is None:
    near = difflib.get_close_matches(name, MACROS, n=1)
    hint = f' Did you mean {near[0]}?' if near else ''
    return f'{hint} Set it in a gin file or with --gin.{name}=VALUE.'
  return f' {macro.meaning}. For example {example_flag(name)}'


def example_flag(name: str) -> str:
  """A flag that sets a known macro, as it is typed in a shell."""
  macro = MACROS[name]
  value = ast.literal_eval(macro.example) if macro.is_text else macro.example
  quoted = f'"{value}"' if re.search(r"[\s'@()\[\]{}]", value) else value
  return f'--gin.{name}={quoted}'


def did_you_mean(name: str, known: Iterable[str]) -> str:
  """A line with the nearest of the known names, if there are any near ones."""
  near = difflib.get_close_matches(name, sorted(known), n=2, cutoff=0.6)
  return f'\nDid you mean {" or ".join(near)}?' if near else ''


def _nearest_name(message: str) -> str:
  """What to add to gin's message about an unknown function or parameter."""
  match = re.search(r"No configurable matching (?:reference )?'@?([^'()]+)", message)
  if match:
    name = match[1].split('/')[-1]
    hint = did_you_mean(name, registry.names())
    return hint or (
        '\nFunctions of this library: ' + ', '.join(sorted(registry.names())) + '; and '
        'optax.…, or whatever a gin file imports.'
    )
  match = re.search(r"Configurable '([^']+)' doesn't have a parameter named '([^']+)'", message)
  if match:
    known = registry.parameters(match[1])
    return did_you_mean(match[2], known) or f'\nIt has {", ".join(known)}.'
  return ''
