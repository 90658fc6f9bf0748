"""SentencePiece vocabularies as T5 uses them, without seqio or TensorFlow.

T5 appends `extra_ids` sentinels behind the pieces: `<extra_id_0>` has the
highest id and they count down from there (Raffel et al., 2020, section 3.1.4). Some
files, such as mT5's, hold the sentinels as pieces already; nothing is appended to those.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Sequence

import sentencepiece

# Where T5 1.0's is, which T5 1.1, LM-adapted or not, and Flan-T5 have as well.
T5_VOCABULARY = 'gs://t5-data/vocabs/cc_all.32000.100extra/sentencepiece.model'

_SENTINEL = re.compile(r'<extra_id_(\d+)>')
# A character for private use, which no vocabulary has and no piece contains.
_UNKNOWN = '\ue000'


class Vocabulary:
  """A SentencePiece model plus T5's sentinels.

  Ids agree with `seqio.SentencePieceVocabulary(path, extra_ids)`.

  Attributes:
    path: the SentencePiece model file.
    extra_ids: how many sentinels stand behind the pieces; 0 where they are pieces.
    pad_id: 0, eos_id: 1, unk_id: 2, as in every T5 vocabulary.
  """

  pad_id = 0
  eos_id = 1
  unk_id = 2

  def __init__(self, path: str | os.PathLike[str], extra_ids: int = 100):
    """Loads the model file.

    Raises:
      FileNotFoundError: if there is no file at `path`.
      ValueError: if the file is not a SentencePiece model with T5's special ids.
    """
    self.path = os.fspath(path)
    self.extra_ids = extra_ids
    if not os.path.isfile(self.path):
      raise FileNotFoundError(
          f'No SentencePiece model at {self.path}. Every T5 checkpoint needs the vocabulary it '
          f'was trained with (T5 1.1: a copy of {T5_VOCABULARY}); name its file as `vocabulary`.'
      )
    try:
      self._processor = sentencepiece.SentencePieceProcessor(model_file=self.path)
    except (RuntimeError, OSError) as error:
      raise ValueError(f'{self.path} is not a SentencePiece model: {error}') from error
    found = (
        self._processor.pad_id(),
        self._processor.eos_id(),
        self._processor.unk_id(),
    )
    if found != (self.pad_id, self.eos_id, self.unk_id):
      raise ValueError(
          f'{self.path} has (pad, eos, unk) = {found}, but T5 needs (0, 1, 2). Train it '
          'with pad_id=0, eos_id=1, unk_id=2, bos_id=-1.'
      )
    self._own_sentinels = self._find_own_sentinels()
    if self._own_sentinels:
      self.extra_ids = 0

  def _find_own_sentinels(self) -> list[int]:
    """Ids of the sentinels among the pieces, `<extra_id_0>` first; they are the last."""
    found: dict[int, int] = {}
    for token in range(self.num_pieces - 1, -1, -1):
      match = _SENTINEL.fullmatch(self._processor.id_to_piece(token).lstrip('▁'))
      if match is None:
        break
      found[int(match.group(1))] = token
    return [found[number] for number in sorted(found)]

  def __repr__(self) -> str:
    return f'Vocabulary({self.path!r}, {self.num_pieces:,} pieces + {self.extra_ids} sentinels)'

  @property
  def num_pieces(self) -> int:
    """Pieces of the SentencePiece model, sentinels not counted."""
    return self._processor.get_piece_size()

  @property
  def size(self) -> int:
    """Pieces and sentinels: every id is below this."""
    return self.num_pieces + self.extra_ids

  @property
  def sentinel_ids(self) -> list[int]:
    """Ids of `<extra_id_0>`, `<extra_id_1>`, …: the highest first."""
    return self._own_sentinels or list(range(self.size - 1, self.num_pieces - 1, -1))

  @functools.cached_property
  def fingerprint(self) -> str:
    """sha256 of the model file and the number of sentinels, in hexadecimal."""
    digest = hashlib.sha256()
    with open(self.path, 'rb') as file:
      digest.update(file.read())
    digest.update(f'extra_ids={self.extra_ids}'.encode())
    return digest.hexdigest()

  def encode(self, text: str, *, goes_on: bool = False) -> list[int]:
    """Token ids of `text`, without an end-of-sequence token.

    `<extra_id_n>` in the text becomes the sentinel's id, and what follows without a space is
    part of the same word, as for seqio. One that touches the word before it is a sentinel too;
    seqio reads that one letter by letter.

    Args:
      text: the text.
      goes_on: whether other text stands right before it: what it begins with is then part
        of the last word there ('.', not '▁.'), unless that is a space.
    """
    ids: list[int] = []
    start = 0
    sentinels = self.sentinel_ids
    for match in _SENTINEL.finditer(text):
      number = int(match.group(1))
      if number >= len(sentinels):
        continue
      ids += self._encode_pieces(text[start : match.start()], goes_on or bool(ids))
      ids.append(sentinels[number])
      start = match.end()
    return ids + self._encode_pieces(text[start:], goes_on or bool(ids))

  def _encode_pieces(self, text: str, goes_on: bool) -> list[int]:
    if goes_on:
      before = self._processor.encode(_UNKNOWN, out_type=str)
      pieces = self._processor.encode(_UNKNOWN + text, out_type=str)
      # Several unknown characters become one piece; then there is nothing to cut off.
      if pieces[: len(before)] == before:
        return [self._processor.piece_to_id(piece) for piece in pieces[len(before) :]]
    return self._processor.encode(text)

  def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
    """`encode` of each text, on several threads."""
    if any('<extra_id_' in text for text in texts):
      return [self.encode(text) for text in texts]
    return self._processor.encode(list(texts))

  def decode(self, ids: Sequence[int]) -> str:
    """Text of `ids`, up to the first end-of-sequence token.

    Padding is dropped; sentinels read `<extra_id_n>`; ids beyond the vocabulary
    (an embedding table has more rows than there are pieces) read as unknown.
    """
    text: list[str] = []
    run: list[int] = []
    for token in ids:
      token = int(token)
      if token == self.eos_id:
        break
      if self.num_pieces <= token < self.size:
        text.append(self._processor.decode(run))
        text.append(f'<extra_id_{self.size - 1 - token}>')
        run = []
      elif token != self.pad_id:
        run.append(token if token < self.num_pieces else self.unk_id)
    text.append(self._processor.decode(run))
    return ' '.join(part for part in text if part)

  def piece(self, token: int) -> str:
    """The piece of one id as written in the vocabulary ('▁animal')."""
    if self.num_pieces <= token < self.size:
      return f'<extra_id_{self.size - 1 - token}>'
    if token >= self.size:
      return f'<unused_{token}>'
    return self._processor.id_to_piece(int(token))
