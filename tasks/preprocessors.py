"""Raw fields to text, as T5 writes them (Raffel et al., 2020, appendix D)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import seqio
import tensorflow as tf

# T5's own vocabulary, for use through seqio alone; the library replaces it with the
# vocabulary of the model at hand.
T5_VOCABULARY = seqio.SentencePieceVocabulary(
    'gs://t5-data/vocabs/cc_all.32000.100extra/sentencepiece.model', extra_ids=100
)

OUTPUT_FEATURES = {
    'inputs': seqio.Feature(vocabulary=T5_VOCABULARY, add_eos=True),
    'targets': seqio.Feature(vocabulary=T5_VOCABULARY, add_eos=True),
}


@seqio.map_over_dataset
def fields_to_text(
    example: Mapping[str, tf.Tensor],
    task_word: str,
    fields: Sequence[str],
    label_names: Sequence[str],
) -> dict[str, tf.Tensor]:
  """`{task_word} field1: value1 field2: value2` → the name of the label.

  Args:
    example: a row in the form of TFDS, with `label` and `idx`.
    task_word: first word of the input; '' leaves it out, as prompt tuning does: the
      prompt says which task it is (the `taskless_` tasks of Lester et al., 2021).
    fields: fields in the order in which they are written; T5 sorts them by name.
    label_names: texts of the labels; a label of -1 becomes `<unk>`.
  """
  words = [task_word] if task_word else []
  for field in fields:
    words += [f'{field}:', example[field]]
  label = example['label']
  target = tf.cond(
      tf.equal(label, -1),
      lambda: tf.constant('<unk>'),
      lambda: tf.gather(tf.constant(list(label_names)), label),
  )
  return {
      'idx': example['idx'],
      'inputs': tf.strings.join(words, separator=' '),
      'targets': target,
  }
