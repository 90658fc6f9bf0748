"""SuperGLUE (Wang et al., 2019) in T5's text format, version 1.0.2 of TFDS.

`super_glue_cb_v102` starts with the word `cb`; `taskless_super_glue_cb_v102` does not.
"""

import functools

from prompt_tuning_jax.tasks.classification import add_classification_tasks

from prompt_tuning_jax.evaluation import metrics

_FILES = {'train': 'train.jsonl', 'validation': 'val.jsonl', 'test': 'test.jsonl'}

add_classification_tasks(
    'super_glue_cb_v102',
    tfds_name='super_glue/cb:1.0.2',
    task_word='cb',
    jsonl_folder='superglue/CB',
    jsonl_files=_FILES,
    fields=['hypothesis', 'premise'],
    label_names=['entailment', 'contradiction', 'neutral'],
    metric_fns=[
        functools.partial(metrics.mean_multiclass_f1, num_classes=3),
        metrics.accuracy,
    ],
)

add_classification_tasks(
    'super_glue_rte_v102',
    tfds_name='super_glue/rte:1.0.2',
    task_word='rte',
    jsonl_folder='superglue/RTE',
    jsonl_files=_FILES,
    fields=['hypothesis', 'premise'],
    label_names=['entailment', 'not_entailment'],
)
