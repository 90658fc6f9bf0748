"""ByT5's vocabulary: a token is a byte of the text's UTF-8."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Sequence

from prompt_tuning_jax.data.vocabulary import Vocabulary

NAME = 'bytes'

_BYTES = 256
_OFFSET = 3  # pad, eos and unk come first.
# ByT5 takes the last byte values, which no UTF-8 text has, for its span corruption.
_NUM_SENTINELS = 100


class ByteVocabulary(Vocabulary):
  """Bytes of UTF-8 behind the three special ids, as ByT5 was trained with.

  Ids agree with `seqio.ByteVocabulary(extra_ids)`. The model's embedding has 384 rows, of
  which 259 are used. `<extra_id_0>` is the highest id, 258, as in ByT5's pretraining (Xue
  et al., 2022, section 3.1); Hugging Face's tokeniser numbers its sentinels otherwise.

  Attributes:
    path: the name 'bytes'; there is no file.
  """

  def __init__(self, extra_ids: int = 0):
    """Needs no file; `extra_ids` are added behind the bytes."""
    self.path = NAME
    self.extra_ids = extra_ids

  def __repr__(self) -> str:
    return f'ByteVocabulary({self.extra_ids})'

  @property
  def num_pieces(self) -> int:
    """Special ids and bytes."""
    return _OFFSET + _BYTES

  @property
  def sentinel_ids(self) -> list[int]:
    """Ids of `<extra_id_0>`, `<extra_id_1>`, …: the highest first."""
    return list(range(self.size - 1, self.size - 1 - max(self.extra_ids, _NUM_SENTINELS), -1))

  @functools.cached_property
  def fingerprint(self) -> str:
    """sha256 of what the ids stand for, in hexadecimal."""
    return hashlib.sha256(f'{NAME}, extra_ids={self.extra_ids}'.encode()).hexdigest()

  def encode(self, text: str, *, goes_on: bool = False) -> list[int]:
    """Ids of the text's bytes, without an end-of-sequence token; sentinels as ids."""
    del goes_on  # Bytes are the same wherever they stand.
    ids: list[int] = []
    start = 0
    for match in re.finditer(r'<extra_id_(\d+)>', text):
      number = int(match.group(1))
      if number < len(self.sentinel_ids):
        ids += self._bytes(text[start : match.start()])
        ids.append(self.sentinel_ids[number])
        start = match.end()
    return ids + self._bytes(text[start:])

  def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
    """`encode` of each text."""
    return [self.encode(text) for text in texts]

  def decode(self, ids: Sequence[int]) -> str:
    """Text of `ids`, up to the first end-of-sequence token; what is no UTF-8 is left out."""
    held = bytearray()
    for token in map(int, ids):
      if token == self.eos_id:
        break
      if _OFFSET <= token < _OFFSET + _BYTES:
        held.append(token - _OFFSET)
    return held.decode('utf-8', errors='ignore')

  def piece(self, token: int) -> str:
    """One id for people to read: 'a', or '<0xE2>' where a byte alone is no character."""
    if token < _OFFSET:
      return ('<pad>', '</s>', '<unk>')[token]
    if token >= self.num_pieces:
      return f'<unused_{token}>' if token >= self.size else f'<extra_{token}>'
    byte = token - _OFFSET
    return chr(byte) if 32 <= byte < 127 else f'<0x{byte:02X}>'

  def _bytes(self, text: str) -> list[int]:
    return [byte + _OFFSET for byte in text.encode()]
