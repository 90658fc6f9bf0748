"""Which prompts are to be evaluated on a task: paths, patterns, and those of each task."""

from __future__ import annotations

import difflib
import glob
import os
import re
from collections.abc import Mapping, Sequence

from prompt_tuning_jax.evaluation import super_glue
from prompt_tuning_jax.writing import is_remote


def find_prompts(
    where: str | Sequence[str] | Mapping[str, str | Sequence[str]], task: str
) -> list[str]:
  """The paths of the prompts that are to be evaluated on a task.

  Args:
    where: a path; several; or those of each task by its name. `{task}` in a path stands for
      the name of the task, or of SuperGLUE's for `cb` and the like, and `*`, `**`, `?` and
      `[…]` for whatever is there, in order. In a bucket all but `{task}`, which is the task's
      own name, is taken as it is written.
    task: name of the task.

  Raises:
    FileNotFoundError: if a path leads nowhere.
    ValueError: if the task has none.
  """
  if isinstance(where, Mapping):
    if task not in where:
      near = difflib.get_close_matches(task, where, n=1)
      hint = f' Did you mean {task!r} where it says {near[0]!r}?' if near else ''
      raise ValueError(
          f'PROMPT_FILE names no prompt for {task}, only for {", ".join(where)}.{hint}'
      )
    where = where[task]
  paths: list[str] = []
  for pattern in listed(where):
    names = dict.fromkeys([task, super_glue.task_of(task) or task])
    places = list(dict.fromkeys(pattern.replace('{task}', name) for name in names))
    found = next(filter(None, map(_matches, places)), [])
    if not found:
      raise FileNotFoundError(
          f'PROMPT_FILE: there is no file {" or ".join(places)}'
          + (f' (for the task {task})' if places != [pattern] else '')
          + '. Name an artifact, such as the prompt.safetensors in the folder of a run, or a '
          '.npy prompt.'
      )
    paths += found
  return paths


def paths_without_tasks(
    where: str | Sequence[str] | Mapping[str, str | Sequence[str]],
) -> list[str]:
  """Paths of the prompts that are named without `{task}`, whose names only the tasks tell.

  Raises:
    FileNotFoundError, ValueError: as `find_prompts`.
  """
  if isinstance(where, Mapping):
    patterns = [(task, p) for task, of in where.items() for p in listed(of)]
  else:
    patterns = [('', pattern) for pattern in listed(where)]
  return [
      path
      for task, pattern in patterns
      if task or '{task}' not in pattern
      for path in find_prompts(pattern, task)
  ]


def listed(paths: str | Sequence[str]) -> Sequence[str]:
  """One path as a list of paths."""
  return [paths] if isinstance(paths, str) else paths


def _matches(path: str) -> list[str]:
  # A path that is there is meant as it is written; in a bucket only reading it tells.
  if is_remote(path) or os.path.exists(path):
    return [path]
  return sorted(glob.glob(path, recursive=True), key=_natural_order)


def _natural_order(path: str) -> list[str | int]:
  """So that run_10 comes after run_9."""
  parts = re.split(r'(\d+)', path)
  return [int(part) if number % 2 else part for number, part in enumerate(parts)]
