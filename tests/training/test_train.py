"""`train` from a backbone and a task to what users keep.

A model is tuned to say which animal stands in a sentence. A prompt of four virtual tokens
then makes that model, frozen, say the other one.
"""

import json
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from prompt_tuning_jax import initializers
from prompt_tuning_jax.backbones.backbone import Backbone
from prompt_tuning_jax.checkpoints.load import load_backbone
from prompt_tuning_jax.data import cache
from prompt_tuning_jax.data.cache import load_task
from prompt_tuning_jax.data.tokenized_task import FORMAT
from prompt_tuning_jax.evaluation.evaluate import evaluate
from prompt_tuning_jax.json_files import read_jsonl
from prompt_tuning_jax.methods.p_tuning import PTuning
from prompt_tuning_jax.methods.soft_prompt import SoftPrompt
from prompt_tuning_jax.prompt_files import load_prompt
from prompt_tuning_jax.training.optimizers import adafactor, adam, adamw
from prompt_tuning_jax.training.train import train
from tests.checkpoints.samples import assert_same_trees
from tests.conftest import assert_close
from tests.training.conftest import FEATURE_LENGTHS, make_task
from tests.training.test_metrics_writer import tensorboard_scalars


@pytest.fixture(scope='module')
def run(cache_dir):
  """`train` with the settings that all runs here share."""

  def run(backbone, task, model_dir, train_steps, **others):
    settings = dict(
        batch_size=8,
        feature_lengths=FEATURE_LENGTHS,
        eval_period=100,
        log_period=10,
        cache_dir=cache_dir,
        progress=False,
    )
    return train(
        backbone=backbone,
        task=task,
        model_dir=str(model_dir),
        train_steps=train_steps,
        **settings | others,
    )

  return run


def _losses(model_dir):
  records = read_jsonl(os.path.join(model_dir, 'metrics.jsonl'))
  return [r['train/loss_per_token'] for r in records if 'train/loss_per_token' in r]


@pytest.fixture(scope='module')
def tuned(run, random_backbone, tmp_path_factory):
  """A model tuned on the first task: (result, its folder)."""
  model_dir = tmp_path_factory.mktemp('tuned')
  result = run(random_backbone, 'which_animal', model_dir, 200, trainable=adamw(5e-3))
  return result, model_dir


@pytest.fixture(scope='module')
def animal_backbone(tuned):
  return load_backbone(tuned[0].path)


def _tune_prompt(run, backbone, model_dir, train_steps=200, **others):
  return run(
      backbone,
      'other_animal',
      model_dir,
      train_steps,
      **{'method': SoftPrompt(4), 'best_metric': 'accuracy', 'created_by': 'a test'} | others,
  )


@pytest.fixture(scope='module')
def prompted(run, animal_backbone, tmp_path_factory):
  """A prompt tuned on the second task, in two runs of one folder: (result, its folder)."""
  model_dir = tmp_path_factory.mktemp('prompted')
  _tune_prompt(run, animal_backbone, model_dir, 30)
  return _tune_prompt(run, animal_backbone, model_dir), model_dir


# Model tuning.


def test_a_tuned_model_has_learned_and_comes_back(tuned, vocabulary, cache_dir):
  result, model_dir = tuned
  losses = _losses(model_dir)
  assert losses[-1] < 0.2 * losses[0]
  assert result.metrics['accuracy'] >= 95
  assert result.path == result.backbone_path == str(model_dir / 'backbone')
  assert result.prompt is None and set(result.params) == {'backbone'}
  backbone = load_backbone(result.path)
  assert_same_trees(backbone.params, result.params['backbone'])
  task = load_task('which_animal', 'validation', vocabulary, cache_dir=cache_dir)
  scored = evaluate(backbone, None, task, feature_lengths=FEATURE_LENGTHS, progress=False)
  assert scored.metrics == result.metrics


