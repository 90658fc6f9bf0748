"""Laws that every prompt method owes, whatever it injects."""

import dataclasses

import jax
import numpy as np
import pytest

from prompt_tuning_jax.artifact import load_artifact, save_prompt
from prompt_tuning_jax.backbones.backbone import Backbone
from prompt_tuning_jax.backbones.t5 import T5, T5Config
from prompt_tuning_jax.data.padding import make_batch
from prompt_tuning_jax.evaluation.decoding import beam_search, greedy
from prompt_tuning_jax.evaluation.ranking import score_choices, score_targets
from prompt_tuning_jax.methods import method as method_lib
from prompt_tuning_jax.methods.combined import Combined, InDecoder
from prompt_tuning_jax.methods.deep_prompt import DeepPrompt
from prompt_tuning_jax.methods.layer_prompt import LayerPrompt
from prompt_tuning_jax.methods.p_tuning import PTuning
from prompt_tuning_jax.methods.prefix import Prefix
from prompt_tuning_jax.methods.soft_prompt import SoftPrompt
from prompt_tuning_jax.plan_compiled import count_flops
from prompt_tuning_jax.training import trainable as trainable_lib
from prompt_tuning_jax.training.optimizers import adamw
from prompt_tuning_jax.training.step import TrainState, loss_and_grad, make_train_step
from tests.conftest import TINY_CONFIG, assert_close

METHODS = {
    'soft prompt': SoftPrompt(4),
    'prefix': Prefix(3, hidden=8),
    'free prefix without positions': Prefix(3, hidden=None, positions='none'),
    'deep prompt': DeepPrompt(3),
    'prompt in every layer': LayerPrompt(4),
    'P-tuning': PTuning(4),
    'P-tuning, MLP': PTuning(4, lstm_layers=0),
    'soft prompt in the decoder': InDecoder(SoftPrompt(2)),
    'all together': Combined(
        [SoftPrompt(2), Prefix(3, hidden=8), InDecoder(SoftPrompt(2)), DeepPrompt(2)]
    ),
}
every_method = pytest.mark.parametrize('method', METHODS.values(), ids=METHODS)
# Where much is compiled, one of them stands for all among the quick tests.
every_method_compiled = pytest.mark.parametrize(
    'method',
    [
        pytest.param(
            method, id=name, marks=[] if name == 'all together' else pytest.mark.slow
        )
        for name, method in METHODS.items()
    ],
)

EXAMPLES = [
    {'inputs': [7, 9, 11, 30, 5, 1], 'targets': [33, 12, 1]},
    {'inputs': [8, 40, 1], 'targets': [1]},
    {'inputs': [50, 51, 52, 1], 'targets': [20, 1]},
]


def batch_for(method, examples=EXAMPLES, *, input_length=6, target_length=3):
  return make_batch(
      examples,
      input_length=input_length,
      target_length=target_length,
      vocab_size=TINY_CONFIG.vocab_size,
      num_virtual_tokens=method.num_virtual_tokens,
      num_decoder_virtual_tokens=method.num_decoder_virtual_tokens,
  )


@pytest.fixture(scope='module')
def backbone(tiny):
  module, params = tiny
  return Backbone('tiny', module, None, lambda: params, fingerprint='0' * 64)


def start(method, backbone):
  return jax.jit(lambda key: method.init(key, backbone.spec)['params'])(jax.random.key(1))


@every_method_compiled
def test_every_parameter_trains_and_no_weight_of_the_backbone_changes(method, backbone):
  tx = adamw(1e-2)
  params = {'prompt': start(method, backbone), 'backbone': backbone.params}
  trainable, frozen = trainable_lib.split(params, {'prompt': tx})
  before = jax.device_get((trainable, frozen))
  train_step = make_train_step(method, backbone.module, tx)
  state = TrainState.create(trainable, tx)
  for _ in range(2):
    state, metrics = train_step(state, frozen, batch_for(method))
  assert np.isfinite(metrics['loss'])
  assert train_step._cache_size() == 1
  changed = jax.tree.map(lambda old, new: not np.array_equal(old, new), before[0], state.trainable)
  assert all(jax.tree.leaves(changed)), changed
  jax.tree.map(np.testing.assert_array_equal, before[1], frozen)


