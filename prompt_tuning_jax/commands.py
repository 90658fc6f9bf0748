"""What `evaluate` and `infer` do between files and the library, and what commands print."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prompt_tuning_jax import processes
from prompt_tuning_jax.artifact import Prompt
from prompt_tuning_jax.backbones.backbone import Backbone
from prompt_tuning_jax.config.building import vocabulary_of
from prompt_tuning_jax.data.cache import DEFAULT_TASK_MODULE
from prompt_tuning_jax.data.file_task import FileTask
from prompt_tuning_jax.data.pretraining import Component
from prompt_tuning_jax.data.prompt_design import PromptDesign
from prompt_tuning_jax.data.virtual_tokens import Placement, as_placement
from prompt_tuning_jax.evaluation import infer as infer_lib
from prompt_tuning_jax.evaluation.decoding import Decoding
from prompt_tuning_jax.evaluation.evaluate import load_tasks
from prompt_tuning_jax.evaluation.kept_answers import AnswerFolder
from prompt_tuning_jax.evaluation.prompt_paths import find_prompts
from prompt_tuning_jax.evaluation.report import Report, evaluate_prompts
from prompt_tuning_jax.export import restore_run
from prompt_tuning_jax.json_files import write_jsonl
from prompt_tuning_jax.methods import method as method_lib
from prompt_tuning_jax.methods.method import Method
from prompt_tuning_jax.neighbors.report import NeighborReport
from prompt_tuning_jax.plan import Plan
from prompt_tuning_jax.prompt_files import load_prompt
from prompt_tuning_jax.sweep_report import SweepResult
from prompt_tuning_jax.training import trainable as trainable_lib
from prompt_tuning_jax.training.sweep_runs import announced, distinct, programs_of
from prompt_tuning_jax.writing import written_whole

# Rows of a batch where EVAL_BATCH_SIZE is None, as in the configuration of a training run.
_BATCH_SIZE = 64


def evaluate(
    *,
    backbone: Backbone,
    task: str | FileTask,
    split: str = 'validation',
    prompt_file: str | Sequence[str] | Mapping[str, Any] | None = None,
    checkpoint_path: str | None = None,
    method: Method | None = None,
    trainable: Any = None,
    best_metric: str | None = None,
    best_mode: str = 'max',
    design: PromptDesign | None = None,
    batch_size: int | None = None,
    feature_lengths: Mapping[str, int] | None = None,
    placement: Any = None,
    target_prefix: str | None = None,
    eval_method: str = 'rank',
    lengths: str = 'bucket',
    decoding: Decoding | None = None,
    ensemble: str | None = None,
    output_dir: str | None = None,
    task_module: str = DEFAULT_TASK_MODULE,
    tfds_data_dir: str | None = None,
    cache_dir: str | None = None,
) -> Report:
  """Scores prompts, a run, or the bare backbone on a task or every task of a mixture.

  Args:
    backbone: the model; the one a run started from.
    task: name of a seqio task or mixture, or a task of files.
    split: its split.
    prompt_file: an artifact or a `.npy` prompt, or several, see
      `prompt_paths.find_prompts`; or
    checkpoint_path: a run's folder or one `checkpoint_<step>` in it.
    method: the run's prompt method, where a checkpoint is named.
    trainable: the run's optimiser or labelling, where a checkpoint is named.
    best_metric: metric of a run's best state.
    best_mode: whether that is the 'max' or the 'min'.
    design: words and solved examples around each input, for the bare backbone.
    batch_size: rows of a batch; 64 where None.
    feature_lengths: longest inputs and targets; default: as the prompt was trained.
    placement: where the virtual tokens stand; default: as the prompt was trained.
    target_prefix: what stands before every target; default: as the prompt was trained.
    eval_method: 'rank' or 'generate'.
    lengths: 'pad', or 'bucket' or 'pack', which are one here.
    decoding: how to generate; greedily up to the length of the targets where None. Its
      max_length may be None: as the prompt was trained.
    ensemble: 'vote' or 'mean' lets several prompts answer together too, see `voting.agreed`.
    output_dir: where metrics, predictions and the report are written, if anywhere.
    task_module: module whose import registers the task.
    tfds_data_dir: folder of TensorFlow Datasets.
    cache_dir: folder of tokenised tasks.

  Returns:
    The results, which print as a line or a table.
  """
  vocabulary_of(backbone)  # Says what to do where there is none.
  settings = dict(task_module=task_module, tfds_data_dir=tfds_data_dir, cache_dir=cache_dir)
  loaded = load_tasks(backbone, task, split, settings, design, feature_lengths)
  prompts: Any = [None]
  of_run: dict[str, Any] = {}
  if prompt_file:
    names = [of_task.name for of_task in loaded.values()]
    prompts = processes.from_main(lambda: _read_prompts(prompt_file, names))
  elif checkpoint_path:
    run = restore_run(
        checkpoint_path,
        backbone,
        method,
        trainable,
        best_metric=best_metric,
        best_mode=best_mode,
    )
    prompts = [run.injection]
    feature_lengths = feature_lengths or run.description.get('feature_lengths')
    placement = placement or run.description.get('placement')
    if target_prefix is None:
      target_prefix = run.description.get('target_prefix')
    # A frozen backbone's weights are its own, which need not be summed to be known again.
    of_run = {
        'params': run.params if run.tuned_backbone else None,
        'step': run.saved.step,
    }
  return evaluate_prompts(
      backbone,
      prompts,
      list(loaded.values()),
      batch_size=batch_size or _BATCH_SIZE,
      feature_lengths=feature_lengths,
      placement=placement,
      target_prefix=target_prefix,
      method=eval_method,
      lengths=lengths,
      decoding=decoding,
      ensemble=ensemble,
      output_dir=output_dir,
      **of_run,
  )


def _read_prompts(prompt_file: Any, tasks: Sequence[str]) -> dict[str, list[Prompt]]:
  found = {task: find_prompts(prompt_file, task) for task in tasks}
  # Each is read once, and all of them before the first is evaluated.
  read = {path: load_prompt(path) for path in itertools.chain(*found.values())}
  return {task: [read[path] for path in paths] for task, paths in found.items()}


def infer(
    *,
    backbone: Backbone,
    texts: Sequence[str] = (),
    prompt_file: str | Sequence[str] | None = None,
    choices: Sequence[str] | None = None,
    placement: Any = None,
    design: PromptDesign | None = None,
    batch_size: int | None = None,
    decoding: Decoding | None = None,
    ensemble: str | None = 'vote',
    output_dir: str | None = None,
) -> list[str]:
  """Answers texts: ranks the choices where there are any, else writes freely.

  Args:
    backbone: the model.
    texts: the inputs, as the task words them; where the prompt stands in a template of
      other fields, or the design has such a template, each a JSON object with the text of
      every field. A blank one is not put to the model: its answer is blank too, so that
      answers and texts match line by line.
    prompt_file: an artifact or a `.npy` prompt; several of one kind, by a list or a path with
      `*`, answer together; None for the bare model.
    choices: texts to choose from.
    placement: where the virtual tokens stand; default: as the prompt was trained.
    design: words around each text, for the bare model; without solved examples, since there
      is no task to draw them from.
    batch_size: most texts in a batch; 64 where None.
    decoding: how to write freely; greedily where None. Its max_length may be None: as the prompt
      was trained.
    ensemble: how several prompts answer together: 'vote' or 'mean', see `voting.agreed`; None
      where there is one.
    output_dir: where `inferences.jsonl` is written, if anywhere. Answers are kept there as they
      are found, so that the same command, interrupted, goes on (in one process).

  Returns:
    A line for each text, in their order: the answer, and where choices were ranked
    their log-probabilities, best first; of several prompts the means of these, and the votes.
  """
  asked = [text for text in texts if text.strip()]
  if not asked:
    raise ValueError('infer has no texts: name them as arguments or on standard input.')
  if len(asked) < len(texts):
    warnings.warn(
        f'{len(texts) - len(asked)} of {len(texts)} texts are blank, and so are their '
        'answers.',
        stacklevel=2,
    )
  prompts: list[Prompt | None] = [None]
  if prompt_file:
    prompts = processes.from_main(
        lambda: [load_prompt(path) for path in find_prompts(prompt_file, '')]
    )
  places = [
      as_placement(placement or (prompt and prompt.manifest.placement) or 'prefix')
      for prompt in prompts
  ]
  _check_fields(places)
  fields = places[0].fields if design is None else design.fields
  asked = [_example(text, fields) for text in asked]
  if design is not None:
    design.check_words_alone()
    design.warn_of_line_breaks(vocabulary_of(backbone))
    asked = [
        design.text({'inputs': text} if isinstance(text, str) else text) for text in asked
    ]
  answer_folder = AnswerFolder(output_dir)
  found = _answered(
      backbone,
      prompts,
      asked,
      choices,
      decoding or Decoding(max_length=None),
      ensemble,
      placement=placement,
      batch_size=batch_size or _BATCH_SIZE,
      keep_in=answer_folder,
      progress=processes.is_main(),
  )
  remaining = iter(found)
  answers = [
      {'inputs': text, **(next(remaining) if text.strip() else {'prediction': ''})}
      for text in texts
  ]
  if output_dir and processes.is_main():
    os.makedirs(output_dir, exist_ok=True)
    write_jsonl(os.path.join(output_dir, 'inferences.jsonl'), answers)
  answer_folder.forget()
  return [_answer_line(answer) for answer in answers]


def _answered(
    backbone: Backbone,
    prompts: Sequence[Prompt | None],
    texts: Sequence[Any],
    choices: Sequence[str] | None,
    decoding: Decoding,
    ensemble: str,
    **shared: Any,
) -> list[dict[str, Any]]:
  """What one prompt, or several together, answer each text with, and what they found of it."""
  written: dict[str, Any] = {}
  if choices is None:
    written = dataclasses.asdict(decoding)
    written['decode'] = written.pop('strategy')
  if len(prompts) > 1:
    together = infer_lib.ensemble(
        backbone, prompts, texts, choices=choices, how=ensemble, **shared, **written
    )
    return [
        {
            'prediction': answer.label,
            **({'scores': answer.scores} if choices is not None else {}),
            'votes': answer.votes,
        }
        for answer in together
    ]
  if choices is None:
    answers = infer_lib.generate(backbone, prompts[0], texts, **shared, **written)
    return [{'prediction': answer} for answer in answers]
  ranked = infer_lib.rank(backbone, prompts[0], texts, choices, **shared)
  return [{'prediction': answer.label, 'scores': answer.scores} for answer in ranked]


def _example(text: str, names: Sequence[str]) -> str | dict[str, str]:
  """A text as it is, or the fields that it holds where the template reads several."""
  if tuple(names) == ('inputs',):
    return text
  try:
    fields = json.loads(text)
    if not isinstance(fields, dict) or not all(isinstance(v, str) for v in fields.values()):
      raise ValueError('no object, or one whose fields are not all texts')
  except ValueError as error:
    example = json.dumps(dict.fromkeys(names, '…'), ensure_ascii=False)
    raise ValueError(
        f'The template of this prompt reads the fields {", ".join(names)}, so that '
        f'each text is a JSON object such as {example}; this is none ({error}): {text}'
    ) from error
  return fields


def _check_fields(placements: Sequence[Placement]) -> None:
  """Raises ValueError unless a text can be read by all of the placements."""
  fields = {placement.fields for placement in placements}
  if len(fields) > 1:
    raise ValueError(
        'The prompts of PROMPT_FILE stand in templates of different fields ('
        + '; '.join(', '.join(of) for of in sorted(fields))
        + '), so that no text is one for all of them. Name prompts of one task.'
    )


def _answer_line(answer: Mapping[str, Any]) -> str:
  votes, scores = answer.get('votes', {}), answer.get('scores', {})
  counts = {name: f'{votes.get(name, 0)} of {sum(votes.values())}' for name in (*votes, *scores)}
  parts = [answer['prediction']]
  for name, score in sorted(scores.items(), key=lambda item: -item[1]):
    parts.append(f'{name} {score:.3f}' + (f', {counts[name]}' if votes else ''))
  if votes and not scores:
    parts.append(counts[answer['prediction']])
  # One line whatever the answer: some vocabularies hold line breaks.
  return '\t'.join(' '.join(part.splitlines()) for part in parts)


@contextlib.contextmanager
def kept_config(model_dir: str, text: str) -> Iterator[None]:
  """Keeps the configuration as `config.gin` in the folder of a run, for as long as it lasts.

  It is written before a new run, and replaced after a resumed one that ended well: a
  run that is refused because the folder holds another one changes nothing there.
  """
  path = os.path.join(model_dir, 'config.gin')

  def write() -> None:
    if processes.is_main():
      with written_whole(path) as unfinished:
        Path(unfinished).write_text(text, encoding='utf-8')

  # What a run, and what a sweep leaves.
  holds = ('run.json', 'results.jsonl')
  if not any(os.path.exists(os.path.join(model_dir, name)) for name in holds):
    # Where the folder cannot be written, the run itself has more to say about it.
    with contextlib.suppress(OSError):
      write()
  yield
  write()


def describe(name: str, kwargs: Mapping[str, Any]) -> None:
  """Prints what a command would do, for --dry_run."""
  print(f'{name}: dry run, no weights are loaded')
  for key, value in kwargs.items():
    if isinstance(value, Backbone):
      print(f'  {key:16} {value!r}')
    elif isinstance(value, Method):
      print(f'  {key:16} {_describe_method(value, kwargs.get("backbone"))}')
    elif key == 'grid':
      print(textwrap.indent(announced(programs_of(distinct(value))), '  '))
    elif key == 'components':
      for part in value:
        print(f'  component        {_describe_component(part)}')
    elif key == 'trainable':
      labels = value if isinstance(value, Mapping) else ['everything']
      print(f'  {key:16} {", ".join(labels)}')
    else:
      print(f'  {key:16} {value}')


def _describe_method(method: Method, backbone: Backbone | None) -> str:
  if backbone is None:
    return type(method).__name__
  params, injection = method_lib.shapes(method, backbone.spec)
  count = trainable_lib.count(params)
  share = 100 * count / backbone.num_params
  what = f'{type(method).__name__}, {injection}'
  return f'{what}, {count:,} parameters train ({share:.2g} % of the model)'


def _describe_component(part: Component) -> str:
  source = part.source if isinstance(part.source, tuple) else (repr(part.source),)
  return (
      f'{part.name}: {part.objective} of {", ".join(source)}, weight {part.weight}, '
      f'batches of {part.batch_size}, inputs {part.input_length}'
  )


def report(result: Any) -> None:
  """Prints what a command returned: lines, or where the result is and its scores."""
  if isinstance(result, Report | Plan | SweepResult | NeighborReport):
    print(result)
    return
  if isinstance(result, list):
    for item in result:
      print(item)
    return
  path = getattr(result, 'path', result)
  metrics = getattr(result, 'metrics', None) or {}
  step = getattr(result, 'step', None)
  parts = [str(path)]
  if step is not None:
    parts.append(f'step {step:,}')
  parts += [f'{name} {value:.2f}' for name, value in metrics.items()]
  print(', '.join(parts))
