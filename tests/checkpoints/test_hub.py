"""Published models by name, with a hub that stands in for Hugging Face's."""

import json
import sys
import types

import numpy as np
import pytest

from prompt_tuning_jax import config
from prompt_tuning_jax.checkpoints import hub, load
from prompt_tuning_jax.checkpoints.load import load_backbone
from prompt_tuning_jax.config import building
from tests import saved_backbone
from tests.checkpoints import samples, torch_samples
from tests.conftest import TINY_CONFIG


class HfHubHTTPError(Exception):
  """As the real one, it is no OSError in every version."""


@pytest.fixture
def fake_hub(tmp_path, monkeypatch):
  """A hub of one repository, `google/t5-base-lm-adapt`; it records what was downloaded."""
  folder = tmp_path / 'snapshot'
  tensors = samples.hf_tensors(TINY_CONFIG, samples.random_params(TINY_CONFIG))
  samples.write_hf(folder, samples.hf_description(TINY_CONFIG), tensors)
  (folder / 'README.md').write_text('a card')
  (folder / 'tf_model.h5').write_bytes(b'another form')

  def list_repo_files(repository):
    if repository != 'google/t5-base-lm-adapt':
      raise HfHubHTTPError(f'404: no repository {repository}\nand more')
    return [path.name for path in folder.iterdir()]

  def snapshot_download(repository, allow_patterns=None, local_files_only=False):
    if local_files_only:
      if allow_patterns is None:
        raise FileNotFoundError('README.md and tf_model.h5 are not on this machine')
      if module.downloaded and module.keeps:
        return str(folder)
      raise FileNotFoundError('nothing of it is on this machine')
    module.downloaded.append((repository, sorted(allow_patterns)))
    return str(folder)

  module = types.ModuleType('huggingface_hub')
  module.list_repo_files, module.snapshot_download = list_repo_files, snapshot_download
  module.errors = types.SimpleNamespace(HfHubHTTPError=HfHubHTTPError)
  module.downloaded, module.folder, module.tensors = [], folder, tensors
  module.keeps = False
  monkeypatch.setitem(sys.modules, 'huggingface_hub', module)
  monkeypatch.chdir(tmp_path)
  return module


@pytest.mark.parametrize('name', ['google/t5-base-lm-adapt', 't5_1_1_lm100k_base'])
def test_a_published_model_is_fetched_by_either_name(name, fake_hub):
  backbone = load_backbone(name)
  assert backbone.module.config == TINY_CONFIG
  assert fake_hub.downloaded == [
      ('google/t5-base-lm-adapt', ['config.json', 'model.safetensors'])
  ]


def test_a_pickle_is_fetched_only_where_there_are_no_safetensors(fake_hub):
  (fake_hub.folder / 'model.safetensors').unlink()
  torch_samples.write(fake_hub.folder / 'pytorch_model.bin', fake_hub.tensors)
  backbone = load_backbone('google/t5-base-lm-adapt')
  assert fake_hub.downloaded[0][1] == ['config.json', 'pytorch_model.bin']
  np.testing.assert_array_equal(backbone.embedding_VD, fake_hub.tensors['shared.weight'])
  (fake_hub.folder / 'pytorch_model.bin').unlink()
  with pytest.raises(ValueError, match='holds neither model.safetensors nor .* tf_model.h5'):
    load_backbone('google/t5-base-lm-adapt')


def test_a_hub_that_fails_and_one_that_is_missing_are_explained(fake_hub, monkeypatch):
  with pytest.raises(OSError, match='google/t6 could not be fetched .*404: no repository'):
    load_backbone('google/t6')
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
  with pytest.raises(FileNotFoundError, match='pip install huggingface_hub'):
    load_backbone('t5_1_1_lm100k_base')


def test_what_was_fetched_before_needs_no_network(fake_hub, monkeypatch):
  fake_hub.keeps = True
  load_backbone('google/t5-base-lm-adapt')

  def refuse(repository):
    raise RuntimeError('no network, says the HTTP library of the day')

  monkeypatch.setattr(fake_hub, 'list_repo_files', refuse)
  assert load_backbone('t5_1_1_lm100k_base').module.config == TINY_CONFIG
  assert len(fake_hub.downloaded) == 1
  fake_hub.keeps = False
  with pytest.raises(OSError, match='could not be fetched .*RuntimeError: no network'):
    load_backbone('t5_1_1_lm100k_base')


