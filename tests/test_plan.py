"""What `plan` says of a run: counted parameters and bytes, and advice that keeps its word."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from prompt_tuning_jax import cli, partitioning, plan, targets
from prompt_tuning_jax.backbones import t5_stacks
from prompt_tuning_jax.backbones.backbone import Backbone
from prompt_tuning_jax.backbones.t5 import T5, T5Config
from prompt_tuning_jax.data.byte_vocabulary import ByteVocabulary
from prompt_tuning_jax.methods.soft_prompt import SoftPrompt
from prompt_tuning_jax.training import train
from prompt_tuning_jax.training.optimizers import adamw

_GIB = 2**30
XXL = T5Config(32128, 4096, 64, 64, 10240, 24, 24)
BASE = T5Config(32128, 768, 12, 64, 2048, 12, 12)
LENGTHS = {'inputs': 512, 'targets': 32}


def backbone(config, remat='none', dtype=jnp.bfloat16, rules=partitioning.DEFAULT_RULES):
  return Backbone('t5', T5(config, dtype=dtype, remat=remat), None, dict, rules=rules)


@pytest.mark.parametrize(
    ('name', 'count', 'gib'),
    [
        ('8xH100-80GB', 8, 80), ('h100', 1, 80), ('2xA100-40GB', 2, 40), ('v5e-8', 8, 16),
        ('v4-8', 4, 32), ('4xv5e-8', 32, 16), ('8xrtx4090-24gb', 8, 24),
    ],
)  # fmt: skip
def test_targets_by_name(name, count, gib):
  target = targets.parse(name)
  assert (target.count, target.memory) == (count, gib * _GIB)


def test_an_unknown_target_is_answered_with_the_nearest():
  with pytest.raises(ValueError, match="no device 'H10-80GB'. Did you mean 'H100-80GB'"):
    targets.parse('8xH10-80GB')
  with pytest.raises(ValueError, match='more than one A100; .* A100-40GB or A100-80GB'):
    targets.parse('2xA100')
  with pytest.raises(ValueError, match='v4 counts cores'):
    targets.parse('v4-5')
  here = targets.parse('here')
  assert here.count == len(jax.devices()) and here.memory > _GIB


@pytest.mark.slow
def test_xxl_on_eight_chips_is_what_the_tpu_compiler_says():
  found = plan.plan(
      backbone=backbone(XXL, 'full'), target='v5e-8', method=SoftPrompt(100),
      feature_lengths=LENGTHS, num_partitions=8,
  )  # fmt: skip
  assert found.trained == 100 * 4096
  assert found.frozen == 11_135_332_352
  # 2.6 GiB of weights and about 6 GiB of temporaries a chip.
  assert found.weights == pytest.approx(2.6 * _GIB, rel=0.02)
  assert found.activations == pytest.approx(5.9 * _GIB, rel=0.25)
  assert found.fits


@pytest.mark.parametrize(
    ('remat', 'gib'), [('dots_with_no_batch_dims', 32.14), ('qkv_and_mlp', 38.58), ('full', 38.58)]
)
def test_transfers_are_those_that_the_tpu_compiler_writes(remat, gib):
  found = plan.plan(
      backbone=backbone(XXL, remat), target='v5e-8', method=SoftPrompt(100), num_partitions=8
  )
  sums = found.transfers['sums of the model axis']
  assert sums == pytest.approx(gib * _GIB, rel=0.02)


def test_parts_of_the_model_and_of_the_batch_are_a_device_s():
  def of(rules=partitioning.DEFAULT_RULES, **settings):
    return plan.plan(
        backbone=backbone(BASE, rules=rules), method=SoftPrompt(20), feature_lengths=LENGTHS,
        **settings,
    )  # fmt: skip

  one = of(target='H100')
  data = of(target='8xH100')
  tensor = of(target='4xH100', num_partitions=4)
  fully = of(target='8xH100', rules=partitioning.FULLY_SHARDED_RULES)
  assert one.transfers == {'sums of the model axis': 0, 'weights': 0, 'gradients': 0}
  assert data.weights == one.weights and fully.weights < 0.13 * one.weights
  assert data.activations == pytest.approx(one.activations / 8, rel=0.05)
  assert data.transfers['gradients'] == int(2 * 7 / 8 * 4 * 20 * 768)
  # Norms and relative positions are on all four.
  assert one.weights / 4 < tensor.weights < 1.01 * one.weights / 4
  assert tensor.activations < 0.45 * one.activations
  for other in (data, tensor, fully):
    assert other.flops == pytest.approx(one.flops, rel=0.02)
  assert one.flops > 2 * 32 * 532 * 12 * 4 * 768 * 768


def test_int8_takes_half_of_what_bfloat16_does():
  def of(**settings):
    module = T5(XXL, dtype=jnp.bfloat16, remat='full', **settings)
    return plan.plan(
        backbone=Backbone('t5', module, None, lambda: None), target='T4',
        method=SoftPrompt(100), batch_size=2, feature_lengths=LENGTHS,
    )  # fmt: skip

  plain, quantised = of(), of(int8=True)
  scales = quantised.weights - quantised.frozen
  assert quantised.frozen == plain.frozen == 11_135_332_352
  assert plain.weights == 2 * plain.frozen
  assert 0 < scales < 0.002 * quantised.weights
  assert quantised.activations == plain.activations and quantised.flops == plain.flops
  assert '10.4 GiB (int8, computed in bfloat16)' in repr(quantised)
  # Nothing else would do on one device.
  assert not plain.fits and plain.advice == '--gin.PARAM_DTYPE=int8'
  assert quantised.fits


def test_auto_plans_for_what_the_devices_of_the_target_compute_in():
  def of(target, dtype):
    module = T5(BASE)  # In float32, as 'auto' is on the machine that plans.
    return plan.plan(
        backbone=Backbone('t5', module, None, lambda: None), target=target, dtype=dtype,
        method=SoftPrompt(5), batch_size=8, feature_lengths=LENGTHS,
    )  # fmt: skip

  for target in ('H100', 'v5e-1'):
    assert of(target, 'auto').setting.dtype == 'bfloat16'
    assert of(target, 'float32').setting.dtype == 'float32'
    assert 2 * of(target, 'auto').weights == of(target, 'float32').weights
  assert of('here', 'auto').setting.dtype == 'float32'


def test_advice_makes_the_run_fit():
  wide = dict(backbone=backbone(BASE), method=SoftPrompt(100), batch_size=64)
  found = plan.plan(target='T4', feature_lengths=LENGTHS, **wide)
  assert not found.fits and found.advice == '--gin.REMAT=dots_with_no_batch_dims'
  assert 'does not fit; would with --gin.REMAT=dots_with_no_batch_dims' in repr(found)
  wide['backbone'] = backbone(BASE, 'dots_with_no_batch_dims')
  assert plan.plan(target='T4', feature_lengths=LENGTHS, **wide).fits


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'num_partitions': 3}, 'NUM_PARTITIONS=3 does not divide the 8 .* may be 1, 2, 4, 8'),
        ({'batch_size': 12}, 'BATCH_SIZE=12 .* 8 copies .* multiple of 8'),
        ({'microbatches': 3}, 'MICROBATCHES=3 does not divide the 4 rows of a device'),
    ],
)
def test_what_does_not_divide_is_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    plan.plan(backbone=backbone(BASE), target='8xH100', method=SoftPrompt(5), **settings)


@pytest.mark.usefixtures('elsewhere')
def test_the_command_plans_for_a_model_that_is_not_here(capsys):
  command = ['plan', '--gin_file=super_glue_cb_t5_1_1_lm100k_base']
  assert cli.main([*command, '--gin.PLAN_TARGET=A100-80GB']) == 0
  printed = capsys.readouterr().out
  assert re.search(r'trains +76,800 of 247,\d{3},\d{3} numbers', printed)
  assert 'fits' in printed
  assert cli.main([*command, '--gin.PLAN_TARGET=X100']) == 2
  assert "PLAN_TARGET 'X100': there is no device" in capsys.readouterr().err


def test_devices_that_share_a_model_are_of_one_slice():
  settings = dict(backbone=backbone(BASE), target='2xv5e-4', method=SoftPrompt(5))
  assert plan.plan(num_partitions=4, **settings).target.count == 8
  with pytest.raises(ValueError, match='4 devices of each slice of 2xv5e-4. It may be 1, 2, 4'):
    plan.plan(num_partitions=8, **settings)


def test_weights_count_in_the_type_they_are_held_in():
  def weights(param_dtype, **run):
    model = backbone(BASE)
    model.param_dtype = param_dtype
    return plan.plan(backbone=model, target='H100', **run).weights

  prompt = dict(method=SoftPrompt(5))
  assert weights('float32', **prompt) == 2 * weights(None, **prompt)
  # A model that trains is copied, and the run keeps what it began with.
  assert weights('float32', trainable=adamw(1e-3)) == weights('float32', **prompt)


def test_heads_that_do_not_divide_are_said(capsys):
  command = ['plan', '--gin_file=super_glue_cb_t5_1_1_lm100k_base', '--gin.PLAN_TARGET=8xH100']
  assert cli.main([*command, '--gin.NUM_PARTITIONS=8']) == 0
  printed = capsys.readouterr()
  assert "do not divide the model's heads (12)" in printed.err
  assert 'at least sums of the model axis' in printed.out
  assert cli.main([*command, '--gin.NUM_PARTITIONS=4']) == 0
  printed = capsys.readouterr()
  assert 'heads' not in printed.err and 'at least' not in printed.out


def test_packed_rows_of_the_longest_cost_about_as_much_as_padded_ones_and_fit_the_devices():
  def of(count=1, **settings):
    return plan.plan(
        backbone=backbone(BASE), target=f'{count}xH100-80GB', method=SoftPrompt(100),
        feature_lengths=LENGTHS, batch_size=32, **settings,
    )  # fmt: skip

  padded, packed = of(), of(lengths='pack', packed_length=1224)
  assert '16 rows of 1124 + 100 input and 64 target tokens, of 32 packed' in packed.description
  # Twice as long, rows spend more on attention.
  assert padded.flops < packed.flops < 1.3 * padded.flops
  assert of(lengths='bucket').flops == padded.flops
  on_eight = of(8, lengths='pack', packed_length=1224, microbatches=4)
  assert '32 rows of 1124' in on_eight.description


def test_rules_of_one_s_own_count_and_advice_lets_go_of_them():
  rules = tuple((axis, None if axis == 'mlp' else to) for axis, to in partitioning.DEFAULT_RULES)

  def of(rules, **settings):
    return plan.plan(
        backbone=backbone(XXL, 'full', rules=rules), method=SoftPrompt(20),
        feature_lengths=LENGTHS, num_partitions=8, **settings,
    )  # fmt: skip

  default, own = of(partitioning.DEFAULT_RULES, target='v5e-8'), of(rules, target='v5e-8')
  mlp = 48 * 3 * 4096 * 10240 * 2  # The bytes of all MLPs, of which each device keeps all.
  assert own.weights - default.weights == mlp * 7 // 8
  assert own.flops > 3 * default.flops  # All devices together: each computes all MLPs.
  assert own.transfers['sums of the model axis'] < 0.7 * sum(default.transfers.values())
  assert default.fits and not own.fits
  # Of 8 GiB, where the weights alone are 13.
  assert of(rules, target='v2-8').advice == (
      '--gin.MICROBATCHES=2 --gin.LOGICAL_AXIS_RULES=@logical_axis_rules() '
      '--gin.PARAMETER_PARTITIONING_DIMS=1'
  )


@pytest.mark.usefixtures('elsewhere')
def test_the_command_plans_with_the_rules_of_the_run(capsys):
  command = ['plan', '--gin_file=super_glue_cb_t5_1_1_lm100k_base', '--gin.PLAN_TARGET=8xH100']

  def weights(*flags):
    assert cli.main([*command, *flags]) == 0
    return float(re.search(r'weights +([\d.]+) MiB', capsys.readouterr().out)[1])

  one = weights()
  assert weights('--gin.PARAMETER_PARTITIONING_DIMS=2') == pytest.approx(one / 8, rel=0.01)
  rules = [(a, 'data' if a == 'mlp' else t) for a, t in partitioning.DEFAULT_RULES]
  mlp = 24 * 3 * 768 * 2048 * 2 / 2**20  # In bfloat16, as accelerators compute.
  found = weights(f'--gin.LOGICAL_AXIS_RULES={rules}')
  assert found == pytest.approx(one - mlp * 7 / 8, rel=0.01)


@pytest.fixture
def large_run():
  """A run whose weights must not be read, and the bytes that it holds before a step."""

  def never():
    raise AssertionError('The weights were read.')

  module = T5(T5Config(1024, 64, 4, 16, 128, 3, 3))
  mesh = partitioning.make_mesh(2)
  model = Backbone('large', module, ByteVocabulary(), never, mesh=mesh)
  run = dict(backbone=model, method=SoftPrompt(5), batch_size=4)
  four = dataclasses.replace(targets.parse('H100'), count=4)
  found = plan.plan(target=four, num_partitions=2, **run)
  return run, found.weights + found.state


def test_a_run_that_is_too_large_is_refused_before_its_weights_are_read(
    monkeypatch, tmp_path, large_run
):
  run, held = large_run
  monkeypatch.setattr(targets, 'memory_here', lambda: held - 1)
  with pytest.raises(MemoryError, match='(?s)too small for this run:.*weights .*does not fit'):
    train.train(task='none', model_dir=str(tmp_path / 'run'), train_steps=1, **run)
  assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_what_only_the_estimate_or_a_cpu_says_is_a_warning(monkeypatch, large_run):
  run, held = large_run
  monkeypatch.setattr(targets, 'memory_here', lambda: held + 1)
  with pytest.warns(UserWarning, match='(?s)does not fit.*It is tried all the same'):
    plan.check_memory(**run)
  monkeypatch.setattr(targets, 'memory_here', lambda: 2**36)
  plan.check_memory(**run)
  monkeypatch.setattr(targets, 'memory_here', lambda: None)
  monkeypatch.setattr(targets.os, 'sysconf', lambda name: 2**10)
  with pytest.warns(UserWarning, match='too small for this run'):
    plan.check_memory(**run)


def test_small_runs_are_let_through_uncounted(monkeypatch):
  monkeypatch.setattr(plan, 'plan', lambda **_: pytest.fail('counted'))
  monkeypatch.setattr(targets, 'memory_here', lambda: 2**34)
  config = T5Config(1024, 64, 4, 16, 128, 3, 3)
  plan.check_memory(backbone=backbone(config), method=SoftPrompt(20))


@pytest.mark.parametrize('remat', t5_stacks.REMAT_POLICIES)
def test_no_step_takes_more_than_the_bound_that_lets_runs_through(remat):
  run = dict(backbone=backbone(BASE, remat, jnp.float32), method=SoftPrompt(20))
  for rows in (1, 32):
    found = plan.plan(target='H100', batch_size=rows, **run)
    assert found.total < plan._at_most(batch_size=rows, **run)
  tuned = plan.plan(target='H100', backbone=backbone(BASE, remat), trainable=adamw(1e-3))
  assert tuned.total < plan._at_most(backbone=backbone(BASE, remat))
