"""`prompt-tuning neighbors`: what it prints and writes, of which files, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest

import prompt_tuning_jax as ptj
from prompt_tuning_jax import artifact, cli, initializers, neighbors
from prompt_tuning_jax.checkpoints.load import load_backbone
from prompt_tuning_jax.neighbors import report as report_lib
from prompt_tuning_jax.neighbors.report import analyze_prompts
from prompt_tuning_jax.prompt_files import export_prompt, load_prompt
from prompt_tuning_jax.typing import Injection
from tests import saved_backbone

LABELS = ['animal', 'plant', 'a very small tree']

pytestmark = pytest.mark.usefixtures('elsewhere')


@pytest.fixture(scope='module')
def backbone(backbone_dir):
  return load_backbone(backbone_dir)


@pytest.fixture(scope='module')
def injection(backbone):
  """Six positions: three labels, as they start, then the first again, longer, and random ones."""
  rows = np.random.default_rng(0).normal(size=(6, backbone.spec.d_model))
  rows[:3] = initializers.label_embeddings(LABELS, backbone)
  rows[3] = 1000 * rows[0]
  return Injection(jnp.asarray(rows, jnp.float32))


@pytest.fixture(scope='module')
def prompt_file(backbone, injection, tmp_path_factory):
  path = tmp_path_factory.mktemp('prompts') / 'animal' / 'prompt.safetensors'
  artifact.save_prompt(path, injection, backbone=backbone)
  return path


@pytest.fixture
def run(backbone_dir, capsys):
  """Runs the command and returns status, output and errors."""

  def run_command(*flags):
    where = f'--gin.INITIAL_CHECKPOINT_PATH={backbone_dir}'
    status = cli.main(['neighbors', where, *map(str, flags)])
    return status, *capsys.readouterr()

  return run_command


def _records(folder):
  lines = (folder / 'neighbors.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def _of(records, kind):
  return [record for record in records if record['kind'] == kind]


def _size_of_png(path):
  content = path.read_bytes()
  assert content.startswith(b'\x89PNG\r\n')
  return int.from_bytes(content[16:20]), int.from_bytes(content[20:24])


def test_a_prompt_is_printed_and_written(run, prompt_file, backbone, injection, tmp_path):
  status, printed, errors = run(
      f'--gin.PROMPT_FILE={prompt_file}', f'--gin.CLASS_LABELS={LABELS}',
      '--gin.NUM_NEIGHBORS=3', f'--gin.OUTPUT_DIR={tmp_path}/out',
  )  # fmt: skip
  assert (status, errors) == (0, '')
  assert printed.startswith(f'{prompt_file}, by the words of ')
  words = neighbors.nearest_words(backbone, injection, 3)
  for number, found in enumerate(words):
    near = ' · '.join(f'{word} {cosine:.2f}' for word, cosine in found)
    assert re.search(rf'^\|  +{number} \| +[\d.e+]+ \| {re.escape(near)} +\|', printed, re.M)
  assert '▁animal 1.00' in printed
  assert 'nearest to several: ▁animal (0, 3)' in printed
  assert re.search(r'^\| +0 \| 0, 3 +\| +1.00 \| ▁animal · ', printed, re.M)
  assert re.search(r'^\| a very small tree \| +2 \| +1 \| 2 \(rank 1\) +\| 2 +\|', printed, re.M)
  assert (
      'Of 3 class labels, 3 among the 3 nearest words of their own position, 0 of another alone, '
      '0 of none.'
  ) in printed

  folder = tmp_path / 'out'
  assert sorted(path.name for path in folder.iterdir()) == [
      'neighbors.jsonl', 'neighbors.md', 'neighbors.png'
  ]  # fmt: skip
  records = _records(folder)
  (summary,) = _of(records, 'prompt')
  assert summary['positions'] == 6 and summary['prompt'] == str(prompt_file)
  assert 0 < summary['random_vectors']['cosine'] < summary['cosine'] < 1
  positions = _of(records, 'position')
  assert [p['position'] for p in positions] == list(range(6))
  for position, found in zip(positions, words):
    assert [(n['word'], n['cosine']) for n in position['neighbors']] == [
        (word, pytest.approx(cosine, abs=1e-6)) for word, cosine in found
    ]
    token = position['neighbors'][0]['id']
    assert backbone.vocabulary.piece(token) == found[0][0]
  assert positions[3]['norm'] == pytest.approx(1000 * positions[0]['norm'])
  assert [p['cluster'] for p in positions[:4:3]] == [0, 0]
  assert _of(records, 'cluster')[0]['positions'] == [0, 3]
  assert [label['survives'] for label in _of(records, 'label')] == ['own'] * 3
  assert _of(records, 'label')[0]['positions'] == [0, 3]
  assert _of(records, 'similarity') == []
  width, height = _size_of_png(folder / 'neighbors.png')
  assert width > height > 400


def test_markdown_shows_words_as_they_are(run, backbone, prompt_file, tmp_path):
  assert run(f'--gin.PROMPT_FILE={prompt_file}', f'--gin.OUTPUT_DIR={tmp_path}')[0] == 0
  text = (tmp_path / 'neighbors.md').read_text()
  assert text.startswith('## ')
  rows = [line for line in text.splitlines() if line.startswith('|')]
  # What is left of a row without what is escaped has as many bars as the table has columns.
  assert {re.sub(r'\\.', '', row).count('|') for row in rows[:8]} == {6}
  assert report_lib._escaped('<extra_id_0>|*') == r'\<extra\_id\_0\>\|\*'


def test_several_prompts_are_compared(run, prompt_file, injection, tmp_path):
  other = np.asarray(injection.virtual_embeddings)[::-1]
  np.save(tmp_path / 'b.npy', other)
  np.save(tmp_path / 'c.npy', other[:2])
  status, printed, errors = run(
      f"--gin.PROMPT_FILE={{'one': '{prompt_file}', 'more': '*.npy'}}",
      f'--gin.OUTPUT_DIR={tmp_path}/out',
  )
  assert (status, errors) == (0, '')
  assert all(f'{name}, by the words of ' in printed for name in ('one', 'more/b.npy'))
  lines = printed.splitlines()
  (start,) = (n for n, line in enumerate(lines) if line.startswith('Similarity, same position: '))
  cells = [[cell.strip() for cell in line.split('|')[1:-1]] for line in lines[start + 2 :]]
  assert cells[0] == ['', 'one', 'more/b.npy', 'more/c.npy']
  assert cells[2][:2] == ['one', '1.00'] and cells[2][3] == ''
  pairs = _of(_records(tmp_path / 'out'), 'similarity')
  assert [pair['prompts'] for pair in pairs] == [
      ['one', 'more/b.npy'], ['one', 'more/c.npy'], ['more/b.npy', 'more/c.npy']
  ]  # fmt: skip
  assert pairs[0]['best match'] == pytest.approx(1)
  assert pairs[1]['same position'] is None and pairs[1]['best match'] < 1
  names = {path.name for path in (tmp_path / 'out').glob('*.png')}
  assert names == {'neighbors.png', *(f'neighbors_{number}.png' for number in range(3))}


def test_every_form_of_a_prompt_is_read_alike(run, backbone, prompt_file, tmp_path):
  prompt = load_prompt(prompt_file)
  export_prompt(prompt, tmp_path / 'adapter', backbone)
  export_prompt(prompt, tmp_path / 'rows.npy', backbone)
  tables = []
  for path in (prompt_file, tmp_path / 'adapter', tmp_path / 'rows.npy'):
    status, printed, errors = run(f'--gin.PROMPT_FILE={path}')
    assert status == 0, errors
    tables.append(printed.split('\n', 1)[1])
  assert tables[0] == tables[1] == tables[2]


def test_prompts_of_one_path_are_two_where_they_were_read_at_different_times(
    backbone, prompt_file
):
  names = analyze_prompts(backbone, [load_prompt(prompt_file), load_prompt(prompt_file)]).names
  assert [name[-4:] for name in names] == [' (1)', ' (2)']


def test_names_are_what_tells_paths_apart(backbone, injection):
  def names(*prompts):
    return analyze_prompts(backbone, dict.fromkeys(prompts, injection)).names

  assert names('/runs/a/x/prompt.npy', '/runs/b/prompt.npy') == ['a/x', 'b']
  assert names('a/b/b', 'a/b') == ['a/b/b', 'a/b']
  assert names('/runs/a.npy') == ['/runs/a.npy']
  assert analyze_prompts(backbone, [injection, injection]).names == ['prompt 0', 'prompt 1']


def test_python_has_the_same_in_numbers(backbone, injection, prompt_file):
  one = ptj.analyze_prompts(backbone, injection, k=2, labels=LABELS)
  other = ptj.analyze_prompts(backbone, load_prompt(prompt_file), k=2, labels=LABELS)
  assert one.prompts[0].positions == other.prompts[0].positions
  assert other.prompts[0].name == str(prompt_file) and one.prompts[0].name == 'prompt 0'
  assert [label.survives for label in one.prompts[0].labels] == ['own'] * 3
  assert ptj.nearest_words(backbone, injection, 2)[0][0] == (
      one.prompts[0].positions[0].nearest.word,
      pytest.approx(one.prompts[0].positions[0].nearest.cosine, abs=1e-6),
  )
  for nothing in ([], None, [None], {}):
    with pytest.raises(ValueError, match='needs at least one prompt'):
      analyze_prompts(backbone, nothing)


def test_positions_in_the_decoder_are_named_so(backbone, injection):
  rows = injection.virtual_embeddings
  report = analyze_prompts(
      backbone, Injection(rows, num_decoder_virtual_tokens=2), k=1, labels=LABELS
  )
  assert re.search(r'^\| +D1 \|', repr(report), re.M)
  # A single word has no tightness.
  assert 'ightness' not in repr(report).replace('| tightness |', '')


@pytest.mark.parametrize(
    ('flag', 'answer'),
    [
        ('PROMPT_FILE=/nope.npy', 'PROMPT_FILE: there is no file /nope.npy'),
        ('PROMPT_FILE=None', 'PROMPT_FILE is None, but neighbors needs it: a tuned'),
        ('PROMPT_FILE=/runs/{task}/p.npy', 'neighbors` knows no tasks'),
        ("PROMPT_FILE={'a': ['/runs/{task}/p.npy']}", 'neighbors` knows no tasks'),
        ('NUM_NEIGHBORS=0', 'NUM_NEIGHBORS is 0 (--gin.NUM_NEIGHBORS), expected a whole'),
        ('NUM_NEIGHBORS=100_000', '100000 nearest words were asked for'),
        ("CLASS_LABELS=['animal', '']", "CLASS_LABELS is ['animal', '']"),
        ("neighbors.labels=['animal', '']", "The class label '' has no tokens"),
        ('neighbors.cluster_cosine=0', 'cluster_cosine is 0'),
    ],
)
def test_a_mistake_is_one_message(run, prompt_file, flag, answer):
  status, printed, errors = run(
      f'--gin.PROMPT_FILE={prompt_file}', f'--gin.{flag}', '--gin.OUTPUT_DIR=out'
  )
  assert (status, printed) == (2, '')
  assert answer in errors and 'Traceback' not in errors


@pytest.mark.parametrize('dry', [[], ['--dry_run']])
@pytest.mark.parametrize(
    ('path', 'answer'),
    [
        ('wide.npy', '17'),
        ('nan.npy', 'nan.npy is no usable prompt: 1 of the 48 numbers'),
        ('zero.npy', 'zero.npy is zero at position 1, counted from 0'),
        ('prefix.safetensors', 'prefix.safetensors has no words near to it'),
    ],
)
def test_a_prompt_that_cannot_be_read_is_one_message(run, path, answer, dry):
  rows = np.ones((3, 16), np.float32)
  for name, change in (('nan', (1, 0, np.nan)), ('zero', (1, slice(None), 0))):
    changed = rows.copy()
    changed[change[:2]] = change[2]
    np.save(f'{name}.npy', changed)
  np.save('wide.npy', np.ones((3, 17), np.float32))
  keys = jnp.ones((1, 3, 2, 8))
  artifact.save_prompt('prefix.safetensors', Injection(encoder_kv=(keys, keys)))
  status, printed, errors = run(f'--gin.PROMPT_FILE={path}', *dry)
  assert (status, printed) == (2, '')
  assert answer in errors and 'Traceback' not in errors


def test_a_prompt_of_another_model_of_the_same_size_is_refused(run, tmp_path):
  other = load_backbone(saved_backbone.save(tmp_path / 'other', seed=1))
  rows = Injection(jnp.ones((3, 16)))
  artifact.save_prompt(tmp_path / 'prompt.safetensors', rows, backbone=other)
  status, _, errors = run(f'--gin.PROMPT_FILE={tmp_path}/prompt.safetensors')
  assert status == 2
  assert 'of the same size, but another model' in errors


def test_without_matplotlib_tables_are_written_and_pictures_explained(
    run, prompt_file, tmp_path, monkeypatch
):
  found = importlib.util.find_spec
  monkeypatch.setattr(
      importlib.util,
      'find_spec',
      lambda name, *a: None if name == 'matplotlib' else found(name, *a),
  )
  flags = f'--gin.PROMPT_FILE={prompt_file}', f'--gin.OUTPUT_DIR={tmp_path}/out'
  status, printed, errors = run(*flags)
  assert (status, printed) == (2, '')
  assert "pip install 'prompt-tuning-jax[plots]'" in errors
  assert not (tmp_path / 'out').exists()
  assert run(*flags, '--gin.neighbors.picture=False')[0] == 0
  assert {path.name for path in (tmp_path / 'out').iterdir()} == {
      'neighbors.jsonl', 'neighbors.md'
  }  # fmt: skip
  assert run(flags[0])[0] == 0


def test_a_dry_run_loads_nothing(run, prompt_file, tmp_path, monkeypatch):
  from prompt_tuning_jax.backbones.backbone import Backbone

  def refuse(self):
    raise AssertionError('a dry run must not load weights')

  monkeypatch.setattr(Backbone, 'params', property(refuse))
  status, printed, errors = run(
      f'--gin.PROMPT_FILE={prompt_file}', f'--gin.OUTPUT_DIR={tmp_path}/out', '--dry_run'
  )
  assert (status, errors) == (0, '')
  assert 'NUM_NEIGHBORS = 5' in printed
  assert not (tmp_path / 'out').exists()


def test_convert_still_needs_a_folder(capsys, backbone_dir):
  flags = [f'--gin.INITIAL_CHECKPOINT_PATH={backbone_dir}', '--gin.OUTPUT_FORMAT=hf']
  assert cli.main(['convert', *flags, '--gin.OUTPUT_DIR=None']) == 2
  assert 'OUTPUT_DIR is None, but convert needs it' in capsys.readouterr().err
