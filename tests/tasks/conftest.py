"""What tests of tasks share: a cache and local files of their own, and vocabularies."""

import pytest

from prompt_tuning_jax.data.vocabulary import Vocabulary
from tests.saved_backbone import VOCABULARY


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
  """Tokenised tasks are the test's own."""
  monkeypatch.setenv('PTJ_CACHE_DIR', str(tmp_path / 'cache'))


@pytest.fixture
def own_folder(own_cache, tmp_path, monkeypatch):
  """So are local files."""
  monkeypatch.setenv('PTJ_LOCAL_DATA', str(tmp_path))


@pytest.fixture(scope='session')
def vocabulary():
  return Vocabulary(VOCABULARY)


@pytest.fixture(scope='session')
def t5_vocabulary(shared_data):
  return Vocabulary(shared_data / 't5' / 'spiece.model')
