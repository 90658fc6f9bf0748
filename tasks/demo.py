"""The demo: what kind of thing does this definition describe?

`demo_gloss_category` reads WordNet definitions that come with the package (see
`prompt_tuning_jax/zoo/demo/README.md`): 3,800 to train on, 480 for validation and 456 to
test with, in eight classes of the same size. Nothing is downloaded.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import seqio
import tensorflow as tf

import prompt_tuning_jax
from prompt_tuning_jax.evaluation import metrics, postprocessors

LABELS = (
    'animal',
    'body',
    'communication',
    'food',
    'location',
    'person',
    'plant',
    'substance',
)

_ZOO = Path(prompt_tuning_jax.__file__).parent / 'zoo'
_VOCABULARY = seqio.SentencePieceVocabulary(
    str(_ZOO / 'nano' / 'spiece.model'), extra_ids=100
)


def _fields(line: bytes) -> list[bytes]:
  row = json.loads(line)
  return [row[name].encode() for name in ('id', 'definition', 'label')]


@seqio.map_over_dataset
def definition_to_text(line: tf.Tensor) -> dict[str, tf.Tensor]:
  """A line of the jsonl file → `definition: {definition}` and the name of the class."""
  # JSON needs Python, which is quick enough for a few thousand lines.
  fields = tf.numpy_function(_fields, [line], [tf.string] * 3, stateful=False)
  identifier, definition, label = (tf.ensure_shape(field, []) for field in fields)
  return {
      'idx': identifier,
      'inputs': tf.strings.join(['definition: ', definition]),
      'targets': label,
  }


seqio.TaskRegistry.add(
    'demo_gloss_category',
    source=seqio.TextLineDataSource(
        {
            split: str(_ZOO / 'demo' / f'{split}.jsonl')
            for split in ('train', 'validation', 'test')
        },
        num_input_examples={'train': 3800, 'validation': 480, 'test': 456},
    ),
    preprocessors=[
        definition_to_text,
        seqio.preprocessors.tokenize,
        seqio.CacheDatasetPlaceholder(),
        seqio.preprocessors.append_eos,
    ],
    postprocess_fn=functools.partial(
        postprocessors.string_label_to_class_id, label_classes=list(LABELS)
    ),
    metric_fns=[metrics.accuracy],
    output_features={
        name: seqio.Feature(vocabulary=_VOCABULARY, add_eos=True)
        for name in ('inputs', 'targets')
    },
)
