"""The loop keeps its promises whatever is trained: here eight numbers, by a real step."""

import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from prompt_tuning_jax.json_files import read_jsonl
from prompt_tuning_jax.training import loop
from prompt_tuning_jax.training.state_saving import StateSaver
from prompt_tuning_jax.training.step import TrainState
from tests.checkpoints.samples import assert_same_trees, flip_byte

FROZEN = np.arange(8, dtype=np.float32)


def _make_step(tx):
  """Linear regression towards `FROZEN`, with the metrics of a train step."""

  @jax.jit
  def train_step(state, frozen, batch):
    def loss_fn(tree):
      return jnp.sum((batch @ (tree['w'] - frozen)) ** 2)

    loss, gradient = jax.value_and_grad(loss_fn)(state.trainable)
    updates, opt_state = tx.update(gradient, state.opt_state, state.trainable)
    metrics = {
        'loss': loss,
        'token_loss': loss / 2,
        'token_z_loss': loss / 10,
        'tokens': jnp.sum(batch != 0),
        'right_tokens': jnp.sum(batch > 0),
        'loss_factor': jnp.float32(2.0),
        'gradient_norm': optax.tree.norm(gradient),
    }
    trainable = optax.apply_updates(state.trainable, updates)
    return TrainState(state.step + 1, trainable, opt_state), metrics

  return train_step


TX = optax.adam(0.1)
STEP = _make_step(TX)


class Batches:
  """Batch k is a function of k; before one of them something may happen."""

  def __init__(self, events=None):
    self.events = events or {}
    self.asked = []

  def __getitem__(self, step):
    self.asked.append(step)
    if step in self.events:
      event = self.events.pop(step)
      if callable(event):
        event()
      else:
        return np.full((4, 8), event, np.float32)
    return np.random.default_rng(step).normal(size=(4, 8)).astype(np.float32)


def _start(tx=TX):
  return TrainState.create({'w': jnp.zeros(8)}, tx)


def _run(folder, train_steps, *, batches=None, step=STEP, tx=TX, keep=2, best=None, **settings):
  periods = {
      name: settings.pop(name)
      for name in ('log_period', 'eval_period', 'checkpoint_period')
      if name in settings
  }
  folder.mkdir(exist_ok=True)
  return loop.run(
      settings.pop('start', lambda: _start(tx)),
      FROZEN,
      step,
      Batches() if batches is None else batches,
      loop.LoopConfig(train_steps, **periods),
      saver=StateSaver(folder, keep=keep, best_metric=best),
      template=jax.eval_shape(lambda: _start(tx)),
      progress=settings.pop('progress', False),
      **settings,
  )


def _records(folder):
  """The records of metrics.jsonl without what the clock says."""
  records = read_jsonl(folder / 'metrics.jsonl')
  for record in records:
    record.pop('train/steps_per_second', None)
  return records


def _accuracy(state):
  return {'accuracy': float(state.trainable['w'].sum())}


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
  """Twelve steps in one go, evaluated and saved on the way: (folder, state)."""
  folder = tmp_path_factory.mktemp('uninterrupted')
  state = _run(
      folder, 12, log_period=2, checkpoint_period=3, eval_period=4, evaluate=_accuracy
  )
  return folder, state


def _resumed(folder, **settings):
  return _run(
      folder, 12, log_period=2, checkpoint_period=3, eval_period=4, evaluate=_accuracy, **settings
  )


# Resume = never stopped.


def test_a_run_that_is_continued_equals_one_that_never_ended(tmp_path, uninterrupted):
  folder, expected = uninterrupted
  for train_steps in (6, 8, 12, 12):
    state = _run(
        tmp_path,
        train_steps,
        log_period=2,
        checkpoint_period=3,
        eval_period=4,
        evaluate=_accuracy,
    )
  assert_same_trees(state, expected)
  # It was evaluated at the end of its first part, too.
  records = [r for r in _records(tmp_path) if r['step'] != 6 or 'train/loss' in r]
  assert records == _records(folder)


