"""`train`: tune a prompt (or a model) on a task, from a backbone to an artifact."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping
from typing import Any

import optax

from prompt_tuning_jax import artifact, partitioning, plan, processes
from prompt_tuning_jax.backbones.backbone import Backbone
from prompt_tuning_jax.checkpoints.load import load_backbone
from prompt_tuning_jax.data.batches import TrainBatches
from prompt_tuning_jax.data.cache import (
    DEFAULT_TASK_MODULE,
    describe_data,
    load_task_or_mixture,
)
from prompt_tuning_jax.data.file_task import FileTask, describe_task
from prompt_tuning_jax.data.virtual_tokens import Placement, as_placement
from prompt_tuning_jax.evaluation.decoding import Decoding
from prompt_tuning_jax.evaluation.evaluate import Evaluator
from prompt_tuning_jax.export import write_outcome
from prompt_tuning_jax.methods import method as method_lib
from prompt_tuning_jax.methods.method import Method
from prompt_tuning_jax.training import loop
from prompt_tuning_jax.training import trainable as trainable_lib
from prompt_tuning_jax.training.description import describe
from prompt_tuning_jax.training.losses import LossConfig
from prompt_tuning_jax.training.model_dir import ModelDir
from prompt_tuning_jax.training.optimizers import default_optimizer
from prompt_tuning_jax.training.parameters import RunParameters
from prompt_tuning_jax.training.run_evaluation import RunEvaluation
from prompt_tuning_jax.training.state_saving import StateSaver
from prompt_tuning_jax.training.step import TrainState, make_train_step
from prompt_tuning_jax.typing import PyTree


@dataclasses.dataclass(frozen=True)
class TrainResult:
  """What a finished run leaves behind.

  Attributes:
    path: the artifact (a prompt was tuned) or the backbone's folder (a model was).
    step: the step it is from: the best by the chosen metric, else the last.
    metrics: validation metrics at that step.
    prompt: the artifact as loaded; None where only a model was tuned.
    backbone_path: folder of the tuned backbone; None where it stayed frozen.
    params: parameters of that step that trained, `{'prompt': …}` and/or `{'backbone': …}`.
  """

  path: str
  step: int
  metrics: dict[str, float]
  prompt: artifact.Prompt | None
  backbone_path: str | None
  params: PyTree


def train(
    *,
    backbone: Backbone | str,
    task: str | FileTask,
    model_dir: str,
    train_steps: int,
    method: Method | None = None,
    trainable: optax.GradientTransformation | trainable_lib.Labelling | None = None,
    batch_size: int = 32,
    feature_lengths: Mapping[str, int] | None = None,
    placement: Placement | str = 'prefix',
    target_prefix: str | None = None,
    lengths: str = 'pad',
    packed_length: int | None = None,
    loss: LossConfig = LossConfig(),
    microbatches: int = 1,
    dropout_rate: float = 0.0,
    random_seed: int = 0,
    eval_task: str | FileTask | None = None,
    eval_split: str = 'validation',
    eval_method: str = 'rank',
    eval_batch_size: int | None = None,
    eval_period: int = 0,
    decoding: Decoding | None = None,
    checkpoint_period: int = 0,
    keep_checkpoints: int = 2,
    best_metric: str | None = None,
    best_mode: str = 'max',
    log_period: int = 50,
    task_module: str = DEFAULT_TASK_MODULE,
    tfds_data_dir: str | None = None,
    cache_dir: str | None = None,
    created_by: str = 'prompt_tuning_jax.train',
    progress: bool = True,
) -> TrainResult:
  """Trains what `trainable` labels, on a task; run again, it resumes where it stopped.

  Args:
    backbone: a loaded backbone, or the name or folder of one.
    task: name of a seqio task or mixture, or a task of files.
    model_dir: folder of the run: states, metrics, and at the end `prompt.safetensors`,
      and `backbone` where that was tuned.
    train_steps: optimiser updates in all.
    method: the prompt method; None tunes the model itself.
    trainable: an optimiser for the prompt (for the backbone where there is no method),
      or a labelling of the parameter tree (`training/trainable.py`). Default: Adafactor
      as in the paper.
    batch_size: examples of a batch.
    feature_lengths: longest inputs and targets in tokens; the prompt comes on top.
      Default {'inputs': 512, 'targets': 8}.
    placement: where the virtual tokens stand among an example's tokens.
    target_prefix: what stands before every target, and counts among its tokens; '<extra_id_0>'
      is the sentinel of span corruption (Lester et al., 2021, section 2.2).
    lengths: 'pad' to the feature lengths, 'bucket' to a few shorter ones, or 'pack' several
      examples into a row. None changes the result, up to rounding, but that packed examples
      of a row share a mask of dropout. Evaluation buckets where training packs.
    packed_length: tokens of a packed row, prompts included; None is what these examples are
      cheapest in, up to twice what the longest that feature_lengths allow needs.
    loss: z-loss, label smoothing, normalisation.
    microbatches: parts of each batch, computed one after the other to save memory.
    dropout_rate: of the frozen model during training; the original code keeps T5's 0.1.
    random_seed: of the prompt's initialisation, the data order and dropout.
    eval_task: the task to evaluate on; `task` where None.
    eval_split: its split.
    eval_method: 'rank' the label words where the task has them, or 'generate'.
    eval_batch_size: rows of an evaluation batch; `batch_size` where None.
    eval_period: steps between evaluations; 0 evaluates at the end only.
    decoding: how evaluation generates; greedily up to the length of the targets where
      None.
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
    progress: whether to show what is trained and the progress line.

  Returns:
    The best step's artifact and metrics.

  Raises:
    ValueError: if the parts do not fit together, or model_dir holds another run; the
      message names what to change.
    OSError: if model_dir cannot be written.
    MemoryError: if weights and state are larger than the devices' memory, with the plan.
    FloatingPointError: if the loss is not finite; the last good state stays saved.
    training.loop.Interrupted: after SIGTERM or SIGINT, once the state is saved.
  """
  if not isinstance(backbone, Backbone):
    backbone = load_backbone(backbone)
  backbone.needed_vocabulary('no task can be tokenised for it')
  partitioning.check_batch(backbone.mesh, batch_size, microbatches, 'BATCH_SIZE={}')
  plan.check_memory(
      backbone=backbone,
      method=method,
      trainable=trainable,
      batch_size=batch_size,
      feature_lengths=feature_lengths,
      lengths=lengths,
      packed_length=packed_length,
      microbatches=microbatches,
      dropout_rate=dropout_rate,
  )
  module = backbone.module.clone(dropout_rate=dropout_rate)
  feature_lengths = dict(feature_lengths or {'inputs': 512, 'targets': 8})
  placement = as_placement(placement)
  if trainable is None:
    trainable = default_optimizer(method)
  periods = loop.LoopConfig(train_steps, log_period, eval_period, checkpoint_period)
  saver = StateSaver(
      model_dir, keep=keep_checkpoints, best_metric=best_metric, best_mode=best_mode
  )
  # The folder comes first: nothing is loaded or compiled for a run that cannot be kept.
  with ModelDir(model_dir) as folder:
    description = {
        **backbone.description(),
        'method': describe(method),
        'trainable': describe(trainable_lib.as_labelling(trainable, method)),
        'task': task if isinstance(task, str) else task.name,
        'batch_size': batch_size,
        'feature_lengths': feature_lengths,
        'placement': placement.description,
        'target_prefix': target_prefix or '',
        'lengths': lengths,
        'loss': dataclasses.asdict(loss),
        'dropout_rate': dropout_rate,
        'random_seed': random_seed,
    }
    if dropout_rate or (method is not None and method.has_dropout):
      # Each part of a batch has masks of its own.
      description['microbatches'] = microbatches
    if lengths == 'pack':
      description['packed_length'] = packed_length
    if isinstance(task, FileTask):
      description['file_task'] = task.description()
    if best_metric is not None:
      # Scores of another kind cannot be compared with those of the states before.
      description['evaluation'] = {
          'task': describe_task(eval_task or task),
          'split': eval_split,
          'method': eval_method,
          'decoding': dataclasses.asdict(decoding) if decoding else None,
      }
    folder.claim(description)

    # The data.
    load = dict(
        task_module=task_module,
        tfds_data_dir=tfds_data_dir,
        cache_dir=cache_dir,
        target_prefix=target_prefix,
    )
    tasks = load_task_or_mixture(task, 'train', backbone.vocabulary, **load)
    layout = dict(
        feature_lengths=feature_lengths,
        placement=placement,
        num_virtual_tokens=0 if method is None else method.num_virtual_tokens,
        num_decoder_virtual_tokens=(
            0 if method is None else method.num_decoder_virtual_tokens
        ),
        lengths=lengths,
    )
    share = partitioning.data_share(backbone.mesh)
    batches = TrainBatches(
        tasks,
        batch_size,
        vocab_size=backbone.spec.vocab_size,
        seed=random_seed,
        packed_length=packed_length,
        row_multiple=microbatches * partitioning.count_of_parts(backbone.mesh),
        process_index=share[0],
        process_count=share[1],
        **layout,
    )
    evaluation = RunEvaluation(
        Evaluator(
            backbone,
            of_task,
            batch_size=eval_batch_size or batch_size,
            method=eval_method,
            decoding=decoding,
            output_dir=model_dir,
            progress=progress,
            **layout,
        )
        for of_task, _ in load_task_or_mixture(
            eval_task or task, eval_split, backbone.vocabulary, **load
        )
    )
    evaluation.check_metric(best_metric)
    description |= describe_data(task, tasks)
    folder.claim(description)

    # The parameters.
    parameters = RunParameters.of(backbone, method, trainable, seed=random_seed)
    if progress and processes.is_main():
      summary = _summary(backbone, method, description, train_steps, parameters)
      print(summary, file=sys.stderr)

    def evaluate(state: TrainState) -> dict[str, float]:
      return evaluation(*parameters.folded(state.trainable), step=int(state.step))

    if batches.packing is not None:
      # What T5X counts is the padded batch, virtual tokens of the decoder included.
      in_decoder = layout['num_decoder_virtual_tokens']
      loss = loss.of_rows(batch_size, batches.target_length + in_decoder)
    train_step = make_train_step(
        method,
        module,
        parameters.tx,
        loss=loss,
        microbatches=microbatches,
        seed=random_seed,
        placement=parameters.placement,
    )
    with partitioning.on(backbone.mesh):
      loop.run(
          parameters.placed_state,
          parameters.frozen,
          train_step,
          partitioning.PlacedBatches(batches, backbone.mesh),
          periods,
          saver=saver,
          template=parameters.template,
          evaluate=evaluate,
          description={'backbone': backbone.name, **description},
          progress=progress,
      )

    # What users keep.
    state, chosen = saver.restore_best(parameters.template)
    prompt, backbone_path = write_outcome(
        *parameters.folded(state.trainable),
        backbone=backbone,
        method=method,
        saved=chosen,
        description=description,
        prompt_path=os.path.join(model_dir, 'prompt.safetensors'),
        backbone_path=(
            os.path.join(model_dir, 'backbone') if 'backbone' in state.trainable else None
        ),
        created_by=created_by,
    )
    return TrainResult(
        path=prompt.source if prompt else backbone_path,
        step=chosen.step,
        metrics=chosen.metrics,
        prompt=prompt,
        backbone_path=backbone_path,
        params=state.trainable,
    )


def _summary(
    backbone: Backbone,
    method: Method | None,
    description: Mapping[str, Any],
    train_steps: int,
    parameters: RunParameters,
) -> str:
  """What is trained on what, in a few lines for people."""
  lengths = description['feature_lengths']
  what = 'none: the model itself is tuned'
  if method is not None:
    _, injection = method_lib.shapes(method, backbone.spec)
    what = f'{type(method).__name__}, {injection}'
  examples = sum(count for count, _ in description['examples'].values())
  # An encoder of the prompt may be larger than the model.
  count = parameters.count
  total = count + trainable_lib.count(parameters.frozen)
  return '\n'.join([
      f'backbone   {backbone!r}',
      f'method     {what}',
      f'task       {description["task"]}, {examples:,} examples, inputs '
      f'{lengths["inputs"]}, targets {lengths["targets"]} tokens',
      f'training   {train_steps:,} steps of {description["batch_size"]} examples, seed '
      f'{description["random_seed"]}, dropout {description["dropout_rate"]}',
      f'trainable  {count:,} of {total:,} parameters ({100 * count / total:.3g} %)',
  ])
