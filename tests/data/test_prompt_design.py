"""Prompt design: which examples are shown, what the model reads, and what is refused."""

from __future__ import annotations

import collections
import json
import os
import re

import numpy as np
import pytest

from prompt_tuning_jax.data import cache
from prompt_tuning_jax.data.byte_vocabulary import ByteVocabulary
from prompt_tuning_jax.data.file_task import FileTask
from prompt_tuning_jax.data.prompt_design import PromptDesign, load_designed
from prompt_tuning_jax.data.tokenized_task import FORMAT, TokenizedTask

CLASSES = ['animal', 'food', 'plant']
DESIGN = PromptDesign(examples=3)


def make_task(vocabulary, count, split='train', name='kinds', classes=CLASSES, **settings):
  """Example i is 'thing {split} {i}', a member of class i modulo 3."""
  return TokenizedTask.from_examples(
      [
          {
              'inputs': f'thing {split} {i}',
              'targets': CLASSES[i % 3],
              'size': i,
              'colour': ('red', 'green')[i % 2],
              'answer': CLASSES[i % 3],
              'parts': ['a', 'b'],
          }
          for i in range(count)
      ],
      vocabulary,
      name=name,
      split=split,
      label_classes=classes,
      **settings,
  )


@pytest.fixture(scope='module')
def train(vocabulary):
  return make_task(vocabulary, 30)


@pytest.fixture(scope='module')
def dev(vocabulary):
  return make_task(vocabulary, 5, 'validation')


def inputs(task):
  return [task.text('inputs', index) for index in range(len(task))]


def shots_of(design, train):
  return [
      f'thing train {i} answer: {CLASSES[i % 3]}; ' for i in design.draw(train)
  ]


# What the model reads.


def test_examples_stand_solved_in_front_of_each_question(vocabulary, train, dev):
  designed = DESIGN(dev, train)
  solved = ''.join(shots_of(DESIGN, train))
  texts = [f'{solved}thing validation {i} answer:' for i in range(5)]
  assert inputs(designed) == texts
  for index, text in enumerate(texts):
    np.testing.assert_array_equal(designed[index]['inputs'], [*vocabulary.encode(text), 1])
    np.testing.assert_array_equal(designed[index]['targets'], dev[index]['targets'])
    assert designed.target(index) == index % 3
    assert designed.example(index) == dev.example(index) | {'inputs_pretokenized': text}
  assert (designed.name, designed.split, len(designed)) == ('kinds', 'validation', 5)
  assert designed.label_classes == CLASSES
  assert designed.metric_fns == dev.metric_fns
  assert designed.postprocess_fn('plant') == 2
  assert designed.manifest['design'] == repr(DESIGN)


def test_words_and_fields_stand_where_the_templates_say(train, dev):
  design = PromptDesign(
      'What is it, {{one}} of these? {examples}a {colour} {inputs} of size {size}. It is',
      examples=2,
      example_template='{size}: {targets}',
      separator=' | ',
      seed=7,
  )
  first, second = design.draw(train)
  solved = f'{first}: {CLASSES[first % 3]} | {second}: {CLASSES[second % 3]} | '
  assert inputs(design(dev, train))[3] == (
      f'What is it, {{one}} of these? {solved}a green thing validation 3 of size 3. It is'
  )
  assert design.fields == ('colour', 'inputs', 'size')


def test_without_examples_only_the_words_are_added(dev):
  assert inputs(PromptDesign()(dev))[1] == 'thing validation 1 answer:'
  assert inputs(PromptDesign('{inputs}')(dev)) == inputs(dev)
  for designed, plain in zip(
      PromptDesign('{inputs}')(dev).flat_tokens('inputs'), dev.flat_tokens('inputs'), strict=True
  ):
    np.testing.assert_array_equal(designed, plain)
  assert PromptDesign('so, {inputs}?').text({'inputs': 'a dog'}) == 'so, a dog?'


def test_a_task_of_ids_is_read_as_the_text_that_they_are(vocabulary):
  ids = [*vocabulary.encode('a small dog'), 1]
  task = TokenizedTask.from_examples(
      [{'inputs': ids, 'targets': [*vocabulary.encode('animal'), 1]}] * 2, vocabulary
  )
  design = PromptDesign(examples=1)
  other = TokenizedTask.from_examples([{'inputs': 'a cat', 'targets': 'animal'}], vocabulary)
  assert inputs(design(task, other)) == ['a cat answer: animal; a small dog answer:'] * 2


