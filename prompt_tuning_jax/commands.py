"""What the commands do beyond one call of the library, in plain Python.

`registry.py` offers these functions to gin under their own names, `cli.py` calls them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax

from prompt_tuning_jax import artifact
from prompt_tuning_jax.backbones.backbone import Backbone
from prompt_tuning_jax.backbones.t5 import T5, T5Config
from prompt_tuning_jax.checkpoints import load, native
from prompt_tuning_jax.data.cache import DEFAULT_TASK_MODULE, load_task_or_mixture
from prompt_tuning_jax.data.pretraining import Component
from prompt_tuning_jax.data.tokenized_task import TokenizedTask
from prompt_tuning_jax.data.vocabulary import Vocabulary
from prompt_tuning_jax.evaluation import evaluate as evaluate_lib
from prompt_tuning_jax.evaluation import infer as infer_lib
from prompt_tuning_jax.evaluation.decoding import Decoding
from prompt_tuning_jax.evaluation.evaluate import EvalResult
from prompt_tuning_jax.training import trainable as trainable_lib
from prompt_tuning_jax.training.state_saving import Saved, StateSaver
from prompt_tuning_jax.training.step import TrainState
from prompt_tuning_jax.typing import Injection, PyTree

# In a dry run weights may be missing where the sizes are known, and texts stay unread.
_dry_run = False


@contextlib.contextmanager
def dry_run() -> Iterator[None]:
  """In this context gin's objects are built as far as nothing large is read."""
  global _dry_run
  _dry_run = True
  try:
    yield
  finally:
    _dry_run = False


def load_backbone(
    where: str | os.PathLike[str],
    *,
    config: T5Config | None = None,
    dtype: str = 'float32',
    max_distance: int | None = None,
    vocabulary: Vocabulary | str | None = None,
    remat: str = 'none',
) -> Backbone:
  """`checkpoints.load.load_backbone` for gin files that also state the model's sizes.

  Args:
    config: the sizes that the model must have; None for whatever it has.

  Raises:
    ValueError: if the model at `where` has other sizes than `config`; else as
      `checkpoints.load.load_backbone`.
  """
  try:
    backbone = load.load_backbone(
        where, dtype=dtype, max_distance=max_distance, vocabulary=vocabulary, remat=remat
    )
  except (FileNotFoundError, ValueError):
    if not _dry_run or config is None or os.path.exists(where):
      raise
    return _absent(os.fspath(where), config)
  if config is not None and backbone.spec != T5(config).spec:
    raise ValueError(
        f'{where} holds a model of other sizes ({backbone.spec}) than MODEL_CONFIG says '
        f'({T5(config).spec}). Name the file of gin/models/ that belongs to it, or set '
        'MODEL_CONFIG=None.'
    )
  return backbone


def _absent(where: str, config: T5Config) -> Backbone:
  def load_params():
    raise FileNotFoundError(f'{where} is not on this machine.')

  name = '/'.join(where.rstrip('/').split('/')[-2:])
  return Backbone(
      name, T5(config), None, load_params, source=f'{where} (not on this machine)'
  )


def vocabulary_of(backbone: Backbone) -> Vocabulary:
  """The vocabulary a backbone was trained with.

  Raises:
    ValueError: if it has none.
  """
  if backbone.vocabulary is None and not _dry_run:
    raise ValueError(
        f'{backbone.name} has no vocabulary beside its weights; set VOCABULARY to the '
        'SentencePiece model it was trained with.'
    )
  return backbone.vocabulary


def text_files(
    paths: str | Sequence[str],
    vocabulary: Vocabulary,
    *,
    name: str | None = None,
    split: str = 'train',
    cache_dir: str | None = None,
) -> TokenizedTask | tuple[str, ...]:
  """`TokenizedTask.from_text_files`; in a dry run the paths, once they are known to exist."""
  if _dry_run:
    return _existing(paths)
  return TokenizedTask.from_text_files(
      paths, vocabulary, name=name, split=split, cache_dir=cache_dir
  )


def jsonl_pairs(
    path: str,
    vocabulary: Vocabulary,
    *,
    name: str | None = None,
    split: str = 'train',
    cache_dir: str | None = None,
) -> TokenizedTask | tuple[str, ...]:
  """`TokenizedTask.from_jsonl`; in a dry run the path, once it is known to exist."""
  if _dry_run:
    return _existing(path)
  return TokenizedTask.from_jsonl(
      path, vocabulary, name=name, split=split, cache_dir=cache_dir
  )


