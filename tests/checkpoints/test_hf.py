"""Hugging Face folders: recorded values of transformers and PEFT, and the traps."""

import functools
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from prompt_tuning_jax.backbones.t5 import T5
from prompt_tuning_jax.checkpoints import hf, names
from prompt_tuning_jax.checkpoints.load import load_backbone
from prompt_tuning_jax.prompt_files import load_prompt
from prompt_tuning_jax.typing import Injection
from tests.checkpoints import samples
from tests.conftest import TINY_CONFIG, assert_close, prepend_virtual

TIED = samples.CONFIGS['T5 1.0']


def stacked(folder):
  checkpoint = hf.read_hf(folder)
  return T5(checkpoint.config), names.stack_from_t5x(checkpoint.weights, checkpoint.config)


def mean_loss(logits_BTV, batch):
  log_probs_BTV = jax.nn.log_softmax(logits_BTV)
  targets_BT1 = jnp.asarray(batch.decoder_target_tokens)[..., None]
  chosen_BT = jnp.take_along_axis(log_probs_BTV, targets_BT1, -1)[..., 0]
  weights_BT = batch.decoder_loss_weights
  return -(chosen_BT * weights_BT).sum() / weights_BT.sum()


@pytest.mark.parametrize('case', ['short', 'long'])
@pytest.mark.parametrize('model', ['t5v11', 't5v10'])
def test_logits_encoder_and_loss_equal_transformers(golden, model, case):
  recorded = load_file(golden / 'hf' / model / 'io.safetensors')
  module, params = stacked(golden / 'hf' / model / 'hf')
  batch = samples.recorded_batch(recorded, f'{case}.')

  @jax.jit
  def run(params):
    encoded = module.apply({'params': params}, batch.encoder_input_tokens, method='encode')
    return encoded, module.apply({'params': params}, batch)

  encoded, logits = run(params)
  valid = recorded[f'{case}.attention_mask'] > 0
  predicted = recorded[f'{case}.labels'] >= 0
  assert_close(encoded[valid], recorded[f'{case}.encoder_output'][valid], 1e-5, 'encoder')
  assert_close(logits[predicted], recorded[f'{case}.logits'][predicted], 1e-5, 'logits')
  assert_close(mean_loss(logits, batch)[None], recorded[f'{case}.loss'], 1e-5, 'loss')


@pytest.mark.parametrize('form', ['hf_sharded', 'hf_v5saved'])
@pytest.mark.parametrize('model', ['t5v11', 't5v10'])
def test_every_form_of_a_model_is_the_same_model(golden, model, form):
  module, params = stacked(golden / 'hf' / model / 'hf')
  same_module, same_params = stacked(golden / 'hf' / model / form)
  assert same_module == module
  samples.assert_same_trees(same_params, params)


@functools.partial(jax.jit, static_argnums=0)
def prompted_run(module, params, batch, prompted, prompt_PD):
  """(loss, logits) and the gradient of the loss in the prompt."""

  def loss_fn(prompt_PD):
    injection = Injection(virtual_embeddings=prompt_PD)
    logits = module.apply({'params': params}, prompted, injection)
    return mean_loss(logits, batch), logits

  return jax.value_and_grad(loss_fn, has_aux=True)(prompt_PD)


@pytest.mark.parametrize('adapter', samples.PEFT_PROMPTS)
def test_a_soft_prompt_gives_peft_s_logits_loss_and_gradient(golden, adapter):
  folder = golden / 'hf' / 'peft_t5' / adapter
  recorded = load_file(folder / 'io.safetensors')
  prompt_PD = load_prompt(folder).injection.virtual_embeddings
  module, params = stacked(golden / 'hf' / adapter.split('.')[0] / 'hf')
  batch = samples.recorded_batch(recorded)
  prompted = prepend_virtual(batch, module.config.vocab_size, len(prompt_PD))
  (loss, logits), gradient = prompted_run(module, params, batch, prompted, prompt_PD)
  predicted = recorded['labels'] >= 0
  assert_close(logits[predicted], recorded['logits'][predicted], 1e-5, 'logits')
  assert_close(loss[None], recorded['loss'], 1e-5, 'loss')
  if 'prompt5' in adapter:  # P-tuning's recorded gradient is its encoder's.
    assert_close(gradient, recorded['grad.embedding.weight'][:5], 1e-5, 'gradient')
    assert not np.any(recorded['grad.embedding.weight'][5:])


