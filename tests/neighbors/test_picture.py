"""Pictures are drawn of prompts of any length, words of any script and any measure."""

from __future__ import annotations

import dataclasses

import matplotlib
import numpy as np
import pytest
from matplotlib import image

from prompt_tuning_jax.neighbors import picture
from prompt_tuning_jax.neighbors.analysis import Neighbor, analyze
from prompt_tuning_jax.neighbors.similarity import prompt_similarities
from prompt_tuning_jax.typing import Injection
from tests.neighbors.conftest import random_rows


def _shape(path):
  return image.imread(path).shape[:2]


@pytest.mark.parametrize(('length', 'k'), [(1, 1), (2, 3), (26, 5), (130, 5)])
def test_prompts_of_any_length_are_drawn(backbone, tmp_path, length, k):
  (analysis,) = analyze(
      backbone, [('p', Injection(random_rows(length)))], k=k, labels=['small', 'a', 'of']
  )
  picture.draw_prompt(analysis, tmp_path / 'p.png', title='a $ and $')
  height, width = _shape(tmp_path / 'p.png')
  # At most 25 positions in a column.
  assert width > height
  assert height < 25 * 0.2 * 200 + 400


def test_dots_stand_at_the_cosines_and_words_beside_them(backbone, tmp_path, monkeypatch):
  figures = []
  monkeypatch.setattr(
      'matplotlib.figure.Figure.savefig', lambda self, *args, **kwargs: figures.append(self)
  )
  rows = random_rows(4)
  rows[2] = backbone.embeddings(np.array(backbone.vocabulary.encode('small'))).mean(axis=0)
  (analysis,) = analyze(backbone, [('p', Injection(rows))], labels=['of', 'a', 'small'])
  picture.draw_prompt(analysis, tmp_path / 'p.png')
  axes, positions, _ = figures[0].axes
  for number, position in enumerate(analysis.positions):
    drawn = [
        point[0] for collection in axes.collections for point in collection.get_offsets()
        if point[1] == number
    ]  # fmt: skip
    assert sorted(drawn, reverse=True) == [n.cosine for n in position.neighbors]
    assert picture._plain(position.nearest.word) in [text.get_text() for text in axes.texts]
  # The label at its own position is full and orange; where it is not, blue.
  nearest = [c for c in axes.collections if len(c.get_offsets()) == 1][2]
  assert matplotlib.colors.to_hex(nearest.get_facecolor()[0]).upper() == picture._LABEL
  order = list(analysis.clusters.order)
  drawn = positions.images[0].get_array()
  units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
  np.testing.assert_allclose(drawn, (units @ units.T)[np.ix_(order, order)], atol=1e-6)


@pytest.mark.parametrize('word', ['$', '$x$', '▁日本語', '▁' + 'long' * 20, '|', '\\', '_^{', '😀'])
def test_any_word_can_be_written(backbone, tmp_path, word):
  (analysis,) = analyze(backbone, [('p', Injection(random_rows(3)))], k=2)
  positions = tuple(
      dataclasses.replace(position, neighbors=tuple(Neighbor(word, 3, 0.5) for _ in range(2)))
      for position in analysis.positions
  )
  picture.draw_prompt(dataclasses.replace(analysis, positions=positions), tmp_path / 'p.png')
  assert _shape(tmp_path / 'p.png')[0] > 400


@pytest.mark.parametrize('count', [2, 12])
def test_similarities_are_drawn_and_the_users_settings_stay(tmp_path, count):
  prompts = [random_rows(3 + number % 2, seed=number) for number in range(count)]
  names = [f'task_{number}$' for number in range(count)]
  before = dict(matplotlib.rcParams)
  picture.draw_similarities(names, prompt_similarities(prompts), tmp_path / 's.png')
  assert dict(matplotlib.rcParams) == before
  height, width = _shape(tmp_path / 's.png')
  assert width > 2 * height
