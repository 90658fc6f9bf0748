"""What each of two processes runs in test_processes.py: `two_processes.py INDEX PORT SETTINGS`."""

from __future__ import annotations

import json
import os
import sys

import jax
import numpy as np

import prompt_tuning_jax as ptj
from prompt_tuning_jax import initializers, partitioning, processes
from prompt_tuning_jax.evaluation.decoding import Decoding
from prompt_tuning_jax.methods.deep_prompt import DeepPrompt
from prompt_tuning_jax.training.optimizers import adafactor, adam

TASK = 'which_animal'
TEXTS = ['red cat stone blue', 'dog house water', 'blue']


def settings(backbone, cache_dir: str) -> dict:
  """Of every run here; eight rows divide among any of the meshes."""
  return dict(
      backbone=backbone,
      task=TASK,
      batch_size=8,
      microbatches=2,
      feature_lengths={'inputs': 12, 'targets': 4},
      dropout_rate=0.1,
      cache_dir=cache_dir,
      progress=False,
  )


def tune(backbone, folder: str, cache_dir: str, parts: list[str]) -> dict:
  """Tunes what `parts` name, and uses the soft prompt; numbers as JSON has them.

  `soft` is a soft prompt, `deep` a prefix, `model` the model; `use` ranks, generates and evaluates.
  """
  shared = settings(backbone, cache_dir)
  found, metrics = {}, {}
  if 'soft' in parts:
    soft = ptj.train(
        method=ptj.SoftPrompt(3, initializers.class_labels(['cat', 'dog'], backbone)),
        train_steps=3,
        model_dir=f'{folder}/soft',
        **shared,
    )
    found['soft'] = np.asarray(soft.prompt.injection.virtual_embeddings).tolist()
    metrics['soft'] = soft.metrics
  if 'deep' in parts:
    deep = ptj.train(
        method=DeepPrompt(2, keys_values_init=initializers.keys_values_of('red cat', backbone)),
        trainable=adam(1e-3),
        train_steps=1,
        model_dir=f'{folder}/deep',
        **shared,
    )
    found['deep'] = [np.asarray(x).tolist() for x in jax.tree.leaves(deep.prompt.injection)]
    metrics['deep'] = deep.metrics
  if 'model' in parts:
    model = ptj.train(
        trainable={'backbone': adafactor(1e-3)},
        train_steps=2,
        model_dir=f'{folder}/model',
        **shared,
    )
    found['model'] = [
        partitioning.whole(x)[..., :5].tolist() for x in jax.tree.leaves(model.params)
    ]
    metrics['model'] = model.metrics
  if 'use' in parts:
    evaluated = ptj.evaluate(
        backbone,
        soft.prompt,
        TASK,
        cache_dir=cache_dir,
        batch_size=4,
        method='generate',
        decoding=Decoding(strategy='sample', temperature=0.8, max_length=3, seed=4),
        progress=False,
    )
    sampled = dict(decode='sample', temperature=0.8, max_length=3, seed=4)
    found['use'] = [a.scores for a in ptj.rank(backbone, soft.prompt, TEXTS, ['yes', 'no'])]
    found['texts'] = [
        *ptj.generate(backbone, soft.prompt, TEXTS, max_length=4, batch_size=2),
        *ptj.generate(backbone, soft.prompt, TEXTS, **sampled),
        *(prediction['prediction_text'] for prediction in evaluated.predictions),
    ]
    metrics['use'] = evaluated.metrics
  return found | {'metrics': metrics}


def go_on(backbone, folder: str, cache_dir: str, steps: int) -> list:
  """Tunes prompt and model up to a step, from where the folder's run is; what trained."""
  result = ptj.train(
      method=ptj.SoftPrompt(3),
      trainable={'prompt': adafactor(), 'backbone': adam(1e-3)},
      train_steps=steps,
      model_dir=folder,
      **settings(backbone, cache_dir),
  )
  return [partitioning.whole(x).ravel()[:500].tolist() for x in jax.tree.leaves(result.params)]


def main() -> None:
  index, port, given = int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
  processes.join(f'localhost:{port}', 2, index)
  found = {}
  for model, fully, parts in given['meshes']:
    backbone = ptj.load_backbone(
        given['backbone_dir'],
        mesh=partitioning.make_mesh(model),
        rules=partitioning.FULLY_SHARDED_RULES if fully else partitioning.DEFAULT_RULES,
    )
    # A folder of each process's own: what the other would need of it has to be sent.
    folder = os.path.join(given['folder'], str(index), f'{model}-{fully}')
    found[f'{model}-{fully}'] = tune(backbone, folder, given['cache_dir'], parts)
  folder = given['folder']
  backbone = ptj.load_backbone(given['backbone_dir'], mesh=partitioning.make_mesh(2))
  going = [(f'{folder}/{index}/two_then_one', 2), (given['one_then_two'][index], 4)]
  found['went_on'] = [
      go_on(backbone, where, given['cache_dir'], steps) for where, steps in going
  ]
  with open(f'{folder}/{index}.json', 'w') as file:
    json.dump(found, file)


if __name__ == '__main__':
  main()
