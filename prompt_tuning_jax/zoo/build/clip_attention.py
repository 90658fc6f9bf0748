"""Scales a backbone's attention logits down, so that its attention is soft again.

  python -m prompt_tuning_jax.zoo.build.clip_attention \
    --backbone=/tmp/nano_cloze/backbone --out=/tmp/nano_clipped --factor=0.05

Muon's updates are as large in every direction, and T5 neither divides its attention logits
by sqrt(d_kv) nor norms queries and keys. Without a bound on them they grew until, after
`cloze_nano`, they had a standard deviation of 110 in the first layer: every position
attended to one other, no gradient came through, and a prompt could change next to nothing.
This is QK-Clip (Kimi Team, 2025, section 2.1) done once, to all heads alike; what follows
trains queries and keys with Adam (`gin/recipes/soft_nano.gin`).
"""

from __future__ import annotations

import argparse
import os

import jax
import jax.numpy as jnp

from prompt_tuning_jax.checkpoints import native
from prompt_tuning_jax.checkpoints.load import load_backbone
from prompt_tuning_jax.typing import PyTree


def clip_attention(params: PyTree, factor: float) -> PyTree:
  """The weights with all attention logits multiplied by `factor`.

  Queries and keys each take the square root. The relative position bias is added to the
  logits and stays as it is.
  """

  def scaled(path, leaf):
    is_attention = {key.key for key in path} & {'query', 'key'}
    return leaf * jnp.sqrt(factor).astype(leaf.dtype) if is_attention else leaf

  return jax.tree_util.tree_map_with_path(scaled, params)


def main() -> None:
  """Parses the command line, scales and saves."""
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--backbone', required=True, help='name or folder of a backbone')
  parser.add_argument('--out', required=True, help='folder to write')
  parser.add_argument('--factor', type=float, default=0.05, help='of the logits')
  args = parser.parse_args()
  backbone = load_backbone(args.backbone)
  native.save_backbone(
      os.path.abspath(args.out),
      backbone.module.config,
      clip_attention(backbone.params, args.factor),
      backbone.vocabulary,
      dtype='float32',
  )


if __name__ == '__main__':
  main()