@pytest.mark.parametrize('shards', [1, 3])
@pytest.mark.parametrize('config', [TINY_CONFIG, TIED], ids=['T5 1.1', 'T5 1.0'])
def test_unequal_depths_are_read_bit_for_bit(config, shards, tmp_path):
  params = samples.random_params(config)
  tensors = samples.hf_tensors(config, params)
  folder = samples.write_hf(tmp_path / 'hf', samples.hf_description(config), tensors, shards)
  module, read = stacked(folder)
  assert module.config == config
  samples.assert_same_trees(read, params)


@pytest.fixture
def tensors():
  return samples.hf_tensors(TINY_CONFIG, samples.random_params(TINY_CONFIG))


@pytest.fixture
def tied_tensors():
  return samples.hf_tensors(TIED, samples.random_params(TIED))


def test_what_no_model_uses_is_ignored(tensors, tmp_path):
  stray = 'decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight'
  more = tensors | {
      stray: np.ones((32, 3), np.float32),
      'encoder.embed_tokens.weight': tensors['shared.weight'],
      'decoder.embed_tokens.weight': tensors['shared.weight'],
  }
  description = samples.hf_description(TINY_CONFIG)
  _, plain = stacked(samples.write_hf(tmp_path / 'plain', description, tensors))
  _, read = stacked(samples.write_hf(tmp_path / 'more', description, more))
  samples.assert_same_trees(read, plain)


def test_the_embedding_may_be_stored_under_the_encoder_s_name_only(tensors, tmp_path):
  renamed = dict(tensors)
  renamed['encoder.embed_tokens.weight'] = renamed.pop('shared.weight')
  folder = samples.write_hf(tmp_path / 'hf', samples.hf_description(TINY_CONFIG), renamed)
  _, params = stacked(folder)
  np.testing.assert_array_equal(
      params['token_embedder']['embedding'], tensors['shared.weight']
  )


def test_two_different_embeddings_are_refused(tensors, tmp_path):
  two = tensors | {'decoder.embed_tokens.weight': tensors['shared.weight'] + 1}
  folder = samples.write_hf(tmp_path / 'hf', samples.hf_description(TINY_CONFIG), two)
  with pytest.raises(ValueError, match='decoder.embed_tokens.weight differs from shared'):
    hf.read_hf(folder)


def test_the_file_and_not_the_config_says_whether_the_output_is_tied(
    tensors, tied_tensors, tmp_path
):
  # transformers 5 writes tie_word_embeddings: true for an untied model as well.
  claims_tied = samples.hf_description(
      TINY_CONFIG, tie_word_embeddings=True, scale_decoder_outputs=False
  )
  config = hf.read_hf(samples.write_hf(tmp_path / 'untied', claims_tied, tensors)).config
  assert config == TINY_CONFIG

  copied = tied_tensors | {'lm_head.weight': tied_tensors['shared.weight']}
  description = samples.hf_description(TIED)
  checkpoint = hf.read_hf(samples.write_hf(tmp_path / 'copied', description, copied))
  assert checkpoint.config == TIED
  assert 'decoder/logits_dense/kernel' not in checkpoint.weights


@pytest.mark.parametrize(
    ('keys', 'scaled'),
    [
        ({'tie_word_embeddings': None}, True),
        ({'tie_word_embeddings': True}, True),
        ({'tie_word_embeddings': True, 'scale_decoder_outputs': False}, False),
        ({'tie_word_embeddings': None, 'scale_decoder_outputs': True}, True),
    ],
)
def test_tied_logits_are_scaled_unless_the_config_says_otherwise(
    tied_tensors, keys, scaled, tmp_path
):
  description = samples.hf_description(TIED, **keys)
  config = hf.read_hf(samples.write_hf(tmp_path / 'hf', description, tied_tensors)).config
  assert (config.tied_embeddings, config.scale_decoder_outputs) == (True, scaled)


