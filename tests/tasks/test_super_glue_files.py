"""The official files of SuperGLUE give the rows of TFDS and the text of T5, line by line."""


import pytest

from prompt_tuning_jax.data.cache import load_task
from prompt_tuning_jax.data.seqio_source import import_seqio
from tests.tasks.super_glue_samples import NEWS, OFFICIAL, PARTY, TASKS, TOLD, write_official, wsc

pytestmark = pytest.mark.usefixtures('own_cache')


CASES = [pytest.param(*key, *case, id=key[0]) for key, case in OFFICIAL.items()]


@pytest.mark.parametrize(('task', 'file', 'lines', 'expected'), CASES)
def test_a_line_of_an_official_file_becomes_text(
    vocabulary, tmp_path, monkeypatch, task, file, lines, expected
):
  monkeypatch.setenv('PTJ_LOCAL_DATA', str(tmp_path))
  write_official(tmp_path, file, lines)
  word, split = TASKS[task]
  taskless = load_task(f'taskless_{task}', split, vocabulary)
  with_word = load_task(task, split, vocabulary)
  assert len(taskless) == len(with_word) == len(expected)
  for index, (text, target, value, numbers) in enumerate(expected):
    numbers = numbers if isinstance(numbers, dict) else {'idx': numbers}
    for loaded, text in [(taskless, text), (with_word, f'{word} {text}')]:
      texts = {'inputs_pretokenized': text, 'targets_pretokenized': target}
      assert loaded.example(index) == texts | numbers
      assert loaded._row(index)[1] == value
      for feature in ('inputs', 'targets'):
        ids = vocabulary.encode(texts[f'{feature}_pretokenized'])
        assert loaded[index][feature].tolist() == [*ids, 1]
  unlabelled = sum(target == '<unk>' or value == -1 for _, target, value, _ in expected)
  assert taskless.manifest['unlabelled']['count'] == unlabelled


def tfds_rows(task, path, split):
  """What the builder of TFDS itself reads from an official file."""
  import_seqio()
  from tensorflow_datasets.text import super_glue

  config = task.removeprefix('super_glue_').partition('_')[0].replace('wsc', 'wsc.fixed')
  builder = super_glue.SuperGlue.__new__(super_glue.SuperGlue)
  builder._builder_config = next(
      c for c in super_glue.SuperGlue.BUILDER_CONFIGS if c.name == config
  )
  names = ['choice1', 'choice2'] if config == 'copa' else builder.builder_config.label_classes
  for _, row in builder._generate_examples(str(path), split):
    if isinstance(label := row.get('label'), str):
      row['label'] = list(names).index(label)
    yield row


def our_rows(task, folder, split, monkeypatch):
  monkeypatch.setenv('PTJ_LOCAL_DATA', str(folder))
  seqio = import_seqio()
  import prompt_tuning_jax.tasks  # noqa: F401

  source = seqio.TaskRegistry.get(task).source
  assert split in source.splits
  for row in source.get_dataset(split, shuffle=False).as_numpy_iterator():
    yield {name: plain(value) for name, value in row.items()}


def plain(value):
  if isinstance(value, dict):
    return {name: plain(part) for name, part in value.items()}
  if hasattr(value, 'tolist'):
    value = value.tolist()
  if isinstance(value, list):
    return [plain(part) for part in value]
  return value.decode() if isinstance(value, bytes) else value


def assert_rows_of_tfds(ours, theirs):
  ours, theirs = list(ours), list(theirs)
  assert len(ours) == len(theirs) > 0
  for row, expected in zip(ours, theirs):
    assert row == expected


@pytest.mark.parametrize(('task', 'file', 'lines', 'expected'), CASES)
def test_rows_of_official_files_are_those_of_tfds(
    tmp_path, monkeypatch, task, file, lines, expected
):
  split = TASKS[task][1]
  # TFDS takes a missing label for a test set.
  path = write_official(tmp_path, file, lines)
  theirs = tfds_rows(task, path, 'test')
  assert_rows_of_tfds(our_rows(task, tmp_path, split, monkeypatch), theirs)


# WiC's training file has two rows of the same idx.
@pytest.mark.filterwarnings('ignore:.*WiC/train.jsonl. 2 of 5,428 examples share their idx')
@pytest.mark.parametrize(('split', 'name'), [('train', 'train'), ('validation', 'val')])
@pytest.mark.parametrize(
    'folder', ['BoolQ', 'CB', 'COPA', 'MultiRC', 'RTE', 'ReCoRD', 'WSC', 'WiC']
)
def test_all_real_rows_are_those_of_tfds(shared_data, monkeypatch, folder, split, name):
  task = f'super_glue_{folder.lower()}_v102'
  if folder == 'WSC':
    task += '_simple_train' if split == 'train' else '_simple_eval'
  path = shared_data / 'superglue' / folder / f'{name}.jsonl'
  assert_rows_of_tfds(
      our_rows(task, shared_data, split, monkeypatch), tfds_rows(task, path, split)
  )


# Real examples of each split: ReCoRD has one for each answer, WSC trains on true rows only.
SIZES = {
    'boolq': (64, 3270),
    'cb': (250, 56),
    'copa': (400, 100),
    'multirc': (321, 4848),
    'record': (44, 46),
    'rte': (2490, 277),
    'wic': (5428, 638),
    'wsc': (259, 104),
}


