"""Official files become the folders that TFDS itself would write of them."""

import gzip
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from prompt_tuning_jax import cli
from prompt_tuning_jax.data.cache import load_task
from prompt_tuning_jax.data.seqio_source import import_seqio
from prompt_tuning_jax.data.tokenized_task import NoSplitError
from tests.tasks import test_glue
from tests.tasks.super_glue_samples import OFFICIAL, TASKS, write_official
from tests.tasks.test_super_glue_files import ASK, BEE

pytestmark = pytest.mark.usefixtures('own_cache')

CONFIGS = {
    'boolq': 'BoolQ', 'cb': 'CB', 'copa': 'COPA', 'multirc': 'MultiRC', 'record': 'ReCoRD',
    'rte': 'RTE', 'wic': 'WiC', 'wsc': 'WSC', 'wsc.fixed': 'WSC',
}  # fmt: skip
SPLITS = {'train': 'train', 'validation': 'val', 'test': 'test'}
# Task → the splits that it has in SuperGLUE.
TASK_SPLITS = {
    task: {
        'super_glue_wsc_v102_simple_train': ['train'],
        'super_glue_wsc_v102_simple_eval': ['validation', 'test'],
        'super_glue_axb_v102': ['test'],
        'super_glue_axg_v102': ['test'],
    }.get(task, list(SPLITS))
    for task in TASKS
    if task != 'dpr_v001_simple'
}


@pytest.fixture(scope='module')
def prepare():
  import_seqio()
  from prompt_tuning_jax.tasks import prepare

  return prepare.prepare


@pytest.fixture(scope='module')
def tfds():
  import_seqio()
  import tensorflow_datasets

  return tensorflow_datasets


def write_all(folder):
  """Small official files of SuperGLUE, as unpacked; those of the test sets have no labels."""
  lines_of = {file: lines for (_, file), (lines, _) in OFFICIAL.items()}
  for file, lines in list(lines_of.items()):
    if file.startswith('AX'):
      write_official(folder, file, lines)
      continue
    for split, name in SPLITS.items():
      other = [unlabelled(line) for line in lines] if split == 'test' else lines
      write_official(folder, f'{os.path.dirname(file)}/{name}.jsonl', other)
  return folder / 'superglue'


def unlabelled(row):
  """A row as test sets have it."""
  if isinstance(row, list):
    return [unlabelled(part) for part in row]
  if not isinstance(row, dict):
    return row
  hidden = {'label'} | ({'answers'} if 'query' in row else set())
  return {name: unlabelled(part) for name, part in row.items() if name not in hidden}


@pytest.fixture(scope='module')
def official(tmp_path_factory):
  return write_all(tmp_path_factory.mktemp('official'))


@pytest.fixture(scope='module')
def prepared(official, prepare, tmp_path_factory):
  """The folder that `prepare` made of them, and what it said."""
  folder = tmp_path_factory.mktemp('tfds')
  said = []
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr('warnings.warn', lambda *args, **kwargs: None)
    prepare('super_glue', str(official), str(folder), say=said.append)
  return folder, said


@pytest.fixture
def cb(tmp_path):
  """The files of CB alone."""
  lines, _ = OFFICIAL['super_glue_cb_v102', 'CB/val.jsonl']
  for name in ('train', 'val'):
    write_official(tmp_path, f'CB/{name}.jsonl', lines)
  return tmp_path / 'superglue'


def loaded(task, split, vocabulary, **kwargs):
  """All that training and evaluation see of a task, in no order."""
  found = load_task(task, split, vocabulary, **kwargs)
  return sorted(
      (
          repr(sorted(found.example(index).items())),
          repr({name: ids.tolist() for name, ids in found[index].items()}),
          repr(found._row(index)[1]),
      )
      for index in range(len(found))
  )


def assert_same_examples(task, split, vocabulary, local, prepared, monkeypatch, tmp_path):
  for name in (task, f'taskless_{task}'):
    monkeypatch.setenv('PTJ_LOCAL_DATA', str(local))
    expected = loaded(name, split, vocabulary, cache_dir=str(tmp_path / 'of_local'))
    monkeypatch.delenv('PTJ_LOCAL_DATA')
    found = loaded(
        name, split, vocabulary, cache_dir=str(tmp_path / 'of_tfds'), tfds_data_dir=str(prepared)
    )
    assert found == expected and len(found) > 0