def test_the_task_stays_as_it_was(vocabulary, train, dev):
  before = inputs(dev), dev.flat_tokens('inputs')[0].tolist(), dict(dev.manifest)
  DESIGN(dev, train)
  assert (inputs(dev), dev.flat_tokens('inputs')[0].tolist(), dict(dev.manifest)) == before


def test_a_designed_task_can_be_saved_and_read(vocabulary, train, dev, tmp_path):
  designed = DESIGN(dev, train)
  designed.save(tmp_path / 'task.safetensors')
  read = TokenizedTask.read(tmp_path / 'task.safetensors', vocabulary)
  assert inputs(read) == inputs(designed)
  assert read.target(1) == 1


def test_line_breaks_that_the_vocabulary_cannot_read_are_a_warning(vocabulary, dev):
  assert vocabulary.encode('one\ntwo') == vocabulary.encode('one two')
  broken = PromptDesign('Think.\n{inputs}')
  with pytest.warns(UserWarning, match='line breaks of PromptDesign are spaces to this model'):
    broken(dev)
  with pytest.warns(UserWarning, match='line breaks'):
    PromptDesign(separator='\n').warn_of_line_breaks(vocabulary)
  in_bytes = ByteVocabulary()
  read = broken(make_task(in_bytes, 3, 'validation'))
  assert in_bytes.decode(read[0]['inputs']) == 'Think.\nthing validation 0'


# Which examples.


def test_every_class_is_shown_as_often_as_the_others(train):
  for k in range(1, 31):
    drawn = PromptDesign(examples=k).draw(train)
    assert len(set(drawn)) == k
    counts = collections.Counter(number % 3 for number in drawn)
    assert max(counts.values()) - min(counts[c] for c in range(3)) <= 1
    # Those next to the question are of all classes.
    assert k < 3 or {number % 3 for number in drawn[-3:]} == {0, 1, 2}


def test_classes_take_turns_in_an_order_of_each_turn_s_own(train):
  drawn = PromptDesign(examples=30).draw(train)
  orders = {tuple(n % 3 for n in drawn[start : start + 3]) for start in range(0, 30, 3)}
  assert len(orders) > 1


def test_a_class_with_few_examples_shows_all_it_has(vocabulary):
  labels = [0] * 10 + [1] * 2 + [2] * 10
  task = TokenizedTask.from_examples(
      [{'inputs': f'thing {i}', 'targets': CLASSES[c]} for i, c in enumerate(labels)],
      vocabulary,
      label_classes=[*CLASSES, 'substance'],
  )
  counts = collections.Counter(labels[n] for n in PromptDesign(examples=12).draw(task))
  assert counts == {0: 5, 1: 2, 2: 5}


def test_the_same_seed_shows_the_same_examples(train, vocabulary):
  drawn = {seed: PromptDesign(examples=6, seed=seed).draw(train) for seed in range(4)}
  assert PromptDesign(examples=6, seed=3).draw(make_task(vocabulary, 30)) == drawn[3]
  assert len(set(map(tuple, drawn.values()))) == 4
  # Written down, so that a new version of the library shows the same.
  assert drawn[0] == [23, 3, 10, 20, 6, 25]


def test_fewer_examples_are_the_last_ones_of_more(train):
  most = PromptDesign(examples=30).draw(train)
  for k in range(30):
    assert PromptDesign(examples=k).draw(train) == most[30 - k :]


def test_free_texts_are_drawn_without_regard_to_their_answers(vocabulary):
  task = make_task(vocabulary, 30, classes=None)
  drawn = PromptDesign(examples=30).draw(task)
  assert sorted(drawn) == list(range(30))
  assert PromptDesign(examples=4).draw(task) == drawn[-4:]


def test_a_question_is_never_among_its_examples(vocabulary, train):
  part = TokenizedTask.from_examples(
      [{'inputs': f'thing train {i}', 'targets': CLASSES[i % 3]} for i in range(20)],
      vocabulary,
      name='kinds',
      split='train[:20]',
      label_classes=CLASSES,
  )
  design = PromptDesign(examples=10)
  assert sorted(design.draw(train, part)) == list(range(20, 30))
  assert inputs(design(part, train))[0].endswith('; thing train 0 answer:')
  with pytest.raises(ValueError, match=r'=11, but kinds.* only 10 examples that are not in .*20'):
    PromptDesign(examples=11)(part, train)
  with pytest.raises(ValueError, match="only 0 examples that are not in the split 'train'"):
    PromptDesign(examples=1)(train, train)


