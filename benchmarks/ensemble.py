"""What an ensemble of prompts costs beside evaluating each of them, and what it scores.

  python benchmarks/ensemble.py --folder /tmp/ensemble

Prompts for the demo's task that differ in their seed are trained first (what is in the folder
goes on where it stopped). Then, each in a process of its own, so that all is compiled there:

  separate   one evaluation after the other
  together   one pass over the split with every example once for each prompt

with the wall-clock and the processor's time of a first and a second evaluation, and the programs
that were compiled for ranking. The scores are printed at the end.
"""

from __future__ import annotations

import argparse
import json
import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import subprocess
import sys
import time

import prompt_tuning_jax as ptj
from prompt_tuning_jax import config
from prompt_tuning_jax.evaluation import ranking

TASK = 'demo_gloss_category'


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--folder', default='/tmp/ensemble')
  parser.add_argument('--prompts', type=int, default=5)
  parser.add_argument('--steps', type=int, default=200)
  parser.add_argument('--split', default='test')
  parser.add_argument('--batch_size', type=int, default=64)
  parser.add_argument('--measure', choices=['separate', 'together'], help='in this process')
  options = parser.parse_args()
  paths = [trained(options.folder, seed, options.steps) for seed in range(options.prompts)]
  if options.measure:
    print(json.dumps(measured(paths, options)))
    return
  for way in ('separate', 'together'):
    command = [sys.executable, *sys.argv, '--measure', way]
    print(way, subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
  for ensemble in ('vote', 'mean'):
    print(ptj.evaluate_prompts(
        ptj.load_backbone('nano'), paths, TASK, split=options.split, ensemble=ensemble,
        batch_size=options.batch_size, progress=False,
    ))  # fmt: skip


def trained(folder: str, seed: int, steps: int) -> str:
  """The path of the prompt of a seed, which is trained where it is not there."""
  run = os.path.join(folder, str(seed))
  path = os.path.join(run, 'prompt.safetensors')
  if not os.path.exists(path):
    flags = [f'MODEL_DIR={run!r}', f'RANDOM_SEED={seed}', f'TRAIN_STEPS_RELATIVE={steps}']
    ptj.train(**config.parse('train', ['demo'], [*flags, 'EVAL_PERIOD=0'], []).kwargs())
  return path


def measured(paths: list[str], options: argparse.Namespace) -> dict[str, object]:
  """Seconds of the wall clock and the processor, of two evaluations, and programs compiled."""
  backbone = ptj.load_backbone('nano')
  settings = dict(split=options.split, batch_size=options.batch_size, progress=False)
  ptj.evaluate_prompts(backbone, [None], TASK, **settings | {'batch_size': 1_000})  # Reads all.
  programs, seconds = ranking.score_choices._cache_size(), []
  ensemble = 'vote' if options.measure == 'together' else None
  for _ in range(2):
    start = time.perf_counter(), time.process_time()
    ptj.evaluate_prompts(
        backbone, paths, TASK, ensemble=ensemble, **settings
    )
    now = time.perf_counter(), time.process_time()
    seconds.append([round(after - before, 2) for after, before in zip(now, start)])
  return {'seconds': seconds, 'programs': ranking.score_choices._cache_size() - programs}


if __name__ == '__main__':
  main()
