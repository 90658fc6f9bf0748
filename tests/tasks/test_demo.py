"""The demo's data and task: balanced, disjoint, and readable with the packaged pieces."""

import collections
import json
from pathlib import Path

import pytest

import prompt_tuning_jax
from prompt_tuning_jax.data.vocabulary import Vocabulary
from prompt_tuning_jax.zoo.build import cloze, corpus, options, wordnet

ZOO = Path(prompt_tuning_jax.__file__).parent / 'zoo'
SIZES = {'train': 3800, 'validation': 480, 'test': 456}
WORDNET = Path('/usr/share/wordnet')


@pytest.fixture(scope='module')
def splits():
  return {
      split: [
          json.loads(line)
          for line in (ZOO / 'demo' / f'{split}.jsonl').read_text().splitlines()
      ]
      for split in SIZES
  }


@pytest.fixture(scope='module')
def vocabulary():
  return Vocabulary(ZOO / 'nano' / 'spiece.model')


def test_every_split_holds_equally_many_examples_of_each_of_the_eight_classes(splits):
  for split, examples in splits.items():
    counts = collections.Counter(example['label'] for example in examples)
    assert counts == {label: SIZES[split] // 8 for label in wordnet.CLASSES}


def test_no_definition_and_no_synset_occurs_twice_in_any_splits(splits):
  examples = [example for split in splits.values() for example in split]
  texts = {''.join(wordnet.words_of(example['definition'])) for example in examples}
  assert len(texts) == len(examples) == sum(SIZES.values())
  assert len({example['id'] for example in examples}) == len(examples)


def test_no_definition_names_a_class_or_leaves_the_length_bounds(splits):
  giveaways = {word + ending for word in wordnet.CLASSES for ending in ('', 's')}
  for example in (example for split in splits.values() for example in split):
    words = wordnet.words_of(example['definition'])
    assert not giveaways & set(words), example
    assert len(words) >= 3 and len(example['definition'].split()) <= 30, example


def test_no_definition_is_marked_as_abuse_or_about_sex(splits):
  unfit = {'vulgar', 'obscene', 'offensive', 'slur', 'slang', 'genitals', 'copulation', 'sex'}
  assert unfit <= wordnet.UNFIT_WORDS
  for example in (example for split in splits.values() for example in split):
    assert wordnet.UNFIT_WORDS.isdisjoint(wordnet.words_of(example['definition'])), example


def test_no_held_out_definition_is_a_phrase_that_the_corpus_contains(splits):
  held_out = {
      ' '.join(wordnet.words_of(example['definition']))
      for example in splits['validation'] + splits['test']
  }
  assert held_out.isdisjoint({'a cup of tea', 'a kind of grunt', 'deep sea fishes'})


def test_classes_are_mixed_over_the_file_and_not_in_runs(splits):
  for examples in splits.values():
    head = collections.Counter(example['label'] for example in examples[:256])
    assert all(16 <= head[label] <= 48 for label in wordnet.CLASSES), head


def test_each_class_word_is_a_single_known_piece_of_the_vocabulary(vocabulary):
  pieces = [vocabulary.encode(label) for label in wordnet.CLASSES]
  assert all(len(ids) == 1 and ids[0] > vocabulary.unk_id for ids in pieces)
  assert len({ids[0] for ids in pieces}) == len(wordnet.CLASSES)


def test_the_vocabulary_has_4000_pieces_and_spells_every_definition(splits, vocabulary):
  assert vocabulary.num_pieces == 4000 and vocabulary.size == 4100
  for example in splits['test'] + splits['validation']:
    ids = vocabulary.encode(example['definition'])
    assert vocabulary.unk_id not in ids
    assert vocabulary.decode(ids) == example['definition']


def test_the_demo_fits_in_600_kib_and_carries_wordnets_notice():
  folder = ZOO / 'demo'
  assert sum(path.stat().st_size for path in folder.glob('*.jsonl')) < 600 * 1024
  notice = (folder / 'WORDNET_LICENSE.txt').read_text()
  assert 'WordNet 3.0 Copyright 2006 by Princeton University' in notice


def test_the_task_yields_the_packaged_text_its_tokens_and_its_label(
    splits, vocabulary, tmp_path
):
  pytest.importorskip('seqio')
  from prompt_tuning_jax.data.cache import load_task

  for split, rows in splits.items():
    task = load_task(
        'demo_gloss_category',
        split,
        vocabulary,
        cache_dir=str(tmp_path),
        task_module='prompt_tuning_jax.tasks.demo',
    )
    assert len(task) == SIZES[split]
    assert tuple(task.label_classes) == wordnet.CLASSES
    for index in (0, 1, 255, len(task) - 1):
      row, tokens, raw = rows[index], task[index], task.example(index)
      text = 'definition: ' + row['definition']
      assert raw['inputs_pretokenized'] == text
      assert raw['targets_pretokenized'] == row['label']
      assert raw['idx'] == row['id']
      assert tokens['inputs'].tolist() == vocabulary.encode(text) + [1]
      assert tokens['targets'].tolist() == vocabulary.encode(row['label']) + [1]
      assert task.target(index) == wordnet.CLASSES.index(row['label'])
    (accuracy,) = task.metric_fns
    assert accuracy([0, 1, 2, 3], [0, 1, 2, -1]) == {'accuracy': 75.0}


def test_a_held_out_definition_is_found_inside_a_text_but_only_word_by_word():
  held_out = wordnet.Contamination(['a small boat', 'the red-nosed fish'], min_words=3)
  assert 'It was (a small, boat) he saw' in held_out
  assert 'The Red nosed fish' in held_out
  assert 'a small boathouse' not in held_out
  assert 'a small red boat' not in held_out
  assert 'small boat' not in held_out


def test_definitions_below_the_contamination_floor_are_not_looked_for():
  assert 'on a small boat' not in wordnet.Contamination(['a small boat'], min_words=4)


def test_reducing_the_demo_drops_unfit_and_everyday_definitions_and_keeps_the_order():
  def example(label, number, definition):
    return {'id': f'{label}{number}', 'definition': definition, 'label': label}

  drawn = [
      example(label, number, f'{label} described at length {number}')
      for number in range(4)
      for label in wordnet.CLASSES
  ]
  drawn[0] = example('animal', 0, 'Vulgar word for a beast')
  drawn[8] = example('animal', 1, 'deep sea fishes')
  drawn[1] = example('body', 0, 'where the sexton rings a bell')
  kept = wordnet.reduce_demo({'test': drawn})['test']
  assert kept == [e for e in drawn if e['id'][-1] in ('23' if e['label'] == 'animal' else '01')]


def test_a_held_out_definition_left_in_the_corpus_stops_the_build(tmp_path):
  (tmp_path / 'books.txt').write_text('It was fair.\nShe saw the Small, red\tboat sink.\n')
  pair = {'inputs': 'define which word: a boat', 'targets': 'ship'}
  (tmp_path / 'word.jsonl').write_text(json.dumps(pair) + '\n')
  corpus.check_unseen(tmp_path, wordnet.Contamination(['a small red boat'], min_words=3))
  held_out = wordnet.Contamination(['the small red boat', 'which word a boat'], min_words=3)
  with pytest.raises(ValueError) as error:
    corpus.check_unseen(tmp_path, held_out)
  for words in ("'the small red boat' in", 'books.txt', "'which word a boat' in", 'word.jsonl'):
    assert words in str(error.value)


def test_a_line_of_the_database_is_read_as_words_definition_and_hypernyms():
  line = (
      '00002452 05 n 02 sea_cow 0 sirenian 0 003 @ 00001930 n 0000 ~ 00004258 n 0000 '
      '@i 00002137 n 0000 | any of two (or three) kinds: large; "a sea cow sank"; "so"'
  )
  synset = wordnet.parse_synset(line)
  assert synset.lemmas == ('sea cow', 'sirenian')
  assert synset.definition == 'any of two (or three) kinds: large'
  assert synset.hypernyms == (('n', '00001930'), ('n', '00002137'))
  assert (synset.key, synset.heading) == (('n', '00002452'), 5)


def test_pairs_leave_out_the_demos_synsets_and_never_answer_with_a_heading():
  def synset(offset, word, gloss, hypernym=None):
    hypernyms = (('n', hypernym),) if hypernym else ()
    return wordnet.Synset('n', offset, 5, (word,), gloss, hypernyms)

  synsets = [
      synset('1', 'animal', 'a living thing that moves'),
      synset('2', 'dog', 'a tame beast that barks', '1'),
      synset('3', 'poodle', 'a dog with curls', '2'),
      synset('4', 'cat', 'a tame beast that purrs', '1'),
      synset('5', 'lion', 'wild; a tame beast that barks', '4'),
  ]
  held_out = wordnet.Contamination(['a tame beast that barks'], min_words=3)
  pairs = wordnet.supervised_pairs(synsets, frozenset({('n', '2')}), held_out)
  assert [pair['targets'] for pair in pairs['word']] == ['poodle', 'cat']
  assert pairs['kind'] == [
      {'inputs': 'what is it: a dog with curls', 'targets': 'dog'}
  ]
  assert [pair['inputs'] for pair in pairs['define']] == ['define: poodle', 'define: cat']


def _taxonomy():
  """Two kinds with enough below them to be options, a heading, and a few beasts."""
  def synset(offset, word, gloss, hypernym):
    return wordnet.Synset('n', offset, 5, (word,), gloss, (('n', hypernym),) if hypernym else ())

  synsets = [
      synset('1', 'animal', 'a living thing that moves', None),
      synset('2', 'rodent', 'a small beast that gnaws', '1'),
      synset('3', 'hawk', 'a large bird with sharp eyes', '1'),
  ]
  for number in range(options.MIN_BELOW):
    synsets.append(synset(f'r{number}', f'mouse{number}', f'a grey one of kind {number}', '2'))
    synsets.append(synset(f'h{number}', f'kite{number}', f'a brown one of kind {number}', '3'))
  return synsets


def test_options_hold_the_answer_once_and_nothing_else_that_is_right():
  held_out = wordnet.Contamination(['a grey one of kind 1'], min_words=3)
  pairs = options.option_pairs(_taxonomy(), frozenset({('n', 'r0')}), held_out)
  # All beasts below the two kinds but the one of the demo and the one held out.
  assert len(pairs) == options.REPEATS * (2 * options.MIN_BELOW - 2)
  for pair in pairs:
    offered, definition = pair['inputs'].split(' definition: ')
    assert sorted(offered.replace(',', '').split()) == ['hawk', 'rodent']
    assert pair['targets'] == ('rodent' if 'grey' in definition else 'hawk')
    assert not definition.endswith((' 0', ' 1')) or 'brown' in definition
  assert pairs == options.option_pairs(_taxonomy(), frozenset({('n', 'r0')}), held_out)


@pytest.mark.parametrize(
    ('definition', 'expected'),
    [
        ('a small animal with long ears', 'animal'),
        ('someone who plays', 'someone'),
        ('the act of leaving, or of going', 'act'),
        ('dessert made by baking fruit', 'dessert'),
        ('of or from Spain', None),
    ],
)
def test_the_head_of_a_definition_is_found(definition, expected):
  words = definition.split()
  place = cloze.head(words)
  assert (None if place is None else words[place]) == expected


def test_a_cloze_pair_becomes_its_definition_again_with_its_answer():
  synsets = [
      wordnet.Synset('n', str(i), 5, ('x',), f'a quiet {beast} of the northern {place}', ())
      for i, (beast, place) in enumerate(
          [('rodent', 'forests'), ('falcon', 'coasts'), ('salmon', 'rivers')] * 5
      )
  ]
  pairs = cloze.cloze_pairs(synsets, frozenset(), wordnet.Contamination([], 3))
  assert len(pairs) == cloze.REPEATS * len(synsets)
  with_options = 0
  for pair in pairs:
    offered, text = pair['inputs'].split('definition: ')
    if offered:
      with_options += 1
      assert pair['targets'] in offered.replace(',', '').split()
    whole = text.replace(cloze.BLANK, pair['targets'])
    if cloze.BLANK not in text:
      whole = text.replace('quiet', f'quiet {pair["targets"]}')
    assert whole in {synset.gloss for synset in synsets}
  assert 0 < with_options < len(pairs)


def test_a_cloze_pair_is_never_a_held_out_definition():
  synset = wordnet.Synset('n', '1', 5, ('x',), 'a quiet rodent of the forests', ())
  assert synset.gloss not in wordnet.Contamination(['a rodent of the forests'], 3)
  held_out = wordnet.Contamination(
      ['a rodent of the forests', 'a quiet of the forests'], min_words=3
  )
  pairs = cloze.cloze_pairs([synset] * 20, frozenset(), held_out)
  assert pairs and not any(pair['inputs'] in held_out for pair in pairs)


def test_a_missing_database_is_named_with_its_remedy(tmp_path):
  with pytest.raises(FileNotFoundError, match='data.noun.*wordnet-base'):
    wordnet.read_synsets(tmp_path)


def test_the_build_script_reproduces_the_packaged_splits_from_wordnet(splits):
  if not (WORDNET / 'data.noun').exists():
    pytest.skip(f'needs the WordNet 3.0 database files in {WORDNET}')
  drawn = wordnet.choose_demo(wordnet.read_synsets(WORDNET))
  assert wordnet.reduce_demo(drawn) == splits
  for split, examples in splits.items():
    assert len(drawn[split]) == 8 * wordnet.SPLIT_SIZES[split] >= len(examples)
