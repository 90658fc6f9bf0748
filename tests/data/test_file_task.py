"""Tasks of one's own files: what becomes of a line, and which lines are refused and how."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import warnings

import numpy as np
import pytest

from prompt_tuning_jax.data.cache import load_task, load_task_or_mixture
from prompt_tuning_jax.data.file_task import FileTask
from prompt_tuning_jax.data.tokenized_task import NoSplitError
from prompt_tuning_jax.evaluation import metrics
from tests.data.conftest import NANO_VOCABULARY

LABELS = {'0': 'negative', '1': 'positive'}
ROWS = [('a warm film', '1'), ('dull', '0'), ('it is "so, so"', '0')]


def make(tmp_path, content, file='train.tsv', **settings):
  """A task of one file with this content."""
  path = tmp_path / file
  data = content.encode() if isinstance(content, str) else content
  path.write_bytes(gzip.compress(data) if file.endswith('.gz') else data)
  settings = {
      'name': 'reviews',
      'files': {'train': str(path)},
      'inputs': 'review: {text}',
      'targets': 'label',
      'label_names': LABELS,
      **settings,
  }
  return FileTask(**settings)


def table(rows, separator='\t'):
  return ''.join(separator.join(row) + '\n' for row in [('text', 'label'), *rows])


def jsonl(rows):
  return ''.join(json.dumps(dict(zip(('text', 'label'), row))) + '\n' for row in rows)


CSV = 'text,label\na warm film,1\ndull,0\n"it is ""so, so""",0\n'


# What becomes of a line.


@pytest.mark.parametrize(
    ('file', 'content'),
    [
        ('train.tsv', table(ROWS)),
        ('train.tsv', table(ROWS).replace('\n', '\r\n')),
        ('train.tsv', '\ufeff' + table(ROWS) + '\n\n'),
        ('train.csv', CSV),
        ('train.jsonl', jsonl(ROWS)),
        ('train.jsonl', jsonl([(text, int(label)) for text, label in ROWS])),
        ('train.jsonl.gz', jsonl(ROWS)),
        ('train.tsv.gz', table(ROWS)),
    ],
)
def test_every_form_of_a_file_gives_the_same_examples(tmp_path, vocabulary, file, content):
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    task = load_task(make(tmp_path, content, file), 'train', vocabulary)
  assert (task.name, task.split, len(task)) == ('reviews', 'train', 3)
  assert task.label_classes == ['negative', 'positive']
  for index, (text, label) in enumerate(ROWS):
    inputs = f'review: {text}'
    assert task.example(index) == {
        'text': text,
        'idx': index,
        'inputs_pretokenized': inputs,
        'targets_pretokenized': LABELS[label],
    }
    assert task.target(index) == int(label)
    assert task[index]['inputs'].tolist() == [*vocabulary.encode(inputs), 1]
    assert task[index]['targets'].tolist() == [*vocabulary.encode(LABELS[label]), 1]


def test_a_quoted_cell_may_hold_line_breaks_and_errors_name_its_first_line(
    tmp_path, vocabulary
):
  content = 'text,label\n"two\nlines",1\n"three\n\nlines",7\n'
  task = make(tmp_path, content, 'train.csv')
  with pytest.raises(ValueError, match=r"train\.csv, line 4: the label '7' is none of '0', '1'"):
    load_task(task, 'train', vocabulary)
  task = make(tmp_path, content.replace('7', '0'), 'train.csv')
  loaded = load_task(task, 'train', vocabulary)
  assert loaded.example(0)['text'] == 'two\nlines'


def test_files_of_a_split_follow_each_other(tmp_path, vocabulary):
  (tmp_path / 'more.jsonl').write_text(jsonl([('fine', '1')]))
  first = make(tmp_path, table(ROWS)).files['train']
  task = make(
      tmp_path, table(ROWS), files={'train': [first, str(tmp_path / 'more.jsonl')]}
  )
  loaded = load_task(task, 'train', vocabulary)
  assert [loaded.example(i)['idx'] for i in range(4)] == [0, 1, 2, 3]
  assert loaded.example(3)['text'] == 'fine'


