"""LAMA T-REx (Petroni et al., 2019): facts as gaps to fill, P-tuning's task.

    lama_trex_P36 and so on    a relation; the answer is one of its objects
    lama_trex_P36_29k          the same; the answer is one of a list of words
    lama_trex, lama_trex_29k   mixtures of all 41 relations. Papers report the mean over them,
                               as `evaluation/report.py` does

Facts come from the split on which P-tuning is trained and measured (Liu et al., 2021; made by
Shin et al., 2020), templates from `relations.jsonl` of LAMA, both from the folder `lama_trex/`
below $PTJ_LOCAL_DATA:

    relations.jsonl               `relation` and `template`, a relation a line
    {train,dev,test}.slim.jsonl   `relation`, `sub_label` and `obj_label`, a fact a line
    29k-vocab.json                for the `_29k` tasks: the words, as bert-base-cased spells them

or, as P-tuning's data folder LAMA/ has it, single_relations/P36.jsonl and
fact-retrieval/original/P36/{train,dev,test}.jsonl. All of it may be gzipped.

Inputs are the relation's template as T5 fills gaps, `The capital of France is <extra_id_0> .`,
and targets the object's text alone. An example also has the fields of the paper's templates,
`sub`, the subject, and `obj`, which is the gap: `(3, 'sub', 3, 'obj', 3, 'text: </s>')`, or
`'{3} {sub} {3} {obj} {3}</s>'`. The object itself is `obj_label`.

`hit_at_1` is the share of right choices. Of `lama_trex_P36` the choices are the objects that
the relation has in any of the three splits, those of several words too. Of `lama_trex_P36_29k`
they are those of published numbers, the words that the vocabularies of the models compared
have in common (18,154, though the file is named for 29,000), and facts whose object is none of
them are left out, as they are there; a warning says how many. For T5 a word is one to several
tokens, and what counts is the probability of all of them and of the end behind them.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import seqio
from prompt_tuning_jax.tasks import preprocessors, sources

from prompt_tuning_jax.data import gzipped
from prompt_tuning_jax.data.tokenized_task import EmptySplitError
from prompt_tuning_jax.evaluation import metrics, postprocessors

# The relations of T-REx; relations.jsonl holds those of Google-RE and others too.
RELATIONS = (
    'P17', 'P19', 'P20', 'P27', 'P30', 'P31', 'P36', 'P37', 'P39', 'P47', 'P101', 'P103',
    'P106', 'P108', 'P127', 'P131', 'P136', 'P138', 'P140', 'P159', 'P176', 'P178', 'P190',
    'P264', 'P276', 'P279', 'P361', 'P364', 'P407', 'P413', 'P449', 'P463', 'P495', 'P527',
    'P530', 'P740', 'P937', 'P1001', 'P1303', 'P1376', 'P1412',
)  # fmt: skip

_FOLDER = 'lama_trex'
# What T5 fills.
_GAP = '<extra_id_0>'
_WORDS = '29k-vocab.json'
# The list of the file that holds the words as such; the others mark where words begin.
_SPELLING = 'bert-base-cased'
# Split → its name in the files.
_FILES = {'train': 'train', 'validation': 'dev', 'test': 'test'}


@dataclasses.dataclass(frozen=True)
class Facts:
  """The facts of one relation, and its template.

  Every split is made of all files, for its choices are the objects of all splits.

  Attributes:
    relation: Wikidata's name of it, such as 'P36'.
    from_words: whether the choices are the words of the list instead, and only the facts
      with such an object count.
  """

  relation: str
  from_words: bool = False

  @property
  def splits(self) -> Sequence[str]:
    return tuple(_FILES)

  def names(self, split: str) -> Sequence[Sequence[str]]:
    names = [['relations.jsonl', f'single_relations/{self.relation}.jsonl']]
    for file in _FILES.values():
      names.append([
          f'{file}.slim.jsonl',
          f'fact-retrieval/original/{self.relation}/{file}.jsonl',
      ])
    if self.from_words:
      names.append([_WORDS])
    return [[os.path.join(_FOLDER, name) for name in group] for group in names]

  def read(self, paths: Sequence[str], split: str) -> dict[str, list[Any]]:
    """Reads the columns `inputs`, `targets`, `sub`, `obj`, `obj_label` and `idx`.

    Raises:
      ValueError: if a line is not what is expected; the file is named.
      EmptySplitError: if no fact of the relation is left.
    """
    template = self._template(paths[0])
    path = paths[1 + self.splits.index(split)]
    facts = list(self._facts(path))
    if self.from_words and facts:
      facts = self._with_word(facts, path, frozenset(self.choices(paths)))
    if not facts:
      raise EmptySplitError(
          f'{path} holds no fact of the relation {self.relation}'
          f'{" whose object is a word of the list" * self.from_words}, so that its split '
          f'{split!r} is empty. Use another split or relation, or the complete file.'
      )
    return {
        'inputs': [template.replace('[X]', subject) for subject, _ in facts],
        'targets': [obj for _, obj in facts],
        'sub': [subject for subject, _ in facts],
        'obj': [_GAP] * len(facts),
        'obj_label': [obj for _, obj in facts],
        'idx': list(range(len(facts))),
    }

  def _with_word(
      self, facts: Sequence[tuple[str, str]], path: str, words: frozenset[str]
  ) -> list[tuple[str, str]]:
    kept = [fact for fact in facts if fact[1] in words]
    if 0 < len(kept) < len(facts):
      warnings.warn(
          f'{path}: {len(facts) - len(kept):,} of {len(facts):,} facts of the relation '
          f'{self.relation} are left out, for their object is none of the {len(words):,} '
          'words to choose from.',
          stacklevel=2,
      )
    return kept

  def choices(self, paths: Sequence[str]) -> Sequence[str]:
    """What the answers are chosen from, sorted."""
    if self.from_words:
      return _words(paths[-1], os.stat(paths[-1]).st_mtime_ns)
    return sorted({obj for path in paths[1:] for _, obj in self._facts(path)})

  def _template(self, path: str) -> str:
    """The relation's template with a sentinel in the place of the object."""
    expected = 'relation and template, which holds [X] and [Y] once each'
    templates = sources.parse_jsonl(path, self._template_of_row, expected)
    found = [template for template in templates if template is not None]
    if len(found) != 1:
      raise ValueError(
          f'{path} holds {len(found)} templates of the relation {self.relation} instead of '
          f'one. Expected one JSON object a line with {expected}.'
      )
    return found[0]

  def _template_of_row(self, row: Mapping[str, Any], number: int) -> str | None:
    del number
    if _text(row, 'relation') != self.relation:
      return None
    template = _text(row, 'template')
    if template.count('[X]') != 1 or template.count('[Y]') != 1:
      raise ValueError(f'the template is {template!r}')
    return template.replace('[Y]', _GAP)

  def _facts(self, path: str) -> Iterator[tuple[str, str]]:
    """(subject, object) of every fact of the relation in a file."""
    expected = 'relation (or predicate_id), sub_label and obj_label'
    facts = sources.parse_jsonl(path, self._fact_of_row, expected)
    return (fact for fact in facts if fact is not None)

  def _fact_of_row(self, row: Mapping[str, Any], number: int) -> tuple[str, str] | None:
    del number
    key = 'predicate_id' if 'predicate_id' in row else 'relation'
    fact = _text(row, 'sub_label'), _text(row, 'obj_label')
    return fact if _text(row, key) == self.relation else None


