"""The command line: flags, help, errors, and what is left in a run's folder."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest

import prompt_tuning_jax
from prompt_tuning_jax import cli, cli_commands
from prompt_tuning_jax.backbones.backbone import Backbone
from prompt_tuning_jax.checkpoints.load import load_backbone
from prompt_tuning_jax.config import registry
from prompt_tuning_jax.evaluation.decoding import Decoding
from prompt_tuning_jax.prompt_files import load_prompt
from prompt_tuning_jax.training.loop import Interrupted
from tests import saved_backbone

COMMANDS = [
    'demo', 'tasks', 'train', 'evaluate', 'infer', 'export', 'import', 'convert', 'pretrain',
    'adapt', 'plan', 'prepare', 'sweep', 'neighbors',
]
# Commands with flags of their own.
WITHOUT_GIN = ['demo', 'prepare']


def test_every_command_that_gin_configures_is_one_of_the_command_line():
  assert {cli_commands.gin_name(name) for name in COMMANDS} == {*registry.commands(), *WITHOUT_GIN}


_NEEDED = [
    '--gin.INITIAL_CHECKPOINT_PATH=somewhere',
    '--gin.MODEL_DIR=run',
    '--gin.MIXTURE_OR_TASK_NAME=demo_gloss_category',
    "--gin.TASK_FEATURE_LENGTHS={'inputs': 16, 'targets': 4}",
]


pytestmark = pytest.mark.usefixtures('elsewhere')


@pytest.fixture
def run(capsys):
  """Runs a command line and returns its status, output and errors."""

  def run_command(*argv):
    status = cli.main(list(map(str, argv)))
    return status, *capsys.readouterr()

  return run_command


@pytest.fixture
def train_flags(backbone_dir, tmp_path):
  return [
      'train',
      *_NEEDED,
      f'--gin.INITIAL_CHECKPOINT_PATH={backbone_dir}',
      f'--gin.MODEL_DIR={tmp_path}/run',
  ]


@pytest.fixture
def replaced(monkeypatch):
  """Puts another function in the place of a command's, for what happens around it."""

  def replace(function):
    monkeypatch.setattr(registry, 'command_function', lambda name: function)

  return replace


# Help.


@pytest.mark.parametrize('argv', [[], ['--help'], ['help']])
def test_help_names_every_command(run, argv):
  status, printed, _ = run(*argv)
  assert status == 0
  assert all(f'\n  {name} ' in printed for name in COMMANDS)


def test_the_version_is_the_packages(run):
  assert run('--version') == (0, f'{prompt_tuning_jax.__version__}\n', '')


@pytest.mark.parametrize('command', [name for name in COMMANDS if name not in WITHOUT_GIN])
def test_help_of_a_command_lists_its_macros_and_the_recipes(capsys, command):
  with pytest.raises(SystemExit) as stop:
    cli.main([command, '--help'])
  printed = capsys.readouterr().out
  assert stop.value.code == 0
  assert '--gin_file' in printed and 'demo' in printed
  assert 't5x_exact\n      the original code' in printed and 'read after all others' in printed
  assert 'INITIAL_CHECKPOINT_PATH' in printed or command == 'pretrain'
  assert ("--gin.MODELS [['pico', 'nano']]: the models of a" in printed) == (command == 'sweep')


# Errors.


