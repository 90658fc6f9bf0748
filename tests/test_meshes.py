"""The same run on one device and on meshes of two, four and eight: the same numbers."""

import json
import os
import subprocess
import sys

import pytest

# Each line: devices, devices for a copy of the model, whether parameters are fully sharded.
_MESHES = [(4, 2, False), (8, 2, True)]

_PROGRAM = '''
import json, sys
import jax, numpy as np
import prompt_tuning_jax as ptj
from prompt_tuning_jax import partitioning
from prompt_tuning_jax.training import step

backbone_dir, folder, meshes = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
steps = []
make_train_step = step.make_train_step

def kept(*args, **kwargs):
  steps.append(make_train_step(*args, **kwargs))
  return steps[-1]

import prompt_tuning_jax.training.train
prompt_tuning_jax.training.train.make_train_step = kept
texts = ['definition: a small animal', 'definition: a town', 'definition: water']

def prefix(backbone):
  method = ptj.Prefix(4, hidden=None)
  params = method.init(jax.random.key(0), backbone.spec)['params']
  return method.apply({'params': params}, backbone.spec)

def run(name, mesh, rules):
  backbone = ptj.load_backbone(backbone_dir, mesh=mesh, rules=rules)
  before = jax.device_get(backbone.params)
  settings = dict(
      backbone=backbone, task='demo_gloss_category', batch_size=16, eval_batch_size=96,
      microbatches=2, feature_lengths={'inputs': 32, 'targets': 4}, dropout_rate=0.1,
      lengths='pad', progress=False,
  )
  tuned = ptj.train(
      method=ptj.SoftPrompt(4), train_steps=3, model_dir=f'{folder}/{name}', **settings
  )
  for one, other in zip(jax.tree.leaves(before), jax.tree.leaves(backbone.params)):
    np.testing.assert_array_equal(one, np.asarray(other))
  assert steps[-1]._cache_size() == 1
  whole = ptj.train(train_steps=2, model_dir=f'{folder}/{name}_whole', **settings)
  return {
      'prompt': np.asarray(tuned.prompt.injection.virtual_embeddings).tolist(),
      'table': np.asarray(whole.params['backbone']['token_embedder']['embedding'])[:50].tolist(),
      'metrics': [tuned.metrics, whole.metrics],
      'scores': [r.scores for r in ptj.rank(backbone, tuned.prompt, texts, ['animal', 'food'])],
      'texts': ptj.generate(backbone, tuned.prompt, texts, max_length=4),
      'prefixed': [r.scores for r in ptj.rank(backbone, prefix(backbone), texts, ['a', 'b'])],
  }

found = [run('alone', None, partitioning.DEFAULT_RULES)]
for number, (count, model, fully) in enumerate(meshes):
  rules = partitioning.FULLY_SHARDED_RULES if fully else partitioning.DEFAULT_RULES
  mesh = partitioning.make_mesh(model, jax.devices()[:count])
  found.append(run(number, mesh, rules))
print(json.dumps(found))
'''


@pytest.mark.slow
def test_training_and_inference_do_not_depend_on_the_mesh(backbone_dir, tmp_path):
  result = subprocess.run(
      [sys.executable, '-W', 'ignore', '-c', _PROGRAM]
      + [str(backbone_dir), str(tmp_path), json.dumps(_MESHES)],
      env=os.environ
      | {'XLA_FLAGS': '--xla_force_host_platform_device_count=8', 'JAX_PLATFORMS': 'cpu'},
      capture_output=True,
      text=True,
  )
  assert result.returncode == 0, result.stderr
  alone, *others = json.loads(result.stdout.splitlines()[-1])
  for mesh, other in zip(_MESHES, others, strict=True):
    for kind in ('prompt', 'table', 'scores', 'prefixed'):
      assert _flat(other[kind]) == pytest.approx(_flat(alone[kind]), rel=2e-4, abs=2e-5), mesh
    assert other['metrics'] == alone['metrics'], mesh
    assert other['texts'] == alone['texts'], mesh


def _flat(tree):
  if isinstance(tree, dict):
    tree = list(tree.values())
  if isinstance(tree, list):
    return [x for item in tree for x in _flat(item)]
  return [tree]
