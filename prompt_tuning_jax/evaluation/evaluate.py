"""Scoring a backbone, with or without a prompt, on the tasks of a split.

    result = evaluate(backbone, prompt, task)
    result.metrics                # {'accuracy': 71.4}
    result.predictions[0]         # {'inputs': …, 'prediction_text': 'entailment', …}

Training calls the same code through `Evaluator` (`evaluator.py`), which is made once and then
called with the parameters of the moment.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from prompt_tuning_jax.artifact import Prompt
from prompt_tuning_jax.backbones.backbone import Backbone
from prompt_tuning_jax.data.file_task import FileTask
from prompt_tuning_jax.data.prompt_design import INPUT_LENGTH, PromptDesign, load_designed
from prompt_tuning_jax.data.several_prompts import PromptLayout
from prompt_tuning_jax.data.target_prefix import with_target_prefix
from prompt_tuning_jax.data.tokenized_task import TokenizedTask
from prompt_tuning_jax.data.virtual_tokens import Placement, as_placement
from prompt_tuning_jax.evaluation.decoding import Decoding
from prompt_tuning_jax.evaluation.evaluator import Evaluator
from prompt_tuning_jax.evaluation.kept_answers import KeepIn, kept_in
from prompt_tuning_jax.evaluation.results import EvalResult
from prompt_tuning_jax.prompt_files import load_prompt
from prompt_tuning_jax.typing import Injection, PyTree

# What stands for a prompt: one that is loaded, the path of one, its arrays, or nothing.
AnyPrompt = Prompt | str | os.PathLike[str] | Injection | None


def evaluate(
    backbone: Backbone,
    prompt: AnyPrompt,
    tasks: TokenizedTask | FileTask | str | Sequence[TokenizedTask | FileTask | str],
    *,
    split: str = 'validation',
    batch_size: int = 32,
    feature_lengths: Mapping[str, int] | None = None,
    placement: Placement | str | None = None,
    method: str = 'rank',
    lengths: str = 'bucket',
    decoding: Decoding | None = None,
    normalize_by_length: bool = False,
    design: PromptDesign | None = None,
    target_prefix: str | None = None,
    params: PyTree | None = None,
    output_dir: str | None = None,
    keep_in: KeepIn = None,
    step: int | None = None,
    progress: bool = True,
    **task_settings: Any,
) -> EvalResult | dict[str, EvalResult]:
  """Scores a backbone with a prompt, or without one, on one or several tasks.

  A split without labels (the test sets of SuperGLUE) is predicted and has no metrics.

  Args:
    backbone: the model.
    prompt: a loaded artifact or the path of one, an Injection, or None for the bare model.
    tasks: names of seqio tasks or mixtures, tasks of files (`FileTask`), or loaded splits
      (`data.cache.load_task`).
    split: the split of what is named.
    batch_size: rows of a batch.
    feature_lengths: longest inputs and targets in tokens; default: those the prompt
      was trained with, else 512 and all of the targets.
    placement: where the virtual tokens stand; default: as the prompt was trained.
    method: 'rank' or 'generate', see `Evaluator`.
    lengths: 'pad', or 'bucket' or 'pack', which are one here; the scores are the same.
    decoding: how to generate. A max_length of None is as the prompt was trained.
    normalize_by_length: rank by mean log-probabilities.
    design: words and solved examples around each input (prompt design), instead of a prompt.
    target_prefix: what stands before every target; default: as the prompt was trained.
    params: the backbone's weights, where they are not its own.
    output_dir: where `inference_eval/` is written; None writes nothing. Answers are kept there
      as they are found, so that the same evaluation, interrupted, goes on when it is run again
      (in one process: of several none has all of them).
    keep_in: another folder for these.
    step: training step for the files; default: the prompt's.
    progress: whether to show a progress line.
    **task_settings: for what is named, as `load_task` takes them: task_module,
      tfds_data_dir, cache_dir.

  Returns:
    The result of the task; of a mixture or a sequence, a dict from the tasks' names, or
    from `<name>/<split>` where several splits of one task were given.

  Raises:
    ValueError: if there are no tasks or the same one twice, the prompt does not belong to
      the backbone, there are a prompt and a design, or as `Evaluator` and `PromptDesign`.
  """
  check_alone(design, [prompt])
  asked = as_trained(backbone, prompt, feature_lengths, placement, step, target_prefix)
  decoding = with_max_length(decoding, [asked.feature_lengths])
  loaded = load_tasks(backbone, tasks, split, task_settings, design, asked.feature_lengths)
  results = {}
  with kept_in(keep_in or output_dir) as answer_folder:
    for name, task in loaded.items():
      task = with_target_prefix(task, asked.target_prefix)
      evaluator = Evaluator(
          backbone,
          task,
          batch_size=min(batch_size, len(task)),
          feature_lengths=asked.feature_lengths,
          placement=asked.layout.placement,
          num_virtual_tokens=asked.layout.num_virtual_tokens,
          num_decoder_virtual_tokens=asked.layout.num_decoder_virtual_tokens,
          method=method,
          lengths=lengths,
          decoding=decoding,
          normalize_by_length=normalize_by_length,
          output_dir=output_dir,
          keep_in=answer_folder,
          progress=progress,
          needs_labels=False,
      )
      results[name] = evaluator(
          asked.injection,
          params,
          step=asked.step,
          prompt=asked.source or task.manifest.get('design', ''),
      )
  if list(results) == [tasks] or isinstance(tasks, TokenizedTask | FileTask):
    return next(iter(results.values()))
  return results


def load_tasks(
    backbone: Backbone,
    tasks: TokenizedTask | FileTask | str | Sequence[TokenizedTask | FileTask | str],
    split: str,
    settings: Mapping[str, Any],
    design: PromptDesign | None = None,
    feature_lengths: Mapping[str, int] | None = None,
) -> dict[str, TokenizedTask]:
  """The tasks, those that were named loaded, by the names of their results.

  Args:
    backbone: whose vocabulary counts.
    tasks: see `evaluate`.
    split: of those that are named.
    settings: for those, as `load_task` takes them.
    design: makes the inputs of all of them, if there is one.
    feature_lengths: what these have to fit.

  Raises:
    ValueError: if there are none, the same split is there twice, or a split that is loaded
      already has no training examples for the design; else as `load_task`.
  """
  length = feature_lengths['inputs'] if feature_lengths else INPUT_LENGTH
  loaded: list[TokenizedTask] = []
  for task in [tasks] if isinstance(tasks, TokenizedTask | FileTask | str) else tasks:
    if isinstance(task, str | FileTask):
      members = load_designed(
          design, task, split, backbone.vocabulary, length=length, **settings
      )
      loaded += [member for member, _ in members]
    else:
      loaded.append(task if design is None else design(task, length=length))
  if not loaded:
    raise ValueError('There is nothing to evaluate: give at least one task.')
  names = [task.name for task in loaded]
  named = {
      task.name if names.count(task.name) == 1 else f'{task.name}/{task.split}': task
      for task in loaded
  }
  if len(named) < len(loaded):
    raise ValueError(
        'The same split is to be evaluated twice: '
        f'{", ".join(f"{task.name}/{task.split}" for task in loaded)}. Name each once.'
    )
  return named


@dataclasses.dataclass(frozen=True)
class AsTrained:
  """A prompt, and how it was trained so far as nothing else is asked for.

  Attributes:
    injection: its arrays; None is the bare model.
    feature_lengths: longest inputs and targets in tokens; None if nobody knows.
    layout: its virtual tokens, and where they stand.
    step: its training step, if known.
    source: where it came from, if known.
    target_prefix: what stands before every target.
  """

  injection: Injection | None
  feature_lengths: Mapping[str, int] | None
  layout: PromptLayout
  step: int | None
  source: str
  target_prefix: str = ''


def as_trained(
    backbone: Backbone,
    prompt: AnyPrompt,
    feature_lengths: Mapping[str, int] | None = None,
    placement: Placement | str | None = None,
    step: int | None = None,
    target_prefix: str | None = None,
) -> AsTrained:
  """A prompt for the backbone with what is asked for, and what its manifest says where nothing is.

  Raises:
    ValueError, OSError: as `unpack_prompt`.
  """
  injection, manifest = unpack_prompt(backbone, prompt)
  if manifest is not None:
    feature_lengths = feature_lengths or manifest.feature_lengths or None
    placement = placement or manifest.placement or None
    step = manifest.step if step is None else step
    target_prefix = manifest.target_prefix if target_prefix is None else target_prefix
  tokens = injection or Injection()
  layout = PromptLayout(
      num_virtual_tokens=tokens.num_virtual_tokens,
      num_decoder_virtual_tokens=tokens.num_decoder_virtual_tokens,
      placement=as_placement(placement or 'prefix'),
      input_length=(feature_lengths or {}).get('inputs'),
  )
  return AsTrained(injection, feature_lengths, layout, step, source_of(prompt), target_prefix or '')


def source_of(prompt: AnyPrompt) -> str:
  """The file a prompt came from, '' where it came from none."""
  if isinstance(prompt, str | os.PathLike):
    return os.fspath(prompt)
  return prompt.source if isinstance(prompt, Prompt) else ''


def with_max_length(
    decoding: Decoding | None, feature_lengths: Sequence[Mapping[str, int] | None]
) -> Decoding | None:
  """A decoding that knows how long answers may be: as the longest targets of the prompts."""
  if not isinstance(decoding, Decoding) or decoding.max_length is not None:
    return decoding
  longest = max((of or {}).get('targets', Decoding.max_length) for of in feature_lengths)
  return dataclasses.replace(decoding, max_length=longest)


def check_alone(design: PromptDesign | None, prompts: Iterable[AnyPrompt]) -> None:
  """Raises ValueError where a design is to be evaluated with prompts that were trained."""
  if design is not None and any(prompt is not None for prompt in prompts):
    raise ValueError(
        'There are a design and a prompt, but a prompt was trained on the inputs as its task '
        'has them. Evaluate one of them; if both together are meant, give the designed task '
        'instead of the design: design(task, train).'
    )


def unpack_prompt(backbone: Backbone, prompt: AnyPrompt) -> tuple[Injection | None, Any]:
  """The arrays of a prompt and its manifest (None without one), checked.

  Raises:
    ValueError: if the prompt does not belong to the backbone.
    OSError: if a path leads to none.
  """
  if prompt is None:
    return None, None
  if isinstance(prompt, str | os.PathLike):
    prompt = load_prompt(prompt)
  if isinstance(prompt, Injection):
    if prompt.num_prompts > 1:
      raise ValueError(
          f'{prompt} was given as one prompt. Give those that were stacked one by one: where '
          'several answer together, they are stacked there.'
      )
    prompt.check(backbone.spec)
    return prompt, None
  prompt.check(backbone)
  return prompt.injection, prompt.manifest
