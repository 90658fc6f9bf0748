"""SWEEP in gin: every point is a configuration of its own."""

import pytest

from prompt_tuning_jax import cli, config
from prompt_tuning_jax.config import ConfigError, building, sweeping
from prompt_tuning_jax.training.description import describe
from prompt_tuning_jax.training.sweep_runs import announced, programs_of
from tests import saved_backbone
from tests.config.conftest import NEEDED


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


def test_a_name_may_stand_for_several_settings(flags):
  grid = {
      'OBJECTIVE': {
          'as it is': {},
          'sentinel': {'TARGET_PREFIX': '<extra_id_0>', 'PROMPT_INIT': 'sampled_vocab'},
      },
      'PROMPT_LENGTH': [3],
  }
  runs, _ = runs_of(flags, grid)
  assert [run.settings for run in runs] == [
      {'OBJECTIVE': 'as it is', 'PROMPT_LENGTH': 3}, {'OBJECTIVE': 'sentinel', 'PROMPT_LENGTH': 3}
  ]  # fmt: skip
  assert [run.arguments['target_prefix'] for run in runs] == [None, '<extra_id_0>']
  starts = [str(describe(run.arguments['method'].prompt_init)) for run in runs]
  assert 'uniform' in starts[0] and 'sampled_vocab' in starts[1]
  # A run's folder is told from others by what a folder's name cannot hold.
  assert runs[0].name.startswith('OBJECTIVE=as_it_is,PROMPT_LENGTH=3-')


def test_a_prompt_design_is_a_run_in_which_nothing_trains(flags):
  design = {'METHOD': 'prompt_design', 'PromptDesign.examples': 0,
            'PromptDesign.template': 'yes, no {inputs}'}  # fmt: skip
  grid = {'METHOD': {'tuned': {}, 'model': {'METHOD': 'model_tuning'}, 'design': design},
          'RANDOM_SEED': [0, 3]}  # fmt: skip
  runs, notes = runs_of([*flags, 'LEARNING_RATE=0.1'], grid)
  assert not notes
  assert [run.design is not None for run in runs] == [False] * 4 + [True] * 2
  assert [run.design.seed for run in runs[4:]] == [0, 3]
  assert runs[4].design.template == 'yes, no {inputs}'
  assert runs[4].arguments['method'] is None
  # All of them name one copy of the weights, where they are held alike.
  assert runs[0].arguments['backbone'] is runs[4].arguments['backbone']
  assert runs[2].arguments['backbone'].param_dtype == 'float32'
  assert 'evaluated without training: METHOD=design' in announced(programs_of(runs))


def test_a_file_may_be_named_with_its_folder(flags):
  runs, _ = runs_of(flags, {'METHOD': ['soft_prompt', 'recipes/demo_prompt_design']})
  assert [run.design is None for run in runs] == [True, False]
  assert 'animal, body' in runs[1].design.template


def test_steps_of_adaptation_are_those_that_were_kept(tmp_path):
  folder = tmp_path / 'run'
  for steps in (0, 20):
    saved_backbone.save(folder / f'backbone_{steps}', seed=steps)
  saved_backbone.save(folder / 'backbone', seed=40)
  flags = [*NEEDED, f'INITIAL_CHECKPOINT_PATH={folder}/backbone']
  runs, _ = runs_of(flags, {'ADAPTATION_STEPS': [0, 20]})
  assert [run.arguments['backbone'].source for run in runs] == [
      str(folder / 'backbone_0'), str(folder / 'backbone_20')
  ]  # fmt: skip
  with pytest.raises(OSError, match='ADAPTATION_STEPS=30 of SWEEP: .*was not kept after so many'):
    runs_of(flags, {'ADAPTATION_STEPS': [0, 30]})


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
        ({'A': {'b': 3}}, "SWEEP has 3 for A, 'b'; a dict of settings was expected"),
        ({'A': {'b': {'PROMPT_LENGTH': 3}}, 'PROMPT_LENGTH': [1]},
         'Two names in SWEEP set PROMPT_LENGTH'),
        ({'A': {'b': {'PROMPT_LENGHT': 3}}}, 'A=b of SWEEP: .*there is no macro PROMPT_LENGHT'),
        ({'A': {'b': {'BATCH_SIZE': 3}}}, '--gin.BATCH_SIZE is set, and SWEEP varies BATCH_SIZE'),
        ({'A': {'b': {'MODEL_DIR': 'c'}}}, 'that of the whole sweep'),
        ({'MODEL': ['micro_7']}, "MODEL=micro_7 of SWEEP: .*No gin file 'models/micro_7'"),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused(flags, grid, message):
  with pytest.raises((ConfigError, ValueError), match=message):
    runs_of([*flags, 'BATCH_SIZE=16'], grid)


def test_a_dry_run_refuses_points_that_a_flag_makes_the_same(capsys):
  argv = ['sweep', '--gin_file=demo', '--dry_run', '--gin.MODEL_DIR=x']
  argv += ["--gin.SWEEP={'MODEL': ['pico', 'nano']}"]
  assert cli.main(argv) == 0
  assert cli.main([*argv, '--gin.INITIAL_CHECKPOINT_PATH=pico']) == 2
  assert 'MODEL=pico and MODEL=nano are the same run' in capsys.readouterr().err
  # Models that are not here are not the same for that.
  absent = "--gin.SWEEP={'MODEL': ['t5_1_1_base', 't5_1_1_lm100k_base']}"
  assert cli.main([*argv[:-1], absent]) == 0