def test_an_untied_model_without_its_output_layer_is_refused(tensors, tmp_path):
  del tensors['lm_head.weight']
  folder = samples.write_hf(tmp_path / 'hf', samples.hf_description(TINY_CONFIG), tensors)
  with pytest.raises(ValueError, match='lm_head.weight is not in the weights'):
    hf.read_hf(folder)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'model_type': 'bart'}, "model_type 'bart'; this version reads 't5'"),
        ({'feed_forward_proj': 'gated-silu'}, "feed_forward_proj 'gated-silu'"),
        ({'layer_norm_epsilon': 1e-5}, 'layer_norm_epsilon 1e-05'),
        ({'quantization_config': {'bits': 8}}, 'quantised'),
        ({'d_kv': None}, "does not say 'd_kv'"),
        ({'num_layers': 3}, 'encoder/layers_2/mlp/wo/kernel: .* missing'),
        ({'d_ff': 25}, r'wo/kernel: expected \[25, 16\], found \[24, 16\]'),
        ({'num_decoder_layers': 2}, 'decoder.block.2.*: unexpected'),
    ],
)
def test_a_config_that_does_not_fit_is_refused(tensors, changes, message, tmp_path):
  description = samples.hf_description(TINY_CONFIG, **changes)
  folder = samples.write_hf(tmp_path / 'hf', description, tensors)
  with pytest.raises(ValueError, match=message):
    hf.read_hf(folder)


def test_missing_and_damaged_files_are_named(tensors, tmp_path):
  description = samples.hf_description(TINY_CONFIG)
  whole = samples.write_hf(tmp_path / 'whole', description, tensors, shards=3)

  def broken(name, damage):
    folder = shutil.copytree(whole, tmp_path / name)
    damage(folder)
    return folder

  shard = 'model-00002-of-00003.safetensors'
  index = 'model.safetensors.index.json'
  folder = broken('shard', lambda f: (f / shard).unlink())
  with pytest.raises(FileNotFoundError, match=shard):
    hf.read_hf(folder)
  folder = broken('cut', lambda f: os.truncate(f / shard, 1000))
  with pytest.raises(ValueError, match=f'{shard} is not a whole safetensors file'):
    hf.read_hf(folder)
  folder = broken('swapped', lambda f: shutil.copy(f / shard, f / shard.replace('2', '3', 1)))
  with pytest.raises(ValueError, match='are not in the shard that the index names'):
    hf.read_hf(folder)
  folder = broken('index', lambda f: os.truncate(f / index, 100))
  with pytest.raises(ValueError, match=f'{index} is not JSON'):
    hf.read_hf(folder)
  folder = broken('none', lambda f: (f / index).unlink())
  with pytest.raises(FileNotFoundError, match='none of model.safetensors'):
    hf.read_hf(folder)


@pytest.mark.parametrize('shard', ['../../secret.safetensors', '', '.', '..'])
def test_a_shard_outside_the_folder_is_refused(tensors, tmp_path, shard):
  description = samples.hf_description(TINY_CONFIG)
  folder = samples.write_hf(tmp_path / 'hf', description, tensors, shards=2)
  path = folder / 'model.safetensors.index.json'
  index = json.loads(path.read_text())
  index['weight_map']['shared.weight'] = shard
  path.write_text(json.dumps(index))
  with pytest.raises(ValueError, match='not a plain file name'):
    hf.read_hf(folder)


def test_umt5_has_a_bias_in_every_layer(tmp_path):
  config = samples.CONFIGS['bias in every layer']
  tensors = samples.hf_tensors(config, samples.random_params(config))
  description = samples.hf_description(config, model_type='umt5')
  checkpoint = hf.read_hf(samples.write_hf(tmp_path / 'umt5', description, tensors))
  assert checkpoint.config == config
  name = 'encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight'
  np.testing.assert_array_equal(
      checkpoint.weights['encoder/layers_1/relpos_bias/rel_embedding'], tensors[name].T
  )


@pytest.mark.parametrize('said', [None, True])
def test_mt5_never_scales_its_outputs(said, tmp_path):
  tensors = samples.hf_tensors(TIED, samples.random_params(TIED))
  description = samples.hf_description(TIED, model_type='mt5', scale_decoder_outputs=said)
  checkpoint = hf.read_hf(samples.write_hf(tmp_path / 'mt5', description, tensors))
  assert checkpoint.config.tied_embeddings
  assert not checkpoint.config.scale_decoder_outputs


@pytest.mark.parametrize('form', ['hf_bin', 'hf_bin_sharded', 'hf_sharded', 'hf_v5saved'])
@pytest.mark.parametrize('model', ['t5v11', 't5v10'])
def test_every_recorded_form_holds_the_same_model(golden, model, form):
  expected = hf.read_hf(golden / 'hf' / model / 'hf')
  found = hf.read_hf(golden / 'hf' / model / form)
  assert found.config == expected.config
  assert set(found.weights) == set(expected.weights)
  for name in expected.weights:
    np.testing.assert_array_equal(found.weights[name], expected.weights[name])


