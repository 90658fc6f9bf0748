"""Packed = padded = bucketed: the loss, what is counted and every gradient."""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax import partitioning
from prompt_tuning_jax.backbones.t5 import T5
from prompt_tuning_jax.backbones.t5_blocks import segment_positions
from prompt_tuning_jax.checkpoints.load import load_backbone
from prompt_tuning_jax.data.packing import packed_batch
from prompt_tuning_jax.data.padding import make_batch
from prompt_tuning_jax.evaluation.ranking import score_targets
from prompt_tuning_jax.json_files import read_jsonl
from prompt_tuning_jax.methods.combined import Combined, InDecoder
from prompt_tuning_jax.methods.p_tuning import PTuning
from prompt_tuning_jax.methods.prefix import Prefix
from prompt_tuning_jax.methods.soft_prompt import SoftPrompt
from prompt_tuning_jax.training import train as train_lib
from prompt_tuning_jax.training import trainable as trainable_lib
from prompt_tuning_jax.training.losses import NORMALIZATIONS, LossConfig, weights_and_factor
from prompt_tuning_jax.training.optimizers import adafactor, adamw
from prompt_tuning_jax.training.step import TrainState, make_loss_fn, make_train_step
from prompt_tuning_jax.typing import KV_FIELDS, POSITIONS
from tests.checkpoints.samples import assert_same_trees
from tests.conftest import TINY_CONFIG, assert_close
from tests.methods.test_laws import METHODS
from tests.training.conftest import FEATURE_LENGTHS

V = TINY_CONFIG.vocab_size
EXAMPLES = [
    {'inputs': [7, 9, 11, 30, 5, 1], 'targets': [33, 12, 1]},
    {'inputs': [8, 40, 1], 'targets': [1]},
    {'inputs': [50, 51, 52, 1], 'targets': [20, 1]},
    {'inputs': [6, 1], 'targets': [14, 13, 1]},
    {'inputs': [41, 42, 43, 44, 1], 'targets': [21, 1]},
]
# The one of a single target does not come first: only its place says that its 0 is a start.
ROWS = [[0, 1, 2], [4, 3], []]


def batches_for(method, placement='prefix'):
  """The examples padded, padded less, and packed."""
  layout = dict(
      input_length=6,
      target_length=3,
      vocab_size=V,
      num_virtual_tokens=method.num_virtual_tokens,
      num_decoder_virtual_tokens=method.num_decoder_virtual_tokens,
      placement=placement,
  )
  width = 6 + method.num_virtual_tokens
  rows = [[EXAMPLES[number] for number in row] for row in ROWS]
  return {
      'padded': make_batch(EXAMPLES, encoder_width=width + 5, **layout),
      'bucketed': make_batch(EXAMPLES, **layout),
      'packed': packed_batch(rows, encoder_width=3 * width, decoder_width=16, **layout),
  }


def loss_and_sums(method, module, frozen, loss=LossConfig()):
  """Compiled: (parameters, batch) → (gradient of the loss by them, sums)."""
  loss_fn = make_loss_fn(method, module, loss)

  @jax.jit
  def run(params, batch):
    weights_BT, factor = weights_and_factor(batch, loss.normalizing_factor)

    def scaled(params):
      total, sums = loss_fn({'prompt': params}, frozen, batch, weights_BT)
      return total / factor, sums

    return jax.grad(scaled, has_aux=True)(params)

  return run


def assert_packed_is_padded(method, config=TINY_CONFIG, placement='prefix', **of_module):
  module = T5(config, **of_module)
  backbone = jax.jit(module.init_params)(jax.random.key(0))
  params = jax.jit(lambda key: method.init(key, module.spec)['params'])(jax.random.key(1))
  run = loss_and_sums(method, module, {'backbone': backbone})
  batches = batches_for(method, placement)
  expected_gradient, expected = run(params, batches.pop('padded'))
  assert expected['tokens'] == sum(len(e['targets']) for e in EXAMPLES)
  for name, batch in batches.items():
    gradient, sums = run(params, batch)
    for key, value in expected.items():
      assert_close(sums[key], value, 1e-5, f'{name}: {key}')
    assert sums['right_tokens'] == expected['right_tokens']
    for (path, one), other in zip(
        jax.tree_util.tree_leaves_with_path(gradient), jax.tree.leaves(expected_gradient)
    ):
      assert np.abs(other).max() > 0
      assert_close(one, other, 1e-5, f'{name}: {path}')


@pytest.mark.parametrize('name', [
    pytest.param(name, marks=[] if name == 'all together' else pytest.mark.slow)
    for name in METHODS
])  # fmt: skip
def test_packed_is_padded_for_every_method(name):
  assert_packed_is_padded(METHODS[name])