@pytest.mark.filterwarnings('ignore:.*WiC/train.jsonl. 2 of 5,428 examples share their idx')
@pytest.mark.parametrize('name', SIZES)
@pytest.mark.slow
def test_the_official_files_are_read(shared_data, vocabulary, monkeypatch, name):
  monkeypatch.setenv('PTJ_LOCAL_DATA', str(shared_data))
  for split, size in zip(('train', 'validation'), SIZES[name], strict=True):
    task = f'taskless_super_glue_{name}_v102'
    if name == 'wsc':
      task += {'train': '_simple_train', 'validation': '_simple_eval'}[split]
    loaded = load_task(task, split, vocabulary)
    assert len(loaded) == size
    loaded.require_labels()
    # The right answers score 100.
    targets = [loaded.target(index) for index in range(size)]
    if name == 'wsc' and split == 'train':
      assert loaded.metric_fns == [] and all(
          loaded.example(index)['label'] == 1 for index in range(size)
      )
      continue
    predictions = [
        loaded.postprocess_fn(example['targets_pretokenized'], example=example)
        for example in map(loaded.example, range(size))
    ]
    scores = {}
    for metric in loaded.metric_fns:
      scores |= metric(targets, predictions)
    # Of WSC a right answer to a wrong proposal is another.
    best = 100 * 38 / 104 if name == 'wsc' else 100
    assert scores == {name: pytest.approx(best) for name in scores}


@pytest.mark.parametrize(
    ('lines', 'task', 'reason'),
    [
        ([{'idx': 2, 'passage': PARTY | {'questions': 3}}], 'multirc', "'int' object is not iter"),
        ([{'passage': PARTY}], 'multirc', "no field 'idx'"),
        ([{'idx': 2, 'passage': PARTY | {'text': None}}], 'multirc', "'text' is not a text"),
        ([{'idx': 1, 'passage': NEWS, 'qas': [{'idx': 'a', 'query': ''}]}], 'record', "'a', not a"),
        (
            [{'idx': 1, 'passage': NEWS | {'entities': [{'start': 40, 'end': 70}]}, 'qas': []}],
            'record', 'the entity 40 to 70 is not in the text of 56 characters',
        ),
        ([wsc(TOLD, 0, 'Mark', 9, 'he')], 'wsc', 'span2_index is 9, but the text has 6 words'),
        ([wsc(TOLD, 0, 'Luke', 4, 'he')], 'wsc', "span1_text 'Luke' is not in the text"),
        ([wsc(TOLD, 0, 'Mark', 4, 'he', label=2)], 'wsc', 'unknown label 2'),
    ],
)  # fmt: skip
def test_a_line_that_does_not_fit_is_named(
    vocabulary, tmp_path, monkeypatch, lines, task, reason
):
  monkeypatch.setenv('PTJ_LOCAL_DATA', str(tmp_path))
  (name, file), (good, _) = next(
      item for item in OFFICIAL.items() if f'_{task}_' in item[0][0] and 'val' in item[0][1]
  )
  write_official(tmp_path, file, good[:1] + lines)
  with pytest.raises(ValueError, match=rf'val\.jsonl, line 2: .*{reason}.* Expected .*idx'):
    load_task(name, 'validation', vocabulary)


BEE = ['The bee landed on the flower, for it had pollen.', 'it', 'The bee,the flower', 'the flower']
ASK = ['He asked Joe, for he was sad. So he sat.', 'he', 'Bob, Joe', 'Bob']


def test_dpr_is_read_from_its_official_file(vocabulary, tmp_path, monkeypatch):
  monkeypatch.setenv('PTJ_LOCAL_DATA', str(tmp_path))
  path = tmp_path / 'dpr' / 'test.c.txt'
  path.parent.mkdir()
  path.write_text(' \n'.join([*BEE, '', *ASK, '', '']))
  task = load_task('dpr_v001_simple', 'test', vocabulary)
  assert [task.example(index) for index in range(len(task))] == [
      {
          'inputs_pretokenized': 'wsc: The bee landed on the flower, for *it* had pollen.',
          'targets_pretokenized': 'the flower',
      },
      {
          'inputs_pretokenized': 'wsc: He asked Joe, for *he* was sad. So he sat.',
          'targets_pretokenized': 'Bob',
      },
  ]
  assert task.target(0) == 'the flower' and task.label_classes is None
  import_seqio()
  from tensorflow_datasets.text import definite_pronoun_resolution as dpr

  builder = dpr.DefinitePronounResolution.__new__(dpr.DefinitePronounResolution)
  theirs = [row for _, row in builder._generate_examples(str(path))]
  assert list(our_rows('dpr_v001_simple', tmp_path, 'test', monkeypatch)) == theirs


@pytest.mark.parametrize(
    ('lines', 'reason'),
    [
        ([*BEE[:2], 'The bee', 'The bee'], "'The bee' are not two candidates"),
        ([*BEE[:3], 'a flower'], "'a flower', is neither of 'The bee,the flower'"),
        (BEE[:2], "'' are not two candidates"),
    ],
)
def test_a_bad_example_of_dpr_is_named(vocabulary, tmp_path, monkeypatch, lines, reason):
  monkeypatch.setenv('PTJ_LOCAL_DATA', str(tmp_path))
  path = tmp_path / 'dpr' / 'train.c.txt'
  path.parent.mkdir()
  path.write_text('\n'.join([*ASK, '', *lines]))
  with pytest.raises(ValueError, match=rf'train\.c\.txt, line 6: .*{reason}'):
    load_task('dpr_v001_simple', 'train', vocabulary)
