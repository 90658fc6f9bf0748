"""Training several runs at once: what `train` does for one, for the trials of a program."""

from __future__ import annotations

import inspect
import itertools
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from prompt_tuning_jax import partitioning, plan
from prompt_tuning_jax.backbones.backbone import Backbone
from prompt_tuning_jax.data.batches import TrainBatches
from prompt_tuning_jax.data.cache import describe_data, load_task_or_mixture
from prompt_tuning_jax.data.trial_batches import TrialBatches
from prompt_tuning_jax.data.virtual_tokens import as_placement
from prompt_tuning_jax.evaluation.evaluator import Evaluator
from prompt_tuning_jax.export import write_outcome
from prompt_tuning_jax.injection_stack import structure
from prompt_tuning_jax.methods import method as method_lib
from prompt_tuning_jax.prompt_files import load_prompt
from prompt_tuning_jax.training import loop
from prompt_tuning_jax.training.description import describe
from prompt_tuning_jax.training.model_dir import ModelDir
from prompt_tuning_jax.training.optimizers import default_optimizer
from prompt_tuning_jax.training.parameters import placement_of, places_of
from prompt_tuning_jax.training.run_evaluation import RunEvaluation
from prompt_tuning_jax.training.state_saving import Saved, StateSaver
from prompt_tuning_jax.training.train import train
from prompt_tuning_jax.training.trials import (
    Trial,
    Trials,
    TrialsState,
    make_trials_step,
    why_alone,
)
from prompt_tuning_jax.typing import Injection

# Arguments of `train` in which the runs of one program may differ.
OWN = ('method', 'trainable', 'random_seed')
# Those that say nothing of what is trained.
ASIDE = (
    'model_dir', 'created_by', 'progress', 'cache_dir', 'tfds_data_dir', 'eval_batch_size',
    'log_period', 'checkpoint_period', 'keep_checkpoints',
)  # fmt: skip


def completed(arguments: Mapping[str, Any]) -> dict[str, Any]:
  """Arguments of `train` with the defaults of the others.

  Raises:
    ValueError: if one is not known, or one is missing.
  """
  try:
    bound = inspect.signature(train).bind(**{'model_dir': '', **arguments})
  except TypeError as error:
    raise ValueError(f'A run of the sweep cannot be trained: {error}.') from error
  bound.apply_defaults()
  values = bound.arguments
  values['feature_lengths'] = dict(values['feature_lengths'] or {'inputs': 512, 'targets': 8})
  values['placement'] = as_placement(values['placement'])
  if values['trainable'] is None:
    values['trainable'] = default_optimizer(values['method'])
  return dict(values)


def shared_key(arguments: Mapping[str, Any]) -> Any:
  """What runs must have in common to share a program, besides the backbone; None for one alone.

  No weights are read for it.
  """
  values = completed(arguments)
  if why_alone(values['method'], values['trainable']):
    return None
  shared = {n: value for n, value in values.items() if n not in (*OWN, *ASIDE, 'backbone')}
  _, injection = method_lib.shapes(values['method'], values['backbone'].spec)
  return [describe(shared), structure(injection)]