def test_the_callers_backbone_keeps_its_weights(tuned, random_backbone):
  fresh = load_backbone(random_backbone.source)
  assert_same_trees(random_backbone.params, fresh.params)
  assert not np.array_equal(
      tuned[0].params['backbone']['token_embedder']['embedding'],
      fresh.params['token_embedder']['embedding'],
  )


# Prompt tuning.


def test_a_prompt_makes_the_frozen_model_say_the_opposite(
    prompted, animal_backbone, vocabulary, cache_dir
):
  result, model_dir = prompted
  task = load_task('other_animal', 'validation', vocabulary, cache_dir=cache_dir)
  score = dict(feature_lengths=FEATURE_LENGTHS, progress=False)
  assert evaluate(animal_backbone, None, task, **score).metrics['accuracy'] <= 5
  assert result.metrics['accuracy'] >= 95
  losses = _losses(model_dir)
  assert losses[-1] < 0.2 * losses[0]

  prompt = load_prompt(result.path)
  again = evaluate(load_backbone(animal_backbone.source), prompt, task, **score)
  assert again.metrics == result.metrics
  recorded = read_jsonl(model_dir / 'inference_eval' / 'other_animal-validation-predictions.jsonl')
  for one, other in zip(again.predictions, recorded, strict=True):
    assert one['prediction_text'] == other['prediction_text']
    np.testing.assert_allclose(
        list(one['scores'].values()), list(other['scores'].values()), rtol=1e-4
    )


def test_the_frozen_weights_are_the_same_to_the_bit(prompted, animal_backbone):
  assert set(prompted[0].params) == {'prompt'}
  assert_same_trees(animal_backbone.params, load_backbone(animal_backbone.source).params)


@pytest.mark.slow
def test_a_prompt_tuned_on_int8_weights_steers_the_float_model_too(
    run, animal_backbone, tmp_path, vocabulary, cache_dir
):
  backbone = load_backbone(animal_backbone.source, param_dtype='int8')
  result = _tune_prompt(run, backbone, tmp_path)
  assert_same_trees(
      backbone.params, load_backbone(animal_backbone.source, param_dtype='int8').params
  )
  assert result.metrics['accuracy'] >= 95
  assert result.prompt.manifest.backbone_weights == 'int8'
  task = load_task('other_animal', 'validation', vocabulary, cache_dir=cache_dir)
  score = dict(feature_lengths=FEATURE_LENGTHS, progress=False)
  assert evaluate(animal_backbone, result.prompt, task, **score).metrics['accuracy'] >= 95
  # Resumed on other weights, it would be neither the one run nor the other.
  with pytest.raises(ValueError, match='another configuration:\n  weights: .int8. there'):
    _tune_prompt(run, animal_backbone, tmp_path)


def test_a_run_is_not_resumed_on_targets_of_another_form(run, random_backbone, tmp_path):
  run(random_backbone, 'which_animal', tmp_path, 2, method=SoftPrompt(4))
  with pytest.raises(ValueError, match="another configuration:\n  target_prefix: '' there"):
    run(
        random_backbone, 'which_animal', tmp_path, 4, method=SoftPrompt(4),
        target_prefix='<extra_id_0>',
    )  # fmt: skip


@pytest.mark.parametrize(
    'trainable',
    [{'prompt': adam(1e-3), 'backbone': adam(1e-5)}, {'backbone/encoder/encoder_norm': adam(1e-5)}],
)
def test_weights_in_int8_are_not_tuned_and_not_even_read(
    run, random_backbone, tmp_path, trainable
):
  backbone = load_backbone(random_backbone.source, param_dtype='int8')
  with pytest.raises(ValueError, match='PARAM_DTYPE=None.*tune the prompt alone'):
    _tune_prompt(run, backbone, tmp_path, trainable=trainable)
  with pytest.raises(ValueError, match='held|of type int8'):
    run(backbone, 'which_animal', tmp_path, 10, trainable=adamw(5e-3))
  assert 'params' not in vars(backbone)


