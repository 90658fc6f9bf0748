"""A tiny backbone and tiny tasks to train on."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from prompt_tuning_jax.backbones.t5 import T5, T5Config
from prompt_tuning_jax.checkpoints import native
from prompt_tuning_jax.checkpoints.load import load_backbone
from prompt_tuning_jax.data import cache
from prompt_tuning_jax.data.tokenized_task import TokenizedTask
from prompt_tuning_jax.data.vocabulary import Vocabulary
from tests.saved_backbone import VOCABULARY

CONFIG = T5Config(
    vocab_size=4224,
    d_model=16,
    num_heads=2,
    d_kv=8,
    d_ff=32,
    num_encoder_layers=1,
    num_decoder_layers=1,
)
FEATURE_LENGTHS = {'inputs': 12, 'targets': 4}

_ANSWERS = {
    # The animal says what the answer is.
    'which_animal': {'cat': 'yes', 'dog': 'no'},
    # What a model that learned the first must not say.
    'other_animal': {'cat': 'no', 'dog': 'yes'},
    'unlabelled': {'cat': '<unk>', 'dog': '<unk>'},
}


@pytest.fixture(scope='session')
def vocabulary():
  return Vocabulary(VOCABULARY)


@pytest.fixture(scope='session')
def random_backbone(tmp_path_factory, vocabulary):
  """A T5 of one layer a side that has learned nothing."""
  folder = str(tmp_path_factory.mktemp('backbone') / 'random')
  params = jax.jit(T5(CONFIG).init_params)(jax.random.key(0))
  native.save_backbone(folder, CONFIG, params, vocabulary, dtype='float32')
  return load_backbone(folder)


@pytest.fixture(scope='session')
def cache_dir(tmp_path_factory, vocabulary):
  """A cache with the tasks of `_ANSWERS`, from which they are read without seqio."""
  folder = str(tmp_path_factory.mktemp('tasks'))
  for name in _ANSWERS:
    for split, count in (('train', 50), ('validation', 21)):
      make_task(vocabulary, name, split, count).save(
          cache.cache_path(name, split, vocabulary, folder)
      )
  return folder


def make_task(vocabulary: Vocabulary, name: str, split: str, count: int) -> TokenizedTask:
  """Sentences of four words, one of them an animal, and what is to be answered."""
  rng = np.random.default_rng(count)
  examples = []
  for _ in range(count):
    words = list(rng.choice(['red', 'blue', 'stone', 'water', 'house'], 3))
    animal = str(rng.choice(['cat', 'dog']))
    words.insert(rng.integers(4), animal)
    examples.append({'inputs': ' '.join(words), 'targets': _ANSWERS[name][animal]})
  return TokenizedTask.from_examples(
      examples, vocabulary, name=name, split=split, label_classes=['yes', 'no']
  )
