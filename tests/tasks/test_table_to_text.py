"""E2E reads as Li & Liang wrote it, and is scored against all references of a table."""

import csv
import gzip

import pytest

from prompt_tuning_jax.data.cache import load_task
from prompt_tuning_jax.data.seqio_source import import_seqio

PUB = 'name[Zizzi], eatType[pub], priceRange[£20-25], familyFriendly[yes], near[Café Rouge]'
INN = 'name[The Inn], customer rating[5 out of 5]'
ROWS = [(PUB, 'Zizzi, a pub.'), (INN, 'The "Inn" is rated 5 out of 5.'), (PUB, 'A pub: Zizzi.')]


pytestmark = pytest.mark.usefixtures('own_folder')


def write(tmp_path, name, rows, opener=open):
  path = tmp_path / 'e2e' / name
  path.parent.mkdir(exist_ok=True)
  with opener(path, 'wt', encoding='utf-8', newline='') as file:
    csv.writer(file, quoting=csv.QUOTE_ALL).writerows([('mr', 'ref'), *rows])
  return path


def examples(task):
  return [task.example(index) for index in range(len(task))]


def test_training_sees_a_table_once_for_every_reference(tmp_path, vocabulary):
  write(tmp_path, 'trainset.csv', ROWS)
  task = load_task('e2e_nlg', 'train', vocabulary)
  pub = (
      'name : Zizzi | Type : pub | price : £ 20 - 25 | family friendly : yes | near : Café Rouge'
  )
  inn = 'name : The Inn | customer rating : 5 out of 5'
  assert [(e['inputs_pretokenized'], e['targets_pretokenized']) for e in examples(task)] == [
      (pub, 'Zizzi, a pub.'),
      (pub, 'A pub: Zizzi.'),
      (inn, 'The "Inn" is rated 5 out of 5.'),
  ]
  for index, example in enumerate(examples(task)):
    assert example['idx'] == index
    assert task.target(index) == example['references'] == [example['targets_pretokenized']]
    for feature in ('inputs', 'targets'):
      text = example[f'{feature}_pretokenized']
      assert task[index][feature].tolist() == [*vocabulary.encode(text), 1]


@pytest.mark.parametrize(('split', 'file'), [('validation', 'dev'), ('test', 'testset_w_refs')])
def test_evaluation_sees_a_table_once_with_all_of_its_references(
    tmp_path, vocabulary, split, file
):
  name = 'devset.csv.gz' if split == 'validation' else 'testset_w_refs.csv'
  write(tmp_path, name, ROWS, gzip.open if name.endswith('.gz') else open)
  task = load_task('e2e_nlg', split, vocabulary)
  pub, inn = examples(task)
  assert (pub['meaning_representation'], inn['meaning_representation']) == (PUB, INN)
  assert pub['targets_pretokenized'] == 'Zizzi, a pub.'
  assert task.target(0) == ['Zizzi, a pub.', 'A pub: Zizzi.']
  assert task.target(1) == ['The "Inn" is rated 5 out of 5.']
  assert task.postprocess_fn('A pub.', example=pub, is_target=False) == 'A pub.'
  # Case is ignored, as the challenge does.
  predictions = ['zizzi, A PUB.', 'the "inn" is rated 5 out of 5.']
  scores = {}
  for metric_fn in task.metric_fns:
    scores |= metric_fn([task.target(0), task.target(1)], predictions)
  assert scores == {'bleu': pytest.approx(100), 'rougeL': pytest.approx(100)}


def test_a_cached_task_is_scored_alike_without_its_module(tmp_path, vocabulary):
  write(tmp_path, 'devset.csv', ROWS)
  made = load_task('e2e_nlg', 'validation', vocabulary)
  read = load_task('e2e_nlg', 'validation', vocabulary)
  assert made._live_functions and read._live_functions is None
  targets, predictions = [made.target(0), made.target(1)], ['A pub: Zizzi.', 'The Inn.']
  assert targets == [read.target(0), read.target(1)]
  for ours, theirs in zip(made.metric_fns, read.metric_fns, strict=True):
    assert ours(targets, predictions) == theirs(targets, predictions)


def test_the_development_set_is_parted_by_table_whatever_the_order_of_its_items(
    tmp_path, vocabulary
):
  tables = [f'name[Inn {i}], area[riverside], food[Thai]' for i in range(200)]
  turned = [f'food[Thai], name[Inn {i}], area[riverside]' for i in range(200)]
  write(tmp_path, 'devset.csv', [(t, f'{t} {n}.') for n in range(2) for t in tables + turned])
  parts = {
      split: load_task('e2e_nlg_from_dev', split, vocabulary)
      for split in ('train', 'validation')
  }
  names = {
      split: {e['targets_pretokenized'].split('name[')[1].split(']')[0] for e in examples(task)}
      for split, task in parts.items()
  }
  assert not names['train'] & names['validation']
  assert len(names['train'] | names['validation']) == 200
  assert 10 <= len(names['validation']) <= 30
  # A table of two orders: two references each, of which validation keeps both together.
  assert len(parts['train']) == 4 * len(names['train'])
  assert len(parts['validation']) == 2 * len(names['validation'])
  assert all(len(e['references']) == 2 for e in examples(parts['validation']))


