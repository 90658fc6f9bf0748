"""From a run's saved states to what users keep: an artifact, or a tuned backbone."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax

from prompt_tuning_jax import artifact, partitioning, processes
from prompt_tuning_jax.backbones.backbone import Backbone
from prompt_tuning_jax.checkpoints import native
from prompt_tuning_jax.checkpoints.load import load_backbone
from prompt_tuning_jax.methods.method import Method
from prompt_tuning_jax.prompt_files import export_prompt, load_prompt
from prompt_tuning_jax.training.parameters import RunParameters
from prompt_tuning_jax.training.state_saving import (
    DamagedError,
    Saved,
    StateSaver,
    nothing_saved,
    run_and_step,
)
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
    method: Method | None,
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
  run, is_step = run_and_step(path)
  saver = StateSaver(run, best_metric=best_metric, best_mode=best_mode)
  states = [s for s in saver.all() if not is_step or s.path == path]
  if not states:
    raise nothing_saved(path)
  saved = states[0] if is_step else (saver.best() or states[-1])
  description = saver.description(saved)
  fingerprint = description.get('backbone_fingerprint')
  if fingerprint and fingerprint != backbone.fingerprint:
    raise ValueError(
        f'{saved.path} was trained with {description.get("backbone")} (weights '
        f'{fingerprint[:12]}…), but this is {backbone.name} (weights '
        f'{backbone.fingerprint[:12]}…). Name the backbone the run started from.'
    )
  parameters = RunParameters.of(
      backbone, method, trainable, seed=description.get('random_seed', 0)
  )
  try:
    state, _ = saver.restore(parameters.template, saved)
  except DamagedError as error:
    others = ', '.join(s.path for s in states if s.path != saved.path)
    remedy = f'Set CHECKPOINT_PATH to another: {others}.' if others else 'It has no other.'
    raise ValueError(f'{error} {remedy}') from error
  injection, params = parameters.folded(state.trainable)
  return RestoredRun(
      saved=saved,
      injection=injection,
      params=params,
      tuned_backbone='backbone' in state.trainable,
      description=description,
  )


def write_outcome(
    injection: Injection | None,
    params: PyTree,
    *,
    backbone: Backbone,
    method: Method | None,
    saved: Saved,
    description: Mapping[str, Any],
    prompt_path: str | None,
    backbone_path: str | None,
    created_by: str,
) -> tuple[artifact.Prompt | None, str | None]:
  """Writes what users keep of a state: the prompt, and the backbone where that was tuned.

  Of several processes the main one writes; all of them call this, and get the artifact.

  Args:
    injection: the folded prompt; None where the model alone was tuned.
    params: the backbone's weights.
    backbone: the backbone the run started from.
    method: the run's prompt method.
    saved: the state that both are from.
    description: what the run wrote of itself.
    prompt_path: where the artifact goes.
    backbone_path: where the tuned backbone goes; None where it stayed frozen.
    created_by: the command, for the manifest.

  Returns:
    The artifact as loaded, and `backbone_path`; None for what there is not.
  """
  if backbone_path is not None:
    native.save_backbone(
        backbone_path,
        backbone.module.config,
        params,
        backbone.vocabulary,
        dtype='float32',
        metadata={**description, 'step': saved.step, 'metrics': saved.metrics},
    )
  if injection is None:
    return None, backbone_path
  injection = jax.tree.map(partitioning.whole, injection)

  def save_prompt() -> artifact.Prompt:
    return artifact.save_prompt(
        prompt_path,
        injection,
        # A prompt tuned together with its backbone is worth nothing without that.
        backbone=load_backbone(backbone_path) if backbone_path else backbone,
        method=type(method).__name__,
        num_virtual_tokens=method.num_virtual_tokens,
        placement=description['placement'],
        task=description['task'],
        feature_lengths=description['feature_lengths'],
        target_prefix=description.get('target_prefix', ''),
        metrics=saved.metrics,
        step=saved.step,
        created_by=created_by,
        # As the run held them, whatever holds them now.
        backbone_weights='int8' if description.get('weights') == 'int8' else '',
    )

  return processes.from_main(save_prompt), backbone_path


def export(
    *,
    backbone: Backbone,
    checkpoint_path: str | None,
    output: str,
    method: Method | None,
    trainable: Any,
    best_metric: str | None = None,
    best_mode: str = 'max',
    export_path: str | None = None,
    base_model: str | None = None,
    created_by: str = 'prompt_tuning_jax.export',
) -> str:
  """Writes a saved state of a run as what users keep, and a prompt for other programs.

  Args:
    backbone: the backbone the run started from.
    checkpoint_path: a run's folder or one `checkpoint_<step>` in it; None where `output`
      is there already and only `export_path` is to be written.
    output: where to write: a file for a prompt, a folder where the model was tuned. Of
      a run that tuned both, the backbone goes to the folder `backbone` beside the prompt.
    method: the run's prompt method; None for a run that tuned the model.
    trainable: the run's optimiser or labelling.
    best_metric: metric by which a run's best state is chosen.
    best_mode: 'max' or 'min'.
    export_path: also write the prompt there as a PEFT adapter, or as an array if the path
      ends in `.npy`.
    base_model: the backbone's Hugging Face name, for the adapter.
    created_by: the command, for the manifest.

  Returns:
    What was written last.
  """
  if checkpoint_path:
    _export_run(
        backbone,
        checkpoint_path,
        output,
        method,
        trainable,
        best_metric=best_metric,
        best_mode=best_mode,
        created_by=created_by,
    )
  if export_path is None:
    return output
  processes.from_main(
      lambda: export_prompt(load_prompt(output), export_path, backbone, base_model=base_model)
  )
  return export_path


def _export_run(
    backbone: Backbone,
    checkpoint_path: str,
    output: str,
    method: Method | None,
    trainable: Any,
    *,
    best_metric: str | None,
    best_mode: str,
    created_by: str,
) -> None:
  run = restore_run(
      checkpoint_path,
      backbone,
      method,
      trainable,
      best_metric=best_metric,
      best_mode=best_mode,
  )
  backbone_path = None
  if run.injection is None:
    backbone_path = output
  elif run.tuned_backbone:
    backbone_path = os.path.join(os.path.dirname(os.path.abspath(output)), 'backbone')
    if processes.from_main(lambda: os.path.exists(backbone_path)):
      raise ValueError(
          f'{run.saved.path} tuned the backbone together with the prompt, so both are '
          f'written, but {backbone_path} exists. Name a PROMPT_FILE in another folder.'
      )
  write_outcome(
      run.injection,
      run.params,
      backbone=backbone,
      method=method,
      saved=run.saved,
      description=run.description,
      prompt_path=output,
      backbone_path=backbone_path,
      created_by=created_by,
  )