@pytest.mark.parametrize(
    ('argv', 'answer'),
    [
        (['tarin'], 'Did you mean train?'),
        (['train', '--gin_files=x'], 'Did you mean --gin_file?'),
        (['train', '--gin_file=demmo'], 'Did you mean recipes/demo.gin?'),
        (['train', 'demo'], "unknown argument 'demo'"),
        (['train', *_NEEDED, '--process_count=2'], '--process_count given without --coord'),
        (['import', '--coordinator_address=here:1'], '--coordinator_address: import runs in'),
        (['train', '--gin.MODEL_DIR=None'], 'MODEL_DIR is None (--gin.MODEL_DIR), expected a t'),
        (['train', '--gin.LEARNING_RATE=big'], 'expected a number, 0 or more'),
        (['train', *_NEEDED, '--gin.INITIAL_CHECKPOINT_PATH=nano',
          '--gin.MIXTURE_OR_TASK_NAME=None'], 'MIXTURE_OR_TASK_NAME is None, but train needs it'),
        (['evaluate', *_NEEDED, '--gin.INITIAL_CHECKPOINT_PATH=nano', '--gin.SPLIT=None'],
         'SPLIT is None, but evaluate needs it: split of the task'),
        (['tasks', 'a', 'b'], "unknown argument 'b'"),
        (['tasks', 'demo_gloss_category', '--examples=-1'], '--examples -1: it has to be 0 or'),
        (['tasks', 'demo_gloss_category', '--gin.PLACEMENT=prefx'], "No placement 'prefx'"),
        (['train'], 'MODEL_DIR: folder of the run'),
        (['demo', '--gin.MODEL_DIR=x'], "unknown argument '--gin.MODEL_DIR=x'"),
        (['demo', '--modeldir=x'], 'Did you mean --model_dir?'),
        (['prepare', 'super_glue', '--from=x'], 'required: --tfds_data_dir'),
        (['prepare', 'super_glue', '--from=x', '--tfds_dir=y'], 'required: --tfds_data_dir'),
    ],
)
def test_a_mistake_is_one_message_and_status_2(run, argv, answer):
  status, printed, errors = run(*argv)
  assert (status, printed) == (2, '')
  assert answer in errors
  assert 'Traceback' not in errors


def test_debug_keeps_the_traceback(run):
  with pytest.raises(ValueError, match='demmo'):
    run('train', '--gin_file=demmo', '--debug')


def test_a_message_from_within_gin_keeps_only_what_the_user_can_use(run, train_flags):
  status, _, errors = run(*train_flags, '--gin.INITIAL_CHECKPOINT_PATH=nowhere')
  assert status == 2
  assert "No backbone 'nowhere'" in errors
  assert '0x' not in errors and 'configurable' not in errors


@pytest.mark.parametrize(
    ('raised', 'status', 'message'),
    [
        (FloatingPointError('The loss of step 3 is nan.'), 2, 'The loss of step 3 is nan.'),
        (OSError('disk full'), 2, 'disk full'),
        (KeyboardInterrupt(), 1, 'interrupted'),
        (Interrupted('Stopped at step 3 of 9.'), 0, 'Stopped at step 3 of 9.'),
    ],
)
def test_what_a_run_raises_becomes_a_message_and_a_status(
    run, train_flags, replaced, raised, status, message
):
  def train(*, model_dir, **others):
    raise raised

  replaced(train)
  got, _, errors = run(*train_flags)
  assert got == status
  assert errors == f'prompt-tuning: {message}\n'


def test_an_error_that_is_not_the_users_keeps_its_traceback(run, train_flags, replaced):
  def train(*, model_dir, **others):
    raise RuntimeError('a bug')

  replaced(train)
  with pytest.raises(RuntimeError, match='a bug'):
    run(*train_flags)


# What reaches the command.


def test_flags_may_be_written_with_or_without_equals_sign(run, train_flags, replaced):
  seen = {}

  def train(*, model_dir, **others):
    seen.update(others)

  replaced(train)
  status, _, errors = run(
      *train_flags,
      '--gin.BATCH_SIZE',
      '8',
      '--gin.train.keep_checkpoints=2',
      '--tfds_data_dir=/data',
  )
  assert status == 0, errors
  assert seen['batch_size'] == 8
  assert seen['keep_checkpoints'] == 2
  assert seen['tfds_data_dir'] == '/data'


def test_a_run_is_told_the_command_that_made_it(run, train_flags, replaced):
  seen = []

  def train(*, model_dir, created_by='', **others):
    seen.append(created_by)

  replaced(train)
  run(*train_flags)
  assert seen[0].startswith('prompt-tuning train --gin.INITIAL_CHECKPOINT_PATH=')


@pytest.mark.filterwarnings('default')
def test_a_flag_without_effect_is_noted_and_a_warning_is_one_line(
    run, train_flags, replaced
):
  def train(*, model_dir, **others):
    warnings.warn('3 of 4 targets are cut.', stacklevel=2)

  replaced(train)
  _, _, errors = run(*train_flags, '--gin.PROMPT_TEXT=what is it')
  assert errors.splitlines() == [
      'prompt-tuning: note: PROMPT_TEXT is set, but nothing in this run uses it.',
      'prompt-tuning: warning: 3 of 4 targets are cut.',
  ]


