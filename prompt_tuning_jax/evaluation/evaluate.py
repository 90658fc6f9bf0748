"""Scoring a backbone, with or without a prompt, on the tasks of a split.

    result = evaluate(backbone, prompt, task)
    result.metrics                # {'accuracy': 71.4}
    result.predictions[0]         # {'inputs': …, 'prediction_text': 'entailment', …}

Training calls the same code through `Evaluator`, which is made once and then called
with the parameters of the moment. Metrics run over all examples together, never over
batches, so that the batch size changes no score.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tqdm
from jax.sharding import Mesh

from prompt_tuning_jax import partitioning, processes
from prompt_tuning_jax.artifact import Prompt
from prompt_tuning_jax.backbones.backbone import Backbone
from prompt_tuning_jax.data.batches import EvalBatches
from prompt_tuning_jax.data.file_task import FileTask
from prompt_tuning_jax.data.prompt_design import INPUT_LENGTH, PromptDesign, load_designed
from prompt_tuning_jax.data.tokenized_task import TokenizedTask, own_numbers
from prompt_tuning_jax.data.virtual_tokens import Placement, as_placement
from prompt_tuning_jax.evaluation import best_first, ranking
from prompt_tuning_jax.evaluation import metrics as metrics_lib
from prompt_tuning_jax.evaluation.decoding import Decoding
from prompt_tuning_jax.evaluation.results import EvalResult, write_result
from prompt_tuning_jax.prompt_files import load_prompt
from prompt_tuning_jax.typing import Injection, PyTree

# What stands for a prompt: one that is loaded, the path of one, its arrays, or nothing.
AnyPrompt = Prompt | str | os.PathLike[str] | Injection | None

METHODS = ('rank', 'generate')

# Of more classes than this only the best is searched for, and not all are scored.
_MOST_SCORED = 1000


class Evaluator:
  """Evaluates one task again and again; made once, called with any parameters.

  Programs are compiled at the first call, once for each width of a batch.

  Attributes:
    task: the task.
  """

  def __init__(
      self,
      backbone: Backbone,
      task: TokenizedTask,
      *,
      batch_size: int = 32,
      feature_lengths: Mapping[str, int] | None = None,
      placement: Placement | str = 'prefix',
      num_virtual_tokens: int = 0,
      num_decoder_virtual_tokens: int = 0,
      method: str = 'rank',
      lengths: str = 'pad',
      decoding: Decoding | None = None,
      normalize_by_length: bool = False,
      output_dir: str | None = None,
      progress: bool = True,
      needs_labels: bool = True,
  ):
    """Checks the task against the backbone.

    Args:
      backbone: the model; its weights are read at the first call.
      task: the examples, their postprocessor and metrics. A task without metrics is
        scored by `accuracy`.
      batch_size: rows of a batch.
      feature_lengths: longest inputs and targets in tokens, the prompt not counted.
        Default: 512, and all of the targets.
      placement: where the virtual tokens stand.
      num_virtual_tokens: P, virtual tokens of the prompts to come.
      num_decoder_virtual_tokens: Q, those of them before the decoder's start token.
      method: 'rank' chooses among the task's classes by their log-probability and
        generates where a task has none; 'generate' always generates, as T5X does. Of more
        than 1,000 classes predictions hold the best one's score alone.
      lengths: 'pad' to the feature lengths, or 'bucket' to a few shorter ones; 'pack', as
        training has it, is 'bucket' here.
      decoding: how to generate. Default: greedily, up to the length of the targets.
      normalize_by_length: rank by the mean log-probability of a class's tokens.
      output_dir: where `inference_eval/` is written; None writes nothing.
      progress: whether to show a progress line.
      needs_labels: whether a split without any label is refused; where it is not, it is
        predicted and has no metrics. One that lacks only some is always refused.

    Raises:
      ValueError: if the split has no labels, the task was tokenised with another
        vocabulary, or an argument is not known.
    """
    if method not in METHODS:
      raise ValueError(
          f'No evaluation method {method!r}; it may be {" or ".join(map(repr, METHODS))}.'
      )
    _check_vocabulary(backbone, task)
    if needs_labels or task.has_labels:
      task.require_labels()
    if feature_lengths is None:
      feature_lengths = {'inputs': INPUT_LENGTH, 'targets': task.longest('targets')}
    self.task = task
    self._backbone = backbone
    self._virtual_tokens = num_virtual_tokens, num_decoder_virtual_tokens
    self._output_dir = output_dir
    self._progress = progress
    self._decoding = decoding or Decoding(max_length=feature_lengths['targets'])
    self._normalize_by_length = normalize_by_length
    self._choices = self._tree = None
    if method == 'rank' and task.label_classes:
      self._choices = ranking.encode_choices(task.label_classes, backbone.vocabulary)
      # Means may grow with every token, so that no beginning says how good its choices are.
      if len(self._choices) > _MOST_SCORED and not normalize_by_length:
        self._tree = best_first.ChoiceTree(self._choices)
    # On a mesh the devices divide the rows of a batch; those beyond the examples are empty.
    batch_size = _divisible(batch_size, backbone.mesh)
    share, shares = partitioning.data_share(backbone.mesh)
    self._batches = EvalBatches(
        task,
        batch_size,
        feature_lengths=feature_lengths,
        vocab_size=backbone.spec.vocab_size,
        num_virtual_tokens=num_virtual_tokens,
        num_decoder_virtual_tokens=num_decoder_virtual_tokens,
        placement=placement,
        lengths=lengths,
        process_index=share,
        process_count=shares,
    )
    # What the metrics compare with; nothing where nothing is known.
    self._targets = [
        task.target(index) if task.has_labels else None for index in range(len(task))
    ]
    self._metric_fns = list(task.metric_fns) or [metrics_lib.accuracy]

  def __call__(
      self,
      injection: Injection | None = None,
      params: PyTree | None = None,
      *,
      step: int | None = None,
  ) -> EvalResult:
    """Predicts every example and scores the predictions.

    Args:
      injection: the prompt, or None.
      params: the backbone's weights, where they are not the backbone's own.
      step: training step, for the result files.

    Raises:
      ValueError: if the prompt is of another length than the batches were made for.
    """
    found = _virtual_tokens(injection)
    if found != self._virtual_tokens:
      raise ValueError(
          f'The examples of {self.task.name} hold {_counted(self._virtual_tokens)}, but the '
          f'prompt has {_counted(found)}. Make the Evaluator with '
          f'num_virtual_tokens={found[0]}, num_decoder_virtual_tokens={found[1]}.'
      )
    model = (self._backbone.module, self._backbone.params if params is None else params)
    predict = self._rank if self._choices is not None else self._generate
    with partitioning.on(self._backbone.mesh):
      found = processes.gathered(list(predict(model, injection)))
    # Processes that share a copy of the model found the same.
    found = {number: prediction for number, *prediction in found}
    predictions = [self._prediction(number, *found[number]) for number in sorted(found)]
    result = EvalResult(
        task=self.task.name,
        split=self.task.split,
        metrics=self._score(
            [prediction['prediction'] for prediction in predictions],
            lambda: self._score_targets(model, injection),
        )
        if self.task.has_labels
        else {},
        predictions=predictions,
        step=step,
    )
    if self._output_dir is not None and jax.process_index() == 0:
      write_result(result, self._output_dir)
    return result

  def metric_names(self) -> list[str]:
    """What is measured, found out by scoring the targets' own texts, without the model."""
    predictions = []
    for index in range(len(self.task)):
      text = self.task.text('targets', index)
      predictions.append(self._postprocessed(text, self.task.example(index)))
    return list(self._score(predictions, lambda: [0.0] * len(self.task)))

  def _rank(self, model, injection) -> Iterator[tuple[int, str, dict[str, Any]]]:
    classes = self.task.label_classes
    for batch, numbers, of_batch in self._each_batch('ranking'):
      if self._tree is not None:
        best_B, scores_B = best_first.best_choices(
            *model, batch.encoder_input_tokens, self._tree, injection
        )
        for number, best, score in zip(of_batch, best_B, scores_B):
          yield int(number), classes[best], {'score': float(score)}
        continue
      scores_BC = ranking.score_choices(
          *model,
          batch.encoder_input_tokens,
          self._choices,
          injection,
          normalize_by_length=self._normalize_by_length,
      )
      scores_BC = partitioning.own_rows(scores_BC)
      for number, best, scores_C in zip(
          numbers, ranking.best_choice(scores_BC), scores_BC.tolist()
      ):
        yield int(number), classes[best], {'scores': dict(zip(classes, scores_C))}

  def _generate(self, model, injection) -> Iterator[tuple[int, str, dict[str, Any]]]:
    vocabulary = self._backbone.vocabulary
    for batch, numbers, of_batch in self._each_batch('decoding'):
      decoded = self._decoding(
          *model,
          batch.encoder_input_tokens,
          injection,
          eos_id=vocabulary.eos_id,
          numbers=of_batch,
      )
      tokens_BKT, scores_BK = map(partitioning.own_rows, decoded)
      for number, tokens_T, score in zip(numbers, tokens_BKT[:, -1], scores_BK[:, -1]):
        yield int(number), vocabulary.decode(tokens_T), {'score': float(score)}

  def _each_batch(self, what: str) -> Iterator[tuple[Any, np.ndarray, np.ndarray]]:
    """Every batch, and the numbers of the examples of this process's rows and of all rows."""
    shown = tqdm.tqdm(
        self._batches,
        desc=f'{what} {self.task.name}',
        unit='batch',
        # None: only on a terminal.
        disable=None if self._progress and processes.is_main() else True,
        leave=False,
        file=sys.stderr,
    )
    for batch, numbers in shown:
      placed = partitioning.place_rows(batch, self._backbone.mesh)
      own = numbers[self._batches.rows]
      # Without a mesh this process's rows are all that its devices see.
      yield placed, own, own if self._backbone.mesh is None else numbers

  def _prediction(self, index: int, text: str, scores: dict[str, Any]) -> dict[str, Any]:
    raw = self.task.example(index)
    return {
        'index': index,
        **own_numbers(raw),
        'inputs': self.task.text('inputs', index),
        'target': self._targets[index],
        'prediction_text': text,
        'prediction': self._postprocessed(text, raw),
        **scores,
    }

  def _postprocessed(self, text: str, example: Mapping[str, Any]) -> Any:
    if self.task.postprocess_fn is None:
      return text
    return self.task.postprocess_fn(text, example=example, is_target=False)

  def _score(
      self, predicted: Sequence[Any], target_scores: Callable[[], list[float]]
  ) -> dict[str, float]:
    """All metrics; `target_scores` is called where one of them compares scores."""
    values: dict[str, float] = {}
    scores = None
    for metric_fn in self._metric_fns:
      compared = predicted
      if _takes_scores(metric_fn):
        scores = target_scores() if scores is None else scores
        compared = scores
      values |= {
          name: float(value) for name, value in metric_fn(self._targets, compared).items()
      }
    return values

  def _score_targets(self, model, injection) -> list[float]:
    """Log-probability of each example's own target."""
    scores: list[tuple[int, float]] = []
    for batch, numbers, _ in self._each_batch('scoring'):
      scores_B = partitioning.own_rows(ranking.score_targets(*model, batch, injection))
      scores += zip(numbers.tolist(), scores_B.tolist())
    found = dict(processes.gathered(scores))
    return [found[number] for number in sorted(found)]


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
    params: PyTree | None = None,
    output_dir: str | None = None,
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
    params: the backbone's weights, where they are not its own.
    output_dir: where `inference_eval/` is written; None writes nothing.
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
  injection, manifest = unpack_prompt(backbone, prompt)
  source = getattr(prompt, 'source', None) or (prompt if isinstance(prompt, str) else '')
  num_virtual_tokens, num_decoder_virtual_tokens = _virtual_tokens(injection)
  if manifest is not None:
    feature_lengths = feature_lengths or manifest.feature_lengths or None
    placement = placement or manifest.placement or None
    step = manifest.step if step is None else step
  if isinstance(decoding, Decoding) and decoding.max_length is None:
    longest = (feature_lengths or {}).get('targets', Decoding.max_length)
    decoding = dataclasses.replace(decoding, max_length=longest)
  loaded = load_tasks(backbone, tasks, split, task_settings, design, feature_lengths)
  results = {}
  for name, task in loaded.items():
    evaluator = Evaluator(
        backbone,
        task,
        batch_size=min(batch_size, len(task)),
        feature_lengths=feature_lengths,
        placement=as_placement(placement or 'prefix'),
        num_virtual_tokens=num_virtual_tokens,
        num_decoder_virtual_tokens=num_decoder_virtual_tokens,
        method=method,
        lengths=lengths,
        decoding=decoding,
        normalize_by_length=normalize_by_length,
        output_dir=output_dir,
        progress=progress,
        needs_labels=False,
    )
    result = evaluator(injection, params, step=step)
    of_words = task.manifest.get('design', '')
    results[name] = dataclasses.replace(result, prompt=source or of_words)
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


