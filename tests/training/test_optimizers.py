"""Adafactor on stacked layers, and the states that prompts' checkpoints rely on."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from prompt_tuning_jax.training import trainable as trainable_lib
from prompt_tuning_jax.training.optimizers import adafactor, adam, muon, warmup_linear
from prompt_tuning_jax.training.state_saving import StateSaver
from prompt_tuning_jax.training.step import TrainState

LEARNING_RATES = {
    'constant': lambda: 1e-3,
    'schedule': lambda: warmup_linear(1e-3, warmup_steps=2, train_steps=9),
}


def _draw(rng, layers, shape):
  """Layers whose numbers differ by two orders of magnitude."""
  scales = np.logspace(-2, 0, layers).reshape(-1, *(1 for _ in shape))
  return (rng.normal(size=(layers, *shape)) * scales).astype(np.float32)


def _stacked(seed, depth=3):
  """What a backbone's tree looks like: two stacks of unequal depth, and what is not one."""
  rng = np.random.default_rng(seed)
  encoder = {
      'kernel': _draw(rng, depth, (128, 160)),  # Large enough to be factored.
      'small': _draw(rng, depth, (4, 12)),
      'scale': _draw(rng, depth, (160,)),
  }
  return {
      'backbone': {
          'encoder': {'layers': encoder, 'norm': _draw(rng, 1, (160,))[0]},
          'decoder': {'layers': {'kernel': _draw(rng, depth + 1, (128, 130))}},
          'embedding': _draw(rng, 1, (140, 128))[0],
      }
  }


def _layer(tree, stack, i):
  return jax.tree.map(lambda leaf: leaf[i], tree['backbone'][stack]['layers'])


def _steps(tx, params, gradients):
  """The updates of some steps and the state after them."""
  state = tx.init(params)
  update = jax.jit(tx.update)
  found = []
  for gradient in gradients:
    updates, state = update(gradient, state, params)
    params = optax.apply_updates(params, updates)
    found.append(updates)
  return found, state


def _assert_same(actual, expected):
  # vmap may sum in another order.
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=0), actual, expected)


@pytest.mark.parametrize('scaled', [False, True])
@pytest.mark.parametrize('rate', LEARNING_RATES)
@pytest.mark.parametrize('weight_decay_rate', [None, 1e-5])
def test_a_stack_of_layers_trains_as_the_layers_apart(scaled, rate, weight_decay_rate):
  tx = adafactor(
      LEARNING_RATES[rate](),
      multiply_by_parameter_scale=scaled,
      weight_decay_rate=weight_decay_rate,
  )
  # Another layer has the large gradient than has the large weights.
  params, gradients = _stacked(0), [jax.tree.map(lambda x: x[::-1], _stacked(i)) for i in (1, 2, 3)]
  together, _ = _steps(tx, params, gradients)
  for stack, depth in (('encoder', 3), ('decoder', 4)):
    for i in range(depth):
      apart, _ = _steps(tx, _layer(params, stack, i), [_layer(g, stack, i) for g in gradients])
      _assert_same([_layer(updates, stack, i) for updates in together], apart)


def test_a_layer_is_scaled_by_its_own_size_and_clipped_by_itself():
  scales = np.array([0.01, 0.1, 1.0], np.float32)
  layers = {'layers': {'kernel': np.ones((3, 8, 8), np.float32) * scales[:, None, None]}}
  tx = adafactor(1e-3, multiply_by_parameter_scale=True, weight_decay_rate=None)
  gradient = jax.tree.map(jnp.ones_like, layers)
  (updates,), _ = _steps(tx, layers, [gradient])
  rms = np.sqrt(np.mean(np.square(updates['layers']['kernel']), axis=(1, 2)))
  np.testing.assert_allclose(rms, 1e-3 * scales, rtol=1e-5)


def test_deep_stacks_are_not_factored_over_the_layers():
  # 130 layers of 8 × 140: optax would take layers and columns for the matrix.
  rng = np.random.default_rng(0)
  params, gradient = ({'layers': {'kernel': _draw(rng, 130, (8, 140))}} for _ in range(2))
  tx = adafactor(0.1)
  (together,), _ = _steps(tx, params, [gradient])
  (apart,), _ = _steps(
      tx, {'kernel': params['layers']['kernel'][7]}, [{'kernel': gradient['layers']['kernel'][7]}]
  )
  _assert_same(together['layers']['kernel'][7], apart['kernel'])


