"""Where prompts start: what an initialiser gives, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax import initializers
from prompt_tuning_jax.backbones.backbone import Backbone
from prompt_tuning_jax.backbones.t5 import T5
from tests.checkpoints import samples
from tests.conftest import TINY_CONFIG

KEY = jax.random.key(0)
WIDTH = TINY_CONFIG.d_model


@pytest.fixture(scope='module')
def vocabulary(tmp_path_factory):
  return samples.train_vocabulary(tmp_path_factory.mktemp('vocabulary') / 'letters.model')


def make_backbone(vocabulary):
  params = samples.random_params(TINY_CONFIG)
  return Backbone('tiny', T5(TINY_CONFIG), vocabulary, lambda: params)


@pytest.fixture(scope='module')
def backbone(vocabulary):
  return make_backbone(vocabulary)


def _initializers(backbone):
  return {
      'uniform': initializers.uniform(),
      'sampled_vocab': initializers.sampled_vocab(backbone),
      'class_labels': initializers.class_labels(['small', 'letters'], backbone),
      'text': initializers.text('a small', backbone),
      'from_array': initializers.from_array(np.zeros((0, WIDTH))),
  }


NAMES = ['uniform', 'sampled_vocab', 'class_labels', 'text', 'from_array']


@pytest.mark.parametrize('name', NAMES)
def test_a_prompt_of_no_positions_is_refused(name, backbone):
  with pytest.raises(ValueError, match=r'shape \[0, 16\] .*Set PROMPT_LENGTH to at least 1'):
    _initializers(backbone)[name](KEY, (0, WIDTH))


@pytest.mark.parametrize('name', NAMES[:-1])
@pytest.mark.parametrize('length', [1, 7])
def test_a_prompt_of_any_length_is_finite(name, length, backbone):
  prompt = _initializers(backbone)[name](KEY, (length, WIDTH))
  assert prompt.shape == (length, WIDTH) and jnp.isfinite(prompt).all()


def test_labels_and_words_start_from_their_embeddings(backbone):
  table = backbone.embedding_VD
  tokens = backbone.vocabulary.encode('small')
  prompt = initializers.class_labels(['small'], backbone)(KEY, (3, WIDTH))
  np.testing.assert_allclose(prompt[0], table[np.array(tokens)].mean(axis=0), rtol=1e-5)
  prompt = initializers.text('small', backbone)(KEY, (3, WIDTH))
  np.testing.assert_array_equal(prompt, table[np.array(tokens[:3])])


def test_words_that_are_none_are_refused(backbone):
  with pytest.raises(ValueError, match="text ''.*has no tokens .* Set PROMPT_TEXT"):
    initializers.text('', backbone)(KEY, (3, WIDTH))
  with pytest.raises(ValueError, match="class label '' has no tokens"):
    initializers.class_labels([''], backbone)(KEY, (3, WIDTH))
  with pytest.raises(ValueError, match='set CLASS_LABELS'):
    initializers.class_labels([], backbone)


@pytest.mark.parametrize('name', ['class_labels', 'text'])
def test_words_need_a_vocabulary(name):
  with pytest.raises(ValueError, match='tiny has no vocabulary.*VOCABULARY'):
    _initializers(make_backbone(None))[name](KEY, (3, WIDTH))


def test_a_prompt_of_another_task_is_cut_or_filled_up_only_where_that_is_asked_for(
    backbone, tmp_path
):
  rows = np.random.default_rng(0).normal(size=(3, WIDTH)).astype(np.float32)
  np.save(tmp_path / 'p.npy', rows)
  exact = initializers.from_file(str(tmp_path / 'p.npy'))
  np.testing.assert_array_equal(exact(KEY, (3, WIDTH)), rows)
  for length in (2, 5):
    message = rf'p.npy holds a prompt of shape \[3, 16\], .* \[{length}, 16\]. Set PROMPT_LENGTH=3'
    with pytest.raises(ValueError, match=message + '.*from_file_any_length'):
      exact(KEY, (length, WIDTH))
  words = initializers.sampled_vocab(backbone)
  fitted = initializers.from_file(str(tmp_path / 'p.npy'), fallback=words)
  np.testing.assert_array_equal(fitted(KEY, (2, WIDTH)), rows[:2])
  np.testing.assert_array_equal(fitted(KEY, (3, WIDTH)), rows)
  longer = fitted(KEY, (5, WIDTH))
  np.testing.assert_array_equal(longer[:3], rows)
  np.testing.assert_array_equal(longer[3:], words(KEY, (5, WIDTH))[3:])
  with pytest.raises(ValueError, match='backbone of another width'):
    fitted(KEY, (3, WIDTH + 1))
