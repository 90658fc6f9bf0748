"""PEFT's adapters: read and written as PEFT itself does."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from prompt_tuning_jax import peft
from prompt_tuning_jax.artifact import Manifest, Prompt
from prompt_tuning_jax.backbones.backbone import Backbone
from prompt_tuning_jax.backbones.t5 import T5
from prompt_tuning_jax.checkpoints import load
from prompt_tuning_jax.prompt_files import load_prompt
from prompt_tuning_jax.typing import Batch, Injection
from tests.checkpoints import samples, torch_samples
from tests.conftest import assert_close, prepend_virtual

RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(5, 16)).astype(np.float32)
CONFIG = {
    'peft_type': 'PROMPT_TUNING',
    'task_type': 'SEQ_2_SEQ_LM',
    'base_model_name_or_path': 'google/t5-base-lm-adapt',
    'num_virtual_tokens': 5,
    'num_transformer_submodules': 2,
    'token_dim': 16,
    'num_layers': 2,
    'num_attention_heads': 3,
    'peft_version': '0.21.2',
}


def write_adapter(folder, array, **changes):
  folder.mkdir(exist_ok=True)
  (folder / 'adapter_config.json').write_text(json.dumps(CONFIG | changes))
  save_file({'prompt_embeddings': array}, folder / 'adapter_model.safetensors')
  return folder


@pytest.mark.parametrize('adapter', samples.PEFT_PROMPTS)
def test_recorded_prompts_are_the_rows_that_peft_uses(golden, adapter):
  folder = golden / 'hf' / 'peft_t5' / adapter
  stored = load_file(folder / 'adapter_model.safetensors')['prompt_embeddings']
  prompt = load_prompt(folder)
  np.testing.assert_array_equal(prompt.injection.virtual_embeddings, stored[:5])
  assert prompt.manifest.backbone == f'golden/hf/{adapter.split(".")[0]}/hf'
  assert prompt.manifest.placement == 'prefix'
  prompt.check(load.load_backbone(golden / 'hf' / adapter.split('.')[0] / 'hf'), length=5)


@pytest.mark.parametrize('adapter', ['t5v11.prefix5', 't5v11.prefix5_proj'])
def test_recorded_prefixes_have_the_backbone_s_shapes(golden, adapter):
  prompt = load_prompt(golden / 'hf' / 'peft_t5' / adapter)
  prompt.check(load.load_backbone(golden / 'hf' / 't5v11' / 'hf'), length=5)
  assert prompt.manifest.num_virtual_tokens == 0


@pytest.mark.parametrize('layers', [1, 2, 3, 4, 5, 6])
def test_a_prefix_s_slots_are_dealt_out_as_peft_deals_them(layers, tmp_path):
  length, heads, width = 5, 3, 4
  flat = RNG.normal(size=(length, 2 * layers * heads * width)).astype(np.float32)
  folder = write_adapter(
      tmp_path / 'a', flat, peft_type='PREFIX_TUNING', num_layers=layers, token_dim=12
  )
  keys, values = load_prompt(folder).injection.decoder_kv
  # PEFT's own steps, in its order: the slots twice over, four to a layer.
  slots = flat.reshape(length, 2 * layers, heads, width)
  dealt = np.split(np.concatenate([slots, slots], 1).transpose(1, 2, 0, 3), layers)
  for layer, (key, value, _, _) in enumerate(dealt):
    np.testing.assert_array_equal(keys[layer], key.transpose(1, 0, 2))
    np.testing.assert_array_equal(values[layer], value.transpose(1, 0, 2))


def test_an_adapter_in_pytorch_s_own_format_is_read(tmp_path):
  folder = write_adapter(tmp_path / 'a', ROWS, num_transformer_submodules=1)
  (folder / 'adapter_model.safetensors').unlink()
  torch_samples.write(folder / 'adapter_model.bin', {'prompt_embeddings': ROWS})
  np.testing.assert_array_equal(load_prompt(folder).injection.virtual_embeddings, ROWS)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'peft_type': 'LORA'}, "adapter of kind 'LORA', which is no prompt"),
        ({'task_type': 'CAUSAL_LM'}, "task_type 'CAUSAL_LM'; adapters of encoder-decoder"),
        ({'num_virtual_tokens': 0}, 'num_virtual_tokens 0; a number of at least 1'),
        ({'num_virtual_tokens': 4}, r'\[4 or 8, token_dim 16\], but .* \[10, 16\]'),
        ({'token_dim': 8}, r'token_dim 8\], but .* \[10, 16\]'),
        ({'peft_type': 'PREFIX_TUNING', 'num_layers': None}, 'num_layers None'),
        ({'peft_type': 'PREFIX_TUNING'}, r'2 · 2 layers · token_dim 16\], but'),
    ],
)
def test_adapters_that_are_no_prompt_of_a_t5_are_refused(changes, message, tmp_path):
  folder = write_adapter(tmp_path / 'a', np.concatenate([ROWS, ROWS]), **changes)
  with pytest.raises(ValueError, match=message):
    load_prompt(folder)


def test_damaged_adapters_are_refused(tmp_path):
  def broken(name, damage):
    folder = write_adapter(tmp_path / name, ROWS, num_transformer_submodules=1)
    damage(folder)
    return folder

  with pytest.raises(FileNotFoundError, match='none of adapter_model.safetensors'):
    load_prompt(broken('none', lambda f: (f / 'adapter_model.safetensors').unlink()))
  with pytest.raises(ValueError, match='adapter_config.json is not JSON'):
    load_prompt(broken('cut', lambda f: (f / 'adapter_config.json').write_text('{"peft')))
  with pytest.raises(ValueError, match='is not a JSON object'):
    load_prompt(broken('list', lambda f: (f / 'adapter_config.json').write_text('[]')))
  lora = {'lora_A.weight': ROWS}
  with pytest.raises(ValueError, match='holds lora_A.weight; a prompt adapter'):
    load_prompt(broken('lora', lambda f: save_file(lora, f / 'adapter_model.safetensors')))
  diverged = {'prompt_embeddings': np.full_like(ROWS, np.inf)}
  with pytest.raises(ValueError, match='is no usable prompt'):
    load_prompt(broken('inf', lambda f: save_file(diverged, f / 'adapter_model.safetensors')))


@pytest.fixture
def backbone(backbone_dir):
  return load.load_backbone(backbone_dir)


def soft_prompt(backbone, **fields):
  rows = RNG.normal(size=(5, backbone.spec.d_model)).astype(np.float32)
  return Prompt(Injection(virtual_embeddings=jnp.asarray(rows)), Manifest(**fields))


def prefix_of(backbone):
  spec = backbone.spec
  shape = (spec.num_decoder_layers, 5, spec.num_heads, spec.d_kv)
  pair = tuple(jnp.asarray(RNG.normal(size=shape), jnp.float32) for _ in range(2))
  return Prompt(Injection(decoder_kv=pair), Manifest())


def test_a_soft_prompt_comes_back_as_it_went(backbone, tmp_path):
  prompt = soft_prompt(backbone, placement='prefix')
  peft.save_adapter(tmp_path / 'a', prompt, backbone, base_model='google/t5-base-lm-adapt')
  described = json.loads((tmp_path / 'a' / 'adapter_config.json').read_text())
  assert described['num_transformer_submodules'] == 1
  found = load_prompt(tmp_path / 'a')
  assert found.manifest.backbone == 'google/t5-base-lm-adapt'
  np.testing.assert_array_equal(
      found.injection.virtual_embeddings, prompt.injection.virtual_embeddings
  )


def with_layers(backbone, layers):
  """The backbone's sizes with another depth of the decoder, and nothing else of it."""
  config = dataclasses.replace(backbone.module.config, num_decoder_layers=layers)
  return Backbone('deep', T5(config), None, dict)


