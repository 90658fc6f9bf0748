"""Makes the demo's data and the pretraining corpus from WordNet 3.0 and plain text.

  python -m prompt_tuning_jax.zoo.build.corpus \
    --wordnet /usr/share/wordnet --corpus CORPUS_DIR --out nano_corpus
  python -m prompt_tuning_jax.zoo.build.corpus \
    --wordnet /usr/share/wordnet --demo prompt_tuning_jax/zoo/demo

* No file of the corpus contains a definition of the demo's validation and test splits, as
  the script checks when it has written them.
* The pairs (`word`, `kind`, `define`, `options`, `cloze`) have no synset of any split. A
  heading is never the answer of one, but where `cloze` left out that word of a text.
"""

import argparse
import json
import pathlib
from collections.abc import Mapping, Sequence

from prompt_tuning_jax.zoo.build.cloze import cloze_pairs
from prompt_tuning_jax.zoo.build.options import option_pairs
from prompt_tuning_jax.zoo.build.wordnet import (
    MIN_WORDS,
    Contamination,
    choose_demo,
    gloss_lines,
    in_hash_order,
    read_synsets,
    reduce_demo,
    supervised_pairs,
)

# Bytes taken from each text file of the corpus folder; None takes all of it.
TEXTS = {
    'wiki': ('wiki_vital_summaries.txt', None),
    'books': ('books.txt', 15_000_000),
    'dialogues': ('sgd_dialogues.txt', 2_000_000),
    'speeches': ('state_union_inaugural.txt', 2_000_000),
}
MIN_BOOK_PARAGRAPH = 80  # characters; below it, books hold headings and page numbers


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


def _write_demo(folder: pathlib.Path, splits: Mapping[str, Sequence[Mapping[str, str]]]) -> None:
  folder.mkdir(parents=True, exist_ok=True)
  for split, examples in splits.items():
    path = folder / f'{split}.jsonl'
    path.write_text(
        ''.join(json.dumps(example, separators=(',', ':')) + '\n'
                for example in examples), encoding='utf-8')
    print(f'{path}: {len(examples):,} examples, {path.stat().st_size:,} bytes')


def main(argv: Sequence[str] | None = None) -> None:
  """Writes the demo's splits and the pretraining corpus, and prints their sizes."""
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--wordnet', type=pathlib.Path, required=True,
                      help='folder of WordNet 3.0\'s data.noun, data.verb, ...')
  parser.add_argument('--demo', type=pathlib.Path,
                      help='where the demo\'s splits go; without it they are not written')
  parser.add_argument('--corpus', type=pathlib.Path,
                      help='folder with ' + ', '.join(name for name, _ in TEXTS.values()))
  parser.add_argument('--out', type=pathlib.Path,
                      help='where the corpus goes; without it only the demo is written')
  args = parser.parse_args(argv)
  if (args.out is None) != (args.corpus is None):
    parser.error('--corpus and --out go together.')
  if args.out is None and args.demo is None:
    parser.error('nothing to write: name --corpus and --out, --demo, or all three.')

  synsets = read_synsets(args.wordnet)
  drawn = choose_demo(synsets)
  splits = reduce_demo(drawn)
  if args.demo is not None:
    _write_demo(args.demo, splits)
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
  pairs_of = {
      **supervised_pairs(synsets, in_demo, in_glosses),
      'options': option_pairs(synsets, in_demo, in_glosses),
      'cloze': cloze_pairs(synsets, in_demo, in_glosses),
  }
  for name, pairs in pairs_of.items():
    _write_pairs(args.out / f'{name}.jsonl', in_hash_order(pairs))
  check_unseen(args.out, Contamination(_held_out_definitions(splits), MIN_WORDS))
  print(f'{args.out}: no validation or test definition occurs in any line')


if __name__ == '__main__':
  main()