def _text(row: Mapping[str, Any], name: str) -> str:
  """A field of a row, which must be a text that is not empty."""
  if not sources.text_field(row, name).strip():
    raise ValueError(f'{name!r} is empty')
  return row[name]


@functools.lru_cache(maxsize=1)
def _words(path: str, mtime_ns: int) -> tuple[str, ...]:
  """The words of the list, sorted; `mtime_ns` tells a file that was replaced."""
  del mtime_ns
  try:
    with gzipped.open_bytes(path) as file:
      words = json.loads(file.read().decode())[_SPELLING]
    if not isinstance(words, list) or not all(isinstance(w, str) and w.strip() for w in words):
      raise ValueError('it holds something else than words')
    if not words:
      raise ValueError('it is empty')
  except (ValueError, TypeError, KeyError, RecursionError, *gzipped.DAMAGED) as error:
    raise ValueError(
        f'{path}: {error}. Expected a JSON object with {_SPELLING!r}, a list of words.'
    ) from error
  return tuple(sorted(set(words)))


class Choices(Sequence[str]):
  """What the answers of a relation's task are chosen from, sorted.

  A sequence like any other, but read from the files when it is first looked at: a task can
  be registered where they are not.
  """

  def __init__(self, facts: Facts, source: sources.LocalFiles):
    self._facts = facts
    self._source = source

  def _read(self) -> tuple[str, ...]:
    # Any split is made of all files. Their times tell a file that was replaced.
    paths = self._source.require_files('train')
    return _choices(self._facts, tuple((path, os.stat(path).st_mtime_ns) for path in paths))

  def __len__(self) -> int:
    return len(self._read())

  def __getitem__(self, index: Any) -> Any:
    return self._read()[index]

  def __iter__(self) -> Iterator[str]:
    return iter(self._read())

  def __contains__(self, text: object) -> bool:
    return text in self._read()


@functools.lru_cache(maxsize=2 * len(RELATIONS))
def _choices(facts: Facts, files: tuple[tuple[str, int], ...]) -> Sequence[str]:
  return tuple(facts.choices([path for path, _ in files]))


def _add(name: str, facts: Facts) -> None:
  source = sources.LocalFiles(
      facts,
      "The files belong to P-tuning's data (https://github.com/THUDM/P-tuning, LAMA); "
      'TensorFlow Datasets does not hold them.',
  )
  seqio.TaskRegistry.add(
      name,
      source=source,
      preprocessors=[
          seqio.preprocessors.tokenize,
          seqio.CacheDatasetPlaceholder(),
          seqio.preprocessors.append_eos,
      ],
      postprocess_fn=functools.partial(
          postprocessors.string_label_to_class_id, label_classes=Choices(facts, source)
      ),
      metric_fns=[metrics.hit_at_1],
      output_features=preprocessors.OUTPUT_FEATURES,
      source_info=seqio.SourceInfo(__file__, _add.__code__.co_firstlineno),
  )


for _suffix, _from_words in (('', False), ('_29k', True)):
  for _relation in RELATIONS:
    _add(f'lama_trex_{_relation}{_suffix}', Facts(_relation, _from_words))
  seqio.MixtureRegistry.add(
      f'lama_trex{_suffix}',
      [f'lama_trex_{_relation}{_suffix}' for _relation in RELATIONS],
      default_rate=1.0,
  )
