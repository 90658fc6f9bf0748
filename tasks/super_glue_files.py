"""The official files of MultiRC, ReCoRD, WSC and DPR, whose rows are not those of TFDS.

Each function makes the rows of TFDS, version 1.0.2, of a line; see `sources.Jsonl.parse`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from prompt_tuning_jax.tasks import sources
from prompt_tuning_jax.tasks.sources import text_field, whole_number

from prompt_tuning_jax.data.bad_lines import BadLines, decode_lines

MULTIRC = 'idx and passage (text, questions with idx, question, answers with idx, text, label)'
RECORD = 'idx, passage (text, entities with start, end) and qas (idx, query, answers with text)'
WSC = 'idx, text, target (span1_index, span1_text, span2_index, span2_text) and label'

_Row = Mapping[str, Any]


def multirc(row: _Row, number: int) -> list[dict[str, Any]]:
  """A passage with its questions → an example for each answer to judge."""
  del number
  paragraph = text_field(row['passage'], 'text')
  return [
      {
          'paragraph': paragraph,
          'question': text_field(question, 'question'),
          'answer': text_field(answer, 'text'),
          'label': sources.label_number(answer.get('label', -1)),
          'idx/paragraph': whole_number(row, 'idx'),
          'idx/question': whole_number(question, 'idx'),
          'idx/answer': whole_number(answer, 'idx'),
      }
      for question in row['passage']['questions']
      for answer in question['answers']
  ]


def record(row: _Row, number: int) -> list[dict[str, Any]]:
  """A passage with its questions → an example for each question.

  Entities and answers are sorted, each once, wherever they stand in the passage.
  """
  del number
  passage = text_field(row['passage'], 'text')
  entities = {_span(passage, entity) for entity in row['passage']['entities']}
  return [
      {
          'passage': passage,
          'query': text_field(question, 'query'),
          'entities': sorted(entities),
          'answers': sorted({text_field(a, 'text') for a in question.get('answers', ())}),
          'idx/passage': whole_number(row, 'idx'),
          'idx/query': whole_number(question, 'idx'),
      }
      for question in row['qas']
  ]


def _span(text: str, span: _Row) -> str:
  start, end = whole_number(span, 'start'), whole_number(span, 'end')
  if not 0 <= start <= end < len(text):
    raise ValueError(f'the entity {start} to {end} is not in the text of {len(text)} characters')
  return text[start : end + 1]


def wsc(row: _Row, number: int, repair: bool = True) -> list[dict[str, Any]]:
  """A text with a pronoun (span 2) and whom it may refer to (span 1), as in `wsc.fixed`.

  Spans that differ from the text by case, a full stop or a line break are repaired, unless
  `repair` is false: so they are in `wsc`.
  """
  text, target = text_field(row, 'text'), row['target']
  spans = {}
  for name in ('span1', 'span2'):
    index, span = whole_number(target, f'{name}_index'), text_field(target, f'{name}_text')
    if not 0 <= index < len(text.split()):
      raise ValueError(f'{name}_index is {index}, but the text has {len(text.split())} words')
    spans |= _repaired(name, text, index, span) if repair else {f'{name}_text': span}
  return [{
      'text': text,
      'span1_index': whole_number(target, 'span1_index'),
      'span2_index': whole_number(target, 'span2_index'),
      **spans,
      'label': sources.label_number(row.get('label', -1)),
      'idx': sources.index_of(row, number),
  }]


def _repaired(name: str, text: str, index: int, span: str) -> dict[str, Any]:
  """The span's text as the text has it, and its index where that is wrong."""
  # The words of these subjects have others between them.
  if span in text or span in ('Kamenev and Zinoviev', 'Kamenev, Zinoviev, and Stalin'):
    return {f'{name}_text': span}
  first = text.split()[index][0]
  repaired = (span[:1].lower() if first.islower() else span[:1].upper()) + span[1:]
  repaired = repaired.rstrip('.').replace('\n', ' ')
  if repaired not in text:
    raise ValueError(f'{name}_text {span!r} is not in the text')
  return {f'{name}_text': repaired} | ({'span2_index': 10} if 'theyscold' in span else {})


@dataclasses.dataclass(frozen=True)
class Dpr:
  """Definite pronoun resolution (Rahman & Ng, 2012): five lines an example, the last empty.

  They hold a sentence, a pronoun of it, two candidates with a comma between them, and the
  right one.
  """

  @property
  def splits(self) -> Sequence[str]:
    return ('train', 'test')

  def names(self, split: str) -> Sequence[Sequence[str]]:
    return [[os.path.join('dpr', f'{split}.c.txt')]]

  def read(self, paths: Sequence[str], split: str) -> dict[str, list[Any]]:
    """Reads the columns `sentence`, `pronoun`, `candidates` and `label`.

    Raises:
      ValueError: if a line is not what is expected, or there is none; the file is named.
    """
    (path,) = paths
    expected = (
        'Expected five lines an example: sentence, pronoun, two candidates with a comma '
        'between them, the right one, and an empty line.'
    )
    text = decode_lines(path, sources.read_bytes(path, expected), expected)
    # The file may end in any number of empty lines.
    lines = [line.strip() for line in text.rstrip().splitlines()]
    bad, examples = BadLines(path, expected, 'example'), []
    for start in range(0, len(lines), 5):
      try:
        examples.append(self._example(lines[start : start + 5]))
      except ValueError as error:
        bad.add(start + 1, error)
    bad.check(len(range(0, len(lines), 5)))
    if not examples:
      raise ValueError(f'{path}, the file of the split {split!r}, holds no example.')
    return {name: [example[name] for example in examples] for name in examples[0]}

  def _example(self, lines: Sequence[str]) -> dict[str, Any]:
    sentence, pronoun, candidates, right, empty = (*lines, '', '', '', '')[:5]
    if not sentence or empty:
      raise ValueError('a sentence is not where one has to start')
    names = [candidate.strip() for candidate in candidates.split(',')]
    if len(names) != 2:
      raise ValueError(f'{candidates!r} are not two candidates')
    if right not in names:
      raise ValueError(f'the right one, {right!r}, is neither of {candidates!r}')
    return {
        'sentence': sentence,
        'pronoun': pronoun,
        'candidates': names,
        'label': names.index(right),
    }