def test_a_finished_run_does_nothing_more(tmp_path):
  _run(tmp_path, 3)
  before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')}
  batches = Batches()
  state = _run(tmp_path, 3, batches=batches)
  assert int(state.step) == 3 and batches.asked == []
  assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')} == before


@pytest.mark.parametrize(
    ('number', 'at'),
    # In the first step, anywhere, where an evaluation is due, in the last step.
    [(signal.SIGTERM, 0), (signal.SIGINT, 4), (signal.SIGTERM, 7), (signal.SIGTERM, 11)],
)
def test_a_signal_stops_the_run_after_a_saved_step(tmp_path, uninterrupted, number, at):
  handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
  batches = Batches({at: lambda: os.kill(os.getpid(), number)})
  with pytest.raises(loop.Interrupted) as stopped:
    _resumed(tmp_path, batches=batches)
  assert f'Stopped at step {at + 1} of 12; its state is in {tmp_path}' in str(stopped.value)
  assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == handlers
  assert batches.asked == list(range(at + 1))
  assert StateSaver(tmp_path).latest().step == at + 1

  batches = Batches()
  assert_same_trees(_resumed(tmp_path, batches=batches), uninterrupted[1])
  assert batches.asked == list(range(at + 1, 12))
  records = {(r['step'], *sorted(r)): r for r in _records(tmp_path)}
  assert len(records) == len(_records(tmp_path)), 'a record stands twice'
  evaluated = {r['step']: r['eval/accuracy'] for r in records.values() if 'eval/accuracy' in r}
  assert evaluated == {
      r['step']: r['eval/accuracy'] for r in _records(uninterrupted[0]) if 'eval/accuracy' in r
  }


def test_a_damaged_newest_state_costs_its_steps_and_nothing_else(tmp_path, uninterrupted):
  _run(tmp_path, 9, log_period=2, checkpoint_period=3, eval_period=4, evaluate=_accuracy)
  flip_byte(next((tmp_path / 'checkpoint_9' / 'state').rglob('d/*')), -1)
  batches = Batches()
  with pytest.warns(UserWarning, match='checkpoint_9 is damaged'):
    state = _resumed(tmp_path, batches=batches)
  assert batches.asked == [8, 9, 10, 11]
  assert_same_trees(state, uninterrupted[1])
  assert _records(tmp_path) == _records(uninterrupted[0])


# Evaluation.


def test_a_state_is_saved_before_it_is_evaluated_and_evaluated_when_the_run_resumes(tmp_path):
  def killed(state):
    raise SystemExit('killed')

  with pytest.raises(SystemExit):
    _run(tmp_path, 8, eval_period=4, evaluate=killed)
  saver = StateSaver(tmp_path)
  assert saver.latest().step == 4 and saver.metrics(4) == {}

  evaluated = []

  def evaluate(state):
    evaluated.append(int(state.step))
    return _accuracy(state)

  _run(tmp_path, 8, eval_period=4, evaluate=evaluate)
  assert evaluated == [4, 8]
  assert [r['step'] for r in _records(tmp_path) if 'eval/accuracy' in r] == [4, 8]
  _run(tmp_path, 8, eval_period=4, evaluate=evaluate)
  assert evaluated == [4, 8]