def test_the_artifact_says_where_it_belongs(prompted, animal_backbone):
  result, model_dir = prompted
  assert result.path == str(model_dir / 'prompt.safetensors')
  np.testing.assert_array_equal(
      load_prompt(result.path).injection.virtual_embeddings, result.params['prompt']['prompt']
  )
  manifest = result.prompt.manifest
  assert manifest.backbone_fingerprint == animal_backbone.fingerprint
  assert manifest.method == 'SoftPrompt' and manifest.num_virtual_tokens == 4
  assert manifest.task == 'other_animal' and manifest.feature_lengths == FEATURE_LENGTHS
  assert manifest.step == result.step and manifest.metrics == result.metrics
  assert manifest.placement == 'prefix' and manifest.created_by == 'a test'


def test_the_folder_of_a_run_holds_what_belongs_to_it(prompted):
  result, model_dir = prompted
  assert sorted(os.listdir(model_dir)) == [
      'checkpoint_100',
      'checkpoint_200',
      'inference_eval',
      'metrics.jsonl',
      'prompt.safetensors',
      'run.json',
      'tensorboard',
  ]
  evaluated = read_jsonl(model_dir / 'inference_eval' / 'other_animal-metrics.jsonl')
  assert [record['step'] for record in evaluated] == [30, 100, 200]
  records = read_jsonl(model_dir / 'metrics.jsonl')
  shown = tensorboard_scalars(model_dir)
  assert {(name, r['step']) for r in records for name in r if name != 'step'} == set(shown)
  assert {step for name, step in shown if name == 'eval/accuracy'} == {30, 100, 200}


def test_run_again_a_finished_run_gives_the_same(run, prompted, animal_backbone):
  result, model_dir = prompted
  again = _tune_prompt(run, animal_backbone, model_dir)
  assert_same_trees(again.params, result.params)
  assert again.metrics == result.metrics and again.step == result.step


@pytest.mark.parametrize(
    ('change', 'answer'),
    [
        ({'trainable': adafactor(0.1)}, 'trainable.prompt.adafactor.learning_rate: 0.3 there, 0.1'),
        ({'random_seed': 3}, 'random_seed: 0 there, 3 here'),
        ({'eval_method': 'generate'}, "evaluation.method: 'rank' there, 'generate' here"),
        ({'dropout_rate': 0.1}, 'dropout_rate: 0.0 there, 0.1 here'),
        ({'method': SoftPrompt(5)}, 'method.SoftPrompt.length: 4 there, 5 here'),
        (
            {'method': SoftPrompt(4, initializers.uniform(0.1))},
            r'method.SoftPrompt.prompt_init.uniform.init.scale: 0.5 there, 0.1 here',
        ),
    ],
)
def test_another_configuration_does_not_resume_the_run(
    run, prompted, animal_backbone, change, answer
):
  before = (prompted[1] / 'run.json').read_text()
  with pytest.raises(ValueError, match=answer):
    _tune_prompt(run, animal_backbone, prompted[1], **change)
  assert (prompted[1] / 'run.json').read_text() == before


def test_another_model_or_other_data_do_not_resume_the_run(
    run, prompted, animal_backbone, random_backbone, vocabulary, tmp_path
):
  with pytest.raises(ValueError, match='backbone_fingerprint: .* there'):
    _tune_prompt(run, random_backbone, prompted[1])
  for split, count in (('train', 51), ('validation', 21)):
    path = cache.cache_path('other_animal', split, vocabulary, str(tmp_path))
    make_task(vocabulary, 'other_animal', split, count).save(path)
  with pytest.raises(ValueError, match=r'examples.other_animal/train.0: 50 there, 51 here'):
    _tune_prompt(run, animal_backbone, prompted[1], cache_dir=str(tmp_path))


def test_a_run_is_described_without_what_differs_between_identical_runs(prompted):
  text = (prompted[1] / 'run.json').read_text()
  assert '0x' not in text and str(prompted[1]) not in text
  assert json.loads(text)['examples'] == {'other_animal/train': [50, 1.0]}


# Both.