@pytest.mark.parametrize('positions', POSITIONS)
@pytest.mark.parametrize(
    'site', [*(pytest.param(site, marks=pytest.mark.slow) for site in KV_FIELDS), 'all']
)
def test_packed_is_padded_for_a_prefix_at_every_site(site, positions):
  sites = tuple(KV_FIELDS) if site == 'all' else (site,)
  assert_packed_is_padded(Prefix(3, sites=sites, hidden=None, positions=positions))


@pytest.mark.slow
@pytest.mark.parametrize('placement', ['{2} {inputs} {2}', 'suffix'])
def test_packed_is_padded_wherever_the_prompt_stands(placement):
  assert_packed_is_padded(PTuning(4), placement=placement)


@pytest.mark.slow
@pytest.mark.parametrize(
    'change', [{'relpos_per_layer': True}, {'remat': 'full'}, {'unroll': True}], ids=str
)
def test_packed_is_padded_in_every_form_of_the_model(change):
  method = Combined([Prefix(3, hidden=None), InDecoder(SoftPrompt(2)), SoftPrompt(2)])
  if 'relpos_per_layer' in change:
    assert_packed_is_padded(method, dataclasses.replace(TINY_CONFIG, **change))
  else:
    assert_packed_is_padded(method, **change)


@pytest.mark.slow
def test_the_model_s_own_gradient_is_that_of_padded_rows_too(tiny):
  module, params = tiny
  method = Prefix(2, hidden=None)
  prompt = method.init(jax.random.key(1), module.spec)['params']
  loss_fn = make_loss_fn(method, module, LossConfig())

  @jax.jit
  def gradient_of(params, batch):
    weights_BT, _ = weights_and_factor(batch, None)
    return jax.grad(
        lambda p: loss_fn({'backbone': p}, {'prompt': prompt}, batch, weights_BT)[0]
    )(params)

  batches = batches_for(method)
  jax.tree.map(
      lambda *leaves: assert_close(*leaves, 1e-5),
      gradient_of(params, batches['packed']),
      gradient_of(params, batches['bucketed']),
  )


@pytest.mark.slow
def test_empty_rows_change_nothing(tiny):
  method = METHODS['all together']
  module, backbone = tiny
  params = method.init(jax.random.key(1), module.spec)['params']
  run = loss_and_sums(method, module, {'backbone': backbone})
  batch = batches_for(method)['packed']
  more = jax.tree.map(lambda x: np.pad(x, ((1, 4), (0, 0))), batch)
  expected, actual = run(params, batch), run(params, more)
  jax.tree.map(lambda *leaves: assert_close(*leaves, 1e-5), actual, expected)


def test_positions_within_segments_start_anew_with_each():
  ids = jnp.array([[1, 1, 1, 2, 3, 3, 0, 0], [1, 2, 2, 2, 2, 2, 2, 2], [0] * 8])
  assert segment_positions(ids).tolist() == [
      [0, 1, 2, 0, 0, 1, 0, 1], [0, 0, 1, 2, 3, 4, 5, 6], list(range(8))
  ]  # fmt: skip


# The step.


@pytest.mark.parametrize('factor', [None, 100.0, *NORMALIZATIONS])
def test_every_normalisation_of_the_loss_is_that_of_padded_rows(factor, tiny):
  method = InDecoder(SoftPrompt(2))
  batches = batches_for(method)
  loss = LossConfig(normalizing_factor=factor)
  weights_BT, padded_factor = weights_and_factor(batches['bucketed'], factor)
  of_packed = loss.of_rows(*batches['bucketed'].decoder_target_tokens.shape)
  packed_BT, packed_factor = weights_and_factor(
      batches['packed'], of_packed.normalizing_factor
  )
  assert_close(packed_factor, padded_factor, 1e-6)
  # Each target weighs what it does in its padded row.
  tokens = [batches[name].decoder_target_tokens for name in ('bucketed', 'packed')]
  one, other = (
      sorted(zip(t[t > 0].tolist(), np.asarray(w)[t > 0].tolist()))
      for t, w in zip(tokens, (weights_BT, packed_BT))
  )
  np.testing.assert_allclose(one, other, rtol=1e-6)
  assert not np.asarray(packed_BT)[tokens[1] == 0].any()


def test_a_normalisation_by_padding_is_refused_for_packed_rows():
  batch = batches_for(SoftPrompt(2))['packed']
  with pytest.raises(ValueError, match='counts padding.*as LossConfig.of_rows'):
    weights_and_factor(batch, 'NUM_TOTAL_TARGET_TOKENS')


