"""Gin files, macros and flags: what is found, who wins, what is refused."""

from __future__ import annotations

import inspect
import re

import gin
import jax
import numpy as np
import pytest

from prompt_tuning_jax import config, initializers
from prompt_tuning_jax.config import registry
from prompt_tuning_jax.config.macros import MACROS
from prompt_tuning_jax.methods.soft_prompt import SoftPrompt
from prompt_tuning_jax.training import optimizers
from tests.config.conftest import file_names

# Who wins.


def test_later_files_win_over_earlier_and_flags_over_files(tmp_path, flags):
  (tmp_path / 'one.gin').write_text('BATCH_SIZE = 1\nRANDOM_SEED = 1\n')
  (tmp_path / 'two.gin').write_text('BATCH_SIZE = 2\nRANDOM_SEED = 2\n')
  kwargs = config.parse('train', ['one', 'two'], [*flags, 'RANDOM_SEED=3']).kwargs()
  assert (kwargs['batch_size'], kwargs['random_seed']) == (2, 3)
  assert config.parse('train', ['two', 'one'], flags).kwargs()['batch_size'] == 1


def test_the_place_of_a_commands_defaults_does_not_matter(tmp_path, flags):
  (tmp_path / 'recipe.gin').write_text(
      "include 'initializers/class_labels.gin'\nCLASS_LABELS = ['a']\nBATCH_SIZE = 2\n"
  )
  texts = []
  for files in (['recipe'], ['runs/train', 'recipe'], ['recipe', 'runs/train.gin']):
    parsed = config.parse('train', files, flags)
    parsed.kwargs()
    texts.append(parsed.operative())
  assert texts[0] == texts[1] == texts[2]
  assert 'class_labels' in texts[0]


def test_a_file_is_included_once_but_a_file_named_by_the_user_counts_where_it_stands(
    tmp_path, flags
):
  (tmp_path / 'recipe.gin').write_text(
      "include 'initializers/sampled_vocab.gin'\n"
      "include 'initializers/sampled_vocab.gin'\nsampled_vocab.population = 10\n"
  )
  parsed = config.parse('train', ['recipe'], flags)
  assert file_names(parsed).count('initializers/sampled_vocab.gin') == 1
  parsed = config.parse('train', ['recipe', 'initializers/uniform'], flags)
  parsed.kwargs()
  assert 'prompt_init = @uniform()' in parsed.operative()


def test_parsing_again_forgets_what_was_set_before(flags):
  config.parse('train', (), [*flags, 'BATCH_SIZE=1'])
  assert config.parse('train', (), flags).kwargs()['batch_size'] == 32


# Values.


@pytest.mark.parametrize('value', ['/data/run-1', "'/data/run-1'", '"/data/run-1"'])
def test_a_text_from_a_flag_may_leave_out_its_quotes(value, flags):
  kwargs = config.parse('train', (), [*flags, f'MODEL_DIR={value}']).kwargs()
  assert kwargs['model_dir'] == '/data/run-1'


def test_a_parameter_that_is_a_text_may_leave_out_its_quotes_too(flags):
  values = ['train.best_mode=min', 'LossConfig.normalizing_factor=5', 'train.eval_task=7']
  kwargs = config.parse('train', (), [*flags, *values]).kwargs()
  assert (kwargs['best_mode'], kwargs['eval_task']) == ('min', '7')
  assert kwargs['loss'].normalizing_factor == 5


def test_flags_set_functions_scopes_and_references(flags):
  kwargs = config.parse(
      'train',
      (),
      [
          *flags,
          'train.keep_checkpoints=4',
          'PROMPT/SoftPrompt.length=3',
          'LEARNING_RATE=@optax.cosine_decay_schedule()',
          'optax.cosine_decay_schedule.init_value=0.5',
          'optax.cosine_decay_schedule.decay_steps=10',
      ],
  ).kwargs()
  assert kwargs['keep_checkpoints'] == 4
  assert kwargs['method'].length == 3


def test_a_value_that_cannot_be_read_is_refused_with_the_right_spelling(flags):
  with pytest.raises(config.ConfigError) as error:
    config.parse('train', (), [*flags, 'CLASS_LABELS=good'])
  assert 'Cannot read --gin.CLASS_LABELS=good: expected a list of texts' in str(error.value)
  assert '--gin.CLASS_LABELS="[\'positive\', \'negative\']"' in str(error.value)
  with pytest.raises(config.ConfigError, match=r'quotes: --gin.optax.sgd.nesterov="\'no\'"'):
    config.parse('train', (), [*flags, 'optax.sgd.nesterov=no'])
  with pytest.raises(config.ConfigError, match=r'Cannot read --gin.CLASS_LABELS=\[1, \(2: expect'):
    config.parse('train', (), [*flags, 'CLASS_LABELS=[1, (2'])
  with pytest.raises(config.ConfigError, match='optax.sgd.nesterov={1: a bracket is not closed'):
    config.parse('train', (), [*flags, 'optax.sgd.nesterov={1'])
  with pytest.raises(config.ConfigError, match='has no value'):
    config.parse('train', (), [*flags, 'BATCH_SIZE='])
  with pytest.raises(config.ConfigError, match='expected --gin.NAME=VALUE'):
    config.parse('train', (), [*flags, 'BATCH_SIZE'])


