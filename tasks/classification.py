"""Registers a classification data set as a seqio task, with and without its name."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import seqio
from prompt_tuning_jax.tasks import preprocessors, sources

from prompt_tuning_jax.evaluation import metrics, postprocessors


def add_classification_tasks(
    name: str,
    *,
    tfds_name: str,
    task_word: str,
    jsonl_folder: str,
    jsonl_files: dict[str, str],
    fields: Sequence[str],
    label_names: Sequence[str],
    metric_fns: Sequence[Callable[..., Any]] = (metrics.accuracy,),
) -> None:
  """Registers `name`, in T5's text format, and `taskless_{name}`, without `task_word`.

  Args:
    name: name of the task.
    tfds_name: data set, configuration and version in TensorFlow Datasets.
    task_word: first word of the input.
    jsonl_folder: folder of the official files below $PTJ_LOCAL_DATA.
    jsonl_files: split → file.
    fields: fields of the input, in order.
    label_names: texts of the classes, in the order of TFDS.
    metric_fns: `(targets, predictions) → {name: value}` over class ids.
  """
  source = sources.LocalOrTfds(
      tfds_name, sources.Jsonl(jsonl_folder, jsonl_files, fields, label_names)
  )
  caller = inspect.stack()[1]
  for prefix, word in (('', task_word), ('taskless_', '')):
    seqio.TaskRegistry.add(
        prefix + name,
        source=source,
        preprocessors=[
            functools.partial(
                preprocessors.fields_to_text,
                task_word=word,
                fields=fields,
                label_names=label_names,
            ),
            seqio.preprocessors.tokenize,
            seqio.CacheDatasetPlaceholder(),
            seqio.preprocessors.append_eos,
        ],
        postprocess_fn=functools.partial(
            postprocessors.string_label_to_class_id, label_classes=list(label_names)
        ),
        metric_fns=list(metric_fns),
        output_features=preprocessors.OUTPUT_FEATURES,
        source_info=seqio.SourceInfo(caller.filename, caller.lineno),
    )