# What does not fit.


def test_examples_that_do_not_fit_are_left_out_from_the_front(vocabulary, train):
  texts = ['a dog', 'a dog with ' + 'very ' * 12 + 'long ears', 'a tree ' * 80]
  task = TokenizedTask.from_examples(
      [{'inputs': text, 'targets': 'animal'} for text in texts], vocabulary, name='kinds',
      split='test',
  )  # fmt: skip
  design = PromptDesign(examples=6)
  shots = shots_of(design, train)

  def count(text, k):
    return len(vocabulary.encode(''.join(shots[6 - k :]) + f'{text} answer:')) + 1

  length = count(texts[0], 6)
  expected = [6, max(k for k in range(7) if count(texts[1], k) <= length), 0]
  assert 0 < expected[1] < 6 and count(texts[2], 0) > length
  with pytest.warns(UserWarning, match='left out') as caught:
    designed = design(task, train, length=length)
  (message,) = [str(warning.message) for warning in caught]
  assert "2 of the 3 inputs of kinds, split 'test', have fewer than the 6 examples" in message
  assert f'fit {length} tokens: {18 - sum(expected)} are left out in all' in message
  assert 'the fewest that an input has is 0' in message
  assert inputs(designed) == [
      ''.join(shots[6 - k :]) + f'{text} answer:' for k, text in zip(expected, texts)
  ]
  assert designed.lengths('inputs')[0] == length
  # What is left is what a design of fewer examples shows.
  fewer = PromptDesign(examples=expected[1])(task, train, length=10**6)
  assert inputs(fewer)[1] == inputs(designed)[1]


def test_examples_that_fit_are_all_there_without_a_warning(train, dev):
  longest = DESIGN(dev, train).longest('inputs')
  assert inputs(DESIGN(dev, train, length=longest)) == inputs(DESIGN(dev, train))
  with pytest.warns(UserWarning, match='1 of the 5 inputs'):
    DESIGN(dev, train, length=longest - 1)


# What is refused.


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(examples=-1), r'PromptDesign.examples is -1; expected a whole number, 0 or more'),
        (dict(examples=2.0), r'PromptDesign.examples is 2.0; expected a whole number'),
        (dict(examples=True), r'PromptDesign.examples is True'),
        (dict(seed=-1), r'PromptDesign.seed is -1'),
        (dict(separator=None), r'PromptDesign.separator is None; expected a text'),
        (dict(template=None), r'PromptDesign.template is None; expected a text with fields'),
        (dict(template='what is it?'), r'names no field of the example.* Put \{inputs\} where'),
        (dict(template='{examples} what?'), r'names no field of the example'),
        (dict(template='{{inputs}} {}'), r'PromptDesign.template=.*has no name of a field'),
        (dict(template='{inputs'), r'PromptDesign.template=.*Braces come in pairs'),
        (dict(template='{inputs} {targets}'), r"puts the field 'targets' into the input"),
        (dict(template='{inputs}', examples=2), r'=2, but .* has no place for them'),
        (dict(example_template='{inputs}'), r'shows no answer. Put \{targets\} where'),
        (dict(example_template='so it is'), r'shows no answer'),
        (dict(example_template='{examples} {targets}'), r'\{examples\} are all of them'),
    ],
)
def test_designs_that_make_no_sense_are_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    PromptDesign(**settings)


def test_more_examples_than_there_are_are_refused(train, dev):
  assert len(PromptDesign(examples=30).draw(train)) == 30
  with pytest.raises(
      ValueError, match=r"examples=31, but kinds, split 'train', has only 30 examples. Lower it"
  ):
    PromptDesign(examples=31)(dev, train)
  with pytest.raises(ValueError, match='=3 are drawn from the training split of kinds, which'):
    DESIGN(dev)


@pytest.mark.parametrize(
    ('parameter', 'template', 'message'),
    [
        ('template', '{examples}{colours}', r"template .* example 0 of kinds, split 'validation': "
         r"no field 'colours'. Did you mean 'colour'\? Fields: .*colour.*inputs"),
        ('template', '{examples}{parts} {inputs}', r"'parts' is a list, not a text"),
        ('template', '{examples}{inputs} {answer}', r"names the field 'answer', which in kinds, "
         r"split 'validation', is the answer"),
        ('example_template', '{colours} {targets}', r"example_template .* example \d+ of kinds, "
         r"split 'train': no field 'colours'. Did you mean 'colour'\?"),
    ],
)  # fmt: skip
def test_fields_that_an_example_does_not_have_are_refused(
    train, dev, parameter, template, message
):
  with pytest.raises(ValueError, match=message):
    PromptDesign(examples=2, **{parameter: template})(dev, train)