@pytest.mark.parametrize('scaled', [False, True])
@pytest.mark.parametrize('rate', LEARNING_RATES)
@pytest.mark.parametrize('weight_decay_rate', [None, 1e-5])
def test_without_a_stack_it_is_optax_adafactor_to_the_bit(scaled, rate, weight_decay_rate):
  rng = np.random.default_rng(0)
  draw = lambda: {
      'prompt': {'prompt': _draw(rng, 20, (16,))},
      'backbone': {'token_embedder': {'embedding': _draw(rng, 140, (128,))}},
  }
  params, gradients = draw(), [draw() for _ in range(3)]
  ours = adafactor(
      LEARNING_RATES[rate](),
      multiply_by_parameter_scale=scaled,
      weight_decay_rate=weight_decay_rate,
      step_offset=1000,
  )
  optax_s = optax.adafactor(
      LEARNING_RATES[rate](),
      decay_offset=-1000,
      multiply_by_parameter_scale=scaled,
      weight_decay_rate=weight_decay_rate,
      eps=1e-30,
  )
  actual, expected = (_steps(tx, params, gradients) for tx in (ours, optax_s))
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_states_that_optax_adafactor_saved_of_a_prompt_are_restored(tmp_path):
  prompt = {'prompt': {'prompt': jnp.ones((5, 16))}}
  before = TrainState.create(
      prompt, optax.adafactor(0.3, multiply_by_parameter_scale=False, weight_decay_rate=1e-5)
  )
  saver = StateSaver(tmp_path)
  saver.save(1, before)
  after, _ = saver.restore(TrainState.create(prompt, adafactor()))
  jax.tree.map(np.testing.assert_array_equal, after, before)


def test_stacks_train_beside_a_prompt_with_an_optimiser_of_its_own():
  tree = {'prompt': {'prompt': np.ones((5, 16), np.float32)}, **_stacked(0)}
  gradient = jax.tree.map(lambda x: x[::-1], tree)
  settings = {'multiply_by_parameter_scale': True}
  labelling = {
      'prompt': adafactor(0.3),
      'backbone': adafactor(1e-3, **settings),
      'backbone/encoder/layers': adafactor(1e-2, **settings),
  }
  tx = trainable_lib.make_optimizer(labelling, tree)
  (together,), _ = _steps(tx, tree, [gradient])
  (apart,), _ = _steps(
      adafactor(1e-2, **settings), _layer(tree, 'encoder', 1), [_layer(gradient, 'encoder', 1)]
  )
  _assert_same(_layer(together, 'encoder', 1), apart)
  (apart,), _ = _steps(adafactor(0.3), tree['prompt'], [gradient['prompt']])
  _assert_same(together['prompt'], apart)


@pytest.mark.parametrize('weight_decay', [0.0, 0.1])
def test_adam_decays_weights_as_pytorch_s_does(weight_decay):
  rng = np.random.default_rng(0)
  param = rng.normal(size=(4, 5))
  gradients = rng.normal(size=(3, 4, 5))
  tx = adam(lambda step: 0.1 * 0.5**step, weight_decay=weight_decay)
  found = jnp.asarray(param, jnp.float32)
  state = tx.init(found)
  mean = square = 0
  for step, gradient in enumerate(gradients):
    updates, state = tx.update(jnp.asarray(gradient, jnp.float32), state, found)
    found = optax.apply_updates(found, updates)
    # The decay is part of the gradient, and so of both moments.
    gradient = gradient + weight_decay * param
    mean = 0.9 * mean + 0.1 * gradient
    square = 0.999 * square + 0.001 * gradient**2
    corrected = np.sqrt(square / (1 - 0.999 ** (step + 1))) + 1e-8
    param = param - 0.1 * 0.5**step * mean / (1 - 0.9 ** (step + 1)) / corrected
    np.testing.assert_allclose(found, param, rtol=1e-4, atol=1e-6)


def test_muon_leaves_stacked_tables_that_are_no_kernels_to_adamw():
  """umT5 has a bias table for each layer, [L, heads, buckets]."""
  key = jax.random.key(0)
  params = {'layer': {'kernel': jnp.zeros((2, 4, 6)), 'rel_embedding': jnp.zeros((2, 4, 6))}}
  gradient = {'layer': dict.fromkeys(params['layer'], jax.random.normal(key, (2, 4, 6)))}
  tx = muon(0.1, clip_norm=None)
  updates, _ = tx.update(gradient, tx.init(params), params)
  sizes = {name: np.abs(update) for name, update in updates['layer'].items()}
  # Adam's first update is as large for every number; Muon's rows are orthogonal.
  assert np.ptp(sizes['rel_embedding']) < 1e-4 * sizes['rel_embedding'].max()
  for update in np.asarray(updates['layer']['kernel']):
    product = update @ update.T
    np.testing.assert_allclose(product / product[0, 0], np.eye(4), atol=0.7)
    assert np.ptp(np.abs(update)) > 0.1 * np.abs(update).max()
