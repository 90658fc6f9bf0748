"""Means over several tasks, each of which counts alike."""

from __future__ import annotations

import math
from collections.abc import Mapping


def macro_average(metrics: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
  """The mean over tasks of each metric, as LAMA's papers report hit@1 over relations.

  A task counts once, however many examples it has.

  Args:
    metrics: name of the task → its metrics, `{name: value}`.

  Returns:
    Metric → mean, of the metrics that all tasks have, in the order of the first one's.

  Raises:
    ValueError: if there is no task, the tasks have no metric in common, or a value is no
      number; the task is named.
  """
  if not metrics:
    raise ValueError('There are no tasks to average over: give the metrics of at least one.')
  first, *others = metrics.values()
  common = [name for name in first if all(name in values for values in others)]
  if not common:
    found = '; '.join(f'{task}: {", ".join(values)}' for task, values in metrics.items())
    raise ValueError(
        'An average is over tasks that are measured alike, but these have no metric in '
        f'common ({found}).'
    )
  for task, values in metrics.items():
    for name in common:
      if not math.isfinite(values[name]):
        raise ValueError(
            f'{task} has {name} = {values[name]}, so that the average would mean nothing. '
            'Leave the task out, or evaluate it on a split that can be scored.'
        )
  return {
      name: math.fsum(values[name] for values in metrics.values()) / len(metrics)
      for name in common
  }
