"""Macros hold what they are for: the wrong type or size is one message at the start."""

from __future__ import annotations

import gin
import pytest

from prompt_tuning_jax import config
from prompt_tuning_jax.config import errors, registry
from prompt_tuning_jax.config.macros import MACROS
from tests.config import conftest

NEEDED = [*conftest.NEEDED, 'INITIAL_CHECKPOINT_PATH=nano']


def _parse(*flags, files=(), command='train'):
  return config.parse(command, files, [*NEEDED, *flags])


def _value(name):
  return gin.query_parameter(f'{name}/macro.value')


@pytest.mark.parametrize(
    ('binding', 'expected'),
    [
        ('MODEL_DIR=None', 'a text'),
        ("MODEL_DIR=''", 'a text'),
        ("BATCH_SIZE='32'", 'a whole number, at least 1'),
        ('BATCH_SIZE=32.0', 'a whole number, at least 1'),
        ('BATCH_SIZE=0', 'a whole number, at least 1'),
        ('BATCH_SIZE=True', 'a whole number, at least 1'),
        ('TRAIN_STEPS_RELATIVE=1e5', 'a whole number, at least 1'),
        ('MICROBATCHES=-1', 'a whole number, at least 1'),
        ('EVAL_PERIOD=-1', 'a whole number, 0 or more'),
        ('PROMPT_LENGTH=0', 'a whole number, at least 1'),
        ('TASK_FEATURE_LENGTHS=72', "a dict with tokens, at least 1, for 'inputs' and"),
        ("TASK_FEATURE_LENGTHS={'inputs': 72}", "a dict with tokens, at least 1, for 'in"),
        ("TASK_FEATURE_LENGTHS={'inputs': 0, 'targets': 4}", 'a dict with tokens, at leas'),
        ('DROPOUT_RATE=1.5', 'a number from 0 to below 1'),
        ('DROPOUT_RATE=-1', 'a number from 0 to below 1'),
        ('LABEL_SMOOTHING=1', 'a number from 0 to below 1'),
        ('BACKBONE_STEPS=3', 'a list of whole numbers, 0 or more'),
        ('BACKBONE_STEPS=[3, -1]', 'a list of whole numbers, 0 or more'),
        ('ADAPTATION_STEPS=-1', 'a whole number, 0 or more'),
        ('TARGET_PREFIX=[]', 'a text'),
        ('Z_LOSS=-1e-4', 'a number, 0 or more'),
        ('Z_LOSS=1e999', 'a number, 0 or more'),
        ('LOSS_NORMALIZING_FACTOR=0', 'None, a number above 0, or'),
        ('LOSS_NORMALIZING_FACTOR=-1', 'None, a number above 0, or'),
        ('LOSS_NORMALIZING_FACTOR=1e999', 'None, a number above 0, or'),
        ("LEARNING_RATE='big'", 'a number, 0 or more, or a schedule'),
        ('RANDOM_SEED=None', 'a whole number from 0'),
        ('RANDOM_SEED=-1', 'a whole number from 0'),
        ('RANDOM_SEED=2**32', 'a whole number from 0'),
        ('CLASS_LABELS=[]', 'a list of texts'),
        ("CLASS_LABELS='yes'", 'a list of texts'),
        ("CLASS_LABELS=['yes', None]", 'a list of texts'),
        ("PROMPT='SoftPrompt'", 'what a function returns, with @ and ()'),
        ('PROMPT=@SoftPrompt', 'what a function returns, with @ and ()'),
        ("TRAINABLE={'prompt': @adafactor}", 'an optimiser with @ and (), or a dict'),
        ('TRAINABLE=0.3', 'an optimiser with @ and (), or a dict'),
        ('PLACEMENT=()', "a name such as 'prefix', or a template such as"),
        ('DTYPE=None', 'a text'),
        ('NUM_PARTITIONS=0', 'a whole number, at least 1'),
        ('PARAMETER_PARTITIONING_DIMS=3', '1 or 2'),
        ("LOGICAL_AXIS_RULES=[('embed',)]", 'a list with one pair for each logical axis'),
        ("LOGICAL_AXIS_RULES=[('mlp', 'model'), ('mlp', None)]", 'a list with one pair for each'),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_with_an_example(binding, expected):
  name, _, value = binding.partition('=')
  with pytest.raises(config.ConfigError) as error:
    _parse(binding.replace('2**32', str(2**32)))
  message = str(error.value)
  assert expected in message
  assert name in message and MACROS[name].meaning in message
  assert errors.example_flag(name) in message


def test_the_message_says_what_came_and_where_it_was_set(tmp_path):
  (tmp_path / 'mine.gin').write_text(
      "# Mine.\nBATCH_SIZE = 4\nEVAL_PERIOD = 'often'\nCLASS_LABELS = [\n    3,\n]\n"
  )
  with pytest.raises(config.ConfigError) as error:
    _parse('BATCH_SIZE=1.5', files=['mine'])
  first, third, second = str(error.value).splitlines()
  assert first.startswith('BATCH_SIZE is 1.5 (--gin.BATCH_SIZE), expected a whole')
  assert f"EVAL_PERIOD is 'often' ({tmp_path}/mine.gin, line 3), expected" in second
  assert 'EVAL_PERIOD = 1000 in a gin file' in second
  assert third.startswith('CLASS_LABELS is [3], expected')


def test_unseeded_runs_as_in_t5x_are_explained():
  with pytest.raises(config.ConfigError, match="always seeded here.* T5X's None"):
    _parse('RANDOM_SEED=None')


@pytest.mark.parametrize(
    ('binding', 'value'),
    [
        ('MODEL_DIR=2024', '2024'),
        ('MODEL_DIR=1e5', '1e5'),
        ("MODEL_DIR='2024'", '2024'),
        ('MODEL_DIR=2024-11-25', '2024-11-25'),
        ('MODEL_DIR=/tmp/run(1)', '/tmp/run(1)'),
        ("PROMPT_TEXT=what's it, then?", "what's it, then?"),
        ('PLACEMENT=suffix', 'suffix'),
        ("PLACEMENT=(3, 'inputs', 3)", (3, 'inputs', 3)),
        ("PLACEMENT={'template': [3, 'inputs']}", {'template': [3, 'inputs']}),
        ('PLACEMENT={3} {inputs} {3}', '{3} {inputs} {3}'),
        ('PLACEMENT="{3} {inputs}"', '{3} {inputs}'),
        ('PLACEMENT={inputs} so {3}', '{inputs} so {3}'),
        ('EVAL_TASK_NAME=None', None),
        ('LEARNING_RATE=1', 1),
        ('LOSS_NORMALIZING_FACTOR=233', 233),
    ],
)
def test_what_is_meant_is_taken(binding, value):
  _parse(binding)
  assert _value(binding.partition('=')[0]) == value


@pytest.mark.parametrize(
    'binding',
    [
        'LEARNING_RATE=@optax.cosine_decay_schedule()',
        'TRAIN_STEPS_RELATIVE=@steps_after()',
        'BATCH_SIZE=%EVAL_BATCH_SIZE',
        'PROMPT_LENGTH=@slots_of()',
        'PLACEMENT=@Template()',
        'TRAINABLE=@adamw()',
        'TRAINABLE=None',
        'PROMPT=None',
    ],
)
def test_what_a_function_or_another_macro_gives_is_left_to_whoever_receives_it(binding):
  _parse(binding)


def test_a_value_that_cannot_be_read_is_answered_without_pythons_innards():
  with pytest.raises(config.ConfigError) as error:
    _parse('LEARNING_RATE=big')
  message = str(error.value)
  assert 'Cannot read --gin.LEARNING_RATE=big: expected a number, 0 or more' in message
  assert '--gin.LEARNING_RATE=0.3' in message
  assert '0x' not in message and 'quotes' not in message and 'malformed' not in message


def test_a_value_in_a_file_that_cannot_be_read_names_no_address(tmp_path):
  (tmp_path / 'mine.gin').write_text('LEARNING_RATE = big\n')
  with pytest.raises(config.ConfigError, match=r'mine\.gin, line 1') as error:
    _parse(files=['mine'])
  assert '0x' not in str(error.value)


def test_a_typing_error_is_told_before_what_is_missing():
  with pytest.raises(config.ConfigError, match='Did you mean MODEL_DIR'):
    config.parse('train', (), ['MODEL_DR=/tmp/run'])


def test_every_value_in_the_packaged_files_is_of_its_kind():
  for name in config.packaged_files():
    config.parse('train', [name], [*NEEDED, 'TRAIN_STEPS=1_100_001', 'PROMPT_FILE=x.npy',
                                   'PROMPT_TEXT=a', "CLASS_LABELS=['a']"])


def test_the_examples_of_macros_are_of_their_kind():
  registry.register()
  for name, macro in MACROS.items():
    gin.parse_config(f'{name} = {macro.example}')
    value = _value(name)
    assert macro.allows(value), name
    assert isinstance(value, str) == macro.is_text, name
