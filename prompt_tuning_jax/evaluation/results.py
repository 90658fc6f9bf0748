"""What an evaluation found, and the files it is kept in."""

from __future__ import annotations

import dataclasses
import os
import re
from typing import Any

from prompt_tuning_jax.json_files import read_jsonl, write_jsonl


@dataclasses.dataclass(frozen=True)
class EvalResult:
  """Scores of a task, and what they are made of.

  Attributes:
    task: name of the task.
    split: its split.
    metrics: the task's metrics over all examples, in percent; none where the split has no
      labels.
    predictions: for each example, in the task's order: `index`, its own numbers where it
      has some (`idx`, or `idx/question` and the like), `inputs` (text),
      `target` (what metrics compare), `prediction_text`, `prediction` (postprocessed),
      and `scores` of all choices (ranking) or the `score` of the text (generation, or
      ranking among very many).
    step: training step of the prompt, if known.
    prompt: where the prompt came from, if known, or the design of a prompt of words.
  """

  task: str
  split: str
  metrics: dict[str, float]
  predictions: list[dict[str, Any]]
  step: int | None = None
  prompt: str = ''

  def __repr__(self) -> str:
    scores = ', '.join(f'{name} {value:.2f}' for name, value in self.metrics.items())
    scores = scores or 'predicted, no labels to score with'
    return f'{self.task}, {self.split}: {scores} ({len(self.predictions):,} examples)'


def write_result(result: EvalResult, output_dir: str | os.PathLike[str]) -> None:
  """Writes a result below `output_dir`/inference_eval, T5X's folder.

  `<task>-metrics.jsonl` gets a line for the step; a line of the same step, split and prompt is
  replaced, and one that a crash cut short is dropped. `<task>-<split>-predictions.jsonl` holds
  the predictions of the latest evaluation.
  """
  folder = os.path.join(output_dir, 'inference_eval')
  os.makedirs(folder, exist_ok=True)
  name, split = (re.sub(r'[^\w.-]', '_', part) for part in (result.task, result.split))
  path = os.path.join(folder, f'{name}-metrics.jsonl')
  place = {'step': result.step, 'split': result.split}
  if result.prompt:
    place['prompt'] = result.prompt
  records = [
      record
      for record in read_jsonl(path)
      if any(record.get(key) != place.get(key) for key in ('step', 'split', 'prompt'))
  ]
  if result.metrics:
    write_jsonl(path, [*records, place | result.metrics])
  write_jsonl(os.path.join(folder, f'{name}-{split}-predictions.jsonl'), result.predictions)
