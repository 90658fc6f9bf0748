"""Choices by hash: the same on any machine and any Python, for ever."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import TypeVar

_Item = TypeVar('_Item')


class Draw:
  """A stream of random choices that follows from its name."""

  def __init__(self, name: str, seed: str = 'prompt-tuning-jax'):
    self.name = name
    self._seed = seed
    self._count = 0

  def number(self) -> int:
    """The next number of 64 bits."""
    self._count += 1
    digest = hashlib.sha256(f'{self._seed}\n{self.name}\n{self._count}'.encode())
    return int.from_bytes(digest.digest()[:8], 'big')

  def between(self, first: int, last: int) -> int:
    """A number from `first` to `last`, both included."""
    return first + self.number() % (last - first + 1)

  def one_of(self, items: Sequence[_Item]) -> _Item:
    """One of the items."""
    return items[self.number() % len(items)]

  def shuffled(self, items: Iterable[str]) -> list[str]:
    """The items in an order of their own."""
    return sorted(items, key=lambda item: Draw(f'{self.name}\n{item}', self._seed).number())