@pytest.mark.parametrize('layers', [1, 3, 5])
def test_a_prefix_of_an_odd_number_of_layers_comes_back_as_it_went(layers, backbone, tmp_path):
  deep = with_layers(backbone, layers)
  prompt = prefix_of(deep)
  peft.save_adapter(tmp_path / 'a', prompt, deep)
  for found, part in zip(
      load_prompt(tmp_path / 'a').injection.decoder_kv, prompt.injection.decoder_kv, strict=True
  ):
    np.testing.assert_array_equal(found, part)


def test_free_prefixes_of_an_even_number_of_layers_are_refused_and_twins_are_not(
    backbone, tmp_path
):
  deep = with_layers(backbone, 4)
  prompt = prefix_of(deep)
  with pytest.raises(ValueError, match=r'layers l and l \+ 2 of 4 read the same'):
    peft.save_adapter(tmp_path / 'a', prompt, deep)
  assert not (tmp_path / 'a').exists()
  twins = tuple(jnp.concatenate([part[:2], part[:2]]) for part in prompt.injection.decoder_kv)
  twinned = dataclasses.replace(prompt, injection=Injection(decoder_kv=twins))
  peft.save_adapter(tmp_path / 'a', twinned, deep)
  for found, part in zip(load_prompt(tmp_path / 'a').injection.decoder_kv, twins, strict=True):
    np.testing.assert_array_equal(found, part)


