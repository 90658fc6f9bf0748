"""Which positions of a prompt say the same.

Long prompts have several positions with the same nearest words (Lester et al., 2021, section 7).
"""

from __future__ import annotations

import dataclasses

import numpy as np

from prompt_tuning_jax.neighbors import words


@dataclasses.dataclass(frozen=True)
class Clusters:
  """The positions of a prompt in groups of what is close to each other.

  Attributes:
    members: the positions of each cluster, the largest cluster first; many have one.
    order: all positions in an order in which those that are close stand together.
    cosine: the mean cosine from which on positions are one cluster.
  """

  members: tuple[tuple[int, ...], ...]
  order: tuple[int, ...]
  cosine: float

  def of(self, position: int) -> int:
    """The number of a position's cluster."""
    return next(number for number, own in enumerate(self.members) if position in own)


def position_clusters(rows_PD: np.ndarray, cosine: float = 0.5) -> Clusters:
  """Groups positions by the cosine of their vectors.

  Agglomerative clustering with average linkage: the two clusters whose positions have the
  largest mean cosine with each other become one, again and again, as long as that is at
  least `cosine`.

  Args:
    rows_PD: the prompt, as `words.prompt_rows` gives it.
    cosine: above 0, at most 1.

  Raises:
    ValueError: if `cosine` is not in that range.
  """
  check_cosine(cosine)
  if len(rows_PD) == 1:
    return Clusters(((0,),), (0,), cosine)
  from scipy.cluster import hierarchy
  from scipy.spatial import distance

  units_PD = words.unit(np.asarray(rows_PD, np.float64))
  # Rounding makes distances of equal rows a little negative.
  distances_PP = np.maximum(1 - units_PD @ units_PD.T, 0)
  condensed = distance.squareform(distances_PP, checks=False)
  tree = hierarchy.linkage(condensed, method='average', optimal_ordering=True)
  # It also keeps equal rows apart where `cosine` is 1.
  numbers = hierarchy.fcluster(tree, 1 - cosine + 1e-9, criterion='distance')
  members = [tuple(np.flatnonzero(numbers == n).tolist()) for n in np.unique(numbers)]
  return Clusters(
      tuple(sorted(members, key=lambda own: (-len(own), own))),
      tuple(hierarchy.leaves_list(tree).tolist()),
      cosine,
  )


def check_cosine(cosine: float) -> None:
  """Raises ValueError unless clusters can be asked for that are so close."""
  if not 0 < cosine <= 1:
    raise ValueError(
        f'cluster_cosine is {cosine!r}; it has to be above 0 and at most 1: the mean cosine '
        'from which on positions are one cluster.'
    )