def test_a_function_that_nothing_uses_is_noted_like_a_macro(run, train_flags, replaced):
  replaced(lambda *, model_dir, **others: None)
  _, _, errors = run(
      *train_flags, '--gin.adamw.weight_decay=0.1', "--gin.Decoding.strategy='beam'"
  )
  assert errors.splitlines() == [
      'prompt-tuning: note: adamw.weight_decay is set, but nothing in this run uses adamw.',
      'prompt-tuning: note: Decoding.strategy is set, but nothing in this run uses Decoding. '
      'Set DECODING=@Decoding() as well.',
  ]


@pytest.mark.parametrize('command', ['train', 'evaluate', 'infer'])
def test_decoding_can_be_chosen_wherever_text_is_generated(
    command, run, train_flags, monkeypatch
):
  seen = {}

  def function(*, decoding, **others):
    seen['decoding'] = decoding

  monkeypatch.setattr(registry, 'command_function', lambda name: function)
  flags = [f for f in train_flags[1:] if command == 'train' or 'MODEL_DIR' not in f]
  method = [] if command == 'infer' else ['--gin.EVAL_METHOD=generate']
  if command == 'infer':
    flags = [*[f for f in flags if 'TASK' not in f], 'a text']
  status, _, errors = run(command, *flags, *method)
  assert (status, errors) == (0, '')
  assert seen['decoding'] == (Decoding(max_length=None) if command == 'infer' else None)
  beam = ['--gin.DECODING=@Decoding()', "--gin.Decoding.strategy='beam'"]
  status, _, errors = run(command, *flags, *method, *beam)
  assert (status, errors) == (0, '')
  # The longest answer is as long as the targets, of which `infer` asks the prompt.
  longest = None if command == 'infer' else 4
  assert seen['decoding'] == Decoding(strategy='beam', max_length=longest)
  if command != 'infer':
    _, _, errors = run(command, *flags, *beam)
    assert "DECODING is set, but EVAL_METHOD='rank' ranks" in errors


# Dry runs.


def test_a_dry_run_of_training_counts_without_loading_or_writing(
    run, train_flags, tmp_path, monkeypatch
):
  def refuse(self):
    raise AssertionError('a dry run must not load weights')

  monkeypatch.setattr(Backbone, 'params', property(refuse))
  status, printed, errors = run(
      *train_flags,
      '--gin_file=class_labels',
      "--gin.CLASS_LABELS=['animal', 'plant']",
      '--gin.PROMPT_LENGTH=5',
      '--dry_run',
  )
  assert status == 0, errors
  assert 'SoftPrompt, Injection(virtual_embeddings 5×16 float32), 80 parameters train' in printed
  assert 'BATCH_SIZE = 32' in printed
  assert not (tmp_path / 'run').exists()


def test_a_dry_run_of_pretraining_reads_no_text_but_knows_that_it_is_there(run, tmp_path):
  flags = [
      'pretrain',
      '--gin_file=t5_1_1_small',
      f'--gin.MODEL_DIR={tmp_path}/run',
      f'--gin.VOCABULARY={saved_backbone.VOCABULARY}',
      "--gin.TEXT_FILES=['text.txt']",
      f'--gin.CACHE_DIR={tmp_path}/cache',
      '--dry_run',
  ]
  status, _, errors = run(*flags)
  assert status == 2
  assert 'No text file text.txt' in errors
  (tmp_path / 'text.txt').write_text('some words\n' * 10)
  status, printed, errors = run(*flags)
  assert status == 0, errors
  assert 'text: span_corruption of text.txt' in printed
  assert not (tmp_path / 'cache').exists()


# From end to end.


