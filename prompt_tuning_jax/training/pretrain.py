"""Making a backbone: span corruption, LM adaptation, supervised pairs.

The loop is that of prompt tuning; the label `backbone` trains where `prompt` did.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from prompt_tuning_jax import partitioning, plan, processes
from prompt_tuning_jax.backbones.backbone import Backbone
from prompt_tuning_jax.backbones.t5 import T5, T5Config
from prompt_tuning_jax.checkpoints import load, native
from prompt_tuning_jax.data.pretraining import Component, PretrainingBatches
from prompt_tuning_jax.data.vocabularies import open_vocabulary
from prompt_tuning_jax.data.vocabulary import Vocabulary
from prompt_tuning_jax.training import loop
from prompt_tuning_jax.training import trainable as trainable_lib
from prompt_tuning_jax.training.description import describe
from prompt_tuning_jax.training.losses import LossConfig
from prompt_tuning_jax.training.model_dir import ModelDir
from prompt_tuning_jax.training.parameters import RunParameters
from prompt_tuning_jax.training.state_saving import StateSaver
from prompt_tuning_jax.training.step import make_train_step
from prompt_tuning_jax.typing import PyTree


def pretrain(
    *,
    components: Sequence[Component],
    model_dir: str,
    train_steps: int,
    trainable: optax.GradientTransformation | trainable_lib.Labelling,
    config: T5Config | None = None,
    vocabulary: Vocabulary | str | None = None,
    backbone: Backbone | None = None,
    mesh: Mesh | None = None,
    rules: partitioning.Rules = partitioning.DEFAULT_RULES,
    dtype: str = 'auto',
    remat: str = 'none',
    loss: LossConfig = LossConfig(normalizing_factor='NUM_REAL_TARGET_TOKENS'),
    dropout_rate: float = 0.0,
    unroll: bool = False,
    microbatches: int = 1,
    random_seed: int = 0,
    checkpoint_period: int = 500,
    log_period: int = 50,
    weights_dtype: str = 'bfloat16',
    backbone_steps: Sequence[int] = (),
    metadata: dict[str, Any] | None = None,
    progress: bool = True,
) -> str:
  """Trains every weight of a T5 on a mixture of texts and pairs; resumes when run again.

  Args:
    components: the mixture; each step's batch comes from one of them.
    model_dir: folder of the run; the finished backbone is written to `backbone` in it.
    train_steps: updates in all.
    trainable: any optax transformation for all weights, or a labelling with several, for
      example one for `backbone` and another for `backbone/token_embedder`.
    config: the architecture, to start from fresh weights; or
    backbone: a trained model to go on from, as LM adaptation does.
    vocabulary: of a fresh model, the SentencePiece file or a Vocabulary.
    mesh: the devices that fresh weights are split over; those of a trained model where
      there is one.
    rules: which axes of fresh weights are split over which axis of the mesh.
    dtype: that fresh weights, which are float32, are computed with in: see `load_backbone`.
    remat: of fresh weights: see `load_backbone`.
    loss: z-loss, smoothing, normalisation.
    dropout_rate: 0 in T5 1.1's pretraining.
    unroll: compile each layer for itself, faster on a CPU (see `T5.unroll`).
    microbatches: parts of each batch, to save memory.
    random_seed: of the weights, the data order and the noise.
    checkpoint_period: steps between saved states.
    log_period: steps between records of the loss.
    weights_dtype: in which the finished weights are written.
    backbone_steps: after how many updates the backbone is written as well, each time to
      `backbone_<step>` in model_dir; 0 is the model before the first.
    metadata: kept in the config.json of what is written, beside the number of updates.
    progress: whether to show what is trained and the progress line.

  Returns:
    The folder of the finished backbone, for `load_backbone`.

  Raises:
    ValueError: unless exactly one of `config` and `backbone` is given, if the parts do
      not fit together, if model_dir holds another run, or one of backbone_steps is not before
      the last step, or not after the newest saved state and was not written when it was due.
    OSError: if model_dir cannot be written.
    MemoryError: if weights and state are larger than the devices' memory, with the plan.
    FloatingPointError: if the loss is not finite; the last good state stays saved.
    training.loop.Interrupted: after SIGTERM or SIGINT, once the state is saved.
  """
  mesh = mesh if backbone is None else backbone.mesh
  module, vocabulary = starting_point(
      config, backbone, vocabulary, mesh=mesh, dtype=dtype, remat=remat
  )
  check_components(components, microbatches, mesh)
  module = module.clone(dropout_rate=dropout_rate, unroll=unroll)
  labelling = trainable_lib.as_labelling(trainable, None)
  _check_memory(
      components,
      # Fresh weights are float32, whatever the computation is in.
      backbone
      or Backbone(
          'the new model',
          module,
          vocabulary,
          dict,
          mesh=mesh,
          rules=rules,
          param_dtype='float32',
      ),
      trainable=labelling,
      microbatches=microbatches,
      dropout_rate=dropout_rate,
  )
  periods = loop.LoopConfig(train_steps, log_period, checkpoint_period=checkpoint_period)
  check_backbone_steps(backbone_steps, train_steps)
  saver = StateSaver(model_dir)
  # The folder comes first: nothing is loaded or compiled for a run that cannot be kept.
  with ModelDir(model_dir) as folder:
    description = {
        'task': 'pretraining',
        'architecture': dataclasses.asdict(module.config),
        'dtype': jnp.dtype(module.dtype).name,
        'vocabulary': vocabulary.fingerprint,
        'from': backbone.fingerprint if backbone else None,
        'components': [
            {'source': component.source.name, **component.describe()}
            for component in components
        ],
        'trainable': describe(labelling),
        'loss': dataclasses.asdict(loss),
        'dropout_rate': dropout_rate,
        'random_seed': random_seed,
    }
    if backbone is not None:
      held = backbone.description()
      description |= {name: held[name] for name in ('weights', 'attention')}
    if dropout_rate:
      # Each part of a batch has masks of its own.
      description['microbatches'] = microbatches
    folder.claim(description)
    share, shares = partitioning.data_share(mesh)
    batches = PretrainingBatches(
        components, vocabulary, seed=random_seed, process_index=share, process_count=shares
    )
    if backbone is not None:
      parameters = RunParameters.of(backbone, None, labelling)
    else:
      params = _fresh(module, random_seed, mesh, rules)
      parameters = RunParameters({'backbone': params}, labelling, mesh=mesh)
    if progress and processes.is_main():
      print(
          _summary(module, backbone, batches, train_steps, description, parameters.count),
          file=sys.stderr,
      )
    train_step = make_train_step(
        None,
        module,
        parameters.tx,
        loss=loss,
        microbatches=microbatches,
        seed=random_seed,
        placement=parameters.placement,
    )
    with partitioning.on(mesh):
      for step in [*_due(backbone_steps, model_dir, saver), train_steps]:
        if step == 0:
          state = parameters.placed_state()
        else:
          # From the second time on it begins with the state that the one before saved.
          state = loop.run(
              parameters.placed_state,
              parameters.frozen,
              train_step,
              partitioning.PlacedBatches(batches, mesh),
              dataclasses.replace(periods, train_steps=step),
              saver=saver,
              template=parameters.template,
              source_name=batches.component_name,
              description=description,
              progress=progress,
          )
        _, weights = parameters.folded(state.trainable)
        path = _backbone_path(model_dir, None if step == train_steps else step)
        native.save_backbone(
            path,
            module.config,
            weights,
            vocabulary,
            dtype=weights_dtype,
            metadata={
                **(metadata or {}),
                'train_steps': int(state.step),
                **({} if backbone is None else {'adaptation_steps': int(state.step)}),
            },
        )
        del state, weights  # The devices have no room for two.
  return path


def starting_point(
    config: T5Config | None,
    backbone: Backbone | None,
    vocabulary: Vocabulary | str | None,
    *,
    mesh: Mesh | None,
    dtype: str,
    remat: str,
) -> tuple[T5, Vocabulary]:
  """The module and the vocabulary of a run, by the arguments of `pretrain`.

  Raises:
    ValueError: unless exactly one of `config` and `backbone` is given, and a vocabulary
      that fits it.
  """
  if (config is None) == (backbone is None):
    raise ValueError(
        'pretrain needs either `config` (fresh weights, with `vocabulary`) or `backbone` '
        '(weights to go on from), and not both.'
    )
  if backbone is not None:
    module, vocabulary = backbone.module, backbone.vocabulary
  else:
    module = T5(config, dtype=load.computation_dtype(dtype, mesh), remat=remat)
    if isinstance(vocabulary, str | os.PathLike):
      vocabulary = open_vocabulary(vocabulary)
  if vocabulary is None:
    raise ValueError(
        'pretrain has no vocabulary: set VOCABULARY to the SentencePiece model that the '
        'texts are tokenised with.'
    )
  native.check_vocabulary(vocabulary, module.config.vocab_size)
  return module, vocabulary


def check_components(
    components: Sequence[Component], microbatches: int, mesh: Mesh | None = None
) -> None:
  """Raises ValueError unless every component's batches can be cut into so many parts."""
  for component in components:
    what = f'the batch_size={{}} of component {component.name!r}'
    partitioning.check_batch(mesh, component.batch_size, microbatches, what)