def test_what_peft_has_no_place_for_is_refused_with_the_reason(backbone, tmp_path):
  prefix = prefix_of(backbone).injection.decoder_kv
  soft = soft_prompt(backbone)
  both = dataclasses.replace(soft.injection, decoder_kv=prefix)
  cases = [
      (soft_prompt(backbone, placement='after_bos'), 'stand elsewhere .after_bos.'),
      (Prompt(both, soft.manifest), 'a soft prompt and a prefix together'),
      (Prompt(Injection(cross_kv=prefix), Manifest()), "nothing but the decoder's self-att"),
      (
          Prompt(Injection(decoder_kv=prefix, positions='none'), Manifest()),
          "its keys have positions 'none', and a PEFT prefix stands before the text",
      ),
      (
          dataclasses.replace(
              soft, injection=soft.injection.replace(num_decoder_virtual_tokens=2)
          ),
          'virtual tokens in the decoder',
      ),
      (
          Prompt(Injection(layer_embeddings=jnp.ones((1, 5, 16))), Manifest()),
          'it has rows for every layer',
      ),
  ]
  for prompt, message in cases:
    with pytest.raises(ValueError, match=f'cannot be written as a PEFT adapter: .*{message}'):
      peft.save_adapter(tmp_path / 'a', prompt, backbone)
  assert not list(tmp_path.iterdir())


def test_an_adapter_is_not_written_over_another(backbone, tmp_path):
  folder = write_adapter(tmp_path / 'a', ROWS)
  before = (folder / 'adapter_config.json').read_bytes()
  with pytest.raises(FileExistsError, match='exists already'):
    peft.save_adapter(folder, soft_prompt(backbone), backbone)
  assert (folder / 'adapter_config.json').read_bytes() == before
  shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize('make', [soft_prompt, prefix_of])
@pytest.mark.parametrize('model', ['t5v11', 't5v10'])
def test_peft_itself_computes_what_the_adapter_s_prompt_computes(model, make, golden, tmp_path):
  torch = pytest.importorskip('torch', reason='needs the extra `hf`')
  transformers = pytest.importorskip('transformers', reason='needs the extra `hf`')
  theirs = pytest.importorskip('peft', reason='needs the extra `hf`')
  backbone = load.load_backbone(golden / 'hf' / model / 'hf')
  prompt = make(backbone)
  peft.save_adapter(tmp_path / 'a', prompt, backbone)
  inputs = np.array([[5, 17, 30, 44, 9, 1], [7, 8, 1, 0, 0, 0]], np.int32)
  decoder = np.array([[0, 12, 3], [0, 40, 9]], np.int32)
  base = transformers.AutoModelForSeq2SeqLM.from_pretrained(golden / 'hf' / model / 'hf')
  with torch.no_grad():
    expected = theirs.PeftModel.from_pretrained(base, tmp_path / 'a').eval()(
        input_ids=torch.tensor(inputs),
        attention_mask=torch.tensor(inputs > 0).long(),
        decoder_input_ids=torch.tensor(decoder),
    ).logits.numpy()
  ones = np.ones(decoder.shape, np.float32)
  batch = Batch(inputs, decoder, np.ones_like(decoder), ones)
  if prompt.injection.num_virtual_tokens:
    batch = prepend_virtual(batch, backbone.spec.vocab_size, 5)
  logits = jax.jit(backbone.module.apply)({'params': backbone.params}, batch, prompt.injection)
  assert_close(logits, expected, 1e-5)


def test_an_adapter_names_its_model_as_the_hub_does(backbone, tmp_path):
  prompt = Prompt(
      Injection(virtual_embeddings=np.ones((3, 16), np.float32)),
      Manifest(num_virtual_tokens=3, backbone='t5_1_1_lm100k_base'),
  )
  peft.save_adapter(tmp_path / 'adapter', prompt, backbone)
  described = json.loads((tmp_path / 'adapter' / 'adapter_config.json').read_text())
  assert described['base_model_name_or_path'] == 'google/t5-base-lm-adapt'
