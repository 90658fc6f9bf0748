"""What tests of tasks share: a folder of local files, and a vocabulary."""

import pytest

from prompt_tuning_jax.data.vocabulary import Vocabulary
from tests.saved_backbone import VOCABULARY


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
  """Local files and the cache of tokenised tasks are the test's own."""
  monkeypatch.setenv('PTJ_CACHE_DIR', str(tmp_path / 'cache'))
  monkeypatch.setenv('PTJ_LOCAL_DATA', str(tmp_path))


@pytest.fixture(scope='session')
def vocabulary():
  return Vocabulary(VOCABULARY)
