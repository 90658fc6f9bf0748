"""Evaluation on several hosts: each predicts its rows, and all see what all predicted.

Metrics run over all examples at once, on every host, so that the groups of MultiRC and
ReCoRD are whole wherever their examples were predicted.
"""

from __future__ import annotations

import json
from typing import Any

import jax
import numpy as np


def gathered(items: list[Any]) -> list[Any]:
  """The items of all processes, in the order of the processes; every process must call it.

  Args:
    items: of this process, as JSON holds them. Floats stay the same to the bit.
  """
  if jax.process_count() == 1:
    return items
  from jax.experimental import multihost_utils

  own = np.frombuffer(json.dumps(items).encode(), np.uint8)
  lengths = multihost_utils.process_allgather(np.array([len(own)])).ravel()
  # All processes must bring arrays of one shape.
  padded = np.zeros(lengths.max(), np.uint8)
  padded[: len(own)] = own
  rows = multihost_utils.process_allgather(padded)
  parts = [json.loads(row[:n].tobytes()) for row, n in zip(rows, lengths, strict=True)]
  return [item for part in parts for item in part]
