"""Saved states come back to the bit, or are named as what is wrong with them."""

import os
import re
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from prompt_tuning_jax.training.optimizers import adafactor
from prompt_tuning_jax.training.state_saving import CheckpointError, StateSaver
from prompt_tuning_jax.training.step import TrainState
from tests.checkpoints.samples import assert_same_trees, flip_byte


def _state(step=0, shape=(3, 4), tx=optax.adam(0.1)):
  rng = np.random.default_rng(step)
  trainable = {
      'prompt': {'prompt': jnp.asarray(rng.normal(size=shape), jnp.float32)},
      'backbone': {'scale': jnp.asarray(rng.normal(size=3), jnp.bfloat16)},
  }
  state = TrainState.create(trainable, tx)
  return state.replace(
      step=jnp.int32(step), opt_state=jax.tree.map(lambda x: x + 1, state.opt_state)
  )


def _saver(folder, steps=(), **settings):
  saver = StateSaver(folder, **settings)
  for step in steps:
    saver.save(step, _state(step))
  return saver


@pytest.fixture(scope='module')
def two_steps(tmp_path_factory):
  """A folder with the states of steps 1 and 2, to be copied."""
  folder = tmp_path_factory.mktemp('two_steps')
  _saver(folder, [1, 2])
  return folder


@pytest.fixture
def run_dir(two_steps, tmp_path):
  return shutil.copytree(two_steps, tmp_path / 'run')


def test_a_state_comes_back_to_the_bit(run_dir):
  template = jax.eval_shape(_state)
  state, step = StateSaver(run_dir).restore(template)
  assert step == 2
  assert_same_trees(state, _state(2))


def test_nothing_saved_is_nothing_restored(tmp_path):
  assert StateSaver(tmp_path / 'none').restore(_state()) is None
  assert StateSaver(tmp_path).latest() is None


def _files(folder):
  return sorted(path for path in folder.rglob('*') if path.is_file())


