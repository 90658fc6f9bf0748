"""SuperGLUE reads as T5 writes it, character by character and id by id."""

import json

import pytest

from prompt_tuning_jax.data.cache import load_task
from prompt_tuning_jax.data.vocabulary import Vocabulary
from tests.tasks.recorded import assert_recorded_examples

FOLDERS = {'cb': 'CB', 'rte': 'RTE'}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
  monkeypatch.setenv('PTJ_CACHE_DIR', str(tmp_path / 'cache'))


@pytest.fixture
def t5_vocabulary(shared_data):
  return Vocabulary(shared_data / 't5' / 'spiece.model')


@pytest.mark.parametrize('task', FOLDERS)
def test_text_and_ids_equal_the_recorded_ones(
    golden, t5_vocabulary, tmp_path, monkeypatch, task
):
  assert_recorded_examples(
      golden, t5_vocabulary, tmp_path, monkeypatch,
      f'super_glue_{task}_v102', f'superglue/{FOLDERS[task]}/val.jsonl', task,
  )  # fmt: skip


@pytest.mark.parametrize(
    ('task', 'split', 'size', 'first_target'),
    [('cb', 'train', 250, 0), ('cb', 'validation', 56, 1), ('rte', 'validation', 277, 1)],
)
def test_the_official_files_are_read(
    shared_data, t5_vocabulary, monkeypatch, task, split, size, first_target
):
  monkeypatch.setenv('PTJ_LOCAL_DATA', str(shared_data))
  loaded = load_task(f'taskless_super_glue_{task}_v102', split, t5_vocabulary)
  assert len(loaded) == size
  assert loaded.target(0) == first_target
  file = {'train': 'train', 'validation': 'val'}[split]
  with open(shared_data / 'superglue' / FOLDERS[task] / f'{file}.jsonl') as lines:
    rows = [json.loads(line) for line in lines]
  for index, row in enumerate(rows):
    example = loaded.example(index)
    text = f'hypothesis: {row["hypothesis"]} premise: {row["premise"]}'
    assert example['inputs_pretokenized'] == text
    assert loaded.label_classes[loaded.target(index)] == row['label']
    assert example['idx'] == row['idx']


def test_cb_is_scored_by_accuracy_and_the_mean_f1_of_its_classes(
    golden, t5_vocabulary, shared_data, monkeypatch
):
  monkeypatch.setenv('PTJ_LOCAL_DATA', str(shared_data))
  task = load_task('super_glue_cb_v102', 'validation', t5_vocabulary)
  checked = 0
  with open(golden / 'tasks' / 'metrics.jsonl') as file:
    for line in file:
      recorded = json.loads(line)
      if recorded['task'] != 'taskless_super_glue_cb_v102':
        continue
      predictions = [task.postprocess_fn(text) for text in recorded['predictions']]
      assert predictions == recorded['predictions_post']
      scores = {}
      for metric in task.metric_fns:
        scores |= metric(recorded['targets_post'], predictions)
      assert scores == pytest.approx(recorded['metrics'], abs=1e-9)
      checked += 1
  assert checked >= 5


def test_bad_lines_of_an_official_file_are_named(t5_vocabulary, tmp_path, monkeypatch):
  path = tmp_path / 'superglue' / 'CB' / 'val.jsonl'
  path.parent.mkdir(parents=True)
  monkeypatch.setenv('PTJ_LOCAL_DATA', str(tmp_path))
  good = {'premise': 'p', 'hypothesis': 'h', 'label': 'neutral', 'idx': 0}
  for bad, reason in [
      ('nonsense', 'Expecting value'),
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


@pytest.mark.slow
def test_a_prepared_tfds_folder_gives_the_same_examples(
    golden, t5_vocabulary, tmp_path, monkeypatch
):
  from prompt_tuning_jax.data import seqio_source

  seqio_source.import_seqio()
  import tensorflow as tf
  import tensorflow_datasets as tfds

  with open(golden / 'tasks' / 'task_text.jsonl') as file:
    recorded = next(
        r for r in map(json.loads, file) if r['task'] == 'taskless_super_glue_cb_v102'
    )
  columns = {key: [row[key] for row in recorded['raw']] for key in recorded['raw'][0]}
  tfds.dataset_builders.store_as_tfds_dataset(
      name='super_glue',
      config='cb',
      version='1.0.2',
      data_dir=tmp_path / 'tfds',
      split_datasets={'validation': tf.data.Dataset.from_tensor_slices(columns)},
      features=tfds.features.FeaturesDict({
          'premise': tfds.features.Text(),
          'hypothesis': tfds.features.Text(),
          'label': tfds.features.ClassLabel(num_classes=3),
          'idx': tf.int32,
      }),
      disable_shuffling=True,
  )
  monkeypatch.delenv('PTJ_LOCAL_DATA', raising=False)
  task = load_task(
      'taskless_super_glue_cb_v102', 'validation', t5_vocabulary,
      tfds_data_dir=str(tmp_path / 'tfds'),
  )  # fmt: skip
  for index, expected in enumerate(recorded['outputs']):
    assert task[index]['inputs'].tolist() == expected['inputs']
    assert task[index]['targets'].tolist() == expected['targets']
