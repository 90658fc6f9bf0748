"""Registers a data set as a seqio task, with and without its name before the text."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import seqio
from prompt_tuning_jax.tasks import preprocessors

from prompt_tuning_jax.evaluation import metrics, postprocessors


def add_tasks(
    name: str,
    *,
    source: seqio.DataSource,
    task_word: str | None,
    to_text: Sequence[Callable[..., Any]],
    postprocess_fn: Callable[..., Any] | None,
    metric_fns: Sequence[Callable[..., Any]],
    caller: types.FrameType | None = None,
) -> None:
  """Registers `name`, in T5's text format, and `taskless_{name}`, without `task_word`.

  Args:
    name: name of the task.
    source: the rows.
    task_word: first word of the input; None where T5 writes none: then both tasks are the
      same.
    to_text: preprocessors that make `inputs`, without that word, and `targets` of a row.
    postprocess_fn: text of a prediction → what metrics compare; None: the text.
    metric_fns: `(targets, predictions) → {name: value}`.
    caller: frame of the code that registers the task; its file counts as the task's.
  """
  caller = caller or inspect.currentframe().f_back
  for prefix in ('', 'taskless_'):
    word = functools.partial(preprocessors.prepend_word, word=task_word)
    seqio.TaskRegistry.add(
        prefix + name,
        source=source,
        preprocessors=[
            *to_text,
            *([] if prefix or task_word is None else [word]),
            seqio.preprocessors.tokenize,
            seqio.CacheDatasetPlaceholder(),
            seqio.preprocessors.append_eos,
        ],
        postprocess_fn=postprocess_fn,
        metric_fns=list(metric_fns),
        output_features=preprocessors.OUTPUT_FEATURES,
        source_info=seqio.SourceInfo(caller.f_code.co_filename, caller.f_lineno),
    )


def add_classification_tasks(
    name: str,
    *,
    source: seqio.DataSource,
    task_word: str,
    fields: Sequence[str] | Mapping[str, str],
    label_names: Sequence[str],
    metric_fns: Sequence[Callable[..., Any]] = (metrics.accuracy,),
    postprocess_fn: Callable[..., Any] = postprocessors.string_label_to_class_id,
    after_text: Sequence[Callable[..., Any]] = (),
) -> None:
  """Registers `name` and `taskless_{name}` for rows of texts with a label each.

  Args:
    name: name of the task.
    source: rows with the fields, `label` and `idx`.
    task_word: first word of the input.
    fields: fields of the input, in order; a mapping renames them (written name → field).
    label_names: texts of the classes, in the order of their numbers.
    metric_fns: `(targets, predictions) → {name: value}` over what `postprocess_fn` makes.
    postprocess_fn: takes `label_classes`, from which rank classification chooses:
      `label_names`, unless it is a partial that holds others.
    after_text: preprocessors of `inputs` and `targets`, which are texts.
  """
  if not isinstance(fields, Mapping):
    fields = dict(zip(fields, fields, strict=True))
  to_text = functools.partial(
      preprocessors.fields_to_text, fields=fields, label_names=label_names
  )
  add_tasks(
      name,
      source=source,
      task_word=task_word,
      to_text=[to_text, *after_text],
      postprocess_fn=functools.partial(
          postprocess_fn,
          **{'label_classes': list(label_names)} | getattr(postprocess_fn, 'keywords', {}),
      ),
      metric_fns=metric_fns,
      caller=inspect.currentframe().f_back,
  )
