"""Tokenised tasks survive the disk, and nothing damaged, old or bad passes silently."""

import functools
import gzip
import json
import os
import subprocess
import sys
import textwrap
import warnings

import numpy as np
import pytest

from prompt_tuning_jax.data import functions, provenance, text_files
from prompt_tuning_jax.data.cache import (
    FORMAT,
    CacheError,
    TokenizedTask,
    cache_path,
    load_task,
    load_task_or_mixture,
)
from prompt_tuning_jax.data.vocabulary import Vocabulary
from prompt_tuning_jax.evaluation import metrics, postprocessors

EXAMPLES = [
    {'inputs': 'a small animal', 'targets': 'animal', 'idx': np.int32(7), 'note': b'caf\xc3\xa9'},
    {'inputs': 'the sweet fruit of a tree', 'targets': 'food', 'idx': np.int32(8), 'note': b''},
    {'inputs': 'part of the body', 'targets': 'animal', 'idx': np.int32(9), 'note': b'x'},
]


@pytest.fixture
def task(vocabulary):
  return TokenizedTask.from_examples(
      EXAMPLES, vocabulary, name='kinds', split='dev', label_classes=['animal', 'food']
  )


def assert_same_task(left, right):
  assert len(left) == len(right)
  assert left.manifest == right.manifest
  for index in range(len(left)):
    for feature in left.features:
      np.testing.assert_array_equal(left[index][feature], right[index][feature])
    assert left.example(index) == right.example(index)
    assert left.target(index) == right.target(index)


def test_texts_become_ids_with_end_of_sequence_and_raw_fields_stay(task, vocabulary):
  ids = task[1]['inputs']
  assert ids.dtype == np.int32
  assert ids.tolist() == [*vocabulary.encode('the sweet fruit of a tree'), 1]
  assert task.example(0) == {
      'idx': 7,
      'note': 'café',
      'inputs_pretokenized': 'a small animal',
      'targets_pretokenized': 'animal',
  }
  assert [task.target(i) for i in range(3)] == [0, 1, 0]


def test_a_task_read_back_from_its_file_is_the_same(task, vocabulary, tmp_path):
  path = tmp_path / 'kinds.safetensors'
  task.save(path)
  again = TokenizedTask.read(path, vocabulary)
  assert_same_task(again, task)
  assert again.label_classes == ['animal', 'food']
  assert again.postprocess_fn('food', example={}, is_target=False) == 1
  (metric,) = again.metric_fns
  assert metric([0, 1, 0, 1], [0, 1, 1, 1]) == {'accuracy': 75.0}
  assert os.listdir(tmp_path) == ['kinds.safetensors']


def test_lengths_tell_what_a_limit_would_cut(vocabulary):
  task = TokenizedTask.from_examples(
      [{'inputs': [5] * n, 'targets': [1]} for n in (3, 9, 4, 4)], vocabulary
  )
  assert task.longest('inputs') == 9
  assert task.share_longer_than('inputs', 3) == 0.75
  assert task.share_longer_than('inputs', 9) == 0.0
  with pytest.raises(ValueError, match="no feature 'input'; it has inputs, targets"):
    task.longest('input')


def test_examples_beyond_the_end_are_an_index_error(task):
  for index in (3, -1):
    with pytest.raises(IndexError, match='has examples 0 to 2'):
      task[index]


@pytest.mark.parametrize('place', [0.3, 0.6, 0.99])
def test_a_flipped_bit_anywhere_is_noticed_and_the_file_named(
    task, vocabulary, tmp_path, place
):
  path = tmp_path / 'kinds.safetensors'
  task.save(path)
  content = bytearray(path.read_bytes())
  content[int(place * len(content))] ^= 1
  path.write_bytes(content)
  with pytest.raises(CacheError, match=r'kinds\.safetensors'):
    TokenizedTask.read(path, vocabulary)