@pytest.mark.parametrize('task', TASK_SPLITS)
def test_tasks_have_the_examples_of_the_local_files(
    official, prepared, vocabulary, monkeypatch, tmp_path, task
):
  # Its files are held to TFDS's own below, of every split.
  split = TASK_SPLITS[task][0]
  assert_same_examples(
      task, split, vocabulary, official.parent, prepared[0], monkeypatch, tmp_path
  )


def test_test_sets_have_no_labels(prepared, vocabulary):
  folder = str(prepared[0])
  for task, splits in TASK_SPLITS.items():
    if 'test' in splits and '_ax' not in task:
      found = load_task(task, 'test', vocabulary, tfds_data_dir=folder)
      assert not found.has_labels and found.manifest['unlabelled']['count'] == len(found)


def written_by_tfds(tfds, name, files, folder, *args):
  """What the builder of TFDS itself writes of official files: {split: path}."""
  data_set, _, config = name.partition('/')
  builder = tfds.builder_cls(data_set)(data_dir=str(folder), **{'config': config} if config else {})
  builder._split_generators = lambda manager: {
      split: builder._generate_examples(str(path), *args) for split, path in files.items()
  }
  tfds.display_progress_bar(False)
  builder.download_and_prepare(download_dir=str(folder / 'downloads'))
  return folder / name / str(builder.version)


def assert_same_files(ours, theirs):
  names = sorted(path.name for path in theirs.iterdir())
  assert sorted(path.name for path in ours.iterdir()) == names
  assert any('tfrecord' in name for name in names) and 'features.json' in names
  for name in names:
    assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name


@pytest.mark.parametrize('config', [*CONFIGS, 'axb', 'axg'])
def test_files_are_those_that_tfds_writes_byte_for_byte(
    official, prepared, tfds, tmp_path, config
):
  files = {split: official / CONFIGS.get(config, '') / f'{name}.jsonl'
           for split, name in SPLITS.items()}
  if config in ('axb', 'axg'):
    name = {'axb': 'AX-b', 'axg': 'AX-g'}[config]
    files = {'test': official / name / f'{name}.jsonl'}
  ours = prepared[0] / 'super_glue' / config / '1.0.2'
  theirs = written_by_tfds(tfds, f'super_glue/{config}', files, tmp_path, 'test')
  assert_same_files(ours, theirs)


def test_other_readers_of_tfds_read_the_folder(prepared, tfds):
  # Without a version TFDS takes its own code for the data set, with one the folder alone.
  for name in ('super_glue/multirc', 'super_glue/multirc:1.0.2'):
    builder = tfds.builder(name, data_dir=str(prepared[0]))
    assert list(builder.info.splits) == list(SPLITS)
    label = builder.info.features['label']
    assert (label.num_classes, np.dtype(label.np_dtype).name) == (2, 'int64')
    idx = builder.info.features['idx']
    assert {name: np.dtype(part.np_dtype).name for name, part in idx.items()} == {
        'paragraph': 'int32', 'question': 'int32', 'answer': 'int32'
    }  # fmt: skip
    rows = list(tfds.as_numpy(builder.as_dataset(split='validation')))
    assert {row['idx']['answer']: row['label'] for row in rows} == {7: 0, 8: 1, 9: -1}
  default = json.loads((prepared[0] / 'super_glue' / '.config' / 'metadata.json').read_text())
  assert default == {'default_config_name': 'boolq'}
  assert sorted(os.listdir(prepared[0])) == ['super_glue']


def test_the_report_counts_what_was_written(prepared):
  said = '\n'.join(prepared[1])
  assert '\nconfig     split                      rows         bytes  seconds\n' in said
  assert 'multirc    train                         3 ' in said
  assert '           test                          3 ' in said
  assert 'left out' not in said and f'--tfds_data_dir={prepared[0]}' in said


# What is there, and what is not.