def _check_memory(components: Sequence[Component], backbone: Backbone, **run: Any) -> None:
  """`plan.check_memory` of the component whose batches are the largest."""

  def lengths(component: Component) -> dict[str, int]:
    targets = component.target_length or component.noise_lengths()[1]
    return {'inputs': component.input_length, 'targets': targets}

  largest = max(components, key=lambda c: c.batch_size * sum(lengths(c).values()))
  plan.check_memory(
      backbone=backbone,
      batch_size=largest.batch_size,
      feature_lengths=lengths(largest),
      **run,
  )


def check_backbone_steps(steps: Sequence[int], train_steps: int) -> None:
  """Raises ValueError unless the backbone can be written at every one of the steps."""
  if wrong := [step for step in steps if not 0 <= step < train_steps]:
    raise ValueError(
        f'BACKBONE_STEPS has {", ".join(map(str, wrong))}, but a run of {train_steps:,} steps '
        f'(TRAIN_STEPS_RELATIVE) can be kept at 0 to {train_steps - 1:,}; what it ends with is '
        'kept anyway.'
    )


def _backbone_path(model_dir: str, step: int | None) -> str:
  """Where the backbone of a step is written; None is the last."""
  return os.path.join(model_dir, 'backbone' if step is None else f'backbone_{step}')


