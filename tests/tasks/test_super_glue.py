"""SuperGLUE reads as T5 writes it, character by character and id by id."""

import json

import pytest

from prompt_tuning_jax.data.cache import load_task, load_task_or_mixture
from prompt_tuning_jax.data.seqio_source import import_seqio
from prompt_tuning_jax.data.vocabulary import Vocabulary
from tests.saved_backbone import VOCABULARY
from tests.tasks import recorded
from tests.tasks.super_glue_samples import OFFICIAL, TASKS, write_official

UNSCORED = {'super_glue_wsc_v102_simple_train', 'dpr_v001_simple'}
DIAGNOSTICS = {
    'super_glue_axb_v102': ['matthews_corrcoef'], 'super_glue_axg_v102': ['accuracy']
}
# Names under which scores were recorded, with what stands around the name of the task.
SCORED_AS = ['{}_examples', 'taskless_{}_examples', 'taskless_{}']


pytestmark = pytest.mark.usefixtures('own_cache')


@pytest.mark.parametrize('task', TASKS)
def test_text_and_ids_equal_the_recorded_ones(golden, t5_vocabulary, task):
  word, split = TASKS[task]
  recorded.assert_recorded_text(golden, t5_vocabulary, task, split, word)


@pytest.mark.parametrize('form', SCORED_AS)
@pytest.mark.parametrize('task', sorted(TASKS.keys() - UNSCORED))
def test_predictions_score_as_the_recorded_ones(golden, t5_vocabulary, task, form):
  name, (_, split) = form.format(task), TASKS[task]
  is_diagnostic = split == 'test'
  cases = recorded.records(golden, 'metrics.jsonl', name)
  assert len(cases) == (0 if is_diagnostic and form == 'taskless_{}' else 5)
  of_form = name.removesuffix('_examples')
  loaded = recorded.recorded_task(golden, t5_vocabulary, of_form, split)
  for case in cases:
    found = recorded.assert_recorded_scores(case, loaded)
    # T5 does not score the diagnostics.
    names = DIAGNOSTICS[task] if is_diagnostic else case['metrics']
    assert list(found) == list(names) and bool(case['metrics']) != is_diagnostic


@pytest.mark.parametrize('which', ['training', 'test'])
def test_record_scores_as_the_variants_that_were_recorded_beside_it(
    golden, t5_vocabulary, which
):
  name = 'super_glue_record_v102'
  task = recorded.recorded_task(golden, t5_vocabulary, name, 'validation')
  cases = recorded.records(golden, 'metrics.jsonl', f'pr:{name}_{which}')
  assert len(cases) == 5
  for case in cases:
    recorded.assert_recorded_scores(case, task)


def test_no_recorded_task_of_super_glue_is_left_out(golden):
  for file in ('task_text.jsonl', 'metrics.jsonl'):
    lines = (golden / 'tasks' / file).read_text().splitlines()
    names = {json.loads(line)['task'] for line in lines}
    names = {name for name in names if 'super_glue' in name or 'dpr' in name}
    ours = {form.format(task) for task in TASKS for form in SCORED_AS}
    # What was recorded with `pr:` is ReCoRD cast as two other tasks.
    assert {name for name in names - ours if not name.startswith('pr:')} == set()


def test_bad_lines_of_an_official_file_are_named(t5_vocabulary, tmp_path, monkeypatch):
  path = tmp_path / 'superglue' / 'CB' / 'val.jsonl'
  path.parent.mkdir(parents=True)
  monkeypatch.setenv('PTJ_LOCAL_DATA', str(tmp_path))
  good = {'premise': 'p', 'hypothesis': 'h', 'label': 'neutral', 'idx': 0}
  for bad, reason in [
      ('nonsense', 'not JSON: Expecting value'),
      (json.dumps(good | {'label': 'maybe'}), "unknown label 'maybe'"),
      (json.dumps(good | {'label': 3}), 'unknown label 3'),
      (json.dumps({'premise': 'p', 'label': 'neutral'}), "no field 'hypothesis'"),
      (json.dumps(good | {'premise': None}), "'premise' is not a text"),
      (json.dumps(good | {'idx': 'a7'}), "'idx' is 'a7', not a whole number"),
  ]:
    path.write_text(json.dumps(good) + '\n' + bad + '\n')
    with pytest.raises(ValueError, match=rf'val\.jsonl, line 2: {reason}'):
      load_task('super_glue_cb_v102', 'validation', t5_vocabulary)


