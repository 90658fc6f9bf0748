"""Which class labels survive training in the prompt that started from them.

Lester et al. (2021, section 7): a position that starts from a label often keeps it among its
nearest words; prompts that start otherwise come to hold labels too, but at several positions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from prompt_tuning_jax.backbones.backbone import Backbone
from prompt_tuning_jax.initializers import label_embeddings
from prompt_tuning_jax.neighbors import words


@dataclasses.dataclass(frozen=True)
class LabelSurvival:
  """Where a class label is found in a prompt.

  A label of one token is a word, and its rank at a position is its place among the nearest
  words; that of a label of several tokens is the place that their mean would have.

  Attributes:
    label: the label.
    position: its own position, at which `initializers.class_labels` starts from it; None where
      the prompt has no such position.
    rank: its rank there.
    best_rank: its rank at the position that it is nearest to.
    best_position: that position.
    positions: those at which its rank is at most `k`.
  """

  label: str
  position: int | None
  rank: int | None
  best_rank: int
  best_position: int
  positions: tuple[int, ...]

  @property
  def survives(self) -> str:
    """'own', 'other' or 'none': the position among whose nearest words the label is."""
    if self.position in self.positions:
      return 'own'
    return 'other' if self.positions else 'none'


def surviving_labels(
    backbone: Backbone, rows_PD: np.ndarray, labels: Sequence[str], k: int = 5
) -> list[LabelSurvival]:
  """Looks for each label among the `k` nearest words of its own and of every position.

  Args:
    backbone: the model.
    rows_PD: the prompt, as `words.prompt_rows` gives it.
    labels: the class labels, in the order in which the prompt started from them.
    k: how many nearest words of a position count.

  Raises:
    ValueError: if a label has no tokens.
  """
  if not labels:
    return []
  ranks_PC = words.ranks(
      backbone, rows_PD, np.asarray(label_embeddings(labels, backbone), np.float64)
  )
  found = []
  for number, (label, ranks_P) in enumerate(zip(labels, ranks_PC.T)):
    has_own = number < len(rows_PD)
    found.append(
        LabelSurvival(
            label=label,
            position=number if has_own else None,
            rank=int(ranks_P[number]) if has_own else None,
            best_rank=int(ranks_P.min()),
            best_position=int(ranks_P.argmin()),
            positions=tuple(map(int, np.flatnonzero(ranks_P <= k))),
        )
    )
  return found
