"""What padding costs, and bucketing and packing save: FLOPs of a training example of SuperGLUE.

  PTJ_LOCAL_DATA=FOLDER python benchmarks/packing.py --vocabulary=spiece.model
  PTJ_LOCAL_DATA=FOLDER python benchmarks/packing.py --vocabulary=spiece.model --time --prompt 20

For each task and prompt length: the step's FLOPs an example with LENGTHS='pad' in TFLOP, and
how many times fewer they are with 'bucket', and with 'pack' in rows of the default width and of
each --rows; in brackets the rows that a batch takes on average, and what share of their
encoder tokens is padding. The lengths are those of the real examples, tokenised with T5's
vocabulary, of the batches of the first --steps steps; FLOPs are those of all matrix products,
counted from shapes (`costs.py`).

With --time, the median step of T5 1.1 small with random weights on this machine is measured
on the first batches, in milliseconds an example; such batches are of --time_batch examples.
"""

from __future__ import annotations

import argparse
import collections
import functools
import os
import statistics
import time
import warnings
from collections.abc import Iterator
from typing import Any

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import jax.numpy as jnp
import numpy as np
from load_backbone import config_of
from peers import TASKS

from prompt_tuning_jax import costs
from prompt_tuning_jax.backbones.t5 import T5
from prompt_tuning_jax.data.batches import TrainBatches
from prompt_tuning_jax.data.cache import load_task
from prompt_tuning_jax.data.tokenized_task import TokenizedTask
from prompt_tuning_jax.data.vocabulary import Vocabulary
from prompt_tuning_jax.methods import method as method_lib
from prompt_tuning_jax.methods.soft_prompt import SoftPrompt
from prompt_tuning_jax.training import trainable as trainable_lib
from prompt_tuning_jax.training.optimizers import adafactor
from prompt_tuning_jax.training.step import TrainState, make_train_step
from prompt_tuning_jax.typing import Batch

INPUTS = 512


def batches_of(task: TokenizedTask, prompt_length: int, batch_size: int, **how: Any):
  with warnings.catch_warnings():
    warnings.filterwarnings('ignore', message='TASK_FEATURE_LENGTHS')
    return TrainBatches(
        task,
        batch_size,
        feature_lengths={'inputs': INPUTS, 'targets': task.longest('targets')},
        vocab_size=config_of('small').vocab_size,
        num_virtual_tokens=prompt_length,
        **how,
    )


def shapes_of(batches: TrainBatches, steps: int) -> Iterator[tuple[int, int, int, int]]:
  """(rows, encoder's width, decoder's width, encoder tokens that are none) of each batch."""
  for step in range(steps):
    batch = batches[step]
    tokens_BS = batch.encoder_input_tokens
    empty = tokens_BS.size - np.count_nonzero(tokens_BS)
    yield *tokens_BS.shape, batch.decoder_input_tokens.shape[1], int(empty)


@functools.cache
def flops_of_row(size: str, prompt_length: int, width: int, target_width: int, packed: bool):
  """FLOPs of a step of the prompt for each row of such a batch."""
  module, method, tx = T5(config_of(size)), SoftPrompt(prompt_length), adafactor()
  params = {
      'prompt': method_lib.shapes(method, module.spec)[0],
      'backbone': jax.eval_shape(module.init_params, jax.random.key(0)),
  }
  trainable, frozen = trainable_lib.split(params, {'prompt': tx})
  state = jax.eval_shape(lambda tree: TrainState.create(tree, tx), trainable)
  inputs = jax.ShapeDtypeStruct((1, width), jnp.int32)
  targets = jax.ShapeDtypeStruct((1, target_width), jnp.int32)
  segments = (inputs, targets) if packed else ()
  batch = Batch(inputs, targets, targets, targets, *segments)
  return costs.count(make_train_step(method, module, tx), state, frozen, batch).flops


def flops_of_example(size: str, prompt_length: int, batches: TrainBatches, steps: int):
  """FLOPs an example, rows of a batch, share of encoder tokens that is padding."""
  total = rows = empty = tokens = 0.0
  packed = batches.packing is not None
  for of_batch, width, target_width, none in shapes_of(batches, steps):
    total += of_batch * flops_of_row(size, prompt_length, width, target_width, packed)
    rows += of_batch
    empty += none
    tokens += of_batch * width
  return total / (steps * batches.batch_size), rows / steps, empty / tokens


