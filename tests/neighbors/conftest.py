"""A tiny model whose table has more rows than its vocabulary has words."""

from __future__ import annotations

import numpy as np
import pytest

from prompt_tuning_jax.backbones.backbone import Backbone
from prompt_tuning_jax.backbones.t5 import T5
from tests.checkpoints import samples
from tests.conftest import TINY_CONFIG

WIDTH = TINY_CONFIG.d_model


@pytest.fixture(scope='session')
def vocabulary(tmp_path_factory):
  """Letters, as pieces of one character."""
  return samples.train_vocabulary(tmp_path_factory.mktemp('vocabulary') / 'letters.model')


def make_backbone(vocabulary, params=None, **settings):
  params = samples.random_params(TINY_CONFIG) if params is None else params
  return Backbone('tiny', T5(TINY_CONFIG, **settings), vocabulary, lambda: params)


@pytest.fixture(scope='session')
def backbone(vocabulary):
  return make_backbone(vocabulary)


@pytest.fixture(scope='session')
def table(backbone):
  """The embeddings of all words, in float64."""
  return np.asarray(backbone.embedding_VD, np.float64)[: backbone.vocabulary.size]


def random_rows(length, seed=0, scale=1.0):
  return scale * np.random.default_rng(seed).normal(size=(length, WIDTH)).astype(np.float32)


def cosine(one, other):
  return np.dot(one, other) / np.linalg.norm(one) / np.linalg.norm(other)