@pytest.mark.slow
def test_a_prompt_is_trained_resumed_evaluated_used_and_exported(
    run, backbone_dir, tmp_path, monkeypatch
):
  monkeypatch.setenv('PTJ_CACHE_DIR', str(tmp_path / 'cache'))
  model = [
      '--gin_file=demo',
      f'--gin.INITIAL_CHECKPOINT_PATH={backbone_dir}',
      '--gin.PROMPT_LENGTH=3',
      "--gin.TASK_FEATURE_LENGTHS={'inputs': 96, 'targets': 4}",
  ]
  training = [
      f'--gin.MODEL_DIR={tmp_path}/run',
      '--gin.TRAIN_STEPS_RELATIVE=3',
      '--gin.BATCH_SIZE=4',
  ]
  status, trained, errors = run('train', *model, *training)
  assert status == 0, errors
  assert trained.startswith(f'{tmp_path}/run/prompt.safetensors, step 3, accuracy ')
  accuracy = trained.split()[-1]

  # The configuration it kept is the run's: with it the run has nothing left to do.
  status, again, errors = run('train', f'--gin_file={tmp_path}/run/config.gin')
  assert (status, again) == (0, trained), errors
  # With another the folder is refused.
  status, _, errors = run('train', *model, *training, '--gin.RANDOM_SEED=1')
  assert status == 2
  assert 'random_seed' in errors
  assert 'RANDOM_SEED = 0' in (tmp_path / 'run' / 'config.gin').read_text()

  prompt_file = f'--gin.PROMPT_FILE={tmp_path}/run/prompt.safetensors'
  checkpoint = f'--gin.CHECKPOINT_PATH={tmp_path}/run'
  for what in (prompt_file, checkpoint, f'{checkpoint}/checkpoint_3'):
    status, printed, errors = run('evaluate', *model, what)
    assert status == 0, errors
    assert f'demo_gloss_category, validation: accuracy {accuracy} (' in printed
  status, _, errors = run('evaluate', *model, prompt_file, checkpoint)
  assert status == 2
  assert 'both set' in errors

  status, printed, errors = run(
      'infer', *model, prompt_file, 'definition: a dog', f'--gin.INFER_OUTPUT_DIR={tmp_path}'
  )
  assert status == 0, errors
  label, *scores = printed.strip().split('\t')
  assert scores[0].startswith(label) and len(scores) == 8
  (answer,) = map(json.loads, (tmp_path / 'inferences.jsonl').read_text().splitlines())
  assert answer['prediction'] == label == max(answer['scores'], key=answer['scores'].get)

  exported = tmp_path / 'exported.safetensors'
  status, printed, errors = run(
      'export', *model, checkpoint, f'--gin.PROMPT_FILE={exported}'
  )
  assert (status, printed) == (0, f'{exported}\n'), errors
  mine, theirs = load_prompt(exported), load_prompt(f'{tmp_path}/run/prompt.safetensors')
  np.testing.assert_array_equal(
      mine.injection.virtual_embeddings, theirs.injection.virtual_embeddings
  )
  assert dataclasses.replace(mine.manifest, created_by='') == dataclasses.replace(
      theirs.manifest, created_by=''
  )


@pytest.mark.slow
def test_a_task_of_files_is_trained_and_evaluated_by_gin_alone(
    run, backbone_dir, tmp_path, monkeypatch
):
  monkeypatch.setenv('PTJ_CACHE_DIR', str(tmp_path / 'cache'))
  # Neither seqio nor TensorFlow.
  monkeypatch.setattr('prompt_tuning_jax.data.cache.seqio_is_installed', lambda: False)
  (tmp_path / 'reviews').mkdir()
  rows = [(f'film {number} was {word}', label) for number in range(6) for word, label in
          (('a delight', 1), ('dull', 0), ('warm', 1))]
  for name, some in (('train', rows), ('dev', rows[::4])):
    lines = ['text\tlabel', *(f'{text}\t{label}' for text, label in some)]
    (tmp_path / 'reviews' / f'{name}.tsv').write_text('\n'.join(lines))
  model = [
      '--gin_file=custom_task',
      f'--gin.INITIAL_CHECKPOINT_PATH={backbone_dir}',
      '--gin.PROMPT_LENGTH=3',
  ]
  training = [
      f'--gin.MODEL_DIR={tmp_path}/run', '--gin.TRAIN_STEPS_RELATIVE=2', '--gin.BATCH_SIZE=4'
  ]
  status, shown, errors = run('tasks', *model, '--examples=1')
  assert (status, errors) == (0, '')
  assert shown.startswith("reviews, split 'train', 18 examples\n")

  status, trained, errors = run('train', *model, *training)
  assert status == 0, errors
  assert 'task       reviews, 18 examples' in errors
  accuracy, f1 = re.search(r'step 2, accuracy (\S+), f1 (\S+)\n', trained).groups()
  assert load_prompt(f'{tmp_path}/run/prompt.safetensors').manifest.task == 'reviews'
  prompt_file = f'--gin.PROMPT_FILE={tmp_path}/run/prompt.safetensors'
  status, printed, errors = run('evaluate', *model, prompt_file)
  assert status == 0, errors
  assert f'reviews, validation: accuracy {accuracy}, f1 {f1} (5 examples)' in printed

  # The configuration it kept is the run's, and another task or other files are not.
  assert run('train', f'--gin_file={tmp_path}/run/config.gin')[:2] == (0, trained)
  status, _, errors = run('train', *model, *training, '--gin.FileTask.inputs={text}')
  assert status == 2
  assert "file_task.inputs: 'review: {text}' there, '{text}' here" in errors
  path = tmp_path / 'reviews' / 'train.tsv'
  path.write_text(path.read_text().replace('dull', 'flat'))
  status, _, errors = run('train', *model, *training)
  assert status == 2
  assert 'files.0: ' in errors


