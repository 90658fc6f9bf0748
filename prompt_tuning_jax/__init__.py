"""Prompt tuning of frozen T5 models in JAX.

  import prompt_tuning_jax as ptj

  backbone = ptj.load_backbone('nano')
  result = ptj.train(backbone=backbone, method=ptj.SoftPrompt(20), task='…', …)
  ptj.generate(backbone, result.prompt, ['definition: a small furry animal'])

Names are imported when they are first used, so that `import prompt_tuning_jax` is fast
and brings neither JAX nor TensorFlow.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = '0.1.0'

if TYPE_CHECKING:
  from prompt_tuning_jax import initializers
  from prompt_tuning_jax.artifact import save_prompt
  from prompt_tuning_jax.checkpoints.load import load_backbone
  from prompt_tuning_jax.data.cache import load_task
  from prompt_tuning_jax.data.file_task import FileTask
  from prompt_tuning_jax.data.prompt_design import PromptDesign
  from prompt_tuning_jax.evaluation.evaluate import evaluate
  from prompt_tuning_jax.evaluation.infer import ensemble, generate, rank
  from prompt_tuning_jax.evaluation.report import evaluate_prompts
  from prompt_tuning_jax.methods.combined import Combined, InDecoder
  from prompt_tuning_jax.methods.deep_prompt import DeepPrompt
  from prompt_tuning_jax.methods.layer_prompt import LayerPrompt
  from prompt_tuning_jax.methods.p_tuning import PTuning
  from prompt_tuning_jax.methods.prefix import Prefix
  from prompt_tuning_jax.methods.soft_prompt import SoftPrompt
  from prompt_tuning_jax.neighbors.report import analyze_prompts
  from prompt_tuning_jax.neighbors.words import nearest_words
  from prompt_tuning_jax.prompt_files import export_prompt, load_prompt
  from prompt_tuning_jax.training.step import loss_and_grad
  from prompt_tuning_jax.training.sweep import sweep
  from prompt_tuning_jax.training.train import train
  from prompt_tuning_jax.typing import Batch, Injection

# In the order in which a user meets them.
_MODULES = {
    'load_backbone': 'checkpoints.load',
    'SoftPrompt': 'methods.soft_prompt',
    'PTuning': 'methods.p_tuning',
    'Prefix': 'methods.prefix',
    'DeepPrompt': 'methods.deep_prompt',
    'LayerPrompt': 'methods.layer_prompt',
    'Combined': 'methods.combined',
    'InDecoder': 'methods.combined',
    'initializers': '',
    'FileTask': 'data.file_task',
    'PromptDesign': 'data.prompt_design',
    'load_task': 'data.cache',
    'train': 'training.train',
    'sweep': 'training.sweep',
    'evaluate': 'evaluation.evaluate',
    'evaluate_prompts': 'evaluation.report',
    'generate': 'evaluation.infer',
    'rank': 'evaluation.infer',
    'ensemble': 'evaluation.infer',
    'nearest_words': 'neighbors.words',
    'analyze_prompts': 'neighbors.report',
    'loss_and_grad': 'training.step',
    'load_prompt': 'prompt_files',
    'save_prompt': 'artifact',
    'export_prompt': 'prompt_files',
    'Injection': 'typing',
    'Batch': 'typing',
}

__all__ = [
    'load_backbone',
    'SoftPrompt',
    'PTuning',
    'Prefix',
    'DeepPrompt',
    'LayerPrompt',
    'Combined',
    'InDecoder',
    'initializers',
    'FileTask',
    'PromptDesign',
    'load_task',
    'train',
    'sweep',
    'evaluate',
    'evaluate_prompts',
    'generate',
    'rank',
    'ensemble',
    'nearest_words',
    'analyze_prompts',
    'loss_and_grad',
    'load_prompt',
    'save_prompt',
    'export_prompt',
    'Injection',
    'Batch',
]


def __getattr__(name: str) -> Any:
  if name not in _MODULES:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  module = _MODULES[name]
  if not module:
    return importlib.import_module(f'{__name__}.{name}')
  value = getattr(importlib.import_module(f'{__name__}.{module}'), name)
  globals()[name] = value
  return value


def __dir__() -> list[str]:
  return sorted([*globals(), *__all__])
