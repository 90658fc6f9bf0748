"""A trial inside a batch of K is the same trial alone."""

import dataclasses
import functools
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from prompt_tuning_jax import partitioning
from prompt_tuning_jax.data.batches import TrainBatches
from prompt_tuning_jax.data.cache import load_task_or_mixture
from prompt_tuning_jax.data.trial_batches import TrialBatches
from prompt_tuning_jax.initializers import sampled_vocab, uniform
from prompt_tuning_jax.methods.combined import Combined, InDecoder
from prompt_tuning_jax.methods.layer_prompt import LayerPrompt
from prompt_tuning_jax.methods.p_tuning import PTuning
from prompt_tuning_jax.methods.prefix import Prefix
from prompt_tuning_jax.methods.soft_prompt import SoftPrompt
from prompt_tuning_jax.training.losses import NORMALIZATIONS, LossConfig
from prompt_tuning_jax.training.optimizers import adafactor, adamw
from prompt_tuning_jax.training.parameters import RunParameters
from prompt_tuning_jax.training.step import make_train_step
from prompt_tuning_jax.training.trials import Trial, Trials, make_trials_step
from tests.conftest import assert_close
from tests.training.conftest import FEATURE_LENGTHS

BATCH_SIZE = 8


def trials_of(backbone):
  """They differ in length, start, seed, optimiser and the method's own parameters."""
  return [
      Trial(SoftPrompt(4), adafactor(0.03), seed=0),
      Trial(SoftPrompt(1), adafactor(0.03), seed=1),
      Trial(SoftPrompt(4, sampled_vocab(backbone)), adafactor(0.03), seed=2),
      Trial(SoftPrompt(4, uniform(0.1)), {'prompt': adafactor(0.01)}, seed=0),
      Trial(PTuning(3, lstm_layers=0, mlp_widths=(8,)), adamw(1e-3), seed=3),
  ]


@pytest.fixture
def tasks(backbone, cache_dir):
  return load_task_or_mixture('which_animal', 'train', backbone.vocabulary, cache_dir=cache_dir)


@pytest.fixture
def backbone(random_backbone):
  return random_backbone


def batches_of(trial, tasks, backbone, **how):
  return TrainBatches(
      tasks,
      BATCH_SIZE,
      feature_lengths=FEATURE_LENGTHS,
      vocab_size=backbone.spec.vocab_size,
      num_virtual_tokens=trial.method.num_virtual_tokens,
      num_decoder_virtual_tokens=trial.method.num_decoder_virtual_tokens,
      seed=trial.seed,
      **how,
  )


def together(chosen, tasks, backbone, steps, mesh=None, split=MappingProxyType({}), **how):
  """The metrics of each step, the last state, and the Trials."""
  trials = Trials(chosen, backbone.spec)
  batches = TrialBatches(
      [batches_of(trial, tasks, backbone) for trial in chosen],
      vocab_size=backbone.spec.vocab_size,
      num_virtual_tokens=trials.num_virtual_tokens,
      num_decoder_virtual_tokens=trials.num_decoder_virtual_tokens,
      feature_lengths=FEATURE_LENGTHS,
      row_multiple=partitioning.count_of_parts(mesh),
      **split,
  )
  step = make_trials_step(trials, backbone.module, microbatches=batches.microbatches, **how)
  state, metrics = trials.placed_state(mesh), []
  placed = partitioning.PlacedBatches(batches, mesh)
  for number in range(steps):
    state, of_step = step(state, {'backbone': backbone.params}, placed[number])
    metrics.append(jax.device_get(of_step))
  assert step._cache_size() == 1
  return metrics, state, trials


def alone(trial, tasks, backbone, steps, loss=LossConfig()):
  parameters = RunParameters.of(backbone, trial.method, trial.trainable, seed=trial.seed)
  step = make_train_step(trial.method, backbone.module, parameters.tx, loss=loss)
  state, metrics = parameters.placed_state(), []
  batches = batches_of(trial, tasks, backbone)
  for number in range(steps):
    state, of_step = step(state, parameters.frozen, batches[number])
    metrics.append(jax.device_get(of_step))
  return metrics, state


def assert_same_run(metrics, number, expected):
  for name in ('loss', 'token_loss', 'tokens', 'right_tokens', 'gradient_norm'):
    found = [of_step['trials'][name][number] for of_step in metrics]
    np.testing.assert_allclose(found, [m[name] for m in expected], rtol=1e-4, err_msg=name)
  losses = [m['trials']['token_loss'][number] / m['trials']['tokens'][number] for m in metrics]
  np.testing.assert_allclose(losses, [m['token_loss'] / m['tokens'] for m in expected], rtol=1e-5)


@pytest.mark.slow
def test_each_trial_is_the_run_alone_over_50_steps(backbone, tasks):
  # By plain gradients: what divides them by their size makes steps of rounding alone.
  rates = (1e-4, 3e-4, 1e-4, 3e-5, 1e-4)
  chosen = [
      dataclasses.replace(trial, trainable=optax.sgd(rate, momentum=0.9))
      for trial, rate in zip(trials_of(backbone), rates, strict=True)
  ]
  metrics, state, trials = together(chosen, tasks, backbone, 50)
  for number, trial in enumerate(chosen):
    expected, last = alone(trial, tasks, backbone, 50)
    assert_same_run(metrics, number, expected)
    jax.tree.map(
        functools.partial(assert_close, relative=1e-4),
        trials.params_of(state.trainable, number),
        last.trainable,
    )


