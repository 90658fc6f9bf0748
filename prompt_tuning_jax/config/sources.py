"""Looking for what a command names (tasks, prompts, backbones), for a dry run to tell.

The command itself would find out a little later, when it has loaded its model.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from prompt_tuning_jax.backbones.backbone import Backbone
from prompt_tuning_jax.checkpoints import load
from prompt_tuning_jax.data import cache
from prompt_tuning_jax.data.file_task import FileTask
from prompt_tuning_jax.data.tokenized_task import seqio_is_installed
from prompt_tuning_jax.evaluation.prompt_paths import paths_without_tasks
from prompt_tuning_jax.injection_stack import stack_injections
from prompt_tuning_jax.neighbors import words
from prompt_tuning_jax.prompt_files import load_prompt


def check_sources(command: str, kwargs: Mapping[str, Any]) -> None:
  """Looks for the tasks, prompts and backbones that a command names.

  Raises:
    ValueError, ImportError: if there is no such task.
    ValueError, OSError: if a prompt or a backbone to convert cannot be read, a prompt does not
      fit the backbone, or several are to answer together and are not of one kind.
  """
  backbone = kwargs.get('backbone')
  where = kwargs.get('prompt_file') or kwargs.get('import_path')
  injections = []
  for path in paths_without_tasks(where) if where else ():
    prompt = load_prompt(path)
    if backbone is not None:
      prompt.injection.check(backbone.spec)
    if command == 'neighbors':
      words.prompt_rows(backbone, prompt.injection, path)
    injections.append(prompt.injection)
  # Those of different tasks never answer together.
  if kwargs.get('ensemble') and injections and not isinstance(where, Mapping):
    stack_injections(injections)
  if command == 'convert' and not load.is_elsewhere(kwargs['where']):
    load.open_checkpoint(load.find(kwargs['where']), kwargs.get('max_distance'))
  task, eval_task = kwargs.get('task'), kwargs.get('eval_task')
  split = 'train' if command == 'train' else kwargs.get('split')
  if isinstance(task, FileTask):
    # Whether the files are there is quickly seen.
    split = split or task.splits[0]
    eval_task = eval_task or (task if command == 'train' else None)
    if (design := kwargs.get('design')) is not None and design.examples:
      task.paths('train')
  for name, of_split in (
      (task, split),
      (eval_task, kwargs.get('eval_split', 'validation')),
  ):
    if name:
      _check_task(
          name,
          of_split or 'validation',
          backbone,
          kwargs.get('task_module', cache.DEFAULT_TASK_MODULE),
          kwargs.get('cache_dir'),
      )


def _check_task(
    name: str | FileTask,
    split: str,
    backbone: Backbone | None,
    task_module: str,
    cache_dir: str | None,
) -> None:
  if isinstance(name, FileTask):
    name.paths(split)
    return
  vocabulary = backbone.vocabulary if backbone is not None else None
  if vocabulary is not None and os.path.exists(
      cache.cache_path(name, split, vocabulary, cache_dir)
  ):
    return
  if seqio_is_installed():
    from prompt_tuning_jax.data import seqio_source

    if seqio_source.mixture_members(name, task_module) is None:
      seqio_source.task_functions(name, task_module)
