"""`train`: tune a prompt (or a model) on a task, from a backbone to an artifact."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from prompt_tuning_jax import artifact
from prompt_tuning_jax.backbones.backbone import Backbone
from prompt_tuning_jax.checkpoints import native
from prompt_tuning_jax.checkpoints.load import load_backbone
from prompt_tuning_jax.data.batches import TrainBatches
from prompt_tuning_jax.data.cache import DEFAULT_TASK_MODULE, load_task_or_mixture
from prompt_tuning_jax.data.virtual_tokens import Placement, as_placement
from prompt_tuning_jax.evaluation.evaluate import Evaluator
from prompt_tuning_jax.training import loop
from prompt_tuning_jax.training import model_dir as model_dir_lib
from prompt_tuning_jax.training import trainable as trainable_lib
from prompt_tuning_jax.training.losses import LossConfig
from prompt_tuning_jax.training.optimizers import adafactor
from prompt_tuning_jax.training.state_saving import StateSaver
from prompt_tuning_jax.training.step import TrainState, make_train_step
from prompt_tuning_jax.typing import Injection, PyTree



@dataclasses.dataclass(frozen=True)
class TrainResult:
  """What a finished run leaves behind.

  Attributes:
    path: the artifact (a prompt was tuned) or the backbone's folder (a model was).
    step: the step it is from: the best by the chosen metric, else the last.
    metrics: validation metrics at that step.
    prompt: the artifact as loaded; None where only a model was tuned.
    params: parameters of that step that trained, `{'prompt': …}` and/or `{'backbone': …}`.
  """

  path: str
  step: int
  metrics: dict[str, float]
  prompt: artifact.Prompt | None
  params: PyTree


def train(
    *,
    backbone: Backbone | str,
    task: str,
    model_dir: str,
    train_steps: int,
    method: nn.Module | None = None,
    trainable: optax.GradientTransformation | trainable_lib.Labelling | None = None,
    batch_size: int = 32,
    feature_lengths: Mapping[str, int] | None = None,
    placement: Placement | str = 'prefix',
    lengths: str = 'pad',
    loss: LossConfig = LossConfig(),
    microbatches: int = 1,
    dropout_rate: float = 0.0,
    random_seed: int = 0,
    eval_task: str | None = None,
    eval_split: str = 'validation',
    eval_method: str = 'rank',
    eval_batch_size: int | None = None,
    eval_period: int = 0,
    checkpoint_period: int = 0,
    keep_checkpoints: int = 1,
    best_metric: str | None = None,
    best_mode: str = 'max',
    log_period: int = 50,
    task_module: str = DEFAULT_TASK_MODULE,
    tfds_data_dir: str | None = None,
    cache_dir: str | None = None,
    created_by: str = 'prompt_tuning_jax.train',
    progress: bool = True,
    dry_run: bool = False,
) -> TrainResult | None:
  """Trains what `trainable` labels, on a task; run again, it resumes where it stopped.

  Args:
    backbone: a loaded backbone, or the name or folder of one.
    task: name of a seqio task or mixture.
    model_dir: folder of the run: states, metrics, and at the end `prompt.safetensors`.
    train_steps: optimiser updates in all.
    method: the prompt method; None tunes the model itself.
    trainable: an optimiser for the prompt (for the backbone where there is no method),
      or a labelling of the parameter tree (`training/trainable.py`). Default: Adafactor
      as in the paper.
    batch_size: rows of a batch.
    feature_lengths: longest inputs and targets in tokens; the prompt comes on top.
      Default {'inputs': 512, 'targets': 8}.
    placement: where the virtual tokens stand among an example's tokens.
    lengths: 'pad' to the feature lengths, or 'bucket' to a few shorter ones.
    loss: z-loss, label smoothing, normalisation.
    microbatches: parts of each batch, computed one after the other to save memory.
    dropout_rate: of the frozen model during training; the original code keeps T5's 0.1.
    random_seed: of the prompt's initialisation, the data order and dropout.
    eval_task: the task to evaluate on; `task` where None.
    eval_split: its split.
    eval_method: 'rank' the label words where the task has them, or 'generate'.
    eval_batch_size: rows of an evaluation batch; `batch_size` where None.
    eval_period: steps between evaluations; 0 evaluates at the end only.
    checkpoint_period: steps between saved states beyond those at evaluations.
    keep_checkpoints: how many of the newest states stay; the best stays too.
    best_metric: metric by which the best state is kept and exported; None takes the last.
      With several evaluation tasks, `<task>/<metric>`.
    best_mode: 'max' or 'min'.
    log_period: steps between records of the training loss.
    task_module: module whose import registers the task.
    tfds_data_dir: folder of TensorFlow Datasets.
    cache_dir: folder of the tokenised tasks.
    created_by: the command, for the artifact's manifest.
    progress: whether to show the progress line.
    dry_run: print what would be done, load no weights, and return None.

  Returns:
    The best step's artifact and metrics, or None after a dry run.

  Raises:
    ValueError: if the parts do not fit together; the message names the one to change.
    FloatingPointError: if the loss is not finite; the last good state stays saved.
    training.loop.Interrupted: after SIGTERM or SIGINT, once the state is saved.
  """
  if not isinstance(backbone, Backbone):
    backbone = load_backbone(backbone)
  feature_lengths = dict(feature_lengths or {'inputs': 512, 'targets': 8})
  placement = as_placement(placement)
  subject = 'backbone' if method is None else 'prompt'
  if trainable is None:
    trainable = adafactor(0.001 if method is None else 0.3)
  labelling = trainable if isinstance(trainable, Mapping) else {subject: trainable}
  num_virtual_tokens = method.num_virtual_tokens if method is not None else 0
  description = {
      'backbone': backbone.name,
      'method': describe_method(method),
      'trainable': sorted(labelling),
      'task': task,
      'batch_size': batch_size,
      'feature_lengths': feature_lengths,
      'placement': placement.description,
      'lengths': lengths,
      'loss': dataclasses.asdict(loss),
      'dropout_rate': dropout_rate,
      'random_seed': random_seed,
  }
  if dry_run:
    print(_summary(backbone, description, train_steps))
    return None

  load = dict(
      task_module=task_module, tfds_data_dir=tfds_data_dir, cache_dir=cache_dir
  )
  batches = TrainBatches(
      load_task_or_mixture(task, 'train', backbone.vocabulary, **load),
      batch_size,
      feature_lengths=feature_lengths,
      vocab_size=backbone.spec.vocab_size,
      num_virtual_tokens=num_virtual_tokens,
      placement=placement,
      seed=random_seed,
      lengths=lengths,
  )
  evaluators = [
      Evaluator(
          backbone,
          of_task,
          batch_size=eval_batch_size or batch_size,
          feature_lengths=feature_lengths,
          placement=placement,
          num_virtual_tokens=num_virtual_tokens,
          method=eval_method,
          lengths=lengths,
      )
      for of_task, _ in load_task_or_mixture(
          eval_task or task, eval_split, backbone.vocabulary, **load
      )
  ]
  params: dict[str, PyTree] = {'backbone': backbone.params}
  if method is not None:
    key = jax.random.key(random_seed)
    params['prompt'] = method.init(key, backbone.spec)['params']
  start, frozen = trainable_lib.split(params, labelling)
  # The step donates its state; the backbone that the caller holds keeps its weights.
  start = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), start)
  tx = trainable_lib.make_optimizer(labelling, start)
  module = backbone.module.clone(dropout_rate=dropout_rate)
  description['backbone_fingerprint'] = backbone.fingerprint
  if progress:
    print(_summary(backbone, description, train_steps, start), file=sys.stderr)

  def evaluate(state: TrainState) -> dict[str, float]:
    results = [
        evaluator(*_parts(method, backbone, state.trainable, frozen))
        for evaluator in evaluators
    ]
    if len(results) == 1:
      return dict(results[0].metrics)
    return {
        f'{evaluator.task.name}/{name}': value
        for evaluator, result in zip(evaluators, results)
        for name, value in result.metrics.items()
    }

  saver = StateSaver(
      model_dir, keep=keep_checkpoints, best_metric=best_metric, best_mode=best_mode
  )
  with model_dir_lib.ModelDir(model_dir, description):
    state = TrainState.create(start, tx)
    loop.run(
        state,
        frozen,
        make_train_step(
            method, module, tx, loss=loss, microbatches=microbatches, seed=random_seed
        ),
        batches,
        loop.LoopConfig(train_steps, log_period, eval_period, checkpoint_period),
        saver=saver,
        evaluate=evaluate,
        description=description,
        progress=progress,
    )
    chosen = saver.best() or saver.latest()
    template = jax.eval_shape(lambda tree: TrainState.create(tree, tx), start)
    state, _ = saver.restore(template, chosen)
    injection, backbone_params = _parts(method, backbone, state.trainable, frozen)
    if method is None:
      path = os.path.join(model_dir, 'backbone')
      native.save_backbone(
          path,
          backbone.module.config,
          backbone_params,
          backbone.vocabulary,
          dtype='float32',
          metadata={**description, 'step': chosen.step, 'metrics': chosen.metrics},
      )
      return TrainResult(path, chosen.step, chosen.metrics, None, state.trainable)
    path = os.path.join(model_dir, 'prompt.safetensors')
    prompt = artifact.save_prompt(
        path,
        injection,
        backbone=backbone,
        method=type(method).__name__,
        num_virtual_tokens=num_virtual_tokens,
        placement=placement.description,
        task=task,
        feature_lengths=feature_lengths,
        metrics=chosen.metrics,
        step=chosen.step,
        created_by=created_by,
    )
  return TrainResult(path, chosen.step, chosen.metrics, prompt, state.trainable)


def _parts(
    method: nn.Module | None, backbone: Backbone, trained: PyTree, frozen: PyTree
) -> tuple[Injection | None, PyTree]:
  """What inference needs of a state: the folded Injection and the backbone's weights."""
  params = trainable_lib.merge(trained, frozen)
  if method is None:
    return None, params['backbone']
  return method.apply({'params': params['prompt']}, backbone.spec), params['backbone']


