"""Where the prompt stands: placements put virtual tokens among an example's tokens.

A virtual token is an id at or beyond the vocabulary: V + i stands for position i of
the soft prompt, and the model looks it up there instead of in its embedding table.
A placement is a function from an example's token ids to token ids with the virtual
ones inserted; padding comes afterwards, so that a suffix stands next to the text.

    Prefix()                       [prompt; input], Lester et al. (2021)
    AfterBos()                     the prompt behind the first token
    Suffix(before_eos=False)       the prompt behind the input, or before its last token
    Template('{3} {inputs} It is {2}')            Liu et al. (2021); see `templates.py`

Tokens are cut to `length` first and the virtual tokens added then, as in the
original code: 512 input tokens and a prompt of 100 make rows of 612.
"""

from __future__ import annotations

import abc
import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from prompt_tuning_jax.data import templates
from prompt_tuning_jax.data.templates import Field, Slot, Words
from prompt_tuning_jax.data.vocabulary import Vocabulary


class Placement(abc.ABC):
  """Base of the placements; all are plain values that compare by their fields.

  Attributes:
    fields: what the placement reads of an example: token features, or raw fields
      that are tokenised for it.
    num_anchor_tokens: ordinary tokens that it adds to every example.
  """

  fields: tuple[str, ...] = ('inputs',)
  num_anchor_tokens: int = 0

  @abc.abstractmethod
  def __call__(
      self,
      tokens: Sequence[int] | np.ndarray,
      num_virtual_tokens: int,
      vocab_size: int,
      *,
      length: int | None = None,
      fields: Mapping[str, Sequence[int] | np.ndarray] | None = None,
  ) -> np.ndarray:
    """Puts the prompt into one example.

    Args:
      tokens: the example's input ids, without padding.
      num_virtual_tokens: P, the length of the prompt.
      vocab_size: V, rows of the embedding table; the prompt is V, …, V + P - 1.
      length: ordinary tokens beyond this many are cut first; None cuts nothing.
      fields: token ids of the fields that a template names besides 'inputs'.

    Returns:
      Token ids with all P virtual tokens, int32 [at most length + P].
    """

  @property
  @abc.abstractmethod
  def description(self) -> str | dict[str, Any]:
    """The placement as plain data, from which `as_placement` makes it again."""

  def bind(self, vocabulary: Vocabulary | None) -> Placement:
    """The placement with its literal texts tokenised for a vocabulary."""
    del vocabulary
    return self

  def check(self, num_virtual_tokens: int, length: int | None = None) -> None:
    """Raises ValueError unless prompts of that length can be placed."""
    del length
    if num_virtual_tokens < 0:
      raise ValueError(f'A prompt of {num_virtual_tokens} virtual tokens is not possible.')


def _split_insert(
    tokens: np.ndarray, at: int, num_virtual_tokens: int, vocab_size: int
) -> np.ndarray:
  prompt = _virtual(0, num_virtual_tokens, vocab_size)
  return np.concatenate([tokens[:at], prompt, tokens[at:]])


def _virtual(start: int, count: int, vocab_size: int) -> np.ndarray:
  first = vocab_size + start
  return np.arange(first, first + count, dtype=np.int32)


@dataclasses.dataclass(frozen=True)
class Prefix(Placement):
  """[prompt; input]: prompt tuning as published (Lester et al., 2021, section 2)."""

  description = 'prefix'

  def __call__(self, tokens, num_virtual_tokens, vocab_size, *, length=None, fields=None):
    tokens = np.asarray(tokens, np.int32)[:length]
    return _split_insert(tokens, 0, num_virtual_tokens, vocab_size)


@dataclasses.dataclass(frozen=True)
class AfterBos(Placement):
  """The prompt stands behind the first token (models that expect BOS first)."""

  description = 'after_bos'

  def __call__(self, tokens, num_virtual_tokens, vocab_size, *, length=None, fields=None):
    tokens = np.asarray(tokens, np.int32)[:length]
    return _split_insert(tokens, 1, num_virtual_tokens, vocab_size)


