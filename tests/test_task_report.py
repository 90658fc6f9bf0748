"""`prompt-tuning tasks` shows what training gets: its rows, what was cut, the whole split."""

from __future__ import annotations

import json
import os
import re
import sys

import numpy as np
import pytest

from prompt_tuning_jax import cli, screen, task_report
from prompt_tuning_jax.backbones.backbone import Backbone
from prompt_tuning_jax.checkpoints.load import load_backbone
from prompt_tuning_jax.data import cache, seqio_source
from prompt_tuning_jax.data.batches import TrainBatches
from prompt_tuning_jax.data.file_task import FileTask
from prompt_tuning_jax.data.tokenized_task import FORMAT, TokenizedTask
from prompt_tuning_jax.methods.combined import Combined, InDecoder
from prompt_tuning_jax.methods.prefix import Prefix
from prompt_tuning_jax.methods.soft_prompt import SoftPrompt

EXAMPLES = [
    {'inputs': 'a small dog that barks', 'targets': 'animal', 'idx': 7, 'head': 'dog'},
    {'inputs': 'an oak', 'targets': 'plant', 'idx': 8, 'head': 'oak'},
    {'inputs': 'a herb of gardens', 'targets': 'plant', 'idx': 7, 'head': 'herb'},
]
CLASSES = ['animal', 'plant', 'substance']


@pytest.fixture(autouse=True)
def _no_weights(tmp_path, monkeypatch):
  """Neither the weights nor seqio are asked for, unless a test says otherwise."""

  def refuse(*args):
    raise AssertionError('the report needs neither weights nor seqio')

  monkeypatch.setattr(Backbone, 'params', property(refuse))
  monkeypatch.setattr(seqio_source, 'import_seqio', refuse)
  monkeypatch.setenv('PTJ_CACHE_DIR', str(tmp_path / 'cache'))
  monkeypatch.setenv('COLUMNS', '100')


@pytest.fixture(scope='module')
def nano():
  return load_backbone('nano')


@pytest.fixture
def keep(nano):
  """Puts a task into the cache, where the report finds it."""

  def put(examples=EXAMPLES, name='kinds', split='train', **settings):
    settings = {'label_classes': CLASSES} | settings
    task = TokenizedTask.from_examples(
        examples, nano.vocabulary, name=name, split=split, **settings
    )
    task.save(cache.cache_path(name, split, nano.vocabulary))
    return task

  return put


@pytest.fixture
def report(nano):
  def run(**kwargs):
    return '\n'.join(task_report.tasks(backbone=nano, **{'task': 'kinds', **kwargs}))

  return run


def ids_below(text, title, number=0):
  """The ids that stand below the number-th title of this kind; … is passed over."""
  lines = text.splitlines()
  start = [n for n, line in enumerate(lines) if line.startswith(f'  {title}')][number]
  ids = []
  for line in lines[start + 2 :: 2]:
    if not re.fullmatch(r'    [\d… ]+', line):
      break
    ids += [int(word) for word in line.split() if word != '…']
  return ids


def without_padding(row):
  return row[: np.flatnonzero(row).max() + 1].tolist()


