"""GLUE (Wang et al., 2018) in T5's text format, version 2.0.0 of TFDS.

`glue_sst2_v200` starts with the word `sst2`; `taskless_glue_sst2_v200` does not.
"""

from prompt_tuning_jax.tasks.classification import add_classification_tasks

add_classification_tasks(
    'glue_sst2_v200',
    tfds_name='glue/sst2:2.0.0',
    task_word='sst2',
    jsonl_folder='sst2',
    jsonl_files={
        'train': 'train.jsonl',
        'validation': 'validation.jsonl',
        'test': 'test.jsonl',
    },
    fields=['sentence'],
    label_names=['negative', 'positive'],
)