def test_a_slip_in_a_path_is_not_asked_of_the_hub(fake_hub, tmp_path):
  (tmp_path / 'runs' / 'backbone').mkdir(parents=True)
  with pytest.raises(FileNotFoundError, match='Did you mean runs/backbone'):
    load_backbone('runs/backbon')
  assert not load.is_elsewhere('runs/backbon')
  assert not load.is_elsewhere('nano')
  assert load.is_elsewhere('owner/model')
  assert load.is_elsewhere('gs://bucket/model')


def test_a_dry_run_downloads_nothing(fake_hub):
  model = "INITIAL_CHECKPOINT_PATH='google/t5-base-lm-adapt'"
  flags = [model, "MODEL_DIR='/tmp/x'", "MIXTURE_OR_TASK_NAME='x'",
           "TASK_FEATURE_LENGTHS={'inputs': 8, 'targets': 2}"]
  with building.dry_run():
    with pytest.raises(ValueError, match='neither a dry run nor .tasks. downloads it'):
      config.parse('train', [], flags, []).kwargs()
    kwargs = config.parse('train', ['models/t5_1_1_lm100k_base'], flags, []).kwargs()
  assert kwargs['backbone'].num_params == 247_577_856
  assert fake_hub.downloaded == []


def test_a_dry_run_takes_what_was_fetched_before_and_a_vocabulary_that_is_named(
    fake_hub, monkeypatch
):
  flags = ["MODEL_DIR='/tmp/x'", "MIXTURE_OR_TASK_NAME='x'",
           "TASK_FEATURE_LENGTHS={'inputs': 8, 'targets': 2}"]
  vocabulary = f'VOCABULARY={str(saved_backbone.VOCABULARY)!r}'
  with building.dry_run():
    parsed = config.parse('train', ['models/t5_1_1_lm100k_base'], [*flags, vocabulary], [])
    backbone = parsed.kwargs()['backbone']
    assert backbone.vocabulary.size == 4100
    assert backbone.num_params == 247_577_856
    fake_hub.keeps = True
    load_backbone('google/t5-base-lm-adapt')
    model = "INITIAL_CHECKPOINT_PATH='google/t5-base-lm-adapt'"
    backbone = config.parse('train', [], [*flags, model], []).kwargs()['backbone']
  assert backbone.module.config == TINY_CONFIG
  assert len(fake_hub.downloaded) == 1


def test_the_published_names_are_those_of_t5x_and_the_hub():
  assert hub.PUBLISHED['t5_1_1_xxl'] == 'google/t5-v1_1-xxl'
  assert hub.PUBLISHED['t5_3B'] == 'google-t5/t5-3b'
  assert hub.PUBLISHED['umt5_base'] == 'google/umt5-base'
  assert len(hub.PUBLISHED) == 34


def test_a_download_that_was_stopped_goes_on(fake_hub):
  """The index and one of two shards are no model."""
  whole = (fake_hub.folder / 'model.safetensors').read_bytes()
  (fake_hub.folder / 'model.safetensors').unlink()
  shards = ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']
  (fake_hub.folder / shards[0]).write_bytes(whole)
  index = {'weight_map': {'a': shards[0], 'b': shards[1]}}
  (fake_hub.folder / 'model.safetensors.index.json').write_text(json.dumps(index))
  fake_hub.keeps, fake_hub.downloaded = True, [('before', [])]
  assert hub.fetched('google/t5-base-lm-adapt') is None
  hub.fetch('google/t5-base-lm-adapt')
  assert len(fake_hub.downloaded) == 2
  (fake_hub.folder / shards[1]).write_bytes(whole)
  assert hub.fetched('google/t5-base-lm-adapt') == str(fake_hub.folder)


def test_a_vocabulary_that_another_program_left_out_is_fetched(fake_hub):
  fake_hub.keeps, fake_hub.downloaded = True, [('before', [])]
  hub.fetch('google/t5-base-lm-adapt')
  assert len(fake_hub.downloaded) == 2
  (fake_hub.folder / 'spiece.model').write_bytes(saved_backbone.VOCABULARY.read_bytes())
  hub.fetch('google/t5-base-lm-adapt')
  assert len(fake_hub.downloaded) == 2


def test_a_published_model_has_its_published_name(fake_hub):
  for name in ('google/t5-base-lm-adapt', 't5_1_1_lm100k_base'):
    assert load_backbone(name).name == name