def test_splits_without_a_file_are_left_out_and_named(cb, prepare, vocabulary, tmp_path):
  out, said = str(tmp_path / 'out'), []
  done = prepare('super_glue', str(tmp_path), out, configs=['cb', 'rte'], say=said.append)
  assert [(split.config, split.split, split.rows) for split in done] == [
      ('cb', 'train', 2), ('cb', 'validation', 2)
  ]  # fmt: skip
  left = said[said.index('left out, for lack of their files:') + 1 : -1]
  assert left == [
      '  cb: test (superglue/CB/test.jsonl)',
      '  rte: train (superglue/RTE/train.jsonl), validation (superglue/RTE/val.jsonl), test '
      '(superglue/RTE/test.jsonl)',
  ]
  assert len(load_task('super_glue_cb_v102', 'train', vocabulary, tfds_data_dir=out)) == 2
  with pytest.raises(NoSplitError, match=r"no split 'test'.* Its splits: train, validation"):
    load_task('super_glue_cb_v102', 'test', vocabulary, tfds_data_dir=out)


def test_gzipped_files_are_read(cb, prepare, tmp_path):
  path = cb / 'CB' / 'train.jsonl'
  with gzip.open(f'{path}.gz', 'wb') as file:
    file.write(path.read_bytes())
  path.unlink()
  done = prepare('super_glue', str(cb), str(tmp_path / 'out'))
  assert [split.rows for split in done] == [2, 2]


@pytest.mark.parametrize(
    ('name', 'files', 'reason'),
    [
        ('nowhere', [], 'is not a folder. Name the one that holds the official files of super_gl'),
        ('', [], 'it holds nothing'),
        (
            '', ['README', 'BoolQ.zip'],
            r'Expected for example superglue/BoolQ/train\.jsonl or BoolQ/train\.jsonl below it; '
            r'it holds BoolQ\.zip, README\. Unpack the zip files there\.',
        ),
        ('', [f'{n:02}' for n in range(20)], 'it holds 00, 01, 02, 03, 04, 05, 06, 07, …'),
    ],
)  # fmt: skip
def test_a_wrong_folder_of_files_is_named(prepare, tmp_path, name, files, reason):
  source = tmp_path / 'from'
  source.mkdir()
  for file in files:
    (source / file).touch()
  with pytest.raises(FileNotFoundError, match=rf'--from {source / name}.*{reason}'):
    prepare('super_glue', str(source / name), str(tmp_path / 'out'))
  assert not (tmp_path / 'out').exists()


def test_unknown_names_are_answered_with_the_nearest(cb, prepare, tmp_path):
  with pytest.raises(ValueError, match="'superglue'. Did you mean super_glue. There are: def"):
    prepare('superglue', str(cb), str(tmp_path / 'out'))
  with pytest.raises(ValueError, match="super_glue .--tasks. 'bolq'. Did you mean boolq. There"):
    prepare('super_glue', str(cb), str(tmp_path / 'out'), configs=['bolq'])


# Bad input.


def test_bad_lines_keep_only_their_own_part_from_being_written(cb, prepare, tmp_path):
  lines, _ = OFFICIAL['super_glue_rte_v102', 'RTE/val.jsonl']
  path = write_official(tmp_path, 'RTE/val.jsonl', lines * 3)
  good = path.read_bytes()
  path.write_bytes(good + b'{"premise": "\xff"}\n\n{"idx": 1\n[]\n{}\n' + good)
  out = tmp_path / 'out'
  with pytest.raises(ValueError) as raised:
    prepare('super_glue', str(cb), str(out))
  message = str(raised.value)
  assert message.startswith(f'1 of 2 could not be prepared (rte).\n{path}: 5 of 11 lines are bad:')
  for line in [
      "line 4: not UTF-8: 'utf-8' codec can't decode byte 0xff in position 13",
      'line 5: the line is empty',
      "line 6: not JSON: Expecting ',' delimiter at column ",
      'line 7: [] is no object',
      "line 8: no field 'hypothesis'",
      'Expected one JSON object a line with hypothesis, premise and label (of entailment, not_en',
  ]:
    assert line in message
  assert os.listdir(out) == ['super_glue'] and sorted(os.listdir(out / 'super_glue')) == [
      '.config', 'cb'
  ]  # fmt: skip