@pytest.mark.parametrize('kept', [0, 5, 0.5, 0.999])
def test_a_truncated_file_is_noticed_and_named(task, vocabulary, tmp_path, kept):
  path = tmp_path / 'kinds.safetensors'
  task.save(path)
  content = path.read_bytes()
  path.write_bytes(content[: kept if kept >= 1 else int(kept * len(content))])
  with pytest.raises(CacheError, match=r'kinds\.safetensors is truncated'):
    TokenizedTask.read(path, vocabulary)


def test_ids_of_another_vocabulary_are_refused(task, vocabulary, tmp_path):
  path = tmp_path / 'kinds.safetensors'
  task.save(path)
  other = Vocabulary(vocabulary.path, extra_ids=10)
  with pytest.raises(CacheError, match='ids of another vocabulary.*4,100 ids.*4,010 ids'):
    TokenizedTask.read(path, other)


def test_no_examples_or_a_missing_feature_is_an_error(vocabulary):
  with pytest.raises(ValueError, match="empty, split 'train', has no examples"):
    TokenizedTask.from_examples([], vocabulary, name='empty')
  with pytest.raises(ValueError, match="Example 1 of examples has no 'targets'; it has 'inputs'"):
    TokenizedTask.from_examples([EXAMPLES[0], {'inputs': 'x'}], vocabulary)


def test_a_cache_in_a_bucket_is_refused_before_anything_is_tokenised(
    vocabulary, monkeypatch, tmp_path
):
  path = tmp_path / 'a.txt'
  path.write_text('a small animal\n')
  with pytest.raises(ValueError, match='gs://b/c is not on this machine'):
    TokenizedTask.from_text_files(path, vocabulary, cache_dir='gs://b/c')
  monkeypatch.setenv('PTJ_CACHE_DIR', 'gs://b/d')
  with pytest.raises(ValueError, match='gs://b/d is not on this machine'):
    TokenizedTask.from_text_files(path, vocabulary)


def test_a_file_of_the_format_before_is_refused_with_both_numbers(
    task, vocabulary, tmp_path
):
  """It does not say how many labels are missing."""
  del task.manifest['unlabelled']
  task.manifest |= {'format': 1, 'has_labels': True}
  task.save(tmp_path / 'old')
  with pytest.raises(CacheError, match=f'old has format 1; .* reads format {FORMAT}'):
    TokenizedTask.read(tmp_path / 'old', vocabulary)


def test_metrics_that_a_file_cannot_name_work_until_it_is_read_back(vocabulary, tmp_path):
  task = TokenizedTask.from_examples(
      EXAMPLES, vocabulary, name='odd', metric_fns=[lambda targets, predictions: {'n': 3}]
  )
  assert task.metric_fns[0]([], []) == {'n': 3}
  task.save(tmp_path / 'odd')
  again = TokenizedTask.read(tmp_path / 'odd', vocabulary)
  with pytest.raises(ValueError, match='odd uses .*lambda.*not part of this library'):
    again.metric_fns  # noqa: B018


@pytest.mark.parametrize(
    'name',
    [
        'os:system',
        'subprocess:run',
        'prompt_tuning_jax_evil:run',
        'prompt_tuning_jax.data.cache:main',
        'prompt_tuning_jax.evaluation.metrics:np',
        'prompt_tuning_jax.evaluation.metrics:collections.abc.Callable',
        'prompt_tuning_jax.evaluation.metrics:Callable',
        'prompt_tuning_jax.evaluation.postprocessors:no_such_function',
        'prompt_tuning_jax.evaluation.no_such_module:accuracy',
    ],
)
def test_a_file_cannot_name_code_to_run(name):
  with pytest.raises(ValueError, match='prompt_tuning_jax'):
    functions.resolve({'function': name, 'kwargs': {}})


def test_library_functions_come_back_from_their_description():
  assert functions.resolve(functions.describe(metrics.accuracy)) is metrics.accuracy
  assert functions.describe(None) is None
  to_class = functools.partial(
      postprocessors.string_label_to_class_id, label_classes=('no', 'yes')
  )
  again = functions.resolve(json.loads(json.dumps(functions.describe(to_class))))
  assert again('yes') == 1
  assert again('Yes') == -1


