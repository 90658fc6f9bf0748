"""From a run's saved states to what users keep: an artifact, or a tuned backbone."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from prompt_tuning_jax import artifact
from prompt_tuning_jax.backbones.backbone import Backbone
from prompt_tuning_jax.checkpoints import native
from prompt_tuning_jax.training import trainable as trainable_lib
from prompt_tuning_jax.training.state_saving import Saved, StateSaver
from prompt_tuning_jax.training.step import TrainState
from prompt_tuning_jax.typing import Injection, PyTree


@dataclasses.dataclass(frozen=True)
class RestoredRun:
  """What inference needs of a run's saved state.

  Attributes:
    saved: which state it is.
    injection: the folded prompt, None where the run tuned the model alone.
    params: the backbone's weights, tuned or as they were.
    tuned_backbone: whether the run changed them.
    description: what the run wrote of itself (task, placement, lengths, …).
  """

  saved: Saved
  injection: Injection | None
  params: PyTree
  tuned_backbone: bool
  description: Mapping[str, Any]


def restore_run(
    path: str | os.PathLike[str],
    backbone: Backbone,
    method: nn.Module | None,
    trainable: Any,
    *,
    best_metric: str | None = None,
    best_mode: str = 'max',
) -> RestoredRun:
  """Reads a state that `train` saved.

  Args:
    path: a run's folder (the best state by `best_metric`, else the newest), or one
      `checkpoint_<step>` in it.
    backbone: the backbone the run started from.
    method: the run's prompt method.
    trainable: the run's optimiser or labelling, which shapes its state.
    best_metric: metric of the best state.
    best_mode: 'max' or 'min'.

  Raises:
    FileNotFoundError: if nothing was saved there.
    ValueError: if the state is not of this method and backbone, or is damaged.
  """
  path = os.path.abspath(path)
  folder, name = os.path.split(path)
  is_step = name.startswith('checkpoint_')
  saver = StateSaver(
      folder if is_step else path, best_metric=best_metric, best_mode=best_mode
  )
  states = [s for s in saver.all() if not is_step or s.path == path]
  if not states:
    raise FileNotFoundError(
        f'CHECKPOINT_PATH {path} holds no saved state. Name the MODEL_DIR of a run, or a '
        'checkpoint_<step> in it.'
    )
  saved = states[0] if is_step else (saver.best() or states[-1])
  description = saver.description(saved)
  fingerprint = description.get('backbone_fingerprint')
  if fingerprint and fingerprint != backbone.fingerprint:
    raise ValueError(
        f'{saved.path} was trained with {description.get("backbone")} (weights '
        f'{fingerprint[:12]}…), but this is {backbone.name} (weights '
        f'{backbone.fingerprint[:12]}…). Name the backbone the run started from.'
    )
  params: dict[str, PyTree] = {'backbone': backbone.params}
  if method is not None:
    params['prompt'] = jax.eval_shape(
        lambda key: method.init(key, backbone.spec)['params'], jax.random.key(0)
    )
  subject = 'backbone' if method is None else 'prompt'
  labelling = trainable if isinstance(trainable, Mapping) else {subject: trainable}
  trained, frozen = trainable_lib.split(params, labelling)
  tx = trainable_lib.make_optimizer(labelling, trained)
  template = jax.eval_shape(lambda tree: TrainState.create(tree, tx), trained)
  state, _ = saver.restore(template, saved)
  params = trainable_lib.merge(state.trainable, frozen)
  injection = None
  if method is not None:
    injection = method.apply({'params': params['prompt']}, backbone.spec)
  return RestoredRun(
      saved=saved,
      injection=injection,
      params=params['backbone'],
      tuned_backbone='backbone' in state.trainable,
      description=description,
  )


def export(
    *,
    backbone: Backbone,
    checkpoint_path: str,
    output: str,
    method: nn.Module | None,
    trainable: Any,
    best_metric: str | None = None,
    best_mode: str = 'max',
    created_by: str = 'prompt_tuning_jax.export',
) -> str:
  """Writes a saved state of a run as what users keep: an artifact, or a backbone's folder.

  Args:
    backbone: the backbone the run started from.
    checkpoint_path: a run's folder or one `checkpoint_<step>` in it.
    output: where to write: a file for a prompt, a folder where the model was tuned.
    method: the run's prompt method; None for a run that tuned the model.
    trainable: the run's optimiser or labelling.
    best_metric: metric by which a run's best state is chosen.
    best_mode: 'max' or 'min'.
    created_by: the command, for the manifest.

  Returns:
    `output`.
  """
  run = restore_run(
      checkpoint_path,
      backbone,
      method,
      trainable,
      best_metric=best_metric,
      best_mode=best_mode,
  )
  about = run.description
  if run.injection is None:
    native.save_backbone(
        output,
        backbone.module.config,
        run.params,
        backbone.vocabulary,
        dtype='float32',
        metadata={**about, 'step': run.saved.step, 'metrics': run.saved.metrics},
    )
    return output
  if run.tuned_backbone:
    raise ValueError(
        f'{run.saved.path} tuned the backbone together with the prompt; an artifact holds '
        'only a prompt, which is worth nothing without those weights.'
    )
  artifact.save_prompt(
      output,
      run.injection,
      backbone=backbone,
      method=type(method).__name__,
      num_virtual_tokens=method.num_virtual_tokens,
      placement=about['placement'],
      task=about['task'],
      feature_lengths=about['feature_lengths'],
      metrics=run.saved.metrics,
      step=run.saved.step,
      created_by=created_by,
  )
  return output
