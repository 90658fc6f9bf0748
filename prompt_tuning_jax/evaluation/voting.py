"""How the answers of several prompts to one example become one.

Lester et al. (2021, section 6) let the prompts of an ensemble vote. The other way is to take
the class with the highest mean of their log-probabilities.
"""

from __future__ import annotations

import collections
import statistics
from collections.abc import Sequence
from typing import Any

# A text, with the `scores` of all choices or the `score` of the text itself.
Answer = tuple[str, dict[str, Any]]

ENSEMBLES = ('vote', 'mean')


def check_ensemble(ensemble: Any) -> None:
  """Raises ValueError unless `ensemble` names a way to make one answer of several."""
  if ensemble not in ENSEMBLES:
    raise ValueError(
        f'ENSEMBLE is {ensemble!r}; prompts answer together by '
        f'{" or ".join(map(repr, ENSEMBLES))}.'
    )


def agreed(answers: Sequence[Answer], ensemble: str = 'vote') -> Answer:
  """The one answer of several prompts.

  Args:
    answers: that of each prompt; either all of them with `scores` of the same choices, or
      all of them with a `score`.
    ensemble: 'vote' is what most of them answer, and of equally many what has the higher
      mean log-probability; 'mean' is the choice with the highest mean log-probability.

  Returns:
    The text, with `votes`, how many prompts chose each text, and with the means over the
    prompts: `scores`, or the `score` of the text over those that gave it.

  Raises:
    ValueError: if there is no such ensemble, or 'mean' has no scores of choices.
  """
  check_ensemble(ensemble)
  votes = collections.Counter(text for text, _ in answers)
  if all('scores' in found for _, found in answers):
    # In the order of the choices, of which the earlier wins where all else is equal.
    means = {
        choice: statistics.fmean(found['scores'][choice] for _, found in answers)
        for choice in answers[0][1]['scores']
    }
    scores: dict[str, Any] = {'scores': means}
  elif ensemble == 'mean':
    raise ValueError(
        "ENSEMBLE='mean' compares the mean log-probabilities of choices, but these answers have "
        'no score for each choice: they were written freely, or searched for among very many '
        "classes. Use 'vote'."
    )
  else:
    means = {
        text: statistics.fmean(found['score'] for given, found in answers if given == text)
        for text in votes
    }
    scores = {}
  candidates = list(means)
  if ensemble == 'vote':
    most = max(votes.values())
    candidates = [text for text in means if votes[text] == most]
  text = max(candidates, key=means.__getitem__)
  return text, {**(scores or {'score': means[text]}), 'votes': dict(votes)}
