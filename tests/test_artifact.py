"""The prompt artifact: bits kept, damage noticed, the wrong prompt refused."""

import dataclasses
import json
import os

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from prompt_tuning_jax import artifact, injection_arrays
from prompt_tuning_jax.artifact import Manifest, Prompt, load_artifact, save_prompt
from prompt_tuning_jax.backbones.backbone import Backbone
from prompt_tuning_jax.backbones.t5 import T5
from prompt_tuning_jax.data.virtual_tokens import as_placement
from prompt_tuning_jax.typing import KV_FIELDS, Injection
from tests.checkpoints import samples
from tests.conftest import TINY_CONFIG

RNG = np.random.default_rng(0)
SOFT = Injection(virtual_embeddings=RNG.normal(size=(5, 16)).astype(np.float32))


def pair(layers, length=4):
  return tuple(RNG.normal(size=(2, layers, length, 3, 4)).astype(np.float32))


INJECTIONS = {
    'soft': SOFT,
    'bfloat16': Injection(virtual_embeddings=jnp.asarray(SOFT.virtual_embeddings, jnp.bfloat16)),
    'prefix': Injection(encoder_kv=pair(2), decoder_kv=pair(3), cross_kv=pair(3)),
    'decoder only': Injection(decoder_kv=pair(3)),
    'both': dataclasses.replace(SOFT, cross_kv=pair(3)),
}

FIELDS = dict(
    method='SoftPrompt',
    placement={'template': [3, 'inputs', 2]},
    task='demo_gloss_category',
    feature_lengths={'inputs': 64, 'targets': 4},
    metrics={'accuracy': 71.25, 'loss': 0.75},
    step=600,
    created_by='prompt-tuning train --gin_file=recipes/demo.gin',
)


@pytest.fixture(scope='module')
def vocabulary(tmp_path_factory):
  return samples.train_vocabulary(tmp_path_factory.mktemp('vocabulary') / 'letters.model')


def make_backbone(vocabulary, config=TINY_CONFIG, name='tiny', weights='0123456789abcdef'):
  """A backbone whose weights are never looked at: only its identity matters here."""

  def no_weights():
    raise AssertionError('The weights must not be needed.')

  return Backbone(
      name, T5(config), vocabulary, no_weights, source=f'/models/{name}', fingerprint=weights
  )


@pytest.fixture
def backbone(vocabulary):
  return make_backbone(vocabulary)


@pytest.fixture
def path(backbone, tmp_path):
  save_prompt(tmp_path / 'prompt.safetensors', SOFT, backbone=backbone, **FIELDS)
  return tmp_path / 'prompt.safetensors'


@pytest.mark.parametrize('name', INJECTIONS)
def test_saving_and_loading_gives_the_same_bits(name, backbone, tmp_path):
  injection = INJECTIONS[name]
  save_prompt(tmp_path / 'p', injection, backbone=backbone)
  prompt = load_artifact(tmp_path / 'p')
  samples.assert_same_trees(prompt.injection, injection)
  prompt.check(backbone)


def test_the_manifest_says_all_that_was_known(path, backbone):
  manifest = load_artifact(path).manifest
  assert manifest.backbone == 'tiny'
  assert manifest.backbone_fingerprint == backbone.fingerprint
  assert manifest.backbone_spec == backbone.spec
  assert manifest.vocabulary_fingerprint == backbone.vocabulary.fingerprint
  assert manifest.num_virtual_tokens == 5
  assert {name: getattr(manifest, name) for name in FIELDS} == FIELDS


def test_what_is_saved_is_what_is_returned_and_saves_to_the_same_file(path, tmp_path):
  prompt = load_artifact(path)
  prompt.save(tmp_path / 'deep' / 'down' / 'copy.safetensors')
  assert (tmp_path / 'deep' / 'down' / 'copy.safetensors').read_bytes() == path.read_bytes()


@pytest.mark.parametrize('placement', ['suffix', (3, 'inputs', 2), ('text: is', 5, 'inputs')])
def test_the_placement_comes_back_as_it_was(placement, tmp_path):
  placement = as_placement(placement)
  prompt = save_prompt(tmp_path / 'p', SOFT, placement=placement)
  assert as_placement(prompt.manifest.placement) == placement


def test_numbers_of_numpy_and_jax_may_stand_in_the_manifest(backbone, tmp_path):
  prompt = save_prompt(
      tmp_path / 'p',
      SOFT,
      backbone=backbone,
      step=np.int64(7),
      metrics={'accuracy': jnp.float32(0.5), 'f1': np.float64(0.25)},
  )
  assert prompt.manifest.step == 7
  assert prompt.manifest.metrics == {'accuracy': 0.5, 'f1': 0.25}