def described(runs: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
  """What the runs of a program have in common, and each by itself."""
  return {
      'shared': shared_key(runs[0]),
      'trials': {
          name: describe({key: one[key] for key in OWN})
          for name, one in zip(names, map(completed, runs), strict=True)
      },
  }


class AllOutOfBounds(FloatingPointError):
  """None of the runs goes on.

  Attributes:
    stopped_at: of each the step at which its loss, gradient or prompt was not finite.
  """

  def __init__(self, names: Sequence[str], stopped_at: Sequence[int]):
    super().__init__(
        f'All {len(names)} runs went out of bounds, the last of them at step {max(stopped_at)}: '
        'their losses, gradients or prompts are not finite. Start again in another MODEL_DIR '
        'with lower learning rates.'
    )
    self.stopped_at = stopped_at


class _Best:
  """The best state of each trial, by a metric or as the last; what it held is written at once."""

  def __init__(
      self, metric: str | None, mode: str, write: Callable[[int, Saved, Injection], None]
  ):
    self._metric = metric
    self._sign = 1.0 if mode == 'max' else -1.0
    self._write = write
    self.of_trial: dict[int, Saved] = {}

  def see(self, number: int, saved: Saved, injection: Injection) -> None:
    """Takes a state of a trial and what it holds."""
    before = self.of_trial.get(number)
    if self._metric is not None and before is not None and before.step != saved.step:
      values = [self._sign * one.metrics[self._metric] for one in (before, saved)]
      # As of states of one run: the later one where two are equal; NaN is never better.
      if not values[1] >= values[0] and math.isfinite(values[0]):
        return
    self.of_trial[number] = saved
    self._write(number, saved, injection)


def train_together(
    runs: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    *,
    model_dir: str,
    prompt_paths: Sequence[str],
    created_by: str = 'prompt_tuning_jax.sweep',
    progress: bool = True,
) -> list[dict[str, Any]]:
  """Trains runs that can share a program, and writes the prompt of each.

  Run again, it goes on where it stopped.

  Args:
    runs: arguments of `train` for each, without model_dir; they differ in `OWN` alone.
    names: what the runs are called in metrics.
    model_dir: folder of their common states and metrics.
    prompt_paths: where the artifact of each run goes.
    created_by: the command, for the artifacts' manifests.
    progress: whether to show the progress line.

  Returns:
    For each run its best `step`, the `metrics` there, and `stopped_at`: the step at which it
    went out of bounds, None where it did not. Of a run that did before it was measured, the
    step is None, and it leaves no prompt.

  Raises:
    ValueError, OSError, MemoryError, training.loop.Interrupted: as `train`.
  """
  values = [completed(arguments) for arguments in runs]
  shared = values[0]
  backbone: Backbone = shared['backbone']
  longest = max(values, key=lambda one: one['method'].num_virtual_tokens)
  method = longest['method']
  partitioning.check_batch(
      backbone.mesh, shared['batch_size'], shared['microbatches'], 'BATCH_SIZE={}'
  )
  trials = Trials(
      [Trial(one['method'], one['trainable'], one['random_seed']) for one in values],
      backbone.spec,
  )
  planned = {
      'backbone': backbone,
      'method': method,
      'trainable': longest['trainable'],
      'lengths': 'pack',
      **{
          name: shared[name]
          for name in ('feature_lengths', 'packed_length', 'microbatches', 'dropout_rate')
      },
  }
  at_once = runs_at_once(len(runs), shared['batch_size'], trials.state_bytes, planned)
  plan.check_memory(batch_size=at_once * shared['batch_size'], **planned)
  saver = StateSaver(model_dir, keep=shared['keep_checkpoints'])
  periods = loop.LoopConfig(
      shared['train_steps'],
      shared['log_period'],
      shared['eval_period'],
      shared['checkpoint_period'],
  )
  with ModelDir(model_dir) as folder:
    description = backbone.description() | described(runs, names)
    folder.claim(description)
    load = {
        name: shared[name]
        for name in ('task_module', 'tfds_data_dir', 'cache_dir', 'target_prefix')
    }
    tasks = load_task_or_mixture(shared['task'], 'train', backbone.vocabulary, **load)
    batches = _batches(values, tasks, trials, backbone, at_once)
    description |= describe_data(shared['task'], tasks)
    if shared['dropout_rate'] or trials.have_dropout:
      # Each part of a batch has masks of its own.
      description['microbatches'] = batches.microbatches
    folder.claim(description)
    evaluations = _evaluations(values, backbone, load)
    evaluations[0].check_metric(shared['best_metric'])

    def write(number: int, saved: Saved, injection: Injection) -> None:
      write_outcome(
          injection,
          backbone.params,
          backbone=backbone,
          method=values[number]['method'],
          saved=saved,
          description={
              'placement': shared['placement'].description,
              'task': shared['task'] if isinstance(shared['task'], str) else shared['task'].name,
              'feature_lengths': shared['feature_lengths'],
              'target_prefix': shared['target_prefix'] or '',
              'weights': backbone.held_as,
          },
          prompt_path=prompt_paths[number],
          backbone_path=None,
          created_by=created_by,
      )

    best = _Best(shared['best_metric'], shared['best_mode'], write)
    if (restored := saver.latest()) is not None:
      _recall(best, prompt_paths, restored.step)

    def evaluate(state: TrialsState) -> dict[str, float]:
      found = {}
      step = int(state.step)
      stopped_at = jax.device_get(state.stopped_at)
      for number, name in enumerate(names):
        if stopped_at[number] >= 0:
          continue  # What was measured before counts, if anything.
        injection = trials.injection_of(state.trainable, number)
        metrics = evaluations[number](injection)
        best.see(number, Saved(step, model_dir, metrics), injection)
        found |= {f'{name}/{metric}': value for metric, value in metrics.items()}
      return found

    loss = shared['loss'].of_rows(
        shared['batch_size'],
        shared['feature_lengths']['targets'] + method.num_decoder_virtual_tokens,
    )
    template = places_of(trials.placed_state(backbone.mesh))
    step_fn = make_trials_step(
        trials,
        backbone.module.clone(dropout_rate=shared['dropout_rate']),
        loss=loss,
        microbatches=batches.microbatches,
        seed=shared['random_seed'],
        placement=placement_of(template, backbone.mesh),
    )
    try:
      with partitioning.on(backbone.mesh):
        state = loop.run(
            lambda: trials.placed_state(backbone.mesh),
            {'backbone': backbone.params},
            step_fn,
            partitioning.PlacedBatches(batches, backbone.mesh),
            periods,
            saver=saver,
            template=template,
            evaluate=evaluate,
            summarize=lambda steps: _summary(names, steps),
            description={'backbone': backbone.name, **description},
            progress=progress,
        )
      stopped_at = jax.device_get(state.stopped_at)
    except AllOutOfBounds as error:
      warnings.warn(str(error), stacklevel=2)
      stopped_at = error.stopped_at
    return [
        {
            'step': saved and saved.step,
            'metrics': saved.metrics if saved else {},
            'stopped_at': int(at) if at >= 0 else None,
        }
        for at, saved in zip(stopped_at, map(best.of_trial.get, range(len(runs))))
    ]


def runs_at_once(runs: int, batch_size: int, state: int, planned: Mapping[str, Any]) -> int:
  """How many runs' rows a step computes at once; it takes the others after them.

  As many as the devices have memory for: larger products keep an accelerator busy. On a CPU they
  are no faster, so that it is one, and a step needs no more memory than that of a run alone.

  Args:
    runs: how many train together.
    batch_size: examples of a batch of each.
    state: bytes of what trains in all of them, and of its optimisers.
    planned: what `plan` takes of the run with the longest prompt, but for its batch.
  """
  if jax.default_backend() == 'cpu':
    return 1

  def fits(count: int) -> bool:
    found = plan.plan_here(batch_size=count * batch_size, advise=False, **planned)
    # It counts the state of one run.
    return found.total - found.state + state <= found.target.usable

  halves = itertools.takewhile(lambda n: n > 1, (-(-runs // 2**n) for n in itertools.count()))
  return next(filter(fits, halves), 1)


def _batches(
    values, tasks, trials: Trials, backbone: Backbone, at_once: int
) -> TrialBatches:
  shared = values[0]
  made: dict[tuple[int, int], TrainBatches] = {}
  of_trials = []
  for one in values:
    key = one['random_seed'], one['method'].num_virtual_tokens
    if key not in made:
      made[key] = TrainBatches(
          tasks,
          shared['batch_size'],
          feature_lengths=shared['feature_lengths'],
          vocab_size=backbone.spec.vocab_size,
          num_virtual_tokens=one['method'].num_virtual_tokens,
          num_decoder_virtual_tokens=one['method'].num_decoder_virtual_tokens,
          placement=shared['placement'],
          seed=one['random_seed'],
      )
    of_trials.append(made[key])
  share, shares = partitioning.data_share(backbone.mesh)
  return TrialBatches(
      of_trials,
      vocab_size=backbone.spec.vocab_size,
      num_virtual_tokens=trials.num_virtual_tokens,
      num_decoder_virtual_tokens=trials.num_decoder_virtual_tokens,
      feature_lengths=shared['feature_lengths'],
      packed_length=shared['packed_length'],
      at_once=at_once,
      microbatches=shared['microbatches'],
      row_multiple=partitioning.count_of_parts(backbone.mesh),
      process_index=share,
      process_count=shares,
  )


def _evaluations(values, backbone: Backbone, load) -> list[RunEvaluation]:
  """What measures each trial, which those with prompts of the same length share."""
  shared = values[0]
  eval_task = shared['eval_task'] or shared['task']
  tasks = load_task_or_mixture(eval_task, shared['eval_split'], backbone.vocabulary, **load)
  made: dict[int, RunEvaluation] = {}
  for one in values:
    method = one['method']
    if method.num_virtual_tokens not in made:
      made[method.num_virtual_tokens] = RunEvaluation(
          Evaluator(
              backbone,
              task,
              batch_size=shared['eval_batch_size'] or shared['batch_size'],
              method=shared['eval_method'],
              decoding=shared['decoding'],
              feature_lengths=shared['feature_lengths'],
              placement=shared['placement'],
              num_virtual_tokens=method.num_virtual_tokens,
              num_decoder_virtual_tokens=method.num_decoder_virtual_tokens,
              lengths=shared['lengths'],
              progress=False,
          )
          for task, _ in tasks
      )
  return [made[one['method'].num_virtual_tokens] for one in values]


def _recall(best: _Best, prompt_paths: Sequence[str], step: int) -> None:
  """The best states up to a step that an earlier start of the same runs left as artifacts.

  What lies there without a state of these runs is of others, and later ones come again.
  """
  for number, path in enumerate(prompt_paths):
    if os.path.exists(path) and (manifest := load_prompt(path).manifest).step <= step:
      best.of_trial[number] = Saved(manifest.step, path, dict(manifest.metrics))


def _summary(names: Sequence[str], steps: Sequence[Mapping[str, Any]]) -> dict[str, float]:
  """What is logged of several steps: of all trials together, and of each that goes on."""
  summary = loop.summary_of(steps)
  going = [number for number, at in enumerate(steps[-1]['stopped_at']) if at < 0]
  if not going:
    raise AllOutOfBounds(names, steps[-1]['stopped_at'])
  for number in going:
    of_trial = [
        {name: values[number] for name, values in metrics['trials'].items()} for metrics in steps
    ]
    summary |= loop.per_token(f'{names[number]}/train', of_trial)
  return summary