def test_fields_may_lie_inside_others_and_numbers_and_truth_are_texts(tmp_path, vocabulary):
  row = {'passage': {'title': 'Trees', 'year': 1999}, 'is_long': True, 'a:b!c': 'x', 'y': 1.5}
  task = make(
      tmp_path,
      json.dumps(row) + '\n',
      'train.jsonl',
      inputs='{{{passage.title}}} of {passage.year}, {is_long} {a:b!c}',
      targets='{y} {y}',
      label_names=None,
  )
  example = load_task(task, 'train', vocabulary).example(0)
  assert example['inputs_pretokenized'] == '{Trees} of 1999, true x'
  assert example['targets_pretokenized'] == '1.5 1.5'


def test_labels_may_be_named_by_number_truth_or_the_words_themselves(tmp_path, vocabulary):
  rows = [('a', True), ('b', False)]
  named = {True: 'yes', False: 'no'}
  task = make(tmp_path, jsonl(rows), 'train.jsonl', label_names=named)
  loaded = load_task(task, 'train', vocabulary)
  assert [loaded.target(0), loaded.target(1)] == [0, 1]
  assert loaded.label_classes == ['yes', 'no']
  task = make(tmp_path, table([('a', 'ham'), ('b', 'spam')]), label_names=['spam', 'ham'])
  loaded = load_task(task, 'train', vocabulary)
  assert [loaded.target(0), loaded.target(1)] == [1, 0]
  task = make(tmp_path, table([('a', '5'), ('b', '1'), ('c', '4')]),
              label_names={1: 'bad', 4: 'good', 5: 'good'})  # fmt: skip
  loaded = load_task(task, 'train', vocabulary)
  assert loaded.label_classes == ['bad', 'good']
  assert [loaded.target(index) for index in range(3)] == [1, 0, 1]


def test_an_answer_may_be_named_unknown(tmp_path, vocabulary):
  task = make(tmp_path, table([('a', '-1'), ('b', '-1')]), label_names={**LABELS, -1: '<unk>'})
  loaded = load_task(task, 'train', vocabulary)
  assert loaded.label_classes == ['negative', 'positive']
  assert not loaded.has_labels
  with pytest.raises(ValueError, match='no labels'):
    loaded.require_labels()


def test_several_right_answers_stay_with_an_example(tmp_path, vocabulary):
  rows = [{'q': 'who?', 'a': 'Ann', 'all': ['Ann', 'Anna']}, {'q': 'x?', 'a': 'y', 'all': 'y'}]
  settings = dict(inputs='q', targets='a', label_names=None, references='all')
  content = ''.join(json.dumps(row) + '\n' for row in rows)
  task = make(tmp_path, content, 'train.jsonl', metrics=['squad'], **settings)
  loaded = load_task(task, 'train', vocabulary)
  assert [loaded.target(0), loaded.target(1)] == [['Ann', 'Anna'], ['y']]
  assert loaded.postprocess_fn('Anna', example=loaded.example(0)) == 'Anna'
  (metric,) = loaded.metric_fns
  assert metric([loaded.target(0), loaded.target(1)], ['Anna', 'z']) == {'em': 50, 'f1': 50}
  default = make(tmp_path, content, 'train.jsonl', **settings)
  assert default.metric_names == ('bleu', 'rouge')


def test_fields_of_the_input_stay_for_templates_and_the_answer_does_not(tmp_path, vocabulary):
  loaded = load_task(make(tmp_path, table(ROWS)), 'train', vocabulary)
  assert 'text' in loaded.example(0) and 'label' not in loaded.example(0)


# Metrics.


@pytest.mark.parametrize(
    ('settings', 'expected'),
    [
        ({}, {'accuracy': 100 * 2 / 3}),
        ({'metrics': ['f1']}, {'f1': 100 * 2 / 3}),
        ({'metrics': ['mean_f1']}, {'mean_2class_f1': 100 * 2 / 3}),
        ({'metrics': ['accuracy', 'matthews_corrcoef']},
         {'accuracy': 100 * 2 / 3, 'matthews_corrcoef': 50}),
    ],
)
def test_labels_are_scored_by_what_is_named(tmp_path, vocabulary, settings, expected):
  loaded = load_task(make(tmp_path, table(ROWS), **settings), 'train', vocabulary)
  targets = [loaded.target(index) for index in range(3)]
  predictions = [loaded.postprocess_fn(text) for text in ('positive', 'positive', 'negative')]
  found = {}
  for metric in loaded.metric_fns:
    found |= metric(targets, predictions)
  assert found == pytest.approx(expected)


