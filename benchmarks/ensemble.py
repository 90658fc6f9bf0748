"""What an ensemble of prompts costs beside evaluating each of them, and what it scores.

  python benchmarks/ensemble.py --folder /tmp/ensemble

Prompts for the demo's task that differ in their seed are trained first (what is in the folder
goes on where it stopped). Then

  commands   `prompt-tuning evaluate` for each prompt, and once for all with ENSEMBLE: the
             wall-clock from start to table, and the largest process
  separate   from Python: one evaluation after the other
  together   from Python: one pass over the split with every example once for each prompt

The last two each in a process of its own, so that all is compiled there, with the wall-clock and
the processor's time of a first and a second evaluation, and the programs that were compiled for
ranking. The scores are printed at the end.
"""

from __future__ import annotations

import argparse
import json
import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import shlex
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
  print('commands', json.dumps(of_commands(paths, options)))
  for way in ('separate', 'together'):
    argv = [sys.executable, *sys.argv, '--measure', way]
    print(way, subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True).stdout)
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


def of_commands(paths: list[str], options: argparse.Namespace) -> dict[str, float]:
  """Seconds and GiB of one command a prompt, one after another, and of one for all prompts."""
  alone = [command(options, f'--gin.PROMPT_FILE={path}') for path in paths]
  together = command(options, f'--gin.PROMPT_FILE={paths}', '--gin.ENSEMBLE=vote')
  seconds = sum(seconds for seconds, _ in alone)
  return {
      'one after another, s': round(seconds, 1),
      'ensemble, s': round(together[0], 1),
      'ratio': round(seconds / together[0], 2),
      'peak of one, GiB': round(max(peak for _, peak in alone), 2),
      'peak of the ensemble, GiB': round(together[1], 2),
  }


def command(options: argparse.Namespace, *flags: str) -> tuple[float, float]:
  """Seconds of an evaluation from start to table, and the GiB its process had at most."""
  start = time.perf_counter()
  process = subprocess.Popen(
      [sys.executable, '-m', 'prompt_tuning_jax', 'evaluate', '--gin_file=demo',
       f'--gin.SPLIT={options.split}', f'--gin.EVAL_BATCH_SIZE={options.batch_size}', *flags],
      stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
  )  # fmt: skip
  _, status, usage = os.wait4(process.pid, 0)
  if status:
    raise SystemExit(f'{shlex.join(process.args)} failed.')
  return time.perf_counter() - start, usage.ru_maxrss / 2**20


def measured(paths: list[str], options: argparse.Namespace) -> dict[str, object]:
  """Seconds of the wall clock and the processor, of two evaluations, and programs compiled."""
  backbone = ptj.load_backbone('nano')
  settings = dict(split=options.split, batch_size=options.batch_size, progress=False)
  ptj.evaluate_prompts(backbone, [None], TASK, **settings | {'batch_size': 1_000})  # Reads all.
  programs, seconds = ranking.score_choices._cache_size(), []
  ensemble = 'vote' if options.measure == 'together' else None
  for _ in range(2):
    start = time.perf_counter(), time.process_time()
    ptj.evaluate_prompts(backbone, paths, TASK, ensemble=ensemble, **settings)
    now = time.perf_counter(), time.process_time()
    seconds.append([round(after - before, 2) for after, before in zip(now, start)])
  return {'seconds': seconds, 'programs': ranking.score_choices._cache_size() - programs}


if __name__ == '__main__':
  main()
