"""GLUE (Wang et al., 2018) in T5's text format, version 2.0.0 of TFDS.

`glue_sst2_v200` starts with the word `sst2`; `taskless_glue_sst2_v200` does not. So does
every task and mixture here have a `taskless_` twin:

    glue_{cola,sst2,mrpc,qqp,qnli,rte,wnli}_v200    a choice between labels
    glue_stsb_v200                                  a similarity of 0.0 to 5.0, generated
    glue_mnli_v200                                  trains; its other splits are
                                                    validation_matched and so on
    glue_mnli_{matched,mismatched}_v200             `validation` and `test` of MNLI
    glue_ax_v200                                    diagnostics, read as MNLI; no labels
    glue_mnli_and_dev_v200                          mixture of the three of MNLI
    glue_v200_proportional                          mixture of all but WNLI, by T5's rates
    glue_{mrpc_from_qqp,qqp_from_mrpc}_v200         `validation`, answered in the words of
                                                    the other task
    glue_{mrpc_from_qqp,qqp_from_mrpc}_zeroshot_v200  mixture: trains on the other task,
                                                    evaluates on this one

The official files are read from `glue/{CoLA,SST-2,…}/{train,dev,test}.tsv` below
$PTJ_LOCAL_DATA, SST-2 also from `sst2/{train,validation,test}.jsonl`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import seqio
from prompt_tuning_jax.tasks import preprocessors
from prompt_tuning_jax.tasks.glue_files import GlueTsv
from prompt_tuning_jax.tasks.registration import add_classification_tasks, add_tasks
from prompt_tuning_jax.tasks.sources import Jsonl, LabelledTexts, LocalOrTfds

from prompt_tuning_jax.evaluation import metrics, postprocessors

_SPLITS = {'train': 'train', 'validation': 'dev', 'test': 'test'}
_ALL_OF_MNLI = {'train': 'train'} | {
    f'{split}_{part}': f'{file}_{part}'
    for split, file in (('validation', 'dev'), ('test', 'test'))
    for part in ('matched', 'mismatched')
}

_ENTAILMENT = ['entailment', 'not_entailment']
_MNLI = ['entailment', 'neutral', 'contradiction']
_PARAPHRASE = [metrics.f1_score_with_invalid, metrics.accuracy]
# Label names of the two tasks that ask the same in other words.
_WORDS = {
    'mrpc': ['not_equivalent', 'equivalent'],
    'qqp': ['not_duplicate', 'duplicate'],
}


def _files(folder: str, splits: Mapping[str, str] = _SPLITS) -> dict[str, list[str]]:
  return {split: [f'glue/{folder}/{file}.tsv'] for split, file in splits.items()}


def _add(
    name: str,
    files: Mapping[str, Sequence[str]],
    fields: Sequence[str],
    label_names: Sequence[str],
    *,
    task: str | None = None,
    columns: Mapping[str, str] | None = None,
    label: str = 'label',
    reading: Mapping[str, Any] | None = None,
    **settings: Any,
) -> None:
  """Registers the data set `name`, as the task of that name or of another.

  `columns`, `label` and `reading` say how its files are read.
  """
  columns = columns or dict(zip(fields, fields))
  add_classification_tasks(
      f'glue_{task or name}_v200',
      source=LocalOrTfds(
          f'glue/{name}:2.0.0', GlueTsv(files, columns, label, label_names, **reading or {})
      ),
      fields=fields,
      label_names=label_names,
      **{'task_word': name} | settings,
  )


_add(
    'cola',
    _files('CoLA'),
    ['sentence'],
    ['unacceptable', 'acceptable'],
    label='is_acceptable',
    reading={
        # The files with labels have no header.
        'header': dict.fromkeys(
            ['train', 'validation'], ['source', 'is_acceptable', 'mark', 'sentence']
        )
    },
    metric_fns=[metrics.matthews_corrcoef],
)

_SENTIMENT = LabelledTexts(('sentence',), ('negative', 'positive'))
_SST2_JSONL = Jsonl('sst2', {}, _SENTIMENT.expected, _SENTIMENT)
_add(
    'sst2',
    {
        split: [f'sst2/{split}.jsonl', *names]
        for split, names in _files('SST-2').items()
    },
    ['sentence'],
    ['negative', 'positive'],
    reading={'jsonl': _SST2_JSONL},
)

# The tasks that are also answered in the words of another.
_PARAPHRASES = {
    'mrpc': dict(
        files=_files('MRPC'),
        fields=['sentence1', 'sentence2'],
        columns={'sentence1': '#1 String', 'sentence2': '#2 String'},
        label='Quality',
    ),
    'qqp': dict(
        files=_files('QQP'), fields=['question1', 'question2'], label='is_duplicate'
    ),
}
for _name, _other in (('mrpc', 'qqp'), ('qqp', 'mrpc')):
  _settings = _PARAPHRASES[_name] | {
      'label_names': _WORDS[_name], 'metric_fns': _PARAPHRASE
  }
  _add(_name, **_settings)
  _validation = {'validation': _settings['files']['validation']}
  _in_other_words = functools.partial(
      postprocessors.class_id_in_other_words,
      label_classes=_WORDS[_other],
      own_classes=_WORDS[_name],
  )
  _add(
      _name,
      task=f'{_name}_from_{_other}',
      **_settings | {'files': _validation, 'postprocess_fn': _in_other_words},
  )

_add('qnli', _files('QNLI'), ['question', 'sentence'], _ENTAILMENT)
_add('rte', _files('RTE'), ['sentence1', 'sentence2'], _ENTAILMENT)
_add('wnli', _files('WNLI'), ['sentence1', 'sentence2'], _ENTAILMENT[::-1])

for _name, _splits in {
    'mnli': _ALL_OF_MNLI,
    'mnli_matched': {'validation': 'dev_matched', 'test': 'test_matched'},
    'mnli_mismatched': {'validation': 'dev_mismatched', 'test': 'test_mismatched'},
}.items():
  _add(
      _name,
      _files('MNLI', _splits),
      ['hypothesis', 'premise'],
      _MNLI,
      columns={'premise': 'sentence1', 'hypothesis': 'sentence2'},
      label='gold_label',
      task_word='mnli',
  )
_add(
    'ax',
    {'test': ['glue/AX/AX.tsv', 'glue/diagnostic/diagnostic.tsv']},
    ['hypothesis', 'premise'],
    _MNLI,
    columns={'premise': 'sentence1', 'hypothesis': 'sentence2'},
    task_word='mnli',
)

_PAIR = {'sentence1': 'sentence1', 'sentence2': 'sentence2'}
add_tasks(
    'glue_stsb_v200',
    source=LocalOrTfds('glue/stsb:2.0.0', GlueTsv(_files('STS-B'), _PAIR, 'score', ())),
    task_word='stsb',
    to_text=[preprocessors.similarity_to_text],
    postprocess_fn=postprocessors.string_to_float,
    metric_fns=[metrics.pearson_corrcoef, metrics.spearman_corrcoef],
)

# T5's rates, the numbers of training examples. It leaves WNLI out, which is made of the
# sentences of WSC.
_RATES = {
    'cola': 8_551.0,
    'sst2': 67_349.0,
    'mrpc': 3_668.0,
    'qqp': 363_849.0,
    'stsb': 5_749.0,
    'mnli': 392_702.0,
    'qnli': 104_743.0,
    'rte': 2_490.0,
    'mnli_mismatched': 0.0,
    'mnli_matched': 0.0,
    'ax': 0.0,
}

for _prefix in ('glue', 'taskless_glue'):
  seqio.MixtureRegistry.add(
      f'{_prefix}_mnli_and_dev_v200',
      [f'{_prefix}_{_name}_v200' for _name in ('mnli', 'mnli_matched', 'mnli_mismatched')],
      default_rate=1.0,
  )
  seqio.MixtureRegistry.add(
      f'{_prefix}_v200_proportional',
      [(f'{_prefix}_{_name}_v200', rate) for _name, rate in _RATES.items()],
  )
  for _name, _other in (('mrpc', 'qqp'), ('qqp', 'mrpc')):
    seqio.MixtureRegistry.add(
        f'{_prefix}_{_name}_from_{_other}_zeroshot_v200',
        [f'{_prefix}_{_other}_v200', f'{_prefix}_{_name}_from_{_other}_v200'],
        default_rate=1.0,
    )
