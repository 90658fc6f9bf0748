"""Models of the ladder by name: packaged, made here, after some steps, or missing."""

import pytest

from prompt_tuning_jax.checkpoints import ladder, load, native
from prompt_tuning_jax.checkpoints.load import load_backbone
from tests.checkpoints import samples
from tests.checkpoints.samples import assert_same_trees
from tests.conftest import TINY_CONFIG


@pytest.fixture(scope='module')
def vocabulary(tmp_path_factory):
  return samples.train_vocabulary(tmp_path_factory.mktemp('vocabulary') / 'letters.model')


@pytest.fixture
def zoo(tiny, vocabulary, tmp_path, monkeypatch):
  """A zoo with `nano` and, of the ladder, `pico` at two steps; `micro` was made here."""
  zoo, made = tmp_path / 'zoo', tmp_path / 'made'
  for number, (folder, steps) in enumerate([
      (zoo / 'nano', 800),
      (zoo / 'pico', 800),
      (zoo / 'pico_100', 100),
      (made / 'micro' / 'backbone', 50),
      (made / 'micro' / 'backbone_0', 0),
  ]):
    # The embeddings tell the models apart.
    embedding = tiny[1]['token_embedder']['embedding'] + number
    params = {**tiny[1], 'token_embedder': {'embedding': embedding}}
    native.save_backbone(
        folder,
        TINY_CONFIG,
        params,
        vocabulary,
        dtype='float32',
        metadata={'adaptation_steps': steps},
    )
    if folder.parent == zoo and folder.name != 'nano':
      (folder / 'spiece.model').unlink()
  monkeypatch.setattr(load, '_ZOO', zoo)
  monkeypatch.setenv('PTJ_LADDER_DIR', str(made))
  monkeypatch.chdir(tmp_path)
  return tmp_path


def test_packaged_models_share_a_vocabulary_file(zoo, vocabulary):
  pico, nano = load_backbone('pico'), load_backbone('nano')
  assert pico.vocabulary.path == nano.vocabulary.path == str(zoo / 'zoo/nano/spiece.model')
  assert pico.vocabulary.fingerprint == vocabulary.fingerprint
  assert pico.fingerprint != nano.fingerprint
  # A directory that anyone copied has to bring its own.
  (zoo / 'zoo/pico').rename(zoo / 'elsewhere')
  with pytest.raises(FileNotFoundError, match='No SentencePiece model at .*elsewhere/spiece'):
    load_backbone(zoo / 'elsewhere')


def test_what_was_made_here_is_found_by_its_name(zoo):
  assert load.available() == ['nano', 'pico', 'pico_100', 'micro', 'micro_0']
  assert load_backbone('micro').source == str(zoo / 'made/micro/backbone')
  assert load_backbone('micro_0').source == str(zoo / 'made/micro/backbone_0')
  # What is packaged comes first.
  native.save_backbone(zoo / 'made/pico/backbone', TINY_CONFIG, load_backbone('nano').params, None)
  assert load_backbone('pico').source == str(zoo / 'zoo/pico')


def test_a_model_that_is_missing_is_named_with_what_makes_it(zoo):
  with pytest.raises(FileNotFoundError) as error:
    load_backbone('micro_100')
  message = str(error.value)
  assert 'There are: nano, pico, pico_100, micro, micro_0.' in message
  assert 'prompt-tuning pretrain --gin_file=pretrain_micro --gin.MODEL_DIR=/tmp/micro' in message
  assert f'--gin.MODEL_DIR={zoo}/made/micro' in message
  with pytest.raises(FileNotFoundError, match="No backbone 'giga'.* Packaged: nano, pico"):
    load_backbone('giga')


def test_a_backbone_is_found_after_some_steps_of_adaptation(zoo):
  made = str(zoo / 'made/micro/backbone')
  found = {
      ('pico', 800): 'pico',
      ('pico', 100): 'pico_100',
      ('micro', 0): 'micro_0',
      ('micro', 50): 'micro',
      (made, 0): made + '_0',
      (made + '/', 50): made,
  }
  for (where, steps), expected in found.items():
    assert load.after_adaptation(where, steps) == expected, (where, steps)
  assert load_backbone(load.after_adaptation('micro', 0)).name == 'micro_0'
  for where in ('pico', 'micro', str(zoo / 'made/micro/backbone')):
    others = '100, 800' if where == 'pico' else '0, 50'
    with pytest.raises(
        FileNotFoundError, match=f'was not kept after so many.* after {others}'
    ) as refused:
      load.after_adaptation(where, 7)
    assert (f'--gin_file=adapt_{where}' in str(refused.value)) == ladder.is_name(where)
  with pytest.raises(FileNotFoundError, match="No backbone 'nowhere'"):
    load.after_adaptation('nowhere', 0)


def test_names_of_the_ladder():
  assert ladder.is_name('pico') and ladder.is_name('micro_800')
  assert not any(map(ladder.is_name, ('pico_', 'pico_x', 'picos', './pico', 'giga')))


def test_a_backbone_after_some_steps_is_another_one(zoo):
  before, after = (
      load_backbone(load.after_adaptation('pico', steps)).params for steps in (100, 800)
  )
  assert_same_trees(before['decoder'], after['decoder'])
  with pytest.raises(AssertionError):
    assert_same_trees(before, after)
