"""A sweep: a grid of runs, what each ends with, the table, and going on."""

import dataclasses
import json
import os
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax import initializers, plan
from prompt_tuning_jax.backbones.t5 import T5
from prompt_tuning_jax.checkpoints import native
from prompt_tuning_jax.checkpoints.load import load_backbone
from prompt_tuning_jax.data.file_task import FileTask
from prompt_tuning_jax.data.prompt_design import PromptDesign
from prompt_tuning_jax.evaluation.evaluate import evaluate
from prompt_tuning_jax.json_files import read_jsonl
from prompt_tuning_jax.methods.prefix import Prefix
from prompt_tuning_jax.methods.soft_prompt import SoftPrompt
from prompt_tuning_jax.prompt_files import load_prompt
from prompt_tuning_jax.sweep_report import SweepResult
from prompt_tuning_jax.training import loop, together
from prompt_tuning_jax.training import sweep as sweep_lib
from prompt_tuning_jax.training.optimizers import adafactor, adamw
from prompt_tuning_jax.training.sweep import sweep
from prompt_tuning_jax.training.sweep_runs import (
    SweepRun,
    announced,
    distinct,
    grid_points,
    programs_of,
    runs_of_grid,
)
from prompt_tuning_jax.training.train import train
from tests.conftest import assert_close
from tests.training.conftest import CONFIG, FEATURE_LENGTHS

GRID = {
    'method': {1: SoftPrompt(1), 4: SoftPrompt(4)},
    'random_seed': [0, 1],
}


@pytest.fixture
def settings(random_backbone, cache_dir):
  return dict(
      backbone=random_backbone,
      task='which_animal',
      trainable=adafactor(0.3),
      batch_size=16,
      feature_lengths=FEATURE_LENGTHS,
      cache_dir=cache_dir,
      train_steps=12,
      eval_period=4,
      best_metric='accuracy',
      log_period=4,
      progress=False,
  )


def test_a_grid_is_all_combinations():
  assert grid_points({'A': [1, 2], 'B': ['x', 'y']}) == [
      {'A': 1, 'B': 'x'}, {'A': 1, 'B': 'y'}, {'A': 2, 'B': 'x'}, {'A': 2, 'B': 'y'},
  ]  # fmt: skip
  for grid, message in (
      ({}, 'a dict of lists'),
      ([1], 'a dict of lists'),
      ({'A': 3}, r"such as \{'A': \[3\]\}"),
      ({'A': []}, 'a list of its values'),
      ({'A': [1, 2, 1]}, 'has the value 1 more than once'),
  ):
    with pytest.raises(ValueError, match=message):
      grid_points(grid)


def test_a_sweep_of_several_processes_is_refused(monkeypatch, tmp_path):
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  with pytest.raises(ValueError, match='A sweep runs in one process.* one of 2'):
    sweep({'random_seed': [0, 1]}, model_dir=str(tmp_path / 'sweep'))
  assert not list(tmp_path.iterdir())


def test_a_step_takes_as_many_runs_at_once_as_there_is_memory_for(monkeypatch):
  # A CPU gains nothing by more.
  assert together.runs_at_once(15, 32, 15, {}) == 1
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  for rows_that_fit, expected in ((1000, 15), (479, 8), (200, 4), (10, 1)):
    # What trains is there for each of the 15 runs, whichever are computed.
    target = types.SimpleNamespace(usable=15 + rows_that_fit)
    plan_here = lambda batch_size, advise: types.SimpleNamespace(
        total=1 + batch_size, state=1, target=target
    )
    monkeypatch.setattr(plan, 'plan_here', plan_here)
    assert together.runs_at_once(15, 32, 15, {}) == expected


