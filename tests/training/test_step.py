"""The train step: what it changes, what it costs, and that it compiles once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax.backbones.backbone import Backbone
from prompt_tuning_jax.backbones.t5 import T5, T5Config
from prompt_tuning_jax.methods.p_tuning import PTuning
from prompt_tuning_jax.methods.soft_prompt import SoftPrompt
from prompt_tuning_jax.plan_compiled import count_flops
from prompt_tuning_jax.training import trainable as trainable_lib
from prompt_tuning_jax.training.losses import LossConfig
from prompt_tuning_jax.training.optimizers import adafactor, adamw, muon, warmup_linear
from prompt_tuning_jax.training.step import TrainState, loss_and_grad, make_train_step
from tests.conftest import TINY_CONFIG, assert_close, prepend_virtual, random_batch

METHOD = SoftPrompt(4)
METHODS = {
    'SoftPrompt': METHOD,
    'PTuning': PTuning(4),
    'PTuning, wide': PTuning(4, lstm_width=1.0),
    'PTuning, MLP': PTuning(4, lstm_layers=0),
}


def _batch(seed=0):
  batch = random_batch(TINY_CONFIG.vocab_size, [7, 4, 5, 6], [3, 2, 3, 1], seed)
  return prepend_virtual(batch, TINY_CONFIG.vocab_size, METHOD.length)


def _start(tiny, labelling, method=METHOD):
  module, backbone_params = tiny
  params = {
      'prompt': method.init(jax.random.key(1), module.spec)['params'],
      'backbone': backbone_params,
  }
  trainable, frozen = trainable_lib.split(params, labelling)
  # The step donates its state; the fixture's arrays must survive it.
  trainable = jax.tree.map(jnp.array, trainable)
  tx = trainable_lib.make_optimizer(labelling, trainable)
  return TrainState.create(trainable, tx), frozen, tx


LABELLINGS = {
    'prompt': {'prompt': adafactor()},
    'co-tuning': {'prompt': adamw(1e-2), 'backbone': adamw(1e-3)},
    'prompt and head': {'prompt': adamw(1e-2), 'backbone/decoder/logits_dense': adamw(1e-3)},
    'muon': {'backbone': muon(1e-2), 'backbone/token_embedder': adamw(1e-2)},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ('labelling', 'method'),
    [
        *((labelling, 'SoftPrompt') for labelling in LABELLINGS),
        *((labelling, m) for labelling in ('prompt', 'co-tuning') for m in list(METHODS)[1:]),
    ],
)
def test_labelled_leaves_change_and_all_others_stay_to_the_bit(tiny, labelling, method):
  labelling, method = LABELLINGS[labelling], METHODS[method]
  state, frozen, tx = _start(tiny, labelling, method)
  before = jax.device_get((state.trainable, frozen))
  train_step = make_train_step(method, tiny[0], tx)
  for i in range(2):
    state, _ = train_step(state, frozen, _batch(i))
  for path, old in jax.tree_util.tree_leaves_with_path(before[0]):
    new = state.trainable
    for key in path:
      new = new[key.key]
    assert not np.array_equal(old, new), f'{path} did not train'
  jax.tree.map(np.testing.assert_array_equal, before[1], frozen)
  jax.tree.map(
      np.testing.assert_array_equal,
      trainable_lib.split(trainable_lib.merge(*before), labelling),
      before,
  )


@pytest.mark.slow
@pytest.mark.parametrize('method', METHODS)
def test_every_parameter_of_a_method_has_a_gradient(tiny, method):
  module, params = tiny
  backbone = Backbone('tiny', module, None, lambda: params)
  method = METHODS[method]
  prompt = method.init(jax.random.key(1), module.spec)['params']
  _, gradient = loss_and_grad(backbone, method, prompt, _batch())
  assert jax.tree.structure(gradient) == jax.tree.structure(prompt)
  for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
    assert np.isfinite(leaf).all(), path
    # Of a hidden layer some units may rest; each number of the table counts.
    least = 1 if 'embedding' in str(path) else 0.3
    assert np.mean(leaf != 0) >= least, path


def test_no_optimizer_state_of_a_frozen_weight_exists(tiny):
  state, _, _ = _start(tiny, {'prompt': adafactor()})
  assert trainable_lib.count(state) < 3 * METHOD.length * TINY_CONFIG.d_model


@pytest.mark.slow
@pytest.mark.parametrize('factor', [None, 'NUM_REAL_TARGET_TOKENS', 'AVERAGE_PER_SEQUENCE'])
def test_microbatches_change_nothing(tiny, factor):
  results = []
  for microbatches in (1, 2, 4):
    state, frozen, tx = _start(tiny, {'prompt': adafactor()})
    train_step = make_train_step(
        METHOD,
        tiny[0],
        tx,
        loss=LossConfig(normalizing_factor=factor),
        microbatches=microbatches,
    )
    results.append(train_step(state, frozen, _batch()))
  for state, metrics in results[1:]:
    expected = results[0][0].trainable['prompt']['prompt']
    assert_close(state.trainable['prompt']['prompt'], expected, 1e-5)
    assert_close(metrics['loss'], results[0][1]['loss'], 1e-6)
    assert_close(metrics['gradient_norm'], results[0][1]['gradient_norm'], 1e-5)


def test_microbatches_that_do_not_divide_are_refused(tiny):
  state, frozen, tx = _start(tiny, {'prompt': adafactor()})
  train_step = make_train_step(METHOD, tiny[0], tx, microbatches=3)
  with pytest.raises(ValueError, match='MICROBATCHES=3 does not divide the batch of 4'):
    train_step(state, frozen, _batch())


def test_the_step_compiles_once_per_shape(tiny):
  state, frozen, tx = _start(tiny, {'prompt': adafactor()})
  train_step = make_train_step(METHOD, tiny[0], tx)
  for i in range(3):
    state, _ = train_step(state, frozen, _batch(i))
  assert train_step._cache_size() == 1


@pytest.mark.slow
def test_dropout_is_a_function_of_seed_and_step(tiny):
  module = tiny[0].clone(dropout_rate=0.2)

  def losses(seed):
    _, frozen, tx = _start(tiny, {'prompt': adafactor()})
    train_step = make_train_step(METHOD, module, tx, seed=seed)
    for step in (0, 5, 0):
      state, _, _ = _start(tiny, {'prompt': adafactor()})
      _, metrics = train_step(state.replace(step=jnp.int32(step)), frozen, _batch())
      yield float(metrics['loss'])

  first, later, again = losses(seed=0)
  (other, *_) = losses(seed=1)
  assert first == again
  assert len({first, later, other}) == 3


def test_a_label_that_leads_nowhere_is_refused(tiny):
  with pytest.raises(ValueError, match=r"\['promt'\].*under: backbone/decoder.*prompt/prompt"):
    _start(tiny, {'promt': adafactor()})


@pytest.mark.parametrize('dtype', ['int8', 'uint32', 'bool'])
def test_weights_that_are_no_floating_point_numbers_are_not_trained(dtype):
  kernel = jax.ShapeDtypeStruct((4, 4), dtype)
  scale = jax.ShapeDtypeStruct((4,), jnp.bfloat16)
  encoder = {'one': {'kernel': kernel}, 'two': {'kernel': kernel}, 'scale': scale}
  params = {'prompt': {'prompt': scale}, 'backbone': {'encoder': encoder}}
  both = {'prompt': adafactor(), 'backbone': adafactor()}
  with pytest.raises(ValueError) as error:
    trainable_lib.split(params, both)
  assert f'backbone/encoder/one/kernel of type {dtype} and 1 more' in str(error.value)
  assert 'tune the prompt alone' in str(error.value)
  # What is floating-point beside them could train, but not be saved without them.
  with pytest.raises(ValueError, match=f'leads to backbone/encoder/scale, but .* in {dtype}'):
    trainable_lib.split(params, {'prompt': adafactor(), 'backbone/encoder/scale': adafactor()})
  # Frozen, they are as good as any.
  trainable, frozen = trainable_lib.split(params, {'prompt': adafactor()})
  assert trainable_lib.count(trainable) == 4
  assert frozen['backbone']['encoder'].keys() == {'one', 'two', 'scale'}


def test_prompt_tuning_costs_about_two_forwards():
  """Step FLOPs at most 2.15 × forward, T5 base width, 512 + 100 tokens, by XLA's count."""
  config = T5Config(32128, 768, 12, 64, 2048, 2, 2)
  flops = count_flops(
      T5(config, unroll=True),
      SoftPrompt(100),
      adafactor(),
      rows=8,
      input_length=512,
      target_length=8,
  )
  assert 1.9 < flops.step / flops.forward <= 2.15, flops


