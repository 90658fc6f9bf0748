"""Templates as text: slots, fields, and words whose pieces are those of running text."""

import numpy as np
import pytest

from prompt_tuning_jax.data.byte_vocabulary import ByteVocabulary
from prompt_tuning_jax.data.virtual_tokens import Template, as_placement, slots_of

V = 100_000


def pieces(vocabulary, template, **fields):
  """What a template makes of an example, as pieces; virtual token i is 'Vi'."""
  bound = as_placement(template).bind(vocabulary)
  fields = {name: vocabulary.encode(text) for name, text in fields.items()}
  placed = bound(fields.pop('inputs', ()), slots_of(template), V, fields=fields)
  return [f'V{id - V}' if id >= V else vocabulary.piece(id) for id in placed]


def test_numbers_are_slots_names_are_fields_and_all_else_is_words(vocabulary):
  template = '{2} {subject} is an animal of {1} <extra_id_0>.</s>'
  words = [vocabulary.piece(id) for id in vocabulary.encode('is an animal of')]
  subject = [vocabulary.piece(id) for id in vocabulary.encode('a dog')]
  assert words[0] == '▁is' and subject[0] == '▁a'
  end = [vocabulary.piece(id) for id in vocabulary.encode('<extra_id_0>.')]
  assert end[0] == '<extra_id_0>'
  assert pieces(vocabulary, template, subject='a dog') == [
      'V0', 'V1', *subject, *words, 'V2', *end, '</s>'
  ]  # fmt: skip
  placement = as_placement(template)
  assert placement.fields == ('subject',) and placement.num_slots == 3
  assert as_placement(placement.description) == placement == Template(template)


@pytest.mark.parametrize(
    ('template', 'text'),
    [
        ('{subject} is an animal.', 'a dog is an animal.'),
        ('{subject}. It is an animal', 'a dog. It is an animal'),
        ("{subject}'s leg, or {object}?", "a dog's leg, or water?"),
        ('Is {subject} an animal, yes or no?', 'Is a dog an animal, yes or no?'),
        ('  {subject}   is: {object}  ', 'a dog is: water'),
        ('{subject}: <extra_id_0> of {object}!', 'a dog: <extra_id_0> of water!'),
        ('the set {{ {subject} }}', 'the set { a dog }'),
        ('{subject} {object}', 'a dog water'),
    ],
)
def test_without_slots_a_template_is_running_text(vocabulary, template, text):
  expected = [vocabulary.piece(id) for id in vocabulary.encode(text)]
  assert pieces(vocabulary, template, subject='a dog', object='water') == expected


@pytest.mark.parametrize(
    'template', ['{2}{subject}{1}', '{2} {subject} {1}', ' {2}\n{subject} {1}']
)
def test_spaces_beside_slots_mean_nothing(vocabulary, template):
  assert pieces(vocabulary, template, subject='water') == ['V0', 'V1', '▁water', 'V2']


def test_what_touches_a_slot_goes_on_and_what_does_not_begins_a_word(vocabulary):
  assert pieces(vocabulary, '{subject} is {1}.', subject='water')[-2:] == ['V0', '.']
  assert pieces(vocabulary, '{1} is {subject}', subject='water') == ['V0', '▁is', '▁water']
  assert pieces(vocabulary, '{1}s {subject}', subject='water') == ['V0', 's', '▁water']


def test_a_text_says_the_same_as_a_sequence(vocabulary):
  text = '{1} {inputs} It is {2} {subject}'
  items = (1, 'inputs', 'text: It is', 2, 'subject')
  fields = dict(inputs='the sun', subject='water')
  assert pieces(vocabulary, text, **fields) == pieces(vocabulary, items, **fields)


def test_an_end_of_sequence_token_in_a_sequence_is_one_too(vocabulary):
  assert pieces(vocabulary, (1, 'subject', 'text: </s>'), subject='water')[-1] == '</s>'