def test_safetensors_come_before_a_pickle_of_the_same_folder(tensors, tmp_path):
  folder = samples.write_hf(tmp_path / 'hf', samples.hf_description(TINY_CONFIG), tensors)
  (folder / 'pytorch_model.bin').write_bytes(b'never opened')
  np.testing.assert_array_equal(
      hf.read_hf(folder).weights['token_embedder/embedding'], tensors['shared.weight']
  )


@pytest.mark.parametrize(
    'header',
    [
        b'',
        b'\xff' * 7,
        b'\xff' * 8 + b'{}',
        b'\x02' + b'\0' * 7 + b'[]',
        b'\x10' + b'\0' * 7 + b'not json at all!',
    ],
    ids=['empty', 'short', 'huge', 'list', 'text'],
)
def test_hostile_headers_are_refused(tensors, header, tmp_path):
  folder = samples.write_hf(tmp_path / 'hf', samples.hf_description(TINY_CONFIG), tensors)
  (folder / 'model.safetensors').write_bytes(header)
  with pytest.raises(ValueError, match='model.safetensors is not a whole safetensors file'):
    hf.read_hf(folder)


@pytest.mark.parametrize(
    'tensor',
    [
        {'dtype': 'F32', 'shape': [4], 'data_offsets': [0, 8]},
        {'dtype': 'F32', 'shape': [4], 'data_offsets': [16, 0]},
        {'dtype': 'F32', 'shape': [2**62, 4], 'data_offsets': [0, 16]},
        {'dtype': 'F32', 'shape': [-4], 'data_offsets': [0, 16]},
        {'dtype': 'F32', 'shape': [4], 'data_offsets': [0, 2**60]},
    ],
    ids=['too short', 'backwards', 'overflow', 'negative', 'beyond the file'],
)
def test_headers_that_lie_about_sizes_are_refused(tensor, tmp_path):
  folder = samples.write_hf(tmp_path / 'hf', samples.hf_description(TINY_CONFIG), {})
  header = json.dumps({'shared.weight': tensor}).encode()
  (folder / 'model.safetensors').write_bytes(
      len(header).to_bytes(8, 'little') + header + bytes(16)
  )
  with pytest.raises(ValueError, match='model.safetensors is not a whole safetensors file'):
    hf.read_hf(folder)


def test_weights_that_are_not_floating_point_are_refused(tensors, tmp_path):
  tensors['lm_head.weight'] = tensors['lm_head.weight'].astype(np.int8)
  folder = samples.write_hf(tmp_path / 'hf', samples.hf_description(TINY_CONFIG), tensors)
  with pytest.raises(ValueError, match='lm_head.weight is stored as I8'):
    hf.read_hf(folder)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'num_layers': 2.0}, 'num_layers 2.0; a whole number'),
        ({'num_layers': 10**9}, 'says 1,000,000,000 and 1,000,000,000 layers, but'),
        ({'vocab_size': '64'}, "vocab_size '64'; a whole number"),
        ({'relative_attention_max_distance': -5}, 'max_distance -5; a whole number'),
        ({'model_type': []}, 'has model_type'),
        ({'feed_forward_proj': []}, 'has feed_forward_proj'),
        ({'layer_norm_epsilon': 'a'}, 'has layer_norm_epsilon a'),
        ({'scale_decoder_outputs': 'no'}, "scale_decoder_outputs 'no'; true or false"),
    ],
)
def test_descriptions_of_other_types_are_refused(tensors, changes, message, tmp_path):
  description = samples.hf_description(TINY_CONFIG) | changes
  if 'num_layers' in changes:
    del description['num_decoder_layers']
  folder = samples.write_hf(tmp_path / 'hf', description, tensors)
  with pytest.raises(ValueError, match=message):
    hf.read_hf(folder)


@pytest.mark.parametrize('content', ['[1]', '{"extra_ids": null}', '{', '[' * 100_000])
@pytest.mark.parametrize('name', ['config.json', 'tokenizer_config.json'])
def test_descriptions_that_are_none_are_named(tensors, name, content, tmp_path):
  folder = samples.write_hf(tmp_path / 'hf', samples.hf_description(TINY_CONFIG), tensors)
  (folder / name).write_text(content)
  with pytest.raises(ValueError, match='tmp|config.json'):
    load_backbone(folder)
