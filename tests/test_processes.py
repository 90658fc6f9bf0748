"""Two processes are one run: the same numbers, one writer, one end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from jax.tree import leaves

from prompt_tuning_jax import cli, processes
from prompt_tuning_jax.checkpoints.load import load_backbone
from prompt_tuning_jax.data import cache
from prompt_tuning_jax.data.vocabulary import Vocabulary
from prompt_tuning_jax.prompt_files import load_prompt
from tests import two_processes
from tests.conftest import ROOT, cpu_devices
from tests.saved_backbone import VOCABULARY
from tests.training.conftest import make_task

# Devices of a copy of the model, whether parameters are fully sharded, and what runs, with one
# device a process: data parallel, fully sharded, and the model split over both processes.
_MESHES = [
    (1, False, ['soft', 'use']),
    (1, True, ['soft', 'model']),
    (2, False, ['soft', 'deep', 'model', 'use']),
]


def _start(*argv, devices=1):
  """Two processes of one command, with their indices in the place of '{index}'."""
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = str(free.getsockname()[1])
  env = os.environ | cpu_devices(devices) | {'PYTHONPATH': str(ROOT)}
  return [
      subprocess.Popen(
          [sys.executable, *(a.replace('{index}', str(i)).replace('{port}', port) for a in argv)],
          stdout=subprocess.PIPE,
          stderr=subprocess.PIPE,
          text=True,
          env=env,
      )
      for i in range(2)
  ]


def _finish(pair, timeout=900):
  """Their statuses, outputs and errors; none is left running."""
  try:
    outcomes = [process.communicate(timeout=timeout) for process in pair]
    return [(process.returncode, *outcome) for process, outcome in zip(pair, outcomes)]
  finally:
    for process in pair:
      process.kill()
      process.wait()


def _command(name, *flags):
  """`prompt-tuning` in two processes."""
  return _start(
      '-m', 'prompt_tuning_jax', name, *flags, '--coordinator_address=localhost:{port}',
      '--process_count=2', '--process_index={index}',
  )  # fmt: skip


@pytest.fixture(scope='module')
def cache_dir(tmp_path_factory):
  folder = str(tmp_path_factory.mktemp('tasks'))
  vocabulary = Vocabulary(VOCABULARY)
  for split, count in (('train', 50), ('validation', 21)):
    make_task(vocabulary, two_processes.TASK, split, count).save(
        cache.cache_path(two_processes.TASK, split, vocabulary, folder)
    )
  return folder


@pytest.fixture
def train_flags(backbone_dir, tmp_path):
  return [
      '--gin_file=demo',
      f'--gin.INITIAL_CHECKPOINT_PATH={backbone_dir}',
      '--gin.PROMPT_LENGTH=3',
      '--gin.BATCH_SIZE=4',
      f'--gin.MODEL_DIR={tmp_path}/run',
  ]


def test_one_process_is_not_several():
  assert not processes.several() and processes.is_main() and processes.name() == ''
  assert processes.gathered([[1, 'a', {'x': 0.1}]]) == [[1, 'a', {'x': 0.1}]]
  assert processes.from_main(lambda: 3) == 3
  stop = processes.AnyProcess()
  assert [stop(False), stop(True), stop(False)] == [False, True, False]
  processes.check_same({'steps': 3}, 'steps')


@pytest.mark.parametrize(
    ('flags', 'answer'),
    [
        ({'process_count': 2}, 'without --coordinator_address, --process_index. Several'),
        ({'process_count': 2, 'process_index': 2, 'coordinator_address': 'here:1'},
         '--process_index=2 of --process_count=2: there has to be at least one process, and '
         'indices count from 0 to 1.'),
        ({'process_count': 0, 'process_index': 0, 'coordinator_address': 'here:1'}, 'at least'),
        ({'process_count': 2, 'process_index': 0, 'coordinator_address': 'here'},
         '--coordinator_address=here is no address: expected the host and a free port'),
        ({'process_count': 'two'}, "invalid int value: 'two'"),
    ],
)  # fmt: skip
def test_wrong_flags_are_one_message(capsys, train_flags, elsewhere, flags, answer):
  given = [f'--{name}={value}' for name, value in flags.items()]
  assert cli.main(['train', *train_flags, *given]) == 2
  assert answer in capsys.readouterr().err


def test_what_runs_in_one_process_says_so(capsys, elsewhere):
  assert cli.main(['convert', '--process_count=2']) == 2
  assert '--process_count: convert runs in one process.' in capsys.readouterr().err


def test_a_dry_run_waits_for_nobody(capsys, train_flags, elsewhere):
  flags = ['--coordinator_address=here:1', '--process_count=2', '--process_index=1']
  # With the devices of both, eight may share a copy of the model.
  status = cli.main(['train', *train_flags, *flags, '--gin.NUM_PARTITIONS=8', '--dry_run'])
  assert status == 0, capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_find_what_one_finds(backbone_dir, cache_dir, tmp_path):
  backbone = load_backbone(backbone_dir)
  alone = two_processes.tune(backbone, str(tmp_path / 'alone'), cache_dir, _MESHES[-1][-1])
  one_then_two = str(tmp_path / 'one_then_two')
  two_processes.go_on(backbone, one_then_two, cache_dir, 2)
  never_stopped = two_processes.go_on(backbone, str(tmp_path / 'straight'), cache_dir, 4)
  given = {
      'backbone_dir': str(backbone_dir),
      'cache_dir': cache_dir,
      'folder': str(tmp_path),
      'meshes': _MESHES,
      'one_then_two': [one_then_two, str(tmp_path / 'not_there')],
  }
  program = str(ROOT / 'tests' / 'two_processes.py')
  outcomes = _finish(_start('-W', 'ignore', program, '{index}', '{port}', json.dumps(given)), 1800)
  assert [status for status, *_ in outcomes] == [0, 0], outcomes
  found = [json.loads((tmp_path / f'{index}.json').read_text()) for index in range(2)]
  assert found[0] == found[1]
  for model, fully, parts in _MESHES:
    together = found[0][f'{model}-{fully}']
    for part in parts:
      assert leaves(together[part]) == pytest.approx(leaves(alone[part]), rel=2e-4, abs=2e-5), part
      assert together['metrics'][part] == alone['metrics'][part]
    if 'use' in parts:
      assert together['texts'] == alone['texts']
    assert (tmp_path / '0' / f'{model}-{fully}' / 'soft' / 'prompt.safetensors').is_file()
  # One of them writes, and the other needs nothing of what is written.
  assert not (tmp_path / '1').exists() and not (tmp_path / 'not_there').exists()
  # A run goes on in one process where two stopped, and the other way round.
  two_then_one = two_processes.go_on(
      backbone, str(tmp_path / '0' / 'two_then_one'), cache_dir, 4
  )
  for went_on in (two_then_one, found[0]['went_on'][1]):
    assert leaves(went_on) == pytest.approx(leaves(never_stopped), rel=2e-4, abs=2e-5)
  assert not np.allclose(leaves(never_stopped), leaves(found[0]['went_on'][0]), atol=1e-4)


@pytest.mark.slow
def test_the_commands_run_in_two_processes(train_flags, tmp_path, capsys):
  train_flags = [*train_flags, '--gin.TRAIN_STEPS_RELATIVE=3', '--gin.NUM_PARTITIONS=2']
  (status, trained, errors), (other, *silent) = _finish(_command('train', *train_flags))
  assert (status, other) == (0, 0), (errors, silent)
  assert f'{tmp_path}/run/prompt.safetensors, step 3, accuracy ' in trained
  assert 'trainable  48 of' in errors
  accuracy = trained.split()[-1]
  assert 'accuracy' not in silent[0] and 'trainable' not in silent[1]
  # One process, without a mesh, finds the run finished, and scores its prompt the same.
  one = [flag for flag in train_flags if 'NUM_PARTITIONS' not in flag]
  assert cli.main(['train', *one]) == 0
  assert capsys.readouterr().out == trained.splitlines()[-1] + '\n'
  prompt = load_prompt(tmp_path / 'run' / 'prompt.safetensors')
  assert prompt.manifest.step == 3
  evaluation = [
      *train_flags,
      f'--gin.PROMPT_FILE={tmp_path}/run/prompt.safetensors',
      f'--gin.EVAL_OUTPUT_DIR={tmp_path}/scores',
  ]
  (status, scored, errors), (other, *silent) = _finish(_command('evaluate', *evaluation))
  assert (status, other) == (0, 0), (errors, silent)
  assert f'accuracy {accuracy} (' in scored and 'accuracy' not in silent[0]
  assert json.loads((tmp_path / 'scores' / 'report.json').read_text())['tasks']
  # What is wrong in the folder, which process 0 alone sees, ends both with one message.
  outcomes = _finish(_command('train', *train_flags, '--gin.RANDOM_SEED=1'))
  assert [status for status, *_ in outcomes] == [2, 2], outcomes
  assert 'random_seed: 0 there, 1 here' in outcomes[0][2]
  assert 'prompt-tuning:' not in outcomes[1][2]
  # So does a difference between the two commands, wherever it is.
  outcomes = _finish(_command('train', *train_flags, '--gin.RANDOM_SEED={index}'))
  assert [status for status, *_ in outcomes] == [2, 2], outcomes
  assert "RANDOM_SEED: '0' in process 0, '1' in process 1" in outcomes[0][2]


@pytest.mark.slow
def test_two_processes_stop_together_and_none_waits_for_a_lost_one(train_flags, tmp_path):
  flags = [
      *train_flags, '--gin.TRAIN_STEPS_RELATIVE=1_000_000', '--gin.LOG_PERIOD=1',
      '--gin.EVAL_PERIOD=0',
  ]  # fmt: skip
  records = tmp_path / 'run' / 'metrics.jsonl'

  def wait_for_more(seen, pair):
    until = time.monotonic() + 240
    while not records.exists() or len(records.read_text().splitlines()) <= seen:
      assert time.monotonic() < until and [p.poll() for p in pair] == [None, None]
      time.sleep(0.2)

  pair = _command('train', *flags)
  try:
    wait_for_more(2, pair)
    pair[1].send_signal(signal.SIGTERM)
    (status, _, errors), (other, *silent) = _finish(pair)
    assert (status, other) == (0, 0), (errors, silent)
    assert 'prompt-tuning: process 0 of 2: Stopped at step ' in errors
    assert 'Stopped' not in silent[1]
    stopped = len(records.read_text().splitlines())
    assert (tmp_path / 'run' / f'checkpoint_{stopped}').is_dir()

    pair = _command('train', *flags)
    wait_for_more(stopped + 2, pair)
    killed = time.monotonic()
    pair[1].kill()
    (status, _, errors), _ = _finish(pair, timeout=60)
    assert time.monotonic() - killed < 60
    assert status != 0
    assert 'another process of this run is gone' in errors or 'another task died' in errors
  finally:
    for process in pair:
      process.kill()