def write_cb(folder, name, labels):
  path = folder / 'superglue' / 'CB' / name
  path.parent.mkdir(parents=True, exist_ok=True)
  rows = [
      {'premise': f'p {i}', 'hypothesis': 'h', 'idx': i} | ({} if n is None else {'label': n})
      for i, n in enumerate(labels)
  ]
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return path


def test_an_empty_official_file_is_named_with_its_split(
    t5_vocabulary, tmp_path, monkeypatch
):
  monkeypatch.setenv('PTJ_LOCAL_DATA', str(tmp_path))
  path = write_cb(tmp_path, 'val.jsonl', [])
  with pytest.raises(ValueError, match="val.jsonl, the file of .* 'validation', is empty") as e:
    load_task('super_glue_cb_v102', 'validation', t5_vocabulary)
  assert str(path) in str(e.value)


def test_rows_without_a_label_are_counted_and_refused(t5_vocabulary, tmp_path, monkeypatch):
  monkeypatch.setenv('PTJ_LOCAL_DATA', str(tmp_path))
  train = write_cb(tmp_path, 'train.jsonl', ['neutral', 1, -1, None, 'entailment'])
  write_cb(tmp_path, 'val.jsonl', [-1, None])
  write_cb(tmp_path, 'test.jsonl', [None])
  task = load_task('super_glue_cb_v102', 'train', t5_vocabulary)
  with pytest.raises(ValueError, match='no label for 2 of its 5 .* first is example 2') as e:
    task.require_labels()
  assert f'Label them in {train}' in str(e.value)
  for split, remedy in [
      ('validation', 'Use other data, or write the labels into .*val.jsonl'),
      ('test', "Use another split, for example 'validation', or write .*test.jsonl"),
  ]:
    with pytest.raises(ValueError, match=f'has no labels .all . targets.* {remedy}'):
      load_task('super_glue_cb_v102', split, t5_vocabulary).require_labels()


def test_a_folder_that_does_not_exist_is_named(t5_vocabulary, tmp_path, monkeypatch):
  monkeypatch.setenv('PTJ_LOCAL_DATA', str(tmp_path / 'nowhere'))
  with pytest.raises(FileNotFoundError, match='PTJ_LOCAL_DATA=.*nowhere is not a folder'):
    load_task('super_glue_cb_v102', 'validation', t5_vocabulary)


def test_without_files_and_network_the_error_says_what_to_set(
    t5_vocabulary, tmp_path, monkeypatch
):
  from prompt_tuning_jax.data import seqio_source

  seqio_source.import_seqio()
  from prompt_tuning_jax.tasks import sources

  monkeypatch.delenv('PTJ_LOCAL_DATA', raising=False)
  monkeypatch.setattr(sources, '_is_offline', lambda: True)
  with pytest.raises(ConnectionError, match=r'PTJ_LOCAL_DATA .*superglue/CB/val\.jsonl'):
    load_task(
        'super_glue_cb_v102', 'validation', t5_vocabulary, tfds_data_dir=str(tmp_path)
    )


def tfds_features(tfds, row):
  """The features of TFDS's own builder: every number has 32 bits but the label."""
  import tensorflow as tf

  def feature(name, value):
    if isinstance(value, dict):
      return {key: feature(key, part) for key, part in value.items()}
    if isinstance(value, list):
      return tfds.features.Sequence(tfds.features.Text())
    if name == 'label':
      return tfds.features.ClassLabel(num_classes=3)
    return tfds.features.Text() if isinstance(value, str) else tf.int32

  return tfds.features.FeaturesDict(feature('', row))


