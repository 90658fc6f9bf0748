"""What int8 and bfloat16 do to a prompt: loss, gradient and score on nano's real weights.

  python benchmarks/quantization.py --folder /tmp/quantization

The demo's prompt is trained on the model in float32 and on the model in int8 (a few minutes
each; what is in the folder goes on where it stopped), and each is then used with both. For each
way to hold and compute the frozen weights:

  weights    root mean square of their change, over that of the weights
  loss       of the test split with the prompt of float32, a token; and its change
  cosine     of the prompt's gradient with that of float32, mean over batches: where training
             starts, and at the trained prompt, where gradients are small
  accuracy   on the test split, in percent: without a prompt, with the prompt of float32, and
             with that of int8

int4 is int8 that uses the numbers from -7 to 7 alone.
"""

from __future__ import annotations

import argparse
import functools
import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

import prompt_tuning_jax as ptj
from prompt_tuning_jax import config
from prompt_tuning_jax.backbones import int8
from prompt_tuning_jax.backbones.backbone import Backbone
from prompt_tuning_jax.data.batches import TrainBatches
from prompt_tuning_jax.data.cache import load_task
from prompt_tuning_jax.data.virtual_tokens import as_placement
from prompt_tuning_jax.evaluation.evaluate import evaluate
from prompt_tuning_jax.training.train import TrainResult, train
from prompt_tuning_jax.typing import Array, PyTree

BATCH_SIZE = 32


def recipe(model_dir: str, *flags: str) -> dict[str, Any]:
  """The arguments of `train` for the demo's recipe."""
  return config.parse('train', ['demo'], [f'MODEL_DIR={model_dir!r}', *flags], []).kwargs()


def trained(model_dir: str, *flags: str) -> tuple[TrainResult, dict[str, Any]]:
  kwargs = recipe(model_dir, *flags)
  return train(**kwargs), kwargs


def in_int4(backbone: Backbone) -> Backbone:
  """The backbone with weights that int4 would hold."""
  tree = traverse_util.flatten_dict(backbone.params)
  for path in list(tree):
    if path[-1] in int8.REDUCED_AXES:
      whole = int8.quantize(tree[path], int8.REDUCED_AXES[path[-1]], largest=7)
      tree[path], tree[int8.scale_path(path)] = whole
  params = traverse_util.unflatten_dict(tree)
  return Backbone(
      backbone.name,
      backbone.module.clone(int8=True),
      backbone.vocabulary,
      lambda: params,
      fingerprint=backbone.fingerprint,
  )


def as_float(params: PyTree) -> np.ndarray:
  """All weights in one array, scales multiplied in."""
  tree = traverse_util.flatten_dict(params)
  found = []
  for path, leaf in sorted(tree.items()):
    if path[-1].endswith(int8.SCALE):
      continue
    if leaf.dtype == jnp.int8:
      axis = int8.REDUCED_AXES[path[-1]]
      leaf = int8.dequantize(leaf, tree[int8.scale_path(path)], axis, jnp.float32)
    found.append(np.asarray(leaf, np.float64).reshape(-1))
  return np.concatenate(found)


def losses_and_gradients(backbone, method, params, batches) -> tuple[float, list[np.ndarray]]:
  """Mean loss of a token, and the prompt's gradient of each batch."""
  one = jax.jit(functools.partial(ptj.loss_and_grad, backbone, method))
  total = tokens = 0.0
  gradients = []
  for batch in batches:
    loss, gradient = one(params, batch)
    total += float(loss)
    tokens += float(np.sum(batch.decoder_loss_weights))
    (array,) = jax.tree.leaves(gradient)
    gradients.append(np.asarray(array, np.float64).reshape(-1))
  return total / tokens, gradients


def cosine(one: list[np.ndarray], other: list[np.ndarray]) -> float:
  products = [
      a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(one, other, strict=True)
  ]
  return float(np.mean(products))


def report(of_float: TrainResult, of_int8: TrainResult, kwargs: dict[str, Any]) -> None:
  method = kwargs['method']
  plain = ptj.load_backbone('nano', dtype='float32')
  test = load_task(kwargs['task'], 'test', plain.vocabulary)
  placed = TrainBatches(
      [(test, 1.0)],
      BATCH_SIZE,
      vocab_size=plain.spec.vocab_size,
      seed=0,
      feature_lengths=kwargs['feature_lengths'],
      placement=as_placement('prefix'),
      num_virtual_tokens=method.num_virtual_tokens,
  )
  batches = [placed[step] for step in range(len(test) // BATCH_SIZE)]
  start = method.init(jax.random.key(kwargs['random_seed']), plain.spec)['params']
  params: dict[str, Array] = of_float.params['prompt']
  ways = {
      'float32': plain,
      'bfloat16': ptj.load_backbone('nano', dtype='bfloat16'),
      'int8': ptj.load_backbone('nano', dtype='float32', param_dtype='int8'),
      'int8, bfloat16': ptj.load_backbone('nano', dtype='bfloat16', param_dtype='int8'),
      'int4': in_int4(plain),
  }
  print(
      f'{"":16}{"weights":>9}{"loss":>10}{"change":>10}{"cosine":>9}{"trained":>9}'
      f'{"no prompt":>11}{"float32":>9}{"int8":>7}'
  )
  weights = as_float(plain.params)
  base = None
  for name, backbone in ways.items():
    changed = as_float(backbone.params) - weights
    _, at_start = losses_and_gradients(backbone, method, start, batches)
    loss, at_end = losses_and_gradients(backbone, method, params, batches)
    base = base or (loss, at_start, at_end)
    scores = [
        evaluate(backbone, prompt, test, batch_size=128).metrics['accuracy']
        for prompt in (None, of_float.prompt, of_int8.prompt)
    ]
    print(
        f'{name:16}{np.sqrt(np.mean(changed**2) / np.mean(weights**2)):9.4f}{loss:10.4f}'
        f'{loss - base[0]:+10.4f}{cosine(base[1], at_start):9.4f}{cosine(base[2], at_end):9.4f}'
        f'{scores[0]:11.1f}{scores[1]:9.1f}{scores[2]:7.1f}',
        flush=True,
    )


def main() -> None:
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--folder', help='of the runs; by default a new one, which is removed')
  parser.add_argument('--steps', type=int, default=600, help='of training (demo: 600)')
  args = parser.parse_args()
  steps = f'TRAIN_STEPS_RELATIVE={args.steps}'
  with tempfile.TemporaryDirectory() as new:
    folder = args.folder or new
    of_float, kwargs = trained(f'{folder}/float32', steps, "DTYPE='float32'")
    of_int8, _ = trained(f'{folder}/int8', steps, "DTYPE='float32'", "PARAM_DTYPE='int8'")
    report(of_float, of_int8, kwargs)


if __name__ == '__main__':
  main()
