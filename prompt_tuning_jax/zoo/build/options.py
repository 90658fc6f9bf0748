"""Pairs that ask which of several options a definition falls under.

A model that has learned to pick one of the words in front of a definition can be told by
a prompt which words to pick from: by a text, or by a soft prompt that starts from the
labels of a task. The answers are meanings anywhere above the defined one in WordNet; no
option has a word that is a class of the demo, or is a heading.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prompt_tuning_jax.zoo.build import wordnet
from prompt_tuning_jax.zoo.build.draw import Draw

# A meaning is an option if this many lie below it: fewer would seldom be asked for, and
# more are those that almost everything falls under ('entity', 'abstraction').
MIN_BELOW, MAX_BELOW = 12, 9000
MIN_OPTIONS, MAX_OPTIONS = 2, 8
# Draws for the options of a pair: a taxonomy with few words gives it fewer options.
MAX_DRAWS = 1000
# Pairs from one definition, with other answers and other options.
REPEATS = 2

Key = tuple[str, str]


class Taxonomy:
  """What lies above and below each meaning."""

  def __init__(self, synsets: Sequence[wordnet.Synset]):
    self.by_key = {synset.key: synset for synset in synsets}
    self._above: dict[Key, frozenset[Key]] = {}
    self.below: dict[Key, int] = {}
    for synset in synsets:
      for key in self.above(synset.key):
        self.below[key] = self.below.get(key, 0) + 1

  def above(self, key: Key) -> frozenset[Key]:
    """Every meaning above one, by any path."""
    if key not in self._above:
      self._above[key] = frozenset()  # WordNet's verbs have a cycle.
      parents = self.by_key[key].hypernyms
      self._above[key] = frozenset(parents).union(*map(self.above, parents))
    return self._above[key]

  def word(self, key: Key) -> str:
    """The first word of a meaning."""
    return self.by_key[key].lemmas[0]


def offer(draw: Draw, answer: str, distractor: Callable[[], str | None]) -> set[str]:
  """2 to 8 options with the answer among them; `distractor` draws a word, or None."""
  wanted = draw.between(MIN_OPTIONS, MAX_OPTIONS)
  offered = {answer}
  for _ in range(MAX_DRAWS):
    if len(offered) == wanted:
      break
    if (word := distractor()) is not None:
      offered.add(word)
  return offered


def option_pairs(
    synsets: Sequence[wordnet.Synset],
    in_demo: frozenset[Key],
    held_out: wordnet.Contamination,
) -> list[dict[str, str]]:
  """`tool, city, mammal definition: a large gnawing animal` → `mammal`.

  Args:
    synsets: all of WordNet.
    in_demo: keys of the synsets in any split of the demo; they make no pairs.
    held_out: the definitions of the demo's validation and test splits.

  Returns:
    The pairs, `inputs` and `targets`. Distractors are drawn like answers, so that no
    option is right or wrong by its frequency, and none lies above the defined meaning or
    has the word of one that does.
  """
  taxonomy = Taxonomy(synsets)

  def is_option(key: Key) -> bool:
    words = set(taxonomy.word(key).lower().split())
    return (MIN_BELOW <= taxonomy.below.get(key, 0) <= MAX_BELOW
            and words.isdisjoint(wordnet.HEADINGS))

  options = {key for key in taxonomy.below if is_option(key)}
  described = []
  for synset in synsets:
    answers = sorted(taxonomy.above(synset.key) & options)
    if (answers and synset.definition and synset.key not in in_demo
        and synset.gloss not in held_out):
      described.append((synset, answers))

  pairs = []
  for repeat in range(REPEATS):
    for synset, answers in described:
      draw = Draw(f'{repeat} {synset.key}', wordnet.SEED)
      answer = taxonomy.word(draw.one_of(answers))
      right = {taxonomy.word(key) for key in taxonomy.above(synset.key)}

      def distractor() -> str | None:
        _, theirs = draw.one_of(described)
        word = taxonomy.word(draw.one_of(theirs))
        return None if word in right else word

      offered = offer(draw, answer, distractor)
      separator = draw.one_of((', ', ' '))
      shuffled = sorted(
          offered,
          key=lambda word: Draw(f'{draw.name} {word}', wordnet.SEED).number())
      pairs.append(dict(
          inputs=f'{separator.join(shuffled)} definition: {synset.definition}',
          targets=answer))
  return pairs
