"""Trains the SentencePiece vocabulary of the `nano` model on the pretraining corpus.

  python -m prompt_tuning_jax.zoo.build.vocabulary \
    --corpus /tmp/nano_corpus --out prompt_tuning_jax/zoo/nano/spiece.model

The corpus is what `corpus.py` wrote. Dictionary entries and encyclopaedia leads are taken
whole, the rest as samples, so that the 4,000 pieces go to the words of definitions rather
than to those of nineteenth-century novels. The model has T5's special ids (padding 0, end 1,
unknown 2, no beginning); its 100 sentinels are added when the vocabulary is loaded.
"""

import argparse
import itertools
import json
import pathlib
import string
from collections.abc import Iterator, Sequence

from prompt_tuning_jax.zoo.build.wordnet import CLASSES

NUM_PIECES = 4_000
# Bytes of each file; None takes all of it. The files are shuffled: a head is a sample.
MIXTURE = {
    'glosses.txt': None,
    'wiki.txt': None,
    'books.txt': 2_500_000,
    'dialogues.txt': 500_000,
    'speeches.txt': 500_000,
}
# Coverage alone leaves out '$', '%' and '_', dashes and accents, which tasks' texts use.
REQUIRED_CHARACTERS = (
    string.ascii_letters + string.digits + string.punctuation + '–—£°áâäàçéèêëíïñóôöúü')
MAX_SENTENCE_BYTES = 4_192  # SentencePiece skips longer lines; we cut them instead


def sentences(corpus: pathlib.Path) -> Iterator[str]:
  """The lines the vocabulary is trained on, in a fixed order."""
  for name, max_bytes in MIXTURE.items():
    size = 0
    with (corpus / name).open(encoding='utf-8') as lines:
      for line in lines:
        size += len(line.encode())
        if max_bytes is not None and size > max_bytes:
          break
        yield from _pieces_of(line.rstrip('\n'))


def _pieces_of(line: str) -> Iterator[str]:
  """Cuts a line between words so that no piece is too long for SentencePiece."""
  while len(line.encode()) > MAX_SENTENCE_BYTES:
    cut = line.rfind(' ', 0, MAX_SENTENCE_BYTES // 4)  # a character has at most 4 bytes
    if cut <= 0:
      cut = MAX_SENTENCE_BYTES // 4
    yield line[:cut]
    line = line[cut:].lstrip()
  yield line


def train(corpus: pathlib.Path, out: pathlib.Path) -> None:
  """Trains the model and writes it to `out`.

  Args:
    corpus: folder written by `corpus.py`.
    out: the `.model` file to write.

  Raises:
    FileNotFoundError: if a file of the mixture is missing.
    ValueError: if the word of a class of the demo is not a single piece.
  """
  import sentencepiece

  for name in MIXTURE:
    if not (corpus / name).exists():
      raise FileNotFoundError(
          f'{corpus / name} does not exist. Make the corpus first: '
          'python -m prompt_tuning_jax.zoo.build.corpus --help')
  out.parent.mkdir(parents=True, exist_ok=True)
  with out.open('wb') as model:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences(corpus),
        model_writer=model,
        model_type='unigram',
        vocab_size=NUM_PIECES,
        character_coverage=0.9995,
        required_chars=REQUIRED_CHARACTERS,
        normalization_rule_name='nmt_nfkc',
        byte_fallback=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        max_sentence_length=MAX_SENTENCE_BYTES,
        input_sentence_size=0,  # all of it: nothing is drawn at random
        num_threads=2,  # sums are taken per thread, so the number is part of the recipe
        minloglevel=1)

  processor = sentencepiece.SentencePieceProcessor(model_file=str(out))
  split_labels = {label: processor.encode(label, out_type=str)
                  for label in CLASSES if len(processor.encode(label)) != 1}
  if split_labels:
    raise ValueError(
        f'Each class word of the demo should be one piece, but these are several: '
        f'{split_labels}. Choose other classes, or give glosses.txt more weight.')


def report(corpus: pathlib.Path, model: pathlib.Path, max_lines: int = 2_000) -> None:
  """Prints characters and words per token, and unknowns, on the head of each file."""
  import sentencepiece

  processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
  print(f'{model}: {processor.get_piece_size():,} pieces, '
        f'{model.stat().st_size:,} bytes')
  for path in sorted(corpus.glob('*.txt')) + sorted(corpus.glob('*.jsonl')):
    with path.open(encoding='utf-8') as file:
      lines = [line.rstrip('\n') for line in itertools.islice(file, max_lines)]
    if path.suffix == '.jsonl':
      lines = [text for line in lines for text in json.loads(line).values()]
    tokens = [token for ids in processor.encode(lines) for token in ids]
    unknown = sum(token == processor.unk_id() for token in tokens)
    print(f'{path.name:14} {sum(map(len, lines)) / len(tokens):.2f} characters and '
          f'{sum(len(line.split()) for line in lines) / len(tokens):.2f} words a token, '
          f'{100 * unknown / len(tokens):.3f} % unknown')


def main(argv: Sequence[str] | None = None) -> None:
  """Trains the vocabulary and prints how well it compresses the corpus."""
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--corpus', type=pathlib.Path, required=True,
                      help='folder that prompt_tuning_jax.zoo.build.corpus wrote')
  parser.add_argument('--out', type=pathlib.Path, required=True,
                      help='the .model file to write')
  args = parser.parse_args(argv)
  train(args.corpus, args.out)
  report(args.corpus, args.out)


if __name__ == '__main__':
  main()