@pytest.mark.parametrize(
    ('change', 'reason'),
    [
        ({'label': 'maybe'}, "unknown label 'maybe', expected one of entailment, contradiction, n"),
        ({'label': 3}, r'unknown label 3, expected one of 0, 1, 2 \(or -1, no label\)'),
        ({'idx': True}, "'idx' is True, not a whole number"),
        ({'idx': 2**31}, "'idx' is 2147483648, more than 32 bits hold"),
        ({'premise': '\ud83d'}, "'premise' holds half of a surrogate pair, which is no text"),
    ],
)
def test_a_value_that_tfds_cannot_hold_is_refused(cb, prepare, tmp_path, change, reason):
  lines, _ = OFFICIAL['super_glue_cb_v102', 'CB/val.jsonl']
  write_official(tmp_path, 'CB/train.jsonl', [lines[0], lines[1] | change])
  with pytest.raises(ValueError, match=rf'CB/train\.jsonl, line 2: {reason}'):
    prepare('super_glue', str(cb), str(tmp_path / 'out'))
  assert not (tmp_path / 'out').exists()


def test_an_empty_file_is_refused(cb, prepare, tmp_path):
  (cb / 'CB' / 'val.jsonl').write_text('')
  with pytest.raises(ValueError, match=r"val\.jsonl, the file of the split 'validation', is empty"):
    prepare('super_glue', str(cb), str(tmp_path / 'out'))


def test_rows_that_share_an_id_are_all_kept_and_told_of(cb, prepare, vocabulary, tmp_path):
  lines, _ = OFFICIAL['super_glue_cb_v102', 'CB/val.jsonl']
  write_official(tmp_path, 'CB/train.jsonl', [*lines, lines[0]])
  out = str(tmp_path / 'out')
  with pytest.warns(UserWarning, match=r'2 of 3 examples share .* 0 \(lines 1, 3\)\. All'):
    prepare('super_glue', str(cb), out)
  assert len(load_task('super_glue_cb_v102', 'train', vocabulary, tfds_data_dir=out)) == 3


def test_rows_without_a_label_outside_of_test_sets_are_told_of(cb, prepare, tmp_path):
  lines, _ = OFFICIAL['super_glue_cb_v102', 'CB/val.jsonl']
  write_official(tmp_path, 'CB/train.jsonl', [lines[0], unlabelled(lines[1])])
  with pytest.warns(UserWarning, match=r"train\.jsonl: 1 of 2 rows of the split 'train' have no"):
    prepare('super_glue', str(cb), str(tmp_path / 'out'))


def test_a_folder_that_was_prepared_anew_is_tokenised_anew(cb, prepare, vocabulary, tmp_path):
  out, name = tmp_path / 'out', 'super_glue_cb_v102'
  lines, _ = OFFICIAL[name, 'CB/val.jsonl']
  prepare('super_glue', str(cb), str(out))
  old = load_task(name, 'train', vocabulary, tfds_data_dir=str(out))
  write_official(tmp_path, 'CB/train.jsonl', [line | {'label': 'entailment'} for line in lines])
  shutil.rmtree(out)
  prepare('super_glue', str(cb), str(out))
  new = load_task(name, 'train', vocabulary, tfds_data_dir=str(out))
  assert sorted(old.target(index) for index in range(2)) == [1, 2]
  assert [new.target(index) for index in range(2)] == [0, 0]


def test_another_folder_is_tokenised_anew(cb, prepare, vocabulary, tmp_path, monkeypatch):
  name = 'super_glue_cb_v102'
  prepare('super_glue', str(cb), str(tmp_path / 'out'))
  lines, _ = OFFICIAL[name, 'CB/val.jsonl']
  write_official(tmp_path, 'CB/train.jsonl', [line | {'label': 'entailment'} for line in lines])
  prepare('super_glue', str(cb), str(tmp_path / 'other'))
  write_official(tmp_path, 'CB/train.jsonl', lines[:1])
  monkeypatch.setenv('PTJ_LOCAL_DATA', str(tmp_path))
  assert len(load_task(name, 'train', vocabulary)) == 1
  monkeypatch.delenv('PTJ_LOCAL_DATA')
  found = [
      load_task(name, 'train', vocabulary, tfds_data_dir=str(tmp_path / folder))
      for folder in ('out', 'other')
  ]
  assert [sorted(task.target(n) for n in range(2)) for task in found] == [[1, 2], [0, 0]]