@pytest.mark.slow
def test_a_backbone_is_pretrained_and_adapted(run, tmp_path):
  (tmp_path / 'text.txt').write_text('a few words about animals and plants\n' * 200)
  (tmp_path / 'sizes.gin').write_text(
      'MODEL_CONFIG = @T5Config()\nT5Config.vocab_size = 4224\nT5Config.d_model = 16\n'
      'T5Config.num_heads = 2\nT5Config.d_kv = 8\nT5Config.d_ff = 32\n'
      'T5Config.num_encoder_layers = 1\nT5Config.num_decoder_layers = 1\n'
  )
  shared = [
      "--gin.TEXT_FILES=['text.txt']",
      f'--gin.CACHE_DIR={tmp_path}/cache',
      '--gin.TRAIN_STEPS_RELATIVE=2',
      '--gin.BATCH_SIZE=4',
      '--gin.INPUT_LENGTH=16',
  ]
  vocabulary = f'--gin.VOCABULARY={saved_backbone.VOCABULARY}'
  status, printed, errors = run(
      'pretrain', '--gin_file=sizes', '--gin.MODEL_DIR=first', vocabulary, *shared
  )
  assert (status, printed) == (0, 'first/backbone\n'), errors
  assert 'trainable  ' in errors and 'component  text: span_corruption, 100 %' in errors
  status, printed, errors = run(
      'adapt',
      '--gin.MODEL_DIR=second',
      '--gin.INITIAL_CHECKPOINT_PATH=first/backbone',
      '--gin.TARGET_LENGTH=16',
      *shared,
  )
  assert (status, printed) == (0, 'second/backbone\n'), errors
  first, second = (load_backbone(f'{name}/backbone') for name in ('first', 'second'))
  assert first.spec == second.spec
  assert first.fingerprint != second.fingerprint
  assert second.vocabulary.fingerprint == first.vocabulary.fingerprint


def test_a_folder_without_saved_states_cannot_be_evaluated_or_exported(
    run, backbone_dir, tmp_path
):
  status, _, errors = run(
      'export',
      f'--gin.INITIAL_CHECKPOINT_PATH={backbone_dir}',
      f'--gin.CHECKPOINT_PATH={tmp_path}/nothing',
      '--gin.PROMPT_FILE=out.safetensors',
  )
  assert status == 2
  assert 'nothing holds no saved state' in errors


def test_the_demo_runs_in_the_folder_that_is_asked_for(monkeypatch, tmp_path):
  from prompt_tuning_jax import demo

  folders = []
  monkeypatch.setattr(demo, 'demo', folders.append)
  assert cli.main(['demo', f'--model_dir={tmp_path}']) == 0
  assert cli.main(['demo']) == 0
  assert folders == [str(tmp_path), None]


def test_a_reader_who_has_enough_is_no_error():
  command = f'{sys.executable} -m prompt_tuning_jax tasks | head -n 1'
  result = subprocess.run(command, shell=True, capture_output=True, text=True)
  assert (result.stdout.count('\n'), result.stderr) == (1, '')
