"""SuperGLUE (Wang et al., 2019) in T5's text format, version 1.0.2 of TFDS.

`super_glue_cb_v102` starts with the word `cb`; `taskless_super_glue_cb_v102` does not. So
does every task and mixture here have a `taskless_` twin:

    super_glue_{boolq,cb,copa,multirc,rte,wic}_v102   a choice between labels
    super_glue_record_v102                            the entity that fills a gap, generated
    super_glue_wsc_v102_simple_{train,eval}           the referent of a pronoun, generated
    super_glue_{axb,axg}_v102                         diagnostics, read as RTE; only `test`
    dpr_v001_simple                                   more pronouns (Rahman & Ng, 2012)
    super_glue_wsc_and_dev_v102_simple                mixture: trains on the first WSC task,
                                                      evaluates on the other
    super_glue_v102_proportional                      mixture of all, by T5's rates

The official files are read from `superglue/{BoolQ,CB,…}/{train,val,test}.jsonl` below
$PTJ_LOCAL_DATA, DPR from `dpr/{train,test}.c.txt`. `evaluation/super_glue.py` makes the
score of the benchmark of the tasks' metrics.

T5 scores neither of the diagnostics; here AX-b has its Matthews correlation and AX-g its
gender parity and accuracy, as the benchmark reports them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import seqio
from prompt_tuning_jax.tasks import preprocessors, super_glue_files
from prompt_tuning_jax.tasks.registration import add_classification_tasks, add_tasks
from prompt_tuning_jax.tasks.sources import Jsonl, LabelledTexts, LocalOrTfds

from prompt_tuning_jax.evaluation import metrics, postprocessors

_FILES = {'train': 'train.jsonl', 'validation': 'val.jsonl', 'test': 'test.jsonl'}

_BOOLEAN = ['False', 'True']
_ENTAILMENT = ['entailment', 'not_entailment']
_PREMISE = ['hypothesis', 'premise']


def _source(
    config: str,
    folder: str,
    parse: Callable[..., Any],
    expected: str,
    files: Mapping[str, str] = _FILES,
) -> LocalOrTfds:
  jsonl = Jsonl(f'superglue/{folder}', files, expected, parse)
  return LocalOrTfds(f'super_glue/{config}:1.0.2', jsonl)


def _add(
    name: str,
    folder: str,
    fields: Sequence[str] | Mapping[str, str],
    label_names: Sequence[str],
    files: Mapping[str, str] = _FILES,
    numbers: Sequence[str] = (),
    **settings: Any,
) -> None:
  texts = fields.values() if isinstance(fields, Mapping) else fields
  parse = LabelledTexts(tuple(texts), tuple(label_names), tuple(numbers))
  add_classification_tasks(
      f'super_glue_{name}_v102',
      source=_source(name, folder, parse, parse.expected, files),
      fields=fields,
      label_names=label_names,
      **{'task_word': name} | settings,
  )


_add('boolq', 'BoolQ', ['passage', 'question'], _BOOLEAN)
_add(
    'cb',
    'CB',
    _PREMISE,
    ['entailment', 'contradiction', 'neutral'],
    metric_fns=[
        functools.partial(metrics.mean_multiclass_f1, num_classes=3),
        metrics.accuracy,
    ],
)
_add('copa', 'COPA', ['choice1', 'choice2', 'premise', 'question'], ['choice1', 'choice2'])
_add('rte', 'RTE', _PREMISE, _ENTAILMENT)
_add(
    'wic',
    'WiC',
    ['sentence1', 'sentence2', 'word'],
    _BOOLEAN,
    # Where the word stands, which T5 leaves unread but TFDS keeps.
    numbers=['start1', 'end1', 'start2', 'end2'],
)

_add(
    'axb',
    'AX-b',
    {'hypothesis': 'sentence2', 'premise': 'sentence1'},
    _ENTAILMENT,
    files={'test': 'AX-b.jsonl'},
    task_word='rte',
    metric_fns=[metrics.matthews_corrcoef],
)
_add(
    'axg',
    'AX-g',
    _PREMISE,
    _ENTAILMENT,
    files={'test': 'AX-g.jsonl'},
    task_word='rte',
    # Its pairs stand one after the other in the file, and nowhere else.
    after_text=[preprocessors.in_order_of_idx],
    metric_fns=[metrics.gender_parity, metrics.accuracy],
)

add_classification_tasks(
    'super_glue_multirc_v102',
    source=_source('multirc', 'MultiRC', super_glue_files.multirc, super_glue_files.MULTIRC),
    task_word='multirc',
    fields=['question', 'answer', 'paragraph'],
    label_names=_BOOLEAN,
    after_text=[preprocessors.remove_html],
    postprocess_fn=postprocessors.multirc,
    metric_fns=[metrics.multirc_f1_over_all_answers, metrics.mean_group_exact_match],
)

add_tasks(
    'super_glue_record_v102',
    source=_source('record', 'ReCoRD', super_glue_files.record, super_glue_files.RECORD),
    task_word='record',
    to_text=[preprocessors.record_to_text],
    postprocess_fn=postprocessors.record,
    metric_fns=[metrics.deduplicated_squad],
)


def _wsc(*splits: str) -> LocalOrTfds:
  files = {split: _FILES[split] for split in splits}
  return _source('wsc.fixed', 'WSC', super_glue_files.wsc, super_glue_files.WSC, files)


# No task reads these rows, but TFDS has them, for others.
UNREPAIRED_WSC = _source(
    'wsc', 'WSC', functools.partial(super_glue_files.wsc, repair=False), super_glue_files.WSC
)

add_tasks(
    'super_glue_wsc_v102_simple_train',
    source=_wsc('train'),
    task_word='wsc:',
    to_text=[functools.partial(preprocessors.wsc_to_text, only_right=True)],
    postprocess_fn=None,
    metric_fns=[],
)
add_tasks(
    'super_glue_wsc_v102_simple_eval',
    source=_wsc('validation', 'test'),
    task_word='wsc:',
    to_text=[preprocessors.wsc_to_text],
    postprocess_fn=postprocessors.wsc_simple,
    metric_fns=[metrics.accuracy],
)

add_tasks(
    'dpr_v001_simple',
    source=LocalOrTfds('definite_pronoun_resolution:1.1.0', super_glue_files.Dpr()),
    task_word='wsc:',
    to_text=[preprocessors.pronoun_to_text],
    postprocess_fn=None,
    metric_fns=[metrics.accuracy],
)

# T5's rates: the number of training examples, of which ReCoRD has one for each answer.
_RATES = {
    'dpr_v001_simple': 1_322.0,
    'super_glue_wsc_v102_simple_train': 259.0,
    'super_glue_wsc_v102_simple_eval': 0.0,
    'super_glue_boolq_v102': 9_427.0,
    'super_glue_cb_v102': 250.0,
    'super_glue_copa_v102': 400.0,
    'super_glue_multirc_v102': 27_243.0,
    'super_glue_record_v102': 138_854.0,
    'super_glue_rte_v102': 2_490.0,
    'super_glue_wic_v102': 5_428.0,
    'super_glue_axb_v102': 0.0,
    'super_glue_axg_v102': 0.0,
}

for _prefix in ('', 'taskless_'):
  seqio.MixtureRegistry.add(
      f'{_prefix}super_glue_wsc_and_dev_v102_simple',
      [f'{_prefix}super_glue_wsc_v102_simple_{part}' for part in ('train', 'eval')],
      default_rate=1.0,
  )
  seqio.MixtureRegistry.add(
      f'{_prefix}super_glue_v102_proportional',
      [(_prefix + task, rate) for task, rate in _RATES.items()],
  )
