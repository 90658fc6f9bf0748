"""Triples read as Li & Liang wrote them, and are scored against all of their texts."""

import gzip
import io
import json
import tarfile

import pytest

from prompt_tuning_jax.data.cache import load_task
from prompt_tuning_jax.data.seqio_source import import_seqio

pytestmark = pytest.mark.usefixtures('own_folder')

ROME = ['Rome | country | Italy', 'Italy | capital | Rome']
OSLO = ['Oslo_Airport | runwayLength | 3500.0']
TRUMP = ['Abdul_Taib | successor | Sulaiman_"Taib"']


def entry(category, triples, texts, number=1):
  modified = ''.join(f'<mtriple>{triple}</mtriple>' for triple in triples)
  lexes = ''.join(f'<lex comment="{comment}">{text}</lex>' for text, comment in texts)
  return (
      f'<entry category="{category}" eid="Id{number}" size="{len(triples)}">'
      '<originaltripleset><otriple>x | y | z</otriple></originaltripleset>'
      f'<modifiedtripleset>{modified}</modifiedtripleset>{lexes}</entry>'
  )


def xml(*entries):
  return f'<benchmark><entries>{"".join(entries)}</entries></benchmark>'


CITY = entry('City', ROME, [('Rome is in Italy.', 'good'), ('Rome, Itly.', 'toFix')])
AIRPORT = entry('Airport', OSLO, [('Its runway has 3500 metres.', 'good')])
FILES = {
    'train/2triples/2triples_City_train_challenge.xml': xml(CITY),
    'train/1triples/1triple_allSolutions_Airport_train_challenge.xml': xml(AIRPORT, AIRPORT),
    'dev/2triples/2triples_City_dev_challenge.xml': xml(
        CITY, entry('City', ROME, [('Italy &amp; Rome.', 'good')])
    ),
    'test/testdata_no_lex.xml': 'not read',
    'test/testdata_unseen_with_lex.xml': 'not read',
    'test/testdata_with_lex.xml': xml(
        AIRPORT, entry('Politician', TRUMP, [('Sulaiman "Taib" came next.', 'good')])
    ),
}


def pack(tmp_path, files, name='webnlg_challenge_2017.tar.gz', top='webnlg_challenge_2017'):
  path = tmp_path / 'webnlg_2017' / name
  path.parent.mkdir(exist_ok=True)
  with tarfile.open(path, 'w:gz' if name.endswith('.gz') else 'w') as archive:
    for member, text in files.items():
      info = tarfile.TarInfo(f'{top}/{member}')
      info.size = len(text.encode())
      archive.addfile(info, io.BytesIO(text.encode()))
  return path


def texts(task):
  rows = [task.example(index) for index in range(len(task))]
  return [(row['inputs_pretokenized'], row['targets_pretokenized']) for row in rows]


def test_webnlg_trains_on_each_good_text_and_evaluates_on_all_of_a_table(tmp_path, vocabulary):
  pack(tmp_path, FILES)
  airport = ('| Oslo_Airport : runwayLength : 3500.0', 'Its runway has 3500 metres.')
  rome = '| Rome : country : Italy | Italy : capital : Rome'
  # The same triples twice are one table, and files come in the order of their names.
  assert texts(load_task('webnlg_2017', 'train', vocabulary)) == [
      airport, airport, (rome, 'Rome is in Italy.')
  ]  # fmt: skip
  task = load_task('webnlg_2017', 'validation', vocabulary)
  assert texts(task) == [(rome, 'Rome is in Italy.')]
  assert task.target(0) == ['Rome is in Italy.', 'Rome, Itly.', 'Italy & Rome.']
  scores = {}
  for metric_fn in task.metric_fns:
    scores |= metric_fn([task.target(0)], ['rome is in Italy.'])
  assert scores.pop('chrf++') < 100
  assert scores == {'bleu': pytest.approx(100), 'rougeL': pytest.approx(100)}


