"""A folder belongs to one run at a time, and to one configuration."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap

import pytest

from prompt_tuning_jax.training.model_dir import ModelDir

ONE = {'task': 'cb', 'batch_size': 32, 'trainable': {'prompt': {'learning_rate': 0.3}}}


def _elsewhere(folder):
  """Another process that holds the folder until it is killed."""
  code = f"""
      import time
      from prompt_tuning_jax.training.model_dir import ModelDir
      with ModelDir({str(folder)!r}) as held:
        held.claim({ONE!r})
        print('held', flush=True)
        time.sleep(600)
  """
  process = subprocess.Popen(
      [sys.executable, '-c', textwrap.dedent(code)], stdout=subprocess.PIPE, text=True
  )
  assert process.stdout.readline() == 'held\n'
  return process


def test_a_second_run_is_told_who_holds_the_folder_and_a_dead_one_is_taken_over(tmp_path):
  first = _elsewhere(tmp_path)
  try:
    with pytest.raises(ValueError) as refused, ModelDir(tmp_path):
      pass
    message = str(refused.value)
    assert f'in use by another run (pid {first.pid} on {socket.gethostname()}' in message
    assert 'started 20' in message
  finally:
    first.send_signal(signal.SIGKILL)
    first.wait()
    first.stdout.close()
  assert (tmp_path / 'run.lock').exists()
  with ModelDir(tmp_path) as folder:
    assert f'pid {os.getpid()} ' in (tmp_path / 'run.lock').read_text()
    folder.claim(ONE)


def test_the_same_process_does_not_run_twice_in_a_folder(tmp_path):
  with ModelDir(tmp_path):
    with pytest.raises(ValueError, match='in use by another run'), ModelDir(tmp_path):
      pass
  with ModelDir(tmp_path):
    pass
  assert os.listdir(tmp_path) == []


def _leave_a_run(folder, description=ONE):
  with ModelDir(folder) as held:
    held.claim(description)
    (folder / 'checkpoint_3').mkdir()


def test_another_configuration_is_refused_with_what_differs(tmp_path):
  _leave_a_run(tmp_path)
  other = {'task': 'rte', 'batch_size': 32, 'trainable': {'prompt': {'learning_rate': 0.1}}}
  with pytest.raises(ValueError) as refused, ModelDir(tmp_path) as folder:
    folder.claim(other)
  message = str(refused.value)
  assert "task: 'cb' there, 'rte' here" in message
  assert 'trainable.prompt.learning_rate: 0.3 there, 0.1 here' in message
  assert 'batch_size' not in message
  with ModelDir(tmp_path) as folder:
    folder.claim(ONE)


def test_what_becomes_known_later_is_compared_too(tmp_path):
  _leave_a_run(tmp_path, ONE | {'examples': 250})
  with pytest.raises(ValueError, match='examples: 250 there, 251 here'):
    with ModelDir(tmp_path) as folder:
      folder.claim(ONE)
      folder.claim(ONE | {'examples': 251})


def test_tuples_and_lists_are_the_same_to_a_resumed_run(tmp_path):
  _leave_a_run(tmp_path, {'labels': ('yes', 'no')})
  with ModelDir(tmp_path) as folder:
    folder.claim({'labels': ['yes', 'no']})


def test_a_run_that_kept_nothing_does_not_bind_the_next(tmp_path):
  with pytest.raises(KeyError), ModelDir(tmp_path) as folder:
    folder.claim(ONE)
    raise KeyError('no such task')
  with ModelDir(tmp_path) as folder:
    folder.claim({'task': 'rte'})


def test_a_run_killed_before_it_kept_anything_does_not_bind_the_next(tmp_path):
  killed = _elsewhere(tmp_path)
  killed.send_signal(signal.SIGKILL)
  killed.wait()
  killed.stdout.close()
  assert (tmp_path / 'run.json').exists()
  with ModelDir(tmp_path) as folder:
    folder.claim({'task': 'rte'})
    folder.claim({'task': 'rte', 'examples': 2490})
    (tmp_path / 'checkpoint_3').mkdir()
  assert json.loads((tmp_path / 'run.json').read_text()) == {'task': 'rte', 'examples': 2490}


def test_what_an_older_version_did_not_say_is_no_difference(tmp_path):
  _leave_a_run(tmp_path)
  with ModelDir(tmp_path) as folder:
    folder.claim(ONE | {'evaluation': ['cb', 'validation', 'rank']})


def test_a_damaged_description_is_named(tmp_path):
  _leave_a_run(tmp_path)
  (tmp_path / 'run.json').write_text('{"task": ')
  with pytest.raises(ValueError, match='run.json.* is damaged'), ModelDir(tmp_path) as folder:
    folder.claim(ONE)


@pytest.mark.parametrize('below', ['a_file', '/proc'])
def test_a_folder_that_cannot_be_written_is_named(tmp_path, below):
  (tmp_path / 'a_file').touch()
  path = tmp_path / below / 'run'
  with pytest.raises(OSError, match=f'MODEL_DIR {path} cannot be written'), ModelDir(path):
    pass


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write anywhere')
def test_a_read_only_folder_is_named(tmp_path):
  tmp_path.chmod(0o500)
  with pytest.raises(OSError, match=f'MODEL_DIR {tmp_path} cannot be written'):
    with ModelDir(tmp_path):
      pass
  tmp_path.chmod(0o700)


def test_a_bucket_is_no_folder_to_write_to(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ValueError, match='gs://b/run is not on this machine.*mounted'):
    ModelDir('gs://b/run')
  assert not list(tmp_path.iterdir())
