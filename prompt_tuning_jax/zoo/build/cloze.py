"""Pairs that ask for a word left out of a definition.

The answers are the text's own words, as in span corruption, but without sentinels: the
decoder learns that any word may be asked for, and not only those that answer the
supervised pairs. Most often the word is the definition's head ('animal' in 'a small
animal with long ears'); often the answer stands among options in front, as in
`options.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from prompt_tuning_jax.zoo.build import wordnet
from prompt_tuning_jax.zoo.build.draw import Draw
from prompt_tuning_jax.zoo.build.options import offer

REPEATS = 2
BLANK = '?'

# What may follow the head of a definition: 'an ANIMAL that …', 'the PART of …'.
AFTER_HEAD = frozenset((
    'and', 'as', 'at', 'between', 'by', 'containing', 'consisting', 'during', 'for', 'from',
    'given', 'having', 'in', 'into', 'made', 'native', 'of', 'on', 'or', 'resembling', 'that',
    'to', 'used', 'usually', 'when', 'where', 'which', 'who', 'whose', 'with', 'without'))
FUNCTION_WORDS = AFTER_HEAD | frozenset((
    'a', 'an', 'the', 'any', 'are', 'be', 'been', 'being', 'can', 'has', 'have', 'is', 'it',
    'its', 'not', 'one', 'other', 'some', 'such', 'than', 'their', 'them', 'they', 'this',
    'those', 'was', 'were', 'you', 'your', 'his', 'her', 'he', 'she', 'esp', 'etc'))


def head(words: Sequence[str]) -> int | None:
  """Where the word stands that says what is defined, or None where that is unclear."""
  for place, word in enumerate(words[1:], start=1):
    if word.lower() in AFTER_HEAD or words[place - 1][-1] in ',;:':
      return place - 1 if _is_content(words[place - 1]) else None
  return len(words) - 1 if words and _is_content(words[-1]) else None


def _is_content(word: str) -> bool:
  bare = word.strip(',;:.')
  return re.fullmatch(r'[a-z]{3,}', bare) is not None and bare not in FUNCTION_WORDS


def cloze_pairs(
    synsets: Sequence[wordnet.Synset],
    in_demo: frozenset[tuple[str, str]],
    held_out: wordnet.Contamination,
) -> list[dict[str, str]]:
  """`city, animal, tool definition: a small ? with long ears` → `animal`.

  Args:
    synsets: all of WordNet.
    in_demo: keys of the synsets in any split of the demo; they make no pairs.
    held_out: the definitions of the demo's validation and test splits.

  Returns:
    The pairs, `inputs` and `targets`. Half of them have options in front, drawn like
    answers; from a quarter of those that ask for the head it is left out without a mark.
  """
  gaps = list(_gaps(synsets, in_demo, held_out))
  pairs = []
  for draw, text, answer in gaps:
    options = ''
    if draw.between(0, 1):
      offered = offer(draw, answer, lambda: draw.one_of(gaps)[2])
      options = draw.one_of((', ', ' ')).join(draw.shuffled(offered)) + ' '
    pairs.append(dict(inputs=f'{options}definition: {text}', targets=answer))
  return pairs


def _gaps(synsets, in_demo, held_out) -> Iterator[tuple[Draw, str, str]]:
  for synset in synsets:
    words = synset.definition.split()[: wordnet.MAX_WORDS]
    if synset.key in in_demo or len(words) < wordnet.MIN_WORDS or synset.gloss in held_out:
      continue
    for repeat in range(REPEATS):
      draw = Draw(f'cloze {repeat} {synset.key}')
      place, mark = head(words) if draw.between(0, 2) else None, BLANK
      if place is not None and not draw.between(0, 3):
        mark = ''
      if place is None:
        content = [i for i, word in enumerate(words) if _is_content(word)]
        if not content:
          break
        place = draw.one_of(content)
      answer = words[place].strip(',;:.')
      gap = words[place].replace(answer, mark)
      before, after = [*words[:place], *([gap] if gap else [])], words[place + 1 :]
      text = ' '.join([*before, *after])
      if text in held_out:  # Without the word it is another meaning's definition.
        text = ' '.join(before)
      yield draw, text, answer
