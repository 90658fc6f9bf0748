"""What each prompt method costs: parameters that train and that are kept, FLOPs of a step.

  python benchmarks/method_costs.py --size base xxl

Everything is counted from shapes, by XLA, and no weights are made. For each method:

  trains    parameters that train, and their share of the backbone's
  kept      numbers in the artifact, which holds no network, and its size in float32
  step      FLOPs of a train step in TFLOP, over those of soft prompts of the same length
  ratio     FLOPs of the step over those of a forward pass with the method, 3 for full tuning

XLA counts the body of a scan once, so that layers are unrolled; and since every layer costs
the same, stacks of 2 and of 3 layers are compiled and the rest is their difference.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import dataclasses
import math

import jax
from load_backbone import config_of

from prompt_tuning_jax.backbones.t5 import T5, T5Config
from prompt_tuning_jax.methods import method as method_lib
from prompt_tuning_jax.methods.combined import Combined
from prompt_tuning_jax.methods.deep_prompt import DeepPrompt
from prompt_tuning_jax.methods.method import Method
from prompt_tuning_jax.methods.p_tuning import PTuning
from prompt_tuning_jax.methods.prefix import Prefix
from prompt_tuning_jax.methods.soft_prompt import SoftPrompt
from prompt_tuning_jax.plan_compiled import Flops, count_flops
from prompt_tuning_jax.training import trainable as trainable_lib
from prompt_tuning_jax.training.optimizers import adamw


def methods(length: int) -> dict[str, Method]:
  return {
      'soft prompt': SoftPrompt(length),
      'P-tuning (LSTM)': PTuning(length),
      'prefix (network)': Prefix(length),
      'prefix (free)': Prefix(length, hidden=None),
      'deep prompt': DeepPrompt(length),
      'soft prompt + prefix': Combined([SoftPrompt(length), Prefix(length)]),
  }


def flops(config: T5Config, method: Method, layers: int, args: argparse.Namespace) -> Flops:
  """FLOPs of a model of that many layers a stack."""
  config = dataclasses.replace(config, num_encoder_layers=layers, num_decoder_layers=layers)
  return count_flops(
      T5(config, unroll=True),
      method,
      adamw(1e-3),
      rows=args.batch,
      input_length=args.inputs,
      target_length=args.targets,
  )


def report(size: str, args: argparse.Namespace) -> None:
  config = config_of(size)
  module = T5(config)
  shapes = jax.eval_shape(module.init_params, jax.random.key(0))
  total = trainable_lib.count(shapes)
  print(
      f'T5 1.1 {size}: {total:,} parameters; {args.batch} × {args.inputs} + {args.targets} '
      f'tokens, length {args.length}'
  )
  print(f'  {"method":22}{"trains":>14}{"share":>9}{"kept":>12}{"MB":>8}{"step":>18}{"ratio":>7}')
  base = None
  for name, method in methods(args.length).items():
    params, injection = method_lib.shapes(method, module.spec)
    trains = trainable_lib.count(params)
    kept = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(injection))
    two, three = (flops(config, method, layers, args) for layers in (2, 3))
    more = config.num_encoder_layers - 2
    step, forward = (a + more * (b - a) for a, b in zip(two, three))
    base = base or step
    print(
        f'  {name:22}{trains:14,}{trains / total:9.3%}{kept:12,}{4 * kept / 1e6:8.2f}'
        f'{step / 1e12:10.3f} ({step / base:4.2f}){step / forward:7.3f}',
        flush=True,
    )


def main() -> None:
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--size', nargs='+', default=['base', 'xxl'])
  parser.add_argument('--length', type=int, default=20)
  parser.add_argument('--batch', type=int, default=8)
  parser.add_argument('--inputs', type=int, default=512)
  parser.add_argument('--targets', type=int, default=32)
  args = parser.parse_args()
  for size in args.size:
    report(size, args)


if __name__ == '__main__':
  main()