@pytest.mark.slow
def test_every_run_ends_as_it_does_alone(settings, tmp_path):
  result = sweep(GRID, model_dir=str(tmp_path / 'sweep'), **settings)
  assert len(result.records) == 4
  for record in result.records:
    length, seed = record['settings'].values()
    expected = train(
        model_dir=str(tmp_path / record['run']),
        method=SoftPrompt(length),
        random_seed=seed,
        **settings,
    )
    assert record['together'] == 4 and record['stopped_at'] is None
    assert (record['step'], record['metrics']) == (expected.step, expected.metrics)
    prompt = load_prompt(tmp_path / 'sweep' / record['prompt'])
    assert_close(
        prompt.injection.virtual_embeddings, expected.prompt.injection.virtual_embeddings, 1e-4
    )
    assert prompt.manifest.metrics == expected.prompt.manifest.metrics
  # The table is of means over the seeds, and can be made from the results alone.
  means = {
      length: np.mean([r['metrics']['accuracy'] for r in result.records
                       if r['settings']['method'] == length])
      for length in (1, 4)
  }  # fmt: skip
  again = SweepResult.read(tmp_path / 'sweep')
  for cell, length in zip(again.cells(), (1, 4), strict=True):
    assert cell.settings == {'method': length} and cell.runs == 2
    assert f'{means[length]:.2f} ± ' in repr(again)
  assert (tmp_path / 'sweep' / 'table.md').read_text() == f'{result!r}\n'
  assert (tmp_path / 'sweep' / 'sweep.png').read_bytes().startswith(b'\x89PNG')
  # Each run has its curve.
  (folder,) = (tmp_path / 'sweep').glob('together_*')
  records = read_jsonl(folder / 'metrics.jsonl')
  name = result.records[0]['run']
  assert sum(f'{name}/train/loss_per_token' in record for record in records) == 3
  assert sum(f'eval/{name}/accuracy' in record for record in records) == 3


@pytest.mark.slow
def test_a_sweep_goes_on_where_it_stopped_and_grows(settings, tmp_path, monkeypatch):
  whole = sweep(GRID, model_dir=str(tmp_path / 'whole'), **settings)

  # Stopped in the middle, as by a signal.
  run = loop.run
  def stopped(*args, **kwargs):
    args = list(args)
    args[4] = loop.LoopConfig(7, args[4].log_period, args[4].eval_period, 0)
    run(*args, **kwargs)
    raise loop.Interrupted('stopped')
  monkeypatch.setattr(together.loop, 'run', stopped)
  with pytest.raises(loop.Interrupted):
    sweep(GRID, model_dir=str(tmp_path / 'parts'), **settings)
  monkeypatch.setattr(together.loop, 'run', run)
  resumed = sweep(GRID, model_dir=str(tmp_path / 'parts'), **settings)
  for one, other in zip(resumed.records, whole.records, strict=True):
    assert {**one, 'seconds': 0} == {**other, 'seconds': 0}
    for name in ('whole', 'parts'):
      assert (tmp_path / name / one['prompt']).exists()
    np.testing.assert_array_equal(
        *(load_prompt(tmp_path / name / one['prompt']).injection.virtual_embeddings
          for name in ('whole', 'parts'))
    )  # fmt: skip

  # Nothing is trained twice; a point more is trained alone.
  trained = []
  train_one = sweep_lib.train
  monkeypatch.setattr(sweep_lib, 'train', lambda **kw: trained.append(kw) or train_one(**kw))
  monkeypatch.setattr(together, 'train_together', None)
  assert sweep(GRID, model_dir=str(tmp_path / 'parts'), **settings).records == resumed.records
  assert not trained
  runs = runs_of_grid(GRID, settings)
  more = {**GRID, 'method': {**GRID['method'], 2: SoftPrompt(2)}, 'random_seed': [0]}
  with pytest.warns(UserWarning, match='of 2 other points, such as method=1,random_seed=1'):
    grown = sweep(more, model_dir=str(tmp_path / 'parts'), **settings)
  assert len(trained) == 1 and len(grown.records) == 3 and len(runs) == 4

  # The same points with other settings are refused.
  with pytest.raises(ValueError, match='holds a result of .* with other settings'):
    sweep(GRID, model_dir=str(tmp_path / 'parts'), **{**settings, 'train_steps': 13})


