"""Triples as text: WebNLG 2017 (Gardent et al., 2017) and DART (Nan et al., 2021).

    webnlg_2017    splits train, validation, test, and its two parts: test_seen, of the ten
                   categories that training has, and test_unseen, of the five others. Tables
                   of results call these A, S and U.
    dart           version 1.1.1: train, validation, test
    dart_from_dev  its development set alone, one table in ten for validation and the others
                   to train on, where the large training file is not at hand: not comparable
                   with published scores, for no table of it is truly new

Neither is in TensorFlow Datasets. From below $PTJ_LOCAL_DATA these files are read:

    webnlg_2017/webnlg_challenge_2017.tar     the challenge's folder as one file, plain or
                                              gzipped: {train,dev}/…/*.xml and
                                              test/testdata_with_lex.xml
    dart/dart-v1.1.1-full-{train,dev,test}.json

Inputs are the triples as Li & Liang (2021) write them, `subject : property : object`, with
` | ` between triples; in WebNLG's also before the first, and DART's properties in small
letters. WebNLG's are the triples that the challenge has modified for its participants. As
theirs does, training on WebNLG leaves out the texts that are marked to be fixed (77 of
18,102), and evaluation holds equal tables once, with the texts of all of them.

BLEU ignores case, as published numbers do. They come from multi-bleu.perl over texts that a
script has parted at every punctuation mark, with at most three references; here the tokens
are mteval-v13a's (sacrebleu) and every reference counts, so that a score may differ by a
point or so. chrF++ is sacrebleu's too. Of what papers also report, METEOR needs Java and
TER most of a minute for a test set; neither is computed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tarfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prompt_tuning_jax.tasks import sources, table_to_text

from prompt_tuning_jax.data import gzipped
from prompt_tuning_jax.evaluation import metrics

# Subject, property, object.
Triple = tuple[str, str, str]

_METRICS = [metrics.chrf]

# The categories of WebNLG's training set.
SEEN_CATEGORIES = frozenset({
    'Airport', 'Astronaut', 'Building', 'City', 'ComicsCharacter', 'Food', 'Monument',
    'SportsTeam', 'University', 'WrittenWork',
})  # fmt: skip

# Split → the folder that holds it.
_FOLDERS = {
    'train': 'train',
    'validation': 'dev',
    'test': 'test',
    'test_seen': 'test',
    'test_unseen': 'test',
}


def linearized(triples: Sequence[Triple]) -> str:
  """Triples in one line: `Rome : country : Italy | Italy : capital : Rome`."""
  return ' | '.join(' : '.join(triple) for triple in triples)


@dataclasses.dataclass(frozen=True)
class WebNlg:
  """The challenge's xml files, all in one tar file."""

  @property
  def splits(self) -> Sequence[str]:
    return tuple(_FOLDERS)

  def names(self, split: str) -> Sequence[Sequence[str]]:
    del split
    names = ('webnlg_challenge_2017.tar', 'webnlg_challenge_2017_xml_and_dev_json.tar')
    return [[os.path.join('webnlg_2017', name) for name in names]]

  def read(self, paths: Sequence[str], split: str) -> dict[str, list[Any]]:
    """Reads the columns of `table_to_text.columns_of`.

    Raises:
      ValueError: if a file is damaged or not what is expected, or holds no entry of the
        split; it is named.
    """
    (path,) = paths
    references: dict[Sequence[Triple], list[str]] = {}
    for category, triples, texts in _webnlg_entries(path, _FOLDERS[split]):
      if split == 'test_seen' and category not in SEEN_CATEGORIES:
        continue
      if split == 'test_unseen' and category in SEEN_CATEGORIES:
        continue
      chosen = [text for text, is_good in texts if is_good or split != 'train']
      if chosen:
        references.setdefault(triples, []).extend(chosen)
    if not references:
      raise ValueError(
          f'{path} holds no entry of the split {split!r}: expected xml files in a folder '
          f'{_FOLDERS[split]}/ of it, as the challenge has them. Pack its folder '
          'webnlg_challenge_2017 again, with tar.'
      )
    return table_to_text.columns_of(references, split, lambda t: f'| {linearized(t)}')


def _webnlg_entries(
    path: str, folder: str
) -> Iterator[tuple[str, tuple[Triple, ...], list[tuple[str, bool]]]]:
  """(category, triples, (text, whether it is good) of each) of every entry of a folder."""
  name = None
  try:
    with tarfile.open(path) as archive:
      # In the order of their names, so that the order of packing is no matter.
      for name in sorted(archive.getnames()):
        if not _is_of(name, folder):
          continue
        for entry in ElementTree.parse(archive.extractfile(name)).iter('entry'):
          yield _webnlg_entry(entry)
  except (ValueError, ElementTree.ParseError, tarfile.TarError, *gzipped.DAMAGED) as error:
    where = f'{path}, {name}' if name else path
    raise ValueError(
        f'{where}: {error}. Expected the xml of the WebNLG challenge 2017: entries with a '
        'category, a modifiedtripleset and texts (lex).'
    ) from error