@pytest.mark.parametrize(
    ('method', 'placement'),
    [
        (None, 'prefix'),
        (SoftPrompt(3), 'prefix'),
        (SoftPrompt(3), 'suffix_before_eos'),
        (SoftPrompt(4), '{2} {head} is {2} {inputs}'),
        (Prefix(5), 'prefix'),
        (Combined((SoftPrompt(2), InDecoder(SoftPrompt(3)))), 'after_bos'),
    ],
)
@pytest.mark.parametrize('length', [4, 40])
@pytest.mark.filterwarnings('ignore:TASK_FEATURE_LENGTHS')
def test_the_rows_are_those_of_training_and_what_is_cut_is_the_rest(
    keep, report, nano, method, placement, length
):
  lengths = {'inputs': length, 'targets': 2}
  task = keep()
  text = report(method=method, placement=placement, feature_lengths=lengths, examples=3)
  layout = dict(
      vocab_size=nano.spec.vocab_size,
      placement=placement,
      num_virtual_tokens=method.num_virtual_tokens if method else 0,
      num_decoder_virtual_tokens=method.num_decoder_virtual_tokens if method else 0,
  )
  batches = TrainBatches(task, 3, feature_lengths=lengths, **layout)
  whole = TrainBatches(task, 3, feature_lengths={'inputs': 99, 'targets': 9}, **layout)
  first_id, num_cut = nano.spec.vocab_size, 0
  for row, (_, index) in enumerate(batches.rows(0)):
    encoder = without_padding(batches[0].encoder_input_tokens[row])
    targets = without_padding(batches[0].decoder_target_tokens[row])
    read = batches[0].decoder_input_tokens[row][: len(targets)].tolist()
    assert ids_below(text, 'encoder', index) == encoder
    assert ids_below(text, 'decoder, input', index) == read
    said = targets[layout['num_decoder_virtual_tokens'] :]
    assert ids_below(text, 'decoder, target', index) == said
    complete = without_padding(whole[0].encoder_input_tokens[row])
    lost = [t for t in complete if t < first_id][len([t for t in encoder if t < first_id]) :]
    if len(complete) > len(encoder):
      if isinstance(placement, str) and '{' not in placement:
        assert ids_below(text, '✂ cut', num_cut) == lost
      num_cut += 1
  assert text.count('✂ cut') == num_cut
  assert (num_cut > 0) == (length < 40)


def test_an_example_is_told_in_text_pieces_ids_and_what_was_lost(keep, report):
  keep()
  text = report(
      method=SoftPrompt(20), feature_lengths={'inputs': 5, 'targets': 1}, examples=1
  )
  assert text.split('\n\n')[1] == """\
example 0, idx 7
input      'a small dog that barks'
target     'animal'
  encoder, 20 virtual and 5 other tokens
    ⟨P0⟩ … ⟨P19⟩ ▁a ▁small ▁dog ▁that ▁bark
    4224 … 4243  6  155    1231 26    2684
  ✂ cut: 2 of 7 tokens, the limit is 5
    s </s>
    3 1
  decoder, input
    <pad>
    0
  decoder, target
    ▁animal
    1092
  ✂ cut: 1 of 2 tokens, the limit is 1
    </s>
    1"""


def test_the_setting_is_said(keep, report):
  keep(split='validation')
  head = report(method=SoftPrompt(20), split='validation', examples=0).split('\n\n')[0]
  assert head == """\
kinds, split 'validation', 3 examples
vocabulary of nano: 4,100 ids, 4,224 rows in the embedding table
limits     inputs 512, targets 2 tokens (TASK_FEATURE_LENGTHS is not set)
prompt     SoftPrompt, 20 virtual tokens, placed 'prefix'
answers    3 classes: animal, plant, substance
metrics    accuracy"""


def test_the_whole_split_is_summed_up(keep, report):
  keep()
  text = report(feature_lengths={'inputs': 6, 'targets': 8}, examples=0)
  assert text.split('\n\n')[1] == """\
the whole split, 3 examples
inputs     median 6 tokens, 95 % have at most 7, the longest 7 (example 0); 1 (33.3%) are longer
           than 6 and are cut, the worst by 1
                     4 ████████████████████████████████████████ 1
                     5 0
                     6 ████████████████████████████████████████ 1
                     7 ████████████████████████████████████████ 1  ✂ 1 longer than 6
targets    median 2 tokens, 95 % have at most 2, the longest 2 (example 0); none is longer than 8
                     2 ████████████████████████████████████████ 3
answers
           plant      66.7%  ████████████████ 2
           animal     33.3%  ████████ 1
           substance   0.0%  0
labels     every example has one
ids        one is shared by several examples, 2 in all: 7 by the examples 0 and 2"""


