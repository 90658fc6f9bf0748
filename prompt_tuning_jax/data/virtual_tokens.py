"""Where the prompt stands: placements put virtual tokens among an example's tokens.

A virtual token is an id at or beyond the vocabulary: V + i stands for position i of
the soft prompt, and the model looks it up there instead of in its embedding table.
A placement is a function from an example's token ids to token ids with the virtual
ones inserted; padding comes afterwards, so that a suffix stands next to the text.

    Prefix()                       [prompt; input], Lester et al. (2021)
    AfterBos()                     the prompt behind the first token
    Suffix(before_eos=False)       the prompt behind the input, or before its last token
    Template((3, 'inputs', 'text: It is', 2))     Liu et al. (2021)

Tokens are cut to `length` first and the virtual tokens added then, as in the
original code: 512 input tokens and a prompt of 100 make rows of 612.
"""

from __future__ import annotations

import abc
import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from prompt_tuning_jax.data.vocabulary import Vocabulary

_TEXT = 'text:'


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
    items: from left to right: an int n is the next n virtual tokens, a word names a
      field ('inputs', or a raw field of the example such as 'subject'), and
      'text: some words' are these words.
    vocabulary: tokenises the words; given by `bind` where it is left out.
  """

  items: tuple[int | str, ...]
  vocabulary: Vocabulary | None = dataclasses.field(
      default=None, compare=False, repr=False
  )

  def __post_init__(self):
    object.__setattr__(self, 'items', tuple(self.items))
    for item in self.items:
      if isinstance(item, bool) or not isinstance(item, (int, str)):
        raise ValueError(
            f'Template item {item!r} is neither a number of virtual tokens, the name of '
            "a field, nor 'text: …'."
        )
      if isinstance(item, int) and item < 1:
        raise ValueError(f'Template item {item}: a slot has at least one virtual token.')
    if not self.fields:
      raise ValueError(
          f'Template {self.items} names no field, so that every example would look the '
          "same. Put 'inputs' where the text belongs."
      )
    anchors = {
        item: None
        if self.vocabulary is None
        else self.vocabulary.encode(item.removeprefix(_TEXT).strip())
        for item in self.items
        if isinstance(item, str) and item.startswith(_TEXT)
    }
    object.__setattr__(self, '_anchors', anchors)

  @property
  def fields(self) -> tuple[str, ...]:
    names = [item for item in self.items if isinstance(item, str)]
    return tuple(dict.fromkeys(n for n in names if not n.startswith(_TEXT)))

  @property
  def num_slots(self) -> int:
    """Virtual tokens that the template uses."""
    return sum(item for item in self.items if isinstance(item, int))

  @property
  def num_anchor_tokens(self) -> int:
    return sum(len(self._anchor(item)) for item in self.items if item in self._anchors)

  @property
  def description(self) -> dict[str, Any]:
    return {'template': list(self.items)}

  def bind(self, vocabulary: Vocabulary | None) -> Template:
    return dataclasses.replace(self, vocabulary=vocabulary or self.vocabulary)

  def check(self, num_virtual_tokens: int, length: int | None = None) -> None:
    if num_virtual_tokens != self.num_slots:
      raise ValueError(
          f'Template {self.items} has places for {self.num_slots} virtual tokens, but '
          f'the prompt has {num_virtual_tokens}. Set PROMPT_LENGTH={self.num_slots} or '
          'change the numbers in the template.'
      )
    if length is not None and self.num_anchor_tokens >= length:
      raise ValueError(
          f'The words of template {self.items} are {self.num_anchor_tokens} tokens, '
          f'which leaves nothing of an input length of {length} for the example. Raise '
          "'inputs' in TASK_FEATURE_LENGTHS."
      )

  def _anchor(self, item: str) -> Sequence[int]:
    tokens = self._anchors[item]
    if tokens is None:
      raise ValueError(
          f'Template {self.items} holds words ({item!r}) but has no vocabulary to '
          'tokenise them; use template.bind(backbone.vocabulary).'
      )
    return tokens

  def __call__(self, tokens, num_virtual_tokens, vocab_size, *, length=None, fields=None):
    self.check(num_virtual_tokens, length)
    known = {'inputs': tokens, **(fields or {})}
    parts: list[np.ndarray] = []
    budget = None if length is None else length - self.num_anchor_tokens
    used = 0
    for item in self.items:
      if isinstance(item, int):
        parts.append(_virtual(used, item, vocab_size))
        used += item
      elif item in self._anchors:
        parts.append(np.asarray(self._anchor(item), np.int32))
      elif item in known:
        # The words of the template stay; what does not fit is cut from the end.
        part = np.asarray(known[item], np.int32)[:budget]
        budget = None if budget is None else budget - len(part)
        parts.append(part)
      else:
        raise ValueError(_unknown_field(item, known))
    return np.concatenate(parts).astype(np.int32)


def _unknown_field(name: str, known: Mapping[str, Any]) -> str:
  nearest = difflib.get_close_matches(name, known, n=1)
  hint = f' Did you mean {nearest[0]!r}?' if nearest else ''
  return (
      f'The template names the field {name!r}, which the example does not have.{hint} '
      f"Fields: {', '.join(known)}. Words to appear as they are read 'text: {name}'."
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
  """Makes a placement of its name, the items of a template, or its `description`.

  Raises:
    ValueError: if there is no placement of that name.
  """
  if isinstance(placement, Placement):
    return placement
  if isinstance(placement, Mapping) and set(placement) == {'template'}:
    return Template(tuple(placement['template']))
  if isinstance(placement, (list, tuple)):
    return Template(tuple(placement))
  if placement in _BY_NAME:
    return _BY_NAME[placement]
  nearest = difflib.get_close_matches(str(placement), _BY_NAME, n=1)
  hint = f' Did you mean {nearest[0]!r}?' if nearest else ''
  raise ValueError(
      f'No placement {placement!r} of virtual tokens.{hint} There are '
      f"{', '.join(_BY_NAME)}, and templates such as (3, 'inputs', 3)."
  )
