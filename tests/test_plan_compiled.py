"""`plan --compile`: a run's step as XLA compiles it, for devices here and for TPUs elsewhere."""

import importlib.util

import jax
import pytest

from prompt_tuning_jax import cli, partitioning, plan, plan_compiled, targets
from prompt_tuning_jax.backbones.backbone import Backbone
from prompt_tuning_jax.backbones.t5 import T5, T5Config
from prompt_tuning_jax.methods.soft_prompt import SoftPrompt
from prompt_tuning_jax.training import trainable as trainable_lib
from prompt_tuning_jax.training.optimizers import adafactor, adamw
from prompt_tuning_jax.training.parameters import RunParameters
from tests.conftest import MINI_CONFIG

LENGTHS = {'inputs': 24, 'targets': 4}
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec('libtpu') is None,
    reason="needs the TPU compiler, and no TPU: pip install 'jax[tpu]'",
)


def compiled_for(target, *, method=SoftPrompt(5), config=MINI_CONFIG, rules=None, **settings):
  rules = rules or partitioning.DEFAULT_RULES
  backbone = Backbone('mini', T5(config), None, dict, rules=rules)
  return plan.plan(
      backbone=backbone, method=method, target=target, batch_size=8, feature_lengths=LENGTHS,
      compiled=True, **settings,
  )  # fmt: skip


@pytest.mark.parametrize('rules', partitioning.RULES.values())
@pytest.mark.parametrize('microbatches', [1, 2])
def test_the_devices_here_hold_what_the_plan_counts(rules, microbatches):
  found = compiled_for('here', rules=rules, num_partitions=2, microbatches=microbatches)
  # Two devices share the model, so that each has half of the eight rows of four arrays.
  batch = 4 * 4 * (24 + 5 + 3 * 4)
  # Two counts of steps that XLA finds unused.
  assert found.compiled.arguments == found.weights + found.state + batch - 2 * 4
  assert 0.3 * found.activations < found.compiled.temporaries < 3 * found.activations
  # Layer by layer, forward and backward, the devices of `model` add up what each has.
  assert found.compiled.sent['all-reduce'].count > 4 * (3 + 2) * microbatches
  gathered = found.compiled.sent['all-gather'].bytes
  assert (gathered > found.weights / 10) == (rules == partitioning.FULLY_SHARDED_RULES)
  assert f'arguments    {plan._shown(found.compiled.arguments)}' in repr(found)


@pytest.mark.parametrize('tx', [adafactor(1e-3), adamw(1e-3)])
@pytest.mark.parametrize('labels', [('prompt',), ('backbone',), ('prompt', 'backbone')])
def test_a_state_lies_where_a_run_places_it(tx, labels):
  module, mesh = T5(MINI_CONFIG), partitioning.make_mesh(2)
  method, labelling = SoftPrompt(5), dict.fromkeys(labels, tx)
  weights = module.init_params(jax.random.key(0))
  where = partitioning.shardings(
      mesh, module.logical_axes(), weights, partitioning.FULLY_SHARDED_RULES
  )
  params = {
      'backbone': jax.device_put(weights, where),
      'prompt': method.init(jax.random.key(0), module.spec)['params'],
  }
  run = RunParameters(params, labelling, method, module.spec, mesh)

  def shape(x):
    split = getattr(x.sharding, 'mesh', None) == mesh
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding if split else None)

  trained, _ = trainable_lib.split(jax.tree.map(shape, params), labelling)
  planned = plan_compiled.state_shapes(trained, run.tx, mesh)
  for ours, theirs in zip(jax.tree.leaves(planned), jax.tree.leaves(run.template), strict=True):
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    assert ours.sharding.is_equivalent_to(theirs.sharding, len(ours.shape))


@pytest.mark.parametrize(
    ('target', 'message'),
    [
        ('8xH100', 'only a machine with a H100-80GB can compile for it.*PLAN_TARGET=here'),
        ('v5e-12', 'no slice of 12 chips v5e; there are 1, 4, 8 and so on'),
        ('v5e-512', 'up to 256'),
    ],
)
def test_what_cannot_be_compiled_for_is_said(target, message):
  with pytest.raises(ValueError, match=message):
    plan_compiled.mesh_of(targets.parse(target), 1)


@pytest.mark.usefixtures('elsewhere')
def test_without_the_compiler_it_says_how_to_install_it(monkeypatch, capsys):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  command = ['plan', '--gin_file=demo', '--compile', '--gin.PLAN_TARGET=v5e-8']
  assert cli.main(command) == 2
  assert "pip install 'prompt-tuning-jax[tpu]'" in capsys.readouterr().err


@needs_libtpu
@pytest.mark.parametrize(
    ('target', 'count'),
    [('v2-8', 8), ('v4-8', 4), ('v5p-16', 8), ('v5e-1', 1), ('v6e-32', 32), ('2xv5e-8', 16)],
)
def test_slices_have_the_devices_of_the_target(target, count):
  mesh = plan_compiled.mesh_of(targets.parse(target), 1)
  assert mesh.size == targets.parse(target).count == count
  assert mesh.devices.flat[0].device_kind.startswith(f'TPU {target.rpartition("x")[2][:2]}')


@needs_libtpu
def test_a_copy_of_the_model_lies_within_a_slice():
  mesh = plan_compiled.mesh_of(targets.parse('2xv5e-8'), 4)
  slices = [{device.slice_index for device in row} for row in mesh.devices]
  assert slices == [{0}, {0}, {1}, {1}]
  with pytest.raises(ValueError, match='8 devices there are in each of the 2 slices'):
    plan_compiled.mesh_of(targets.parse('2xv5e-8'), 16)



@needs_libtpu
@pytest.mark.slow
def test_the_tpu_compiler_answers_for_a_slice():
  found = compiled_for('v5e-8', num_partitions=4)
  assert '8 × TPU v5 lite (libtpu' in found.compiled.compiler
  # Arrays are padded to tiles there.
  assert found.weights + found.state < found.compiled.arguments
  assert found.compiled.total >= found.compiled.arguments
  assert found.compiled.sent['all-reduce'].count > 4 * (3 + 2)


@needs_libtpu
@pytest.mark.slow
def test_what_does_not_fit_is_said_in_the_compilers_words():
  wide = T5Config(256, 8192, 64, 128, 65536, 3, 3)
  found = compiled_for('v5e-1', config=wide, method=SoftPrompt(5))
  assert not found.fits
  assert 'memory' in found.compiled.refusal
  assert f'does not fit: {found.compiled.refusal}' in repr(found)
