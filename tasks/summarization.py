"""Summaries: XSum (Narayan et al., 2018), an article in one sentence; prefix tuning's task.

`xsum_v110` has T5's text, `summarize: ` and the article; `taskless_xsum_v110` the article
alone. The files `xsum/{train,validation,test}.jsonl` below $PTJ_LOCAL_DATA, plain or gzipped,
hold an article a line, with `document`, `summary` and `id`; where they are not, TensorFlow
Datasets has the set once its articles, which it does not fetch itself, have been prepared.

Scores are ROUGE-1, ROUGE-2 and ROUGE-L, over the whole and over its sentences (Lsum), as
rouge-score computes them. Published numbers (Li & Liang, 2021) come from it too, but with
words stemmed, which T5 does not do: they are a little higher.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from prompt_tuning_jax.tasks import preprocessors, sources
from prompt_tuning_jax.tasks.registration import add_tasks

from prompt_tuning_jax.evaluation import metrics


def _row(row: Mapping[str, Any], number: int) -> list[dict[str, str]]:
  """The row of TFDS, which has no `id`; a line without one is as good."""
  del number
  texts = {name: sources.text_field(row, name) for name in ('document', 'summary')}
  for name, text in texts.items():
    if not text.strip():
      raise ValueError(f'{name!r} is empty')
  return [texts]


add_tasks(
    'xsum_v110',
    source=sources.LocalOrTfds(
        'xsum:1.1.0',
        sources.Jsonl(
            'xsum',
            {split: f'{split}.jsonl' for split in ('train', 'validation', 'test')},
            'document and summary',
            _row,
        ),
    ),
    task_word='summarize:',
    to_text=[
        functools.partial(
            preprocessors.document_to_text, document='document', summary='summary'
        )
    ],
    postprocess_fn=None,
    metric_fns=[
        functools.partial(
            metrics.rouge, score_keys=['rouge1', 'rouge2', 'rougeL', 'rougeLsum']
        )
    ],
)
