"""Raw fields to text, as T5 writes them (Raffel et al., 2020, appendix D)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import seqio
import tensorflow as tf

from prompt_tuning_jax.data import vocabulary
from prompt_tuning_jax.data.labels import UNKNOWN

# T5's own vocabulary, for use through seqio alone; the library replaces it with the
# vocabulary of the model at hand.
T5_VOCABULARY = seqio.SentencePieceVocabulary(
    vocabulary.T5_VOCABULARY, extra_ids=100
)

OUTPUT_FEATURES = {
    'inputs': seqio.Feature(vocabulary=T5_VOCABULARY, add_eos=True),
    'targets': seqio.Feature(vocabulary=T5_VOCABULARY, add_eos=True),
}


@seqio.map_over_dataset
def fields_to_text(
    example: Mapping[str, Any],
    fields: Mapping[str, str],
    label_names: Sequence[str],
) -> dict[str, tf.Tensor]:
  """`field1: value1 field2: value2` → the name of the label.

  Args:
    example: a row in the form of TFDS, with `label` and `idx`.
    fields: name as it is written → field of the row, in the order in which they are
      written; T5 sorts them by name.
    label_names: texts of the labels; a label of -1 becomes `<unk>`.
  """
  words = []
  for name, field in fields.items():
    words += [f'{name}:', example[field]]
  label = example['label']
  target = tf.cond(
      tf.equal(label, -1),
      lambda: tf.constant(UNKNOWN),
      lambda: tf.gather(tf.constant(list(label_names)), label),
  )
  return {
      'inputs': tf.strings.join(words, separator=' '),
      'targets': target,
      **_index(example),
  }


def _index(example: Mapping[str, Any]) -> dict[str, tf.Tensor]:
  """`idx`, or `idx/question` and the like where it has parts: metrics group by them."""
  index = example['idx']
  if isinstance(index, Mapping):
    return {f'idx/{name}': part for name, part in index.items()}
  return {'idx': index}


@seqio.map_over_dataset
def prepend_word(example: Mapping[str, tf.Tensor], word: str) -> dict[str, tf.Tensor]:
  """Puts the name of the task before the input.

  Prompt tuning leaves it out, for the prompt says which task it is (the `taskless_` tasks
  of Lester et al., 2021).
  """
  return {**example, 'inputs': tf.strings.join([word, example['inputs']], separator=' ')}


@seqio.map_over_dataset
def remove_html(example: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
  """Line breaks of MultiRC's paragraphs become spaces, and bold text plain."""
  inputs = tf.strings.regex_replace(example['inputs'], '<br>', ' ')
  return {**example, 'inputs': tf.strings.regex_replace(inputs, '</?b>', '')}


def in_order_of_idx(dataset: tf.data.Dataset) -> tf.data.Dataset:
  """Examples in the order of their `idx`, that of the official file; TFDS has another.

  All of them are in memory at once: for sets of up to 100,000.
  """
  by_idx = dataset.batch(100_000).map(
      lambda batch: tf.nest.map_structure(
          lambda column: tf.gather(column, tf.argsort(batch['idx'], stable=True)), batch
      )
  )
  return by_idx.unbatch()


