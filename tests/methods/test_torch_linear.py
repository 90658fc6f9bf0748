"""The layer that starts as PyTorch's does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax.methods.torch_linear import TorchLinear


@pytest.mark.parametrize(('inputs', 'features'), [(256, 64), (16, 1024)])
def test_weights_and_bias_are_uniform_within_one_over_the_root_of_the_inputs(inputs, features):
  params = TorchLinear(features).init(jax.random.key(0), jnp.zeros((3, inputs)))['params']
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
  y = TorchLinear(3).apply({'params': {'kernel': kernel, 'bias': bias}}, x)
  np.testing.assert_allclose(y, x @ kernel + bias, rtol=1e-5)
