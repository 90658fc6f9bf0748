"""The command line: flags, help, errors, and what is left in a run's folder."""

from __future__ import annotations

import warnings

import gin
import jax
import pytest

import prompt_tuning_jax
from prompt_tuning_jax import cli, commands, registry
from prompt_tuning_jax.backbones.backbone import Backbone
from prompt_tuning_jax.training.loop import Interrupted
from tests import saved_backbone


@pytest.fixture(scope='module')
def backbone_dir(tmp_path_factory):
  return saved_backbone.save(tmp_path_factory.mktemp('backbone') / 'tiny')


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  yield
  gin.clear_config()


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
      f'--gin.INITIAL_CHECKPOINT_PATH={backbone_dir}',
      f'--gin.MODEL_DIR={tmp_path}/run',
      '--gin.MIXTURE_OR_TASK_NAME=demo_gloss_category',
      "--gin.TASK_FEATURE_LENGTHS={'inputs': 16, 'targets': 4}",
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
  assert all(f'\n  {name} ' in printed for name in [*registry.commands(), 'demo'])


def test_the_version_is_the_packages(run):
  assert run('--version') == (0, f'{prompt_tuning_jax.__version__}\n', '')


@pytest.mark.parametrize('command', registry.commands())
def test_help_of_a_command_lists_its_macros_and_the_recipes(capsys, command):
  with pytest.raises(SystemExit) as stop:
    cli.main([command, '--help'])
  printed = capsys.readouterr().out
  assert stop.value.code == 0
  assert '--gin_file' in printed and 'demo' in printed
  assert 'INITIAL_CHECKPOINT_PATH' in printed or command == 'pretrain'


# Errors.


@pytest.mark.parametrize(
    ('argv', 'answer'),
    [
        (['tarin'], 'Did you mean train?'),
        (['train', '--gin_files=x'], 'Did you mean --gin_file?'),
        (['train', '--gin_file=demmo'], 'Did you mean recipes/demo.gin?'),
        (['train', 'demo'], "unknown argument 'demo'"),
        (['train', '--process_count=2'], '--coordinator_address, --process_index missing'),
        (['train', '--process_count=two'], 'invalid int value'),
        (['train'], 'MODEL_DIR: folder of the run'),
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
      '5',
      '--gin.train.keep_checkpoints=2',
      '--tfds_data_dir=/data',
  )
  assert status == 0, errors
  assert seen['batch_size'] == 5
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


def test_processes_are_joined_before_anything_else(run, monkeypatch):
  seen = []
  monkeypatch.setattr(jax.distributed, 'initialize', lambda *args: seen.append(args))
  status, _, _ = run(
      'train', '--coordinator_address=here:1', '--process_count=2', '--process_index=1'
  )
  assert status == 2, 'nothing was configured'
  assert seen == [('here:1', 2, 1)]


# The configuration in the folder of a run.


def _config(folder):
  return (folder / 'config.gin').read_text()


def test_a_new_run_has_its_configuration_from_the_start(tmp_path):
  with commands.kept_config(str(tmp_path / 'run'), 'A = 1\n'):
    assert _config(tmp_path / 'run') == 'A = 1\n'


def test_a_refused_run_leaves_the_configuration_of_the_one_before(tmp_path):
  (tmp_path / 'run.json').write_text('{}')
  (tmp_path / 'config.gin').write_text('A = 1\n')
  with pytest.raises(ValueError), commands.kept_config(str(tmp_path), 'A = 2\n'):
    raise ValueError('MODEL_DIR holds another run')
  assert _config(tmp_path) == 'A = 1\n'


def test_a_resumed_run_that_ends_well_leaves_its_configuration(tmp_path):
  (tmp_path / 'run.json').write_text('{}')
  (tmp_path / 'config.gin').write_text('A = 1\n')
  with commands.kept_config(str(tmp_path), 'A = 2\n'):
    assert _config(tmp_path) == 'A = 1\n'
  assert _config(tmp_path) == 'A = 2\n'


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
  assert '5 virtual tokens, 80 parameters' in printed
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
