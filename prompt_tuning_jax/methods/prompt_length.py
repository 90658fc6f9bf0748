"""How long a prompt may be; one answer for all methods with a PROMPT_LENGTH."""

from __future__ import annotations

import numbers


def check(length: object, method: str) -> None:
  """Raises ValueError unless a prompt can have that many virtual tokens."""
  if not (isinstance(length, numbers.Integral) and length >= 1):
    raise ValueError(
        f'PROMPT_LENGTH is {length!r} ({method}.length); a prompt has a whole '
        'number of virtual tokens, at least 1. Set PROMPT_LENGTH = 20 for example; for '
        'the model without a prompt set PROMPT = None.'
    )