def test_a_prompt_tuned_with_its_model_belongs_to_the_tuned_model(
    run, animal_backbone, vocabulary, cache_dir, tmp_path, capsys
):
  result = run(
      animal_backbone,
      'other_animal',
      tmp_path,
      60,
      method=SoftPrompt(4),
      trainable={'prompt': adafactor(0.3), 'backbone': adamw(3e-3)},
      eval_period=0,
      progress=True,
  )
  count = f'{animal_backbone.num_params + 4 * animal_backbone.spec.d_model:,}'
  assert f'trainable  {count} of {count} parameters (100 %)' in capsys.readouterr().err
  assert set(result.params) == {'prompt', 'backbone'}
  losses = _losses(tmp_path)
  assert losses[-1] < 0.5 * losses[0]
  task = load_task('other_animal', 'validation', vocabulary, cache_dir=cache_dir)
  tuned, prompt = load_backbone(result.backbone_path), load_prompt(result.path)
  assert_same_trees(tuned.params, result.params['backbone'])
  assert evaluate(tuned, prompt, task, progress=False).metrics == result.metrics
  with pytest.raises(ValueError, match='of the same size, but another model'):
    evaluate(animal_backbone, prompt, task, progress=False)


def test_every_task_of_a_mixture_is_trained_on_and_evaluated(
    run, animal_backbone, cache_dir, tmp_path
):
  members = [['which_animal', 3.0], ['other_animal', 1.0]]
  folder = os.path.join(cache_dir, 'both_animals')
  os.makedirs(folder)
  with open(os.path.join(folder, 'mixture.json'), 'w') as file:
    json.dump({'format': FORMAT, 'members': members, 'code': {}}, file)
  result = run(
      animal_backbone,
      'both_animals',
      tmp_path,
      20,
      method=SoftPrompt(4),
      best_metric='which_animal/accuracy',
  )
  assert set(result.metrics) == {'which_animal/accuracy', 'other_animal/accuracy'}
  # What is right for one is wrong for the other.
  assert sum(result.metrics.values()) == pytest.approx(100)
  described = json.loads((tmp_path / 'run.json').read_text())
  assert described['examples'] == {
      'which_animal/train': [50, 3.0], 'other_animal/train': [50, 1.0]
  }


# What is refused, and when.


class _LoadedError(Exception):
  pass


@pytest.fixture
def unloadable(random_backbone):
  """A backbone that tells when its weights are asked for."""

  def load():
    raise _LoadedError

  return Backbone(
      'unloadable', random_backbone.module, random_backbone.vocabulary, load, fingerprint='f'
  )


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_loaded(
    run, unloadable, tmp_path, monkeypatch
):
  monkeypatch.setattr(cache, 'load_task', None)
  (tmp_path / 'file').touch()
  with pytest.raises(OSError, match='MODEL_DIR .*/file/run cannot be written'):
    run(unloadable, 'which_animal', tmp_path / 'file' / 'run', 10)