def _existing(paths: str | Sequence[str]) -> tuple[str, ...]:
  paths = (paths,) if isinstance(paths, str) else tuple(paths)
  for path in paths:
    if not os.path.isfile(path):
      raise FileNotFoundError(f'No text file {path}.')
  return paths


def steps_after(total: int, start: int) -> int:
  """Steps of a run that ends at `total`, counted T5X's way from pretraining's start.

  Raises:
    ValueError: if `total` is not beyond `start`.
  """
  if total <= start:
    raise ValueError(
        f'TRAIN_STEPS={total:,} is not beyond PRETRAINED_STEPS={start:,}: in T5X it counts '
        f'the pretraining too. For n steps set TRAIN_STEPS={start:,} + n, or set '
        'TRAIN_STEPS_RELATIVE=n instead.'
    )
  return total - start


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


def evaluate(
    *,
    backbone: Backbone,
    task: str,
    split: str = 'validation',
    prompt_file: str | None = None,
    checkpoint_path: str | None = None,
    method: nn.Module | None = None,
    trainable: Any = None,
    best_metric: str | None = None,
    batch_size: int = 64,
    feature_lengths: Mapping[str, int] | None = None,
    placement: Any = None,
    eval_method: str = 'rank',
    lengths: str = 'bucket',
    decoding: Decoding | None = None,
    output_dir: str | None = None,
    task_module: str = DEFAULT_TASK_MODULE,
    tfds_data_dir: str | None = None,
    cache_dir: str | None = None,
) -> list[EvalResult]:
  """Scores a prompt, a run, or the bare backbone on a task or every task of a mixture.

  Args:
    backbone: the model; the one a run started from.
    task: name of a seqio task or mixture.
    split: its split.
    prompt_file: an artifact or a `.npy` prompt, or
    checkpoint_path: a run's folder or one `checkpoint_<step>` in it.
    method: the run's prompt method, where a checkpoint is named.
    trainable: the run's optimiser or labelling, where a checkpoint is named.
    best_metric: metric of a run's best state.
    batch_size: rows of a batch.
    feature_lengths: longest inputs and targets; default: as the prompt was trained.
    placement: where the virtual tokens stand; default: as the prompt was trained.
    eval_method: 'rank' or 'generate'.
    lengths: 'pad' or 'bucket'.
    decoding: how to generate; greedily where None.
    output_dir: where metrics and predictions are written, if anywhere.
    task_module: module whose import registers the task.
    tfds_data_dir: folder of TensorFlow Datasets.
    cache_dir: folder of tokenised tasks.

  Returns:
    The result of each task.
  """
  prompt, params, step = None, None, None
  if prompt_file and checkpoint_path:
    raise ValueError(
        f'PROMPT_FILE={prompt_file} and CHECKPOINT_PATH={checkpoint_path} are both set; '
        'evaluate takes one of them.'
    )
  if prompt_file:
    prompt = artifact.load_prompt(prompt_file)
  elif checkpoint_path:
    run = restore_run(
        checkpoint_path, backbone, method, trainable, best_metric=best_metric
    )
    prompt, params, step = run.injection, run.params, run.saved.step
    feature_lengths = feature_lengths or run.description['feature_lengths']
    placement = placement or run.description['placement']
  tasks = load_task_or_mixture(
      task,
      split,
      vocabulary_of(backbone),
      task_module=task_module,
      tfds_data_dir=tfds_data_dir,
      cache_dir=cache_dir,
  )
  results = evaluate_lib.evaluate(
      backbone,
      prompt,
      [of_task for of_task, _ in tasks],
      batch_size=batch_size,
      feature_lengths=feature_lengths,
      placement=placement,
      method=eval_method,
      lengths=lengths,
      decoding=decoding,
      params=params,
      output_dir=output_dir,
      step=step,
  )
  return list(results.values())


