"""Checkpoints in buckets: the same reader, by way of tensorstore's drivers."""

import numpy as np
import pytest

from prompt_tuning_jax.checkpoints import names, storage, t5x
from prompt_tuning_jax.checkpoints.load import load_backbone
from prompt_tuning_jax.checkpoints.storage import Folder
from tests.checkpoints import samples
from tests.conftest import TINY_CONFIG


@pytest.fixture(scope='module')
def flat():
  return names.flatten_to_t5x(samples.random_params(TINY_CONFIG), TINY_CONFIG)


@pytest.fixture(scope='module')
def written(flat, tmp_path_factory):
  return samples.write_t5x(tmp_path_factory.mktemp('bucket') / 'checkpoint_7', flat)


def test_urls_name_buckets_and_paths_in_them():
  folder = Folder('gs://t5-data/pretrained_models/t5x/t5_1_1_small/checkpoint_1000000/')
  assert folder.spec('target.x') == {
      'driver': 'gcs',
      'bucket': 't5-data',
      'path': 'pretrained_models/t5x/t5_1_1_small/checkpoint_1000000/target.x/',
  }
  assert Folder('s3://bucket').spec() == {'driver': 's3', 'bucket': 'bucket', 'path': ''}
  assert folder.path('checkpoint') == folder.where + '/checkpoint'
  with pytest.raises(ValueError, match='of a kind that is not read.*gs://'):
    Folder('ftp://host/path')


@pytest.mark.parametrize('form', ['path', 'url'])
def test_files_are_listed_and_read_by_path_and_by_url(form, tmp_path):
  (tmp_path / 'a').mkdir()
  (tmp_path / 'a' / 'b').write_bytes(b'content')
  folder = Folder(tmp_path if form == 'path' else f'file://{tmp_path}')
  assert folder.files == {'a/b'}
  assert folder.read('a', 'b') == b'content'
  with pytest.raises(FileNotFoundError, match='No file .*a/c'):
    folder.read('a', 'c')


def test_a_checkpoint_named_by_a_url_is_the_checkpoint(written, flat):
  checkpoint = t5x.read_t5x(f'file://{written}')
  assert checkpoint.config == TINY_CONFIG
  for name, array in flat.items():
    np.testing.assert_array_equal(checkpoint.weights[name], array)
  backbone = load_backbone(f'file://{written}/')
  assert backbone.source == f'file://{written}'
  assert backbone.fingerprint == load_backbone(written).fingerprint


def test_a_bucket_that_does_not_answer_is_an_error_and_no_endless_wait(monkeypatch):
  class Silent:

    def result(self, timeout):
      raise TimeoutError(f'{timeout}')

  class Store:
    read = list = lambda self, *_: Silent()

  monkeypatch.setattr(storage, '_TIMEOUT_SECONDS', 0.01)
  monkeypatch.setattr(Folder, '_store', Store())
  with pytest.raises(OSError, match='gs://b/t5/checkpoint did not answer .*gsutil -m cp'):
    t5x.read_t5x('gs://b/t5')