@pytest.mark.parametrize(
    ('settings', 'answer'),
    [
        ({'dropout_rate': 1.5}, 'DROPOUT_RATE'),
        ({'microbatches': 3}, 'MICROBATCHES=3 does not divide BATCH_SIZE=8'),
        ({'batch_size': 0}, 'BATCH_SIZE=0'),
        ({'task': 'unlabelled'}, "unlabelled, split 'train', has no labels"),
        ({'eval_task': 'unlabelled'}, "unlabelled, split 'validation', has no labels"),
        ({'eval_method': 'rang'}, "No evaluation method 'rang'"),
        ({'lengths': 'packed'}, "lengths='packed'"),
        ({'best_mode': 'least'}, "best_mode is 'least'"),
        (
            {'best_metric': 'acuracy'},
            "BEST_METRIC is 'acuracy'.* Did you mean 'accuracy'.* It measures accuracy",
        ),
        ({'train_steps': 0}, 'train_steps is 0'),
        ({'feature_lengths': {'inputs': 12}}, "does not say how long 'targets'"),
        ({'placement': '{4} {animal}'}, "'animal', which which_animal, split 'train', does not"),
        ({'placement': '{3} {inputs}'}, 'places for 3 virtual tokens, but the prompt has 4'),
        (
            {'placement': '{2} {inputs} {2} it is one of the two animals, but which one is it?'},
            'leaves nothing of an input length of 12',
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_loaded(
    run, unloadable, tmp_path, settings, answer
):
  with pytest.raises(ValueError, match=answer):
    run(
        **{
            'backbone': unloadable,
            'task': 'which_animal',
            'model_dir': tmp_path,
            'train_steps': 10,
            'method': SoftPrompt(4),
        }
        | settings
    )
  assert os.listdir(tmp_path) == []


def test_a_backbone_without_a_vocabulary_is_refused(run, random_backbone, tmp_path):
  backbone = Backbone('silent', random_backbone.module, None, dict)
  with pytest.raises(ValueError, match='silent has no vocabulary.*Set VOCABULARY.*cc_all.32000'):
    run(backbone, 'which_animal', tmp_path, 10)


def test_a_label_for_nothing_is_refused(run, random_backbone, tmp_path):
  with pytest.raises(ValueError, match=r"\['promt'\], which leads to no parameter"):
    run(
        random_backbone,
        'which_animal',
        tmp_path,
        10,
        method=SoftPrompt(4),
        trainable={'promt': adafactor()},
    )


def test_an_unknown_task_is_named(run, unloadable, tmp_path):
  with pytest.raises(ValueError, match='taskless_super_glue_cb_v103.*v102'):
    run(unloadable, 'taskless_super_glue_cb_v103', tmp_path, 10)


def test_lengths_that_cut_targets_are_warned_of_with_the_share(run, unloadable, tmp_path):
  with pytest.warns(UserWarning) as warned, pytest.raises(_LoadedError):
    run(
        unloadable,
        'which_animal',
        tmp_path,
        10,
        feature_lengths={'inputs': 12, 'targets': 2},
    )
  messages = [str(warning.message) for warning in warned]
  assert any(
      "TASK_FEATURE_LENGTHS['targets']=2 cuts the targets of" in message
      and "% of which_animal, split 'train'" in message
      for message in messages
  ), messages


# Stopped and resumed, the whole command.


def test_a_continued_run_equals_one_that_never_ended(run, prompted, animal_backbone, tmp_path):
  result = _tune_prompt(run, animal_backbone, tmp_path)
  assert_same_trees(result.params, prompted[0].params)
  artifacts = [folder / 'prompt.safetensors' for folder in (tmp_path, prompted[1])]
  assert artifacts[0].read_bytes() == artifacts[1].read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ('method', 'trainable'),
    [
        (PTuning(4), {'prompt': adam(1e-3, weight_decay=5e-4)}),
        (PTuning(4, lstm_layers=0), {'prompt': adamw(1e-3), 'backbone': adamw(1e-4)}),
    ],
    ids=['frozen', 'co-tuning'],
)
def test_a_prompt_that_an_encoder_makes_is_resumed_to_the_bit_and_folded_when_it_is_kept(
    run, animal_backbone, vocabulary, cache_dir, tmp_path, method, trainable
):
  settings = dict(method=method, trainable=trainable, placement='{2} {inputs} {2}')
  whole, parts = tmp_path / 'whole', tmp_path / 'parts'
  result = _tune_prompt(run, animal_backbone, whole, 20, **settings)
  for steps in (7, 20):
    again = _tune_prompt(run, animal_backbone, parts, steps, **settings)
  assert_same_trees(again.params, result.params)
  if result.backbone_path is None:  # The name of a tuned model is that of its folder.
    assert (whole / 'prompt.safetensors').read_bytes() == (
        parts / 'prompt.safetensors'
    ).read_bytes()

  # Nothing of the encoder is left, and the scores stay.
  stored = load_file(whole / 'prompt.safetensors')
  assert list(stored) == ['virtual_embeddings']
  encoded = method.apply({'params': result.params['prompt']}, animal_backbone.spec)
  assert_close(stored['virtual_embeddings'], encoded.virtual_embeddings, 1e-6)
  backbone = load_backbone(result.backbone_path or animal_backbone.source)
  task = load_task('other_animal', 'validation', vocabulary, cache_dir=cache_dir)
  scored = evaluate(backbone, load_prompt(result.path), task, progress=False)
  assert scored.metrics == result.metrics
  recorded = read_jsonl(whole / 'inference_eval' / 'other_animal-validation-predictions.jsonl')
  for one, other in zip(scored.predictions, recorded, strict=True):
    np.testing.assert_allclose(
        list(one['scores'].values()), list(other['scores'].values()), rtol=1e-4
    )


def _command(backbone, cache_dir, model_dir):
  flags = {
      'INITIAL_CHECKPOINT_PATH': backbone.source,
      'MIXTURE_OR_TASK_NAME': 'other_animal',
      'MODEL_DIR': model_dir,
      'CACHE_DIR': cache_dir,
      'TASK_FEATURE_LENGTHS': FEATURE_LENGTHS,
      'PROMPT_LENGTH': 4,
      'TRAIN_STEPS_RELATIVE': 600,
      'BATCH_SIZE': 8,
      'CHECKPOINT_PERIOD': 20,
      'EVAL_PERIOD': 150,
      'LOG_PERIOD': 10,
      'DROPOUT_RATE': 0.1,
  }
  return [
      sys.executable,
      '-m',
      'prompt_tuning_jax',
      'train',
      *(f'--gin.{name}={value}' for name, value in flags.items()),
  ]


def _start_until(command, model_dir, reached):
  """Starts the command and returns as soon as its folder holds something of that name."""
  process = subprocess.Popen(
      command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
  )
  while not (model_dir.exists() and any(map(reached, os.listdir(model_dir)))):
    assert process.poll() is None, process.communicate()[0]
    time.sleep(0.001)
  return process


@pytest.mark.slow
def test_however_a_command_is_stopped_run_again_it_ends_as_if_it_never_was(
    animal_backbone, cache_dir, tmp_path
):
  whole, stopped = tmp_path / 'whole', tmp_path / 'stopped'
  subprocess.run(_command(animal_backbone, cache_dir, whole), check=True)
  command = _command(animal_backbone, cache_dir, stopped)

  # Killed while it saves.
  process = _start_until(command, stopped, re.compile(r'checkpoint_\d\d+\.tmp').fullmatch)
  process.kill()
  process.communicate()
  # Killed at a moment that chance decides.
  process = _start_until(command, stopped, re.compile(r'checkpoint_[23]\d\d').fullmatch)
  time.sleep(np.random.default_rng().uniform(0, 0.3))
  process.kill()
  process.communicate()
  # Told to stop.
  process = _start_until(command, stopped, re.compile(r'checkpoint_4\d\d').fullmatch)
  process.terminate()
  said, _ = process.communicate()
  assert process.returncode == 0, said
  assert 'Run the same command again to go on.' in said
  subprocess.run(command, check=True)

  one, other = (load_prompt(folder / 'prompt.safetensors') for folder in (stopped, whole))
  np.testing.assert_array_equal(
      one.injection.virtual_embeddings, other.injection.virtual_embeddings
  )
  assert one.manifest.metrics == other.manifest.metrics
  assert (stopped / 'run.json').read_text() == (whole / 'run.json').read_text()
  records, expected = (read_jsonl(folder / 'metrics.jsonl') for folder in (stopped, whole))
  assert [r for r in records if 'eval/accuracy' in r] == [
      r for r in expected if 'eval/accuracy' in r
  ]
  steps = [r['step'] for r in records if 'train/loss' in r]
  assert steps == sorted(set(steps))
  assert {r['step'] for r in expected} <= {r['step'] for r in records}
  names = [
      sorted(name for name in os.listdir(folder) if name != 'tensorboard')
      for folder in (stopped, whole)
  ]
  assert names[0] == names[1]