def test_f1_of_more_than_two_labels_is_their_mean(tmp_path, vocabulary):
  rows = [('a', 'x'), ('b', 'y'), ('c', 'z')]
  task = make(tmp_path, table(rows), label_names=['x', 'y', 'z'], metrics=['f1'])
  (metric,) = load_task(task, 'train', vocabulary).metric_fns
  assert metric([0, 1, 2], [0, 1, 1]) == pytest.approx(
      metrics.mean_multiclass_f1([0, 1, 2], [0, 1, 1], num_classes=3)
  )


def test_numbers_are_compared_as_numbers(tmp_path, vocabulary):
  settings = dict(label_names=None, metrics=['pearson_corrcoef'])
  rows = [('a', '1.0'), ('b', '2.5'), ('c', '4')]
  loaded = load_task(make(tmp_path, table(rows), **settings), 'train', vocabulary)
  assert [loaded.target(index) for index in range(3)] == [1, 2.5, 4]
  # Of numbers -1 is one, and no missing label.
  rows = [('a', '-1'), ('b', '0.5'), ('c', '1')]
  loaded = load_task(make(tmp_path, table(rows), **settings), 'train', vocabulary)
  loaded.require_labels()
  (metric,) = loaded.metric_fns
  assert metric([-1, 0.5, 1], [-1, 0.5, 1])['pearson_corrcoef'] == pytest.approx(100)
  # So what is no number is none of those that are right.
  unread = [loaded.postprocess_fn(text) for text in ('much', 'nan', '0.5', '1')]
  assert unread[0] is None
  assert metric([-1, -1, 0.5, 1], unread) == pytest.approx(
      metrics.pearson_corrcoef([-1, -1, 0.5, 1], [-2, -2, 0.5, 1], minus_one_is_none=False)
  )
  with pytest.raises(ValueError, match="line 3: the target 'much' is no number"):
    rows = [('a', '1.0'), ('b', 'much')]
    load_task(make(tmp_path, table(rows), **settings), 'train', vocabulary)
  # Of these no correlation is a number.
  for text in ('nan', '-inf'):
    with pytest.raises(ValueError, match=f"line 3: the target '{text}' is no number"):
      rows = [('a', '1.0'), ('b', text)]
      load_task(make(tmp_path, table(rows), **settings), 'train', vocabulary)


# Bad lines.

BAD = (
    b'{"text": "fine", "label": 1}\n'
    b'{"text": "cut sho\n'
    b'["text", "label"]\n'
    b'{"text": "\xff", "label": 1}\n'
    b'\n'
    b'{"label": 1}\n'
    b'{"text": " ", "label": 1}\n'
    b'{"text": "x", "label": 2}\n'
    b'{"text": "x", "label": [1]}\n'
    b'{"text": "x", "label": null}\n'
    b'{"text": "good", "label": 0}\n'
)
REASONS = [
    'line 2: not JSON (Invalid control character',
    'line 3: not a JSON object',
    'line 4: not UTF-8',
    'line 5: empty',
    "line 6: no field 'text'",
]


def test_bad_lines_are_an_error_that_numbers_counts_and_shows_the_first_five(
    tmp_path, vocabulary
):
  with pytest.raises(ValueError) as error:
    load_task(make(tmp_path, BAD, 'train.jsonl'), 'train', vocabulary)
  first, *shown, dots, advice = str(error.value).splitlines()
  assert first == "reviews, split 'train': 9 of 11 lines cannot be used:"
  for line, reason in zip(shown, REASONS, strict=True):
    assert line.startswith(f'  {tmp_path}/train.jsonl, {reason}')
  assert dots == '  …'
  assert advice == "Correct them, or set FileTask.on_bad_line='skip' to leave them out."


@pytest.mark.parametrize(
    ('line', 'reason'),
    [
        (b'{"text": " ", "label": 1}', "'text' is empty (inputs)"),
        (b'{"text": "x", "label": ""}', "'label' is empty (targets)"),
        (b'{"text": "x", "label": 2}', "the label '2' is none of '0', '1' (FileTask.label_names)"),
        (b'{"text": "x", "label": [1]}', "'label' is a list, not a text or a number"),
        (b'{"text": "x", "label": null}', "'label' is null"),
        (b'{"text": "x"}', "no field 'label'"),
        (b'{"text": "\\ud83d", "label": 1}',
         "'text' holds half of a surrogate pair, which is no text"),
        (b'NaN', 'not a JSON object'),
    ],
)
def test_what_is_wrong_with_a_line_is_said(tmp_path, vocabulary, line, reason):
  content = b'{"text": "fine", "label": 1}\n' + line + b'\n'
  with pytest.raises(ValueError) as error:
    load_task(make(tmp_path, content, 'train.jsonl'), 'train', vocabulary)
  assert f'train.jsonl, line 2: {reason}\n' in str(error.value)


