"""Training metrics to `metrics.jsonl` and TensorBoard event files in MODEL_DIR."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping

from prompt_tuning_jax.json_files import read_jsonl, write_jsonl


class MetricsWriter:
  """Appends records of metrics, each with its step; every record is on disk at once.

  A resumed run drops the records behind the step it resumes from, so that no step
  stands twice.
  """

  def __init__(self, model_dir: str, *, resume_step: int = 0):
    # Kept out of the library's import time. TensorBoard's files are written here and now,
    # not by tensorboardX's thread, which would lose the last records of a killed run.
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.proto.summary_pb2 import Summary

    self._path = os.path.join(model_dir, 'metrics.jsonl')
    kept = [
        record
        for record in read_jsonl(self._path, needs=['step'])
        if record['step'] <= resume_step
    ]
    write_jsonl(self._path, kept)
    self._file = open(self._path, 'a', encoding='utf-8')

    folder = os.path.join(model_dir, 'tensorboard')
    os.makedirs(folder, exist_ok=True)
    self._events = EventsWriter(
        os.path.join(folder, 'events'), filename_suffix=f'.from-step-{resume_step}'
    )
    self._event, self._summary = Event, Summary
    # TensorBoard then forgets what earlier files say of the steps to come.
    start = SessionLog(status=SessionLog.START)
    self._events.write_event(
        Event(wall_time=time.time(), step=resume_step + 1, session_log=start)
    )
    self._events.flush()

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    """Records the metrics of a step.

    Raises:
      OSError: if they cannot be written, naming the file.
    """
    metrics = {name: float(value) for name, value in metrics.items()}
    values = [
        self._summary.Value(tag=name, simple_value=value) for name, value in metrics.items()
    ]
    try:
      self._file.write(json.dumps({'step': step, **metrics}) + '\n')
      self._file.flush()
      self._events.write_event(
          self._event(wall_time=time.time(), step=step, summary=self._summary(value=values))
      )
      self._events.flush()
    except OSError as error:
      raise OSError(
          f'Could not write the metrics of step {step} to {self._path} and the TensorBoard '
          f'files beside it: {error}. Free some space and run the same command again; saved '
          'states are intact.'
      ) from error

  def close(self) -> None:
    """Closes both files; their records are on disk already."""
    with contextlib.suppress(OSError):
      self._file.close()
    with contextlib.suppress(OSError):
      self._events.close()