def test_a_syntax_error_in_a_file_names_file_and_line(tmp_path, flags):
  (tmp_path / 'broken.gin').write_text('BATCH_SIZE = 2\nRANDOM_SEED = seven\n')
  with pytest.raises(config.ConfigError, match=r'broken\.gin, line 2'):
    config.parse('train', ['broken'], flags)


# Names.


def test_an_unknown_macro_is_answered_with_the_nearest(flags):
  with pytest.raises(config.ConfigError, match='Did you mean PROMPT_LENGTH'):
    config.parse('train', (), [*flags, 'PROMT_LENGTH=3'])


def test_a_misspelt_macro_in_a_file_is_refused_too(tmp_path, flags):
  (tmp_path / 'mine.gin').write_text('PROMT_LENGTH = 3\n')
  with pytest.raises(config.ConfigError, match='Did you mean PROMPT_LENGTH'):
    config.parse('train', ['mine'], flags)


def test_a_users_own_macro_may_be_set_from_a_flag(tmp_path, flags):
  (tmp_path / 'mine.gin').write_text('train.batch_size = %MY_ROWS\n')
  kwargs = config.parse('train', ['mine'], [*flags, 'MY_ROWS=6']).kwargs()
  assert kwargs['batch_size'] == 6


def test_a_macro_of_t5x_that_has_no_place_here_is_explained(flags):
  with pytest.raises(config.ConfigError, match='always cached'):
    config.parse('train', (), [*flags, 'USE_CACHED_TASKS=False'])


def test_a_flag_that_nothing_reads_is_noted(flags):
  parsed = config.parse('train', (), [*flags, "CLASS_LABELS=['a']"])
  assert parsed.notes == ('CLASS_LABELS is set, but nothing in this run uses it.',)
  (note,) = config.parse('train', ['demo'], [*flags, 'TRAIN_STEPS=1_130_000']).notes
  assert 'Set TRAIN_STEPS_RELATIVE, ' in note and '--gin_file=t5x_exact' in note
  assert config.parse('train', (), flags).notes == ()


def test_missing_macros_are_all_named_with_their_meaning():
  with pytest.raises(config.ConfigError) as error:
    config.parse('train', ['initializers/class_labels'], ['MODEL_DIR=/tmp/run'])
  message = str(error.value)
  for name in (
      'MIXTURE_OR_TASK_NAME',
      'TASK_FEATURE_LENGTHS',
      'INITIAL_CHECKPOINT_PATH',
      'CLASS_LABELS',
  ):
    assert f'{name}: {MACROS[name].meaning}' in message
  assert 'MODEL_DIR:' not in message


def test_a_macro_required_by_t5xs_own_spelling_is_missing_until_it_is_set(tmp_path, flags):
  (tmp_path / 'mine.gin').write_text('BATCH_SIZE = %gin.REQUIRED\n')
  with pytest.raises(config.ConfigError, match='BATCH_SIZE'):
    config.parse('train', ['mine'], flags)
  assert config.parse('train', ['mine'], [*flags, 'BATCH_SIZE=2']).kwargs()['batch_size'] == 2


@pytest.mark.parametrize(
    ('binding', 'nearest'),
    [
        ('SoftPromt.length=3', 'Did you mean SoftPrompt'),
        ('SoftPrompt.lenght=3', 'Did you mean length'),
        ('PROMPT=@SoftPromt()', 'Did you mean SoftPrompt'),
        ('train.batchsize=3', 'Did you mean batch_size'),
        ('train.xyz=3', 'It has backbone'),
        ('PROMPT=@xyz()', 'Functions of this library'),
    ],
)
def test_unknown_functions_and_parameters_are_answered_with_the_nearest(
    binding, nearest, flags
):
  with pytest.raises(config.ConfigError, match=nearest):
    config.parse('train', (), [*flags, binding])


def test_an_unknown_command_is_answered_with_the_nearest():
  with pytest.raises(config.ConfigError, match='Did you mean train'):
    config.parse('trian')


# What is built.


def test_everything_that_asks_for_the_backbone_gets_the_same_one(flags, backbone_dir):
  kwargs = config.parse(
      'train', ['initializers/class_labels'], [*flags, "CLASS_LABELS=['animal']"]
  ).kwargs()
  backbone, method = kwargs['backbone'], kwargs['method']
  assert 'params' not in vars(backbone), 'building the run must not load weights'
  prompt = method.init(jax.random.key(0), backbone.spec)['params']['prompt']
  assert 'params' in vars(backbone), 'the initialiser read the embeddings of another backbone'
  token = backbone.vocabulary.encode('animal')
  expected = np.asarray(backbone.embedding_VD)[token].mean(axis=0)
  np.testing.assert_allclose(prompt[0], expected, rtol=1e-6)