def test_a_schedule_warms_up_and_decays():
  schedule = warmup_linear(2.0, warmup_steps=10, train_steps=30)
  np.testing.assert_allclose(
      [schedule(step) for step in (0, 5, 10, 20, 30, 40)], [0, 1, 2, 1, 0, 0], atol=1e-6
  )


def test_a_schedule_of_a_schedule_is_refused():
  with pytest.raises(ValueError, match='peak is a schedule.*adamw.learning_rate=@'):
    warmup_linear(lambda step: 0.1, warmup_steps=0, train_steps=10)


def test_muon_orthogonalises_each_layers_kernel():
  params = {'kernel': jnp.zeros((2, 4, 4)), 'scale': jnp.zeros((2, 4))}
  gradient = {
      'kernel': jax.random.normal(jax.random.key(0), (2, 4, 4)),
      'scale': jnp.ones((2, 4)),
  }
  tx = muon(1.0, adam_learning_rate=0.1, clip_norm=None)
  updates, _ = tx.update(gradient, tx.init(params), params)
  for layer in updates['kernel']:
    singular = jnp.linalg.svd(layer, compute_uv=False)
    assert 0.5 < singular.min() and singular.max() < 1.5
  # Adam moves every entry of a constant gradient alike, by about the learning rate.
  assert np.ptp(updates['scale']) == 0 and 0.05 < -updates['scale'][0, 0] < 0.25