@pytest.mark.slow
def test_what_lies_in_the_folder_of_a_run_is_its_own_only_where_its_state_is(settings, tmp_path):
  folder = tmp_path / 'sweep'
  before = sweep(GRID, model_dir=str(folder), **settings)
  os.unlink(folder / 'results.jsonl')
  # Other runs of the same names: their program, and so the place of its state, is another.
  grid = GRID | {'random_seed': [0, 1, 2]}
  after = sweep(grid, model_dir=str(folder), **settings | {'train_steps': 4})
  assert max(record['step'] for record in before.records) > 4
  assert {record['step'] for record in after.records} == {4}
  prompt = load_prompt(folder / after.records[0]['prompt'])
  assert prompt.manifest.step == 4


def test_points_that_are_the_same_run(settings):
  def runs(grid, **more):
    shared = {**settings, 'method': SoftPrompt(2), **more}
    return [SweepRun(point, {**shared, **point}) for point in grid_points(grid)]

  seeds = {'random_seed': [0, 1, 2]}
  assert len(distinct(runs(seeds))) == 3
  # No seed draws anything of a design without examples.
  of_design = runs(seeds, design=PromptDesign('yes, no: {inputs}'))
  assert distinct(of_design) == of_design[:1]
  of_design = runs({'design': [PromptDesign(seed=n) for n in range(2)]} | {'random_seed': [0]})
  with pytest.raises(ValueError, match='nothing in it depends on design'):
    distinct(of_design)
  with_examples = [PromptDesign(examples=1, seed=n) for n in range(2)]
  of_design = runs({'design': with_examples})
  assert distinct(of_design) == of_design
  with pytest.raises(ValueError, match='log_period=1 and log_period=2 are the same run: nothing'):
    distinct(runs({'log_period': [1, 2]}))
  with pytest.raises(ValueError, match='random_seed has the value 0 more than once'):
    runs_of_grid({'random_seed': [0, 0]}, settings)


@pytest.mark.slow
def test_what_cannot_share_a_program_runs_in_turn(settings, tmp_path):
  grid = {
      'method': {'prompt': SoftPrompt(2), 'longer': SoftPrompt(3), 'model': None},
  }
  settings = {**settings, 'trainable': adafactor(0.01), 'train_steps': 4}
  result = sweep(grid, model_dir=str(tmp_path), **settings)
  assert [record['together'] for record in result.records] == [2, 2, 1]
  assert (tmp_path / result.records[2]['prompt']).is_dir()


@pytest.mark.slow
def test_a_run_out_of_bounds_is_part_of_the_results(settings, tmp_path):
  rate = lambda step: jnp.where(step < 6, 0.1, jnp.nan)
  grid = {'trainable': {'0.3': adafactor(0.3), 'too large': adafactor(rate)}}
  settings.pop('trainable')
  result = sweep(grid, model_dir=str(tmp_path), method=SoftPrompt(2), **settings)
  good, bad = result.records
  assert good['stopped_at'] is None and bad['stopped_at'] == 7
  # What it had at the evaluation before counts.
  assert bad['step'] == 4 and 'accuracy' in bad['metrics']
  assert 'Went out of bounds' in repr(result) and f'{bad["run"]} at step 7' in repr(result)
  json.loads((tmp_path / 'results.jsonl').read_text().splitlines()[0])


@pytest.mark.slow
@pytest.mark.parametrize('seeds', [[0], [0, 1]], ids=['alone', 'together'])
def test_where_no_run_goes_on_what_was_measured_before_counts(settings, tmp_path, seeds):
  rate = lambda step: jnp.where(step < 6, 0.1, jnp.nan)
  with pytest.warns(UserWarning, match='out of bounds'):
    result = sweep(
        {'random_seed': seeds}, model_dir=str(tmp_path), method=SoftPrompt(2),
        **settings | {'trainable': adafactor(rate), 'log_period': 1},
    )  # fmt: skip
  for record in result.records:
    assert (record['stopped_at'], record['step']) == (7, 4)
    prompt = load_prompt(tmp_path / record['prompt'])
    assert prompt.manifest.metrics == record['metrics']
    assert np.isfinite(prompt.injection.virtual_embeddings).all()