def describe_method(method: nn.Module | None) -> dict[str, Any] | None:
  """A method's class and settings as JSON values; functions by their names."""
  if method is None:
    return None
  settings: dict[str, Any] = {'class': type(method).__name__}
  for field in dataclasses.fields(method):
    if field.name in ('parent', 'name'):
      continue
    value = getattr(method, field.name)
    settings[field.name] = getattr(value, '__qualname__', value).__str__()
  return settings


def _summary(
    backbone: Backbone,
    description: Mapping[str, Any],
    train_steps: int,
    trained: PyTree | None = None,
) -> str:
  lengths = description['feature_lengths']
  lines = [
      f'backbone   {backbone!r}',
      f'method     {description["method"] or "none: the model itself is tuned"}',
      f'task       {description["task"]}, inputs {lengths["inputs"]}, '
      f'targets {lengths["targets"]} tokens',
      f'training   {train_steps:,} steps of {description["batch_size"]} examples, seed '
      f'{description["random_seed"]}, dropout {description["dropout_rate"]}',
  ]
  if trained is not None:
    count, total = trainable_lib.count(trained), backbone.num_params
    share = 100 * count / total
    lines.append(f'trainable  {count:,} of {total:,} parameters ({share:.3g} %)')
  return '\n'.join(lines)