@seqio.map_over_dataset
def similarity_to_text(example: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
  """STS-B: two sentences → their similarity, to the nearest fifth, as a text."""
  fifths = tf.round(example['label'] * 5)
  words = ['sentence1:', example['sentence1'], 'sentence2:', example['sentence2']]
  return {
      'inputs': tf.strings.join(words, separator=' '),
      'targets': tf.strings.as_string(fifths / 5, precision=1),
      'idx': example['idx'],
  }


def record_to_text(dataset: tf.data.Dataset) -> tf.data.Dataset:
  """ReCoRD: a query, the entities that may answer it and the passage → an answer.

  A question with several right answers becomes as many examples, and one without (the
  test set's) the answer `<unk>`. All right answers stay with each, for the metrics.
  """

  def examples_of(example: Mapping[str, Any]) -> tf.data.Dataset:
    # A passage ends in highlights, a line each, which become sentences.
    passage = tf.strings.regex_replace(
        example['passage'], r'([.?!"\'])\n@highlight\n', r'\1 '
    )
    passage = tf.strings.regex_replace(passage, r'\n@highlight\n', '. ')
    entities = tf.strings.reduce_join(example['entities'], separator=', ')
    words = ['query:', example['query'], 'entities:', entities, 'passage:', passage]
    kept = {
        'inputs': tf.strings.join(words, separator=' '),
        'answers': example['answers'],
        **_index(example),
    }
    targets = tf.cond(
        tf.size(example['answers']) > 0,
        lambda: example['answers'],
        lambda: tf.constant([UNKNOWN]),
    )
    return tf.data.Dataset.from_tensor_slices(targets).map(lambda text: {'targets': text, **kept})

  return dataset.flat_map(examples_of)


# Texts of WSC in which the pronoun is not the word that span2_index counts: what they are
# to be instead, and where the pronoun stands in that.
_CORRECTED = {
    'The boy continued to whip the pony , and eventually the pony threw him over. John '
    'laughed out quite loud. "Good for him," he said. ': (
        'The boy continued to whip the pony , and eventually the pony threw him over. John '
        'laughed out quite loud. "Good for him ," he said.',
        22,
    ),
    'When they had eventually calmed down a bit , and had gotten home, Mr. Farley put the '
    'magic pebble in an iron safe . Some day they might want to use it , but really for '
    'now, what more could they wish for?': (
        'When they had eventually calmed down a bit , and had gotten home, Mr. Farley put '
        'the magic pebble in an iron safe . Some day they might want to use it , but really '
        'for now, what more could they wish for?',
        31,
    ),
}


def wsc_to_text(dataset: tf.data.Dataset, only_right: bool = False) -> tf.data.Dataset:
  """WSC as T5 reads it: a text with its pronoun marked, `*he*` → whom it refers to.

  The target is the referent that the row proposes, right or wrong, which the postprocessor
  compares with what the model says.

  Args:
    dataset: rows in the form of TFDS (`wsc.fixed`).
    only_right: leaves out the rows whose referent is wrong, from which there is nothing to
      learn.
  """
  if only_right:
    dataset = dataset.filter(lambda example: tf.cast(example['label'], tf.bool))
  return _wsc_row_to_text(dataset)


@seqio.map_over_dataset
def _wsc_row_to_text(example: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
  text, place = example['text'], tf.cast(example['span2_index'], tf.int64)
  for wrong, (corrected, true_place) in _CORRECTED.items():
    is_wrong = tf.equal(example['text'], wrong)
    text = tf.where(is_wrong, corrected, text)
    place = tf.where(is_wrong, tf.constant(true_place, tf.int64), place)
  words = tf.strings.split(text, ' ')
  pronoun = example['span2_text']
  message = 'WSC: word span2_index of the text is not span2_text. Use wsc.fixed of TFDS.'
  with tf.control_dependencies([tf.debugging.assert_equal(words[place], pronoun, message)]):
    marked = tf.strings.join(['*', pronoun, '*'])
  words = tf.tensor_scatter_nd_update(words, [[place]], [marked])
  return {
      'inputs': tf.strings.reduce_join(words, separator=' '),
      'targets': example['span1_text'],
      'label': example['label'],
      'idx': example['idx'],
  }


@seqio.map_over_dataset
def pronoun_to_text(example: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
  """Definite pronoun resolution in the form of WSC: marked pronoun → its referent.

  The pronoun in question is the first of its kind.
  """
  pattern = tf.strings.join([' (', example['pronoun'], r')( |\.|,)'])
  return {
      'inputs': tf.strings.regex_replace(
          example['sentence'], pattern, r' *\1*\2', replace_global=False
      ),
      'targets': tf.gather(example['candidates'], example['label']),
  }


@seqio.map_over_dataset
def question_to_text(example: Mapping[str, Any]) -> dict[str, tf.Tensor]:
  """A question about a passage, as T5 writes SQuAD → its answer.

  Texts have spaces around every character that is no letter, digit or underscore (of
  ASCII), as T5's have. The target is the row's `answer` where it has one, else the first of
  its answers; all of them stay, for the metrics.
  """
  question = _with_spaces(example['question'])
  context = _with_spaces(example['context'])
  answers = _with_spaces(example['answers']['text'])
  target = _with_spaces(example['answer']) if 'answer' in example else answers[0]
  words = ['question:', question, 'context:', context]
  return {
      'inputs': tf.strings.regex_replace(tf.strings.join(words, separator=' '), r'\s+', ' '),
      'targets': target,
      'id': example['id'],
      'question': question,
      'context': context,
      'answers': answers,
  }


def _with_spaces(text: tf.Tensor) -> tf.Tensor:
  text = tf.strings.regex_replace(text, r'(\W)', r' \1 ')
  return tf.strings.regex_replace(text, r'\s+', ' ')


@seqio.map_over_dataset
def document_to_text(
    example: Mapping[str, tf.Tensor], document: str, summary: str
) -> dict[str, tf.Tensor]:
  """A document → its summary; `document` and `summary` name the fields."""
  return {'inputs': example[document], 'targets': example[summary]}