@pytest.fixture
def interruptible():
  """SIGINT as at a terminal; a process started in the background ignores it."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_does_not_wait_for_the_evaluation_of_what_is_saved(
    tmp_path, interruptible, number
):
  def evaluate(state):
    os.kill(os.getpid(), number)
    raise AssertionError('the evaluation went on')

  with pytest.raises(loop.Interrupted, match='Stopped at step 4 of 8'):
    _run(tmp_path, 8, eval_period=4, evaluate=evaluate)
  assert StateSaver(tmp_path).latest().step == 4

  evaluated = []
  _run(
      tmp_path, 8, eval_period=4, evaluate=lambda state: evaluated.append(1) or _accuracy(state)
  )
  assert [r['step'] for r in _records(tmp_path) if 'eval/accuracy' in r] == [4, 8]
  assert len(evaluated) == 2


def test_ctrl_c_says_that_it_was_heard_and_a_second_one_does_not_wait(
    tmp_path, interruptible, capfd
):
  def twice():
    os.kill(os.getpid(), signal.SIGINT)
    assert 'Stopping after this step' in capfd.readouterr().err
    os.kill(os.getpid(), signal.SIGINT)

  with pytest.raises(KeyboardInterrupt):
    _run(tmp_path, 4, batches=Batches({2: twice}))
  assert StateSaver(tmp_path).all() == []


def test_ctrl_c_saves_the_state_though_nobody_is_left_to_hear_that_it_was_heard(
    tmp_path, interruptible, monkeypatch
):
  """In `… 2>&1 | tee log` the same Ctrl-C has ended `tee`."""
  write = os.write

  def broken(file, content):
    if file == 2:
      raise BrokenPipeError
    return write(file, content)

  monkeypatch.setattr(os, 'write', broken)
  with pytest.raises(loop.Interrupted, match='Stopped at step'):
    _run(tmp_path, 8, batches=Batches({2: lambda: os.kill(os.getpid(), signal.SIGINT)}))
  assert StateSaver(tmp_path).latest().step in (2, 3)


def test_a_signal_while_the_last_state_is_saved_is_not_lost(tmp_path, monkeypatch):
  save = StateSaver.save

  def save_and_stop(*args, **kwargs):
    save(*args, **kwargs)
    os.kill(os.getpid(), signal.SIGTERM)

  monkeypatch.setattr(StateSaver, 'save', save_and_stop)
  with pytest.raises(loop.Interrupted, match='Stopped at step 3 of 3'):
    _run(tmp_path, 3)


def test_the_state_before_the_first_step_is_made_only_where_none_was_saved(tmp_path):
  def start():
    raise AssertionError('two states would lie on the devices')

  _run(tmp_path, 3)
  assert int(_run(tmp_path, 5, start=start).step) == 5


def test_the_best_state_is_kept_beside_the_newest(tmp_path):
  scores = {2: 1.0, 4: 9.0, 6: 3.0, 8: 2.0, 10: 5.0}
  _run(
      tmp_path,
      10,
      eval_period=2,
      evaluate=lambda state: {'f1': scores[int(state.step)]},
      best='f1',
      keep=1,
  )
  saver = StateSaver(tmp_path, best_metric='f1')
  assert [saved.step for saved in saver.all()] == [4, 10]
  assert saver.best().metrics == {'f1': 9.0}


@pytest.mark.parametrize(
    ('periods', 'saved', 'evaluated'),
    [
        ({}, [7], [7]),
        ({'checkpoint_period': 3}, [3, 6, 7], [7]),
        ({'eval_period': 2}, [2, 4, 6, 7], [2, 4, 6, 7]),
        ({'checkpoint_period': 3, 'eval_period': 5}, [3, 5, 6, 7], [5, 7]),
    ],
)
def test_periods_say_what_is_saved_and_evaluated(periods, saved, evaluated):
  config = loop.LoopConfig(7, **periods)
  assert [step for step in range(8) if config.saves_at(step)] == saved
  assert [step for step in range(8) if config.evaluates_at(step)] == evaluated


@pytest.mark.parametrize(
    ('setting', 'answer'),
    [
        ({'train_steps': 0}, 'train_steps is 0; it has to be at least 1'),
        ({'log_period': 0}, 'log_period is 0; it has to be at least 1'),
        ({'eval_period': -1}, 'eval_period is -1; it has to be at least 0'),
    ],
)
def test_periods_that_make_no_sense_are_refused(setting, answer):
  with pytest.raises(ValueError, match=answer):
    loop.LoopConfig(**{'train_steps': 5} | setting)


# Losses that are not finite.


def test_a_loss_that_is_not_finite_ends_the_run_and_the_last_good_state_stays(tmp_path):
  batches = Batches({13: np.nan})
  with pytest.raises(FloatingPointError) as stopped:
    _run(tmp_path, 100, batches=batches, log_period=10, checkpoint_period=4)
  message = str(stopped.value)
  assert 'Step 14 went out of bounds: its loss is nan' in message
  assert 'its batch is batches[13]' in message
  assert f'The last good state is {tmp_path}/checkpoint_12' in message
  saver = StateSaver(tmp_path)
  assert saver.latest().step == 12
  assert np.isfinite(saver.restore(_start())[0].trainable['w']).all()
  # The record that would hold the bad step was never written.
  assert max(r['step'] for r in _records(tmp_path)) == 12


def test_between_two_records_the_first_bad_step_is_named(tmp_path):
  batches = Batches({3: np.inf})
  with pytest.raises(FloatingPointError, match='Step 4 .* No state was saved yet'):
    _run(tmp_path, 100, batches=batches, log_period=50)
  assert os.listdir(tmp_path / 'tensorboard')
  assert StateSaver(tmp_path).all() == []


def test_a_parameter_that_is_not_finite_is_never_saved(tmp_path):
  """The loss of the step was finite, and so was its gradient."""
  tx = optax.sgd(lambda step: jnp.where(step == 4, jnp.inf, 0.01))
  with pytest.raises(FloatingPointError, match=r'Step 5 .*batches\[4\].*checkpoint_4'):
    _run(tmp_path, 10, step=_make_step(tx), tx=tx, checkpoint_period=1)
  assert StateSaver(tmp_path).latest().step == 4


# What is shown and written.


def test_records_are_means_over_the_steps_since_the_last(tmp_path):
  state, sums = _start(), []
  for step in range(5):
    state, metrics = STEP(state, FROZEN, Batches()[step])
    sums.append(jax.device_get(metrics))
  _run(tmp_path, 5, log_period=3, source_name=lambda step: ('odd' if step % 2 else 'even'))
  first, second = read_jsonl(tmp_path / 'metrics.jsonl')
  assert (first['step'], second['step']) == (3, 5)
  for record, steps in ((first, [0, 1, 2]), (second, [3, 4])):
    np.testing.assert_allclose(record['train/loss'], np.mean([sums[i]['loss'] for i in steps]) / 2)
    np.testing.assert_allclose(
        record['train/gradient_norm'], np.mean([sums[i]['gradient_norm'] for i in steps])
    )
    assert record['train/steps_per_second'] > 0
    for name, of in (
        ('train', steps),
        ('train/even', [i for i in steps if i % 2 == 0]),
        ('train/odd', [i for i in steps if i % 2]),
    ):
      tokens = sum(sums[i]['tokens'] for i in of)
      for key, metric in (
          ('loss_per_token', 'token_loss'),
          ('z_loss_per_token', 'token_z_loss'),
          ('token_accuracy', 'right_tokens'),
      ):
        np.testing.assert_allclose(
            record[f'{name}/{key}'], sum(sums[i][metric] for i in of) / tokens, rtol=1e-6
        )


def test_a_run_asked_for_fewer_steps_than_it_has_says_so(tmp_path):
  finished = _run(tmp_path, 5)
  with pytest.warns(UserWarning, match='a run of 5 steps already, more than the 3 asked for'):
    again = _run(tmp_path, 3)
  assert_same_trees(again, finished)


def test_the_progress_line_shows_rate_loss_and_time_left(tmp_path, capsys):
  _run(tmp_path, 3, log_period=1, progress=True)
  line = capsys.readouterr().err.split('\r')[-1]
  assert '3/3' in line and 'step' in line and 'loss ' in line and '/token' in line and '<' in line


def test_states_know_what_they_belong_to(tmp_path):
  _run(tmp_path, 1, description={'task': 'cb', 'placement': 'prefix'})
  saver = StateSaver(tmp_path)
  assert saver.description(saver.latest()) == {'task': 'cb', 'placement': 'prefix'}