def _due(steps: Sequence[int], model_dir: str, saver: StateSaver) -> list[int]:
  """Those of the steps whose backbone has not been written.

  Raises:
    ValueError: if the run is past one of them.
  """
  steps = sorted(set(steps))
  due = processes.from_main(
      lambda: [s for s in steps if not native.is_native(_backbone_path(model_dir, s))]
  )
  latest = saver.latest()
  if latest and (late := [step for step in due if 0 < step < latest.step]):
    raise ValueError(
        f'BACKBONE_STEPS has {", ".join(map(str, late))}, but MODEL_DIR {model_dir} is at step '
        f'{latest.step:,} already. Leave out what was not kept when it was due, or start again in '
        'another MODEL_DIR.'
    )
  return due


def _fresh(module: T5, seed: int, mesh: Mesh | None, rules: partitioning.Rules) -> PyTree:
  """Weights drawn from the seed, on a mesh each device its shards."""
  if mesh is None:
    return jax.jit(module.init_params)(jax.random.key(seed))
  shapes = jax.eval_shape(module.init_params, jax.random.key(0))
  places = partitioning.shardings(mesh, module.logical_axes(), shapes, rules)
  return jax.jit(lambda: module.init_params(jax.random.key(seed)), out_shardings=places)()


def _summary(
    module: T5,
    backbone: Backbone | None,
    batches: PretrainingBatches,
    train_steps: int,
    description: Mapping[str, Any],
    count: int,
) -> str:
  """What is trained on what, in a few lines for people."""
  config = module.config
  total = trainable_lib.count(jax.eval_shape(module.init_params, jax.random.key(0)))
  tokens = sum(map(batches.tokens_per_step, range(train_steps)))
  weights = sum(component.weight for component in batches.components)
  epochs = batches.epochs(train_steps)
  return '\n'.join([
      f'model      T5, {config.num_encoder_layers} + {config.num_decoder_layers} layers of '
      f'width {config.d_model}, from {repr(backbone) if backbone else "fresh weights"}',
      f'trainable  {count:,} of {total:,} parameters ({100 * count / total:.3g} %)',
      *(
          f'component  {part.name}: {part.objective}, {100 * part.weight / weights:.3g} % of '
          f'the steps, batches of {part.batch_size}, {len(part.source):,} examples, '
          f'{epochs[part.name]:.2f} epochs'
          for part in batches.components
      ),
      f'training   {train_steps:,} steps, {tokens:,} tokens (inputs and targets, padding '
      f'included), seed {description["random_seed"]}, dropout {description["dropout_rate"]}',
  ])
