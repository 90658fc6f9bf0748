"""`pretrain` makes a backbone of texts, and goes on with one it is given."""

import json
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax import targets
from prompt_tuning_jax.backbones.backbone import Backbone
from prompt_tuning_jax.backbones.t5 import T5
from prompt_tuning_jax.checkpoints.load import load_backbone
from prompt_tuning_jax.data.pretraining import Component
from prompt_tuning_jax.data.tokenized_task import TokenizedTask
from prompt_tuning_jax.data.vocabulary import Vocabulary
from prompt_tuning_jax.json_files import read_jsonl
from prompt_tuning_jax.training import trainable as trainable_lib
from prompt_tuning_jax.training.optimizers import adamw
from prompt_tuning_jax.training.pretrain import pretrain
from prompt_tuning_jax.training.state_saving import StateSaver
from prompt_tuning_jax.training.step import TrainState
from tests.checkpoints.samples import assert_same_trees, train_vocabulary
from tests.conftest import random_batch
from tests.training.conftest import CONFIG

TEXT = 'the cat sat on the mat and the dog ran after it all day until the rain came'
PAIRS = [
    {'inputs': 'a small animal', 'targets': 'cat'},
    {'inputs': 'it falls from above', 'targets': 'rain'},
]


@pytest.fixture(scope='module')
def components(vocabulary):
  text = TokenizedTask.from_examples(
      [{'targets': TEXT}] * 20, vocabulary, name='animals', features=['targets']
  )
  pairs = TokenizedTask.from_examples(PAIRS, vocabulary, name='riddles')
  return [
      Component('text', text, 'span_corruption', 0.5, 16, None, 4),
      Component('pairs', pairs, 'supervised', 0.5, 12, 8, 4),
  ]


def _pretrain(components, vocabulary, model_dir, train_steps=80, **others):
  settings = dict(
      config=CONFIG,
      vocabulary=vocabulary,
      trainable=adamw(1e-2),
      checkpoint_period=20,
      log_period=10,
      weights_dtype='float32',
      metadata={'corpus': 'a rhyme'},
      progress=False,
  )
  return pretrain(
      components=components, model_dir=str(model_dir), train_steps=train_steps, **settings | others
  )


@pytest.fixture(scope='module')
def pretrained(components, vocabulary, tmp_path_factory):
  """A finished run: (its backbone's folder, its own)."""
  model_dir = tmp_path_factory.mktemp('pretrained')
  return _pretrain(components, vocabulary, model_dir), model_dir


def _state(model_dir):
  params, _ = trainable_lib.split(
      {'backbone': jax.eval_shape(T5(CONFIG).init_params, jax.random.key(0))},
      {'backbone': adamw(1e-2)},
  )
  template = jax.eval_shape(lambda tree: TrainState.create(tree, adamw(1e-2)), params)
  return StateSaver(model_dir).restore(template)[0]


def test_a_model_learns_from_every_component(pretrained):
  records = read_jsonl(pretrained[1] / 'metrics.jsonl')
  assert [record['step'] for record in records] == list(range(10, 81, 10))
  for name in ('train', 'train/text', 'train/pairs'):
    losses = [record[f'{name}/loss_per_token'] for record in records]
    assert losses[-1] < 0.5 * losses[0], name
  for record in records:
    of_components = [record['train/text/loss_per_token'], record['train/pairs/loss_per_token']]
    assert min(of_components) < record['train/loss_per_token'] < max(of_components)


def test_the_finished_backbone_is_the_last_state(pretrained):
  path, model_dir = pretrained
  assert path == str(model_dir / 'backbone')
  backbone = load_backbone(path)
  assert backbone.module.config == CONFIG
  assert_same_trees(backbone.params, _state(model_dir).trainable['backbone'])
  described = json.loads((model_dir / 'backbone' / 'config.json').read_text())
  assert described['metadata'] == {'corpus': 'a rhyme', 'train_steps': 80}


@pytest.mark.slow
def test_a_run_that_is_continued_equals_one_that_never_ended(
    pretrained, components, vocabulary, tmp_path
):
  for train_steps in (30, 80):
    _pretrain(components, vocabulary, tmp_path, train_steps)
  assert_same_trees(_state(tmp_path), _state(pretrained[1]))
  assert load_backbone(tmp_path / 'backbone').fingerprint == (
      load_backbone(pretrained[0]).fingerprint
  )
  records = [read_jsonl(folder / 'metrics.jsonl') for folder in (tmp_path, pretrained[1])]
  for record in records[0] + records[1]:
    del record['train/steps_per_second']
  assert records[0] == records[1]


