"""What the demo's data and nano's pretraining pairs are made of: WordNet 3.0.

WordNet files every noun under one of 26 headings (its lexicographer files: animal,
artifact, body, ...); the demo asks for eight of them. Splits are drawn, the corpus is made
without what was drawn (`corpus.py`), and then the splits are reduced: the demo shows a part
of what the corpus left out.

Every choice is made by the rank of a hash, so the same inputs give the same files on any
machine and any Python, and the head of an output file is a fair sample of the whole.
"""

import dataclasses
import hashlib
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence

CLASSES = (
    'animal', 'body', 'communication', 'food', 'location', 'person', 'plant', 'substance')
# How many of each class are drawn; reduce_demo keeps fewer.
SPLIT_SIZES = {'test': 64, 'validation': 64, 'train': 500}
MIN_WORDS, MAX_WORDS = 3, 30
SEED = 'prompt-tuning-jax demo 1'

# The demo prints its examples; a definition with one of these words is dropped.
UNFIT_WORDS = frozenset((
    # how WordNet marks abuse, slurs and slang
    'derogatory', 'disparaging', 'indecent', 'obscene', 'offensive', 'pejorative',
    'profane', 'slang', 'slur', 'vulgar',
    # sexual organs and acts
    'clitoris', 'copulation', 'ejaculated', 'ejaculates', 'genital', 'genitals', 'labia',
    'penis', 'pornographic', 'prostitute', 'prostitutes', 'scrotum', 'semen', 'sex',
    'sexual', 'sexually', 'sodomy', 'testis', 'vagina', 'vaginal', 'vulva',
    # peoples, in words of another time
    'race', 'savage'))
# Drawn definitions that the books of the corpus happen to contain, as anyone might write
# them. The demo drops them; check_unseen says if others have to be added.
EVERYDAY_PHRASES = ('a cup of tea', 'a kind of grunt', 'deep-sea fishes')

# WordNet's lexinfo(5WN): the number in the second column of the data files.
NOUN_HEADINGS = (
    'Tops', 'act', 'animal', 'artifact', 'attribute', 'body', 'cognition',
    'communication', 'event', 'feeling', 'food', 'group', 'location', 'motive', 'object',
    'person', 'phenomenon', 'plant', 'possession', 'process', 'quantity', 'relation',
    'shape', 'state', 'substance', 'time')
VERB_HEADINGS = (
    'body', 'change', 'cognition', 'communication', 'competition', 'consumption',
    'contact', 'creation', 'emotion', 'motion', 'perception', 'possession', 'social',
    'stative', 'weather')
FIRST_NOUN_HEADING = 3
HEADINGS = frozenset(heading.lower() for heading in NOUN_HEADINGS + VERB_HEADINGS)


@dataclasses.dataclass(frozen=True)
class Synset:
  """One meaning: the words that share it, its gloss, and the meanings above it."""
  part_of_speech: str  # 'n', 'v', 'a', 's' (satellite adjective) or 'r' (adverb)
  offset: str  # of its line in the part of speech's file: with it, the synset's name
  heading: int
  lemmas: tuple[str, ...]
  gloss: str
  hypernyms: tuple[tuple[str, str], ...]  # (part of speech, offset) of each

  @property
  def key(self) -> tuple[str, str]:
    """What names the synset in pointers: its part of speech and offset."""
    return self.part_of_speech, self.offset

  @property
  def definition(self) -> str:
    """The gloss without its quoted examples."""
    head = re.split(r'(?:^|[;:,]\s*)"', self.gloss, maxsplit=1)[0]
    return head.strip(' ;')


