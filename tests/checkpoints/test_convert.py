"""Backbones from one format into another: the same numbers to the bit, or nothing at all."""

import dataclasses
import json
import os

import jax
import ml_dtypes
import numpy as np
import pytest

from prompt_tuning_jax import cli
from prompt_tuning_jax.backbones.t5 import T5
from prompt_tuning_jax.checkpoints import hf, load, names, native, source, t5x
from prompt_tuning_jax.checkpoints.convert import FORMATS, convert
from prompt_tuning_jax.typing import Batch
from tests.checkpoints import samples
from tests.conftest import TINY_CONFIG, assert_close

# The random models here have none, unless a test is about it.
pytestmark = pytest.mark.filterwarnings('ignore:No vocabulary lies beside')

FAMILIES = samples.CONFIGS | {
    'tied and not scaled': dataclasses.replace(TINY_CONFIG, tied_embeddings=True),
}


def written_natively(folder, config, dtype='float32', vocabulary=None):
  native.save_backbone(
      folder, config, samples.random_params(config), vocabulary, dtype=dtype
  )
  return folder


def arrays_of(folder):
  return dict(load.open_checkpoint(str(folder)).weights)


def assert_same_arrays(found, expected):
  assert set(found) == set(expected)
  for name, array in expected.items():
    assert found[name].dtype == array.dtype
    np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('family', samples.CONFIGS)
def test_every_format_gives_back_what_every_other_was_given(family, dtype, tmp_path):
  config = FAMILIES[family]
  start = written_natively(tmp_path / 'start', config, dtype)
  expected = arrays_of(start)
  fingerprint = load.load_backbone(start).fingerprint
  folder = start
  # From every format to every other, in one round.
  for number, format in enumerate(('hf', 't5x', 'native', 't5x', 'hf', 'native')):
    folder = convert(folder, tmp_path / str(number), format)
    assert load.open_checkpoint(folder).config == config
    assert_same_arrays(arrays_of(folder), expected)
    assert load.load_backbone(folder).fingerprint == fingerprint


def test_a_table_that_is_tied_but_not_scaled_is_written_twice_for_transformers(tmp_path):
  config = FAMILIES['tied and not scaled']
  start = written_natively(tmp_path / 'start', config)
  folder = convert(start, tmp_path / 'hf', 'hf')
  assert load.open_checkpoint(folder).config == config
  assert_same_arrays(arrays_of(folder), arrays_of(start))
  with pytest.raises(ValueError, match='T5X scales the output of a tied T5'):
    convert(start, tmp_path / 't5x', 't5x')


def test_a_real_t5x_checkpoint_goes_through_hugging_face_and_back(shared_data, tmp_path):
  real = shared_data / 't5' / 'test_t5_1_1_tiny' / 'checkpoint_3'
  there = convert(real, tmp_path / 'hf', 'hf', max_distance=8)
  with pytest.warns(UserWarning, match='max_distance=8'):
    back = convert(there, tmp_path / 'checkpoint_3', 't5x')
  expected = t5x.read_t5x(real, max_distance=8)
  found = t5x.read_t5x(back, max_distance=8)
  assert found.config == expected.config
  assert_same_arrays(dict(found.weights), dict(expected.weights))
  # What T5X keeps in the index and what beside it is the same.
  assert set(os.listdir(back)) == set(os.listdir(real))


def test_the_step_goes_from_t5x_to_t5x(tmp_path):
  flat = names.flatten_to_t5x(samples.random_params(TINY_CONFIG), TINY_CONFIG)
  samples.write_t5x(tmp_path / 'checkpoint_7', flat)
  assert t5x.read_t5x(convert(tmp_path / 'checkpoint_7', tmp_path / 'copy', 't5x')).step == 7


@pytest.mark.parametrize('format', FORMATS)
def test_the_type_changes_where_one_is_named(format, tmp_path):
  start = written_natively(tmp_path / 'start', TINY_CONFIG)
  rounded = arrays_of(convert(start, tmp_path / 'out', format, dtype='bfloat16'))
  for name, array in arrays_of(start).items():
    np.testing.assert_array_equal(rounded[name], array.astype(ml_dtypes.bfloat16))
  with pytest.raises(ValueError, match='dtype is float16, in which T5 overflows'):
    convert(start, tmp_path / 'half', format, dtype='float16')