@pytest.mark.parametrize(
    ('file', 'line', 'reason'),
    [
        ('train.tsv', b'only one', '1 columns, but the first line names 2'),
        ('train.tsv', b'a\t1\t', '3 columns, but the first line names 2'),
        ('train.tsv', b'"a\t1"\t1', '3 columns'),
        ('train.tsv', b'\xe4\t1', 'not UTF-8'),
        ('train.csv', b'a,b,1', '3 columns'),
        ('train.csv', b'\xe4,1', 'not UTF-8'),
        ('train.csv', b'"a"b,1', 'not csv'),
        ('train.csv', b'"a,1', 'not csv (unexpected end of data)'),
        ('train.csv', b',1', "'text' is empty"),
    ],
)
def test_bad_lines_of_tables_are_numbered_too(tmp_path, vocabulary, file, line, reason):
  separator = b'\t' if file.endswith('.tsv') else b','
  content = separator.join([b'text', b'label']) + b'\n' + separator.join([b'ok', b'1'])
  with pytest.raises(ValueError) as error:
    load_task(make(tmp_path, content + b'\n' + line + b'\n', file), 'train', vocabulary)
  assert '1 of 2 lines cannot be used' in str(error.value)
  assert f'{file}, line 3: {reason}' in str(error.value)


def test_a_quote_that_nothing_closes_makes_all_lines_behind_it_bad(tmp_path, vocabulary):
  content = 'text,label\na,1\n"b,1\nc,0\nd,1\n'
  task = make(tmp_path, content, 'train.csv', on_bad_line='skip')
  with pytest.warns(UserWarning, match='3 of 4 lines .* row of lines 3 to 5'):
    assert len(load_task(task, 'train', vocabulary)) == 1


def test_bad_lines_may_be_skipped_with_a_warning_each_time(tmp_path, vocabulary):
  task = make(tmp_path, BAD, 'train.jsonl', on_bad_line='skip')
  for _ in range(2):  # The second time from the cache.
    with pytest.warns(UserWarning) as warned:
      loaded = load_task(task, 'train', vocabulary)
    (warning,) = warned
    message = str(warning.message)
    assert message.startswith('9 of 11 lines of reviews were skipped: ')
    assert all(reason in message for reason in REASONS) and message.endswith(' …')
    assert [loaded.example(index)['text'] for index in range(len(loaded))] == ['fine', 'good']
    # Where it stands in the file, not among the good ones.
    assert loaded.example(1)['idx'] == 10


def test_ids_may_not_repeat(tmp_path, vocabulary):
  rows = [('a', '1'), ('b', '0'), ('a', '0')]
  loaded = load_task(make(tmp_path, table(rows[:2]), id='text'), 'train', vocabulary)
  assert [loaded.example(0)['idx'], loaded.example(1)['idx']] == ['a', 'b']
  with pytest.raises(ValueError) as error:
    load_task(make(tmp_path, table(rows), id='text'), 'train', vocabulary)
  path = tmp_path / 'train.tsv'
  assert f"{path}, line 4: the id 'a' is that of {path}, line 2 too" in str(error.value)


@pytest.mark.parametrize(
    ('settings', 'answer'),
    [
        ({'inputs': 'review: {txt}'}, "FileTask.inputs names the field 'txt', which no line of"),
        ({'inputs': '{Text}'}, "has. Did you mean 'text'? Fields: text, label."),
        ({'targets': 'lable'}, "FileTask.targets names the field 'lable'"),
        ({'id': 'number'}, "FileTask.id names the field 'number'"),
        ({'label_names': None, 'references': 'all'}, "FileTask.references names the field 'all'"),
    ],
)
@pytest.mark.parametrize('file', ['train.tsv', 'train.jsonl'])
def test_a_field_that_no_line_has_is_answered_with_those_there_are(
    tmp_path, vocabulary, settings, answer, file
):
  content = table(ROWS) if file.endswith('tsv') else jsonl(ROWS)
  with pytest.raises(ValueError) as error:
    load_task(make(tmp_path, content, file, **settings), 'train', vocabulary)
  assert answer in str(error.value)
  assert 'Fields: text, label.' in str(error.value)