def read_synsets(folder: pathlib.Path) -> list[Synset]:
  """Reads data.noun, data.verb, data.adj and data.adv (the format of wndb(5WN)).

  Args:
    folder: where WordNet 3.0's database files lie.

  Returns:
    All synsets, in the order of the files.

  Raises:
    FileNotFoundError: if a database file is missing.
  """
  synsets = []
  for part_of_speech in ('noun', 'verb', 'adj', 'adv'):
    path = folder / f'data.{part_of_speech}'
    if not path.exists():
      raise FileNotFoundError(
          f'{path} does not exist. --wordnet must name the folder of WordNet 3.0\'s '
          'database files; on Debian: apt install wordnet-base, then /usr/share/wordnet.')
    with path.open(encoding='utf-8') as lines:
      synsets.extend(
          parse_synset(line) for line in lines if not line.startswith(' '))
  return synsets


def parse_synset(line: str) -> Synset:
  """Reads one line of a database file, as wndb(5WN) describes it."""
  data, gloss = line.split('|', 1)
  fields = data.split()
  offset, heading, kind, num_lemmas = fields[0], fields[1], fields[2], int(fields[3], 16)
  lemmas = fields[4:4 + 2 * num_lemmas:2]
  pointers = fields[4 + 2 * num_lemmas + 1:]
  num_pointers = int(fields[4 + 2 * num_lemmas])
  hypernyms = tuple(
      (pointers[i + 2], pointers[i + 1])
      for i in range(0, 4 * num_pointers, 4) if pointers[i] in ('@', '@i'))
  return Synset(
      part_of_speech=kind,
      offset=offset,
      heading=int(heading),
      # Adjectives carry their syntactic position, as in 'galore(ip)'.
      lemmas=tuple(re.sub(r'\(\w+\)$', '', lemma).replace('_', ' ') for lemma in lemmas),
      gloss=' '.join(gloss.split()),
      hypernyms=hypernyms)


def words_of(text: str) -> list[str]:
  """The words by which texts are compared: lower case, letters and digits only."""
  return re.findall(r'[^\W_]+', text.lower())


def in_hash_order(items: Iterable, key=lambda item: item) -> list:
  """Shuffles by the hash of each item's key: the same on any machine, for ever."""
  def rank(item):
    return hashlib.sha256(f'{SEED}\n{key(item)}'.encode()).digest()
  return sorted(items, key=rank)


class Contamination:
  """Finds, word by word, whether a text contains one of the held-out definitions."""

  def __init__(self, definitions: Iterable[str], min_words: int):
    self._min_words = min_words
    self._by_head = {}
    for definition in definitions:
      words = words_of(definition)
      if len(words) >= min_words:
        self._by_head.setdefault(tuple(words[:min_words]), []).append(words)

  def find(self, text: str) -> str | None:
    """The words of a held-out definition that the text contains, or None."""
    words = words_of(text)
    for start in range(len(words) - self._min_words + 1):
      head = tuple(words[start:start + self._min_words])
      for held_out in self._by_head.get(head, ()):
        if words[start:start + len(held_out)] == held_out:
          return ' '.join(held_out)
    return None

  def __contains__(self, text: str) -> bool:
    return self.find(text) is not None