def test_functions_that_cannot_be_described_say_why():
  for function, problem in [
      (lambda targets, predictions: {}, 'not a function at the top level'),
      (functools.partial(metrics.accuracy, [1]), 'positional arguments'),
      (functools.partial(metrics.accuracy, targets={1}), 'JSON cannot hold'),
      (functools.partial(metrics.accuracy, targets={1: 2}), 'JSON cannot hold'),
  ]:
    description = functions.describe(function)
    assert problem in description['problem']
    with pytest.raises(ValueError, match='not a function of'):
      functions.resolve(description)


TEXT = 'first document\n\nsecond one, longer\n   \nthird\n'


def test_text_files_are_documents_that_end_in_end_of_sequence(vocabulary, tmp_path):
  path = tmp_path / 'corpus.txt'
  path.write_text(TEXT)
  with pytest.warns(UserWarning, match=r'2 of 5 lines of corpus were skipped: .*line 2: empty'):
    task = TokenizedTask.from_text_files(path, vocabulary)
  assert task.name == 'corpus'
  assert task.features == ('targets',)
  texts = ['first document', 'second one, longer', 'third']
  assert [task[i]['targets'].tolist() for i in range(len(task))] == [
      [*vocabulary.encode(text), 1] for text in texts
  ]
  assert task.example(0) == {}


def test_several_text_files_follow_each_other(vocabulary, tmp_path):
  for name in ('a', 'b'):
    (tmp_path / f'{name}.txt').write_text(f'text {name}\n')
  task = TokenizedTask.from_text_files([tmp_path / 'b.txt', tmp_path / 'a.txt'], vocabulary)
  assert [vocabulary.decode(task[i]['targets']) for i in range(2)] == ['text b', 'text a']


def test_text_is_tokenised_once_and_again_when_the_file_changes(
    vocabulary, tmp_path, monkeypatch
):
  path = tmp_path / 'corpus.txt'
  path.write_text('one\ntwo\n')
  calls = []
  tokenize = text_files.tokenize
  monkeypatch.setattr(
      text_files, 'tokenize', lambda *args: calls.append(1) or tokenize(*args)
  )
  first = TokenizedTask.from_text_files(path, vocabulary)
  again = TokenizedTask.from_text_files(path, vocabulary)
  assert len(calls) == 1
  np.testing.assert_array_equal(again[1]['targets'], first[1]['targets'])
  # The same content with another time, as a copy or a checkout has it.
  os.utime(path, (1, 1))
  TokenizedTask.from_text_files(path, vocabulary)
  assert len(calls) == 1
  path.write_text('one\nsix\n')
  changed = TokenizedTask.from_text_files(path, vocabulary)
  assert len(calls) == 2
  assert vocabulary.decode(changed[1]['targets']) == 'six'


def test_bad_lines_are_reported_again_when_they_come_from_the_cache(vocabulary, tmp_path):
  path = tmp_path / 'corpus.txt'
  path.write_text(TEXT)
  for _ in range(2):
    with pytest.warns(UserWarning, match='2 of 5 lines'):
      TokenizedTask.from_text_files(path, vocabulary)


def test_a_damaged_cache_of_a_text_file_is_made_again(vocabulary, tmp_path, cache_dir):
  path = tmp_path / 'corpus.txt'
  path.write_text('one\n')
  TokenizedTask.from_text_files(path, vocabulary)
  (cached,) = cache_dir.glob('*/*.safetensors')
  cached.write_bytes(cached.read_bytes()[:-1])
  with pytest.warns(UserWarning, match='truncated.*made again'):
    task = TokenizedTask.from_text_files(path, vocabulary)
  assert vocabulary.decode(task[0]['targets']) == 'one'
  assert len(TokenizedTask.from_text_files(path, vocabulary)) == 1


