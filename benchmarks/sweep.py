"""A sweep against the same runs one after another: seconds and peak memory, from start to table.

  python benchmarks/sweep.py
  python benchmarks/sweep.py --steps 150 --lengths 1 20 100 --seeds 0 1

The runs are those of the demo's task on the packaged model: prompt lengths × seeds. One side is
the command `prompt-tuning sweep`; the other is `prompt-tuning train` for each run, a process each,
as it is done by hand. Both train, evaluate and write every run's artifact; what they end with is
compared: scores are to be equal, up to the rounding that may decide a close answer.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time

from prompt_tuning_jax.json_files import read_jsonl
from prompt_tuning_jax.prompt_files import load_prompt


def run(*argv: str) -> float:
  """Seconds of a command, to its end."""
  start = time.monotonic()
  subprocess.run([sys.executable, '-m', 'prompt_tuning_jax', *argv], check=True,
                 stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
  return time.monotonic() - start


def peak() -> float:
  """GiB of the largest process so far."""
  return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20


def main() -> None:
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--recipe', default='demo')
  parser.add_argument('--steps', type=int, default=600)
  parser.add_argument('--lengths', nargs='+', type=int, default=[1, 5, 20, 100, 150])
  parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2])
  parser.add_argument('--folder', help='where the runs stay; a temporary folder by default')
  args = parser.parse_args()
  common = [f'--gin_file={args.recipe}', f'--gin.TRAIN_STEPS_RELATIVE={args.steps}']
  kept = args.folder and contextlib.nullcontext(args.folder)
  with kept or tempfile.TemporaryDirectory() as folder:
    alone, scores = [], {}
    for length in args.lengths:
      for seed in args.seeds:
        model_dir = os.path.join(folder, f'{length}_{seed}')
        flags = [f'--gin.PROMPT_LENGTH={length}', f'--gin.RANDOM_SEED={seed}']
        alone.append(run('train', *common, *flags, f'--gin.MODEL_DIR={model_dir}'))
        prompt = load_prompt(os.path.join(model_dir, 'prompt.safetensors'))
        scores[length, seed] = prompt.manifest.metrics
        print(f'P = {length}, seed {seed}: {alone[-1]:.1f} s', flush=True)
    of_runs = peak()
    grid = {'PROMPT_LENGTH': args.lengths, 'RANDOM_SEED': args.seeds}
    model_dir = os.path.join(folder, 'sweep')
    seconds = run('sweep', *common, f'--gin.SWEEP={grid}', f'--gin.MODEL_DIR={model_dir}')
    records = read_jsonl(os.path.join(model_dir, 'results.jsonl'))
    print(open(os.path.join(model_dir, 'table.md')).read())
  differences = [
      abs(value - scores[tuple(record['settings'].values())][name])
      for record in records
      for name, value in record['metrics'].items()
  ]
  print(json.dumps({
      'runs': len(alone),
      'one after another, s': round(sum(alone), 1),
      'sweep, s': round(seconds, 1),
      'ratio': round(sum(alone) / seconds, 2),
      'largest difference of a score': max(differences),
      # The larger of both, since a process's children are not told apart.
      'peak of a run, GiB': round(of_runs, 2),
      'peak of the sweep, GiB': round(peak(), 2),
  }, indent=1))  # fmt: skip


if __name__ == '__main__':
  main()
