"""Table-to-text: the E2E challenge (Novikova et al., 2017), prefix tuning's first task.

`e2e_nlg` reads the official files trainset.csv, devset.csv and testset_w_refs.csv, plain or
gzipped, from the folder `e2e/` below $PTJ_LOCAL_DATA. TensorFlow Datasets holds only the
cleaned set of Dušek et al. (2019), with other tables and other references, so nothing is
looked for there.

`e2e_nlg_from_dev` needs the development and the test file alone, 0.2 MB, where the large
training file is not at hand: a small split that stands on its own, not comparable with
published scores. It trains on nine tenths of the development set's tables and validates on
the rest; its test split is the official one.

Inputs are tables as Li & Liang (2021) write them, targets the sentences as people wrote them
(their files hold them tokenised: `family - friendly`). Training sees a table once for every
reference; validation and test hold each table once, with all of its references for the
metrics: BLEU, which the challenge measures without case, and ROUGE-L, here by rouge-score
(the challenge's own script weighs recall and precision otherwise).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import seqio
from prompt_tuning_jax.tasks import preprocessors, sources

from prompt_tuning_jax.evaluation import metrics, postprocessors

# Li & Liang rename these attributes; the others keep their names.
_RENAMED = {'eatType': 'Type', 'familyFriendly': 'family friendly', 'priceRange': 'price'}

_ITEM = r'([^][,]+)\[([^][]+)\]'
_TABLE = re.compile(rf'{_ITEM}(?:, {_ITEM})*')

# Of ten tables of a development set one is for validation.
_VALIDATION_ONE_IN = 10


def part_of(content: str) -> str:
  """'train' or 'validation', for tables of a development set that serves as both."""
  number = int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], 'big')
  return 'train' if number % _VALIDATION_ONE_IN else 'validation'


def columns_of(
    references: Mapping[Any, Sequence[str]], split: str, to_text: Callable[[Any], str]
) -> dict[str, list[Any]]:
  """The columns `inputs`, `targets`, `references` and `idx` of a split.

  The training split holds an input once for every reference, any other once with all of
  them; `targets` is the first of the `references`.

  Args:
    references: table → the texts that say what is in it.
    split: name of the split.
    to_text: writes a table as text.
  """
  examples = [
      (to_text(table), texts)
      for table, all_texts in references.items()
      for texts in ([[text] for text in all_texts] if split == 'train' else [all_texts])
  ]
  return {
      'inputs': [text for text, _ in examples],
      'targets': [texts[0] for _, texts in examples],
      'references': [list(texts) for _, texts in examples],
      'idx': list(range(len(examples))),
  }


def require_examples(references: Mapping[Any, Sequence[str]], path: str, split: str) -> None:
  """Raises ValueError if a file holds no table of a split."""
  if not references:
    raise ValueError(
        f'{path} holds no example of the split {split!r}. Copy the official file there '
        'again, or use another split.'
    )


def add_task(
    name: str,
    files: sources.Files,
    origin: str,
    metric_fns: Sequence[Callable[..., Any]] = (),
) -> None:
  """Registers a task of `inputs`, `targets` and `references`.

  Args:
    name: name of the task.
    files: the files, read as `columns_of` makes columns.
    origin: where to get them, for the message that one is missing.
    metric_fns: further metrics, beside BLEU without case and ROUGE-L.
  """
  caller = inspect.currentframe().f_back
  seqio.TaskRegistry.add(
      name,
      source=sources.LocalFiles(files, origin),
      preprocessors=[
          seqio.preprocessors.tokenize,
          seqio.CacheDatasetPlaceholder(),
          seqio.preprocessors.append_eos,
      ],
      postprocess_fn=postprocessors.all_references,
      metric_fns=[
          functools.partial(metrics.bleu, lowercase=True),
          functools.partial(metrics.rouge, score_keys=['rougeL']),
          *metric_fns,
      ],
      output_features=preprocessors.OUTPUT_FEATURES,
      source_info=seqio.SourceInfo(caller.f_code.co_filename, caller.f_lineno),
  )


@dataclasses.dataclass(frozen=True)
class E2e:
  """The challenge's csv files: a table (`mr`) and a sentence (`ref`) a row.

  Attributes:
    files: split → name of its file in `e2e/`.
    partition: whether train and validation share a file, each with its tables of it.
  """

  files: Mapping[str, str]
  partition: bool = False

  @property
  def splits(self) -> Sequence[str]:
    return tuple(self.files)

  def names(self, split: str) -> Sequence[Sequence[str]]:
    return [[os.path.join('e2e', self.files[split])]]

  def read(self, paths: Sequence[str], split: str) -> dict[str, list[Any]]:
    """Reads the columns `inputs`, `targets`, `references`, `meaning_representation`, `idx`.

    `targets` is the first of the `references`; of the training split it is the only one.

    Raises:
      ValueError: if a row is not what is expected, or there is none; the file is named.
    """
    (path,) = paths
    references: dict[str, list[str]] = {}
    for table, reference in sources.parse_csv(path, ('mr', 'ref'), _checked):
      if not self.partition or split == 'test' or split == part_of(_content(table)):
        references.setdefault(table, []).append(reference)
    require_examples(references, path, split)
    columns = columns_of(references, split, linearized)
    tables = columns_of(references, split, str)['inputs']
    return columns | {'meaning_representation': tables}


def _checked(row: Sequence[str]) -> tuple[str, str]:
  table, reference = row
  if not _TABLE.fullmatch(table):
    raise ValueError(f'the table {table!r} is not of the form name[…], area[…]')
  if not reference.strip():
    raise ValueError(f'the sentence for {table!r} is empty')
  return table, reference


def linearized(table: str) -> str:
  """`name[Blue Spice], eatType[pub]` → `name : Blue Spice | Type : pub`.

  So Li & Liang (2021) write the tables in the files that they publish, prices as separate
  tokens (`£20-25` → `£ 20 - 25`).
  """
  items = [(_RENAMED.get(key.strip(), key.strip()), value) for key, value in _items(table)]
  text = ' | '.join(f'{key} : {value}' for key, value in items)
  return re.sub(r'(?<=\d)-(?=\d)', ' - ', re.sub(r'£(?=\d)', '£ ', text))


def _items(table: str) -> list[tuple[str, str]]:
  return re.findall(_ITEM, table)


def _content(table: str) -> str:
  """A table with its items in a fixed order: in which they stand is no matter."""
  return ', '.join(sorted(f'{key.strip()}[{value}]' for key, value in _items(table)))


_ORIGIN = (
    'The files are in https://github.com/tuetschek/e2e-dataset (release v1.0.0); '
    'TensorFlow Datasets holds only a cleaned version of the set, which is another.'
)

add_task(
    'e2e_nlg',
    E2e({
        'train': 'trainset.csv',
        'validation': 'devset.csv',
        'test': 'testset_w_refs.csv',
    }),
    _ORIGIN,
)

add_task(
    'e2e_nlg_from_dev',
    E2e(
        {'train': 'devset.csv', 'validation': 'devset.csv', 'test': 'testset_w_refs.csv'},
        partition=True,
    ),
    _ORIGIN,
)
