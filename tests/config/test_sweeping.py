"""SWEEP in gin: every point is a configuration of its own."""

import pytest

from prompt_tuning_jax import config
from prompt_tuning_jax.config import ConfigError, building, sweeping
from prompt_tuning_jax.training.description import describe


def runs_of(flags, grid, files=()):
  with building.dry_run():
    return sweeping.runs_of(grid, files, flags)


def test_every_point_is_the_configuration_with_its_values(flags):
  grid = {'PROMPT_LENGTH': [1, 5], 'LEARNING_RATE': [0.3, 0.1], 'RANDOM_SEED': [7]}
  runs, notes = runs_of([*flags, 'BATCH_SIZE=4'], grid)
  assert not notes
  assert [run.name for run in runs] == [
      'PROMPT_LENGTH=1,LEARNING_RATE=0.3,RANDOM_SEED=7',
      'PROMPT_LENGTH=1,LEARNING_RATE=0.1,RANDOM_SEED=7',
      'PROMPT_LENGTH=5,LEARNING_RATE=0.3,RANDOM_SEED=7',
      'PROMPT_LENGTH=5,LEARNING_RATE=0.1,RANDOM_SEED=7',
  ]
  for run in runs:
    alone = config.parse(
        'train', bindings=[*flags, 'BATCH_SIZE=4', *(f'{n}={v}' for n, v in run.settings.items())]
    )
    with building.dry_run():
      expected = alone.kwargs()
    del expected['model_dir']
    assert expected['batch_size'] == 4 and expected['random_seed'] == 7
    for name, value in expected.items():
      if name != 'backbone':
        assert describe(run.arguments[name]) == describe(value), name
  # One copy of the weights.
  assert len({id(run.arguments['backbone']) for run in runs}) == 1


def test_some_names_are_gin_files(flags):
  grid = {'PROMPT_INIT': ['uniform', 'sampled_vocab'], 'METHOD': ['soft_prompt', 'model_tuning']}
  runs, _ = runs_of(flags, grid)
  assert [type(run.arguments['method']).__name__ for run in runs] == [
      'SoftPrompt', 'NoneType', 'SoftPrompt', 'NoneType',
  ]  # fmt: skip
  starts = [describe(runs[number].arguments['method'].prompt_init) for number in (0, 2)]
  assert 'uniform' in str(starts[0]) and 'sampled_vocab' in str(starts[1])


@pytest.mark.parametrize(
    ('grid', 'message'),
    [
        ({'PROMPT_LENGHT': [1]}, 'PROMPT_LENGHT=1 of SWEEP: .*there is no macro PROMPT_LENGHT'),
        ({'PROMPT_LENGTH': [1, 0]}, 'PROMPT_LENGTH=0 of SWEEP: .*PROMPT_LENGTH is 0'),
        ({'PROMPT_TEXT': ['a', 'b']}, 'SWEEP varies PROMPT_TEXT, but nothing in this run uses it'),
        ({'MODEL_DIR': ['a', 'b']}, 'that of the whole sweep'),
        ({'BATCH_SIZE': [4, 8]}, '--gin.BATCH_SIZE is set, and SWEEP varies BATCH_SIZE'),
        ({'PROMPT_INIT': ['unifrom']}, 'PROMPT_INIT=unifrom of SWEEP: .*unifrom'),
        ({'METHOD': [3]}, 'METHOD; the name of a file of gin/methods/ was expected: deep_prompt'),
        ({'PROMPT_LENGTH': 3}, 'a list of its values was expected'),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused(flags, grid, message):
  with pytest.raises((ConfigError, ValueError), match=message):
    runs_of([*flags, 'BATCH_SIZE=16'], grid)
