"""GLUE reads as T5 writes it, character by character and id by id."""

import json

import numpy as np
import pytest

from prompt_tuning_jax.data.cache import load_task, load_task_or_mixture
from prompt_tuning_jax.data.seqio_source import import_seqio, mixture_members
from tests.tasks import recorded

# Task → its word in front and its metrics.
TASKS = {
    'cola': ('cola', ['matthews_corrcoef']),
    'sst2': ('sst2', ['accuracy']),
    'mrpc': ('mrpc', ['f1', 'accuracy']),
    'qqp': ('qqp', ['f1', 'accuracy']),
    'stsb': ('stsb', ['pearson_corrcoef', 'spearman_corrcoef']),
    'mnli': ('mnli', ['accuracy']),
    'mnli_matched': ('mnli', ['accuracy']),
    'mnli_mismatched': ('mnli', ['accuracy']),
    'qnli': ('qnli', ['accuracy']),
    'rte': ('rte', ['accuracy']),
    'wnli': ('wnli', ['accuracy']),
    'ax': ('mnli', ['accuracy']),
}


pytestmark = pytest.mark.usefixtures('own_cache')


@pytest.mark.parametrize('task', TASKS)
def test_text_and_ids_equal_the_recorded_ones(golden, t5_vocabulary, task):
  split = {'mnli': 'validation_matched', 'ax': 'test'}.get(task, 'validation')
  name, (word, _) = f'glue_{task}_v200', TASKS[task]
  recorded.assert_recorded_text(golden, t5_vocabulary, name, split, word)


def test_no_recorded_task_of_glue_is_left_out(golden):
  lines = (golden / 'tasks' / 'task_text.jsonl').read_text().splitlines()
  names = {json.loads(line)['task'] for line in lines}
  ours = {f'taskless_glue_{task}_v200' for task in TASKS}
  assert {name for name in names if name.startswith('taskless_glue')} == ours


# Official file → header, lines with their label last, and the texts and labels of each.
FILES = {
    'cola': ('CoLA/dev', '', 'gj04\t1\t\tHe "left.\nbc\t0\t*\tHim left.\n', [
        ('sentence: He "left.', 'acceptable'), ('sentence: Him left.', 'unacceptable'),
    ]),
    'sst2': ('SST-2/dev', 'sentence\tlabel\n', 'a fine film . \t1\n"dull\t0\n', [
        ('sentence: a fine film . ', 'positive'), ('sentence: "dull', 'negative'),
    ]),
    'mrpc': ('MRPC/dev', '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n',
             '1\t7\t8\tHe left .\t"Left , he did .\n0\t9\t3\tA\tB\n', [
        ('sentence1: He left . sentence2: "Left , he did .', 'equivalent'),
        ('sentence1: A sentence2: B', 'not_equivalent'),
    ]),
    'qqp': ('QQP/dev', 'id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n',
            '5\t1\t2\tWhy?\tWhat for?\t1\n6\t1\n7\t1\t2\tWho?\tWho\t0\n8\t1\t3\tA?\tB?\t\n', [
        ('question1: Why? question2: What for?', 'duplicate'),
        ('question1: Who? question2: Who', 'not_duplicate'),
    ]),
    'stsb': ('STS-B/dev', 'index\tgenre\tsentence1\tsentence2\tscore\n',
             '0\tnews\tA b.\tB a.\t4.75\n1\tnews\tA\tB\t0.5\n2\tx\tA\tB\t2.0\n', [
        ('sentence1: A b. sentence2: B a.', '4.8'), ('sentence1: A sentence2: B', '0.4'),
        ('sentence1: A sentence2: B', '2.0'),
    ]),
    'mnli_matched': ('MNLI/dev_matched', 'index\tsentence1\tsentence2\tlabel1\tgold_label\n',
                     '0\tP.\tH.\tneutral\tcontradiction\n1\tP.\tH.\tneutral\tentailment\n', [
        ('hypothesis: H. premise: P.', 'contradiction'),
        ('hypothesis: H. premise: P.', 'entailment'),
    ]),
    'qnli': ('QNLI/dev', 'index\tquestion\tsentence\tlabel\n', '0\tWho?\tI.\tnot_entailment\n', [
        ('question: Who? sentence: I.', 'not_entailment'),
    ]),
    'rte': ('RTE/dev', 'index\tsentence1\tsentence2\tlabel\n', '0\tA.\tB.\tentailment\n', [
        ('sentence1: A. sentence2: B.', 'entailment'),
    ]),
    'wnli': ('WNLI/dev', 'index\tsentence1\tsentence2\tlabel\n', '0\tA.\tB.\t1\n1\tA.\tC.\t0\n', [
        ('sentence1: A. sentence2: B.', 'entailment'),
        ('sentence1: A. sentence2: C.', 'not_entailment'),
    ]),
    'ax': ('AX/AX', 'index\tsentence1\tsentence2\n', '0\tP.\tH.\n', [
        ('hypothesis: H. premise: P.', '<unk>'),
    ]),
}  # fmt: skip


