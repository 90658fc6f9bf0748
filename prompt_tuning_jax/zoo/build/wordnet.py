"""Makes the demo's data and the pretraining corpus from WordNet 3.0 and plain text.

  python -m prompt_tuning_jax.zoo.build.wordnet \
    --wordnet /usr/share/wordnet --corpus CORPUS_DIR --out /tmp/nano_corpus

The demo asks what kind of thing a definition describes. WordNet files every noun under one
of 26 headings (its lexicographer files: animal, artifact, body, ...); eight of them are the
classes. Splits are drawn, the corpus is made without what was drawn, and then the splits are
reduced: the demo shows a part of what the corpus left out.

* No file of the corpus contains a definition of the demo's validation and test splits, as
  the script checks when it has written them.
* The supervised pairs (`word`, `kind` and `define`) have no synset of any split, and never
  a heading as an answer.

Every choice is made by the rank of a hash, so the same inputs give the same files on any
machine and any Python, and the head of an output file is a fair sample of the whole.
"""

import argparse
import dataclasses
import hashlib
import json
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

# Bytes taken from each text file of the corpus folder; None takes all of it.
TEXTS = {
    'wiki': ('wiki_vital_summaries.txt', None),
    'books': ('books.txt', 15_000_000),
    'dialogues': ('sgd_dialogues.txt', 2_000_000),
    'speeches': ('state_union_inaugural.txt', 2_000_000),
}
MIN_BOOK_PARAGRAPH = 80  # characters; below it, books hold headings and page numbers

DEMO_DIR = pathlib.Path(__file__).parent.parent / 'demo'


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


def text_lines(
    path: pathlib.Path, max_bytes: int | None, min_characters: int,
    held_out: Contamination
) -> list[str]:
  """Paragraphs of a text file in hash order, without held-out ones, up to max_bytes."""
  with path.open(encoding='utf-8') as file:
    paragraphs = {' '.join(line.split()) for line in file}
  kept, size, dropped = [], 0, 0
  for paragraph in in_hash_order(p for p in paragraphs if len(p) >= min_characters):
    if paragraph in held_out:
      dropped += 1
      continue
    size += len(paragraph.encode()) + 1
    if max_bytes is not None and size > max_bytes:
      break
    kept.append(paragraph)
  print(f'{path}: dropped {dropped} paragraphs with a held-out definition')
  return kept


def check_unseen(corpus: pathlib.Path, held_out: Contamination) -> None:
  """Reads the corpus as written and looks for held-out definitions in every line.

  Args:
    corpus: folder of the .txt and .jsonl files.
    held_out: the definitions that must not occur.

  Raises:
    ValueError: if some occur; it names them all, and their files.
  """
  seen = set()
  for path in sorted([*corpus.glob('*.txt'), *corpus.glob('*.jsonl')]):
    with path.open(encoding='utf-8') as lines:
      found = {held_out.find(line) for line in lines} - {None}
    seen.update(f'{definition!r} in {path}' for definition in found)
  if seen:
    raise ValueError(
        'Held-out definitions of the demo occur in the pretraining corpus: '
        f'{"; ".join(sorted(seen))}. Add them to EVERYDAY_PHRASES and run this again.')


def _write_lines(path: pathlib.Path, lines: Sequence[str]) -> None:
  path.write_text(''.join(f'{line}\n' for line in lines), encoding='utf-8')
  words = sum(len(line.split()) for line in lines)
  print(f'{path}: {len(lines):,} lines, {path.stat().st_size:,} bytes, '
        f'{words / len(lines):.1f} words a line')


def _write_pairs(path: pathlib.Path, pairs: Sequence[dict[str, str]]) -> None:
  lines = [json.dumps(pair, ensure_ascii=False) for pair in pairs]
  path.write_text(''.join(f'{line}\n' for line in lines), encoding='utf-8')
  lengths = [sum(len(pair[side].split()) for pair in pairs) / len(pairs)
             for side in ('inputs', 'targets')]
  print(f'{path}: {len(pairs):,} pairs, {path.stat().st_size:,} bytes, '
        f'{lengths[0]:.1f} words to {lengths[1]:.1f}')


def _held_out_definitions(splits: dict[str, list[dict[str, str]]]) -> list[str]:
  return [example['definition']
          for split in ('validation', 'test') for example in splits[split]]


def main(argv: Sequence[str] | None = None) -> None:
  """Writes the demo's splits and the pretraining corpus, and prints their sizes."""
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--wordnet', type=pathlib.Path, required=True,
                      help='folder of WordNet 3.0\'s data.noun, data.verb, ...')
  parser.add_argument('--demo', type=pathlib.Path, default=DEMO_DIR,
                      help='where the demo\'s splits go (default: the package)')
  parser.add_argument('--corpus', type=pathlib.Path,
                      help='folder with ' + ', '.join(name for name, _ in TEXTS.values()))
  parser.add_argument('--out', type=pathlib.Path,
                      help='where the corpus goes; without it only the demo is written')
  args = parser.parse_args(argv)
  if (args.out is None) != (args.corpus is None):
    parser.error('--corpus and --out go together.')

  synsets = read_synsets(args.wordnet)
  drawn = choose_demo(synsets)
  splits = reduce_demo(drawn)
  args.demo.mkdir(parents=True, exist_ok=True)
  for split, examples in splits.items():
    path = args.demo / f'{split}.jsonl'
    path.write_text(
        ''.join(json.dumps(example, separators=(',', ':')) + '\n'
                for example in examples), encoding='utf-8')
    print(f'{path}: {len(examples):,} examples, {path.stat().st_size:,} bytes')
  if args.out is None:
    return

  args.out.mkdir(parents=True, exist_ok=True)
  secret = _held_out_definitions(drawn)
  in_glosses = Contamination(secret, min_words=MIN_WORDS)
  # Below five words a definition is a phrase anyone may use: see EVERYDAY_PHRASES.
  in_prose = Contamination(secret, min_words=5)
  in_demo = frozenset(('n', e['id']) for examples in drawn.values() for e in examples)

  _write_lines(args.out / 'glosses.txt',
               in_hash_order(gloss_lines(synsets, in_glosses)))
  for name, (source, max_bytes) in TEXTS.items():
    min_characters = MIN_BOOK_PARAGRAPH if name == 'books' else 1
    _write_lines(args.out / f'{name}.txt',
                 text_lines(args.corpus / source, max_bytes, min_characters, in_prose))
  for name, pairs in supervised_pairs(synsets, in_demo, in_glosses).items():
    _write_pairs(args.out / f'{name}.jsonl', in_hash_order(pairs))
  check_unseen(args.out, Contamination(_held_out_definitions(splits), MIN_WORDS))
  print(f'{args.out}: no validation or test definition occurs in any line')


if __name__ == '__main__':
  main()
