"""How similar the prompts of a backbone are to each other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from prompt_tuning_jax.neighbors import words

# Each measure with what it says.
MEASURES = {
    'mean row': 'cosine of the mean rows (Vu et al., 2022)',
    'same position': 'mean cosine of the rows of a position, less the mean row of each prompt',
    'best match': 'mean cosine of each row with the nearest row of the other prompt, both ways',
}


def prompt_similarities(prompts: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
  """Cosines between prompts, a symmetric matrix [M, M] for each of `MEASURES`.

  What all rows of a prompt share says nothing of any of them and would make rows of the same
  prompts similar at every position, so that it has a measure of its own and is left out of
  'same position'. 'best match' does not ask where in the prompt a row stands, which a prompt
  is free to choose when it trains.

  Args:
    prompts: the rows [P, D] of each, as `words.prompt_rows` gives them; P may differ.

  Returns:
    The matrices. 'same position' is NaN for prompts of different lengths, and where a prompt
    has nothing but its mean row; 'mean row' where that is zero.

  Raises:
    ValueError: if the prompts are of different widths.
  """
  prompts = [np.asarray(rows_PD, np.float64) for rows_PD in prompts]
  widths = sorted({rows_PD.shape[1] for rows_PD in prompts})
  if len(widths) > 1:
    raise ValueError(
        f'Prompts of the widths {", ".join(map(str, widths))} were made for different models '
        'and cannot be compared.'
    )
  count = len(prompts)
  found = {name: np.full((count, count), np.nan) for name in MEASURES}
  units = [words.unit(rows_PD) for rows_PD in prompts]
  means = [rows_PD.mean(axis=0) for rows_PD in prompts]
  rests = [_less_mean(rows_PD) for rows_PD in prompts]
  for one in range(count):
    for other in range(one, count):
      values = {
          'mean row': _mean_cosine(means[one][None], means[other][None]),
          'same position': _mean_cosine(rests[one], rests[other]),
          'best match': _best_match(units[one], units[other]),
      }
      for name, value in values.items():
        found[name][one, other] = found[name][other, one] = value
  return found


def _less_mean(rows_PD: np.ndarray) -> np.ndarray:
  rest_PD = rows_PD - rows_PD.mean(axis=0)
  # What remains of rows that are all equal is rounding.
  is_some = np.abs(rest_PD).max() > 1e-12 * np.abs(rows_PD).max()
  return rest_PD if is_some else np.zeros_like(rest_PD)


def _mean_cosine(one_PD: np.ndarray, other_PD: np.ndarray) -> float:
  """Mean cosine of pairs of rows; NaN where lengths differ, or a prompt is nothing but zeros."""
  if len(one_PD) != len(other_PD) or not (one_PD.any() and other_PD.any()):
    return float('nan')
  return float(np.mean(np.sum(words.unit(one_PD) * words.unit(other_PD), axis=-1)))


def _best_match(one_PD: np.ndarray, other_PD: np.ndarray) -> float:
  cosines = one_PD @ other_PD.T
  return float((cosines.max(axis=1).mean() + cosines.max(axis=0).mean()) / 2)
