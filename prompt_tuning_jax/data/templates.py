"""Templates as they are written: slots for virtual tokens, fields and words, in order.

A template is a text, or the same as a sequence:

    '{3} {subject} is the capital of {3} <extra_id_0>.</s>'
    (3, 'subject', 'text: is the capital of', 3, 'text: <extra_id_0> .</s>')

In the text, braces hold a number of virtual tokens or the name of a field; `{{` and `}}` are
braces to be read. All else are words, and their pieces are those of running text: a space
begins a word ('▁is'), and what touches a slot or a field goes on with it ('.', not '▁.').
A field is tokenised by itself and always begins a word, so it may touch a slot, but not
words or a field before it. In the sequence every item begins a word.

`<extra_id_n>` is that sentinel, and `</s>` the end-of-sequence token. T5's inputs end with one:
the field 'inputs' brings its own, a template of other fields should end in `</s>`.
"""

from __future__ import annotations

import dataclasses
import re
import string
from collections.abc import Sequence
from typing import Any

from prompt_tuning_jax.data.vocabulary import Vocabulary

_TEXT = 'text:'
_EOS = '</s>'
# Fields that hold what the model is to say.
ANSWERS = ('targets', 'targets_pretokenized')
# As features and raw fields are named; a dot or a slash may stand inside.
_NAME = re.compile(r'[A-Za-z_]\w*([./-]\w+)*')


@dataclasses.dataclass(frozen=True)
class Slot:
  """The next `count` virtual tokens."""

  count: int


@dataclasses.dataclass(frozen=True)
class Field:
  """A field of the example."""

  name: str


@dataclasses.dataclass(frozen=True)
class Words:
  """Words of the template; where they `go_on`, only a space begins a word."""

  text: str
  go_on: bool = False

  def encode(self, vocabulary: Vocabulary) -> list[int]:
    """Their token ids."""
    ids: list[int] = []
    for number, text in enumerate(self.text.split(_EOS)):
      ids += [vocabulary.eos_id] * (number > 0)
      ids += vocabulary.encode(text, goes_on=self.go_on or number > 0)
    return ids


Part = Slot | Field | Words


def parse(template: str | Sequence[Any]) -> tuple[Part, ...]:
  """The parts of a template, text or sequence, from left to right.

  Raises:
    ValueError: if it cannot be read, has no field, or names one twice.
  """
  is_text = isinstance(template, str)
  parts = tuple(_parts_of_text(template) if is_text else map(_part_of_item, template))
  fields = [part.name for part in parts if isinstance(part, Field)]
  if not fields:
    raise ValueError(
        f'Template {template!r} names no field, so that every example would look the '
        'same. Put ' + ("'{inputs}'" if is_text else "'inputs'") + ' where the text belongs.'
    )
  for name in fields:
    if name in ANSWERS:
      raise ValueError(
          f'Template {template!r} puts the field {name!r} into the input: the model would '
          'read the answer that it is to give. Put <extra_id_0> where the answer belongs.'
      )
    if fields.count(name) > 1:
      raise ValueError(
          f'Template {template!r} names the field {name!r} {fields.count(name)} times: the model '
          'would read the same text again. Name each field once.'
      )
  return parts


def _part_of_item(item: Any) -> Part:
  if isinstance(item, bool) or not isinstance(item, (int, str)):
    raise ValueError(
        f'Template item {item!r} is neither a number of virtual tokens, the name of '
        "a field, nor 'text: …'."
    )
  if isinstance(item, int):
    if item < 1:
      raise ValueError(f'Template item {item}: a slot has at least one virtual token.')
    return Slot(item)
  if item.startswith(_TEXT):
    return Words(item.removeprefix(_TEXT).strip())
  return Field(item)


def _parts_of_text(template: str) -> list[Part]:
  parts: list[Part] = []
  words = ''
  for literal, name, spec, conversion in _split(template):
    words += literal
    if name is None:  # Behind a brace to be read, or at the end.
      continue
    part = _part_in_braces(template, name, spec or conversion)
    beside_slot = isinstance(part, Slot) or (parts and isinstance(parts[-1], Slot))
    if words.strip() or (words and not beside_slot):
      parts.append(Words(words, go_on=bool(parts)))
    touches = parts and not isinstance(parts[-1], Slot) and not words[-1:].isspace()
    if isinstance(part, Field) and touches:
      raise ValueError(
          f'Template {template!r}: {{{name}}} touches what stands before it, but a field begins '
          f'a word. Put a space before {{{name}}}.'
      )
    parts.append(part)
    words = ''
  return [*parts, Words(words, go_on=bool(parts))] if words else parts


def _part_in_braces(template: str, name: str, more: str | None) -> Part:
  if name.isdecimal() and not more:
    return _part_of_item(int(name))
  if _NAME.fullmatch(name) and not more:
    return Field(name)
  raise ValueError(
      f'Template {template!r}: '
      + (f'{name!r} in braces is' if name else 'empty braces are')
      + ' neither a number of virtual tokens nor the name of a field. Write {3} for three '
      'virtual tokens, {inputs} for the text of the example.'
  )


def _split(template: str) -> list[tuple[str, str | None, str | None, str | None]]:
  """What stands before each pair of braces, and what in it, as `str.format` reads it."""
  try:
    return list(string.Formatter().parse(template.strip()))
  except ValueError as error:
    raise ValueError(
        f'Template {template!r}: {error}. Braces come in pairs, around a number of virtual '
        'tokens or the name of a field; braces to be read are written {{ and }}.'
    ) from error