@pytest.mark.slow
@pytest.mark.parametrize('bad', [['nan'], ['nan', 'NaN'], ['0.3', 'nan']])
def test_a_run_that_stops_before_it_is_measured_has_no_score(settings, tmp_path, bad):
  rate = lambda step: jnp.where(step < 3, 0.1, jnp.nan)
  other = lambda step: jnp.where(step < 3, 0.2, jnp.nan)
  rates = {'nan': adafactor(rate), 'NaN': adafactor(other), '0.3': adafactor(0.3)}
  settings = settings | {'train_steps': 6, 'eval_period': 0, 'log_period': 1}
  settings.pop('trainable')
  with warnings.catch_warnings():
    warnings.simplefilter('ignore', UserWarning)  # Whoever looks at a table, sees it there.
    result = sweep(
        {'trainable': {name: rates[name] for name in bad}}, model_dir=str(tmp_path),
        method=SoftPrompt(2), **settings,
    )  # fmt: skip
  for record in result.records:
    if record['settings']['trainable'] == '0.3':
      assert record['step'] == 6 and record['metrics']
    else:
      assert (record['stopped_at'], record['step'], record['prompt']) == (4, None, None)
      assert record['metrics'] == {}


@pytest.mark.slow
def test_a_start_that_is_not_finite_ends_that_run_alone(settings, tmp_path):
  grid = {'method': {
      'good': SoftPrompt(2),
      'bad': SoftPrompt(2, prompt_init=initializers.uniform(3e38)),
  }}  # fmt: skip
  settings = settings | {'train_steps': 4}
  good, bad = sweep(grid, model_dir=str(tmp_path / 'both'), **settings).records
  assert good['stopped_at'] is None and good['step'] == 4
  assert (bad['stopped_at'], bad['step'], bad['prompt']) == (1, None, None)
  alone = sweep({'method': {'good': SoftPrompt(2)}}, model_dir=str(tmp_path / 'alone'), **settings)
  assert alone.records[0]['metrics'] == good['metrics']
  with pytest.raises(FloatingPointError, match='Step 1 went out of bounds: its loss is nan'):
    train(method=grid['method']['bad'], model_dir=str(tmp_path / 'bad'), **settings)
  # An update may spoil the prompt after the last loss that is known.
  settings['trainable'] = adafactor(lambda step: jnp.where(step < 3, 0.1, jnp.nan))
  with pytest.raises(FloatingPointError, match='Step 4 went out of bounds: what it trains is not'):
    train(method=SoftPrompt(2), model_dir=str(tmp_path / 'last'), **settings)


@pytest.mark.slow
def test_a_sweep_that_was_stopped_and_got_more_points_goes_on_with_what_had_begun(
    settings, tmp_path, monkeypatch
):
  def stopped(*args, saver, **kwargs):
    run(*args[:4], loop.LoopConfig(4, 4, 4, 0), saver=saver, **kwargs)
    raise loop.Interrupted('stopped')

  run = loop.run
  folder = str(tmp_path)
  monkeypatch.setattr(together.loop, 'run', stopped)
  with pytest.raises(loop.Interrupted):
    sweep(GRID, model_dir=folder, **settings)
  begun = []

  def begin(*args, saver, template, **kwargs):
    latest = saver.latest()
    begun.append((template.stopped_at.size, latest.step if latest else 0))
    return run(*args, saver=saver, template=template, **kwargs)

  monkeypatch.setattr(together.loop, 'run', begin)
  result = sweep({**GRID, 'random_seed': [0, 1, 2]}, model_dir=folder, **settings)
  assert begun == [(4, 4), (2, 0)]
  assert [record['together'] for record in result.records] == [4] * 4 + [2] * 2


