"""Nearest words, their ranks and their tightness are those that NumPy finds in float64."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax.backbones import int8
from prompt_tuning_jax.backbones.backbone import Backbone
from prompt_tuning_jax.neighbors import nearest_words, words
from prompt_tuning_jax.typing import Injection
from tests.checkpoints import samples
from tests.conftest import TINY_CONFIG
from tests.neighbors.conftest import WIDTH, cosine, make_backbone, random_rows


def by_hand(rows, table):
  """All words of each row, nearest first, and their cosines."""
  cosines = np.array([[cosine(row, word) for word in table] for row in rows.astype(np.float64)])
  ids = np.argsort(-cosines, axis=1, kind='stable')
  return np.take_along_axis(cosines, ids, axis=1), ids


@pytest.mark.parametrize('k', [1, 5, None])
@pytest.mark.parametrize('block', [None, 7, 1])
def test_nearest_words_are_numpys_however_the_table_is_read(
    backbone, table, k, block, monkeypatch
):
  if block:
    monkeypatch.setattr(words, '_BLOCK', block * WIDTH)
  k = k or len(table)
  rows = random_rows(6)
  cosines, ids = words.nearest_ids(backbone, rows, k)
  expected, expected_ids = by_hand(rows, table)
  np.testing.assert_array_equal(ids, expected_ids[:, :k])
  np.testing.assert_allclose(cosines, expected[:, :k], atol=1e-6)
  found = nearest_words(backbone, Injection(jnp.asarray(rows)), k)
  piece = backbone.vocabulary.piece
  assert [[word for word, _ in row] for row in found] == [
      [piece(int(token)) for token in row] for row in expected_ids[:, :k]
  ]


@pytest.mark.parametrize('scale', [1e-20, 1e-3, 1e3, 1e30])
def test_the_length_of_a_row_changes_nothing(backbone, table, scale):
  rows = random_rows(4)
  cosines, ids = words.nearest_ids(backbone, rows.astype(np.float64) * scale, 5)
  expected, expected_ids = by_hand(rows, table)
  np.testing.assert_array_equal(ids, expected_ids[:, :5])
  np.testing.assert_allclose(cosines, expected[:, :5], atol=1e-6)
  found = nearest_words(backbone, Injection(jnp.asarray(rows * np.float32(scale))), 5)
  np.testing.assert_allclose([[c for _, c in row] for row in found], expected[:, :5], atol=1e-5)


@pytest.mark.parametrize('block', [64, 6])
def test_of_equal_words_the_first_is_the_nearer(vocabulary, block, monkeypatch):
  monkeypatch.setattr(words, '_BLOCK', block * WIDTH)
  params = samples.random_params(TINY_CONFIG)
  params['token_embedder']['embedding'][[3, 9, 17]] = 1.0
  _, ids = words.nearest_ids(make_backbone(vocabulary, params), np.ones((1, WIDTH)), 3)
  assert ids.tolist() == [[3, 9, 17]]


def test_rows_without_a_word_are_no_neighbors(backbone):
  size = backbone.vocabulary.size
  assert size < TINY_CONFIG.vocab_size
  rows = np.asarray(backbone.embedding_VD)[[size, size - 1]]
  cosines, ids = words.nearest_ids(backbone, rows, 1)
  assert cosines[0, 0] < 0.99 and ids[1, 0] == size - 1


@pytest.mark.parametrize('held_as', ['bfloat16', 'int8', 'int8 in bfloat16'])
def test_a_table_in_fewer_bits_is_read_as_the_model_reads_it(vocabulary, held_as, monkeypatch):
  params = samples.random_params(TINY_CONFIG)
  settings = {'dtype': jnp.bfloat16} if 'bfloat16' in held_as else {}
  if 'int8' in held_as:
    params, settings['int8'] = int8.quantize_params(params), True
  else:
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  backbone = make_backbone(vocabulary, params, **settings)
  size = vocabulary.size
  whole = backbone.embedding_VD
  for rows in (slice(3, 9), np.array([5, 5, 40])):
    some = backbone.embeddings(rows)
    assert some.dtype == whole.dtype
    np.testing.assert_array_equal(some, whole[rows])
  expected, expected_ids = by_hand(random_rows(5), np.asarray(whole, np.float64)[:size])
  # The whole table is never converted.
  monkeypatch.setattr(Backbone, 'embedding_VD', property(lambda self: pytest.fail('all of it')))
  monkeypatch.setattr(words, '_BLOCK', 7 * WIDTH)
  cosines, ids = words.nearest_ids(backbone, random_rows(5), 4)
  np.testing.assert_array_equal(ids, expected_ids[:, :4])
  np.testing.assert_allclose(cosines, expected[:, :4], atol=1e-6)


def test_tightness_is_the_mean_cosine_of_pairs(backbone, table):
  _, ids = words.nearest_ids(backbone, random_rows(3), 4)
  expected = [
      np.mean([cosine(table[a], table[b]) for a, b in itertools.combinations(row, 2)])
      for row in ids
  ]
  np.testing.assert_allclose(words.tightness(backbone, ids), expected, atol=1e-6)
  assert words.tightness(backbone, ids[:, :1]) is None


@pytest.mark.parametrize('block', [64, 5])
def test_a_word_has_the_rank_of_its_place(backbone, table, block, monkeypatch):
  monkeypatch.setattr(words, '_BLOCK', block * WIDTH)
  rows, others = random_rows(4), random_rows(3, seed=1)
  _, order = by_hand(rows, table)
  found = words.ranks(backbone, rows, np.concatenate([table, others]))
  for row, (ids, ranks) in enumerate(zip(order, found)):
    assert [ranks[token] for token in ids] == list(range(1, len(table) + 1))
    for other, rank in zip(others, ranks[len(table) :]):
      bar = cosine(rows[row], other)
      assert rank == 1 + sum(cosine(rows[row], word) > bar for word in table)


def test_random_vectors_take_each_number_from_its_column_of_the_table(backbone, table):
  vectors = words.random_vectors(backbone, 50)
  assert vectors.shape == (50, WIDTH)
  for column in range(WIDTH):
    assert np.isin(vectors[:, column], table[:, column]).all()
  # Not whole rows.
  assert np.isclose(words.nearest_ids(backbone, vectors, 1)[0], 1).sum() == 0
  np.testing.assert_array_equal(vectors, words.random_vectors(backbone, 50))


@pytest.mark.parametrize('k', [0, -1, 10**6])
def test_as_many_words_as_there_are_none_of_are_refused(backbone, k):
  expected = rf'{k} nearest words .*\(k, NUM_NEIGHBORS\); .*at most {backbone.vocabulary.size}, '
  with pytest.raises(ValueError, match=expected):
    nearest_words(backbone, Injection(random_rows(2)), k)


def test_a_model_without_a_vocabulary_has_no_words():
  with pytest.raises(ValueError, match='tiny has no vocabulary.*VOCABULARY'):
    nearest_words(make_backbone(None), Injection(random_rows(2)))


def _with(value, *place):
  rows = random_rows(13)
  rows[place] = value
  return Injection(jnp.asarray(rows))


KEYS = jnp.ones((2, 3, 3, 4))


@pytest.mark.parametrize(
    ('injection', 'expected'),
    [
        (Injection(encoder_kv=(KEYS, KEYS)), 'encoder_kv .*a prefix is keys and values'),
        (Injection(layer_embeddings=jnp.ones((2, 3, WIDTH))), "LayerPrompt's rows are hidden"),
        (Injection(), 'Injection.empty'),
        (Injection(jnp.ones((3, WIDTH + 1))), f'needs .prompt length, d_model={WIDTH}'),
        (_with(np.nan, 2, 3), '1 of the 208 numbers in virtual_embeddings are NaN'),
        (_with(np.inf, 1), '16 of the 208 numbers'),
        (_with(0, 4), 'zero at position 4, counted from 0: a row of zeros has no direction'),
        (_with(0, slice(1, None)), 'zero at positions 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 2 more'),
    ],
)
def test_what_is_near_to_no_word_is_refused(backbone, injection, expected):
  with pytest.raises(ValueError, match=expected):
    nearest_words(backbone, injection)