def test_the_words_of_real_t5_are_those_of_running_text(shared_data):
  from prompt_tuning_jax.data.vocabulary import Vocabulary

  vocabulary = Vocabulary(shared_data / 't5' / 'spiece.model')
  text = 'Dante was born in Florence. Is that so?!'
  template = '{subject} was born in {object}. Is that so?!'
  expected = [vocabulary.piece(id) for id in vocabulary.encode(text)]
  found = pieces(vocabulary, template, subject='Dante', object='Florence')
  assert found == expected and '▁' not in found


def test_bytes_keep_the_spaces_between_words():
  vocabulary = ByteVocabulary()
  bound = as_placement('{subject} is in {object}.').bind(vocabulary)
  fields = {name: vocabulary.encode(text) for name, text in [('subject', 'a'), ('object', 'bc')]}
  assert vocabulary.decode(bound((), 0, V, fields=fields)) == 'a is in bc.'


def test_unknown_characters_where_words_go_on_are_not_lost(vocabulary):
  assert pieces(vocabulary, '{subject}一 is', subject='water').count('<unk>') == 1
  assert pieces(vocabulary, '{subject}.一 is', subject='water').count('<unk>') == 1


def test_words_stay_and_fields_are_cut_from_the_end(vocabulary):
  template = as_placement('{2} {inputs} It is {subject}.').bind(vocabulary)
  words, end = vocabulary.encode('It is'), vocabulary.encode('.', goes_on=True)
  placed = template(
      [7, 5, 1], 2, V, length=len(words + end) + 4, fields={'subject': [9, 8, 6]}
  )
  np.testing.assert_array_equal(placed, [V, V + 1, 7, 5, 1, *words, 9, *end])


@pytest.mark.parametrize(
    ('template', 'message'),
    [
        ('{3} {inputs', r"Template '\{3\} \{inputs': .* Braces come in pairs"),
        ('{3 {inputs}', 'Braces come in pairs'),
        ('3} {inputs}', "Single '}'.* Braces come in pairs"),
        ('{3} {} {inputs}', r'empty braces are neither .* Write \{3\} for three'),
        ('{3} {my text}', "'my text' in braces is neither a number"),
        ('{3.5} {inputs}', "'3.5' in braces is neither a number"),
        ('{-3} {inputs}', "'-3' in braces is neither a number"),
        ('{3} {inputs:>9}', "'inputs' in braces is neither"),
        ('{3} {inputs!r}', "'inputs' in braces is neither"),
        ('{0} {inputs}', 'item 0: a slot has at least one virtual token'),
        ('{3} some words {4}', 'names no field'),
        ('{{inputs}}', 'names no field'),
        ('{3} ({inputs})', r'\{inputs\} touches what stands before it.* Put a space before'),
        ('{3} {subject}{object}', r'\{object\} touches what stands before it'),
        ('{3} {inputs} {targets}', "puts the field 'targets' into the input"),
        ((3, 'inputs', 'targets'), "puts the field 'targets' into the input"),
        ('{inputs} {3} {inputs}', "names the field 'inputs' 2 times"),
    ],
)
def test_templates_that_make_no_sense_are_refused(template, message):
  with pytest.raises(ValueError, match=message):
    as_placement(template)


def test_slots_are_counted_for_the_prompt_s_length():
  assert slots_of('{3} {inputs} {4}') == slots_of((3, 'inputs', 4)) == 7
  for placement in ('prefix', None):
    with pytest.raises(ValueError, match=f'PLACEMENT is {placement!r}, which has none'):
      slots_of(placement)


def test_words_that_fill_the_input_are_refused_with_what_to_raise(vocabulary):
  template = as_placement('{1} It is a long introduction to {inputs}').bind(vocabulary)
  count = template.num_anchor_tokens
  with pytest.raises(ValueError, match=f'are {count} tokens, .* input length of {count} for'):
    template.check(1, count)
  template.check(1, count + 1)
