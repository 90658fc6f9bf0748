"""Reading local text into ragged token arrays, bad lines counted, never silent."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from prompt_tuning_jax.data import field_texts, gzipped
from prompt_tuning_jax.data.vocabulary import Vocabulary

# Lines tokenised at a time: Python's lists of ids are ten times what they become.
_LINES_AT_A_TIME = 8192

# How many bad lines a warning names.
_NAMED_LINES = 5


class RaggedTokens:
  """Rows of token ids of different lengths, gathered as one flat int32 array."""

  def __init__(self):
    self._rows: list[np.ndarray] = []

  def append(self, tokens: Sequence[int] | np.ndarray) -> None:
    """Adds a row."""
    self._rows.append(np.asarray(tokens, np.int32).reshape(-1))

  @property
  def last(self) -> np.ndarray:
    """The row added last."""
    return self._rows[-1]

  def __len__(self) -> int:
    return len(self._rows)

  def arrays(self, name: str) -> dict[str, np.ndarray]:
    """`<name>/tokens` and `<name>/offsets` (one more than there are rows)."""
    lengths = [len(row) for row in self._rows]
    flat = np.concatenate(self._rows) if self._rows else np.zeros(0, np.int32)
    return {f'{name}/tokens': flat, f'{name}/offsets': _offsets(lengths)}


class RaggedBytes:
  """Byte strings gathered as one flat uint8 array."""

  def __init__(self):
    self._rows: list[bytes] = []

  def append(self, row: bytes) -> None:
    """Adds a row."""
    self._rows.append(row)

  def values(self) -> np.ndarray:
    """All bytes, [n] uint8."""
    return np.frombuffer(b''.join(self._rows), np.uint8)

  def offsets(self) -> np.ndarray:
    """Where the rows start, and the end: [rows + 1] int64."""
    return _offsets([len(row) for row in self._rows])


def _offsets(lengths: Sequence[int]) -> np.ndarray:
  return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)


@dataclasses.dataclass(frozen=True)
class Form:
  """How a line of a file becomes an example.

  Attributes:
    name: short name, part of the cache's file name.
    features: the token features of an example.
    parse: a line without its end → one text for each feature; raises ValueError with
      the reason where the line cannot be used.
  """

  name: str
  features: tuple[str, ...]
  parse: Callable[[str], tuple[str, ...]]


def _parse_text(line: str) -> tuple[str]:
  if not line.strip():
    raise ValueError('empty')
  return (line.strip(),)


def _parse_pair(line: str) -> tuple[str, str]:
  if not line.strip():
    raise ValueError('empty')
  try:
    row = json.loads(line)
  except (ValueError, RecursionError):
    raise ValueError('not JSON') from None
  if not isinstance(row, dict):
    raise ValueError('not a JSON object')
  for name in ('inputs', 'targets'):
    if name not in row:
      raise ValueError(f'no {name!r}')
    if not isinstance(row[name], str):
      raise ValueError(f'{name!r} is not a text')
    if not row[name].strip():
      raise ValueError(f'{name!r} is empty')
    field_texts.whole_text(row[name], name)
  return row['inputs'], row['targets']


TEXT = Form('text', ('targets',), _parse_text)
PAIRS = Form('jsonl', ('inputs', 'targets'), _parse_pair)


def tokenize(
    paths: Sequence[str], vocabulary: Vocabulary, form: Form
) -> tuple[dict[str, np.ndarray], int, dict[str, Any]]:
  """Tokenises every line of text files; each text ends in end-of-sequence.

  Returns:
    The ragged arrays, the number of examples, and what was skipped:
    `{'lines': all, 'count': skipped, 'first': ['file, line 3: not JSON', …]}`.

  Raises:
    ValueError: if a file is damaged, or not one line can be used; the reasons are named.
  """
  tokens = {feature: RaggedTokens() for feature in form.features}
  rows = RaggedBytes()
  skipped: dict[str, Any] = {'lines': 0, 'count': 0, 'first': []}
  texts = _texts(paths, form, skipped)
  while chunk := list(itertools.islice(texts, _LINES_AT_A_TIME)):
    for feature, column in zip(form.features, zip(*chunk, strict=True), strict=True):
      for ids in vocabulary.encode_many(column):
        tokens[feature].append(ids + [vocabulary.eos_id])
    if form is PAIRS:
      for inputs, targets in chunk:
        raw = {'inputs_pretokenized': inputs, 'targets_pretokenized': targets}
        rows.append(json.dumps([raw, targets], ensure_ascii=False).encode())
  num_examples = len(tokens['targets'])
  if not num_examples:
    reasons = '; '.join(skipped['first']) or 'it has no lines'
    raise ValueError(
        f'{", ".join(paths)}: no line can be used as {" and ".join(form.features)} '
        f'({reasons}).'
    )
  arrays: dict[str, np.ndarray] = {}
  for feature, ragged in tokens.items():
    arrays |= ragged.arrays(feature)
  if form is PAIRS:
    arrays |= {'rows/json': rows.values(), 'rows/offsets': rows.offsets()}
  return arrays, num_examples, skipped


def _texts(
    paths: Sequence[str], form: Form, skipped: dict[str, Any]
) -> Iterator[tuple[str, ...]]:
  for path in paths:
    try:
      with gzipped.open_bytes(path) as file:
        for number, line in enumerate(file, start=1):
          skipped['lines'] += 1
          try:
            # A UnicodeDecodeError is a ValueError too. Some editors mark a file's beginning.
            text = line.decode('utf-8-sig' if number == 1 else 'utf-8')
            parsed = form.parse(text.rstrip('\r\n'))
          except ValueError as error:
            reason = 'not UTF-8' if isinstance(error, UnicodeDecodeError) else error
            skipped['count'] += 1
            if len(skipped['first']) < _NAMED_LINES:
              skipped['first'].append(f'{path}, line {number}: {reason}')
            continue
          yield parsed
    except gzipped.DAMAGED as error:
      raise ValueError(f'{path} is truncated or damaged: {error}.') from error