def test_the_vocabulary_goes_along(tmp_path):
  vocabulary = samples.train_vocabulary(tmp_path / 'spiece.model')
  start = written_natively(tmp_path / 'start', TINY_CONFIG, vocabulary=vocabulary)
  there = convert(start, tmp_path / 'hf', 'hf')
  described = json.loads((tmp_path / 'hf' / 'tokenizer_config.json').read_text())
  assert described['extra_ids'] == vocabulary.extra_ids
  back = load.load_backbone(convert(there, tmp_path / 'back', 'native'))
  assert back.vocabulary.fingerprint == vocabulary.fingerprint


def test_that_there_is_no_vocabulary_is_said(tmp_path):
  start = written_natively(tmp_path / 'start', TINY_CONFIG)
  with pytest.warns(UserWarning, match='No vocabulary lies beside .*start.*VOCABULARY'):
    convert(start, tmp_path / 'hf', 'hf')


def test_a_model_larger_than_a_shard_is_written_in_several(tmp_path):
  checkpoint = load.open_checkpoint(str(written_natively(tmp_path / 'start', TINY_CONFIG)))
  hf.write_hf(tmp_path / 'hf', checkpoint.config, checkpoint.weights, shard_bytes=10_000)
  files = sorted(path.name for path in (tmp_path / 'hf').glob('*.safetensors'))
  assert len(files) > 3
  assert files[0] == f'model-00001-of-{len(files):05}.safetensors'
  # One array may be larger than a shard; several together are not.
  for path in (tmp_path / 'hf').glob('*.safetensors'):
    held, _ = source.open_safetensors(path)
    assert len(held) == 1 or sum(array.nbytes for array in held.values()) <= 10_000
  assert_same_arrays(arrays_of(tmp_path / 'hf'), dict(checkpoint.weights))


def test_the_output_layer_is_named_so_that_transformers_4_and_5_agree(tmp_path):
  for family, tied in (('T5 1.1, unequal depths', False), ('T5 1.0', True)):
    start = written_natively(tmp_path / family / 'start', FAMILIES[family])
    folder = convert(start, tmp_path / family / 'hf', 'hf')
    described = json.loads((tmp_path / family / 'hf' / 'config.json').read_text())
    assert described['tie_word_embeddings'] == described['scale_decoder_outputs'] == tied
    stored, _ = source.open_safetensors(os.path.join(folder, 'model.safetensors'))
    assert ('lm_head.weight' in stored) == (not tied)


@pytest.mark.parametrize('format', ['hf', 't5x'])
def test_what_is_in_the_way_is_not_overwritten(format, tmp_path):
  start = written_natively(tmp_path / 'start', TINY_CONFIG)
  (tmp_path / 'out').mkdir()
  convert(start, tmp_path / 'out', format)  # An empty directory may be there.
  with pytest.raises(FileExistsError, match='out exists already'):
    convert(start, tmp_path / 'out', format)
  assert_same_arrays(arrays_of(tmp_path / 'out'), arrays_of(start))


@pytest.mark.parametrize('format', FORMATS)
def test_a_source_damaged_in_the_middle_leaves_nothing(format, tmp_path):
  flat = names.flatten_to_t5x(samples.random_params(TINY_CONFIG), TINY_CONFIG)
  damaged = samples.write_t5x(tmp_path / 'checkpoint_7', flat)
  chunk = damaged / 'target.token_embedder.embedding' / '0.0'
  chunk.write_bytes(chunk.read_bytes()[:50])
  with pytest.raises(ValueError, match='token_embedder.embedding cannot be read'):
    convert(damaged, tmp_path / 'out', format)
  assert [path.name for path in tmp_path.iterdir()] == ['checkpoint_7']


def test_unknown_formats_and_places_are_named(tmp_path):
  with pytest.raises(ValueError, match="format is 'pytorch'; it may be 'native', 'hf'"):
    convert('nano', tmp_path / 'out', 'pytorch')
  with pytest.raises(FileNotFoundError, match='Did you mean nano'):
    convert('nanoo', tmp_path / 'out', 'hf')