def _is_of(name: str, folder: str) -> bool:
  """Whether a file of the archive belongs to a folder of the challenge."""
  *parents, last = name.split('/')
  if folder not in parents or not last.endswith('.xml'):
    return False
  # The others there repeat a part of it, or are without texts.
  return folder != 'test' or last == 'testdata_with_lex.xml'


def _webnlg_entry(
    entry: ElementTree.Element,
) -> tuple[str, tuple[Triple, ...], list[tuple[str, bool]]]:
  name = f'the entry {entry.get("eid")} of category {entry.get("category")}'
  written = [triple.text or '' for triple in entry.iterfind('modifiedtripleset/mtriple')]
  triples = tuple(tuple(part.strip() for part in text.split(' | ')) for text in written)
  if not triples or any(len(triple) != 3 or not all(triple) for triple in triples):
    raise ValueError(f'{name} has the triples {written} instead of subject | property | object')
  texts = [((lex.text or '').strip(), lex.get('comment') == 'good') for lex in entry.iter('lex')]
  if not texts or not all(text for text, _ in texts):
    raise ValueError(f'{name} has an empty text, or none')
  return entry.get('category'), triples, texts


@dataclasses.dataclass(frozen=True)
class Dart:
  """The json files of DART: lists of tables with `tripleset` and `annotations`.

  Attributes:
    files: split → which of the official files.
    partition: whether train and validation share a file, each with its tables of it.
  """

  files: Mapping[str, str]
  partition: bool = False

  @property
  def splits(self) -> Sequence[str]:
    return tuple(self.files)

  def names(self, split: str) -> Sequence[Sequence[str]]:
    return [[os.path.join('dart', f'dart-v1.1.1-full-{self.files[split]}.json')]]

  def read(self, paths: Sequence[str], split: str) -> dict[str, list[Any]]:
    """Reads the columns of `table_to_text.columns_of`.

    Raises:
      ValueError: if the file is damaged or not what is expected, or there is no table; it
        is named.
    """
    (path,) = paths
    references: dict[str, list[str]] = {}
    for triples, texts in _dart_tables(path):
      text = linearized(triples)
      if not self.partition or split == table_to_text.part_of(text):
        references.setdefault(text, []).extend(texts)
    table_to_text.require_examples(references, path, split)
    return table_to_text.columns_of(references, split, str)


def _dart_tables(path: str) -> Iterator[tuple[list[Triple], list[str]]]:
  """(triples, texts) of every table of a file."""
  number = 0
  try:
    with gzipped.open_bytes(path) as file:
      tables = json.loads(file.read().decode())
    if not isinstance(tables, list):
      raise ValueError('it is no list')
    for number, table in enumerate(tables, start=1):
      yield _dart_table(table)
  except (ValueError, TypeError, KeyError, RecursionError, *gzipped.DAMAGED) as error:
    reason = f'no field {error}' if isinstance(error, KeyError) else error
    where = f'{path}, table {number}' if number else path
    raise ValueError(
        f'{where}: {reason}. Expected a JSON list of tables with tripleset, lists of three '
        'texts, and annotations, each with text.'
    ) from error


def _dart_table(table: Mapping[str, Any]) -> tuple[list[Triple], list[str]]:
  triples, annotations = table['tripleset'], table['annotations']
  for triple in triples:
    if len(triple) != 3 or not all(isinstance(part, str) for part in triple):
      raise ValueError(f'{triple!r} is no triple of texts')
  texts = [sources.text_field(annotation, 'text') for annotation in annotations]
  if not triples or not texts or not all(text.strip() for text in texts):
    raise ValueError('there is no triple, no text or an empty one')
  return [(subject, name.lower(), value) for subject, name, value in triples], texts


table_to_text.add_task(
    'webnlg_2017',
    WebNlg(),
    'It is the folder webnlg_challenge_2017 of https://gitlab.com/shimorina/webnlg-dataset '
    'as one file: tar czf webnlg_challenge_2017.tar.gz webnlg_challenge_2017.',
    _METRICS,
)

_DART_ORIGIN = 'The files are in https://github.com/Yale-LILY/dart, data/v1.1.1.'

table_to_text.add_task(
    'dart',
    Dart({'train': 'train', 'validation': 'dev', 'test': 'test'}),
    _DART_ORIGIN,
    _METRICS,
)

table_to_text.add_task(
    'dart_from_dev',
    Dart({'train': 'dev', 'validation': 'dev'}, partition=True),
    _DART_ORIGIN,
    _METRICS,
)