@pytest.mark.slow
@pytest.mark.parametrize('factor', [None, 'AVERAGE_PER_SEQUENCE'])
def test_microbatches_of_packed_rows_change_nothing(tiny, factor):
  # None with dropout, which has a mask for each part.
  method, tx = Combined([Prefix(3, hidden=8), InDecoder(SoftPrompt(2))]), adamw(1e-2)
  module, backbone = tiny
  batches = batches_for(method)
  found = {}
  for name, microbatches in (('bucketed', 1), ('packed', 1), ('packed', 3)):
    params = {'prompt': method.init(jax.random.key(1), module.spec)['params']}
    trainable, frozen = trainable_lib.split(params | {'backbone': backbone}, {'prompt': tx})
    loss = LossConfig(normalizing_factor=factor)
    step = make_train_step(method, module, tx, loss=loss, microbatches=microbatches)
    _, metrics = step(TrainState.create(trainable, tx), frozen, batches[name])
    found[name, microbatches] = metrics
  for metrics in found.values():
    for key, value in found['bucketed', 1].items():
      assert_close(metrics[key], value, 1e-5, key)


def test_a_row_of_several_examples_has_no_score_of_its_own(tiny):
  with pytest.raises(ValueError, match='The batch is packed'):
    score_targets(*tiny, batches_for(SoftPrompt(2))['packed'])


def test_segments_of_one_side_alone_are_refused(tiny):
  module, params = tiny
  batch = batches_for(SoftPrompt(2))['packed']
  with pytest.raises(ValueError, match='segments in the encoder alone'):
    module.apply({'params': params}, batch.replace(decoder_segment_ids=None))


# The whole command.


def _train(backbone, model_dir, cache_dir, train_steps=20, **others):
  settings = dict(
      method=SoftPrompt(4),
      trainable=adafactor(0.3),
      batch_size=16,
      feature_lengths=FEATURE_LENGTHS,
      cache_dir=cache_dir,
      log_period=1,
      progress=False,
  )
  return train_lib.train(
      backbone=backbone,
      task='which_animal',
      model_dir=str(model_dir),
      train_steps=train_steps,
      **settings | others,
  )


def _losses(model_dir):
  return [r['train/loss'] for r in read_jsonl(model_dir / 'metrics.jsonl') if 'train/loss' in r]


PACK = {'lengths': 'pack', 'packed_length': 48}


@pytest.mark.slow
@pytest.mark.parametrize('factor', [None, 'NUM_TOTAL_TARGET_TOKENS'])
def test_a_packed_run_ends_with_the_prompt_of_the_padded_one(
    random_backbone, cache_dir, tmp_path, monkeypatch, factor
):
  steps = []

  def kept(*args, **kwargs):
    steps.append(make_train_step(*args, **kwargs))
    return steps[-1]

  monkeypatch.setattr(train_lib, 'make_train_step', kept)
  loss = LossConfig(normalizing_factor=factor)
  padded = _train(random_backbone, tmp_path / 'pad', cache_dir, loss=loss)
  packed = _train(random_backbone, tmp_path / 'pack', cache_dir, loss=loss, **PACK)
  assert_close(packed.params['prompt']['prompt'], padded.params['prompt']['prompt'], 1e-4)
  np.testing.assert_allclose(
      _losses(tmp_path / 'pack'), _losses(tmp_path / 'pad'), rtol=1e-5
  )
  assert packed.metrics == padded.metrics
  assert steps[0]._cache_size() == 1 and 1 <= steps[1]._cache_size() <= 3


@pytest.mark.slow
def test_a_packed_run_is_resumed_to_the_bit_and_not_with_other_rows(
    random_backbone, cache_dir, tmp_path
):
  whole = _train(random_backbone, tmp_path / 'whole', cache_dir, **PACK)
  _train(random_backbone, tmp_path / 'parts', cache_dir, train_steps=7, **PACK)
  resumed = _train(random_backbone, tmp_path / 'parts', cache_dir, **PACK)
  assert_same_trees(resumed.params, whole.params)
  with pytest.raises(ValueError, match='packed_length: 48 there, 64 here'):
    _train(random_backbone, tmp_path / 'parts', cache_dir, lengths='pack', packed_length=64)


@pytest.mark.slow
def test_a_packed_run_does_not_depend_on_the_mesh(random_backbone, cache_dir, tmp_path):
  prefix = functools.partial(
      _train, method=Prefix(3, hidden=None), trainable=adamw(1e-2), train_steps=5,
      cache_dir=cache_dir,
  )  # fmt: skip
  alone = prefix(random_backbone, tmp_path / 'alone')
  backbone = load_backbone(random_backbone.source, mesh=partitioning.make_mesh())
  assert backbone.mesh.shape['data'] == 4
  spread = prefix(backbone, tmp_path / 'spread', microbatches=2, **PACK)
  jax.tree.map(
      lambda *leaves: assert_close(*leaves, 1e-4), spread.params['prompt'], alone.params['prompt']
  )


def test_rows_too_short_for_an_example_are_refused_before_the_model_is_loaded(
    random_backbone, cache_dir, tmp_path
):
  with pytest.raises(ValueError, match=r'PACKED_LENGTH=6 .* Set it to \d+ or more'):
    _train(random_backbone, tmp_path / 'run', cache_dir, lengths='pack', packed_length=6)
  assert not os.listdir(tmp_path / 'run')