def test_the_backbone_is_kept_on_the_way(pretrained, components, vocabulary, tmp_path):
  kept = dict(backbone_steps=[30, 0])
  # Interrupted between the two, as it may be.
  _pretrain(components, vocabulary, tmp_path / 'run', 40, **kept)
  _pretrain(components, vocabulary, tmp_path / 'run', 80, **kept)
  alone = _pretrain(components, vocabulary, tmp_path / 'alone', 30)
  fresh = jax.jit(T5(CONFIG).init_params)(jax.random.key(0))
  assert_same_trees(load_backbone(tmp_path / 'run' / 'backbone_0').params, fresh)
  fingerprints = [
      load_backbone(path).fingerprint
      for path in (
          tmp_path / 'run' / 'backbone_30', alone, tmp_path / 'run' / 'backbone', pretrained[0]
      )  # fmt: skip
  ]
  assert fingerprints[0] == fingerprints[1] and fingerprints[2] == fingerprints[3]
  described = json.loads((tmp_path / 'run' / 'backbone_30' / 'config.json').read_text())
  assert described['metadata'] == {'corpus': 'a rhyme', 'train_steps': 30}
  with pytest.raises(ValueError, match='BACKBONE_STEPS has 50, but MODEL_DIR .* is at step 80'):
    _pretrain(components, vocabulary, tmp_path / 'run', 90, backbone_steps=[50])
  with pytest.raises(ValueError, match='BACKBONE_STEPS has 80, but a run of 80 steps'):
    _pretrain(components, vocabulary, tmp_path / 'other', 80, backbone_steps=[80])


@pytest.mark.slow
def test_a_backbone_in_bfloat16_computes_what_its_rounded_weights_do(
    pretrained, components, vocabulary, tmp_path
):
  path = _pretrain(components, vocabulary, tmp_path, 20, weights_dtype='bfloat16')
  batch = random_batch(CONFIG.vocab_size, [7, 4], [3, 2])
  rounded = jax.tree.map(
      lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), _state(tmp_path).trainable['backbone']
  )
  logits_of = jax.jit(lambda params: T5(CONFIG).apply({'params': params}, batch))
  np.testing.assert_array_equal(logits_of(load_backbone(path).params), logits_of(rounded))
  assert os.path.getsize(tmp_path / 'backbone' / 'model.safetensors') < (
      0.6 * os.path.getsize(f'{pretrained[0]}/model.safetensors')
  )


def test_adaptation_goes_on_from_a_backbone_and_leaves_it_alone(
    pretrained, components, vocabulary, tmp_path
):
  # What trains is held in float32, however the backbone was.
  start = load_backbone(pretrained[0], param_dtype='bfloat16')
  text = Component('text', components[0].source, 'prefix_lm', 1.0, 16, 16, 4)
  # The optimiser starts anew, and the weights do not.
  adapted = _pretrain(
      [text], None, tmp_path, 30, config=None, backbone=start, trainable=adamw(3e-3)
  )
  assert_same_trees(
      start.params, load_backbone(pretrained[0], param_dtype='bfloat16').params
  )
  assert {leaf.dtype.name for leaf in jax.tree.leaves(_state(tmp_path))} == {'float32', 'int32'}
  losses = [r['train/loss_per_token'] for r in read_jsonl(tmp_path / 'metrics.jsonl')]
  fresh = read_jsonl(pretrained[1] / 'metrics.jsonl')[0]['train/loss_per_token']
  assert losses[-1] < losses[0] < fresh
  assert load_backbone(adapted).vocabulary.fingerprint == vocabulary.fingerprint
  assert json.loads((tmp_path / 'run.json').read_text())['from'] == start.fingerprint
  metadata = json.loads((tmp_path / 'backbone' / 'config.json').read_text())['metadata']
  assert metadata['adaptation_steps'] == 30


@pytest.mark.slow
def test_in_bfloat16_the_weights_that_train_stay_float32(components, vocabulary, tmp_path):
  losses = {}
  for dtype in ('float32', 'bfloat16'):
    folder = tmp_path / dtype
    settings = dict(dtype=dtype, remat='full', log_period=5, checkpoint_period=0)
    _pretrain(components, vocabulary, folder, 5, **settings)
    assert json.loads((folder / 'run.json').read_text())['dtype'] == dtype
    types = {leaf.dtype.name for leaf in jax.tree.leaves(_state(folder))}
    assert types == {'float32', 'int32'}
    records = map(json.loads, (folder / 'metrics.jsonl').read_text().splitlines())
    losses[dtype] = [record['train/loss'] for record in records if 'train/loss' in record]
  assert losses['bfloat16'] == pytest.approx(losses['float32'], rel=1e-2)
  assert losses['bfloat16'] != losses['float32']


