"""Every gin file of the library can be read, and every recipe says what it is worth."""

from __future__ import annotations

import re
import shlex
import shutil

import jax
import numpy as np
import pytest

from prompt_tuning_jax import cli, config
from prompt_tuning_jax.config.files import is_overlay
from tests import saved_backbone

RECIPES = config.packaged_files('recipes')
FILES = [name for name in config.packaged_files() if not name.startswith('runs/')]


pytestmark = pytest.mark.usefixtures('elsewhere')


def test_there_are_files_of_every_kind():
  folders = {name.split('/')[0] for name in FILES}
  assert folders == {
      'recipes', 'models', 'methods', 'initializers', 'mixtures', 'decoding', 'sweeps'
  }  # fmt: skip


def _header(recipe: str) -> str:
  text = (config.gin_folder() / recipe).read_text()
  return text[: re.search(r'^[^#]', text, re.MULTILINE).start()]


def _command(recipe: str) -> str:
  """The command that a recipe is for, as its header says."""
  name = recipe.removeprefix('recipes/').removesuffix('.gin')
  return re.search(rf'prompt-tuning (\w+) --gin_file={name}\b', _header(recipe))[1]


@pytest.mark.parametrize('recipe', RECIPES)
def test_a_recipe_opens_with_its_command_its_cost_and_its_score(recipe):
  assert 'Cost:' in _header(recipe)
  assert _command(recipe) != 'train' or 'Score to expect:' in _header(recipe)


def test_an_overlay_says_in_its_first_line_what_it_changes():
  root = config.gin_folder()
  overlays = [name for name in config.packaged_files() if is_overlay(root / name)]
  assert overlays == ['runs/t5x_exact.gin']
  for name in overlays:
    assert re.match(r'# overlay: \w.{20}', (root / name).read_text())


@pytest.mark.parametrize('recipe', RECIPES)
def test_a_recipe_runs_dry_with_nothing_but_a_folder_to_write_to(
    recipe, tmp_path, capsys, monkeypatch
):
  # On one device; a batch of ten, which one of them has, does not divide among four.
  monkeypatch.setattr(jax, 'device_count', lambda: 1)
  command = _command(recipe)
  folder = 'EVAL_OUTPUT_DIR' if command == 'evaluate' else 'MODEL_DIR'
  flags = [f'--gin_file={recipe}', f'--gin.{folder}={tmp_path}/run', '--dry_run']
  # A recipe may include another, so the texts of all of them are there.
  text = ''.join((config.gin_folder() / name).read_text() for name in FILES)
  if command == 'adapt':
    flags.append('--gin.INITIAL_CHECKPOINT_PATH=' + saved_backbone.save(tmp_path / 'tiny'))
  for name in re.findall(r"'(nano_corpus/.+?)'", text):
    (tmp_path / 'nano_corpus').mkdir(exist_ok=True)
    shutil.copy(saved_backbone.VOCABULARY, tmp_path / name)
  for name in re.findall(r"'(reviews/.+?)'", text):
    (tmp_path / 'reviews').mkdir(exist_ok=True)
    (tmp_path / name).write_text('text\tlabel\na warm film\t1\n')
  if "include 'initializers/from_file" in (config.gin_folder() / recipe).read_text():
    np.save(tmp_path / 'prompt.npy', np.ones((9, 4), np.float32))
    flags.append(f'--gin.PROMPT_FILE={tmp_path}/prompt.npy')
  status = cli.main([command, *flags])
  printed, errors = capsys.readouterr()
  assert status == 0, errors
  assert errors == ''
  assert 'no weights are loaded' in printed
  assert re.search(rf'{command}.(model|output)_dir = %{folder}', printed)
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('name', config.packaged_files('sweeps'))
def test_a_sweep_runs_dry_as_its_header_says(name, tmp_path, capsys):
  header = _header(name).replace('\\\n#', ' ')
  command = re.search(r'prompt-tuning (sweep .*)', header)[1].replace('/tmp/', f'{tmp_path}/')
  assert f'--gin_file={name.removesuffix(".gin")} ' in command
  assert cli.main([*shlex.split(command), '--dry_run']) == 0, capsys.readouterr().err
  assert re.search(r'sweep      \d+ runs\n', capsys.readouterr().out)


# What trains; words around the input do not (tests/config/test_checks.py).
METHODS = [name for name in config.packaged_files('methods') if 'prompt_design' not in name]


@pytest.mark.parametrize('method', METHODS)
def test_a_method_may_be_chosen_over_a_recipe_s(method, tmp_path, capsys):
  status = cli.main([
      'train',
      '--gin_file=demo',
      f'--gin_file={method.removesuffix(".gin")}',
      f'--gin.MODEL_DIR={tmp_path}/run',
      '--dry_run',
  ])
  printed, errors = capsys.readouterr()
  assert (status, errors) == (0, '')
  chosen = re.findall(r'^PROMPT = (?:@(\w+)\(\)|None)$', _text_of(method), re.MULTILINE)[-1]
  if chosen:
    assert re.search(rf'{chosen}, Injection\(.+\), [\d,]+ parameters train', printed)


def _text_of(name: str) -> str:
  """The text of a gin file and, before it, of those it includes."""
  text = (config.gin_folder() / name).read_text()
  included = re.findall(r"^include '(.+)'", text, re.MULTILINE)
  return ''.join([*map(_text_of, included), text])


@pytest.mark.parametrize('name', FILES)
def test_a_file_may_come_before_or_after_the_defaults(name):
  values = [
      'MODEL_DIR=/tmp/run',
      'MIXTURE_OR_TASK_NAME=task',
      "TASK_FEATURE_LENGTHS={'inputs': 8, 'targets': 4}",
      'INITIAL_CHECKPOINT_PATH=somewhere',
      'PROMPT_FILE=prompt.npy',
      'PROMPT_TEXT=what is it',
      "CLASS_LABELS=['yes', 'no']",
  ]
  texts = []
  for files in ([name, 'runs/train.gin'], ['runs/train.gin', name]):
    texts.append(config.parse('train', files, values).full())
  assert texts[0] == texts[1]


@pytest.mark.parametrize(
    'command', ['train', 'evaluate', 'infer', 'export', 'pretrain', 'adapt']
)
def test_every_command_has_defaults_and_asks_for_what_has_none(command):
  with pytest.raises(config.ConfigError) as error:
    config.parse(command)
  needed = re.findall(r'^  ([A-Z_]+):', str(error.value), re.MULTILINE)
  header = (config.gin_folder() / 'runs' / f'{command}.gin').read_text().split('include')[0]
  for name in needed:
    spoken = 'INITIAL_CHECKPOINT_PATH|models|model|recipe' if 'CHECKPOINT' in name else name
    assert re.search(spoken, header), f'{name} is needed, but runs/{command}.gin does not say so'
