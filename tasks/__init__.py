"""The tasks that come with the library; importing this registers them with seqio."""

from prompt_tuning_jax.tasks import (
    demo,
    glue,
    lama,
    question_answering,
    summarization,
    super_glue,
    table_to_text,
    triples_to_text,
)