def test_bad_lines_of_jsonl_are_counted_and_named(vocabulary, tmp_path):
  path = tmp_path / 'pairs.jsonl'
  good = json.dumps({'inputs': 'a b', 'targets': 'c', 'other': 1})
  bad = [
      'not json',
      '[1, 2]',
      '{"inputs": "x"}',
      '{"inputs": "x", "targets": ""}',
      '{"inputs": 3, "targets": "y"}',
      '',
  ]
  path.write_bytes('\n'.join([good, *bad]).encode() + b'\n\xff\xfe\n' + good.encode())
  with pytest.warns(UserWarning) as warned:
    task = TokenizedTask.from_jsonl(path, vocabulary)
  text = str(warned[0].message)
  assert text.startswith('7 of 9 lines of pairs were skipped')
  for number, reason in [
      (2, 'not JSON'),
      (3, 'not a JSON object'),
      (4, "no 'targets'"),
      (5, "'targets' is empty"),
      (6, "'inputs' is not a text"),
  ]:
    assert f'line {number}: {reason}' in text
  assert len(task) == 2
  assert task[0]['inputs'].tolist() == [*vocabulary.encode('a b'), 1]
  assert task.example(1) == {'inputs_pretokenized': 'a b', 'targets_pretokenized': 'c'}
  assert task.target(0) == 'c'


def test_gzipped_files_are_read(vocabulary, tmp_path):
  path = tmp_path / 'pairs.jsonl.gz'
  with gzip.open(path, 'wt') as file:
    file.write(json.dumps({'inputs': 'a', 'targets': 'b'}) + '\n')
  assert TokenizedTask.from_jsonl(path, vocabulary).target(0) == 'b'


def test_files_without_one_good_line_and_missing_files_are_errors(vocabulary, tmp_path):
  path = tmp_path / 'bad.jsonl'
  path.write_text('nonsense\n')
  with pytest.raises(ValueError, match=r'bad\.jsonl: no line can be used.*line 1: not JSON'):
    TokenizedTask.from_jsonl(path, vocabulary)
  path.write_text('')
  with pytest.raises(ValueError, match='has no lines'):
    TokenizedTask.from_text_files(path, vocabulary)
  with pytest.raises(FileNotFoundError, match=r'nowhere\.txt'):
    TokenizedTask.from_text_files(tmp_path / 'nowhere.txt', vocabulary)


def test_a_cache_that_cannot_be_written_costs_a_warning_only(vocabulary, tmp_path):
  (tmp_path / 'corpus.txt').write_text('one\n')
  blocked = tmp_path / 'file'
  blocked.write_text('')
  with pytest.warns(UserWarning, match='cannot be kept at .*PTJ_CACHE_DIR'):
    task = TokenizedTask.from_text_files(
        tmp_path / 'corpus.txt', vocabulary, cache_dir=str(blocked)
    )
  assert len(task) == 1


@pytest.fixture
def without_seqio(monkeypatch):
  for name in ('seqio', 'tensorflow', 'tensorflow_datasets'):
    monkeypatch.setitem(sys.modules, name, None)


def put_in_cache(task, vocabulary):
  path = cache_path(task.name, task.split, vocabulary)
  task.save(path)
  return path


def test_a_cached_task_loads_where_seqio_is_not_installed(task, vocabulary, without_seqio):
  put_in_cache(task, vocabulary)
  assert_same_task(load_task('kinds', 'dev', vocabulary), task)
  ((loaded, rate),) = load_task_or_mixture('kinds', 'dev', vocabulary)
  assert (len(loaded), rate) == (3, 1.0)


def test_without_seqio_a_missing_cache_names_the_file_and_the_command(
    vocabulary, without_seqio
):
  with pytest.raises(FileNotFoundError) as error:
    load_task('kinds', 'dev', vocabulary)
  assert cache_path('kinds', 'dev', vocabulary) in str(error.value)
  assert 'python -m prompt_tuning_jax.data.cache kinds dev --vocabulary=' in str(error.value)


