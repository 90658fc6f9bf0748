"""FLOPs and memory counted in a jaxpr, against by hand and against XLA's own."""

import functools

import jax
import jax.numpy as jnp
import pytest

from prompt_tuning_jax import costs
from prompt_tuning_jax.backbones.t5 import T5, T5Config
from prompt_tuning_jax.backbones.t5_stacks import REMAT_POLICIES
from prompt_tuning_jax.methods import method as method_lib
from prompt_tuning_jax.methods.prefix import Prefix
from prompt_tuning_jax.methods.soft_prompt import SoftPrompt
from prompt_tuning_jax.training import trainable as trainable_lib
from prompt_tuning_jax.training.optimizers import adafactor
from prompt_tuning_jax.training.step import TrainState, make_train_step
from prompt_tuning_jax.typing import Batch


def shaped(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_products_count_twice_their_size_and_loops_as_often_as_they_run():
  def chain(x, kernels):
    return jax.lax.scan(lambda x, kernel: (jax.nn.relu(x @ kernel), None), x, kernels)[0]

  found = costs.count(chain, shaped(5, 8), shaped(7, 8, 8))
  assert found.flops == 7 * 2 * 5 * 8 * 8
  product = functools.partial(jnp.einsum, 'bij,bjk->bik')
  batched = costs.count(product, shaped(3, 4, 5), shaped(3, 5, 6))
  assert batched.flops == 2 * 3 * 4 * 5 * 6


def test_memory_is_what_lives_at_once():
  def two_products(x, y):
    a = jnp.exp(x @ y)  # 10 × 10
    b = a @ y  # 10 × 20, of a, which it needs
    return jnp.sum(b * 2)

  # exp is fused: `x @ y` and `b` live together, and b's sum beside b.
  found = costs.count(two_products, shaped(10, 10), shaped(10, 10)).peak_bytes
  assert found == 4 * (10 * 10 + 10 * 10)
  # What is no longer needed makes room.
  found = costs.count(lambda x: ((x @ x) @ x) @ x, shaped(10, 10)).peak_bytes
  assert found == 4 * 2 * 100


CONFIG = T5Config(1024, 64, 4, 16, 128, 3, 3)


def step_of(method, remat='none', unroll=False):
  module = T5(CONFIG, remat=remat, unroll=unroll)
  tx = adafactor()
  shapes = {
      'backbone': jax.eval_shape(module.init_params, jax.random.key(0)),
      'prompt': method_lib.shapes(method, module.spec)[0],
  }
  trainable, frozen = trainable_lib.split(shapes, {'prompt': tx})
  state = jax.eval_shape(lambda tree: TrainState.create(tree, tx), trainable)

  def tokens(length):
    return jax.ShapeDtypeStruct((8, length), jnp.int32)

  batch = Batch(tokens(128 + method.num_virtual_tokens), tokens(16), tokens(16), tokens(16))
  return make_train_step(method, module, tx), (state, frozen, batch)


@pytest.mark.parametrize('method', [SoftPrompt(20), Prefix(10, hidden=16)])
def test_the_flops_of_a_step_are_those_that_xla_counts(method):
  step, args = step_of(method, unroll=True)
  theirs = step.lower(*args).compile().cost_analysis()['flops']
  ours = costs.count(step, *args).flops
  # XLA counts elementwise work too, and leaves out products that nothing reads.
  assert 0.85 * theirs < ours < 1.05 * theirs
  scanned, args = step_of(method)
  assert costs.count(scanned, *args).flops == pytest.approx(ours, rel=0.02)


@pytest.mark.parametrize('remat', REMAT_POLICIES)
def test_the_memory_of_a_step_is_about_what_xla_takes(remat):
  step, args = step_of(SoftPrompt(20), remat)
  theirs = step.lower(*args).compile().memory_analysis().temp_size_in_bytes
  ours = costs.count(step, *args).peak_bytes
  assert 0.6 * theirs < ours < 1.5 * theirs