@pytest.mark.parametrize(
    ('file', 'content', 'answer'),
    [
        ('train.tsv', b'', 'is empty: not even the names of its columns'),
        ('train.tsv', b'text\tlabel\n', 'holds no examples'),
        ('train.tsv', b'text\ttext\n', "'text' names two columns"),
        ('train.tsv', b'\n\n', 'line 1, is blank'),
        ('train.tsv', b'te\xff\tlabel\n', 'line 1: not UTF-8. The first line of a tsv or csv'),
        ('train.jsonl', b'', 'holds no examples'),
        ('train.jsonl', b'\n \n', 'holds no examples'),
        ('train.jsonl', b'nonsense\n', '1 of 1 lines cannot be used'),
    ],
)
@pytest.mark.parametrize('on_bad_line', ['error', 'skip'])
def test_a_file_without_one_example_is_an_error(
    tmp_path, vocabulary, file, content, answer, on_bad_line
):
  with pytest.raises(ValueError) as error:
    load_task(make(tmp_path, content, file, on_bad_line=on_bad_line), 'train', vocabulary)
  assert f'{tmp_path / file}' in str(error.value) and answer in str(error.value)


def test_a_truncated_gzip_file_is_named(tmp_path, vocabulary):
  task = make(tmp_path, jsonl(ROWS * 50), 'train.jsonl.gz', on_bad_line='skip')
  path = tmp_path / 'train.jsonl.gz'
  path.write_bytes(path.read_bytes()[:60])
  with pytest.raises(ValueError, match=r'train\.jsonl\.gz is truncated or damaged'):
    load_task(task, 'train', vocabulary)


# Settings.


@pytest.mark.parametrize(
    ('settings', 'answer'),
    [
        ({'name': ' '}, "FileTask.name is ' '"),
        ({'files': {}}, 'expected the files of each split'),
        ({'files': 'train.tsv'}, 'expected the files of each split'),
        ({'files': {'train': []}}, "names no file for the split 'train'"),
        ({'files': {'train': 'train.txt'}}, 'train.txt is none of .jsonl, .tsv, .csv'),
        ({'on_bad_line': 'ignore'}, "on_bad_line is 'ignore'; it may be 'error' or 'skip'"),
        ({'inputs': ''}, "FileTask.inputs is ''; expected a text with fields in braces"),
        ({'inputs': ['text']}, "FileTask.inputs is ['text']; expected a text"),
        ({'inputs': 'a {text'}, "FileTask.inputs='a {text'"),
        ({'targets': 'a {}'}, "FileTask.targets='a {}' has no name of a field in its braces"),
        ({'targets': '{{a}}'}, 'has no name of a field in its braces'),
        ({'label_names': ['one']}, 'leaves nothing to choose from'),
        ({'label_names': {0: 'a', 1: 'a'}}, 'leaves nothing to choose from'),
        ({'label_names': 'yes'}, "FileTask.label_names is 'yes'; expected the texts of the"),
        ({'label_names': {0: 'a', 1: ' '}}, 'or a list of texts, none of them empty'),
        ({'references': 'all'}, 'Leave one of them out'),
        ({'metrics': 'f1'}, "FileTask.metrics is 'f1'; expected a list of accuracy, f1"),
        ({'metrics': []}, 'FileTask.metrics is []'),
        ({'metrics': ['acuracy']}, "Did you mean 'accuracy'? Metrics of these: accuracy, f1, mean"),
        ({'metrics': ['bleu']}, 'which labels (FileTask.label_names) cannot be scored by'),
        ({'metrics': ['squad'], 'label_names': None}, 'which free texts cannot be scored by'),
        ({'metrics': ['accuracy', 'pearson_corrcoef'], 'label_names': None},
         'compares numbers (pearson_corrcoef) and texts'),
    ],
)
def test_settings_that_make_no_sense_are_refused_at_once(tmp_path, settings, answer):
  with pytest.raises(ValueError) as error:
    make(tmp_path, table(ROWS), **settings)
  assert answer in str(error.value)


def test_splits_and_files_that_are_not_there_are_named(tmp_path, vocabulary):
  task = make(tmp_path, table(ROWS), files={'train': 'nowhere.tsv', 'dev': 'dev.tsv'})
  with pytest.raises(NoSplitError, match="no split 'trian'. Did you mean 'train'?.* train, dev"):
    load_task(task, 'trian', vocabulary)
  with pytest.raises(FileNotFoundError, match=r"nowhere\.tsv, which FileTask\.files names for"):
    load_task(task, 'train', vocabulary)