def test_the_test_set_has_its_two_parts_too(tmp_path, vocabulary):
  # Packed without a folder around it, and not gzipped.
  pack(tmp_path, FILES, 'webnlg_challenge_2017_xml_and_dev_json.tar', '.')
  parts = {
      split: texts(load_task('webnlg_2017', split, vocabulary))
      for split in ('test', 'test_seen', 'test_unseen')
  }
  assert parts['test_seen'] == [
      ('| Oslo_Airport : runwayLength : 3500.0', 'Its runway has 3500 metres.')
  ]
  assert parts['test_unseen'] == [
      ('| Abdul_Taib : successor : Sulaiman_"Taib"', 'Sulaiman "Taib" came next.')
  ]
  assert parts['test'] == parts['test_seen'] + parts['test_unseen']


@pytest.mark.parametrize(
    ('bad', 'reason'),
    [
        (xml(CITY)[:-20], 'mismatched tag|no element found|unclosed'),
        (xml(entry('City', ['a | b'], [('A.', 'good')])), r"Id1 .*City has the triples \['a | b"),
        (xml(entry('City', [], [('A.', 'good')])), r'has the triples \[\]'),
        (xml(entry('City', ROME, [])), 'has an empty text, or none'),
        (xml(entry('City', ROME, [('A.', 'good'), (' ', 'good')])), 'has an empty text'),
    ],
)
def test_what_is_wrong_with_an_entry_is_said_with_its_file(tmp_path, vocabulary, bad, reason):
  name = 'dev/2triples/2triples_City_dev_challenge.xml'
  pack(tmp_path, FILES | {name: bad})
  with pytest.raises(ValueError, match=f'tar.gz, webnlg_challenge_2017/{name}: .*({reason})'):
    load_task('webnlg_2017', 'validation', vocabulary)


def test_a_cut_an_empty_and_a_missing_archive_are_named(tmp_path, vocabulary):
  path = pack(tmp_path, {'README.md': 'nothing'})
  with pytest.raises(ValueError, match=r"no entry of the split 'train': expected xml files"):
    load_task('webnlg_2017', 'train', vocabulary)
  path = pack(tmp_path, FILES)
  path.write_bytes(path.read_bytes()[:200])
  with pytest.raises(ValueError, match=r'webnlg_challenge_2017\.tar\.gz.*Expected the xml'):
    load_task('webnlg_2017', 'train', vocabulary)
  path.unlink()
  with pytest.raises(FileNotFoundError, match=r'tar czf webnlg_challenge_2017\.tar\.gz'):
    load_task('webnlg_2017', 'train', vocabulary)


def table(triples, *found):
  return {'tripleset': triples, 'annotations': [{'source': 'e2e', 'text': t} for t in found]}


def write_dart(tmp_path, split, tables, opener=open):
  suffix = '.gz' if opener is gzip.open else ''
  path = tmp_path / 'dart' / f'dart-v1.1.1-full-{split}.json{suffix}'
  path.parent.mkdir(exist_ok=True)
  with opener(path, 'wt', encoding='utf-8') as file:
    json.dump(tables, file)
  return path


def test_dart_s_properties_are_in_small_letters(tmp_path, vocabulary):
  wolves = [['Newberry', 'NICKNAME', 'Wolves'], ['[TABLECONTEXT]', '[TITLE]', 'Colleges']]
  tables = [table(wolves, 'The Wolves.', 'Wolves!'), table([['A', 'B', 'C']], 'A is C.')]
  write_dart(tmp_path, 'train', tables)
  write_dart(tmp_path, 'test', [*tables, table(wolves, 'They are Wolves.')], gzip.open)
  text = 'Newberry : nickname : Wolves | [TABLECONTEXT] : [title] : Colleges'
  assert texts(load_task('dart', 'train', vocabulary)) == [
      (text, 'The Wolves.'), (text, 'Wolves!'), ('A : b : C', 'A is C.')
  ]  # fmt: skip
  task = load_task('dart', 'test', vocabulary)
  assert texts(task) == [(text, 'The Wolves.'), ('A : b : C', 'A is C.')]
  assert task.target(0) == ['The Wolves.', 'Wolves!', 'They are Wolves.']


def test_the_development_set_of_dart_is_parted_by_table(tmp_path, vocabulary):
  tables = [table([[f'S{i}', 'IS', 'x']], f'S{i}.', f'{i}') for i in range(200)]
  write_dart(tmp_path, 'dev', tables)
  train = {text for text, _ in texts(load_task('dart_from_dev', 'train', vocabulary))}
  task = load_task('dart_from_dev', 'validation', vocabulary)
  validation = {text for text, _ in texts(task)}
  assert not train & validation and len(train | validation) == 200
  assert 10 <= len(validation) == len(task) <= 30