def choose_demo(synsets: Sequence[Synset]) -> dict[str, list[dict[str, str]]]:
  """Draws balanced splits, of which the demo keeps what reduce_demo leaves.

  A definition qualifies if it has 3 to 30 words, no quotation marks and no class's word
  (singular or plural: the answer must not be copied), and if no other synset, of any part
  of speech, has the same definition.

  Args:
    synsets: all of WordNet.

  Returns:
    For each split, its examples: `id`, `definition` and `label`.

  Raises:
    ValueError: if a class has too few definitions that qualify.
  """
  giveaways = set(CLASSES) | {f'{label}s' for label in CLASSES} | {'bodies'}
  times_seen = {}
  for synset in synsets:
    text = ''.join(words_of(synset.definition))
    times_seen[text] = times_seen.get(text, 0) + 1

  def qualifies(synset):
    words = words_of(synset.definition)
    return (MIN_WORDS <= len(words) and len(synset.definition.split()) <= MAX_WORDS
            and '"' not in synset.definition
            and giveaways.isdisjoint(words)
            and times_seen[''.join(words)] == 1)

  splits = {split: [] for split in SPLIT_SIZES}
  for label in CLASSES:
    heading = FIRST_NOUN_HEADING + NOUN_HEADINGS.index(label)
    candidates = in_hash_order(
        (synset for synset in synsets if synset.heading == heading and qualifies(synset)),
        key=lambda synset: synset.offset)
    if len(candidates) < sum(SPLIT_SIZES.values()):
      raise ValueError(
          f'Only {len(candidates)} definitions qualify for the class {label!r}, but '
          f'SPLIT_SIZES asks for {sum(SPLIT_SIZES.values())} of each class. Choose '
          'another class or smaller splits.')
    start = 0
    for split, size in SPLIT_SIZES.items():
      splits[split].extend(
          dict(id=synset.offset, definition=synset.definition, label=label)
          for synset in candidates[start:start + size])
      start += size
  # By definition: a second order by id would follow the draw, and so bunch the classes.
  return {split: in_hash_order(examples, key=lambda example: example['definition'])
          for split, examples in splits.items()}


def reduce_demo(
    drawn: dict[str, list[dict[str, str]]]
) -> dict[str, list[dict[str, str]]]:
  """Drops what is unfit to print or not unseen, and makes the classes equal again.

  Args:
    drawn: what choose_demo returned.

  Returns:
    The same splits, in the same order, without the definitions that have one of
    UNFIT_WORDS or are one of EVERYDAY_PHRASES. In each split, every class keeps as many
    examples (the first ones) as the class that lost most.
  """
  everyday = [words_of(phrase) for phrase in EVERYDAY_PHRASES]

  def keeps(example):
    words = words_of(example['definition'])
    return UNFIT_WORDS.isdisjoint(words) and words not in everyday

  splits = {}
  for split, examples in drawn.items():
    by_class = {label: [] for label in CLASSES}
    for example in filter(keeps, examples):
      by_class[example['label']].append(example)
    size = min(map(len, by_class.values()))
    ids = {example['id'] for kept in by_class.values() for example in kept[:size]}
    splits[split] = [example for example in examples if example['id'] in ids]
  return splits


def gloss_lines(synsets: Sequence[Synset], held_out: Contamination) -> Iterator[str]:
  """Dictionary entries: 'lemma, lemma: definition; "example"'."""
  for synset in synsets:
    if synset.gloss not in held_out:
      yield f'{", ".join(synset.lemmas)}: {synset.gloss}'


def supervised_pairs(
    synsets: Sequence[Synset], in_demo: frozenset[tuple[str, str]],
    held_out: Contamination
) -> dict[str, list[dict[str, str]]]:
  """Text-to-text pairs in the manner of T5 1.0's supervised mixture.

  Args:
    synsets: all of WordNet.
    in_demo: keys of the synsets in any split of the demo; they make no pairs.
    held_out: the definitions of validation and test.

  Returns:
    `word` (definition to word), `kind` (definition to the word of the meaning above) and
    `define` (word to definition), each a list of `inputs` and `targets`.
  """
  by_key = {synset.key: synset for synset in synsets}
  pairs = {'word': [], 'kind': [], 'define': []}
  for synset in synsets:
    if synset.key in in_demo or not synset.definition or synset.gloss in held_out:
      continue
    definition = synset.definition
    short_definition = ' '.join(definition.split()[:MAX_WORDS])
    word = synset.lemmas[0]
    if word.lower() not in HEADINGS:
      pairs['word'].append(
          dict(inputs=f'define which word: {definition}', targets=word))
      pairs['define'].append(dict(inputs=f'define: {word}', targets=short_definition))
    if synset.hypernyms:
      kind = by_key[synset.hypernyms[0]].lemmas[0]
      if kind.lower() not in HEADINGS:
        pairs['kind'].append(dict(inputs=f'what is it: {definition}', targets=kind))
  return pairs
