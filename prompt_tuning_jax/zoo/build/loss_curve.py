"""Draws the loss curves of pretraining and LM adaptation for a model card.

  python -m prompt_tuning_jax.zoo.build.loss_curve \
    --runs /tmp/nano /tmp/nano_lm --out prompt_tuning_jax/zoo/nano/loss_curve.png

Each run's `metrics.jsonl` is drawn behind the one before it, a line for each component of
the mixtures.
"""

import argparse
import collections
import os
from collections.abc import Sequence

from prompt_tuning_jax.json_files import read_jsonl


def draw(runs: Sequence[str], out: str) -> None:
  """Writes the picture of the runs' losses per token, step by step."""
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot

  curves = collections.defaultdict(lambda: ([], []))
  start = 0
  borders = []
  for run in runs:
    records = read_jsonl(os.path.join(run, 'metrics.jsonl'))
    for record in records:
      for name, value in record.items():
        if name.endswith('/loss_per_token') and name.count('/') == 2:
          steps, losses = curves[name.split('/')[1]]
          steps.append(start + record['step'])
          losses.append(value)
    start += records[-1]['step']
    borders.append(start)

  figure, axes = pyplot.subplots(figsize=(7, 4))
  for name, (steps, losses) in sorted(curves.items()):
    axes.plot(steps, losses, label=name, linewidth=1.3)
  for border in borders[:-1]:
    axes.axvline(border, color='gray', linestyle=':', linewidth=1)
  axes.set(xlabel='step', ylabel='loss per token (nats)')
  axes.grid(alpha=0.3)
  axes.legend(loc='upper right', ncols=4)
  figure.tight_layout()
  figure.savefig(out, dpi=110)
  pyplot.close(figure)


def main() -> None:
  """Parses the command line and draws."""
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--runs', nargs='+', required=True, help='MODEL_DIRs, in order')
  parser.add_argument('--out', required=True, help='the PNG file to write')
  args = parser.parse_args()
  draw(args.runs, args.out)


if __name__ == '__main__':
  main()