def test_cut_targets_are_said_to_be_what_is_never_learned(keep, report):
  keep()
  text = ' '.join(report(feature_lengths={'inputs': 50, 'targets': 1}, examples=0).split())
  assert (
      '3 (100.0%) are longer than 1 and are cut, the worst by 1: the model never learns how '
      'these end' in text
  )


def test_free_text_missing_labels_and_ids_with_parts_are_told(keep, report):
  examples = [
      {'inputs': f'x {n % 2}', 'targets': '<unk>', 'idx/a': n % 2, 'idx/b': 0} for n in range(4)
  ]
  keep(examples, label_classes=None)
  text = report(examples=1)
  assert 'example 0, idx/a 0, idx/b 0' in text
  assert 'answers    free text\nmetrics    accuracy (by default)' in text
  assert '1 different answers; the most frequent\n           <unk> 100.0%' in text
  assert 'labels     4 of 4 examples have none, the first is example 0' in text
  joined = ' '.join(text.split())
  assert "2 are shared by several examples, 4 in all: ('0', '0') by the examples 0 and 2" in joined


def test_a_long_row_is_shown_from_both_ends(keep, report, nano):
  keep([{'inputs': list(range(10, 310)), 'targets': [330, 1]}], label_classes=None)
  text = report(examples=1)
  assert f'… {300 - 64} more …' in text
  ids = ids_below(text, 'encoder')
  assert ids == [*range(10, 58), *range(294, 310)]


def test_a_histogram_counts_every_example_once():
  rng = np.random.default_rng(0)
  for longest in (1, 9, 10, 11, 57, 480, 12345):
    lengths = np.append(rng.integers(1, longest + 1, 500), longest)
    lines = screen.histogram(lengths, longest)
    counts, ranges = [], []
    for line in lines:
      name, *_, count = line.split()
      counts.append(int(count.replace(',', '')))
      ranges.append([int(end) for end in name.split('–')])
    assert len(lines) <= 10
    for (low, *high), count in zip(ranges, counts):
      assert count == np.sum((lengths >= low) & (lengths <= (high or [low])[0]))
    assert sum(counts) == len(lengths)


def test_of_a_mixture_each_tasks_first_example_is_shown(keep, report, nano, tmp_path):
  keep(name='one')
  keep(EXAMPLES[1:], name='two')
  mixture = {'format': FORMAT, 'code': {}, 'members': [['one', 3.0], ['two', 1.0]],
             'splits': {'one': ['train'], 'two': ['train']}}  # fmt: skip
  os.makedirs(tmp_path / 'cache' / 'both')
  (tmp_path / 'cache' / 'both' / 'mixture.json').write_text(json.dumps(mixture))
  text = report(task='both', examples=3)
  assert text.startswith("both, a mixture: 2 tasks with the split 'train'\n")
  assert 'one, 3 examples, 75.0% of the examples that training draws' in text
  assert 'two, 2 examples, 25.0% of the examples that training draws' in text
  assert re.findall(r'^example .*', text, re.MULTILINE) == ['example 0, idx 7', 'example 0, idx 8']
  assert text.count('inputs     median') == 2


def test_a_task_of_files_is_shown_with_what_was_skipped(report, tmp_path):
  (tmp_path / 'mine.tsv').write_text('text\tlabel\nan oak\t1\nbroken\n')
  task = FileTask(
      'mine', {'validation': tmp_path / 'mine.tsv'}, '{text}', 'label',
      label_names=['0', '1'], on_bad_line='skip', metrics=['accuracy', 'mean_f1'],
  )  # fmt: skip
  with pytest.warns(UserWarning, match='1 of 2 lines of mine were skipped'):
    text = report(task=task)
  assert text.startswith("mine, split 'validation', 1 example\n")
  assert 'metrics    accuracy, mean_multiclass_f1(num_classes=2)' in text
  assert 'skipped    1 line (FileTask.on_bad_line)' in text