def check_alone(design: PromptDesign | None, prompts: Iterable[AnyPrompt]) -> None:
  """Raises ValueError where a design is to be evaluated with prompts that were trained."""
  if design is not None and any(prompt is not None for prompt in prompts):
    raise ValueError(
        'There are a design and a prompt, but a prompt was trained on the inputs as its task '
        'has them. Evaluate one of them; if both together are meant, give the designed task '
        'instead of the design: design(task, train).'
    )


def _divisible(rows: int, mesh: Mesh | None) -> int:
  """At least so many rows that as many fall to every device, or process."""
  count = jax.process_count() if mesh is None else mesh.shape['data']
  return -(-rows // count) * count


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
    prompt.check(backbone.spec)
    return prompt, None
  prompt.check(backbone)
  return prompt.injection, prompt.manifest


def _virtual_tokens(injection: Injection | None) -> tuple[int, int]:
  """Virtual tokens in the encoder's and in the decoder's input."""
  injection = injection or Injection()
  return injection.num_virtual_tokens, injection.num_decoder_virtual_tokens


def _counted(virtual_tokens: tuple[int, int]) -> str:
  in_input, in_decoder = virtual_tokens
  return f'{in_input} virtual tokens' + (f' (and {in_decoder} in the decoder)' * bool(in_decoder))


def _takes_scores(metric_fn: Callable[..., Any]) -> bool:
  """Whether a metric compares targets with their scores; the names of seqio decide."""
  return 'scores' in inspect.signature(metric_fn).parameters


def _check_vocabulary(backbone: Backbone, task: TokenizedTask) -> None:
  if backbone.vocabulary is None:
    raise ValueError(
        f'{backbone.name} has no vocabulary, without which its predictions cannot be '
        'read. Load it with vocabulary=<the SentencePiece model it was trained with>.'
    )
  theirs, ours = task.vocabulary_fingerprint, backbone.vocabulary.fingerprint
  if theirs != ours:
    raise ValueError(
        f'{task.name}, split {task.split!r}, was tokenised with another vocabulary '
        f'({theirs[:12]}…) than that of {backbone.name} ({ours[:12]}…, '
        f'{backbone.vocabulary.path}). Load the task with backbone.vocabulary.'
    )