def test_a_flipped_bit_in_any_file_is_named_and_the_step_before_is_taken(run_dir):
  files = _files(run_dir / 'checkpoint_2')
  assert len(files) >= 5
  for path in files:
    whole = path.read_bytes()
    flip_byte(path, len(whole) // 2)
    with pytest.warns(UserWarning, match=rf'checkpoint_2.*{path.name}') as warned:
      state, step = StateSaver(run_dir).restore(_state())
    assert len(warned) == 1
    assert step == 1
    assert_same_trees(state, _state(1))
    path.write_bytes(whole)
  assert StateSaver(run_dir).restore(_state())[1] == 2


@pytest.mark.parametrize('harm', ['truncated', 'missing'])
def test_a_file_that_is_cut_or_gone_is_named(run_dir, harm):
  for path in _files(run_dir / 'checkpoint_2'):
    whole = path.read_bytes()
    path.write_bytes(whole[:-1]) if harm == 'truncated' else path.unlink()
    with pytest.warns(UserWarning, match=rf'checkpoint_2.*{path.name}'):
      assert StateSaver(run_dir).restore(_state())[1] == 1
    path.write_bytes(whole)


def test_where_all_states_are_damaged_each_is_named(run_dir):
  flip_byte(run_dir / 'checkpoint_1' / 'manifest.json', 50)
  flip_byte(_files(run_dir / 'checkpoint_2' / 'state')[0], 9)
  with pytest.warns(UserWarning), pytest.raises(CheckpointError) as error:
    StateSaver(run_dir).restore(_state())
  assert 'checkpoint_1/manifest.json' in str(error.value)
  assert 'checkpoint_2 is damaged' in str(error.value)
  assert 'set MODEL_DIR to a new folder' in str(error.value)


def test_a_run_that_went_back_replaces_the_damaged_step(run_dir):
  saver = StateSaver(run_dir)
  flip_byte(_files(run_dir / 'checkpoint_2' / 'state')[0], 5)
  saver.save(2, _state(2))
  assert_same_trees(saver.restore(_state())[0], _state(2))


def test_a_run_that_went_back_forgets_what_lay_ahead(run_dir):
  saver = _saver(run_dir, [7], keep=5)
  saver.save(3, _state(3))
  assert [saved.step for saved in saver.all()] == [1, 2, 3]


def test_stray_folders_are_passed_over_with_a_warning(run_dir):
  (run_dir / 'checkpoint_5').mkdir()
  (run_dir / 'checkpoint_6.tmp' / 'state').mkdir(parents=True)
  saver = StateSaver(run_dir)
  with pytest.warns(UserWarning) as warned:
    _, step = saver.restore(_state())
  assert step == 2
  messages = ' '.join(str(warning.message) for warning in warned)
  assert f'{run_dir}/checkpoint_5 holds no state' in messages
  assert f'{run_dir}/checkpoint_6.tmp' in messages and 'by a run that was killed' in messages
  # A step of that number can be saved, and what a killed run left goes away.
  saver.save(5, _state(5))
  assert sorted(os.listdir(run_dir)) == ['checkpoint_2', 'checkpoint_5']


# Orbax's other writes find its event loop closed, and say so to nobody.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_a_full_disk_leaves_older_steps_and_nothing_partial(run_dir):
  saver = StateSaver(run_dir)
  before = {path: path.read_bytes() for path in _files(run_dir)}
  state = _state(3, shape=(100, 64))
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
  try:
    with pytest.raises(OSError) as error:
      saver.save(3, state)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert f'Could not save step 3 to {run_dir}/checkpoint_3' in str(error.value)
  assert 'Steps still intact: 1, 2' in str(error.value)
  assert {path: path.read_bytes() for path in _files(run_dir)} == before
  saver.save(3, _state(3))
  assert saver.restore(_state())[1] == 3


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
  (tmp_path / 'file').touch()
  with pytest.raises(OSError, match=f'Could not save step 1 to {tmp_path}/file/checkpoint_1'):
    _saver(tmp_path / 'file', [1])


def test_arrays_of_another_run_are_listed_with_what_was_expected(run_dir):
  with pytest.raises(CheckpointError) as error:
    StateSaver(run_dir).restore(_state(shape=(3, 5)))
  message = str(error.value)
  assert 'trainable/prompt/prompt: float32[3, 4] there, float32[3, 5] in this run' in message
  assert 'scale' not in message
  with pytest.raises(CheckpointError) as error:
    StateSaver(run_dir).restore(_state(tx=adafactor()))
  message = str(error.value)
  assert re.search(r'opt_state/\S*/mu/prompt/prompt: float32\[3, 4\] there, nothing', message)
  assert re.search(r'opt_state/\S*/v/prompt/prompt: nothing there, float32\[3, 4\]', message)


def test_the_newest_stay_and_the_best(tmp_path):
  saver = _saver(tmp_path, keep=2, best_metric='accuracy')
  scores = {1: 10.0, 2: 70.0, 3: 70.0, 4: 40.0, 5: float('nan'), 6: 50.0}
  for step, accuracy in scores.items():
    saver.save(step, _state(step), description={'task': 'cb'})
    assert saver.metrics(step) == {}
    saver.record_metrics(step, {'accuracy': accuracy})
  # Of equal ones the later is the best; what is not a number never is.
  assert [saved.step for saved in saver.all()] == [3, 5, 6]
  assert saver.best().step == 3
  assert saver.best().metrics == {'accuracy': 70.0}
  assert saver.latest().step == 6
  assert saver.description(saver.best()) == {'task': 'cb'}
  assert_same_trees(saver.restore(_state(), saver.best())[0], _state(3))
  assert StateSaver(tmp_path, best_metric='accuracy', best_mode='min').best().step == 6
  assert StateSaver(tmp_path, best_metric='f1').best() is None
  assert StateSaver(tmp_path).best() is None


def test_settings_that_make_no_sense_are_refused(tmp_path):
  with pytest.raises(ValueError, match="best_mode is 'least'; it may be 'max' or 'min'"):
    StateSaver(tmp_path, best_mode='least')
  with pytest.raises(ValueError, match='keep_checkpoints is 0; at least 1'):
    StateSaver(tmp_path, keep=0)


def test_a_prompt_of_base_size_takes_less_than_two_megabytes(tmp_path):
  """P=100 at d_model 768, with Adafactor's state; random, so that nothing compresses."""
  key = jax.random.key(0)
  state = TrainState.create({'prompt': jax.random.normal(key, (100, 768))}, adafactor())
  state = state.replace(
      opt_state=jax.tree.map(
          lambda x: jax.random.normal(key, x.shape, x.dtype) if x.ndim else x, state.opt_state
      )
  )
  path = StateSaver(tmp_path).save(1, state, description={'task': 'cb'})
  size = sum(os.path.getsize(os.path.join(d, f)) for d, _, fs in os.walk(path) for f in fs)
  assert 100 * 768 * 4 < size <= 2e6


def test_what_a_run_ends_with_is_the_best_state_that_is_whole(tmp_path):
  saver = StateSaver(tmp_path, keep=3, best_metric='accuracy')
  for step, accuracy in {1: 10.0, 2: 70.0, 3: 40.0}.items():
    saver.save(step, _state(step))
    saver.record_metrics(step, {'accuracy': accuracy})
  assert saver.restore_best(_state())[1].step == 2
  assert StateSaver(tmp_path).restore_best(_state())[1].step == 3

  def damage(step):
    flip_byte(next((tmp_path / f'checkpoint_{step}' / 'state').rglob('d/*')), -1)

  damage(2)
  with pytest.warns(UserWarning, match='checkpoint_2 is damaged.* passed over for the next best'):
    state, saved = saver.restore_best(_state())
  assert saved.step == 3
  assert_same_trees(state, _state(3))
  damage(1)
  damage(3)
  with pytest.warns(UserWarning), pytest.raises(CheckpointError, match='No state in .* restored'):
    saver.restore_best(_state())