def write(folder, file, text):
  path = folder / 'glue' / f'{file}.tsv'
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text)
  return path


def tfds_rows(task, path, split):
  """What the builder of TFDS itself reads from an official file."""
  import_seqio()
  from tensorflow_datasets.text import glue

  builder = glue.Glue.__new__(glue.Glue)
  builder._builder_config = next(c for c in glue.Glue.BUILDER_CONFIGS if c.name == task)
  for _, row in builder._generate_examples(str(path), split):
    label = row['label']
    if isinstance(label, str):
      row['label'] = builder.builder_config.label_classes.index(label)
    yield {name: np.asarray(value).tolist() for name, value in row.items()}


@pytest.mark.filterwarnings('ignore:.*lines lack a field')
@pytest.mark.parametrize('task', FILES)
def test_an_official_file_gives_the_text_of_t5_and_the_rows_of_tfds(
    vocabulary, tmp_path, monkeypatch, task
):
  monkeypatch.setenv('PTJ_LOCAL_DATA', str(tmp_path))
  file, header, lines, expected = FILES[task]
  path = write(tmp_path, file, header + lines)
  split = 'test' if task == 'ax' else 'validation'
  name, (word, metric_names) = f'glue_{task}_v200', TASKS[task]
  for loaded, prefix in [
      (load_task(f'taskless_{name}', split, vocabulary), ''),
      (load_task(name, split, vocabulary), f'{word} '),
  ]:
    found = [loaded.example(index) for index in range(len(loaded))]
    texts = [(e['inputs_pretokenized'], e['targets_pretokenized']) for e in found]
    assert texts == [(prefix + text, target) for text, target in expected]
  rows = list(tfds_rows(task, path, split)) if task != 'mrpc' else None
  source = import_seqio().TaskRegistry.get(name).source
  ours = [
      {key: v.decode() if isinstance(v, bytes) else v.item() for key, v in row.items()}
      for row in source.get_dataset(split, shuffle=False).as_numpy_iterator()
  ]
  # TFDS reads MRPC from other files.
  assert task == 'mrpc' or ours == rows
  if task != 'ax':
    targets = [loaded.target(index) for index in range(len(loaded))]
    predictions = [loaded.postprocess_fn(target, is_target=False) for _, target in expected]
    assert predictions == targets
    scores = {}
    for metric in loaded.metric_fns:
      scores |= metric(targets, predictions)
    assert list(scores) == metric_names
    assert scores == {key: pytest.approx(100) for key in scores}


def test_cut_lines_are_counted_and_those_that_cannot_be_read_are_named(
    vocabulary, tmp_path, monkeypatch
):
  monkeypatch.setenv('PTJ_LOCAL_DATA', str(tmp_path))
  file, header, lines, _ = FILES['qqp']
  write(tmp_path, file, header + lines)
  with pytest.warns(UserWarning, match=r'dev\.tsv: 2 of 4 lines lack a field .* is line 3'):
    task = load_task('glue_qqp_v200', 'validation', vocabulary)
  assert [task.example(index)['idx'] for index in range(len(task))] == [0, 2]
  for text, reason in [
      (header, 'holds no complete line'),
      (header.replace('question2', 'q2') + lines, 'line 1: no column question2. Expected tab'),
      (header + '5\t1\t2\tA?\tB?\t3\n', 'line 2: unknown label 3'),
      (header + '5\t1\t2\tA?\tB?\tyes\n', "line 2: unknown label 'yes', expected one of not_dup"),
  ]:
    write(tmp_path, file, text)
    with pytest.raises(ValueError, match=rf'dev\.tsv.*{reason}'):
      load_task('glue_qqp_v200', 'validation', vocabulary)
  write(tmp_path, file, '').write_bytes(header.encode() + b'5\t1\t2\tA\xff\tB\t1\n')
  with pytest.raises(ValueError, match=r"dev\.tsv, line .*can't decode byte 0xff"):
    load_task('glue_qqp_v200', 'validation', vocabulary)


def test_cola_reads_its_test_file_by_the_header_that_its_other_files_lack(
    vocabulary, tmp_path, monkeypatch
):
  monkeypatch.setenv('PTJ_LOCAL_DATA', str(tmp_path))
  write(tmp_path, 'CoLA/test', 'index\tsentence\n0\tHe left.\n')
  task = load_task('taskless_glue_cola_v200', 'test', vocabulary)
  assert task.example(0) == {
      'idx': 0, 'inputs_pretokenized': 'sentence: He left.', 'targets_pretokenized': '<unk>'
  }  # fmt: skip
  assert not task.has_labels