def test_all_runs_and_their_data_are_looked_at_before_one_is_trained(
    settings, tmp_path, monkeypatch
):
  for module, name in ((sweep_lib, 'train'), (together, 'train_together')):
    monkeypatch.setattr(module, name, None)
  settings.pop('best_metric')
  grid = {'best_metric': ['accuracy', 'acuracy']}
  with pytest.raises(ValueError, match="'acuracy', which .* Did you mean 'accuracy'"):
    sweep(grid, model_dir=str(tmp_path), method=SoftPrompt(1), **settings)
  settings.pop('task')
  with pytest.raises(ValueError, match='which_anmal'):
    sweep(
        {'task': ['which_animal', 'which_anmal']}, model_dir=str(tmp_path),
        method=SoftPrompt(1), **settings,
    )  # fmt: skip


@pytest.mark.slow
def test_results_of_files_that_were_edited_since_are_refused(settings, tmp_path):
  path = tmp_path / 'films.tsv'
  path.write_text('text\tlabel\n' + 'a red cat\tyes\na blue dog\tno\n' * 8)
  task = FileTask('films', {'train': path, 'validation': path}, 'text', 'label')
  settings = settings | {'task': task, 'train_steps': 1, 'method': SoftPrompt(1)}
  settings['cache_dir'] = str(tmp_path / 'cache')
  folder = str(tmp_path / 'sweep')
  before = sweep({'random_seed': [0]}, model_dir=folder, **settings)
  again = sweep({'random_seed': [0]}, model_dir=folder, **settings)
  assert again.records == before.records
  path.write_text('text\tlabel\n' + 'a red cat\tno\na blue dog\tyes\n' * 8)
  with pytest.raises(ValueError, match='(?s)holds a result of random_seed=0 .*files'):
    sweep({'random_seed': [0, 1]}, model_dir=folder, **settings)


@pytest.mark.slow
def test_results_of_other_points_are_not_in_the_table(settings, tmp_path):
  settings = settings | {'train_steps': 2, 'eval_period': 0, 'method': SoftPrompt(1)}
  sweep({'random_seed': [0]}, model_dir=str(tmp_path), **settings)
  with pytest.warns(UserWarning, match='results of 1 other points, such as random_seed=0'):
    other = sweep({'random_seed': [1]}, model_dir=str(tmp_path), **settings)
  assert [record['run'] for record in other.records] == ['random_seed=1']
  assert len(SweepResult.read(tmp_path).records) == 2
  with pytest.raises(ValueError, match='(?s)with other settings.*train_steps: 2 there, 3 here'):
    sweep({'random_seed': [0]}, model_dir=str(tmp_path), **settings | {'train_steps': 3})