def test_no_split_of_the_name_is_an_error_that_lists_them(report, tmp_path):
  task = FileTask('mine', {'dev': tmp_path / 'mine.tsv'}, 'a', 'b')
  with pytest.raises(ValueError, match="mine has no split 'train'.* FileTask.files has dev"):
    report(task=task)


def test_colour_is_for_terminals_only(keep, report, monkeypatch):
  keep()
  plain = report(method=SoftPrompt(3), feature_lengths={'inputs': 4, 'targets': 4})
  assert '\x1b' not in plain
  monkeypatch.setattr(sys.stdout, 'isatty', lambda: True)
  colored = report(method=SoftPrompt(3), feature_lengths={'inputs': 4, 'targets': 4})
  assert re.sub(r'\x1b\[\d+m', '', colored) == plain
  assert '\x1b[36m⟨P0⟩\x1b[0m' in colored and '\x1b[31m  ✂ cut' in colored
  monkeypatch.setenv('NO_COLOR', '1')
  assert report(method=SoftPrompt(3), feature_lengths={'inputs': 4, 'targets': 4}) == plain


# The command.


@pytest.fixture
def run(capsys, elsewhere):
  def run_command(*argv):
    status = cli.main(['tasks', *argv])
    return status, *capsys.readouterr()

  return run_command


def test_the_command_shows_a_task_as_a_recipe_has_it(keep, run):
  keep(name='taskless_super_glue_cb_v102', split='train')
  status, printed, errors = run('--gin_file=cb_nano', '--examples=1')
  assert (status, errors) == (0, '')
  assert 'limits     inputs 256, targets 8 tokens\n' in printed
  assert "prompt     SoftPrompt, 20 virtual tokens, placed 'prefix'" in printed
  assert printed.count('\nexample ') == 1


def test_a_name_and_a_split_on_the_command_line_win_over_a_recipe(keep, run):
  keep(split='test')
  flags = ['--split=test', '--gin.PROMPT_LENGTH=3', '--gin.PLACEMENT={1} {inputs} {2}']
  status, printed, errors = run('kinds', '--gin_file=cb_nano', *flags)
  assert (status, errors) == (0, '')
  assert printed.startswith("kinds, split 'test', 3 examples\n")
  assert '3 virtual tokens' in printed and '⟨P0⟩ ▁a ▁small' in printed
  assert printed.count('\nexample ') == 3


@pytest.mark.slow
def test_the_list_holds_every_name_once_and_reads_no_data(run, monkeypatch, tmp_path):
  monkeypatch.undo()
  monkeypatch.setenv('COLUMNS', '100')
  monkeypatch.setenv('PTJ_LOCAL_DATA', str(tmp_path / 'nowhere'))
  status, printed, errors = run()
  assert (status, errors) == (0, '')
  assert all(len(line) <= 100 for line in printed.splitlines())
  seqio = seqio_source.import_seqio()
  names = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
  listed = []
  above = ''.join(re.sub(r'\n +', ' ', printed.split('\n\n[')[0] + '\n').split('\n'))
  several = re.compile(r'((?:\[taskless_\])?\w+)\{([^}]*)\}')
  text = several.sub(lambda m: ' '.join(m[1] + x for x in m[2].split(', ')), above)
  text = re.sub(r'mixture of [\w, ]+?(?=\[|  |$)', ' ', text)
  for twin, name in re.findall(r'(\[taskless_\])?(\w+)', text):
    if name in names:
      listed += [name, f'taskless_{name}'] if twin else [name]
  assert 'demo\n  demo_gloss_category\n      train, validation, test · 8 classes: animal' in printed
  assert names <= set(listed)
  assert 'classes, known from its files' in printed
  assert 'mixture of super_glue_wsc_v102_simple_eval' in ' '.join(printed.split())