@pytest.mark.parametrize('factor', [*NORMALIZATIONS, 7.0])
def test_the_loss_of_each_is_normalised_by_itself(backbone, tasks, factor):
  chosen = trials_of(backbone)[:3]
  loss = LossConfig(normalizing_factor=factor)
  of_rows = loss.of_rows(BATCH_SIZE, FEATURE_LENGTHS['targets'])
  metrics, _, _ = together(chosen, tasks, backbone, 3, loss=of_rows)
  for number, trial in enumerate(chosen):
    assert_same_run(metrics, number, alone(trial, tasks, backbone, 3, loss)[0])


def test_microbatches_and_a_mesh_change_nothing(backbone, tasks):
  chosen = trials_of(backbone)
  expected, _, _ = together(chosen, tasks, backbone, 4)
  for how in (
      {'split': {'at_once': 1}},
      {'split': {'microbatches': 2}},
      {'mesh': partitioning.make_mesh()},
  ):
    found, _, _ = together(chosen, tasks, backbone, 4, **how)
    for one, other in zip(found, expected):
      jax.tree.map(functools.partial(assert_close, relative=1e-4), one, other)


def test_what_trains_is_counted_without_drawing_it(backbone):
  trials = Trials(trials_of(backbone), backbone.spec)
  state = trials.placed_state(None)
  held = jax.tree.leaves((state.trainable, state.opt_state))
  assert trials.state_bytes == sum(leaf.nbytes for leaf in held)



def test_a_step_needs_the_memory_of_the_runs_at_once(backbone, tasks):
  trials = Trials([Trial(SoftPrompt(4), adafactor(0.03), seed=n) for n in range(6)], backbone.spec)
  needed = {}
  for at_once in (1, 3, 6):
    batches = TrialBatches(
        [batches_of(trial, tasks, backbone) for trial in trials_of(backbone)[:1] * 6],
        vocab_size=backbone.spec.vocab_size,
        num_virtual_tokens=4,
        feature_lengths=FEATURE_LENGTHS,
        at_once=at_once,
    )
    assert batches.microbatches == (6 // at_once,)
    step = make_trials_step(trials, backbone.module, microbatches=batches.microbatches)
    lowered = step.lower(trials.placed_state(None), {'backbone': backbone.params}, batches[0])
    needed[at_once] = lowered.compile().memory_analysis().temp_size_in_bytes
  assert needed[1] < needed[3] / 2 < needed[6] / 3


@pytest.mark.parametrize(
    'make',
    [
        lambda: InDecoder(SoftPrompt(2)),
        lambda: Prefix(2, hidden=None),
        lambda: Combined([SoftPrompt(3), Prefix(2, hidden=4)]),
        lambda: LayerPrompt(2),
    ],
)
def test_prompts_of_other_kinds_are_each_trial_s_own(backbone, tasks, make):
  chosen = [Trial(make(), adamw(1e-2), seed=0), Trial(make(), adamw(1e-3), seed=1)]
  metrics, _, _ = together(chosen, tasks, backbone, 4)
  for number, trial in enumerate(chosen):
    assert_same_run(metrics, number, alone(trial, tasks, backbone, 4)[0])


def test_a_trial_that_goes_out_of_bounds_stops_alone(backbone, tasks):
  rate = lambda step: jnp.where(step < 3, 0.1, jnp.nan)
  good, bad = trials_of(backbone)[0], Trial(SoftPrompt(4), adafactor(rate), seed=5)
  metrics, state, trials = together([bad, good], tasks, backbone, 6)
  expected, last = alone(good, tasks, backbone, 6)
  assert_same_run(metrics, 1, expected)
  stopped_at = np.asarray(state.stopped_at)
  assert stopped_at.tolist() == [4, -1]
  # What is kept is finite: the state before that step.
  kept = trials.params_of(state.trainable, 0)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(kept))
  assert all(np.isfinite(m['loss']) for m in metrics)
  # What all do together is what the one that is left does.
  assert_close(metrics[-1]['loss'], expected[-1]['loss'], 1e-5)


def test_every_batch_holds_each_trial_s_examples_in_rows_of_its_own(backbone, tasks):
  chosen = trials_of(backbone)
  of_trials = [batches_of(trial, tasks, backbone) for trial in chosen]
  length = 4
  how = dict(
      vocab_size=backbone.spec.vocab_size,
      num_virtual_tokens=length,
      feature_lengths=FEATURE_LENGTHS,
  )
  batches = TrialBatches(of_trials, **how)
  parts = [TrialBatches(of_trials, **how, process_index=i, process_count=2) for i in range(2)]
  for number in range(3):
    sections = batches[number]
    joined = jax.tree.map(
        lambda *x: np.concatenate(x), *(part[number] for part in parts)
    )
    jax.tree.map(np.testing.assert_array_equal, joined, TrialBatches(
        of_trials, **how, row_multiple=2)[number])  # fmt: skip
    for trial, of_trial in enumerate(of_trials):
      (batch,) = (batch for batch in sections if trial in batch.prompt_ids)
      rows = batch.prompt_ids == trial
      tokens = batch.encoder_input_tokens[rows]
      virtual = tokens[tokens >= backbone.spec.vocab_size] - backbone.spec.vocab_size
      assert set(virtual // length) == {trial}
      count = chosen[trial].method.num_virtual_tokens
      assert set(virtual % length) == set(range(count)) and len(virtual) == BATCH_SIZE * count
      ordinary = np.sort(tokens[(tokens < backbone.spec.vocab_size) & (tokens > 0)])
      expected = of_trial[number].encoder_input_tokens
      expected = np.sort(expected[(expected < backbone.spec.vocab_size) & (expected > 0)])
      np.testing.assert_array_equal(ordinary, expected)


def test_what_is_more_than_a_prompt_is_refused(backbone):
  with pytest.raises(ValueError, match="Trial 0 cannot share a program: it trains 'backbone'"):
    both = {'prompt': adafactor(), 'backbone': adamw(1e-3)}
    Trials([Trial(SoftPrompt(2), both)], backbone.spec)