def test_without_seqio_a_damaged_or_old_cache_is_an_error(
    vocabulary, without_seqio, tmp_path
):
  source = tmp_path / 'source.txt'
  source.write_text('abc')
  task = TokenizedTask.from_examples(
      EXAMPLES, vocabulary, name='kinds', split='dev',
      source=provenance.describe_files([str(source)]),
      code=provenance.describe_modules(['prompt_tuning_jax.data.order']),
  )  # fmt: skip
  path = put_in_cache(task, vocabulary)
  assert len(load_task('kinds', 'dev', vocabulary)) == 3
  source.write_text('abd')
  with pytest.raises(CacheError, match=r'out of date: .*source\.txt was changed'):
    load_task('kinds', 'dev', vocabulary)
  source.unlink()
  assert len(load_task('kinds', 'dev', vocabulary)) == 3
  task.manifest['code']['prompt_tuning_jax.data.order'] = '0' * 64
  task.save(path)
  with pytest.raises(CacheError, match=r'module prompt_tuning_jax\.data\.order .* was changed'):
    load_task('kinds', 'dev', vocabulary)
  with open(path, 'r+b') as file:
    file.truncate(100)
  with pytest.raises(CacheError, match='truncated'):
    load_task('kinds', 'dev', vocabulary)


def test_official_files_that_turn_up_later_replace_what_came_from_tfds(
    vocabulary, without_seqio, tmp_path, monkeypatch
):
  task = TokenizedTask.from_examples(
      EXAMPLES, vocabulary, name='kinds', split='dev',
      source=provenance.describe_tfds('kinds:1.0.0', ['kinds/dev.jsonl']),
  )  # fmt: skip
  put_in_cache(task, vocabulary)
  monkeypatch.setenv('PTJ_LOCAL_DATA', str(tmp_path))
  assert len(load_task('kinds', 'dev', vocabulary)) == 3
  (tmp_path / 'kinds').mkdir()
  (tmp_path / 'kinds' / 'dev.jsonl').write_text('{}')
  with pytest.raises(CacheError, match=r'made from kinds:1\.0\.0, but PTJ_LOCAL_DATA'):
    load_task('kinds', 'dev', vocabulary)


def kinds_of_tfds(folder, text):
  """The one file of a data set in a folder of TFDS."""
  path = folder / 'kinds' / '1.0.0' / 'kinds-dev.tfrecord-00000-of-00001'
  path.parent.mkdir(parents=True)
  path.write_text(text)
  return str(path)


def test_a_folder_of_tfds_with_other_data_is_not_answered_from_the_cache(
    vocabulary, without_seqio, tmp_path
):
  read = kinds_of_tfds(tmp_path / 'read', 'rows')
  task = TokenizedTask.from_examples(
      EXAMPLES, vocabulary, name='kinds', split='dev',
      source=provenance.describe_tfds('kinds:1.0.0', ['kinds/dev.jsonl'], [read]),
  )  # fmt: skip
  put_in_cache(task, vocabulary)
  kinds_of_tfds(tmp_path / 'equal', 'rows')
  (tmp_path / 'without_it').mkdir()
  for name in ('read', 'equal', 'without_it'):
    assert len(load_task('kinds', 'dev', vocabulary, tfds_data_dir=str(tmp_path / name))) == 3
  kinds_of_tfds(tmp_path / 'longer', 'more rows')
  kinds_of_tfds(tmp_path / 'of_one_size', 'cows')
  (tmp_path / 'without_split' / 'kinds' / '1.0.0').mkdir(parents=True)
  for name, change in [
      ('longer', 'has 9 bytes, was 4'),
      ('of_one_size', 'was changed'),
      ('without_split', 'does not have'),
  ]:
    with pytest.raises(CacheError, match=rf'out of date: .*{name}.* {change}'):
      load_task('kinds', 'dev', vocabulary, tfds_data_dir=str(tmp_path / name))


def test_a_folder_of_tfds_replaces_local_files_that_are_no_longer_named(
    vocabulary, without_seqio, tmp_path, monkeypatch
):
  local = tmp_path / 'local' / 'kinds' / 'dev.jsonl'
  local.parent.mkdir(parents=True)
  local.write_text('{}')
  names = ['kinds/dev.jsonl', 'kinds/dev.jsonl.gz']
  task = TokenizedTask.from_examples(
      EXAMPLES, vocabulary, name='kinds', split='dev',
      source=provenance.describe_local('kinds:1.0.0', {names[0]: str(local)}, [names]),
  )  # fmt: skip
  put_in_cache(task, vocabulary)
  assert len(load_task('kinds', 'dev', vocabulary, tfds_data_dir=str(tmp_path))) == 3
  kinds_of_tfds(tmp_path, 'rows')
  with pytest.raises(CacheError, match=r'made from .*dev\.jsonl, but .*kinds/1\.0\.0 is read now'):
    load_task('kinds', 'dev', vocabulary, tfds_data_dir=str(tmp_path))
  monkeypatch.setenv('PTJ_LOCAL_DATA', str(tmp_path / 'local'))
  assert len(load_task('kinds', 'dev', vocabulary, tfds_data_dir=str(tmp_path))) == 3