@pytest.mark.parametrize(
    ('bad', 'reason'),
    [
        ({'tripleset': [['a', 'b', 'c']]}, "table 2: no field 'annotations'"),
        (table([['a', 'b']], 'A.'), r"table 2: \['a', 'b'\] is no triple"),
        (table([['a', 'b', 3]], 'A.'), r"table 2: \['a', 'b', 3\] is no triple"),
        (table([['a', 'b', 'c']]), 'table 2: there is no triple, no text or an empty one'),
        (table([], 'A.'), 'table 2: there is no triple'),
        (table([['a', 'b', 'c']], 'A.', ' '), 'table 2: .*an empty one'),
        (table([['a', 'b', 'c']], None), "table 2: 'text' is not a text"),
    ],
)
def test_a_bad_table_of_dart_is_named(tmp_path, vocabulary, bad, reason):
  write_dart(tmp_path, 'dev', [table([['a', 'b', 'c']], 'A.'), bad])
  with pytest.raises(ValueError, match=rf'full-dev\.json, {reason}.*Expected a JSON list'):
    load_task('dart', 'validation', vocabulary)


def test_other_json_than_dart_s_is_named(tmp_path, vocabulary):
  path = write_dart(tmp_path, 'dev', {'data': []})
  with pytest.raises(ValueError, match=r'full-dev\.json: it is no list'):
    load_task('dart', 'validation', vocabulary)
  path.write_text('[]')
  with pytest.raises(ValueError, match=r"holds no example of the split 'validation'"):
    load_task('dart', 'validation', vocabulary)
  path.write_text('[{"tripleset": ')
  with pytest.raises(ValueError, match=r'full-dev\.json: Expecting value'):
    load_task('dart', 'validation', vocabulary)


@pytest.mark.slow
def test_the_challenge_s_files_are_read(shared_data, vocabulary, monkeypatch):
  monkeypatch.setenv('PTJ_LOCAL_DATA', str(shared_data))
  sizes = {
      split: len(load_task('webnlg_2017', split, vocabulary))
      for split in ('train', 'validation', 'test', 'test_seen', 'test_unseen')
  }
  # 18,102 texts to train on, 77 of them to be fixed; 872 entries to validate on, of which two
  # have the same triples; sizes of the test set as the challenge gives them.
  assert sizes == {
      'train': 18_102 - 77, 'validation': 871, 'test': 1862, 'test_seen': 971,
      'test_unseen': 891,
  }  # fmt: skip


def test_the_xml_holds_what_the_json_does_that_li_and_liang_read(shared_data):
  import_seqio()
  from prompt_tuning_jax.tasks import triples_to_text

  path = shared_data / 'webnlg_2017' / 'webnlg_challenge_2017_xml_and_dev_json.tar.gz'
  with tarfile.open(path) as archive:
    (name,) = [name for name in archive.getnames() if name.endswith('dev.json')]
    entries = json.load(archive.extractfile(name))['entries']
  expected = []
  for number, numbered in enumerate(entries, start=1):
    found = numbered[str(number)]
    triples = [(t['subject'], t['property'], t['object']) for t in found['modifiedtripleset']]
    lexes = [(lex['lex'], lex['comment'] == 'good') for lex in found['lexicalisations']]
    expected.append((found['category'], tuple(triples), lexes))
  assert len(expected) == 872
  assert sorted(triples_to_text._webnlg_entries(str(path), 'dev')) == sorted(expected)


def test_the_development_file_of_dart_is_read(shared_data, vocabulary, monkeypatch):
  monkeypatch.setenv('PTJ_LOCAL_DATA', str(shared_data))
  task = load_task('dart', 'validation', vocabulary)
  assert (len(task), sum(len(task.target(i)) for i in range(len(task)))) == (2721, 6980)
  assert texts(task)[0] == (
      'Mars Hill College : joined : 1973 | Mars Hill College : location : Mars Hill, North '
      'Carolina',
      'A school from Mars Hill, North Carolina, joined in 1973.',
  )
