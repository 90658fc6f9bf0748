"""LAMA's facts as gaps to fill: texts, candidates, splits, and what is wrong with a file."""

import gzip
import json

import pytest

from prompt_tuning_jax.data.batches import EvalBatches, TrainBatches
from prompt_tuning_jax.data.cache import load_task, load_task_or_mixture
from prompt_tuning_jax.data.seqio_source import import_seqio
from prompt_tuning_jax.data.virtual_tokens import Template

TEMPLATES = {'P36': 'The capital of [X] is [Y] .', 'P1376': '[Y] is ruled from [X] .'}
FACTS = {
    'train': [('P36', 'France', 'Paris'), ('P1376', 'Rome', 'Italy'), ('P36', 'Peru', 'Lima')],
    'dev': [('P36', 'Wales [Y]', 'Cardiff'), ('P1376', 'Oslo', 'Norway')],
    'test': [('P36', 'Kenya', 'Nairobi'), ('P36', 'Gaul', 'Paris'), ('P1376', 'Rom', 'Italy')],
}


pytestmark = pytest.mark.usefixtures('own_folder')


def write(path, rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  text = ''.join(json.dumps(row) + '\n' for row in rows)
  path.write_bytes(gzip.compress(text.encode()) if path.suffix == '.gz' else text.encode())


def slim(relation, subject, obj):
  return {'relation': relation, 'sub_label': subject, 'obj_label': obj}


@pytest.fixture
def folder(tmp_path):
  """All relations in a file for each split, one of them gzipped."""
  folder = tmp_path / 'lama_trex'
  write(
      folder / 'relations.jsonl',
      [{'relation': name, 'template': text} for name, text in TEMPLATES.items()],
  )
  for split, facts in FACTS.items():
    name = f'{split}.slim.jsonl' + ('.gz' if split == 'dev' else '')
    write(folder / name, [slim(*fact) for fact in facts])
  return folder


def texts(task):
  rows = [task.example(index) for index in range(len(task))]
  return [(row['inputs_pretokenized'], row['targets_pretokenized']) for row in rows]


def test_a_fact_is_its_template_with_a_gap_for_the_object(folder, vocabulary):
  task = load_task('lama_trex_P36', 'train', vocabulary)
  assert texts(task) == [
      ('The capital of France is <extra_id_0> .', 'Paris'),
      ('The capital of Peru is <extra_id_0> .', 'Lima'),
  ]
  assert task[0]['inputs'].tolist() == [
      *vocabulary.encode('The capital of France is'),
      vocabulary.sentinel_ids[0],
      *vocabulary.encode('.'),
      1,
  ]
  assert task[0]['targets'].tolist() == [*vocabulary.encode('Paris'), 1]
  example = task.example(1)
  assert (example['sub'], example['obj'], example['idx']) == ('Peru', '<extra_id_0>', 1)
  assert example['obj_label'] == 'Lima'
  # A subject is text, whatever it looks like; the object may come first.
  assert texts(load_task('lama_trex_P36', 'validation', vocabulary)) == [
      ('The capital of Wales [Y] is <extra_id_0> .', 'Cardiff')
  ]
  assert texts(load_task('lama_trex_P1376', 'test', vocabulary)) == [
      ('<extra_id_0> is ruled from Rom .', 'Italy')
  ]


def batch_of(task, template, length=9):
  return TrainBatches(
      task,
      1,
      feature_lengths={'inputs': 16, 'targets': 4},
      vocab_size=5000,
      num_virtual_tokens=length,
      placement=template,
  )


def test_the_paper_s_template_holds_the_gap_and_not_the_answer(folder, vocabulary):
  task = load_task('lama_trex_P36', 'train', vocabulary)
  batches = batch_of(task, (3, 'sub', 3, 'obj', 3, 'text: </s>'))
  rows = {tuple(batches[step].encoder_input_tokens[0]) for step in range(2)}
  slots = [[5000 + first + i for i in range(3)] for first in (0, 3, 6)]
  expected = {
      (
          *slots[0], *vocabulary.encode(subject), *slots[1], vocabulary.sentinel_ids[0],
          *slots[2], 1,
      )
      for subject in ('France', 'Peru')
  }
  assert {tuple(token for token in row if token) for row in rows} == expected
  message = "'obj_label', which in lama_trex_P36, split 'train', is the answer"
  with pytest.raises(ValueError, match=message):
    batch_of(task, '{3} {sub} {3} {obj_label} {3}')
  with pytest.raises(ValueError, match="the field 'idx', which is no text: in example 0 .* 0"):
    batch_of(task, '{3} {sub} {3} {idx} {3}')


def test_a_file_under_another_of_its_names_is_another_source(folder, vocabulary):
  assert load_task('lama_trex_P36', 'validation', vocabulary).example(0)['sub'].startswith('Wales')
  # The plain file is looked for before the gzipped one.
  write(folder / 'dev.slim.jsonl', [slim('P36', 'Egypt', 'Cairo')])
  task = load_task('lama_trex_P36', 'validation', vocabulary)
  assert (len(task), task.example(0)['sub']) == (1, 'Egypt')
  (folder / 'dev.slim.jsonl').unlink()
  assert load_task('lama_trex_P36', 'validation', vocabulary).example(0)['sub'].startswith('Wales')


def test_the_choices_are_the_relations_objects_of_all_splits(folder, vocabulary):
  for split, targets in [('train', [3, 1]), ('validation', [0]), ('test', [2, 3])]:
    made = load_task('lama_trex_P36', split, vocabulary)
    read = load_task('lama_trex_P36', split, vocabulary)
    for task in (made, read):
      assert task.label_classes == ['Cardiff', 'Lima', 'Nairobi', 'Paris']
      assert [task.target(index) for index in range(len(task))] == targets
      assert task.postprocess_fn('Nairobi') == 2
      assert task.postprocess_fn('Italy') == -1
      (metric,) = task.metric_fns
      assert metric([3, 1, 0, 2], [3, 1, 0, -1]) == {'hit_at_1': 75.0}
  assert load_task('lama_trex_P1376', 'train', vocabulary).label_classes == ['Italy', 'Norway']


def write_words(folder, content):
  (folder / '29k-vocab.json').write_text(
      content if isinstance(content, str) else json.dumps(content)
  )


WORDS = ['Paris', 'Nairobi', 'Berlin', 'Paris', '%']


def test_among_the_words_of_the_list_other_facts_are_left_out_and_counted(folder, vocabulary):
  write_words(folder, {'gpt2-xl': ['Ġ%'], 'bert-base-cased': WORDS})
  with pytest.warns(UserWarning, match=r'1 of 2 facts .* P36 are left out.* none of the 4 words'):
    task = load_task('lama_trex_P36_29k', 'train', vocabulary)
  assert texts(task) == [('The capital of France is <extra_id_0> .', 'Paris')]
  assert task.label_classes == ['%', 'Berlin', 'Nairobi', 'Paris']
  test = load_task('lama_trex_P36_29k', 'test', vocabulary)
  assert [test.target(index) for index in range(len(test))] == [2, 3]
  again = load_task('lama_trex_P36_29k', 'test', vocabulary)
  assert again.label_classes == test.label_classes and again.postprocess_fn('Berlin') == 1
  # Another list makes other tasks.
  write_words(folder, {'bert-base-cased': ['Paris', 'Lima', 'Nairobi']})
  task = load_task('lama_trex_P36_29k', 'train', vocabulary)
  assert [target for _, target in texts(task)] == ['Paris', 'Lima']
  with pytest.raises(ValueError, match=r'no fact .* P36 whose object is a word of the list'):
    load_task('lama_trex_P36_29k', 'validation', vocabulary)


@pytest.mark.parametrize(
    ('content', 'reason'),
    [
        ('{"bert', 'Unterminated string'),
        ({'gpt2-xl': ['x']}, "'bert-base-cased'. Expected a JSON object"),
        ({'bert-base-cased': ['x', 3]}, 'something else than words'),
        ({'bert-base-cased': ['x', ' ']}, 'something else than words'),
        ({'bert-base-cased': []}, 'it is empty'),
    ],
)
def test_a_bad_list_of_words_is_named(folder, vocabulary, content, reason):
  write_words(folder, content)
  with pytest.raises(ValueError, match=rf'29k-vocab\.json: .*{reason}'):
    load_task('lama_trex_P36_29k', 'train', vocabulary)


def test_a_mixture_names_the_relations_of_which_there_are_no_facts(
    folder, vocabulary, monkeypatch
):
  import_seqio()
  from prompt_tuning_jax.tasks import lama

  rows = [{'relation': name, 'template': '[X] [Y]'} for name in lama.RELATIONS]
  write(folder / 'relations.jsonl', rows)
  with pytest.warns(UserWarning) as warned:
    loaded = load_task_or_mixture('lama_trex', 'validation', vocabulary)
  assert {task.name: rate for task, rate in loaded} == {
      'lama_trex_P36': 1, 'lama_trex_P1376': 1
  }  # fmt: skip
  (message,) = [str(w.message) for w in warned]
  assert message.startswith("lama_trex, split 'validation': 39 of its 41 tasks have no examples")
  left_out = message.split('are left out: ')[1].split('. ')[0].split(', ')
  assert sorted(left_out) == sorted(
      f'lama_trex_{name}' for name in lama.RELATIONS if name not in TEMPLATES
  )
  # A file that is missing is no relation without facts.
  (folder / 'dev.slim.jsonl.gz').unlink()
  with pytest.raises(FileNotFoundError, match='dev.slim.jsonl'):
    load_task_or_mixture('lama_trex', 'validation', vocabulary)


def test_a_mixture_of_nothing_says_what_is_missing(folder, vocabulary):
  import_seqio()
  from prompt_tuning_jax.tasks import lama

  rows = [{'relation': name, 'template': '[X] [Y]'} for name in lama.RELATIONS]
  write(folder / 'relations.jsonl', rows)
  (folder / 'dev.slim.jsonl.gz').write_bytes(gzip.compress(b''))
  with pytest.raises(ValueError, match=r'dev\.slim\.jsonl\.gz holds no fact of the relation'):
    load_task_or_mixture('lama_trex', 'validation', vocabulary)


def test_a_change_in_another_split_changes_the_choices(folder, vocabulary):
  assert load_task('lama_trex_P36', 'train', vocabulary).target(0) == 3
  write(folder / 'test.slim.jsonl', [slim('P36', 'Kenya', 'Nairobi')])
  write(folder / 'dev.slim.jsonl', [slim('P36', 'Egypt', 'Cairo')])
  (folder / 'dev.slim.jsonl.gz').unlink()
  write(folder / 'test.slim.jsonl', [slim('P36', 'Iraq', 'Baghdad')])
  task = load_task('lama_trex_P36', 'train', vocabulary)
  assert task.label_classes == ['Baghdad', 'Cairo', 'Lima', 'Paris']


def test_the_folders_of_p_tunings_own_data_give_the_same_examples(folder, vocabulary):
  expected = texts(load_task('lama_trex_P36', 'test', vocabulary))
  for file in [*folder.iterdir()]:
    file.unlink()
  write(
      folder / 'single_relations' / 'P36.jsonl',
      [{'relation': 'P36', 'template': TEMPLATES['P36'], 'type': 'N-1'}],
  )
  for split, facts in FACTS.items():
    rows = [
        {'predicate_id': name, 'sub_label': subject, 'obj_label': obj, 'evidences': []}
        for name, subject, obj in facts
        if name == 'P36'
    ]
    write(folder / 'fact-retrieval' / 'original' / 'P36' / f'{split}.jsonl', rows)
  task = load_task('lama_trex_P36', 'test', vocabulary)
  assert texts(task) == expected
  assert task.label_classes == ['Cardiff', 'Lima', 'Nairobi', 'Paris']


def test_a_template_of_virtual_tokens_places_the_subject(folder, vocabulary):
  task = load_task('lama_trex_P36', 'train', vocabulary)
  placement = Template((3, 'sub', 3, 'text: <extra_id_0>', 3))
  batches = EvalBatches(
      task, 2, feature_lengths={'inputs': 16, 'targets': 8}, vocab_size=5000,
      num_virtual_tokens=9, placement=placement, lengths='pad',
  )  # fmt: skip
  batch, _ = next(iter(batches))
  row = batch.encoder_input_tokens[0]
  virtual = [*range(5000, 5009)]
  expected = [
      *virtual[:3], *vocabulary.encode('France'), *virtual[3:6],
      vocabulary.sentinel_ids[0], *virtual[6:],
  ]  # fmt: skip
  assert row[: len(expected)].tolist() == expected
  assert not row[len(expected) :].any()


@pytest.mark.parametrize(
    ('file', 'bad', 'reason'),
    [
        ('train.slim.jsonl', '{"relation":', 'Expecting value'),
        ('train.slim.jsonl', '["P36"]', r"\['P36'\] is no object"),
        ('train.slim.jsonl', '{"relation": "P36", "sub_label": "x"}', "no field 'obj_label'"),
        ('train.slim.jsonl', '{"sub_label": "x", "obj_label": "y"}', "no field 'relation'"),
        ('test.slim.jsonl', json.dumps(slim('P36', 'x', None)), "'obj_label' is not a text"),
        ('test.slim.jsonl', json.dumps(slim('P36', ' ', 'y')), "'sub_label' is empty"),
        ('relations.jsonl', '{"relation": "P36"}', "no field 'template'"),
        ('relations.jsonl', '{"relation": "P36", "template": "[X] is"}', r"is '\[X\] is'"),
        ('relations.jsonl', '{"relation": "P36", "template": "[X] [X] [Y]"}', 'template is'),
    ],
)
def test_a_bad_line_is_named_with_its_file(folder, vocabulary, file, bad, reason):
  path = folder / file
  first, *others = path.read_text().splitlines()
  path.write_text('\n'.join([first, bad, *others]) + '\n')
  with pytest.raises(ValueError, match=rf'{file}, line 2: .*{reason}.* Expected one JSON'):
    load_task('lama_trex_P36', 'train', vocabulary)


def test_missing_facts_templates_and_files_are_named(folder, vocabulary):
  write(folder / 'dev.slim.jsonl.gz', [slim('P1376', 'Oslo', 'Norway')])
  with pytest.raises(ValueError, match=r"dev\.slim\.jsonl\.gz holds no fact .*P36.*'validation'"):
    load_task('lama_trex_P36', 'validation', vocabulary)
  # The other splits are whole, and so are the choices that are left.
  task = load_task('lama_trex_P36', 'test', vocabulary)
  assert task.label_classes == ['Lima', 'Nairobi', 'Paris']
  with pytest.raises(ValueError, match=r'relations\.jsonl holds 0 templates .* P37 instead'):
    load_task('lama_trex_P37', 'train', vocabulary)
  (folder / 'test.slim.jsonl').unlink()
  with pytest.raises(FileNotFoundError) as error:
    load_task('lama_trex_P36', 'train', vocabulary)
  for part in ('test.slim.jsonl or', 'original/P36/test.jsonl', 'PTJ_LOCAL_DATA=', 'P-tuning'):
    assert part in str(error.value)
  assert 'dev.slim' not in str(error.value)


def test_the_tasks_are_registered_where_the_files_are_not(monkeypatch):
  monkeypatch.delenv('PTJ_LOCAL_DATA')
  seqio = import_seqio()
  from prompt_tuning_jax.tasks import lama

  names = {name for name in seqio.TaskRegistry.names() if name.startswith('lama_trex_')}
  assert names == {
      f'lama_trex_{relation}{suffix}' for relation in lama.RELATIONS for suffix in ('', '_29k')
  }
  assert len(lama.RELATIONS) == len(set(lama.RELATIONS)) == 41


@pytest.mark.parametrize(
    ('relation', 'split', 'size', 'num_objects', 'text', 'obj'),
    [
        ('P36', 'train', 416, 338, None, None),
        ('P36', 'validation', 104, 338, 'The capital of Park County is <extra_id_0> .', 'Cody'),
        ('P103', 'validation', 200, 46, 'The native language of Jules Gros is <extra_id_0> .',
         'Breton'),
        ('P103', 'test', 977, 46, None, None),
    ],
)  # fmt: skip
def test_the_shared_files_are_read(
    shared_data, vocabulary, monkeypatch, relation, split, size, num_objects, text, obj
):
  monkeypatch.setenv('PTJ_LOCAL_DATA', str(shared_data))
  task = load_task(f'lama_trex_{relation}', split, vocabulary)
  assert (len(task), len(task.label_classes)) == (size, num_objects)
  assert task.label_classes == sorted(set(task.label_classes))
  for index in range(len(task)):
    example = task.example(index)
    assert task.label_classes[task.target(index)] == example['obj_label']
  if text is not None:
    assert texts(task)[0] == (text, obj)


@pytest.mark.slow
def test_the_shared_files_hold_as_many_facts_as_they_should(shared_data, monkeypatch):
  monkeypatch.setenv('PTJ_LOCAL_DATA', str(shared_data))
  import_seqio()
  from prompt_tuning_jax.tasks import lama, sources

  totals = dict.fromkeys(('train', 'validation', 'test'), 0)
  for relation in lama.RELATIONS:
    facts = lama.Facts(relation)
    source = sources.LocalFiles(facts)
    for split in totals:
      try:
        totals[split] += source.num_input_examples(split)
      except ValueError as error:
        # These files lack some relations.
        assert 'holds no fact of the relation' in str(error)
  assert totals == {'train': 26772, 'validation': 7055, 'test': 22881}


@pytest.mark.filterwarnings('ignore:.*are left out, for their object')
def test_the_shared_words_and_facts_are_read(shared_data, vocabulary, monkeypatch):
  monkeypatch.setenv('PTJ_LOCAL_DATA', str(shared_data))
  task = load_task('lama_trex_P176_29k', 'validation', vocabulary)
  assert (len(task), len(task.label_classes)) == (193, 18_154)
  assert task.label_classes == sorted(set(task.label_classes))
  for index in range(len(task)):
    assert task.label_classes[task.target(index)] == task.example(index)['obj_label']
