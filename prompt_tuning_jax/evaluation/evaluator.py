"""One task, evaluated again and again, with one prompt or with several at once.

Metrics run over all examples together, never over batches, so that the batch size changes no
score.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import tqdm
from jax.sharding import Mesh

from prompt_tuning_jax import partitioning, processes
from prompt_tuning_jax.backbones.backbone import Backbone
from prompt_tuning_jax.data import array_file
from prompt_tuning_jax.data.batches import EvalBatches
from prompt_tuning_jax.data.prompt_design import INPUT_LENGTH
from prompt_tuning_jax.data.several_prompts import PromptLayout
from prompt_tuning_jax.data.target_prefix import without_prefix
from prompt_tuning_jax.data.tokenized_task import TokenizedTask, own_numbers
from prompt_tuning_jax.data.virtual_tokens import Placement, as_placement
from prompt_tuning_jax.evaluation import best_first, kept_answers, ranking
from prompt_tuning_jax.evaluation import metrics as metrics_lib
from prompt_tuning_jax.evaluation.decoding import Decoding
from prompt_tuning_jax.evaluation.kept_answers import AnswerFolder, KeptAnswers
from prompt_tuning_jax.evaluation.results import EvalResult, write_result
from prompt_tuning_jax.evaluation.voting import Answer
from prompt_tuning_jax.json_files import as_json
from prompt_tuning_jax.typing import Injection, PyTree
from prompt_tuning_jax.writing import check_local

METHODS = ('rank', 'generate')

# A row of a batch: the number of its example, and that of its prompt.
_Row = tuple[int, int]
# The same, the text of the answer, and its score or those of all choices.
_Found = tuple[int, int, str, dict[str, Any]]

# Of more classes than this only the best is searched for, and not all are scored.
_MOST_SCORED = 1000


class Evaluator:
  """Evaluates one task again and again; made once, called with any parameters.

  Of several prompts (`prompts`), every example has a row for each in one batch: `answers` and
  `target_scores` give what each of them finds, and `result` makes scores of it (`ensemble.py`).

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
      keep_in: AnswerFolder | None = None,
      progress: bool = True,
      needs_labels: bool = True,
      prompts: Sequence[PromptLayout] = (),
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
      keep_in: where answers are kept as they are found, until its owner has no more need of
        them; None keeps none.
      progress: whether to show a progress line.
      needs_labels: whether a split without any label is refused; where it is not, it is
        predicted and has no metrics. One that lacks only some is always refused.
      prompts: the layouts of several prompts that are to answer together; then placement and
        the numbers of virtual tokens are theirs.

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
      feature_lengths = default_lengths(task)
    self.task = task
    self._backbone = backbone
    self._num_prompts = max(len(prompts), 1)
    self._virtual_tokens = num_virtual_tokens, num_decoder_virtual_tokens
    if prompts:
      self._virtual_tokens = (
          max(prompt.num_virtual_tokens for prompt in prompts),
          prompts[0].num_decoder_virtual_tokens,
      )
    if output_dir is not None:
      check_local(output_dir)
    self._output_dir = output_dir
    self._answer_folder = keep_in or AnswerFolder(None)
    self._progress = progress
    decoding = decoding or Decoding(max_length=None)
    if isinstance(decoding, Decoding) and decoding.max_length is None:
      decoding = dataclasses.replace(decoding, max_length=feature_lengths['targets'])
    self._decoding = decoding
    self._normalize_by_length = normalize_by_length
    self._choices = self._tree = None
    if method == 'rank' and task.label_classes:
      self._choices = ranking.encode_choices(
          task.label_classes, backbone.vocabulary, task.target_prefix
      )
      # Means may grow with every token, so that no beginning says how good its choices are.
      if len(self._choices) > _MOST_SCORED and not normalize_by_length:
        self._tree = best_first.ChoiceTree(self._choices)
    # On a mesh the devices divide the rows of a batch; those beyond the examples are empty.
    batch_size = _divisible(batch_size, backbone.mesh)
    self._layout = {
        'batch_size': batch_size,
        'feature_lengths': dict(feature_lengths),
        'virtual_tokens': self._virtual_tokens,
        'lengths': lengths,
        'placements': [
            [as_placement(p.placement).description, p.num_virtual_tokens, p.input_length]
            for p in prompts
        ] or as_placement(placement).description,
    }
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
        prompts=prompts,
        process_index=share,
        process_count=shares,
    )
    # What the metrics compare with; nothing where nothing is known.
    self._targets = [
        task.target(index) if task.has_labels else None for index in range(len(task))
    ]
    self._metric_fns = list(task.metric_fns) or [metrics_lib.accuracy]

  @property
  def scores_classes(self) -> bool:
    """Whether answers hold the score of every class."""
    return self._choices is not None and self._tree is None

  def __call__(
      self,
      injection: Injection | None = None,
      params: PyTree | None = None,
      *,
      step: int | None = None,
      prompt: str = '',
  ) -> EvalResult:
    """Predicts every example and scores the predictions, with one prompt.

    Args:
      injection: the prompt, or None.
      params: the backbone's weights, where they are not the backbone's own.
      step: training step, for the result files.
      prompt: where the prompt came from, for these as well.

    Raises:
      ValueError: if the prompt is of another length than the batches were made for.
    """
    if self._num_prompts > 1:
      raise ValueError(
          f'The batches of {self.task.name} have rows for {self._num_prompts} prompts, which '
          'have several results: take them from `answers`, or use ensemble.EnsembleEvaluator.'
      )
    (answers,) = self.answers(injection, params)
    result = self.result(answers, lambda: self.target_scores(injection, params)[0], step=step)
    result = dataclasses.replace(result, prompt=prompt)
    if self._output_dir is not None and jax.process_index() == 0:
      write_result(result, self._output_dir)
    return result

  def answers(
      self, injection: Injection | None = None, params: PyTree | None = None
  ) -> list[list[Answer]]:
    """What each prompt answers each example with, in the order of the prompts and examples.

    Args:
      injection: the prompt, several as one (`injection_stack.py`), or None.
      params: the backbone's weights, where they are not the backbone's own.

    Raises:
      ValueError: if the prompts are of another number or length than the batches were made
        for.
    """
    model = self._model(injection, params)
    predict = self._rank if self._choices is not None else self._generate
    kept = self._kept(injection, params)
    batches = kept.read()
    with partitioning.on(self._backbone.mesh):
      for of_batch in predict(model, injection, len(batches)):
        batches.append(of_batch)
        kept.add(of_batch)
      found = processes.gathered(list(itertools.chain(*batches)))
    return self._by_prompt({(row, number): (*rest,) for row, number, *rest in found})

  def _kept(self, injection: Injection | None, params: PyTree | None) -> KeptAnswers:
    def depends_on() -> dict[str, Any]:
      return {
          'injection': kept_answers.describe_injection(injection),
          'task': self.task.manifest,
          # In the order of their names: files have another than what was just tokenised.
          'content': array_file.sum_of_arrays(sorted(self.task.arrays.items())),
          'layout': self._layout,
          'choices': self.task.label_classes if self._choices is not None else None,
          'normalize_by_length': self._normalize_by_length,
          'decoding': dataclasses.asdict(self._decoding) if self._choices is None else None,
      }

    return self._answer_folder.answers(self._backbone, params, depends_on)

  def result(
      self,
      answers: Sequence[Answer],
      target_scores: Callable[[], Sequence[float]],
      *,
      step: int | None = None,
  ) -> EvalResult:
    """The scores of an answer to each example.

    Args:
      answers: in the order of the examples.
      target_scores: gives the log-probability of each example's own target; called where a
        metric compares those.
      step: training step, for the result files.
    """
    predictions = [self._prediction(number, *answer) for number, answer in enumerate(answers)]
    return EvalResult(
        task=self.task.name,
        split=self.task.split,
        metrics=self._score([p['prediction'] for p in predictions], target_scores)
        if self.task.has_labels
        else {},
        predictions=predictions,
        step=step,
    )

  def target_scores(
      self, injection: Injection | None = None, params: PyTree | None = None
  ) -> list[list[float]]:
    """The log-probability that each prompt gives each example's own target."""
    model = self._model(injection, params)
    scores: list[tuple[int, int, float]] = []
    with partitioning.on(self._backbone.mesh):
      for batch, rows, _ in self._each_batch('scoring'):
        scores_B = partitioning.own_rows(ranking.score_targets(*model, batch, injection))
        scores += [(*row, score) for row, score in zip(rows, scores_B.tolist())]
      found = processes.gathered(scores)
    return self._by_prompt({(row, number): score for row, number, score in found})

  def metric_names(self) -> list[str]:
    """What is measured, found out by scoring the targets' own texts, without the model."""
    predictions = []
    for index in range(len(self.task)):
      text = self.task.text('targets', index)
      predictions.append(self._postprocessed(text, self.task.example(index)))
    return list(self._score(predictions, lambda: [0.0] * len(self.task)))

  def _model(self, injection: Injection | None, params: PyTree | None) -> tuple[Any, PyTree]:
    """The module and its weights, for prompts that the batches were made for."""
    found = _virtual_tokens(injection)
    count = 1 if injection is None else injection.num_prompts
    if count != self._num_prompts:
      raise ValueError(
          f'The batches of {self.task.name} have rows for {self._num_prompts} prompts, but the '
          f'Injection holds {count}. Make the Evaluator with prompts=[…], the layout of each.'
      )
    if found != self._virtual_tokens:
      raise ValueError(
          f'The examples of {self.task.name} hold {_counted(self._virtual_tokens)}, but the '
          f'prompt has {_counted(found)}. Make the Evaluator with '
          f'num_virtual_tokens={found[0]}, num_decoder_virtual_tokens={found[1]}.'
      )
    return self._backbone.module, self._backbone.params if params is None else params

  def _by_prompt(self, found: Mapping[_Row, Any]) -> list[list[Any]]:
    # Processes that share a copy of the model found the same.
    return [
        [found[number, prompt] for number in range(len(self.task))]
        for prompt in range(self._num_prompts)
    ]

  def _rank(self, model, injection, done: int) -> Iterator[list[_Found]]:
    """The answers to each batch behind the first `done`."""
    classes = self.task.label_classes
    for batch, rows, of_batch in self._each_batch('ranking', done):
      inputs_BS, prompt_ids_B = batch.encoder_input_tokens, batch.prompt_ids
      if self._tree is not None:
        best_B, scores_B = best_first.best_choices(
            *model, inputs_BS, self._tree, injection, prompt_ids_B
        )
        yield [
            (*row, classes[best], {'score': float(score)})
            for row, best, score in zip(of_batch, best_B, scores_B)
            if row is not None
        ]
        continue
      scores_BC = ranking.score_choices(
          *model,
          inputs_BS,
          self._choices,
          injection,
          normalize_by_length=self._normalize_by_length,
          prompt_ids_B=prompt_ids_B,
      )
      scores_BC = partitioning.own_rows(scores_BC)
      best_B = ranking.best_choice(scores_BC)
      yield [
          (*row, classes[best], {'scores': dict(zip(classes, scores_C))})
          for row, best, scores_C in zip(rows, best_B, scores_BC.tolist())
      ]

  def _generate(self, model, injection, done: int) -> Iterator[list[_Found]]:
    """The answers to each batch behind the first `done`."""
    vocabulary = self._backbone.vocabulary
    for batch, rows, of_batch in self._each_batch('decoding', done):
      decoded = self._decoding(
          *model,
          batch.encoder_input_tokens,
          injection,
          eos_id=vocabulary.eos_id,
          # What rows that only fill a batch sample means nothing.
          numbers=[row[0] if row else 0 for row in of_batch],
          prompt_ids_B=batch.prompt_ids,
      )
      tokens_BKT, scores_BK = map(partitioning.own_rows, decoded)
      texts = [
          without_prefix(vocabulary.decode(tokens_T), self.task.target_prefix)
          for tokens_T in tokens_BKT[:, -1]
      ]
      yield [
          (*row, text, {'score': float(score)})
          for row, text, score in zip(rows, texts, scores_BK[:, -1])
      ]

  def _each_batch(
      self, what: str, done: int = 0
  ) -> Iterator[tuple[Any, list[_Row], list[_Row | None]]]:
    """Every batch behind the first `done`, and the examples and prompts of its rows.

    First those of this process's rows; then those of all rows, in the order in which these lie on
    the devices, None for rows that only fill the batch.
    """
    mesh = self._backbone.mesh
    own = self._batches.rows
    # Without a mesh, this process's rows are all that its devices see.
    seen = own if mesh is None else slice(0, self._batches.batch_size)
    order = partitioning.placed_order(mesh, (seen.stop - seen.start) * self._num_prompts)
    shown = tqdm.tqdm(
        itertools.islice(self._batches, done, None),
        initial=done,
        total=len(self._batches),
        desc=f'{what} {self.task.name}',
        unit='batch',
        # None: only on a terminal.
        disable=None if self._progress and processes.is_main() else True,
        leave=False,
        file=sys.stderr,
    )
    for batch, numbers in shown:
      placed = partitioning.place_rows(batch, mesh)
      of_own, of_seen = (
          [(number, prompt) for number in of.tolist() for prompt in range(self._num_prompts)]
          for of in (numbers[own], numbers[seen])
      )
      of_placed = [of_seen[number] if number < len(of_seen) else None for number in order]
      yield placed, of_own, of_placed

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
    # As targets are kept: a tuple must not differ from the list that it was.
    return as_json(self.task.postprocess_fn(text, example=example, is_target=False))

  def _score(
      self, predicted: Sequence[Any], target_scores: Callable[[], Sequence[float]]
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


def default_lengths(task: TokenizedTask) -> dict[str, int]:
  """Longest inputs and targets in tokens where nobody asks for others."""
  return {'inputs': INPUT_LENGTH, 'targets': task.longest('targets')}


def _divisible(rows: int, mesh: Mesh | None) -> int:
  """At least so many rows that as many fall to every device, or process."""
  count = jax.process_count() if mesh is None else mesh.shape['data']
  return -(-rows // count) * count


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
  vocabulary = backbone.needed_vocabulary('its predictions cannot be read')
  theirs, ours = task.vocabulary_fingerprint, vocabulary.fingerprint
  if theirs != ours:
    raise ValueError(
        f'{task.name}, split {task.split!r}, was tokenised with another vocabulary '
        f'({theirs[:12]}…) than that of {backbone.name} ({ours[:12]}…, '
        f'{vocabulary.path}). Load the task with backbone.vocabulary.'
    )