def ways(rows: list[int]) -> dict[str, dict[str, Any]]:
  return {
      'pad': {'lengths': 'pad'},
      'bucket': {'lengths': 'bucket'},
      'pack': {'lengths': 'pack'},
      **{f'pack {n}': {'lengths': 'pack', 'packed_length': n} for n in rows},
  }


def report_flops(args: argparse.Namespace, tasks: dict[str, TokenizedTask]) -> None:
  for size in args.size:
    for prompt_length in args.prompt:
      print(f'T5 1.1 {size}, P = {prompt_length}, batches of {args.batch_size}', flush=True)
      for name, task in tasks.items():
        cells, base = [], None
        for way, how in ways(args.rows).items():
          batches = batches_of(task, prompt_length, args.batch_size, **how)
          flops, rows, empty = flops_of_example(size, prompt_length, batches, args.steps)
          base = base or flops
          if way == 'pad':
            cells.append(f'{flops / 1e12:8.4f}')
          elif batches.packing is None:
            cells.append(f'{way} {base / flops:5.2f}× ({empty:4.0%})')
          else:
            shape = f'{batches.packing.width}+{batches.packing.decoder_width}'
            cells.append(f'{way} {base / flops:5.2f}× ({rows:4.1f} of {shape}, {empty:3.0%})')
        print(f'  {name:8}' + '  '.join(cells), flush=True)


def report_time(args: argparse.Namespace, tasks: dict[str, TokenizedTask]) -> None:
  """Measured steps of T5 1.1 small; every shape is compiled before."""
  for prompt_length in args.prompt:
    module, method, tx = T5(config_of('small')), SoftPrompt(prompt_length), adafactor()
    params = {
        'backbone': jax.jit(module.init_params)(jax.random.key(0)),
        'prompt': method.init(jax.random.key(1), module.spec)['params'],
    }
    trainable, frozen = trainable_lib.split(params, {'prompt': tx})
    step = make_train_step(method, module, tx)
    state = TrainState.create(trainable, tx)
    print(f'T5 1.1 small, P = {prompt_length}, ms an example, batches of {args.time_batch}')
    for name, task in tasks.items():
      cells = []
      for way, how in ways(args.rows).items():
        batches = batches_of(task, prompt_length, args.time_batch, **how)
        seconds: dict[Any, list[float]] = collections.defaultdict(list)
        for number in range(args.time_steps):
          batch = batches[number]
          shape = batch.encoder_input_tokens.shape
          for _ in range(1 if shape in seconds else 2):  # The first compiles.
            start = time.perf_counter()
            state, metrics = step(state, frozen, batch)
            jax.block_until_ready((state, metrics))
            last = time.perf_counter() - start
          seconds[shape].append(last)
        mean = sum(statistics.median(s) * len(s) for s in seconds.values()) / args.time_steps
        cells.append(f'{way} {1000 * mean / args.time_batch:.1f}')
      print(f'  {name:8}' + '  '.join(cells), flush=True)


def main() -> None:
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('task', nargs='*', help=f'of {", ".join(TASKS)}; default: all')
  parser.add_argument('--vocabulary', required=True, help="T5's SentencePiece model")
  parser.add_argument('--size', nargs='+', default=['xxl', 'small'])
  parser.add_argument('--prompt', nargs='+', type=int, default=[20, 100])
  parser.add_argument('--rows', nargs='+', type=int, default=[1024], help='widths of packed rows')
  parser.add_argument('--batch_size', type=int, default=32)
  parser.add_argument('--steps', type=int, default=200)
  parser.add_argument('--time', action='store_true', help='measure instead of counting')
  parser.add_argument('--time_batch', type=int, default=32)
  parser.add_argument('--time_steps', type=int, default=4)
  args = parser.parse_args()
  vocabulary = Vocabulary(args.vocabulary)
  tasks = {name: load_task(TASKS[name], 'train', vocabulary) for name in args.task or TASKS}
  (report_time if args.time else report_flops)(args, tasks)


if __name__ == '__main__':
  main()