@every_method_compiled
def test_padding_changes_neither_loss_nor_gradient(method, backbone):
  params = start(method, backbone)
  run = jax.jit(lambda params, batch: loss_and_grad(backbone, method, params, batch))
  short = run(params, batch_for(method))
  padded = run(params, batch_for(method, input_length=9, target_length=5))
  assert_close(padded[0], short[0], 1e-6)
  jax.tree.map(lambda one, other: assert_close(one, other, 1e-5), padded[1], short[1])


@every_method_compiled
def test_the_artifact_holds_no_network_and_gives_the_same_logits(method, backbone, tmp_path):
  params = start(method, backbone)
  injection = method.apply({'params': params}, backbone.spec)
  save_prompt(tmp_path / 'p.safetensors', injection, backbone=backbone)
  prompt = load_artifact(tmp_path / 'p.safetensors')
  prompt.check(backbone)
  _, shapes = method_lib.shapes(method, backbone.spec)
  assert jax.tree.structure(prompt.injection) == jax.tree.structure(shapes)
  assert jax.tree.map(np.shape, prompt.injection) == jax.tree.map(np.shape, shapes)
  numbers = sum(leaf.size for leaf in jax.tree.leaves(shapes))
  assert (tmp_path / 'p.safetensors').stat().st_size < 4 * numbers + 2500
  apply = jax.jit(backbone.module.apply)
  batch = batch_for(method)
  np.testing.assert_array_equal(
      apply({'params': backbone.params}, batch, prompt.injection),
      apply({'params': backbone.params}, batch, injection),
  )


@every_method_compiled
def test_decoding_scores_what_teacher_forcing_scores(method, backbone):
  injection = method.apply({'params': start(method, backbone)}, backbone.spec)
  module, params, batch = backbone.module, backbone.params, batch_for(method)
  source = batch.encoder_input_tokens
  found = greedy(module, params, source, injection, max_length=3)
  answers = np.asarray(found.tokens_BKT)[:, 0]
  examples = [
      {'inputs': example['inputs'], 'targets': [int(t) for t in answer if t]}
      for example, answer in zip(EXAMPLES, answers)
  ]
  scores = score_targets(module, params, batch_for(method, examples), injection)
  assert_close(found.scores_BK[:, 0], scores, 1e-5)
  ranked = score_choices(module, params, source, answers, injection)
  assert_close(np.diag(ranked), scores, 1e-5)
  beams = beam_search(module, params, source, injection, max_length=3, num_beams=4, alpha=0.0)
  best = np.asarray(beams.tokens_BKT)[:, -1]
  ranked = score_choices(module, params, source, best, injection)
  assert_close(beams.scores_BK[:, -1], np.diag(ranked), 1e-5)


@every_method
def test_a_method_is_a_value_and_its_shapes_need_no_weights(method, backbone):
  assert method == method.clone() and hash(method) == hash(method.clone())
  params, injection = method_lib.shapes(method, backbone.spec)
  assert jax.tree.map(np.shape, start(method, backbone)) == jax.tree.map(np.shape, params)
  assert injection.num_virtual_tokens == method.num_virtual_tokens
  assert injection.num_decoder_virtual_tokens == method.num_decoder_virtual_tokens


@pytest.mark.slow
@pytest.mark.parametrize('name', ['prefix', 'deep prompt', 'all together'])
def test_a_prefix_costs_about_two_forwards_too(name):
  """Step FLOPs at most 2.15 × forward, T5 base width, 512 tokens, by XLA's count."""
  config = T5Config(32128, 768, 12, 64, 2048, 2, 2)
  method = {
      'prefix': Prefix(100, hidden=512),
      'deep prompt': DeepPrompt(100),
      'all together': Combined([SoftPrompt(100), Prefix(100, hidden=512)]),
  }[name]
  module = T5(config, unroll=True)
  flops = count_flops(module, method, adamw(1e-3), rows=8, input_length=512, target_length=8)
  assert 1.8 < flops.step / flops.forward <= 2.15, flops


def test_a_prefix_of_one_layer_more_is_refused_before_anything_compiles(backbone):
  deeper = dataclasses.replace(backbone.spec, num_encoder_layers=3)
  injection = Prefix(2).apply(Prefix(2).init(jax.random.key(0), deeper), deeper)
  with pytest.raises(ValueError, match='encoder_kv has shape .* needs .layers=2'):
    injection.check(backbone.spec)
