"""Fields of an example, and texts that name them in braces: `review: {text}`."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import string
from collections.abc import Mapping
from typing import Any

# What `find` returns where there is no such field.
MISSING = object()


def find(row: Mapping[str, Any], name: str) -> Any:
  """A field of a line, or one inside of another where its name has dots."""
  if name in row:
    return row[name]
  value: Any = row
  for part in name.split('.'):
    if not isinstance(value, Mapping) or part not in value:
      return MISSING
    value = value[part]
  return value


def field_text(row: Mapping[str, Any], name: str) -> str:
  """A field of a line, which must be a text or a number.

  Raises:
    ValueError: with the reason, if it is not.
  """
  return _as_text(find(row, name), name)


def _as_text(value: Any, name: str) -> str:
  if value is MISSING:
    raise ValueError(f'no field {name!r}')
  if value is None:
    raise ValueError(f'{name!r} is null')
  if not isinstance(value, (str, bool, int, float)):
    raise ValueError(f'{name!r} is a {type(value).__name__}, not a text or a number')
  return whole_text(scalar(value), name)


def whole_text(text: str, name: str) -> str:
  """The text, unless it holds half of a character (\\ud83d alone), as JSON can write it.

  Raises:
    ValueError: if it does, for no UTF-8 holds that; names the field.
  """
  try:
    text.encode()
  except UnicodeEncodeError:
    raise ValueError(f'{name!r} holds half of a surrogate pair, which is no text') from None
  return text


def scalar(value: Any) -> str:
  """A text as it is, any other value as JSON writes it: `true`, `3`."""
  return value if isinstance(value, str) else json.dumps(value)


def field_texts(row: Mapping[str, Any], name: str) -> list[str]:
  """A field of a line that holds one text or several, not all of them empty.

  Raises:
    ValueError: with the reason, if it does not.
  """
  value = find(row, name)
  texts = value if isinstance(value, list) else [value]
  texts = [_as_text(text, name) for text in texts]
  if not any(text.strip() for text in texts):
    raise ValueError(f'{name!r} holds no text')
  return texts


def check_number(text: str) -> None:
  """Raises ValueError unless the text spells a number, and a finite one."""
  try:
    is_number = math.isfinite(float(text))
  except ValueError:
    is_number = False
  if not is_number:
    raise ValueError(f'the target {text!r} is no number')


@dataclasses.dataclass(frozen=True)
class FieldText:
  """Words and fields in order: `FileTask.inputs`, `PromptDesign.template` and the like, parsed.

  Attributes:
    parameter: which of them it is.
    parts: words, each followed by the name of a field or None.
  """

  parameter: str
  parts: tuple[tuple[str, str | None], ...]

  @property
  def fields(self) -> list[str]:
    """Names of the fields."""
    return [name for _, name in self.parts if name is not None]

  def filled(self, row: Mapping[str, Any]) -> str:
    """The text with a line's fields in their places.

    Raises:
      ValueError: if a field is missing or no text, or all of them are empty.
    """
    values = {name: field_text(row, name) for name in self.fields}
    if not any(value.strip() for value in values.values()):
      are = 'is' if len(values) == 1 else 'are'
      raise ValueError(f'{" and ".join(map(repr, values))} {are} empty ({self.parameter})')
    return self.joined(values)

  def joined(self, values: Mapping[str, str]) -> str:
    """The text with these values in the places of its fields, whatever they are."""
    return ''.join(
        words + ('' if name is None else values[name]) for words, name in self.parts
    )


@functools.cache
def parse(parameter: str, text: str, owner: str = 'FileTask') -> FieldText:
  """Parses a text; one without braces is the name of a field.

  Args:
    parameter: where the text was set, for messages.
    text: the text.
    owner: whose parameter that is.

  Raises:
    ValueError: if its braces make no sense.
  """
  if not set('{}') & set(text):
    return FieldText(parameter, (('', text),))
  try:
    parsed = list(string.Formatter().parse(text))
  except ValueError as error:
    raise ValueError(
        f'{owner}.{parameter}={text!r}: {error}. Braces come in pairs, around the name of a '
        'field; braces to be read are written {{ and }}.'
    ) from error
  parts = []
  for words, name, spec, conversion in parsed:
    if name is not None:
      # Names may hold what Python's format would read as something else.
      name += (f'!{conversion}' if conversion else '') + (f':{spec}' if spec else '')
    parts.append((words, name))
  names = [name for _, name in parts if name is not None]
  if not names or '' in names:
    raise ValueError(
        f'{owner}.{parameter}={text!r} has no name of a field in its braces. Write {{text}} '
        'for the field text.'
    )
  return FieldText(parameter, tuple(parts))
