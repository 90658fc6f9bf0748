"""Making a backbone: span corruption, LM adaptation, supervised pairs.

The loop is that of prompt tuning; the label `backbone` trains where `prompt` did.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import optax

from prompt_tuning_jax.backbones.backbone import Backbone
from prompt_tuning_jax.backbones.t5 import T5, T5Config
from prompt_tuning_jax.checkpoints import native
from prompt_tuning_jax.data.pretraining import Component, PretrainingBatches
from prompt_tuning_jax.data.vocabulary import Vocabulary
from prompt_tuning_jax.training import loop
from prompt_tuning_jax.training import trainable as trainable_lib
from prompt_tuning_jax.training.losses import LossConfig
from prompt_tuning_jax.training.model_dir import ModelDir
from prompt_tuning_jax.training.state_saving import StateSaver
from prompt_tuning_jax.training.step import TrainState, make_train_step


def pretrain(
    *,
    components: Sequence[Component],
    model_dir: str,
    train_steps: int,
    trainable: optax.GradientTransformation | trainable_lib.Labelling,
    config: T5Config | None = None,
    vocabulary: Vocabulary | str | None = None,
    backbone: Backbone | None = None,
    loss: LossConfig = LossConfig(normalizing_factor='NUM_REAL_TARGET_TOKENS'),
    dropout_rate: float = 0.0,
    unroll: bool = False,
    microbatches: int = 1,
    random_seed: int = 0,
    checkpoint_period: int = 500,
    log_period: int = 50,
    weights_dtype: str = 'bfloat16',
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
    loss: z-loss, smoothing, normalisation.
    dropout_rate: 0 in T5 1.1's pretraining.
    unroll: compile each layer for itself, faster on a CPU (see `T5.unroll`).
    microbatches: parts of each batch, to save memory.
    random_seed: of the weights, the data order and the noise.
    checkpoint_period: steps between saved states.
    log_period: steps between records of the loss.
    weights_dtype: in which the finished weights are written.
    metadata: kept in the finished backbone's config.json.
    progress: whether to show the progress line.

  Returns:
    The folder of the finished backbone, for `load_backbone`.

  Raises:
    ValueError: unless exactly one of `config` and `backbone` is given.
  """
  if (config is None) == (backbone is None):
    raise ValueError(
        'pretrain needs either `config` (fresh weights, with `vocabulary`) or `backbone` '
        '(weights to go on from), and not both.'
    )
  if backbone is not None:
    module = backbone.module.clone(dropout_rate=dropout_rate, unroll=unroll)
    vocabulary = backbone.vocabulary
    params = backbone.params
  else:
    if not isinstance(vocabulary, Vocabulary):
      vocabulary = Vocabulary(vocabulary)
    if vocabulary.size > config.vocab_size:
      raise ValueError(
          f'The vocabulary {vocabulary.path} has {vocabulary.size} ids, but the embedding '
          f'table only vocab_size={config.vocab_size} rows. Raise T5Config.vocab_size.'
      )
    module = T5(config, dropout_rate=dropout_rate, unroll=unroll)
    params = jax.jit(module.init_params)(jax.random.key(random_seed))

  labelling = trainable if isinstance(trainable, Mapping) else {'backbone': trainable}
  params, frozen = trainable_lib.split({'backbone': params}, labelling)
  # The step donates its state; the caller's backbone keeps its own weights.
  params = jax.tree.map(lambda leaf: jax.numpy.array(leaf, copy=True), params)
  tx = trainable_lib.make_optimizer(labelling, params)
  batches = PretrainingBatches(components, vocabulary, seed=random_seed)
  description = {
      'task': 'pretraining',
      'config': dataclasses.asdict(module.config),
      'vocabulary': vocabulary.fingerprint,
      'from': backbone.fingerprint if backbone else None,
      'components': [_describe(component) for component in components],
      'random_seed': random_seed,
      'dropout_rate': dropout_rate,
      'loss': dataclasses.asdict(loss),
  }
  with ModelDir(model_dir, description):
    state = loop.run(
        TrainState.create(params, tx),
        frozen,
        make_train_step(
            None, module, tx, loss=loss, microbatches=microbatches, seed=random_seed
        ),
        batches,
        loop.LoopConfig(train_steps, log_period, checkpoint_period=checkpoint_period),
        saver=StateSaver(model_dir),
        source_name=batches.component_name,
        description=description,
        progress=progress,
    )
    path = os.path.join(model_dir, 'backbone')
    native.save_backbone(
        path,
        module.config,
        trainable_lib.merge(state.trainable, frozen)['backbone'],
        vocabulary,
        dtype=weights_dtype,
        metadata={**(metadata or {}), 'train_steps': train_steps},
    )
  return path


def _describe(component: Component) -> dict[str, Any]:
  """The component's settings as JSON values, its source by name and size."""
  settings = {
      field.name: getattr(component, field.name)
      for field in dataclasses.fields(component)
      if field.name != 'source'
  }
  return {**settings, 'source': component.source.name, 'examples': len(component.source)}
