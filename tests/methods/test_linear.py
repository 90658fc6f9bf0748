"""The layer that starts as PyTorch's does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax.methods.linear import Linear


@pytest.mark.parametrize(('inputs', 'features'), [(256, 64), (16, 1024)])
def test_weights_and_bias_are_uniform_within_one_over_the_root_of_the_inputs(inputs, features):
  params = Linear(features).init(jax.random.key(0), jnp.zeros((3, inputs)))['params']
  assert set(params) == {'kernel', 'bias'}
  bound = inputs**-0.5
  for leaf in params.values():
    assert np.abs(leaf).max() <= bound
    # Of a uniform distribution; 5 deviations of what a sample of this size would show.
    assert abs(np.std(leaf) * np.sqrt(3) / bound - 1) < 5 * np.sqrt(0.2 / leaf.size)
    assert abs(np.mean(leaf)) < 5 * bound / np.sqrt(3 * leaf.size)
  assert not np.allclose(params['kernel'][0], params['bias'])


def test_it_is_a_matrix_and_a_bias():
  rng = np.random.default_rng(0)
  kernel, bias, x = (rng.normal(size=s).astype(np.float32) for s in ((4, 3), (3,), (2, 4)))
  y = Linear(3).apply({'params': {'kernel': kernel, 'bias': bias}}, x)
  np.testing.assert_allclose(y, x @ kernel + bias, rtol=1e-5)


def test_the_kernel_may_start_as_the_nearest_one_that_gives_a_wanted_output():
  x, wanted = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(4, 9), (4, 5)]))
  layer = Linear(5, output_init=lambda key, shape: wanted.reshape(shape))
  params = layer.init(jax.random.key(2), x)
  np.testing.assert_allclose(layer.apply(params, x), wanted, atol=1e-5)
  # What the wanted output does not touch is as drawn.
  drawn = Linear(5).init(jax.random.key(2), x)['params']
  moved = params['params']['kernel'] - drawn['kernel']
  outside = np.linalg.svd(x)[2][4:]
  np.testing.assert_allclose(outside @ moved, 0, atol=1e-5)
  np.testing.assert_array_equal(params['params']['bias'], drawn['bias'])
