"""Class labels, clusters and similarity of prompts, each computed a second time by hand."""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest

from prompt_tuning_jax import initializers
from prompt_tuning_jax.neighbors import words
from prompt_tuning_jax.neighbors.analysis import analyze
from prompt_tuning_jax.neighbors.clusters import position_clusters
from prompt_tuning_jax.neighbors.labels import surviving_labels
from prompt_tuning_jax.neighbors.similarity import MEASURES, prompt_similarities
from prompt_tuning_jax.prompt_files import load_prompt
from prompt_tuning_jax.typing import Injection
from tests.neighbors.conftest import WIDTH, cosine, random_rows

# Class labels.


def test_labels_are_found_where_they_are(backbone, table):
  labels = ['small', 'letters', 'of', 'vocabulary', 'a']
  tokens = [backbone.vocabulary.encode(label) for label in labels]
  small, letters, of, *_ = (table[ids].mean(axis=0) for ids in tokens)
  # The first is where it was; the second moved to position 3, by which it is twice.
  rows = np.stack([7 * small, -letters, -of, 5 * letters + 0.01 * of])
  found = surviving_labels(backbone, rows, labels, k=2)
  assert [label.survives for label in found[:3]] == ['own', 'other', 'none']
  assert (found[0].position, found[0].rank, found[0].best_position) == (0, 1, 0)
  assert (found[1].position, found[1].best_position, found[1].best_rank) == (1, 3, 1)
  assert 3 in found[1].positions and 1 not in found[1].positions
  # There are no positions for the last one.
  assert (found[4].position, found[4].rank) == (None, None)
  for ids, label in zip(tokens, found):
    mean = table[ids].mean(axis=0)
    ranks = [
        1 + sum(cosine(row, word) > cosine(row, mean) + 1e-9 for word in table) for row in rows
    ]
    assert label.best_rank == min(ranks)
    assert label.positions == tuple(n for n, rank in enumerate(ranks) if rank <= 2)
    if label.position is not None:
      assert label.rank == ranks[label.position]


def test_labels_of_a_prompt_that_was_never_trained_all_survive(backbone):
  labels = ['small', 'a', 'letters']
  start = initializers.class_labels(labels, backbone)(jax.random.key(0), (5, WIDTH))
  found = surviving_labels(backbone, np.asarray(start, np.float64), labels, k=1)
  assert [(label.survives, label.rank) for label in found] == [('own', 1)] * 3


def test_a_label_of_one_token_has_the_rank_of_its_word(backbone):
  (word,) = backbone.vocabulary.encode('<extra_id_0>')
  rows = random_rows(4)
  _, ids = words.nearest_ids(backbone, rows, words.num_words(backbone))
  places = [1 + row.tolist().index(word) for row in ids]
  (found,) = surviving_labels(backbone, rows, ['<extra_id_0>'], k=places[2])
  assert found.rank == places[0] and found.best_rank == min(places)
  assert found.positions == tuple(n for n, place in enumerate(places) if place <= places[2])


def test_labels_without_tokens_are_refused_and_none_are_none(backbone):
  with pytest.raises(ValueError, match="class label '' has no tokens"):
    surviving_labels(backbone, random_rows(3), ['a', ''])
  assert surviving_labels(backbone, random_rows(3), []) == []


# Clusters.


def _at(*degrees):
  """Vectors in a plane, of different lengths."""
  radians = np.radians(degrees)
  lengths = 1 + np.arange(len(degrees))
  return (lengths * np.array([np.cos(radians), np.sin(radians)])).T


def test_positions_join_as_long_as_their_mean_cosine_allows():
  rows = _at(0, 90, 20, 95, 50)
  # 0 and 20 degrees join first; with both 50 has a mean cosine of
  joining = (np.cos(np.radians(50)) + np.cos(np.radians(30))) / 2
  apart = position_clusters(rows, joining + 1e-6)
  assert apart.members == ((0, 2), (1, 3), (4,))
  joined = position_clusters(rows, joining - 1e-6)
  assert joined.members == ((0, 2, 4), (1, 3))
  assert [joined.of(number) for number in range(5)] == [0, 1, 0, 1, 0]
  assert joined.cosine == joining - 1e-6


def test_clusters_stand_together_in_the_order_of_positions():
  rows = np.concatenate([random_rows(4, seed) for seed in range(3)] * 3)
  clusters = position_clusters(rows + 0.01 * random_rows(36, seed=9), 0.9)
  assert [len(members) for members in clusters.members] == [3] * 12
  assert sorted(clusters.order) == list(range(36))
  for members in clusters.members:
    assert {number % 12 for number in members} == {members[0]}
    places = sorted(clusters.order.index(number) for number in members)
    assert places[-1] - places[0] == 2


def test_equal_and_opposite_positions_and_a_single_one():
  assert position_clusters(np.array([_at(30)[0]] * 3), 1.0).members == ((0, 1, 2),)
  assert position_clusters(_at(0, 180), 0.01).members == ((0,), (1,))
  assert position_clusters(_at(0)) == position_clusters(3 * _at(0))
  assert position_clusters(_at(0)).members == ((0,),)


@pytest.mark.parametrize('wrong', [0, -0.5, 1.01, float('nan')])
def test_clusters_that_close_do_not_exist(wrong):
  with pytest.raises(ValueError, match='cluster_cosine is .*above 0 and at most 1'):
    position_clusters(_at(0, 1), wrong)


# Similarity.