@pytest.mark.slow
def test_models_of_several_sizes_and_methods_in_one_sweep(settings, cache_dir, tmp_path):
  # Prompt tuning of each size in a program of its own; a design is evaluated as it is.
  for number, width in enumerate((16, 24)):
    config = dataclasses.replace(CONFIG, d_model=width)
    native.save_backbone(
        tmp_path / f'{width}',
        config,
        jax.jit(T5(config).init_params)(jax.random.key(number)),
        settings['backbone'].vocabulary,
        dtype='float32',
    )
  settings = {**settings, 'train_steps': 4, 'eval_period': 0}
  del settings['backbone']
  design = PromptDesign('yes, no: {inputs}')
  backbones = {width: load_backbone(tmp_path / f'{width}') for width in (16, 24)}
  grid = {
      'backbone': {width: str(tmp_path / f'{width}') for width in backbones},
      'design': {'prompt tuning': None, 'prompt design': design},
      'random_seed': [0, 1],
  }
  result = sweep(grid, model_dir=str(tmp_path / 'sweep'), method=SoftPrompt(2), **settings)
  # No seed draws anything of the design: it is there once.
  assert [record['together'] for record in result.records] == [2, 2, 1, 2, 2, 1]
  for record in result.records:
    width, how, seed = record['settings'].values()
    assert record['parameters'] == backbones[width].num_params
    if how == 'prompt design':
      expected = evaluate(
          backbones[width], None, 'which_animal', design=design, cache_dir=cache_dir,
          feature_lengths=FEATURE_LENGTHS, progress=False,
      )  # fmt: skip
      assert record['prompt'] is None and record['step'] == 0
      assert record['metrics'] == expected.metrics
      continue
    alone = train(
        model_dir=str(tmp_path / record['run']),
        backbone=backbones[width],
        method=SoftPrompt(2),
        random_seed=seed,
        **settings,
    )
    assert record['metrics'] == alone.metrics
    prompt = load_prompt(tmp_path / 'sweep' / record['prompt'])
    assert_close(
        prompt.injection.virtual_embeddings, alone.prompt.injection.virtual_embeddings, 1e-4
    )
  assert result.sizes('backbone') == {
      width: backbone.num_params for width, backbone in backbones.items()
  }
  # What the design says is part of what was evaluated, what trains is not.
  again = {**settings, 'trainable': adafactor(0.1)}
  design_alone = {**grid, 'design': {'prompt design': design}}
  with pytest.warns(UserWarning, match='of 4 other points'):
    sweep(design_alone, model_dir=str(tmp_path / 'sweep'), method=SoftPrompt(2), **again)
  with pytest.raises(ValueError, match='holds a result of .* with other settings'):
    sweep(
        {**grid, 'design': {'prompt design': PromptDesign('{inputs}')}},
        model_dir=str(tmp_path / 'sweep'),
        method=SoftPrompt(2),
        **settings,
    )


@pytest.mark.slow
def test_runs_behind_a_sentinel_end_as_they_do_alone(settings, tmp_path):
  settings = {**settings, 'train_steps': 8, 'target_prefix': '<extra_id_0>'}
  result = sweep(GRID, model_dir=str(tmp_path / 'sweep'), **settings)
  record = result.records[3]
  length, seed = record['settings'].values()
  alone = train(
      model_dir=str(tmp_path / 'alone'), method=SoftPrompt(length), random_seed=seed, **settings
  )
  assert record['metrics'] == alone.metrics
  prompts = [load_prompt(tmp_path / 'sweep' / record['prompt']), alone.prompt]
  rows = [prompt.injection.virtual_embeddings for prompt in prompts]
  assert_close(*rows, 1e-4)
  assert {prompt.manifest.target_prefix for prompt in prompts} == {'<extra_id_0>'}
  # Evaluated by itself a prompt is scored as it was in training.
  for prompt in prompts:
    found = evaluate(
        settings['backbone'],
        prompt,
        'which_animal',
        cache_dir=settings['cache_dir'],
        progress=False,
    )
    assert found.metrics == alone.metrics
  plain = train(
      model_dir=str(tmp_path / 'plain'),
      method=SoftPrompt(length),
      random_seed=seed,
      **{**settings, 'target_prefix': None},
  )
  assert np.abs(rows[1] - plain.prompt.injection.virtual_embeddings).max() > 1e-3


def test_a_sweep_says_what_makes_no_sense(settings, tmp_path):
  with pytest.raises(ValueError, match='cannot be trained: .*prompt_lenght'):
    sweep({'prompt_lenght': [1, 2]}, model_dir=str(tmp_path), **settings)
  with pytest.raises(FileNotFoundError, match='holds no results'):
    SweepResult.read(tmp_path)
  deep = {'method': {'a': Prefix(2, hidden=None), 'b': Prefix(3, hidden=None)}}
  runs = runs_of_grid(deep, {**settings, 'trainable': adamw(1e-2)})
  assert 'alone: method=a' in announced(programs_of(runs))
