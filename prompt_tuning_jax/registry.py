"""The names that gin files may use: the library's functions, and macros in capitals.

Functions are registered with gin from the outside (`register`), so that the files they
live in stay free of it, under one short name each: `SoftPrompt`, not
`prompt_tuning_jax.methods.soft_prompt.SoftPrompt`. Optax and JAX's initialisers come
with their package's name: `optax.warmup_cosine_decay_schedule`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import gin


@dataclasses.dataclass(frozen=True)
class Macro:
  """A name that recipes and users set in capitals.

  Attributes:
    meaning: one line for help and errors.
    example: a value as it is written in a file.
    is_text: whether its value is a text, so that a flag may leave out the quotes.
  """

  meaning: str
  example: str
  is_text: bool = False


MACROS: Mapping[str, Macro] = {
    'MODEL_DIR': Macro('folder of the run: its states, metrics, config', "'/tmp/run'", True),
    'MIXTURE_OR_TASK_NAME': Macro(
        'name of the seqio task or mixture', "'taskless_super_glue_cb_v102'", True
    ),
    'MIXTURE_OR_TASK_MODULE': Macro(
        'Python module whose import registers the task', "'my_project.tasks'", True
    ),
    'EVAL_TASK_NAME': Macro(
        'task to evaluate on while training, if another', "'glue_mrpc_v200'", True
    ),
    'TASK_FEATURE_LENGTHS': Macro(
        'longest inputs and targets in tokens; the rest is cut', "{'inputs': 512, 'targets': 8}"
    ),
    'SPLIT': Macro('split of the task to evaluate', "'validation'", True),
    'TRAIN_STEPS': Macro(
        "steps counted from the start of pretraining, T5X's way (runs/t5x_exact.gin)",
        '1_130_000',
    ),
    'TRAIN_STEPS_RELATIVE': Macro('steps of this run', '30_000'),
    'PRETRAINED_STEPS': Macro(
        'steps in the pretrained checkpoint, where TRAIN_STEPS is used', '1_100_000'
    ),
    'INITIAL_CHECKPOINT_PATH': Macro(
        'the backbone: a folder (T5X, Hugging Face, ours) or a packaged name', "'nano'", True
    ),
    'VOCABULARY': Macro(
        'SentencePiece model; None is the one beside the backbone', "'/data/spiece.model'", True
    ),
    'REMAT': Macro(
        'what the backward pass computes again to save memory', "'full'", True
    ),
    'EVAL_METHOD': Macro("'rank' the labels or 'generate' text", "'rank'", True),
    'DTYPE': Macro("type of the computation: 'float32' or 'bfloat16'", "'float32'", True),
    'BACKBONE': Macro('the pretrained model', '@backbone/gin.singleton()'),
    'MODEL_CONFIG': Macro('sizes of the model', '@T5Config()'),
    'BATCH_SIZE': Macro('examples in a batch', '32'),
    'EVAL_BATCH_SIZE': Macro('examples in a batch of an evaluation', '64'),
    'MICROBATCHES': Macro('parts of a batch, one after the other, to save memory', '1'),
    'LENGTHS': Macro("'pad' to the feature lengths, or 'bucket'", "'bucket'", True),
    'PLACEMENT': Macro('where the prompt stands among the tokens', "'prefix'", True),
    'DROPOUT_RATE': Macro('dropout in the backbone while training', '0.1'),
    'LEARNING_RATE': Macro("the optimiser's learning rate or schedule", '0.3'),
    'TRAINABLE': Macro(
        'what trains, and with which optimiser', "{'prompt': @adafactor()}"
    ),
    'Z_LOSS': Macro('weight of the z-loss', '0.0001'),
    'LABEL_SMOOTHING': Macro('label smoothing', '0.0'),
    'LOSS_NORMALIZING_FACTOR': Macro('what the summed loss is divided by', 'None'),
    'EVAL_PERIOD': Macro('steps between evaluations', '1000'),
    'CHECKPOINT_PERIOD': Macro('steps between saved states', '1000'),
    'LOG_PERIOD': Macro('steps between records of the loss', '50'),
    'BEST_METRIC': Macro("metric by which the best state is kept", "'accuracy'", True),
    'RANDOM_SEED': Macro('seed of the prompt, the data order and dropout', '0'),
    'PROMPT': Macro('the prompt method', '@SoftPrompt()'),
    'PROMPT_LENGTH': Macro('virtual tokens of the prompt', '100'),
    'PROMPT_TEXT': Macro('text the prompt starts from', "'what is it:'", True),
    'CLASS_LABELS': Macro(
        'words whose embeddings the prompt starts from', "['positive', 'negative']"
    ),
    'PROMPT_FILE': Macro(
        'a tuned prompt: an artifact or the .npy of the original code',
        "'/tmp/run/prompt.safetensors'",
        True,
    ),
    'CHECKPOINT_PATH': Macro(
        "a run's folder, or one checkpoint_<step> in it", "'/tmp/run'", True
    ),
    'EVAL_OUTPUT_DIR': Macro('folder for metrics and predictions', "'/tmp/eval'", True),
    'INFER_OUTPUT_DIR': Macro('folder for the answers', "'/tmp/infer'", True),
    'CACHE_DIR': Macro('folder of tokenised tasks', "'~/.cache/prompt_tuning_jax'", True),
    'TFDS_DATA_DIR': Macro('folder of TensorFlow Datasets (--tfds_data_dir)', "'/data'", True),
    'TEXT_FILES': Macro('text files, one document a line', "['books.txt']"),
    'INPUT_LENGTH': Macro('tokens of an input in pretraining', '512'),
    'TARGET_LENGTH': Macro('tokens of a target in pretraining', '512'),
    'COMPONENTS': Macro('the mixture to pretrain on', '[@books/Component()]'),
}

# Macros of T5X that have no place here, and what to do instead.
RETIRED = {
    'USE_CACHED_TASKS': 'Tokenised tasks are always cached (CACHE_DIR); leave it out.',
    'SHUFFLE_TRAIN_EXAMPLES': 'The order is always a seeded permutation; leave it out.',
    'ACTIVATION_DTYPE': 'Use DTYPE.',
    'SAVING_PERIOD': 'Use CHECKPOINT_PERIOD.',
    'EVAL_STEPS': 'Evaluation always covers the whole split; leave it out.',
    'OPTIMIZER': 'Use TRAINABLE.',
    'ARCHITECTURE': 'Use BACKBONE, or one of gin/models/.',
    'MODEL': 'Use BACKBONE, or one of gin/models/.',
    'PROMPT_REGEX': 'Use TRAINABLE.',
}

# Function by its name in gin, as module:attribute; imported when a command needs gin.
_FUNCTIONS: Mapping[str, str] = {
    'load_backbone': 'building:load_backbone',
    'T5Config': 'backbones.t5:T5Config',
    'Vocabulary': 'data.vocabulary:Vocabulary',
    'SoftPrompt': 'methods.soft_prompt:SoftPrompt',
    'uniform': 'initializers:uniform',
    'sampled_vocab': 'initializers:sampled_vocab',
    'class_labels': 'initializers:class_labels',
    'text': 'initializers:text',
    'from_file': 'initializers:from_file',
    'Template': 'data.virtual_tokens:Template',
    'adafactor': 'training.optimizers:adafactor',
    'adamw': 'training.optimizers:adamw',
    'muon': 'training.optimizers:muon',
    'warmup_linear': 'training.optimizers:warmup_linear',
    'warmup_rsqrt': 'training.optimizers:warmup_rsqrt',
    'LossConfig': 'training.losses:LossConfig',
    'vocabulary_of': 'building:vocabulary_of',
    'steps_after': 'building:steps_after',
    'Decoding': 'evaluation.decoding:Decoding',
    'Component': 'data.pretraining:Component',
    'text_files': 'building:text_files',
    'jsonl_pairs': 'building:jsonl_pairs',
    'load_task': 'data.cache:load_task',
}

# The commands that gin configures. Gin gathers their arguments; `cli.py` calls them.
_COMMANDS: Mapping[str, str] = {
    'train': 'training.train:train',
    'pretrain': 'training.pretrain:pretrain',
    'adapt': 'training.pretrain:pretrain',
    'evaluate': 'commands:evaluate',
    'infer': 'commands:infer',
    'export': 'export:export',
}

# The functions known to gin, by name, once `register` was called.
_registered: dict[str, Callable[..., Any]] = {}

_FROM_COMMAND_LINE = ('created_by', 'dry_run', 'texts')


def commands() -> tuple[str, ...]:
  """Names of the commands that gin configures."""
  return tuple(_COMMANDS)


def command_function(name: str) -> Callable[..., Any]:
  """The function behind a command."""
  return _load(_COMMANDS[name])


def names() -> tuple[str, ...]:
  """Short names of this library's functions in gin files."""
  return (*_FUNCTIONS, *_COMMANDS)