def _by_hand(one, other):
  one, other = one.astype(np.float64), other.astype(np.float64)
  best = [max(cosine(a, b) for b in other) for a in one], [max(cosine(a, b) for a in one)
                                                           for b in other]
  rest, other_rest = one - one.mean(axis=0), other - other.mean(axis=0)
  return {
      'mean row': cosine(one.mean(axis=0), other.mean(axis=0)),
      'same position': np.mean([cosine(a, b) for a, b in zip(rest, other_rest)]),
      'best match': (np.mean(best[0]) + np.mean(best[1])) / 2,
  }


def test_similarities_are_numpys():
  prompts = [random_rows(7), random_rows(7, seed=1), random_rows(4, seed=2, scale=1000)]
  found = prompt_similarities(prompts)
  assert list(found) == list(MEASURES)
  for one, other in itertools.product(range(3), repeat=2):
    for name, value in _by_hand(prompts[one], prompts[other]).items():
      if name == 'same position' and {one, other} & {2} and one != other:
        assert np.isnan(found[name][one, other])
      else:
        assert found[name][one, other] == pytest.approx(value), (name, one, other)
  for matrix in found.values():
    np.testing.assert_allclose(np.diag(matrix), 1)


def test_what_the_measures_see():
  rows = random_rows(9)
  moved = rows[::-1]
  shifted = rows + 50 * random_rows(1, seed=5)
  found = prompt_similarities([rows, moved, 1000 * rows, shifted])
  # Another order: the same rows, at other positions.
  assert found['best match'][0, 1] == pytest.approx(1)
  assert found['same position'][0, 1] < 0.6
  assert found['mean row'][0, 1] == pytest.approx(1)
  # Another length of the vectors: nothing.
  assert all(matrix[0, 2] == pytest.approx(1) for matrix in found.values())
  # What all rows share: nothing at the positions.
  assert found['same position'][0, 3] == pytest.approx(1, abs=1e-5)
  assert found['mean row'][0, 3] < 0.9 and found['best match'][0, 3] < 0.9


def test_prompts_that_are_nothing_but_their_mean_have_no_positions_to_compare():
  third = np.full((3, WIDTH), 0.1)
  single = random_rows(1)
  found = prompt_similarities([third, random_rows(3)])['same position']
  assert np.isnan(found[0]).all() and found[1, 1] == pytest.approx(1)
  found = prompt_similarities([single, random_rows(1, seed=1)])
  assert np.isnan(found['same position']).all()
  assert found['best match'][0, 1] == pytest.approx(found['mean row'][0, 1])


def test_prompts_of_other_widths_are_refused():
  with pytest.raises(ValueError, match='widths 8, 16'):
    prompt_similarities([np.ones((2, 8)), np.ones((2, 16))])


def test_released_prompts_are_compared(shared_data):
  folder = shared_data / 't5' / 'released_prompts'
  rows = [
      np.asarray(load_prompt(folder / f'{name}.npy').injection.virtual_embeddings)
      for name in ('mrpc', 'rte', 'sst2')
  ]
  assert np.linalg.norm(rows[0], axis=1).mean() > 800
  found = prompt_similarities(rows)
  for name, value in _by_hand(rows[0], rows[2]).items():
    assert found[name][0, 2] == pytest.approx(value, abs=1e-6)


# All of it.


def test_an_analysis_holds_what_the_parts_find(backbone, table):
  first, second = random_rows(6), random_rows(3, seed=1, scale=900)
  first[4] = 2 * first[1]
  found = analyze(
      backbone,
      [('first', Injection(first, num_decoder_virtual_tokens=2)), ('second', Injection(second))],
      k=3,
      labels=['small'],
  )
  assert [analysis.name for analysis in found] == ['first', 'second']
  assert [position.name for position in found[0].positions] == ['0', '1', '2', '3', 'D0', 'D1']
  for analysis, rows in zip(found, (first, second)):
    cosines, ids = words.nearest_ids(backbone, rows, 3)
    tightness = words.tightness(backbone, ids)
    for number, position in enumerate(analysis.positions):
      assert position.norm == pytest.approx(np.linalg.norm(rows[number]))
      assert [neighbor.id for neighbor in position.neighbors] == ids[number].tolist()
      assert [n.word for n in position.neighbors] == [
          backbone.vocabulary.piece(token) for token in ids[number].tolist()
      ]
      found_cosines = [neighbor.cosine for neighbor in position.neighbors]
      np.testing.assert_allclose(found_cosines, cosines[number], atol=1e-6)
      assert position.tightness == pytest.approx(tightness[number])
    assert analysis.nearness.cosine == pytest.approx(cosines[:, 0].mean())
    assert analysis.nearness.tightness == pytest.approx(tightness.mean())
    assert analysis.labels == tuple(surviving_labels(backbone, rows, ['small'], 3))
    assert analysis.clusters == position_clusters(rows.astype(np.float64))
  random = words.nearest_ids(backbone, words.random_vectors(backbone, 100), 3)[0]
  assert found[0].chance == found[1].chance
  assert found[0].chance.cosine == pytest.approx(random[:, 0].mean(), abs=1e-6)
  assert found[0].clusters.of(4) == found[0].clusters.of(1)
  shared = found[0].positions[1].nearest.word
  assert {1, 4} <= set(found[0].positions_by_word()[shared])


def test_the_words_of_several_positions_are_those_with_the_largest_sum(backbone):
  (found,) = analyze(backbone, [('p', Injection(random_rows(5)))], k=4)
  sums = {}
  for number in (0, 2, 3):
    for word, _, value in found.positions[number].neighbors:
      sums[word] = sums.get(word, 0) + value
  assert found.words_of((0, 2, 3)) == sorted(sums, key=lambda word: -sums[word])[:4]
