"""Fixtures of the data tests: a real small vocabulary and a cache of the test's own."""

from pathlib import Path

import pytest

import prompt_tuning_jax
from prompt_tuning_jax.data.vocabulary import Vocabulary

NANO_VOCABULARY = Path(prompt_tuning_jax.__file__).parent / 'zoo' / 'nano' / 'spiece.model'


@pytest.fixture(scope='session')
def vocabulary() -> Vocabulary:
  """The packaged vocabulary of 4,000 pieces and 100 sentinels."""
  return Vocabulary(NANO_VOCABULARY)


@pytest.fixture(autouse=True)
def cache_dir(tmp_path, monkeypatch) -> Path:
  """Nothing a test does reaches the user's own cache, nor reads their data."""
  folder = tmp_path / 'cache'
  monkeypatch.setenv('PTJ_CACHE_DIR', str(folder))
  monkeypatch.delenv('PTJ_LOCAL_DATA', raising=False)
  return folder