@pytest.mark.parametrize(
    ('bad', 'reason'),
    [
        ('"nonsense","A pub."', r"table 'nonsense' is not of the form name\[…\], area\[…\]"),
        ('"name[Zizzi], area[","A pub."', 'is not of the form'),
        ('"name[Zizzi]"," "', r"sentence for 'name\[Zizzi\]' is empty"),
        ('"name[Zizzi]"', '1 fields instead of 2'),
        ('"name[Zizzi]","A","b"', '3 fields instead of 2'),
        ('"name[Zizzi]","A" pub', "',' expected after '\"'"),
        ('"name[Zizzi]","A pub', 'unexpected end of data'),
        ('"name[Zizzi]","A \udcff pub"', "can't decode byte 0xff"),
    ],
)
def test_a_bad_row_is_named_with_its_file_and_line(tmp_path, vocabulary, bad, reason):
  path = write(tmp_path, 'devset.csv', [])
  text = f'mr,ref\nname[Zizzi],"A\npub."\n{bad}\n'
  path.write_bytes(text.encode(errors='surrogateescape'))
  # The row above the bad one has two lines.
  with pytest.raises(ValueError, match=rf'devset\.csv, line 4: .*{reason}') as error:
    load_task('e2e_nlg', 'validation', vocabulary)
  assert 'Expected comma-separated values below a first line mr,ref.' in str(error.value)


def test_a_wrong_header_an_empty_and_a_cut_file_are_named(tmp_path, vocabulary):
  path = write(tmp_path, 'devset.csv', [])
  with pytest.raises(ValueError, match=r"devset\.csv holds no example of .* 'validation'"):
    load_task('e2e_nlg', 'validation', vocabulary)
  path.write_text('MR\n"name[Zizzi]"\n')
  with pytest.raises(ValueError, match=r"devset\.csv, line 1: the first line is \['MR'\]"):
    load_task('e2e_nlg', 'validation', vocabulary)
  path.unlink()
  path = write(tmp_path, 'devset.csv.gz', ROWS, gzip.open)
  path.write_bytes(path.read_bytes()[:-9])
  with pytest.raises(ValueError, match=r'devset\.csv\.gz, line 5: Compressed file ended'):
    load_task('e2e_nlg', 'validation', vocabulary)


def test_a_missing_file_is_named_with_what_to_do(tmp_path, vocabulary, monkeypatch):
  with pytest.raises(
      FileNotFoundError,
      match=r"'train' needs e2e/trainset\.csv .*PTJ_LOCAL_DATA=.*e2e-dataset.*cleaned version",
  ):
    load_task('e2e_nlg', 'train', vocabulary)
  monkeypatch.delenv('PTJ_LOCAL_DATA')
  with pytest.raises(FileNotFoundError, match=r'devset\.csv .* on this machine. Set PTJ_LOCAL'):
    load_task('e2e_nlg_from_dev', 'train', vocabulary)
  with pytest.raises(ValueError, match="no split 'dev'. Its splits: train, validation, test"):
    load_task('e2e_nlg', 'dev', vocabulary)


def test_a_file_that_was_changed_is_read_again(tmp_path, vocabulary):
  write(tmp_path, 'devset.csv', ROWS)
  assert len(load_task('e2e_nlg', 'validation', vocabulary)) == 2
  write(tmp_path, 'devset.csv', ROWS[:1])
  assert len(load_task('e2e_nlg', 'validation', vocabulary)) == 1


def test_the_official_files_are_read(shared_data, vocabulary, monkeypatch):
  monkeypatch.setenv('PTJ_LOCAL_DATA', str(shared_data))
  for split, size, num_references in [('validation', 547, 4672), ('test', 630, 4693)]:
    task = load_task('e2e_nlg', split, vocabulary)
    targets = [task.target(index) for index in range(len(task))]
    assert (len(task), sum(map(len, targets))) == (size, num_references)
    # A reference is one of those it is compared with.
    bleu, rouge = task.metric_fns
    for choose in (min, max):
      own = [choose(texts) for texts in targets]
      assert bleu(targets, own) == {'bleu': pytest.approx(100)}
    assert rouge(targets[:50], own[:50]) == {'rougeL': pytest.approx(100)}
  example = task.example(3)
  assert example['inputs_pretokenized'] == (
      'name : Blue Spice | Type : coffee shop | customer rating : average | near : Burger King'
  )
  assert task.target(3)[0] == example['targets_pretokenized']


def test_every_table_reads_as_in_li_and_liangs_files(shared_data):
  import_seqio()
  from prompt_tuning_jax.tasks.table_to_text import linearized

  for name, theirs in [('devset', 'src1_valid'), ('testset_w_refs', 'src1_test')]:
    with gzip.open(shared_data / 'e2e' / f'{name}.csv.gz', 'rt', newline='') as file:
      ours = [linearized(row['mr']) for row in csv.DictReader(file)]
    with gzip.open(shared_data / 'e2e' / f'{theirs}.txt.gz', 'rt') as file:
      assert ours == [line.partition('||')[0] for line in file]


def test_the_parts_of_the_development_set_share_no_table(shared_data, vocabulary, monkeypatch):
  monkeypatch.setenv('PTJ_LOCAL_DATA', str(shared_data))
  train, validation, test = (
      load_task('e2e_nlg_from_dev', split, vocabulary)
      for split in ('train', 'validation', 'test')
  )
  tables = [{e['meaning_representation'] for e in examples(task)} for task in (train, validation)]
  assert tuple(map(len, tables)) == (493, 54)
  assert not tables[0] & tables[1]
  assert len(validation) == 54 and len(test) == 630
  references = sum(len(validation.target(index)) for index in range(54))
  assert (len(train), references) == (4173, 499)
  assert len(train) + references == 4672
