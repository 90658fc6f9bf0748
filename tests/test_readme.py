"""What the README and docs/ tell a user to type works as it stands there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import jax.numpy as jnp
import pytest

import prompt_tuning_jax as ptj
from prompt_tuning_jax import cli
from prompt_tuning_jax.typing import Injection
from tests import saved_backbone
from tests.tasks.super_glue_samples import OFFICIAL, write_official

ROOT = Path(__file__).parent.parent
README = ROOT / 'README.md'
PAGES = [README, *sorted((ROOT / 'docs').glob('*.md'))]


def _blocks(language: str, page: Path = README) -> list[str]:
  return re.findall(rf'```{language}\n(.*?)```', page.read_text(), re.DOTALL)


def _commands() -> list[str]:
  """The lines that start `$ prompt-tuning`, with what is continued on the next ones."""
  blocks = [block for page in PAGES for block in _blocks('console', page)]
  text = '\n'.join(blocks).replace('\\\n', ' ')
  return re.findall(r'^\$ prompt-tuning (.+)$', text, re.MULTILINE)


def test_there_are_commands_to_try():
  assert {command.split()[0] for command in _commands()} >= {
      'train', 'evaluate', 'infer', 'convert', 'prepare'
  }


@pytest.fixture
def demo_prompt(tmp_path):
  """What the README's first command leaves behind, and its sweep over seeds."""
  backbone = ptj.load_backbone('nano')
  injection = Injection(virtual_embeddings=jnp.ones((20, backbone.spec.d_model)))
  for run in ('demo', 'seeds/runs/RANDOM_SEED=0', 'seeds/runs/RANDOM_SEED=1'):
    path = tmp_path / run / 'prompt.safetensors'
    path.parent.mkdir(parents=True)
    ptj.save_prompt(path, injection, backbone=backbone)


@pytest.fixture
def official_files(tmp_path):
  """What the README's `prepare` is given."""
  lines, _ = OFFICIAL['super_glue_cb_v102', 'CB/val.jsonl']
  write_official(tmp_path, 'CB/train.jsonl', lines)


@pytest.fixture
def micro(tmp_path, monkeypatch):
  """What its recipes leave where models are found by name."""
  monkeypatch.setenv('PTJ_LADDER_DIR', str(tmp_path / 'ladder'))
  saved_backbone.save(tmp_path / 'ladder' / 'micro' / 'backbone')


@pytest.mark.usefixtures('elsewhere', 'demo_prompt', 'official_files', 'micro')
@pytest.mark.parametrize('command', _commands())
def test_a_command_runs_dry_as_it_is_written(command, tmp_path, capsys):
  argv = shlex.split(command.replace('/tmp/', f'{tmp_path}/'))
  assert cli.main([*argv, '--dry_run']) == 0, capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures('elsewhere')
def test_the_first_program_runs(tmp_path, capsys):
  (program,) = _blocks('python')
  short = program.replace('/tmp/', f'{tmp_path}/').replace('train_steps=200', 'train_steps=2')
  assert short.count('train_steps=2') == 1
  exec(compile(short, 'README.md', 'exec'), {})
  printed = capsys.readouterr().out
  assert 'Prompt: Injection(virtual_embeddings 20×160' in printed
  assert 'Ranked' in printed or 'label=' in printed