def test_relative_paths_start_at_the_working_folder(tmp_path, vocabulary, monkeypatch):
  task = make(tmp_path, table(ROWS), files={'train': 'train.tsv'})
  with pytest.raises(FileNotFoundError):
    load_task(task, 'train', vocabulary)
  monkeypatch.chdir(tmp_path)
  assert len(load_task(task, 'train', vocabulary)) == 3


# The cache.


def test_a_task_is_tokenised_once_and_again_when_file_or_settings_change(
    tmp_path, vocabulary, monkeypatch
):
  made = []
  tokenize = FileTask.tokenize
  monkeypatch.setattr(
      FileTask, 'tokenize', lambda *args: made.append(1) or tokenize(*args)
  )
  task = make(tmp_path, table(ROWS))
  for _ in range(2):
    ((loaded, rate),) = load_task_or_mixture(task, 'train', vocabulary)
    assert (loaded.example(0)['text'], rate, len(made)) == ('a warm film', 1.0, 1)
  make(tmp_path, table([('a cold film', '0')]))
  loaded = load_task(task, 'train', vocabulary)
  assert (len(loaded), loaded.target(0), len(made)) == (1, 0, 2)
  other = make(tmp_path, table([('a cold film', '0')]), inputs='{text}')
  assert load_task(other, 'train', vocabulary).example(0)['inputs_pretokenized'] == 'a cold film'
  # Both stay in the cache.
  assert load_task(task, 'train', vocabulary).example(0)['text'] == 'a cold film'
  assert len(made) == 3


def test_metrics_and_answers_come_back_from_the_cache(tmp_path, vocabulary):
  task = make(tmp_path, table(ROWS), metrics=['accuracy', 'mean_f1'])
  made, read = (load_task(task, 'train', vocabulary) for _ in range(2))
  assert read.manifest == made.manifest
  for loaded in (made, read):
    assert loaded.postprocess_fn('positive', example={}, is_target=False) == 1
    names = [next(iter(metric([0, 1], [0, 1]))) for metric in loaded.metric_fns]
    assert names == ['accuracy', 'mean_2class_f1']


def test_neither_seqio_nor_tensorflow_nor_jax_is_needed(tmp_path):
  make(tmp_path, table(ROWS))
  program = f"""if True:
      import sys
      for name in ('seqio', 'tensorflow', 'tensorflow_datasets', 'jax', 'gin'):
        sys.modules[name] = None
      from prompt_tuning_jax.data.cache import load_task
      from prompt_tuning_jax.data.file_task import FileTask
      from prompt_tuning_jax.data.vocabulary import Vocabulary
      task = FileTask('reviews', {{'train': {str(tmp_path / 'train.tsv')!r}}}, '{{text}}', 'label')
      for _ in range(2):
        task_ = load_task(task, 'train', Vocabulary({str(NANO_VOCABULARY)!r}))
        print(len(task_), task_.target(0))
  """
  result = subprocess.run(
      [sys.executable, '-W', 'error', '-c', program], capture_output=True, text=True
  )
  assert result.stdout == '3 1\n3 1\n', result.stderr


@pytest.mark.slow
def test_real_files_give_what_the_registered_task_gives(vocabulary, shared_data, monkeypatch):
  monkeypatch.setenv('PTJ_LOCAL_DATA', str(shared_data))
  folder = shared_data / 'superglue' / 'CB'
  classes = ['entailment', 'contradiction', 'neutral']
  mine = FileTask(
      'cb',
      {'train': folder / 'train.jsonl', 'validation': folder / 'val.jsonl'},
      'hypothesis: {hypothesis} premise: {premise}',
      '{label}',
      label_names=classes,
      id='idx',
      metrics=['mean_f1', 'accuracy'],
  )
  for split, count in (('train', 250), ('validation', 56)):
    found = load_task(mine, split, vocabulary)
    expected = load_task('taskless_super_glue_cb_v102', split, vocabulary)
    assert len(found) == len(expected) == count
    for feature in ('inputs', 'targets'):
      for a, b in zip(found.flat_tokens(feature), expected.flat_tokens(feature), strict=True):
        np.testing.assert_array_equal(a, b)
    for index in range(count):
      assert found.target(index) == expected.target(index)
      assert found.example(index)['idx'] == expected.example(index)['idx']
    targets = [found.target(index) for index in range(count)]
    predictions = targets[::-1]
    for own, theirs in zip(found.metric_fns, expected.metric_fns, strict=True):
      assert own(targets, predictions) == theirs(targets, predictions)
