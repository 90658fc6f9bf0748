"""Several prompts that answer the examples of a task together.

    evaluator = EnsembleEvaluator(backbone, ['seed_0.safetensors', 'seed_1.safetensors'], task)
    of_each, of_all = evaluator()

An ensemble of prompts is one model (Lester et al., 2021, section 6): every example stands in
the batch once for each prompt, and the frozen weights are there once. What the prompts answer
together `voting.py` decides.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np

from prompt_tuning_jax.backbones.backbone import Backbone
from prompt_tuning_jax.data.target_prefix import common_prefix, with_target_prefix
from prompt_tuning_jax.data.tokenized_task import TokenizedTask
from prompt_tuning_jax.data.virtual_tokens import Placement
from prompt_tuning_jax.evaluation.decoding import Decoding
from prompt_tuning_jax.evaluation.evaluate import AnyPrompt, as_trained, with_max_length
from prompt_tuning_jax.evaluation.evaluator import Evaluator, default_lengths
from prompt_tuning_jax.evaluation.kept_answers import AnswerFolder
from prompt_tuning_jax.evaluation.results import EvalResult
from prompt_tuning_jax.evaluation.voting import agreed, check_ensemble
from prompt_tuning_jax.injection_stack import stack_injections
from prompt_tuning_jax.typing import PyTree


class EnsembleEvaluator:
  """Evaluates prompts on one task, each for itself and all together, in one pass over it."""

  def __init__(
      self,
      backbone: Backbone,
      prompts: Sequence[AnyPrompt],
      task: TokenizedTask,
      *,
      ensemble: str = 'vote',
      batch_size: int = 32,
      feature_lengths: Mapping[str, int] | None = None,
      placement: Placement | str | None = None,
      method: str = 'rank',
      lengths: str = 'bucket',
      decoding: Decoding | None = None,
      normalize_by_length: bool = False,
      target_prefix: str | None = None,
      step: int | None = None,
      keep_in: AnswerFolder | None = None,
      progress: bool = True,
  ):
    """Checks the prompts against the backbone, the task, and each other.

    Args:
      backbone: the model.
      prompts: the members, of one kind (`injection_stack.stack_injections`).
      task: the examples.
      ensemble: 'vote' or 'mean', see `voting.agreed`.
      batch_size: rows of a batch, in which an example has one for each prompt: as many examples
        as fit, at least one, and on a mesh as many as its devices can divide.
      feature_lengths: longest inputs and targets in tokens; default: those that each prompt was
        trained with, and of targets the longest of these.
      placement: where the virtual tokens stand; default: as each prompt was trained.
      method, lengths, decoding, normalize_by_length, target_prefix, progress: as in `evaluate`.
      step: training step for the results; default: each prompt's.
      keep_in: as in `Evaluator`.

    Raises:
      ValueError: if a prompt does not belong to the backbone, they are not of one kind, or the
        ensemble is of 'mean' and the task has no classes to be ranked; else as `Evaluator`.
      OSError: if a path leads to no prompt.
    """
    check_ensemble(ensemble)
    members = [
        as_trained(backbone, p, feature_lengths, placement, step, target_prefix) for p in prompts
    ]
    task = with_target_prefix(task, common_prefix(member.target_prefix for member in members))
    self._injection = stack_injections([member.injection for member in members])
    allowed = [default_lengths(task) | dict(member.feature_lengths or {}) for member in members]
    self._members = members
    self._ensemble = ensemble
    self._evaluator = Evaluator(
        backbone,
        task,
        batch_size=min(batch_size, max(batch_size // len(members), 1), len(task)),
        feature_lengths={name: max(of[name] for of in allowed) for name in ('inputs', 'targets')},
        method=method,
        lengths=lengths,
        decoding=with_max_length(decoding, [member.feature_lengths for member in members]),
        normalize_by_length=normalize_by_length,
        keep_in=keep_in,
        progress=progress,
        needs_labels=False,
        prompts=[
            dataclasses.replace(member.layout, input_length=of['inputs'])
            for member, of in zip(members, allowed, strict=True)
        ],
    )
    if ensemble == 'mean' and not self._evaluator.scores_classes:
      if method != 'rank':
        why = f'EVAL_METHOD={method!r} writes answers freely'
      elif task.label_classes:
        why = f'of its {len(task.label_classes):,} classes only the best is searched for'
      else:
        why = 'it has no classes, so that answers are written freely'
      raise ValueError(
          f"ENSEMBLE='mean' compares mean log-probabilities of the classes of {task.name}, but "
          f"{why}. Use ENSEMBLE='vote'."
      )

  def __call__(self, params: PyTree | None = None) -> tuple[list[EvalResult], EvalResult]:
    """The result of each prompt, as if it were evaluated alone, and that of all together.

    The predictions of the latter also hold `votes`, how many prompts gave which answer; its
    scores are means over the prompts.

    Args:
      params: the backbone's weights, where they are not the backbone's own.
    """
    evaluator = self._evaluator
    answers = evaluator.answers(self._injection, params)

    @functools.cache
    def target_scores() -> list[list[float]]:
      return evaluator.target_scores(self._injection, params)

    of_each = [
        dataclasses.replace(
            evaluator.result(answers[k], lambda k=k: target_scores()[k], step=member.step),
            prompt=member.source,
        )
        for k, member in enumerate(self._members)
    ]
    together = [agreed(of_example, self._ensemble) for of_example in zip(*answers, strict=True)]
    of_all = evaluator.result(together, lambda: np.mean(target_scores(), axis=0).tolist())
    return of_each, of_all
