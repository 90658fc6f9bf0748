"""Two processes evaluate a task together and find, each of them, what one finds alone."""

import json
import os
import socket
import subprocess
import sys

import pytest

from prompt_tuning_jax.checkpoints.load import load_backbone
from prompt_tuning_jax.evaluation.evaluate import evaluate
from prompt_tuning_jax.processes import gathered
from tests.tasks.super_glue_samples import write_official

_TASKS = ('super_glue_multirc_v102', 'super_glue_record_v102')
_SETTINGS = {
    'batch_size': 4, 'feature_lengths': {'inputs': 64, 'targets': 6}, 'progress': False
}  # fmt: skip

_PROGRAM = """
import json, sys
import jax
index, port, backbone_dir, output, tasks, settings = sys.argv[1:]
jax.config.update('jax_cpu_collectives_implementation', 'gloo')
jax.distributed.initialize(f'localhost:{port}', num_processes=2, process_id=int(index))
from prompt_tuning_jax.checkpoints.load import load_backbone
from prompt_tuning_jax.evaluation.evaluate import evaluate
results = evaluate(
    load_backbone(backbone_dir), None, json.loads(tasks), output_dir=f'{output}/{index}',
    **json.loads(settings),
)
found = {n: [r.metrics, r.predictions] for n, r in results.items()}
with open(f'{output}/{index}.json', 'w') as file:
  json.dump(found, file)
"""


def test_one_process_gathers_its_own():
  assert gathered([[1, 'a', {'x': 0.1}]]) == [[1, 'a', {'x': 0.1}]]


@pytest.mark.slow
def test_groups_are_whole_when_hosts_share_the_batches(backbone_dir, tmp_path, monkeypatch):
  monkeypatch.setenv('PTJ_CACHE_DIR', str(tmp_path / 'cache'))
  monkeypatch.setenv('PTJ_LOCAL_DATA', str(tmp_path))
  # Seven answers in batches of four: a host has two rows of each, and the last has none of
  # the second host's.
  answers = [[1, 0, 1], [0, 1], [1]]
  questions = [
      {'idx': q, 'question': f'What is {q}?', 'answers': [
          {'idx': 10 * q + a, 'text': 'sea ' * (q + a + 1), 'label': label}
          for a, label in enumerate(labels)
      ]}
      for q, labels in enumerate(answers)
  ]  # fmt: skip
  passage = {'text': 'The sea is green.', 'questions': questions}
  write_official(tmp_path, 'MultiRC/val.jsonl', [{'idx': 0, 'passage': passage}])
  news = {'text': 'Rome or Oslo', 'entities': [{'start': 0, 'end': 3}, {'start': 8, 'end': 11}]}
  both = [{'text': 'Oslo'}, {'text': 'Rome'}]
  queries = [
      {'idx': n, 'query': '@placeholder ' * (n + 1), 'answers': both} for n in range(3)
  ]
  write_official(tmp_path, 'ReCoRD/val.jsonl', [{'idx': 5, 'passage': news, 'qas': queries}])
  alone = evaluate(load_backbone(backbone_dir), None, _TASKS, **_SETTINGS)
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  processes = [
      subprocess.Popen(
          [sys.executable, '-c', _PROGRAM, str(index), str(port), str(backbone_dir),
           str(tmp_path), json.dumps(_TASKS), json.dumps(_SETTINGS)],
          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
          env=os.environ | {'JAX_PLATFORMS': 'cpu'},
      )
      for index in range(2)
  ]  # fmt: skip
  outputs = [process.communicate(timeout=240)[0] for process in processes]
  assert [process.returncode for process in processes] == [0, 0], outputs
  for index in range(2):
    found = json.loads((tmp_path / f'{index}.json').read_text())
    for task in _TASKS:
      metrics, predictions = found[task]
      assert metrics == alone[task].metrics
      assert [p['prediction_text'] for p in predictions] == [
          p['prediction_text'] for p in alone[task].predictions
      ]
      assert [p['index'] for p in predictions] == list(range(len(alone[task].predictions)))
  # One of them writes.
  assert (tmp_path / '0' / 'inference_eval').is_dir() and not (tmp_path / '1').exists()