def test_splits_that_are_slices_have_files_of_their_own(vocabulary):
  paths = {cache_path('t', split, vocabulary) for split in ('train', 'train[:9%]', 'a/b')}
  assert len(paths) == 3
  assert len({os.path.dirname(path) for path in paths}) == 1


def test_training_and_scoring_run_from_the_cache_without_tensorflow(task, vocabulary):
  """In a process of its own, where importing seqio or TensorFlow fails."""
  put_in_cache(task, vocabulary)
  program = textwrap.dedent(f"""
      import sys
      for name in ('seqio', 'tensorflow', 'tensorflow_datasets', 'tensorflow_text', 'gin'):
        sys.modules[name] = None
      from prompt_tuning_jax.data.batches import EvalBatches, TrainBatches
      from prompt_tuning_jax.data.cache import load_task_or_mixture
      from prompt_tuning_jax.data.vocabulary import Vocabulary

      vocabulary = Vocabulary({vocabulary.path!r})
      tasks = load_task_or_mixture('kinds', 'dev', vocabulary)
      model = dict(
          feature_lengths={{'inputs': 16, 'targets': 4}}, vocab_size=4224,
          num_virtual_tokens=5)
      batch = TrainBatches(tasks, 2, **model)[3]
      assert batch.encoder_input_tokens.shape == (2, 21)
      task = tasks[0][0]
      rows = [int(row) for _, rows in EvalBatches(task, 2, **model) for row in rows]
      targets = [task.target(row) for row in rows]
      predictions = [task.postprocess_fn('animal', example=task.example(r)) for r in rows]
      for metric in task.metric_fns:
        print(metric(targets, predictions))
  """)
  result = subprocess.run(
      [sys.executable, '-W', 'error', '-c', program], capture_output=True, text=True
  )
  assert result.returncode == 0, result.stderr
  assert result.stdout.strip() == str(metrics.accuracy([0, 1, 0], [0, 0, 0]))


def test_importing_the_cache_imports_neither_seqio_nor_jax():
  program = (
      'import sys, prompt_tuning_jax.data.cache\n'
      "print([n for n in ('jax', 'seqio', 'tensorflow', 'gin') if n in sys.modules])"
  )
  result = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True)
  assert result.stdout.strip() == '[]', result.stderr


def test_reading_a_good_file_warns_of_nothing(task, vocabulary, tmp_path):
  task.save(tmp_path / 'kinds')
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    TokenizedTask.read(tmp_path / 'kinds', vocabulary)


def test_a_damaged_file_of_texts_is_named(vocabulary, tmp_path):
  path = tmp_path / 'texts.txt.gz'
  path.write_bytes(gzip.compress(b'one line\n' * 1000)[:-12])
  with pytest.raises(ValueError, match='texts.txt.gz is truncated or damaged'):
    TokenizedTask.from_text_files(path, vocabulary)


def test_pairs_that_are_no_text_are_named_and_a_byte_order_mark_is_none(vocabulary, tmp_path):
  path = tmp_path / 'pairs.jsonl'
  nested = '[' * 100_000
  lines = [
      '\ufeff{"inputs": "a", "targets": "b"}',
      '{"inputs": "half \\ud83d", "targets": "b"}',
      f'{{"inputs": {nested}, "targets": "b"}}',
  ]
  path.write_text('\n'.join(lines), encoding='utf-8')
  with pytest.warns(UserWarning, match='2 of 3 lines .* line 2: .*surrogate.* line 3: not JSON'):
    task = TokenizedTask.from_jsonl(path, vocabulary)
  assert len(task) == 1
