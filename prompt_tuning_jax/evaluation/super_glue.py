"""The score of SuperGLUE (Wang et al., 2019): one number of the metrics of eight tasks.

    results = evaluate(backbone, prompt, 'taskless_super_glue_v102_proportional')
    super_glue_score({name: result.metrics for name, result in results.items()})
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

# The tasks and the metrics whose mean is a task's score.
METRICS = {
    'boolq': ('accuracy',),
    'cb': ('accuracy', 'mean_3class_f1'),
    'copa': ('accuracy',),
    'multirc': ('f1', 'exact_match'),
    'record': ('f1', 'em'),
    'rte': ('accuracy',),
    'wic': ('accuracy',),
    'wsc': ('accuracy',),
}

# Reported beside the score, not part of it.
DIAGNOSTICS = ('axb', 'axg')

TASKS = (*METRICS, *DIAGNOSTICS)

# What evaluation writes of a task: `taskless_super_glue_cb_v102`, or `…/validation` behind it.
_NAME = re.compile(r'(?:taskless_)?super_glue_([a-z]+)_v102(?:_simple_eval)?(?:/.*)?')


def task_of(name: str) -> str | None:
  """'cb' of 'taskless_super_glue_cb_v102' and the like; None of tasks of others."""
  match = _NAME.fullmatch(name)
  return match.group(1) if match and match.group(1) in TASKS else None


def super_glue_score(metrics: Mapping[str, Mapping[str, float]]) -> float:
  """The mean over the eight tasks of the mean of each task's metrics, in percent.

  Args:
    metrics: name of the task, in full or as in `METRICS` → its metrics in percent. Other
      tasks and other metrics do not count.

  Raises:
    ValueError: as `task_scores`.
  """
  scores = task_scores(metrics)
  return math.fsum(scores.values()) / len(scores)


def task_scores(metrics: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
  """The mean of the metrics of each of the eight tasks, in the order of `METRICS`.

  Raises:
    ValueError: if a task or a metric is missing, is there twice, or is not a number in
      [0, 100]; all that is wrong is named.
  """
  found: dict[str, list[str]] = {task: [] for task in METRICS}
  for name in metrics:
    task = task_of(name) or name
    if task in found:
      found[task].append(name)
  problems = []
  if missing := [task for task, names in found.items() if not names]:
    problems.append(f'{", ".join(missing)} missing (there is {", ".join(metrics) or "nothing"})')
  scores = {}
  for task, names in found.items():
    if len(names) > 1:
      problems.append(f'{task} given as {" and as ".join(names)}')
    for name in names:
      values = [metrics[name].get(metric, math.nan) for metric in METRICS[task]]
      if not all(0 <= value <= 100 for value in values):
        problems.append(f'{name} has {dict(metrics[name])} for {", ".join(METRICS[task])}')
      scores[task] = math.fsum(values) / len(values)
  if problems:
    raise ValueError(
        'The score of SuperGLUE is the mean of eight tasks, each with all of its metrics in '
        f'percent: {"; ".join(problems)}. Evaluate them all on one split, for example with '
        'the mixture super_glue_v102_proportional.'
    )
  return scores
