"""What a soft prompt is near to: the vocabulary words of each position.

Lester et al. (2021, section 7) read prompts this way: the nearest rows of the embedding
table by cosine similarity, which are close to each other where a position means something.
The table is gone through in blocks, so that only a part of it is ever held in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax.backbones.backbone import Backbone
from prompt_tuning_jax.injection_arrays import check_numbers
from prompt_tuning_jax.typing import Array, Injection

# Numbers of the table that are compared at once: 128 MiB in float32.
_BLOCK = 2**25

# Cosines that differ by less are equal: in float32 they come out a little different from
# one program to the next.
_EQUAL = 1e-6


def nearest_words(
    backbone: Backbone, injection: Injection, k: int = 5
) -> list[list[tuple[str, float]]]:
  """The `k` nearest vocabulary words of each prompt position, with their cosines.

  Rows of the table that no id of the vocabulary names are left out.

  Raises:
    ValueError: if the injection has no virtual tokens, holds numbers that are not finite
      or a row of zeros, or does not fit the backbone; if the backbone has no vocabulary, or
      one of less than `k` words.
  """
  cosines_PK, ids_PK = nearest_ids(backbone, prompt_rows(backbone, injection), k)
  return [
      [(backbone.vocabulary.piece(int(token)), float(cosine)) for token, cosine in zip(*position)]
      for position in zip(ids_PK, cosines_PK)
  ]


def prompt_rows(backbone: Backbone, injection: Injection, what: str = 'The prompt') -> np.ndarray:
  """The rows [P, D] of a soft prompt in float64, the decoder's last, checked.

  Args:
    backbone: the model that it is for.
    injection: the prompt.
    what: its name in messages.

  Raises:
    ValueError: as `nearest_words`.
  """
  if injection.virtual_embeddings is None:
    raise ValueError(
        f'{what} has no words near to it: it is {injection}. Only the virtual_embeddings of '
        'a soft prompt (SoftPrompt, PTuning) lie among the embeddings of words; a prefix is '
        "keys and values, and LayerPrompt's rows are hidden states."
    )
  injection.check(backbone.spec)
  check_numbers({'virtual_embeddings': np.asarray(injection.virtual_embeddings)}, what)
  rows_PD = np.asarray(injection.virtual_embeddings, np.float64)
  zeros = np.flatnonzero(~rows_PD.any(axis=-1))
  if zeros.size:
    raise ValueError(
        f'{what} is zero at {_positions(zeros)}, counted from 0: a row of zeros has no '
        'direction and so no nearest words. Train the prompt, or leave these rows out.'
    )
  return rows_PD


def nearest_ids(
    backbone: Backbone, vectors_PD: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
  """The `k` words nearest to each vector, nearest first; of equal ones the lower id.

  Returns:
    Their cosines [P, k], and their ids [P, k].

  Raises:
    ValueError: if the backbone has no vocabulary, or one of less than `k` words.
  """
  check_count(backbone, k)
  units_PD = jnp.asarray(unit(vectors_PD), jnp.float32)
  cosines_PK = jnp.zeros((len(units_PD), 0))
  ids_PK = jnp.zeros((len(units_PD), 0), jnp.int32)
  for start, rows_BD in _blocks(backbone):
    cosines_PK, ids_PK = _nearer(cosines_PK, ids_PK, _cosines(units_PD, rows_BD), start, k=k)
  return np.asarray(cosines_PK), np.asarray(ids_PK)


def ranks(backbone: Backbone, vectors_PD: np.ndarray, others_CD: np.ndarray) -> np.ndarray:
  """Where other vectors would stand among the words nearest to each vector, [P, C].

  The rank is 1 for what is as near as the nearest word; a word's own embedding has the
  place that the word has.
  """
  units_PD, units_CD = (jnp.asarray(unit(x), jnp.float32) for x in (vectors_PD, others_CD))
  bars_PC = _cosines(units_PD, units_CD) + _EQUAL
  ranks_PC = np.ones(bars_PC.shape, np.int64)
  for _, rows_BD in _blocks(backbone):
    ranks_PC += np.asarray(_count_above(_cosines(units_PD, rows_BD), bars_PC))
  return ranks_PC


def tightness(backbone: Backbone, ids_PK: np.ndarray) -> np.ndarray | None:
  """How near the words of each position are to each other: the mean cosine of pairs, [P].

  None where a position has a single word.
  """
  if ids_PK.shape[1] < 2:
    return None
  found = []
  for some_PK in _parts(ids_PK, ids_PK.shape[1] * backbone.spec.d_model):
    rows = np.asarray(backbone.embeddings(some_PK.ravel()), np.float64)
    found += map(mean_pair_cosine, rows.reshape(*some_PK.shape, -1))
  return np.array(found)


def mean_pair_cosine(vectors_KD: np.ndarray) -> float:
  """Mean cosine of each of several vectors with each other one."""
  units_KD = unit(vectors_KD)
  count = len(units_KD)
  # The square of the sum is the sum over all pairs, a vector with itself included.
  total = np.sum(units_KD.sum(axis=0) ** 2) - np.sum(units_KD**2)
  return float(total / (count * (count - 1)))


def random_vectors(backbone: Backbone, count: int, seed: int = 0) -> np.ndarray:
  """Random vectors [count, D] of the embedding space, for comparison.

  Each number is the one that a random word has in its place, so that in every dimension they
  are distributed as the words are and, taken together, they mean nothing.
  """
  rng = np.random.default_rng(seed)
  width = backbone.spec.d_model
  drawn = rng.integers(num_words(backbone), size=(count, width))
  found = []
  for some in _parts(drawn, width * width):
    rows = np.asarray(backbone.embeddings(some.ravel())).reshape(len(some), width, width)
    found.append(np.diagonal(rows, axis1=1, axis2=2).astype(np.float64))
  return np.concatenate(found)


def unit(vectors: np.ndarray) -> np.ndarray:
  """The vectors with length 1; those of length 0 stay."""
  norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
  return vectors / np.where(norms > 0, norms, 1)


def num_words(backbone: Backbone) -> int:
  """How many rows of the embedding table stand for something in the vocabulary.

  Raises:
    ValueError: if the backbone has no vocabulary.
  """
  vocabulary = backbone.needed_vocabulary('the rows of its embedding table have no names')
  return min(vocabulary.size, backbone.spec.vocab_size)


def check_count(backbone: Backbone, k: int) -> None:
  """Raises ValueError unless the vocabulary has at least `k` words, and `k` is one or more."""
  size = num_words(backbone)
  if not 1 <= k <= size:
    raise ValueError(
        f'{k} nearest words were asked for (k, NUM_NEIGHBORS); it has to be at least 1 and at '
        f'most {size:,}, the words of {backbone.name}.'
    )


def _blocks(backbone: Backbone) -> Iterator[tuple[int, Array]]:
  """The words' embeddings [B, D], block by block, each with the id of its first row."""
  size = num_words(backbone)
  rows = max(_BLOCK // backbone.spec.d_model, 1)
  for start in range(0, size, rows):
    yield start, backbone.embeddings(slice(start, min(start + rows, size)))


def _parts(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
  """As many of the rows at a time as make a block, each of them so large."""
  count = max(_BLOCK // size, 1)
  for start in range(0, len(rows), count):
    yield rows[start : start + count]


@jax.jit
def _cosines(units_PD: Array, rows_BD: Array) -> Array:
  rows_BD = rows_BD.astype(jnp.float32)
  norms_B = jnp.linalg.norm(rows_BD, axis=-1)
  # Accelerators would multiply in lower precision, in which near words change places.
  products_PB = jnp.matmul(units_PD, rows_BD.T, precision='highest')
  return products_PB / jnp.where(norms_B > 0, norms_B, 1)[None]


@functools.partial(jax.jit, static_argnames='k')
def _nearer(
    cosines_PK: Array, ids_PK: Array, cosines_PB: Array, start: int, *, k: int
) -> tuple[Array, Array]:
  """The nearest of those that were found before and those of a block."""
  ids_B = start + jnp.arange(cosines_PB.shape[1], dtype=jnp.int32)
  cosines = jnp.concatenate([cosines_PK, cosines_PB], axis=1)
  ids = jnp.concatenate([ids_PK, jnp.broadcast_to(ids_B, cosines_PB.shape)], axis=1)
  # Of equal ones `top_k` takes the first, which here is the lower id.
  cosines_PK, places_PK = jax.lax.top_k(cosines, min(k, cosines.shape[1]))
  return cosines_PK, jnp.take_along_axis(ids, places_PK, axis=1)


@jax.jit
def _count_above(cosines_PB: Array, bars_PC: Array) -> Array:
  return jnp.sum(cosines_PB[:, None, :] > bars_PC[:, :, None], axis=-1)


def _positions(numbers: np.ndarray) -> str:
  shown = ', '.join(map(str, numbers[:10]))
  more = f' and {len(numbers) - 10} more' if len(numbers) > 10 else ''
  return f'position{"s" * (len(numbers) > 1)} {shown}{more}'
