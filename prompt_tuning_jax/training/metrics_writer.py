"""Training metrics to `metrics.jsonl` and TensorBoard event files in MODEL_DIR."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping


def read_jsonl(path: str) -> list[dict]:
  """The records of a jsonl file; a last line cut short by a crash is passed over."""
  records = []
  if os.path.exists(path):
    with open(path, encoding='utf-8') as file:
      lines = file.read().split('\n')
    for number, line in enumerate(lines):
      if not line.strip():
        continue
      try:
        records.append(json.loads(line))
      except json.JSONDecodeError as error:
        if any(rest.strip() for rest in lines[number + 1 :]):
          raise ValueError(f'{path}, line {number + 1}, is not JSON: {error}') from error
  return records


class MetricsWriter:
  """Appends one record a step; a step written again replaces what was there.

  A resumed run drops the records behind the step it resumes from, so that no step
  stands twice.
  """

  def __init__(self, model_dir: str, *, resume_step: int = 0):
    from tensorboardX import SummaryWriter  # Kept out of the library's import time.

    self._path = os.path.join(model_dir, 'metrics.jsonl')
    kept = [r for r in read_jsonl(self._path) if r['step'] <= resume_step]
    with open(self._path + '.tmp', 'w', encoding='utf-8') as file:
      file.writelines(json.dumps(record) + '\n' for record in kept)
    os.replace(self._path + '.tmp', self._path)
    self._file = open(self._path, 'a', encoding='utf-8')
    self._tensorboard = SummaryWriter(
        os.path.join(model_dir, 'tensorboard'), purge_step=resume_step + 1
    )

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    """Records the metrics of a step and flushes them to disk."""
    record = {'step': step, **{name: float(value) for name, value in metrics.items()}}
    self._file.write(json.dumps(record) + '\n')
    self._file.flush()
    for name, value in metrics.items():
      self._tensorboard.add_scalar(name, float(value), step)
    self._tensorboard.flush()

  def close(self) -> None:
    """Closes both files."""
    self._file.close()
    self._tensorboard.close()
