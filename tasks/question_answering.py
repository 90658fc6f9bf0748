"""SQuAD 1.1 (Rajpurkar et al., 2016), and MRQA's sets of other domains (Fisch et al., 2019).

    squad_v010_allanswers       trains on SQuAD, and validates on its development set
    mrqa_{bioasq,drop,duorc,race,relation_extraction,textbookqa}_v001
                                `validation`: MRQA's sets of domains that training lacks
    squad_to_{bioasq,…}, squad_to_mrqa
                                mixtures: train on SQuAD, evaluate there and on one of MRQA's
                                sets, or on all of them

So Lester et al. (2021, section 5) measure what a prompt is worth in another domain than its
own. The names are those of their code, without its ending `_examples`, which says that texts
are written for TensorBoard too. Texts and targets are T5's, which writes no word for the task
before them: the `taskless_` twins that all of these have are the same. Scores are exact match
and F1, the best over the right answers.

SQuAD's official files are read from `squad/{train,dev}-v1.1.json` below $PTJ_LOCAL_DATA, or
the data set from TensorFlow Datasets. MRQA's, which are not there, are
`mrqa/{BioASQ,DROP,DuoRC.ParaphraseRC,RACE,RelationExtraction,TextbookQA}.jsonl.gz`, plain or
gzipped. Every question of a passage counts, as in MRQA's own evaluation; the code of Lester et
al. takes the first of each passage alone.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import seqio
from prompt_tuning_jax.tasks import preprocessors, sources
from prompt_tuning_jax.tasks.registration import add_tasks
from prompt_tuning_jax.tasks.sources import text_field

from prompt_tuning_jax.data import gzipped
from prompt_tuning_jax.evaluation import metrics, postprocessors

# Name in the names of tasks → name of the file.
MRQA = {
    'bioasq': 'BioASQ',
    'drop': 'DROP',
    'duorc': 'DuoRC.ParaphraseRC',
    'race': 'RACE',
    'relation_extraction': 'RelationExtraction',
    'textbookqa': 'TextbookQA',
}


@dataclasses.dataclass(frozen=True)
class SquadJson:
  """SQuAD's official files: articles with paragraphs, which have questions.

  Attributes:
    files: split → name of its file in `squad/`.
    is_complete: False: TFDS's rows also say where answers stand, so that `prepare` cannot
      make them of these.
  """

  files: Mapping[str, str]
  is_complete: bool = False

  @property
  def splits(self) -> Sequence[str]:
    return tuple(self.files)

  def names(self, split: str) -> Sequence[Sequence[str]]:
    return [[os.path.join('squad', self.files[split])]]

  def read(self, paths: Sequence[str], split: str) -> dict[str, list[Any]]:
    """Reads the columns of TFDS, `answers/text` among them, without the answers' places.

    Raises:
      ValueError: if the file is damaged or not what is expected, holds no question or one
        twice; it is named.
    """
    (path,) = paths
    rows: list[dict[str, Any]] = []
    try:
      with gzipped.open_bytes(path) as file:
        articles = json.loads(file.read().decode())['data']
      for article in articles:
        for paragraph in article['paragraphs']:
          for question in paragraph['qas']:
            rows.append(_squad_row(article, paragraph, question))
    except (ValueError, TypeError, KeyError, RecursionError, *gzipped.DAMAGED) as error:
      reason = f'no field {error}' if isinstance(error, KeyError) else error
      after = f' (after the question {rows[-1]["id"]})' if rows else ''
      raise ValueError(
          f'{path}: {reason}{after}. Expected the JSON of SQuAD 1.1: data, a list of articles '
          'with paragraphs (context and qas: id, question, answers with text).'
      ) from error
    if len({row['id'] for row in rows}) != len(rows) or not rows:
      raise ValueError(
          f'{path}, the file of the split {split!r}, holds {len(rows):,} questions, of which '
          f'{len({row["id"] for row in rows}):,} have an id of their own. Copy the official '
          'file there again.'
      )
    return {name: [row[name] for row in rows] for name in rows[0]}


def _squad_row(
    article: Mapping[str, Any], paragraph: Mapping[str, Any], question: Mapping[str, Any]
) -> dict[str, Any]:
  answers = [text_field(answer, 'text') for answer in question['answers']]
  if not answers:
    raise ValueError(f'the question {question["id"]} has no answer')
  return {
      'id': text_field(question, 'id'),
      'title': article.get('title', ''),
      'context': text_field(paragraph, 'context'),
      'question': text_field(question, 'question'),
      'answers/text': answers,
  }


def _mrqa_rows(row: Mapping[str, Any], number: int) -> list[dict[str, Any]]:
  """A passage with its questions → an example for each; the header has none.

  `answer` is the first that MRQA has found in the passage, `answers/text` are those that
  count.
  """
  if number == 1 and 'header' in row:
    return []
  context = _spaced(text_field(row, 'context'))
  return [_mrqa_row(context, question) for question in row['qas']]


def _mrqa_row(context: str, question: Mapping[str, Any]) -> dict[str, Any]:
  answers = [_spaced(answer) for answer in question['answers']]
  if not answers or not all(answers):
    raise ValueError(f'the question {question["qid"]} has no answer, or an empty one')
  found = [text_field(answer, 'text') for answer in question.get('detected_answers', ())]
  return {
      'id': text_field(question, 'qid'),
      'context': context,
      'question': _spaced(text_field(question, 'question')),
      'answer': _spaced((found or answers)[0]),
      'answers/text': answers,
  }


def _spaced(text: str) -> str:
  """The text with a single space where it has line breaks, tabs or several spaces."""
  return re.sub(r'\s+', ' ', text)


def _add(name: str, source: seqio.DataSource) -> None:
  add_tasks(
      name,
      source=source,
      task_word=None,
      to_text=[preprocessors.question_to_text],
      postprocess_fn=postprocessors.qa,
      metric_fns=[metrics.squad],
  )


_add(
    'squad_v010_allanswers',
    sources.LocalOrTfds(
        'squad/v1.1:3.0.0',
        SquadJson({'train': 'train-v1.1.json', 'validation': 'dev-v1.1.json'}),
    ),
)

for _name, _file in MRQA.items():
  _add(
      f'mrqa_{_name}_v001',
      sources.LocalFiles(
          sources.Jsonl(
              'mrqa',
              {'validation': f'{_file}.jsonl'},
              'context and qas (qid, question, answers, detected_answers with text) below a '
              'first line with header',
              _mrqa_rows,
          ),
          'The files are those that download_out_of_domain_dev.sh of '
          'https://github.com/mrqa/MRQA-Shared-Task-2019 fetches; TensorFlow Datasets does '
          'not hold them.',
      ),
  )

for _prefix in ('', 'taskless_'):
  for _mixture, _members in {**{name: [name] for name in MRQA}, 'mrqa': list(MRQA)}.items():
    seqio.MixtureRegistry.add(
        f'{_prefix}squad_to_{_mixture}',
        [
            f'{_prefix}squad_v010_allanswers',
            *(f'{_prefix}mrqa_{_name}_v001' for _name in _members),
        ],
        default_rate=1.0,
    )
