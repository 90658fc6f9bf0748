"""All that is read of prompts by the words that are near to them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from prompt_tuning_jax.backbones.backbone import Backbone
from prompt_tuning_jax.neighbors import words
from prompt_tuning_jax.neighbors.clusters import Clusters, position_clusters
from prompt_tuning_jax.neighbors.labels import LabelSurvival, surviving_labels
from prompt_tuning_jax.typing import Injection

# So many random vectors say which cosines mean nothing.
_RANDOM = 100


class Neighbor(NamedTuple):
  """A word near to a position: its piece in the vocabulary, its id, and the cosine."""

  word: str
  id: int
  cosine: float


@dataclasses.dataclass(frozen=True)
class Position:
  """One position of a prompt.

  Attributes:
    name: its number, counted from 0; 'D0', 'D1', … in the decoder.
    norm: length of its vector.
    neighbors: the nearest words, nearest first.
    tightness: mean cosine of these with each other; None for a single one.
  """

  name: str
  norm: float
  neighbors: tuple[Neighbor, ...]
  tightness: float | None

  @property
  def nearest(self) -> Neighbor:
    """The nearest word."""
    return self.neighbors[0]


@dataclasses.dataclass(frozen=True)
class Nearness:
  """How near vectors are to words, a mean over vectors.

  Attributes:
    cosine: with the nearest word.
    tightness: mean cosine of the nearest words with each other; None for a single one.
  """

  cosine: float
  tightness: float | None


@dataclasses.dataclass(frozen=True)
class PromptAnalysis:
  """What a prompt is near to.

  Attributes:
    name: what it is called.
    rows_PD: its vectors.
    positions: each of them.
    clusters: the positions that say the same.
    labels: where the class labels are.
    nearness: how near its positions are to words.
    chance: how near random vectors of the embedding space are.
  """

  name: str
  rows_PD: np.ndarray = dataclasses.field(repr=False)
  positions: tuple[Position, ...] = dataclasses.field(repr=False)
  clusters: Clusters
  labels: tuple[LabelSurvival, ...]
  nearness: Nearness
  chance: Nearness

  @property
  def k(self) -> int:
    """How many nearest words each position has."""
    return len(self.positions[0].neighbors)

  def positions_by_word(self) -> dict[str, list[int]]:
    """The positions that each word is nearest to, words with the most of them first."""
    found: dict[str, list[int]] = {}
    for number, position in enumerate(self.positions):
      found.setdefault(position.nearest.word, []).append(number)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))

  def words_of(self, numbers: Sequence[int]) -> list[str]:
    """The k words that are nearest to several positions together, by the sum of cosines."""
    sums: Counter[str] = Counter()
    for number in numbers:
      for neighbor in self.positions[number].neighbors:
        sums[neighbor.word] += neighbor.cosine
    return [word for word, _ in sums.most_common(self.k)]


def analyze(
    backbone: Backbone,
    injections: Sequence[tuple[str, Injection]],
    *,
    k: int = 5,
    labels: Sequence[str] | None = None,
    cluster_cosine: float = 0.5,
) -> list[PromptAnalysis]:
  """Looks for the words near to the positions of prompts; the table is read once for all.

  Args:
    backbone: the model they were trained with.
    injections: the name of each prompt, and its arrays.
    k: how many nearest words.
    labels: class labels to look for, in the order in which the prompts started from them.
    cluster_cosine: the mean cosine from which on positions are one cluster.

  Raises:
    ValueError: as `report.analyze_prompts`.
  """
  rows = [words.prompt_rows(backbone, injection, name) for name, injection in injections]
  clusters = [position_clusters(rows_PD, cluster_cosine) for rows_PD in rows]
  survivals = [surviving_labels(backbone, rows_PD, labels or (), k) for rows_PD in rows]
  *found, of_random = _nearest(backbone, [*rows, words.random_vectors(backbone, _RANDOM)], k)
  chance = _mean(of_random)
  return [
      PromptAnalysis(
          name=name,
          rows_PD=rows_PD,
          positions=tuple(
              dataclasses.replace(position, name=_name(number, injection))
              for number, position in enumerate(positions)
          ),
          clusters=own_clusters,
          labels=tuple(own_labels),
          nearness=_mean(positions),
          chance=chance,
      )
      for (name, injection), rows_PD, positions, own_clusters, own_labels in zip(
          injections, rows, found, clusters, survivals, strict=True
      )
  ]


def _nearest(
    backbone: Backbone, groups: Sequence[np.ndarray], k: int
) -> list[list[Position]]:
  """Every vector of several groups with its nearest words."""
  vectors = np.concatenate(groups)
  cosines, ids = words.nearest_ids(backbone, vectors, k)
  tightness = words.tightness(backbone, ids)
  positions = []
  for number, (vector, tokens, values) in enumerate(zip(vectors, ids, cosines)):
    neighbors = (
        Neighbor(backbone.vocabulary.piece(int(token)), int(token), float(value))
        for token, value in zip(tokens, values)
    )
    own = None if tightness is None else float(tightness[number])
    positions.append(
        Position(str(number), float(np.linalg.norm(vector)), tuple(neighbors), own)
    )
  remaining = iter(positions)
  return [[next(remaining) for _ in group] for group in groups]


def _mean(positions: Sequence[Position]) -> Nearness:
  tightness = [position.tightness for position in positions]
  return Nearness(
      cosine=float(np.mean([position.nearest.cosine for position in positions])),
      tightness=None if None in tightness else float(np.mean(tightness)),
  )


def _name(number: int, injection: Injection) -> str:
  in_decoder = number - injection.num_virtual_tokens
  return str(number) if in_decoder < 0 else f'D{in_decoder}'
