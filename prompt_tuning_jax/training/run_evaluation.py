"""What a run is measured by: the evaluators of its tasks, and one name for each metric."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from prompt_tuning_jax.evaluation.evaluator import Evaluator
from prompt_tuning_jax.typing import Injection, PyTree


class RunEvaluation:
  """The evaluators of a run's tasks as one; with several tasks, metrics are named after them."""

  def __init__(self, evaluators: Iterable[Evaluator]):
    self._evaluators = list(evaluators)

  def __call__(
      self, injection: Injection | None, params: PyTree | None = None, *, step: int | None = None
  ) -> dict[str, float]:
    """The metrics of a prompt, or of the model alone; see `Evaluator`."""
    return joined({
        evaluator.task.name: evaluator(injection, params, step=step).metrics
        for evaluator in self._evaluators
    })

  def check_metric(self, name: str | None) -> None:
    """Raises ValueError unless this is one of the metrics, or None; no model is needed."""
    if name is None:
      return
    measured = joined({e.task.name: dict.fromkeys(e.metric_names()) for e in self._evaluators})
    if name not in measured:
      near = difflib.get_close_matches(name, measured, n=1)
      hint = f' Did you mean {near[0]!r}?' if near else ''
      raise ValueError(
          f'BEST_METRIC is {name!r}, which the evaluation does not measure.{hint} It measures '
          f'{", ".join(measured)}.'
      )


def joined(of_tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
  """The metrics of all tasks; with several tasks, each name begins with its task's."""
  if len(of_tasks) == 1:
    return dict(*of_tasks.values())
  return {
      f'{task}/{name}': value
      for task, metrics in of_tasks.items()
      for name, value in metrics.items()
  }