@pytest.mark.parametrize('prefix', ['', 'taskless_'])
def test_mixtures_have_the_tasks_and_rates_of_t5(prefix, tmp_path, monkeypatch, vocabulary):
  mnli = mixture_members(f'{prefix}glue_mnli_and_dev_v200', 'prompt_tuning_jax.tasks')
  assert dict(mnli['members']) == {
      f'{prefix}glue_{task}_v200': 1 for task in ('mnli', 'mnli_matched', 'mnli_mismatched')
  }
  monkeypatch.setenv('PTJ_LOCAL_DATA', str(tmp_path))
  file, header, lines, _ = FILES['mnli_matched']
  for part in ('matched', 'mismatched'):
    write(tmp_path, f'MNLI/dev_{part}', header + lines)
  dev = load_task_or_mixture(f'{prefix}glue_mnli_and_dev_v200', 'validation', vocabulary)
  assert [task.name for task, _ in dev] == [
      f'{prefix}glue_mnli_matched_v200', f'{prefix}glue_mnli_mismatched_v200'
  ]
  both = mixture_members(f'{prefix}glue_v200_proportional', 'prompt_tuning_jax.tasks')
  assert dict(both['members']) == {
      f'{prefix}glue_{task}_v200': rate
      for task, rate in {
          'cola': 8551, 'sst2': 67349, 'mrpc': 3668, 'qqp': 363849, 'stsb': 5749,
          'mnli': 392702, 'qnli': 104743, 'rte': 2490, 'mnli_matched': 0,
          'mnli_mismatched': 0, 'ax': 0,
      }.items()
  }  # fmt: skip


@pytest.mark.filterwarnings('ignore:.*lines lack a field')
@pytest.mark.parametrize(
    ('task', 'other', 'words'),
    [
        ('mrpc', 'qqp', ['not_duplicate', 'duplicate']),
        ('qqp', 'mrpc', ['not_equivalent', 'equivalent']),
    ],
)
def test_a_prompt_answers_a_task_in_the_words_of_the_one_it_was_trained_on(
    vocabulary, tmp_path, monkeypatch, task, other, words
):
  monkeypatch.setenv('PTJ_LOCAL_DATA', str(tmp_path))
  for name in (task, other):
    file, header, lines, _ = FILES[name]
    for split in ('dev', 'train'):
      write(tmp_path, file.replace('dev', split), header + lines)
  mixture = f'taskless_glue_{task}_from_{other}_zeroshot_v200'
  ((train, _),) = load_task_or_mixture(mixture, 'train', vocabulary)
  assert train.name == f'taskless_glue_{other}_v200'
  assert train.label_classes == words
  both = {
      loaded.name: loaded
      for loaded, _ in load_task_or_mixture(mixture, 'validation', vocabulary)
  }
  dev = both.pop(f'taskless_glue_{task}_from_{other}_v200')
  assert list(both) == [f'taskless_glue_{other}_v200']
  own_words = [text for _, text in FILES[task][3]]
  assert [dev.example(i)['targets_pretokenized'] for i in range(len(dev))] == own_words
  targets = [dev.target(index) for index in range(len(dev))]
  assert targets == [1, 0] and dev.label_classes == words
  # Its own words are right too, as they are after the original's translation.
  for texts, expected in [(words[::-1], [1, 0]), (own_words, [1, 0]), (['yes', ''], [-1, -1])]:
    assert [dev.postprocess_fn(text, is_target=False) for text in texts] == expected
  # The cache names the function, so that it is found again.
  again = load_task(dev.name, 'validation', vocabulary)
  assert again._live_functions is None
  assert [again.postprocess_fn(text) for text in words] == [0, 1]


def test_the_validation_file_of_sst2_is_read(shared_data, vocabulary, monkeypatch):
  monkeypatch.setenv('PTJ_LOCAL_DATA', str(shared_data))
  task = load_task('taskless_glue_sst2_v200', 'validation', vocabulary)
  assert len(task) == 872
  assert task.example(0)['inputs_pretokenized'] == (
      "sentence: it 's a charming and often affecting journey ."
  )
  assert task.label_classes[task.target(0)] == 'positive'
  (metric,) = task.metric_fns
  targets = [task.target(index) for index in range(len(task))]
  # The majority class of the official validation set is positive, 444 of 872.
  assert metric(targets, [1] * 872) == {'accuracy': pytest.approx(100 * 444 / 872)}
