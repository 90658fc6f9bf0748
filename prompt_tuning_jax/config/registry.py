"""The functions that gin files may name; the macros are in `macros.py`.

Functions are registered with gin from the outside (`register`), so that the files they
live in stay free of it, under one short name each: `SoftPrompt`, not
`prompt_tuning_jax.methods.soft_prompt.SoftPrompt`. Optax and JAX's initialisers come
with their package's name: `optax.warmup_cosine_decay_schedule`.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import gin

# Function by its name in gin, as module:attribute; imported when a command needs gin.
_FUNCTIONS: Mapping[str, str] = {
    'load_backbone': 'config.building:load_backbone',
    'make_mesh': 'config.building:make_mesh',
    'logical_axis_rules': 'config.building:logical_axis_rules',
    'T5Config': 'backbones.t5:T5Config',
    'Vocabulary': 'data.vocabularies:open_vocabulary',
    'SoftPrompt': 'methods.soft_prompt:SoftPrompt',
    'PTuning': 'methods.p_tuning:PTuning',
    'Prefix': 'methods.prefix:Prefix',
    'DeepPrompt': 'methods.deep_prompt:DeepPrompt',
    'LayerPrompt': 'methods.layer_prompt:LayerPrompt',
    'InDecoder': 'methods.combined:InDecoder',
    'Combined': 'methods.combined:Combined',
    'uniform': 'initializers:uniform',
    'sampled_vocab': 'initializers:sampled_vocab',
    'class_labels': 'initializers:class_labels',
    'text': 'initializers:text',
    'from_file': 'initializers:from_file',
    'keys_values_of': 'initializers:keys_values_of',
    'Template': 'data.virtual_tokens:Template',
    'slots_of': 'data.virtual_tokens:slots_of',
    'adafactor': 'training.optimizers:adafactor',
    'adam': 'training.optimizers:adam',
    'adamw': 'training.optimizers:adamw',
    'muon': 'training.optimizers:muon',
    'warmup_linear': 'training.optimizers:warmup_linear',
    'warmup_rsqrt': 'training.optimizers:warmup_rsqrt',
    'LossConfig': 'training.losses:LossConfig',
    'vocabulary_of': 'config.building:vocabulary_of',
    'steps_after': 'config.building:steps_after',
    'answer_length': 'config.building:answer_length',
    'Decoding': 'evaluation.decoding:Decoding',
    'Component': 'data.pretraining:Component',
    'text_files': 'config.building:text_files',
    'jsonl_pairs': 'config.building:jsonl_pairs',
    'load_task': 'data.cache:load_task',
    'FileTask': 'data.file_task:FileTask',
    'PromptDesign': 'data.prompt_design:PromptDesign',
}

# The commands that gin configures. Gin gathers their arguments; `cli.py` calls them.
_COMMANDS: Mapping[str, str] = {
    'train': 'training.train:train',
    'sweep': 'training.sweep:sweep',
    'pretrain': 'training.pretrain:pretrain',
    'adapt': 'training.pretrain:pretrain',
    'plan': 'plan:plan',
    'evaluate': 'commands:evaluate',
    'infer': 'commands:infer',
    'export': 'export:export',
    'import_prompt': 'prompt_files:import_prompt',
    'convert': 'checkpoints.convert:convert',
    'neighbors': 'neighbors.report:neighbors',
    'tasks': 'task_report:tasks',
}

# Whose functions gin knows by their full names.
_PACKAGES = ('optax', 'jax.nn.initializers')

# The functions known to gin, by name, once `register` was called.
_registered: dict[str, Callable[..., Any]] = {}

_FROM_COMMAND_LINE = ('compiled', 'created_by', 'dry_run', 'texts', 'examples')


def commands() -> tuple[str, ...]:
  """Names of the commands that gin configures."""
  return tuple(_COMMANDS)


def command_function(name: str) -> Callable[..., Any]:
  """The function behind a command."""
  return _load(_COMMANDS[name])


def names() -> tuple[str, ...]:
  """Short names of this library's functions in gin files."""
  return (*_FUNCTIONS, *_COMMANDS)


def is_registered(selector: str) -> bool:
  """Whether gin knows a full name from here; no such function calls another through gin."""
  packages = tuple(f'{package}.' for package in _PACKAGES)
  return selector in names() or selector.startswith(packages)


@functools.cache
def register() -> None:
  """Makes every name known to gin; once in a process."""
  for name, where in _FUNCTIONS.items():
    _register(name, _load(where))
  for name, where in _COMMANDS.items():
    _register(name, _load(where), gathers=True)
  for package in _PACKAGES:
    for name, member in vars(importlib.import_module(package)).items():
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
  # Flax gives every module two fields, and the command line sets some arguments of commands.
  others = _FROM_COMMAND_LINE if gathers else ('parent', 'name') * _is_module(target)
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


def takes_text(binding: str) -> bool:
  """Whether 'scope/function.parameter' of ours is annotated as a text, and not as a number."""
  function, _, parameter = binding.split('/')[-1].rpartition('.')
  if function not in names() or parameter not in parameters(function):
    return False
  where = _FUNCTIONS.get(function) or _COMMANDS[function]
  annotation = str(inspect.signature(_load(where)).parameters[parameter].annotation)
  kinds = {kind.strip() for kind in annotation.split('|')}
  return 'str' in kinds and not kinds & {'int', 'float', 'bool'}