def test_a_distance_that_t5x_does_not_record_is_not_lost_without_a_word(tmp_path):
  config = dataclasses.replace(TINY_CONFIG, relpos_max_distance=64)
  start = written_natively(tmp_path / 'start', config)
  with pytest.warns(UserWarning, match='is 64 here and not 128: load .* max_distance=64'):
    folder = convert(start, tmp_path / 't5x', 't5x')
  assert load.open_checkpoint(folder, 64).config == config


def test_scaled_outputs_of_an_untied_model_stay_in_our_layout(tmp_path):
  config = dataclasses.replace(TINY_CONFIG, scale_decoder_outputs=True)
  start = written_natively(tmp_path / 'start', config)
  for format, message in (('hf', 'transformers 4 and 5'), ('t5x', 'does not say')):
    with pytest.raises(ValueError, match=message):
      convert(start, tmp_path / 'out', format)
  assert load.open_checkpoint(convert(start, tmp_path / 'own', 'native')).config == config


@pytest.mark.parametrize('format', FORMATS)
def test_other_things_and_other_machines_are_not_written_to(format, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  start = written_natively(tmp_path / 'start', TINY_CONFIG)
  (tmp_path / 'mine').mkdir()
  (tmp_path / 'mine' / 'spiece.model').write_bytes(b'precious')
  with pytest.raises(FileExistsError, match='mine exists already'):
    convert(start, tmp_path / 'mine', format)
  assert (tmp_path / 'mine' / 'spiece.model').read_bytes() == b'precious'
  with pytest.raises(ValueError, match='gs://b/o is not on this machine.*mounted'):
    convert(start, 'gs://b/o', format)
  assert sorted(path.name for path in tmp_path.iterdir()) == ['mine', 'start']


def test_a_prompt_in_the_checkpoint_is_left_out_with_a_warning(tmp_path):
  flat = names.flatten_to_t5x(samples.random_params(TINY_CONFIG), TINY_CONFIG)
  prompt = {'encoder/prompt/prompt/prompt': np.ones((3, 16), np.float32)}
  folder = samples.write_t5x(tmp_path / 'checkpoint_7', flat | prompt)
  with pytest.warns(UserWarning, match='holds a prompt .*prompt-tuning import'):
    assert_same_arrays(arrays_of(convert(folder, tmp_path / 'copy', 't5x')), flat)


def test_a_dry_run_reads_what_is_to_be_converted_and_writes_nothing(tmp_path, capsys):
  start = written_natively(tmp_path / 'start', TINY_CONFIG)
  (tmp_path / 'empty').mkdir()
  for source_dir, status in ((start, 0), (tmp_path / 'empty', 2)):
    flags = (f'INITIAL_CHECKPOINT_PATH={source_dir}', f'OUTPUT_DIR={tmp_path}/out',
             'OUTPUT_FORMAT=hf')
    argv = ['convert', *(f'--gin.{flag}' for flag in flags), '--dry_run']
    assert cli.main(argv) == status
  assert 'not a backbone of a known format' in capsys.readouterr().err
  assert not (tmp_path / 'out').exists()


@pytest.mark.slow
@pytest.mark.parametrize('family', FAMILIES)
def test_transformers_computes_the_same_logits(family, tmp_path):
  torch = pytest.importorskip('torch', reason='needs the extra `hf`')
  transformers = pytest.importorskip('transformers', reason='needs the extra `hf`')
  config = FAMILIES[family]
  start = written_natively(tmp_path / 'start', config)
  model = transformers.AutoModelForSeq2SeqLM.from_pretrained(
      convert(start, tmp_path / 'hf', 'hf')
  )
  rng = np.random.default_rng(0)
  inputs = rng.integers(2, config.vocab_size, (2, 90), dtype=np.int32)
  inputs[1, 70:] = 0
  decoder = np.pad(rng.integers(2, config.vocab_size, (2, 70), dtype=np.int32), ((0, 0), (1, 0)))
  with torch.no_grad():
    expected = model.eval()(
        input_ids=torch.tensor(inputs),
        attention_mask=torch.tensor(inputs > 0).long(),
        decoder_input_ids=torch.tensor(decoder),
    ).logits.numpy()
  backbone = load.load_backbone(start)
  batch = Batch(inputs, decoder, np.ones_like(decoder), np.ones(decoder.shape, np.float32))
  logits = jax.jit(T5(config).apply)({'params': backbone.params}, batch)
  assert_close(logits, expected, 1e-5)