@pytest.mark.slow
@pytest.mark.parametrize(
    ('config', 'task'),
    [
        ('cb', 'super_glue_cb_v102'),
        ('multirc', 'super_glue_multirc_v102'),
        ('record', 'super_glue_record_v102'),
        ('wsc.fixed', 'super_glue_wsc_v102_simple_eval'),
    ],
)
def test_a_prepared_tfds_folder_gives_the_same_examples(
    golden, t5_vocabulary, tmp_path, monkeypatch, config, task
):
  import_seqio()
  import tensorflow as tf
  import tensorflow_datasets as tfds

  (record,) = recorded.records(golden, 'task_text.jsonl', f'taskless_{task}')
  rows = record['raw']
  tfds.dataset_builders.store_as_tfds_dataset(
      name='super_glue',
      config=config,
      version='1.0.2',
      data_dir=tmp_path / 'tfds',
      split_datasets={
          'validation': tf.data.Dataset.from_generator(
              lambda: rows, output_signature=recorded.signature(rows[0])
          )
      },
      features=tfds_features(tfds, rows[0]),
      disable_shuffling=True,
  )
  monkeypatch.delenv('PTJ_LOCAL_DATA', raising=False)
  loaded = load_task(
      f'taskless_{task}', 'validation', t5_vocabulary, tfds_data_dir=str(tmp_path / 'tfds')
  )
  assert len(loaded) == len(record['outputs'])
  for index, expected in enumerate(record['outputs']):
    assert loaded[index]['inputs'].tolist() == expected['inputs']
    assert loaded[index]['targets'].tolist() == expected['targets']
    assert loaded.example(index).items() <= expected.items()


def samples_on_disk(folder, monkeypatch):
  monkeypatch.setenv('PTJ_LOCAL_DATA', str(folder))
  for (task, file), (lines, _) in OFFICIAL.items():
    write_official(folder, file, lines)
    if TASKS[task][1] == 'validation' and not file.startswith('WSC'):
      write_official(folder, file.replace('val', 'train'), lines)
  (folder / 'dpr').mkdir()
  (folder / 'dpr' / 'train.c.txt').write_text('He sat, for he fell.\nhe\nHe, Bob\nHe\n')


@pytest.mark.parametrize('prefix', ['', 'taskless_'])
def test_wsc_trains_on_true_referents_and_is_evaluated_on_all(
    tmp_path, monkeypatch, prefix
):
  samples_on_disk(tmp_path, monkeypatch)
  vocabulary, name = Vocabulary(VOCABULARY), f'{prefix}super_glue_wsc_and_dev_v102_simple'
  ((train, _),) = load_task_or_mixture(name, 'train', vocabulary)
  ((dev, _),) = load_task_or_mixture(name, 'validation', vocabulary)
  assert train.name == f'{prefix}super_glue_wsc_v102_simple_train' and len(train) == 2
  assert dev.name == f'{prefix}super_glue_wsc_v102_simple_eval' and len(dev) == 3
  with pytest.raises(ValueError, match="no split 'validation'.* Its splits: train"):
    load_task(train.name, 'validation', vocabulary)


@pytest.mark.slow
@pytest.mark.parametrize('prefix', ['', 'taskless_'])
def test_the_mixture_of_all_tasks_has_the_rates_of_t5(tmp_path, monkeypatch, prefix):
  samples_on_disk(tmp_path, monkeypatch)
  vocabulary, name = Vocabulary(VOCABULARY), f'{prefix}super_glue_v102_proportional'
  rates = {
      task.name: rate for task, rate in load_task_or_mixture(name, 'train', vocabulary)
  }
  assert rates == {
      f'{prefix}dpr_v001_simple': 1322,
      f'{prefix}super_glue_wsc_v102_simple_train': 259,
      f'{prefix}super_glue_boolq_v102': 9427,
      f'{prefix}super_glue_cb_v102': 250,
      f'{prefix}super_glue_copa_v102': 400,
      f'{prefix}super_glue_multirc_v102': 27243,
      f'{prefix}super_glue_record_v102': 138854,
      f'{prefix}super_glue_rte_v102': 2490,
      f'{prefix}super_glue_wic_v102': 5428,
  }
  dev = {task.name for task, _ in load_task_or_mixture(name, 'validation', vocabulary)}
  assert dev == {
      f'{prefix}super_glue_{task}'
      for task in (
          'boolq_v102', 'cb_v102', 'copa_v102', 'multirc_v102', 'record_v102', 'rte_v102',
          'wic_v102', 'wsc_v102_simple_eval',
      )
  }  # fmt: skip


def test_a_task_whose_file_is_missing_is_not_left_out_of_a_mixture(tmp_path, monkeypatch):
  samples_on_disk(tmp_path, monkeypatch)
  (tmp_path / 'superglue' / 'CB' / 'train.jsonl').unlink()
  with pytest.raises(ValueError, match="super_glue_cb_v102 has no split 'train'.*validation"):
    load_task_or_mixture('super_glue_v102_proportional', 'train', Vocabulary(VOCABULARY))