@pytest.mark.slow
def test_a_run_begins_with_what_it_is(components, vocabulary, tmp_path, capsys):
  settings = dict(train_steps=3, checkpoint_period=0, progress=True)
  path = _pretrain(components, vocabulary, tmp_path / 'first', **settings)
  lines = dict(line.split(None, 1) for line in capsys.readouterr().err.splitlines()[:5])
  total = sum(x.size for x in jax.tree.leaves(jax.eval_shape(
      T5(CONFIG).init_params, jax.random.key(0)
  )))
  assert lines['model'] == 'T5, 1 + 1 layers of width 16, from fresh weights'
  assert lines['trainable'] == f'{total:,} of {total:,} parameters (100 %)'
  assert lines['component'].startswith('pairs: supervised, 50 % of the steps, batches of 4, 2 e')
  # Text: 16 + its targets; pairs: 12 + 8.
  tokens = re.match(r'3 steps, (\d+) tokens .*, seed 0, dropout 0.0', lines['training'])
  assert int(tokens[1]) % 4 == 0 and 3 * 4 * 20 - 8 <= int(tokens[1]) <= 3 * 4 * 24
  _pretrain(
      components,
      None,
      tmp_path / 'second',
      config=None,
      backbone=load_backbone(path),
      trainable={'backbone/encoder': adamw(1e-3)},
      **settings,
  )
  errors = capsys.readouterr().err
  assert "from Backbone('backbone'" in errors
  share = re.search(r'trainable  ([\d,]+) of ([\d,]+) parameters', errors)
  assert int(share[1].replace(',', '')) < int(share[2].replace(',', '')) == total


def test_another_mixture_or_schedule_does_not_resume_the_run(
    pretrained, components, vocabulary
):
  with pytest.raises(ValueError, match='components.1.*there, nothing here'):
    _pretrain(components[:1], vocabulary, pretrained[1])
  with pytest.raises(ValueError, match='trainable.backbone.adamw.learning_rate: 0.01 there'):
    _pretrain(components, vocabulary, pretrained[1], trainable=adamw(1e-3))


@pytest.mark.parametrize(
    ('settings', 'answer'),
    [
        ({'config': None}, 'needs either `config`'),
        ({'vocabulary': None}, 'pretrain has no vocabulary'),
        ({'microbatches': 3}, "MICROBATCHES=3 does not divide the batch_size=4 of component 'te"),
        ({'trainable': {'prompt': adamw(1e-3)}}, r"\['prompt'\], which leads to no parameter"),
        ({'checkpoint_period': -1}, 'checkpoint_period is -1'),
        ({'dtype': 'float16'}, 'dtype is float16, in which T5 overflows'),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    components, vocabulary, tmp_path, settings, answer
):
  with pytest.raises(ValueError, match=answer):
    _pretrain(components, **{'vocabulary': vocabulary, 'model_dir': tmp_path} | settings)
  assert os.listdir(tmp_path) == []


def test_a_vocabulary_larger_than_the_table_is_refused(components, vocabulary, tmp_path):
  larger = Vocabulary(vocabulary.path, extra_ids=300)
  with pytest.raises(ValueError, match='has 4,300 ids .* embedding has 4,224 rows'):
    _pretrain(components, larger, tmp_path)


def test_texts_of_another_vocabulary_are_refused(components, tmp_path):
  other = train_vocabulary(tmp_path / 'spiece.model')
  with pytest.raises(ValueError, match="Component 'text' was tokenised with another vocabulary"):
    _pretrain(components, other, tmp_path / 'run')


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_loaded(
    components, random_backbone, tmp_path
):
  def load():
    raise AssertionError('the weights were read')

  unloadable = Backbone(
      'unloadable', random_backbone.module, random_backbone.vocabulary, load, fingerprint='f'
  )
  (tmp_path / 'file').touch()
  with pytest.raises(OSError, match='MODEL_DIR .*/file/run cannot be written'):
    _pretrain(components, None, tmp_path / 'file' / 'run', config=None, backbone=unloadable)


def test_what_does_not_fit_the_devices_is_refused_before_anything_is_made(
    components, vocabulary, monkeypatch, tmp_path
):
  monkeypatch.setattr(targets, 'memory_here', lambda: 1000)
  # Fresh weights are float32 until they are converted for a step.
  of_weights = r'weights .*\(float32, computed in bfloat16\)'
  with pytest.raises(MemoryError, match=f'(?s)too small for this run:.*{of_weights}'):
    _pretrain(components, vocabulary, tmp_path / 'run', dtype='bfloat16')
  assert not (tmp_path / 'run').exists()