@functools.cache
def register() -> None:
  """Makes every name known to gin; once in a process."""
  for name, where in _FUNCTIONS.items():
    _register(name, _load(where))
  for name, where in _COMMANDS.items():
    _register(name, _load(where), gathers=True)
  import jax
  import optax

  for package, module in (('optax', optax), ('jax.nn.initializers', jax.nn.initializers)):
    for name, member in vars(module).items():
      if inspect.isfunction(member) and not name.startswith('_'):
        gin.external_configurable(member, name, module=package)


def _load(where: str) -> Callable[..., Any]:
  module, _, path = where.partition(':')
  target: Any = importlib.import_module(f'prompt_tuning_jax.{module}')
  for attribute in path.split('.'):
    target = getattr(target, attribute)
  return target


def _register(name: str, target: Callable[..., Any], *, gathers: bool = False) -> None:
  """Registers a function of the same signature under a name without any module.

  The name being complete, `adafactor` is ours although `optax.adafactor` exists; a
  function in place of a class keeps gin from subclassing Flax modules.

  Args:
    gathers: whether it returns its keyword arguments instead of calling `target`.
  """

  def call(*args, **kwargs):
    return kwargs if gathers else target(*args, **kwargs)

  signature = inspect.signature(target)
  # Flax gives every module two fields, and the command line sets some arguments itself.
  others = ('parent', 'name') if _is_module(target) else _FROM_COMMAND_LINE
  call.__signature__ = signature
  call.__name__ = call.__qualname__ = name
  call.__doc__ = target.__doc__
  call.__module__ = None
  denied = [p for p in others if p in signature.parameters]
  gin.external_configurable(call, name, denylist=denied or None)
  # Where a file switches on gin's dynamic registration, names are spelled with modules,
  # and gin writes ours as `registry.train`: this module's __getattr__ finds them.
  call.__module__ = __name__
  _registered[name] = call


def __getattr__(name: str) -> Callable[..., Any]:
  if name in _registered:
    return _registered[name]
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def _is_module(target: Any) -> bool:
  import flax.linen as nn

  return inspect.isclass(target) and issubclass(target, nn.Module)


def parameters(name: str) -> tuple[str, ...]:
  """Parameters of a registered function, for messages; () if it is not ours."""
  name = name.rsplit('.', 1)[-1]
  where = _FUNCTIONS.get(name) or _COMMANDS.get(name)
  return tuple(inspect.signature(_load(where)).parameters) if where else ()