def test_the_artifact_of_a_long_prompt_is_its_numbers_and_little_else(tmp_path):
  long = Injection(virtual_embeddings=np.ones((100, 768), np.float32))
  save_prompt(tmp_path / 'p', long, **FIELDS)
  assert (tmp_path / 'p').stat().st_size < 100 * 768 * 4 + 2000


def test_every_flipped_bit_is_noticed(path):
  content = path.read_bytes()
  positions = [*range(0, len(content), 7), len(content) - 1]
  for position in positions:
    changed = bytearray(content)
    changed[position] ^= 1 << (position % 8)
    path.write_bytes(changed)
    with pytest.raises(ValueError, match=str(path)):
      load_artifact(path)


def test_a_header_whose_length_begins_like_a_pickle_is_read(tmp_path):
  for length in range(0, 264, 8):
    save_prompt(tmp_path / 'p', SOFT, task='x' * length)
    if (tmp_path / 'p').read_bytes()[:1] == b'\x80':
      break
  else:
    pytest.fail('no length of the manifest gave such a header')
  assert load_artifact(tmp_path / 'p').manifest.task == 'x' * length


def test_every_truncation_is_noticed(path):
  content = path.read_bytes()
  for kept in [0, 1, 7, 8, 100, len(content) // 2, len(content) - 1]:
    path.write_bytes(content[:kept])
    with pytest.raises(ValueError, match=f'not a whole safetensors file .* has {kept:,} bytes'):
      load_artifact(path)


def test_damage_is_told_from_what_never_was_an_artifact(path, tmp_path):
  samples.flip_byte(path, -1)
  with pytest.raises(ValueError, match='is damaged: the sha256'):
    load_artifact(path)
  other = tmp_path / 'other.safetensors'
  safetensors.numpy.save_file({'prompt_embeddings': np.ones((5, 16))}, other)
  with pytest.raises(ValueError, match='not a prompt artifact .* holds prompt_embeddings'):
    load_artifact(other)
  for manifest in ['[]', '3', '{}', '{"sha256": ""}', '{"sha256": "", "format": "x"}']:
    safetensors.numpy.save_file({'a': np.ones(2)}, other, metadata={'manifest': manifest})
    with pytest.raises(ValueError, match='not a prompt artifact'):
      load_artifact(other)


def test_an_artifact_of_a_newer_version_is_refused_with_what_to_install(tmp_path):
  manifest = Manifest(num_virtual_tokens=5, format_version=2, library_version='9.1')
  Prompt(SOFT, manifest).save(tmp_path / 'p')
  with pytest.raises(ValueError, match="format_version 2; .* written by version '9.1'"):
    load_artifact(tmp_path / 'p')


def test_an_empty_or_misshapen_injection_is_not_saved(backbone, tmp_path):
  with pytest.raises(ValueError, match='injection to save is empty'):
    save_prompt(tmp_path / 'p', Injection(), backbone=backbone)
  stacked = Injection(virtual_embeddings=np.ones((2, 5, 16), np.float32))
  with pytest.raises(ValueError, match=r'\[2, 5, 16\], but .* A file holds one prompt'):
    save_prompt(tmp_path / 'p', stacked, backbone=backbone)
  wide = Injection(virtual_embeddings=np.ones((5, 17), np.float32))
  with pytest.raises(ValueError, match=r'shape \(5, 17\); this backbone needs .*d_model=16'):
    save_prompt(tmp_path / 'p', wide, backbone=backbone)
  with pytest.raises(ValueError, match='num_virtual_tokens=4'):
    save_prompt(tmp_path / 'p', SOFT, backbone=backbone, num_virtual_tokens=4)
  with pytest.raises(ValueError, match='p.npy: name it .safetensors'):
    save_prompt(tmp_path / 'p.npy', SOFT, backbone=backbone)
  assert os.listdir(tmp_path) == []


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('name', INJECTIONS)
def test_numbers_that_are_not_finite_are_neither_saved_nor_loaded(name, bad, tmp_path):
  arrays = injection_arrays.named_arrays(INJECTIONS[name])
  field = sorted(arrays)[-1]
  arrays[field] = arrays[field].copy()
  arrays[field].flat[:3] = bad
  values = {key.split('/')[0]: value for key, value in arrays.items() if '/' not in key}
  values |= {
      key: (arrays[f'{key}/keys'], arrays[f'{key}/values'])
      for key in KV_FIELDS.values()
      if f'{key}/keys' in arrays
  }
  message = f'3 of the {arrays[field].size} numbers in {field} are NaN, .*LEARNING_RATE'
  with pytest.raises(ValueError, match=f'The injection to save is no usable .* {message}'):
    save_prompt(tmp_path / 'p', Injection(**values))
  assert os.listdir(tmp_path) == []
  with pytest.MonkeyPatch.context() as patch:  # As versions before wrote it.
    patch.setattr(artifact, 'check_numbers', lambda *_: None)
    save_prompt(tmp_path / 'p', Injection(**values))
  with pytest.raises(ValueError, match=f'{tmp_path / "p"} is no usable prompt: {message}'):
    load_artifact(tmp_path / 'p')


def test_a_prompt_of_no_positions_is_refused(tmp_path):
  message = r'holds an empty prompt: virtual_embeddings has shape \[0, 16\].*PROMPT_LENGTH'
  with pytest.raises(ValueError, match=message):
    save_prompt(tmp_path / 'p', Injection(virtual_embeddings=np.zeros((0, 16), np.float32)))


def test_an_unknown_field_is_answered_with_the_nearest(tmp_path):
  with pytest.raises(TypeError, match="unknown field 'metric'. Did you mean 'metrics'"):
    save_prompt(tmp_path / 'p', SOFT, metric={'accuracy': 1.0})


def test_a_save_that_fails_leaves_the_old_artifact_and_nothing_else(path, monkeypatch):
  before = path.read_bytes()

  def full(*args):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(os, 'fsync', full)
  with pytest.raises(OSError, match=f'Could not write {path}.*No space left'):
    save_prompt(path, Injection(virtual_embeddings=np.zeros((5, 16), np.float32)))
  assert path.read_bytes() == before
  assert os.listdir(path.parent) == [path.name]


def test_a_prompt_is_accepted_where_it_belongs(path, backbone):
  prompt = load_artifact(path)
  prompt.check(backbone)
  prompt.check(backbone, length=5, method='SoftPrompt')
  assert prompt.length == 5
  assert Prompt(INJECTIONS['prefix'], Manifest()).length == 4


def test_a_prompt_of_another_length_or_method_is_refused(path, backbone):
  prompt = load_artifact(path)
  message = 'has length 5, but this run expects 20 .* Set PROMPT_LENGTH = 5'
  with pytest.raises(ValueError, match=message):
    prompt.check(backbone, length=20)
  with pytest.raises(ValueError, match='method SoftPrompt, but this run uses PrefixTuning'):
    prompt.check(backbone, method='PrefixTuning')


def test_a_prompt_of_another_width_is_refused(path, vocabulary):
  wider = dataclasses.replace(TINY_CONFIG, d_model=32)
  with pytest.raises(ValueError, match=r'tiny \(d_model=16\), .* uses wide \(d_model=32\)'):
    load_artifact(path).check(make_backbone(vocabulary, wider, 'wide'))


def test_a_prompt_of_another_model_of_the_same_size_is_refused(path, vocabulary):
  other = make_backbone(vocabulary, name='adapted', weights='f' * 16)
  message = '0123456789ab…, but adapted from .* ffffffffffff…: of the same size'
  with pytest.raises(ValueError, match=message):
    load_artifact(path).check(other)


def test_a_prompt_of_another_vocabulary_is_refused(path, tmp_path):
  other = samples.train_vocabulary(tmp_path / 'other.model', 'other letters')
  with pytest.raises(ValueError, match='trained with the vocabulary .* uses .*other.model'):
    load_artifact(path).check(make_backbone(other))
  load_artifact(path).check(make_backbone(None))


def test_a_prefix_for_another_depth_is_refused_without_a_manifest(vocabulary):
  deeper = dataclasses.replace(TINY_CONFIG, num_encoder_layers=4)
  prompt = Prompt(Injection(encoder_kv=pair(2)), Manifest())
  with pytest.raises(ValueError, match=r'encoder_kv has shape .*needs \[layers=4'):
    prompt.check(make_backbone(vocabulary, deeper))


@pytest.mark.parametrize(
    ('injection', 'message'),
    [
        (Injection(virtual_embeddings=np.ones((5, 8), np.float32)), 'd_model=16'),
        (Injection(virtual_embeddings=np.ones((7, 16), np.float32)), 'num_virtual_tokens=5'),
        (Injection(virtual_embeddings=np.ones((5,), np.float32)), r'shape \[5\]'),
        (Injection(encoder_kv=(np.ones(3, np.float32),) * 2), r'encoder_kv has keys \[3\]'),
        (
            Injection(decoder_kv=(np.ones((2, 4, 2, 8), np.float32),) * 2),
            r'decoder_kv has shape \(2, 4, 2, 8\)',
        ),
        (Injection(), 'is empty'),
    ],
)
def test_arrays_that_are_not_what_the_manifest_says_are_refused_although_the_sum_is_right(
    path, injection, message, monkeypatch
):
  manifest = load_artifact(path).manifest
  with monkeypatch.context() as unchecked:
    unchecked.setattr(artifact, '_check_own', lambda *args: None)
    Prompt(injection, manifest).save(path)
  with pytest.raises(ValueError, match=f'{path}.*{message}'):
    load_artifact(path)


def test_settings_of_the_arrays_come_back_and_unknown_ones_are_refused(tmp_path, monkeypatch):
  injection = dataclasses.replace(
      INJECTIONS['both'], positions='none', num_decoder_virtual_tokens=2
  )
  prompt = save_prompt(tmp_path / 'p', injection)
  assert (prompt.injection.positions, prompt.injection.num_decoder_virtual_tokens) == ('none', 2)
  assert prompt.manifest.num_virtual_tokens == 3
  assert 'positions none, the last 2 rows in the decoder' in str(prompt)
  with monkeypatch.context() as later:
    later.setattr(artifact, 'SETTINGS', (*artifact.SETTINGS, '__doc__'))
    prompt.save(tmp_path / 'p')
  with pytest.raises(ValueError, match='has settings of its arrays that are not known'):
    load_artifact(tmp_path / 'p')


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda arrays, described: arrays.pop('encoder_kv/keys'), 'encoder_kv/keys is missing'),
        (lambda arrays, described: arrays.pop('cross_kv/values'), 'cross_kv/values is missing'),
        (lambda arrays, described: arrays.update(more=arrays['cross_kv/keys']), 'more is missing'),
        (
            lambda arrays, described: arrays.update({'cross_kv/keys': np.ones((3, 2, 3, 4), 'f')}),
            'cross_kv has keys',
        ),
        (
            lambda arrays, described: described['injection'].update(positions='x'),
            "positions are 'before' or 'none'",
        ),
        (
            lambda arrays, described: described['injection'].update(
                num_decoder_virtual_tokens='2'
            ),
            'is a whole number',
        ),
        (
            lambda arrays, described: described['injection'].update(
                num_decoder_virtual_tokens=2
            ),
            'has no rows for them',
        ),
        (lambda arrays, described: described.update(num_virtual_tokens='3'), 'num_virtual_tokens'),
        (lambda arrays, described: described.update(feature_lengths=[1]), 'feature_lengths'),
        (lambda arrays, described: described.update(step='x'), 'has step .x. in its manifest'),
        (lambda arrays, described: described.update(method=None), 'has method None'),
    ],
)
def test_parts_that_do_not_belong_together_are_refused_although_the_sum_is_right(
    change, message, tmp_path
):
  path = tmp_path / 'p.safetensors'
  save_prompt(path, INJECTIONS['prefix'])
  with safetensors.safe_open(path, framework='numpy') as file:
    arrays = {name: file.get_tensor(name) for name in file.keys()}
    described = json.loads(file.metadata()['manifest'])
  change(arrays, described)
  del described['sha256']
  described['sha256'] = artifact._sha256(described, arrays)
  content = {'manifest': json.dumps(described, sort_keys=True, ensure_ascii=False)}
  safetensors.numpy.save_file(arrays, path, metadata=content)
  with pytest.raises(ValueError, match=f'{path}.*{message}'):
    load_artifact(path)


def test_printing_a_prompt_says_what_matters(path):
  text = str(load_artifact(path))
  assert text.splitlines()[:3] == [
      'Prompt: Injection(virtual_embeddings 5×16 float32), 80 numbers',
      '  backbone   tiny, weights 0123456789ab…',
      '  method     SoftPrompt',
  ]
  for words in ('accuracy 71.25, loss 0.75, step 600', 'demo_gloss_category', str(path)):
    assert words in text
  assert str(Prompt(SOFT, Manifest())).count('\n') == 0


def test_a_manifest_of_unknown_fields_is_refused(tmp_path):
  newer = dataclasses.make_dataclass(
      'Newer', [('extra', int)], bases=(Manifest,), frozen=True, kw_only=True
  )
  Prompt(SOFT, newer(extra=1, num_virtual_tokens=5)).save(tmp_path / 'p')
  with pytest.raises(ValueError, match="other fields than format_version 1 .*'extra'"):
    load_artifact(tmp_path / 'p')