def test_a_field_that_is_missing_in_a_text_is_named():
  with pytest.raises(ValueError, match="reads the field 'premise', but the fields given are in"):
    PromptDesign('{premise} {inputs}').text({'inputs': 'a'})


def test_examples_without_labels_cannot_be_shown_solved(vocabulary, dev):
  unlabelled = TokenizedTask.from_examples(
      [{'inputs': 'a', 'targets': '<unk>'}] * 3, vocabulary, label_classes=CLASSES
  )
  with pytest.raises(ValueError, match='has no labels'):
    PromptDesign(examples=1)(dev, unlabelled)
  # Questions without labels can be asked.
  assert inputs(PromptDesign()(unlabelled)) == ['a answer:'] * 3


# Tasks by their names.


def keep(task, vocabulary):
  task.save(cache.cache_path(task.name, task.split, vocabulary))


def test_every_task_of_a_mixture_shows_its_own_training_examples(vocabulary, cache_dir):
  for name in ('kinds', 'things'):
    for split, count in (('train', 9), ('validation', 2)):
      keep(make_task(vocabulary, count, split, name), vocabulary)
  (cache_dir / 'both').mkdir()
  members = [['kinds', 1.0], ['things', 2.0]]
  (cache_dir / 'both' / 'mixture.json').write_text(
      json.dumps({'format': FORMAT, 'code': {}, 'members': members})
  )
  before = {path: path.read_bytes() for path in cache_dir.rglob('*') if path.is_file()}
  loaded = load_designed(DESIGN, 'both', 'validation', vocabulary)
  assert [(task.name, rate) for task, rate in loaded] == [('kinds', 1.0), ('things', 2.0)]
  for task, _ in loaded:
    solved = shots_of(DESIGN, make_task(vocabulary, 9, 'train', task.name))
    assert inputs(task)[1] == ''.join(solved) + 'thing validation 1 answer:'
  assert inputs(loaded[0][0]) != inputs(loaded[1][0])
  # The cache holds what it held: the inputs as the tasks have them.
  assert {path: path.read_bytes() for path in cache_dir.rglob('*') if path.is_file()} == before
  plain = load_designed(None, 'both', 'validation', vocabulary)
  assert [inputs(task)[0] for task, _ in plain] == ['thing validation 0'] * 2


def test_a_task_of_files_shows_lines_of_its_training_file(vocabulary, tmp_path):
  lines = ['text\tlabel', *(f'film {i}\t{i % 2}' for i in range(6))]
  (tmp_path / 'train.tsv').write_text('\n'.join(lines))
  (tmp_path / 'dev.tsv').write_text('text\tlabel\na film\t1\n')
  files = {'train': str(tmp_path / 'train.tsv'), 'validation': str(tmp_path / 'dev.tsv')}
  task = FileTask('films', files, 'review: {text}', 'label', label_names=['0', '1'])
  design = PromptDesign('{examples}{text}?', 2, '{text}: {targets}', ', ')
  ((designed, _),) = load_designed(design, task, 'validation', vocabulary)
  assert re.fullmatch(r'film (\d): ., film (\d): ., a film\?', inputs(designed)[0])
  assert sum(int(label) for label in re.findall(r': (.)', inputs(designed)[0])) == 1
  os.remove(files['train'])
  alone = PromptDesign('{text}?')
  assert inputs(load_designed(alone, task, 'validation', vocabulary)[0][0]) == ['a film?']


def test_a_task_without_training_examples_is_refused(vocabulary, tmp_path):
  (tmp_path / 'dev.tsv').write_text('text\tlabel\na film\t1\n')
  task = FileTask('films', {'test': str(tmp_path / 'dev.tsv')}, '{text}', 'label')
  with pytest.raises(ValueError, match="=3 are drawn from train, but films has no split 'train'"):
    load_designed(DESIGN, task, 'test', vocabulary)
  ((words_alone, _),) = load_designed(PromptDesign(), task, 'test', vocabulary)
  assert inputs(words_alone) == ['a film answer:']