def test_a_model_of_other_sizes_than_its_gin_file_is_refused(flags):
  with pytest.raises(ValueError, match='models/'):
    config.parse('train', ['models/t5_1_1_small'], flags).kwargs()


def test_t5x_exact_takes_the_original_codes_choices(flags):
  kwargs = config.parse('train', ['t5x_exact'], [*flags, 'TRAIN_STEPS=1_130_000']).kwargs()
  assert kwargs['train_steps'] == 30_000
  assert kwargs['batch_size'] == 128
  assert kwargs['lengths'] == 'pad'
  prompt = kwargs['method'].prompt_init(jax.random.key(0), (50, 16))
  assert 0 <= prompt.min() and 0.4 < prompt.max() < 0.5
  # From optimiser step 1,100,000 on every update has an RMS of exactly the learning rate.
  tx = kwargs['trainable']['prompt']
  gradient = 1e-3 * jax.random.normal(jax.random.key(1), (50, 16))
  update, _ = tx.update(gradient, tx.init(prompt), prompt)
  assert np.sqrt(np.mean(np.square(update))) == pytest.approx(0.3, rel=1e-3)


def test_absolute_steps_within_the_pretraining_are_refused(flags):
  with pytest.raises(config.ConfigError, match='TRAIN_STEPS=30,000 is not beyond'):
    config.parse('train', ['t5x_exact'], [*flags, 'TRAIN_STEPS=30_000']).kwargs()


def test_the_operative_config_builds_the_same_run_again(tmp_path, flags):
  first = config.parse(
      'train', ['initializers/class_labels'], [*flags, "CLASS_LABELS=['a']", 'BATCH_SIZE=3']
  )
  first.kwargs()
  text = first.operative()
  (tmp_path / 'config.gin').write_text(text)
  again = config.parse('train', ['config'])
  again.kwargs()
  assert again.operative() == text
  assert 'BATCH_SIZE = 3' in text


def test_the_core_functions_stay_free_of_gin(flags):
  config.parse('train', (), [*flags, 'uniform.scale=9.0', 'SoftPrompt.length=3'])
  prompt = initializers.uniform()(jax.random.key(0), (50, 16))
  assert abs(prompt).max() <= 0.5
  assert SoftPrompt().length == 100


def test_a_short_name_is_ours_and_optax_stays_reachable(flags):
  config.parse('train', (), flags)
  ours = gin.get_configurable('adafactor')
  assert inspect.signature(ours) == inspect.signature(optimizers.adafactor)
  kwargs = config.parse(
      'train',
      (),
      [*flags, "TRAINABLE={'prompt': @optax.sgd()}", 'optax.sgd.learning_rate=0.1'],
  ).kwargs()
  gradient = np.ones((2, 3), np.float32)
  tx = kwargs['trainable']['prompt']
  update, _ = tx.update(gradient, tx.init(gradient), gradient)
  np.testing.assert_allclose(update, -0.1 * gradient, rtol=1e-6)


def test_files_may_import_what_they_need(tmp_path, flags):
  (tmp_path / 'mine.gin').write_text(
      'from __gin__ import dynamic_registration\n'
      'import optax\n'
      'from prompt_tuning_jax import initializers\n'
      'optax.sgd.learning_rate = 0.25\n'
      "TRAINABLE = {'prompt': @optax.sgd()}\n"
  )
  kwargs = config.parse('train', ['mine'], flags).kwargs()
  gradient = np.ones((2, 3), np.float32)
  tx = kwargs['trainable']['prompt']
  update, _ = tx.update(gradient, tx.init(gradient), gradient)
  np.testing.assert_allclose(update, -0.25 * gradient, rtol=1e-6)
  parsed = config.parse('train', ['mine'], flags)
  parsed.kwargs()
  text = parsed.operative()
  (tmp_path / 'config.gin').write_text(text)
  again = config.parse('train', ['config'])
  again.kwargs()
  assert again.operative() == text


@pytest.mark.parametrize('name', registry.names())
def test_every_registered_function_has_a_docstring_and_settable_parameters(name):
  registry.register()
  function = gin.get_configurable(name)
  assert inspect.getdoc(function)
  assert registry.parameters(name)


def test_every_macro_in_the_packaged_files_has_a_meaning():
  used = set()
  for name in config.packaged_files():
    text = (config.gin_folder() / name).read_text()
    used |= set(re.findall(r'%([A-Z][A-Z_]+)', text))
    used |= set(re.findall(r'^([A-Z][A-Z_]+) =', text, re.MULTILINE))
  assert used <= set(MACROS)