@dataclasses.dataclass(frozen=True)
class Suffix(Placement):
  """The prompt stands behind the last token that is not padding.

  Attributes:
    before_eos: stand before the last token instead. Like the original code this does
      not look at what that token is: where an input was cut, so that its end-of-
      sequence token is gone, the prompt stands before its last word piece.
  """

  before_eos: bool = False

  @property
  def description(self) -> str:
    return 'suffix_before_eos' if self.before_eos else 'suffix'

  def __call__(self, tokens, num_virtual_tokens, vocab_size, *, length=None, fields=None):
    tokens = np.asarray(tokens, np.int32)[:length]
    at = max(len(tokens) - self.before_eos, 0)
    return _split_insert(tokens, at, num_virtual_tokens, vocab_size)


@dataclasses.dataclass(frozen=True)
class Template(Placement):
  """Virtual tokens, fields and literal words in a fixed order (Liu et al., 2021).

  Attributes:
    items: a text such as '{3} {inputs} It is {2}', or the same as a sequence, see
      `templates.py`: an int n is the next n virtual tokens, a word names a field
      ('inputs', or a raw field of the example such as 'subject'), and 'text: some words'
      are these words.
    vocabulary: tokenises the words; given by `bind` where it is left out.
  """

  items: tuple[int | str, ...] | str
  vocabulary: Vocabulary | None = dataclasses.field(
      default=None, compare=False, repr=False
  )

  def __post_init__(self):
    if not isinstance(self.items, str):
      object.__setattr__(self, 'items', tuple(self.items))
    parts = templates.parse(self.items)
    object.__setattr__(self, '_parts', parts)
    # Token ids of the words among the parts.
    anchors = [
        []
        if self.vocabulary is None or not isinstance(part, Words)
        else part.encode(self.vocabulary)
        for part in parts
    ]
    object.__setattr__(self, '_anchors', anchors)

  @property
  def fields(self) -> tuple[str, ...]:
    names = [part.name for part in self._parts if isinstance(part, Field)]
    return tuple(dict.fromkeys(names))

  @property
  def num_slots(self) -> int:
    """Virtual tokens that the template uses."""
    return sum(part.count for part in self._parts if isinstance(part, Slot))

  @property
  def num_anchor_tokens(self) -> int:
    self._check_vocabulary()
    return sum(map(len, self._anchors))

  @property
  def description(self) -> str | dict[str, Any]:
    return self.items if isinstance(self.items, str) else {'template': list(self.items)}

  def bind(self, vocabulary: Vocabulary | None) -> Template:
    return dataclasses.replace(self, vocabulary=vocabulary or self.vocabulary)

  def check(self, num_virtual_tokens: int, length: int | None = None) -> None:
    if not num_virtual_tokens and self.num_slots:
      raise ValueError(
          f'Template {self.items!r} has places for {self.num_slots} virtual tokens, but there '
          'are none to place: a prefix, or no prompt at all, has no virtual tokens. Leave '
          'PLACEMENT unset, or use a method that has some (PROMPT).'
      )
    if not self.num_slots and num_virtual_tokens:
      raise ValueError(
          f'Template {self.items!r} has no place for the {num_virtual_tokens} virtual tokens '
          f"of the prompt. Put a number in it where they belong: '{{{num_virtual_tokens}}}' in "
          f'a text, {num_virtual_tokens} in a sequence.'
      )
    if num_virtual_tokens != self.num_slots:
      raise ValueError(
          f'Template {self.items!r} has places for {self.num_slots} virtual tokens, but '
          f'the prompt has {num_virtual_tokens}. Set PROMPT_LENGTH={self.num_slots} '
          '(or @slots_of()), or change the numbers in the template.'
      )
    if length is not None and self.num_anchor_tokens >= length:
      raise ValueError(
          f'The words of template {self.items!r} are {self.num_anchor_tokens} tokens, '
          f'which leaves nothing of an input length of {length} for the example. Raise '
          "'inputs' in TASK_FEATURE_LENGTHS; virtual tokens come on top of it."
      )

  def _check_vocabulary(self) -> None:
    if self.vocabulary is None and any(isinstance(part, Words) for part in self._parts):
      raise ValueError(
          f'Template {self.items!r} holds words but has no vocabulary to tokenise them; '
          'use template.bind(backbone.vocabulary).'
      )

  def __call__(self, tokens, num_virtual_tokens, vocab_size, *, length=None, fields=None):
    self.check(num_virtual_tokens, length)
    self._check_vocabulary()
    known = {'inputs': tokens, **(fields or {})}
    placed: list[np.ndarray] = []
    budget = None if length is None else length - self.num_anchor_tokens
    used = 0
    for part, anchor in zip(self._parts, self._anchors, strict=True):
      if isinstance(part, Slot):
        placed.append(_virtual(used, part.count, vocab_size))
        used += part.count
      elif isinstance(part, Words):
        placed.append(np.asarray(anchor, np.int32))
      elif part.name in known:
        # The words of the template stay; what does not fit is cut from the end.
        of_field = np.asarray(known[part.name], np.int32)[:budget]
        budget = None if budget is None else budget - len(of_field)
        placed.append(of_field)
      else:
        raise ValueError(unknown_field(part.name, 'the example', known))
    return np.concatenate(placed).astype(np.int32)