def infer(
    *,
    backbone: Backbone,
    texts: Sequence[str] = (),
    prompt_file: str | None = None,
    choices: Sequence[str] | None = None,
    placement: Any = None,
    batch_size: int = 64,
    decoding: Decoding = Decoding(),
    output_dir: str | None = None,
) -> list[str]:
  """Answers texts: ranks the choices where there are any, else writes freely.

  Args:
    backbone: the model.
    texts: the inputs, as the task words them.
    prompt_file: an artifact or a `.npy` prompt; None for the bare model.
    choices: texts to choose from.
    placement: where the virtual tokens stand; default: as the prompt was trained.
    batch_size: most texts in a batch.
    decoding: how to write freely.
    output_dir: where `inferences.jsonl` is written, if anywhere.

  Returns:
    A line for each text: the answer, and where choices were ranked their
    log-probabilities, best first.
  """
  if not texts:
    raise ValueError('infer has no texts: name them as arguments or on standard input.')
  prompt = artifact.load_prompt(prompt_file) if prompt_file else None
  if choices:
    ranked = infer_lib.rank(
        backbone, prompt, texts, choices, placement=placement, batch_size=batch_size
    )
    answers = [
        {'inputs': text, 'prediction': answer.label, 'scores': answer.scores}
        for text, answer in zip(texts, ranked, strict=True)
    ]
  else:
    settings = dataclasses.asdict(decoding)
    written = infer_lib.generate(
        backbone,
        prompt,
        texts,
        decode=settings.pop('strategy'),
        placement=placement,
        batch_size=batch_size,
        **settings,
    )
    answers = [
        {'inputs': text, 'prediction': answer}
        for text, answer in zip(texts, written, strict=True)
    ]
  if output_dir:
    os.makedirs(output_dir, exist_ok=True)
    path = os.path.join(output_dir, 'inferences.jsonl')
    with open(path + '.tmp', 'w', encoding='utf-8') as file:
      file.writelines(json.dumps(a, ensure_ascii=False) + '\n' for a in answers)
    os.replace(path + '.tmp', path)
  return [_answer_line(answer) for answer in answers]


def _answer_line(answer: Mapping[str, Any]) -> str:
  scores = sorted(answer.get('scores', {}).items(), key=lambda item: -item[1])
  return '\t'.join([answer['prediction'], *(f'{name} {s:.3f}' for name, s in scores)])


@contextlib.contextmanager
def kept_config(model_dir: str, text: str) -> Iterator[None]:
  """Keeps the configuration as `config.gin` in the folder of a run, for as long as it lasts.

  It is written before a new run, and replaced after a resumed one that ended well: a
  run that is refused because the folder holds another one changes nothing there.
  """
  path = os.path.join(model_dir, 'config.gin')

  def write() -> None:
    if jax.process_index() == 0:
      os.makedirs(model_dir, exist_ok=True)
      with open(path + '.tmp', 'w', encoding='utf-8') as file:
        file.write(text)
      os.replace(path + '.tmp', path)

  if not os.path.exists(os.path.join(model_dir, 'run.json')):
    # Where the folder cannot be written, the run itself has more to say about it.
    with contextlib.suppress(OSError):
      write()
  yield
  write()


def describe(name: str, function: Callable[..., Any], kwargs: Mapping[str, Any]) -> None:
  """Prints what a command would do, for --dry_run."""
  print(f'{name}: dry run, no weights are loaded')
  for key, value in kwargs.items():
    if isinstance(value, Backbone):
      print(f'  {key:16} {value!r}')
    elif isinstance(value, nn.Module):
      print(f'  {key:16} {_describe_method(value, kwargs.get("backbone"))}')
    elif key == 'components':
      for part in value:
        print(f'  component        {_describe_component(part)}')
    elif key == 'trainable':
      labels = value if isinstance(value, Mapping) else ['everything']
      print(f'  {key:16} {", ".join(labels)}')
    else:
      print(f'  {key:16} {value}')


def _describe_method(method: nn.Module, backbone: Backbone | None) -> str:
  name = f'{type(method).__name__}, {method.num_virtual_tokens} virtual tokens'
  if backbone is None:
    return name
  # Initialisers may read embeddings; the shapes do not depend on them.
  zeros = {
      field.name: jax.nn.initializers.zeros
      for field in dataclasses.fields(method)
      if field.name.endswith('_init')
  }
  shapes = jax.eval_shape(
      lambda key: method.clone(**zeros).init(key, backbone.spec), jax.random.key(0)
  )
  count = trainable_lib.count(shapes)
  share = 100 * count / backbone.num_params
  return f'{name}, {count:,} parameters ({share:.2g} % of the model)'


def _describe_component(part: Component) -> str:
  source = part.source if isinstance(part.source, tuple) else (repr(part.source),)
  return (
      f'{part.name}: {part.objective} of {", ".join(source)}, weight {part.weight}, '
      f'batches of {part.batch_size}, inputs {part.input_length}'
  )


def report(result: Any) -> None:
  """Prints what a command returned: lines, or where the result is and its scores."""
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
