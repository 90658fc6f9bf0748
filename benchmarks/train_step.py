"""Time and memory of one prompt-tuning step of T5 1.1 small on this machine.

  python benchmarks/train_step.py                     # ours
  python benchmarks/train_step.py --microbatches=4    # ours, two rows at a time
  python benchmarks/train_step.py --unroll            # ours, unrolled layers
  python benchmarks/train_step.py --peer              # PEFT on torch (pip install -e .[hf])

Random weights, batch 8, 256 input tokens, P = 100, targets of 8 tokens, float32. Each
run is a process of its own and prints one JSON line: seconds to the first finished step
from the start of the process, the median step, FLOPs of the step by XLA's count, page
faults of a step and the peak resident memory. Compare two by running them in turn,
several times; both take --microbatches, which adds up the same gradient from parts.

On a CPU four microbatches are the fastest form of this step: XLA takes the memory of a
step afresh from the system each time, and a quarter of the memory is a quarter of the
page faults.
"""

from __future__ import annotations

import time

STARTED = time.perf_counter()

import argparse
import json
import resource
import statistics

BATCH, INPUTS, TARGETS, PROMPT = 8, 256, 8, 100
VOCAB = 32128


def small_step(vocab_size: int, *, microbatches: int = 1, unroll: bool = False) -> tuple:
  """This library's step for T5 1.1 small with random weights: (step, state, frozen)."""
  import jax

  from prompt_tuning_jax.backbones.t5 import T5, T5Config
  from prompt_tuning_jax.methods.soft_prompt import SoftPrompt
  from prompt_tuning_jax.training import trainable as trainable_lib
  from prompt_tuning_jax.training.optimizers import adafactor
  from prompt_tuning_jax.training.step import TrainState, make_train_step

  module = T5(T5Config(vocab_size, 512, 6, 64, 1024, 8, 8), unroll=unroll)
  method = SoftPrompt(PROMPT)
  key = jax.random.key(0)
  params = {
      'backbone': jax.jit(module.init_params)(key),
      'prompt': method.init(key, module.spec)['params'],
  }
  tx = adafactor()
  trainable, frozen = trainable_lib.split(params, {'prompt': tx})
  step = make_train_step(method, module, tx, microbatches=microbatches)
  return step, TrainState.create(trainable, tx), frozen


def ours(steps: int, microbatches: int, unroll: bool) -> dict:
  """Times this library's step."""
  import jax
  import numpy as np

  from prompt_tuning_jax.typing import Batch

  train_step, state, frozen = small_step(VOCAB, microbatches=microbatches, unroll=unroll)
  rng = np.random.default_rng(0)
  inputs = rng.integers(2, 32000, (BATCH, INPUTS), dtype=np.int32)
  virtual = np.tile(VOCAB + np.arange(PROMPT, dtype=np.int32), (BATCH, 1))
  targets = rng.integers(2, 32000, (BATCH, TARGETS), dtype=np.int32)
  batch = Batch(
      np.concatenate([virtual, inputs], axis=1),
      np.pad(targets[:, :-1], ((0, 0), (1, 0))),
      targets,
      np.ones_like(targets),
  )
  train_step = train_step.lower(state, frozen, batch).compile()
  state, metrics = train_step(state, frozen, batch)
  jax.block_until_ready(metrics)
  first = time.perf_counter() - STARTED

  def one_step():
    nonlocal state
    state, metrics = train_step(state, frozen, batch)
    jax.block_until_ready((state, metrics))

  result = {'first_step': first, **time_steps(one_step, steps)}
  if unroll and microbatches == 1:  # XLA counts the body of a loop once, however often it runs.
    result['gflops'] = train_step.cost_analysis()['flops'] / 1e9
  return result


def peer(steps: int, microbatches: int) -> dict:
  """Times the same step in PEFT."""
  import torch
  from peft import PromptTuningConfig, TaskType, get_peft_model
  from transformers import T5Config, T5ForConditionalGeneration

  torch.manual_seed(0)
  config = T5Config(
      vocab_size=VOCAB,
      d_model=512,
      d_kv=64,
      d_ff=1024,
      num_layers=8,
      num_heads=6,
      feed_forward_proj='gated-gelu',
      tie_word_embeddings=False,
      dropout_rate=0.0,
      decoder_start_token_id=0,
  )
  model = get_peft_model(
      T5ForConditionalGeneration(config),
      PromptTuningConfig(
          task_type=TaskType.SEQ_2_SEQ_LM,
          num_virtual_tokens=PROMPT,
          num_layers=8,
          num_attention_heads=6,
          token_dim=512,
      ),
  )
  optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.3)
  batch = {
      'input_ids': torch.randint(2, 32000, (BATCH, INPUTS)),
      'attention_mask': torch.ones(BATCH, INPUTS, dtype=torch.long),
      'labels': torch.randint(2, 32000, (BATCH, TARGETS)),
  }
  split = {name: array.chunk(microbatches) for name, array in batch.items()}
  parts = [dict(zip(split, arrays)) for arrays in zip(*split.values())]

  def train_step():
    optimizer.zero_grad()
    for part in parts:
      (model(**part).loss / microbatches).backward()
    optimizer.step()

  train_step()
  first = time.perf_counter() - STARTED
  return {'first_step': first, **time_steps(train_step, steps)}


def time_steps(one_step, steps: int) -> dict:
  """The median time of `steps` calls, and the page faults of one."""
  faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  seconds = []
  for _ in range(steps):
    start = time.perf_counter()
    one_step()
    seconds.append(time.perf_counter() - start)
  faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
  return {'step': statistics.median(seconds), 'page_faults': faults // steps}


def main() -> None:
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--peer', action='store_true', help='time PEFT on torch instead')
  parser.add_argument('--unroll', action='store_true', help='do not scan the layers')
  parser.add_argument(
      '--microbatches', type=int, default=1, help='parts of the batch (default 1)'
  )
  parser.add_argument('--steps', type=int, default=5, help='timed steps (default 5)')
  args = parser.parse_args()
  if args.peer:
    result = peer(args.steps, args.microbatches)
  else:
    result = ours(args.steps, args.microbatches, args.unroll)
  result['peak_gb'] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
  name = 'peft' if args.peer else 'ours, unrolled' if args.unroll else 'ours, scanned'
  numbers = {key: round(value, 3) for key, value in result.items()}
  print(json.dumps({'name': name, 'microbatches': args.microbatches, **numbers}))


if __name__ == '__main__':
  main()