def unknown_field(name: str, whose: str, known: Iterable[str]) -> str:
  """What to say of a field that a template names and `whose` does not have."""
  known = [other for other in known if other not in templates.ANSWERS]
  nearest = difflib.get_close_matches(name, known, n=1)
  hint = f' Did you mean {nearest[0]!r}?' if nearest else ''
  return (
      f'The template (PLACEMENT) names the field {name!r}, which {whose} does not have.{hint} '
      f'Fields: {", ".join(known) or "none"}. Words to be read stand in a text without '
      f"braces, or in a sequence as 'text: {name}'."
  )


prefix = Prefix()
after_bos = AfterBos()
suffix = Suffix()

_BY_NAME = {
    'prefix': prefix,
    'after_bos': after_bos,
    'suffix': suffix,
    'suffix_before_eos': Suffix(before_eos=True),
}


def as_placement(
    placement: Placement | str | Sequence[Any] | Mapping[str, Any],
) -> Placement:
  """Makes a placement of its name, a template (text or items), or its `description`.

  A text with braces is a template.

  Raises:
    ValueError: if there is no placement of that name, or the template makes no sense.
  """
  if isinstance(placement, Placement):
    return placement
  if isinstance(placement, Mapping) and set(placement) == {'template'}:
    return as_placement(placement['template'])
  if isinstance(placement, (list, tuple)):
    return Template(tuple(placement))
  if isinstance(placement, str) and set('{}') & set(placement):
    return Template(placement)
  if isinstance(placement, str) and placement in _BY_NAME:
    return _BY_NAME[placement]
  nearest = difflib.get_close_matches(str(placement), _BY_NAME, n=1)
  hint = f' Did you mean {nearest[0]!r}?' if nearest else ''
  raise ValueError(
      f'No placement {placement!r} of virtual tokens.{hint} There are '
      f"{', '.join(_BY_NAME)}, and templates such as '{{3}} {{inputs}} {{3}}'."
  )


def slots_of(placement: Placement | str | Sequence[Any] | Mapping[str, Any]) -> int:
  """How many virtual tokens a template has places for: its PROMPT_LENGTH.

  Raises:
    ValueError: if the placement is no template and so takes prompts of any length.
  """
  template = None if placement is None else as_placement(placement)
  if not isinstance(template, Template):
    raise ValueError(
        f'PROMPT_LENGTH is the number of slots of PLACEMENT, but PLACEMENT is {placement!r}, '
        "which has none. Set a template such as '{3} {inputs} {3}', or a number as "
        'PROMPT_LENGTH.'
    )
  return template.num_slots
