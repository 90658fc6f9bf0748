"""The same run on one device and on meshes of two, four and eight: the same numbers."""

import json
import os
import subprocess
import sys

import pytest
from jax.tree import leaves

from tests.conftest import cpu_devices

# Each line: devices, devices for a copy of the model, whether parameters are fully sharded.
_MESHES = [(2, 1, False), (4, 2, False), (8, 8, False), (8, 2, True)]

_PROGRAM = '''
import json, sys
import jax, numpy as np
import prompt_tuning_jax as ptj
from prompt_tuning_jax import partitioning
from prompt_tuning_jax.training import step
from prompt_tuning_jax.training.optimizers import adafactor

backbone_dir, folder, meshes = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
steps = []
make_train_step = step.make_train_step

def kept(*args, **kwargs):
  steps.append(make_train_step(*args, **kwargs))
  return steps[-1]

import prompt_tuning_jax.training.train
prompt_tuning_jax.training.train.make_train_step = kept
texts = ['definition: a small animal', 'definition: a town', 'definition: water']

def run(name, mesh, rules):
  backbone = ptj.load_backbone(backbone_dir, mesh=mesh, rules=rules)
  before = jax.device_get(backbone.params)
  settings = dict(
      backbone=backbone, task='demo_gloss_category', batch_size=16, eval_batch_size=96,
      microbatches=2, feature_lengths={'inputs': 32, 'targets': 4}, dropout_rate=0.1,
      lengths='pad', progress=False,
  )
  tuned = ptj.train(
      # At the rate of soft prompts the network's numbers grow to hundreds, and rounding with them.
      method=ptj.Prefix(4), trainable=adafactor(0.003), train_steps=3,
      model_dir=f'{folder}/{name}', **settings
  )
  for one, other in zip(jax.tree.leaves(before), jax.tree.leaves(backbone.params)):
    np.testing.assert_array_equal(one, np.asarray(other))
  assert steps[-1]._cache_size() == 1
  whole = ptj.train(train_steps=2, model_dir=f'{folder}/{name}_whole', **settings)
  return {
      'prompt': {
          str(place): np.asarray(leaf).tolist()
          for place, leaf in enumerate(jax.tree.leaves(tuned.prompt.injection))
      },
      'table': np.asarray(whole.params['backbone']['token_embedder']['embedding'])[:50].tolist(),
      'metrics': [tuned.metrics, whole.metrics],
      'scores': [r.scores for r in ptj.rank(backbone, tuned.prompt, texts, ['animal', 'food'])],
      'texts': ptj.generate(backbone, tuned.prompt, texts, max_length=4),
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
      env=os.environ | cpu_devices(8),
      capture_output=True,
      text=True,
  )
  assert result.returncode == 0, result.stderr
  alone, *others = json.loads(result.stdout.splitlines()[-1])
  for mesh, other in zip(_MESHES, others, strict=True):
    for kind in ('prompt', 'table', 'scores'):
      assert leaves(other[kind]) == pytest.approx(leaves(alone[kind]), rel=2e-4, abs=2e-5), mesh
    assert other['metrics'] == alone['metrics'], mesh
    assert other['texts'] == alone['texts'], mesh
  assert any(alone['prompt'].values())


_COUNT_COLLECTIVES = '''
import collections, json, re
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from prompt_tuning_jax import partitioning
from prompt_tuning_jax.backbones.t5 import T5, T5Config
from prompt_tuning_jax.methods import method as method_lib
from prompt_tuning_jax.methods.soft_prompt import SoftPrompt
from prompt_tuning_jax.training import trainable
from prompt_tuning_jax.training.optimizers import adafactor
from prompt_tuning_jax.training.step import TrainState, make_train_step
from prompt_tuning_jax.typing import Batch

module, method, tx = T5(T5Config(256, 64, 8, 8, 128, 3, 3)), SoftPrompt(4), adafactor()
shapes = jax.eval_shape(module.init_params, jax.random.key(0))
mesh = partitioning.make_mesh()
found = {}
for name, rules in (('data', partitioning.DEFAULT_RULES),
                    ('fully', partitioning.FULLY_SHARDED_RULES)):
  places = partitioning.shardings(mesh, module.logical_axes(), shapes, rules)

  def at(x, place):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

  everywhere = NamedSharding(mesh, PartitionSpec())
  prompt, _ = method_lib.shapes(method, module.spec)
  params = {'backbone': jax.tree.map(at, shapes, places), 'prompt': prompt}
  trained, frozen = trainable.split(params, {'prompt': tx})
  state = jax.eval_shape(lambda tree: TrainState.create(tree, tx), trained)
  state = jax.tree.map(lambda x: at(x, everywhere), state)
  row = lambda n: jax.ShapeDtypeStruct(
      (16, n), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec('data', None)))
  batch = Batch(row(36), row(8), row(8), row(8))
  with jax.set_mesh(mesh):
    step = make_train_step(method, module, tx).lower(state, frozen, batch).compile()
  kinds = re.findall(
      r' (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?[(]',
      step.as_text())
  found[name] = {**collections.Counter(kinds), 'flops': step.cost_analysis()['flops']}
print(json.dumps(found))
'''


@pytest.mark.slow
def test_a_step_on_eight_devices_adds_up_the_gradient_and_the_sums_and_no_more():
  result = subprocess.run(
      [sys.executable, '-W', 'ignore', '-c', _COUNT_COLLECTIVES],
      env=os.environ | cpu_devices(8),
      capture_output=True,
      text=True,
  )
  assert result.returncode == 0, result.stderr
  found = json.loads(result.stdout.splitlines()[-1])
  data, fully = found['data'], found['fully']
  # The prompt's gradient is one, what the step counts is the other.
  assert data.pop('all-reduce') == 2
  flops = data.pop('flops')
  assert not data
  # Fully sharded parameters are gathered, and each device computes its own rows all the same.
  assert fully['all-reduce'] <= 2 and fully['all-gather'] > 0
  assert fully['flops'] == pytest.approx(flops, rel=0.02)