def test_the_pairs_of_axg_are_together_whatever_the_order_of_tfds(
    prepare, vocabulary, tmp_path
):
  (line,), _ = OFFICIAL['super_glue_axg_v102', 'AX-g/AX-g.jsonl']
  labels = ['entailment', 'not_entailment']
  lines = [line | {'idx': n, 'label': labels[n // 2 % 2]} for n in range(12)]
  write_official(tmp_path, 'AX-g/AX-g.jsonl', lines)
  prepare('super_glue', str(tmp_path / 'superglue'), str(tmp_path / 'out'))
  for name in ('super_glue_axg_v102', 'taskless_super_glue_axg_v102'):
    task = load_task(name, 'test', vocabulary, tfds_data_dir=str(tmp_path / 'out'))
    assert [task.example(index)['idx'] for index in range(12)] == [*range(12)]
    parity = task.metric_fns[0]
    targets = [task.target(index) for index in range(12)]
    # The first of every pair is called entailment, the other as it is.
    found = parity(targets, [target * (n % 2) for n, target in enumerate(targets)])
    assert found == {'gender_parity': 50.0}


# What is written is checked, complete, and never written over.


def contents(folder):
  return {
      str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
      for path in folder.rglob('*')
      if path.is_file()
  }


def test_a_folder_that_is_there_is_left_alone_if_it_is_equal(cb, prepare, tmp_path):
  out, said = tmp_path / 'out', []
  first = prepare('super_glue', str(cb), str(out))
  before = contents(out)
  again = prepare('super_glue', str(cb), str(out), say=said.append)
  assert contents(out) == before and len(before) > 4
  assert [(s.split, s.rows, s.num_bytes) for s in again] == [
      (s.split, s.rows, s.num_bytes) for s in first
  ]
  assert f'  {out}/super_glue/cb/1.0.2 is there already, and the same' in said


def test_a_folder_that_is_there_and_differs_is_refused(cb, prepare, tmp_path):
  out = tmp_path / 'out'
  prepare('super_glue', str(cb), str(out))
  before = contents(out)
  lines, _ = OFFICIAL['super_glue_cb_v102', 'CB/val.jsonl']
  folder = out / 'super_glue' / 'cb' / '1.0.2'
  for name, others, difference in [
      ('train', [*lines, lines[0] | {'idx': 2}], "split 'train' lacks 1 rows such as .*'idx': 2"),
      ('train', [lines[0], lines[1] | {'label': 0}], "split 'train' holds the row .*'label': 1"),
      ('test', lines, 'its splits are train, validation, those of the files train, validation, te'),
  ]:  # fmt: skip
    write_official(tmp_path, 'CB/train.jsonl', lines)
    write_official(tmp_path, f'CB/{name}.jsonl', others)
    for dry_run in (True, False):
      with pytest.raises(ValueError, match=rf'{folder} is there .* hold: .*{difference}.* Rem'):
        prepare('super_glue', str(cb), str(out), dry_run=dry_run)
  assert contents(out) == before


@pytest.mark.parametrize(
    'damage', ['dataset_info.json', 'super_glue-train.tfrecord-00000-of-00001']
)
def test_a_folder_that_is_there_and_damaged_is_refused(cb, prepare, tmp_path, damage):
  out = tmp_path / 'out'
  prepare('super_glue', str(cb), str(out))
  path = out / 'super_glue' / 'cb' / '1.0.2' / damage
  path.write_bytes(path.read_bytes()[:-20])
  with pytest.raises(ValueError, match=r'is there already .* cannot be read .*Remove that folder'):
    prepare('super_glue', str(cb), str(out))


def test_what_comes_back_otherwise_than_it_was_read_is_removed(cb, prepare, tmp_path, monkeypatch):
  from prompt_tuning_jax.tasks import prepare as module

  written = module._nested
  monkeypatch.setattr(
      module, '_nested', lambda row: written(row) | {'premise': row['premise'].upper()}
  )
  with pytest.raises(ValueError, match=r"is not what was read: the split 'train' holds .*ANN HAS"):
    prepare('super_glue', str(cb), str(tmp_path / 'out'))
  assert not (tmp_path / 'out').exists()


def test_an_interruption_leaves_nothing_half_written(cb, prepare, tmp_path, monkeypatch):
  from prompt_tuning_jax.tasks import prepare as module

  def interrupt(*args):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(module, '_difference', interrupt)
    with pytest.raises(KeyboardInterrupt):
      prepare('super_glue', str(cb), str(tmp_path / 'out'))
  assert not (tmp_path / 'out').exists()


def test_a_full_disk_is_named_and_leaves_nothing(cb, prepare, tmp_path, monkeypatch):
  import tensorflow as tf

  def write(self, record):
    raise tf.errors.ResourceExhaustedError(None, None, 'No space left on device')

  monkeypatch.setattr(tf.io.TFRecordWriter, 'write', write)
  out = tmp_path / 'out'
  with pytest.raises(OSError, match=rf'{out}: super_glue/cb:1.0.2 could not .*No space left on'):
    prepare('super_glue', str(cb), str(out))
  assert not out.exists()


KILLED = """
import os, signal, sys
from prompt_tuning_jax.data.seqio_source import import_seqio
import_seqio()
from prompt_tuning_jax.tasks import prepare
prepare._difference = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
prepare.prepare('super_glue', *sys.argv[1:])
"""


@pytest.mark.slow
def test_a_killed_run_leaves_no_folder_and_the_next_one_tidies_up(cb, prepare, tmp_path):
  out = tmp_path / 'out'
  killed = subprocess.run(
      [sys.executable, '-c', KILLED, str(cb), str(out)], capture_output=True, check=False
  )
  assert killed.returncode == -9, killed.stderr
  (left,) = os.listdir(out)
  assert left.startswith('.prepare-')
  # Of a process that still runs.
  mine = left.replace(left.split('-')[-2], str(os.getpid()))
  shutil.copytree(out / left, out / mine)
  said = []
  prepare('super_glue', str(cb), str(out), say=said.append)
  assert f'removing {left}, which an interrupted run left in {out}' in said
  assert sorted(os.listdir(out)) == [mine, 'super_glue']


def test_a_folder_that_cannot_be_written_is_named_before_files_are_read(cb, prepare, tmp_path):
  (tmp_path / 'file').touch()
  (cb / 'CB' / 'train.jsonl').write_text('nonsense')
  for out in ('file', 'file/below'):
    with pytest.raises(OSError, match=rf'--tfds_data_dir {tmp_path}/{out} cannot be written'):
      prepare('super_glue', str(cb), str(tmp_path / out))
  with pytest.raises(ValueError, match='gs://bucket/data is no folder of this machine'):
    prepare('super_glue', str(cb), 'gs://bucket/data')


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write anywhere')
def test_a_folder_without_permission_is_named(cb, prepare, tmp_path):
  (tmp_path / 'out').mkdir(mode=0o500)
  with pytest.raises(OSError, match='cannot be written: .*Permission denied'):
    prepare('super_glue', str(cb), str(tmp_path / 'out'))


# GLUE and DPR.


@pytest.mark.filterwarnings('ignore:.*lines lack a field')
@pytest.mark.parametrize('task', test_glue.FILES)
def test_glue_is_that_of_tfds_and_its_tasks_have_the_examples_of_the_local_files(
    prepare, vocabulary, tfds, tmp_path, monkeypatch, task
):
  file, header, lines, _ = test_glue.FILES[task]
  path = test_glue.write(tmp_path, file, header + lines)
  prepare('glue', str(tmp_path / 'glue'), str(tmp_path / 'out'), configs=[task])
  split = 'test' if task == 'ax' else 'validation'
  assert_same_examples(
      f'glue_{task}_v200', split, vocabulary, tmp_path, tmp_path / 'out', monkeypatch, tmp_path
  )
  # TFDS makes MRPC of other files.
  if task != 'mrpc':
    theirs = written_by_tfds(tfds, f'glue/{task}', {split: path}, tmp_path / 'theirs', split)
    assert_same_files(tmp_path / 'out' / 'glue' / task / '2.0.0', theirs)


def test_all_of_mnli_and_sst2_as_jsonl_are_prepared(prepare, tmp_path):
  file, header, lines, _ = test_glue.FILES['mnli_matched']
  for name in ('train', 'dev_matched', 'dev_mismatched', 'test_matched', 'test_mismatched'):
    test_glue.write(tmp_path, f'MNLI/{name}', header + lines)
  (tmp_path / 'sst2').mkdir()
  row = {'sentence': 'a fine film', 'label': 'positive', 'idx': 0}
  (tmp_path / 'sst2' / 'train.jsonl').write_text(json.dumps(row))
  done = prepare('glue', str(tmp_path), str(tmp_path / 'out'))
  assert {(split.config, split.split, split.rows) for split in done} == {
      ('sst2', 'train', 1), ('mnli', 'train', 2),
      ('mnli', 'validation_matched', 2), ('mnli', 'validation_mismatched', 2),
      ('mnli', 'test_matched', 2), ('mnli', 'test_mismatched', 2),
      ('mnli_matched', 'validation', 2), ('mnli_matched', 'test', 2),
      ('mnli_mismatched', 'validation', 2), ('mnli_mismatched', 'test', 2),
  }  # fmt: skip


def test_pronouns_are_those_of_tfds_and_of_the_local_files(
    prepare, vocabulary, tfds, tmp_path, monkeypatch
):
  (tmp_path / 'dpr').mkdir()
  files = {split: tmp_path / 'dpr' / f'{split}.c.txt' for split in ('train', 'test')}
  for path in files.values():
    path.write_text('\n'.join([*BEE, '', *ASK, '', '']))
  out, name = tmp_path / 'out', 'definite_pronoun_resolution'
  prepare(name, str(tmp_path / 'dpr'), str(out))
  theirs = written_by_tfds(tfds, name, files, tmp_path / 'theirs')
  assert_same_files(out / name / '1.1.0', theirs)
  for split in ('train', 'test'):
    assert_same_examples(
        'dpr_v001_simple', split, vocabulary, tmp_path, out, monkeypatch, tmp_path
    )


# The command.


def test_the_command_prepares_and_says_what(cb, tmp_path, capsys):
  argv = ['prepare', 'super_glue', f'--from={cb}', f'--tfds_data_dir={tmp_path}/out']
  assert cli.main([*argv, '--tasks=cb', '--dry_run']) == 0
  printed = capsys.readouterr().out
  assert 'cb      train                         2             –' in printed
  assert f'nothing was written; without --dry_run these go to {tmp_path}/out' in printed
  assert not (tmp_path / 'out').exists()
  assert cli.main(argv) == 0
  printed, errors = capsys.readouterr()
  # Not a word of TFDS's own.
  assert errors == '' and 'Downloading' not in printed
  assert 'total                                 4' in printed
  (cb / 'CB' / 'val.jsonl').write_text('nonsense\n')
  assert cli.main(argv) == 2
  assert 'val.jsonl, line 1: not JSON' in capsys.readouterr().err


# Real rows.


WIC = 'ignore:.*WiC/train.jsonl. 2 of 5,428 examples share their idx'


@pytest.fixture(scope='module')
def prepared_real(shared_data, prepare, tmp_path_factory):
  folder = tmp_path_factory.mktemp('tfds_real')
  done = prepare('super_glue', str(shared_data), str(folder))
  return folder, done


@pytest.mark.slow
@pytest.mark.filterwarnings(WIC)
@pytest.mark.parametrize(
    'task', ['super_glue_cb_v102', 'super_glue_copa_v102', 'super_glue_wsc_v102_simple_eval']
)
def test_tasks_have_all_real_examples(
    shared_data, prepared_real, vocabulary, monkeypatch, tmp_path, task
):
  for split in TASK_SPLITS[task]:
    if split != 'test':
      assert_same_examples(
          task, split, vocabulary, shared_data, prepared_real[0], monkeypatch, tmp_path
      )


@pytest.mark.slow
@pytest.mark.filterwarnings(WIC)
@pytest.mark.parametrize('config', CONFIGS)
def test_real_files_are_those_that_tfds_writes(shared_data, prepared_real, tfds, tmp_path, config):
  folder, done = prepared_real
  files = {
      split: shared_data / 'superglue' / CONFIGS[config] / f'{SPLITS[split]}.jsonl'
      for split in ('train', 'validation')
  }
  sizes = [split.rows for split in done if split.config == config]
  ours = folder / 'super_glue' / config / '1.0.2'
  if config == 'wic':
    # TFDS refuses a file in which two rows have the same idx.
    del files['train']
  theirs = written_by_tfds(tfds, f'super_glue/{config}', files, tmp_path, 'test')
  if config == 'wic':
    assert sizes == [5_428, 638]
    name = 'super_glue-validation.tfrecord-00000-of-00001'
    assert (ours / name).read_bytes() == (theirs / name).read_bytes()
  else:
    assert_same_files(ours, theirs)


def test_what_local_files_do_not_hold_as_a_whole_is_not_prepared(prepare, tmp_path):
  with pytest.raises(ValueError, match="No data set to prepare 'squad'. There are: "):
    prepare('squad', str(tmp_path), str(tmp_path / 'out'))
