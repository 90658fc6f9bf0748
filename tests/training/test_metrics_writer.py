"""Metrics are on disk when they are written, and no step stands twice."""

import json
import os
import resource
import struct

import pytest
from tensorboardX.proto.event_pb2 import Event

from prompt_tuning_jax.json_files import read_jsonl
from prompt_tuning_jax.training.metrics_writer import MetricsWriter


def tensorboard_scalars(folder):
  """{(tag, step): value} as TensorBoard shows them: what a restart overtakes is dropped."""
  shown = {}
  files = sorted((folder / 'tensorboard').iterdir(), key=os.path.getmtime)
  for path in files:
    content = path.read_bytes()
    while content:
      (length,) = struct.unpack('<Q', content[:8])
      event = Event.FromString(content[12 : 12 + length])
      content = content[16 + length :]
      if event.HasField('session_log'):
        shown = {key: value for key, value in shown.items() if key[1] < event.step}
      for value in event.summary.value:
        shown[value.tag, event.step] = value.simple_value
  return shown


def test_records_are_on_disk_before_the_writer_is_closed(tmp_path):
  writer = MetricsWriter(str(tmp_path))
  writer.write(1, {'train/loss': 2.5})
  writer.write(2, {'train/loss': 1.5, 'eval/accuracy': 50})
  expected = [
      {'step': 1, 'train/loss': 2.5},
      {'step': 2, 'train/loss': 1.5, 'eval/accuracy': 50.0},
  ]
  assert read_jsonl(tmp_path / 'metrics.jsonl') == expected
  assert tensorboard_scalars(tmp_path) == {
      ('train/loss', 1): 2.5, ('train/loss', 2): 1.5, ('eval/accuracy', 2): 50.0
  }
  writer.close()


def test_a_resumed_run_drops_the_records_it_will_write_again(tmp_path):
  writer = MetricsWriter(str(tmp_path))
  for step in (1, 2, 3):
    writer.write(step, {'train/loss': step})
  writer.close()
  writer = MetricsWriter(str(tmp_path), resume_step=2)
  writer.write(3, {'train/loss': 30})
  writer.close()
  records = read_jsonl(tmp_path / 'metrics.jsonl')
  assert [(r['step'], r['train/loss']) for r in records] == [(1, 1.0), (2, 2.0), (3, 30.0)]
  assert tensorboard_scalars(tmp_path) == {
      ('train/loss', 1): 1.0, ('train/loss', 2): 2.0, ('train/loss', 3): 30.0
  }


def test_a_line_cut_short_is_passed_over_and_a_bad_one_is_named(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step": 1}\n\n{"step": 2}\n{"ste')
  assert read_jsonl(path) == [{'step': 1}, {'step': 2}]
  writer = MetricsWriter(str(tmp_path), resume_step=5)
  writer.write(6, {})
  writer.close()
  assert read_jsonl(path) == [{'step': 1}, {'step': 2}, {'step': 6}]
  path.write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
  with pytest.raises(ValueError, match='metrics.jsonl, line 2, is not JSON'):
    read_jsonl(path)


def test_a_record_without_a_step_is_named(tmp_path):
  (tmp_path / 'metrics.jsonl').write_text('{"step": 1}\n{"loss": 2.0}\n')
  with pytest.raises(ValueError, match="metrics.jsonl, line 2.*'step'"):
    MetricsWriter(str(tmp_path), resume_step=5)


def test_a_full_disk_is_named_with_the_file(tmp_path):
  writer = MetricsWriter(str(tmp_path))
  writer.write(1, {'train/loss': 1.0})
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  size = os.path.getsize(tmp_path / 'metrics.jsonl')
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
  try:
    with pytest.raises(OSError, match=f'metrics of step 2 to {tmp_path}/metrics.jsonl'):
      writer.write(2, {'train/loss': 2.0})
    writer.close()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert read_jsonl(tmp_path / 'metrics.jsonl') == [{'step': 1, 'train/loss': 1.0}]
  json.loads((tmp_path / 'metrics.jsonl').read_text())
