"""Gin files: where they are found, what they include, in which order they are read."""

from __future__ import annotations

import pytest

from prompt_tuning_jax import config
from tests.config.conftest import file_names

# Finding files.


@pytest.mark.parametrize('name', ['t5x_exact', 't5x_exact.gin', 'runs/t5x_exact'])
def test_a_packaged_file_is_found_without_folder_or_ending(name, flags):
  parsed = config.parse('train', [name], [*flags, 'TRAIN_STEPS=1_100_010'])
  assert 'runs/t5x_exact.gin' in file_names(parsed)


def test_files_are_looked_for_here_then_in_the_users_folders_then_in_the_librarys(
    tmp_path, flags
):
  theirs = tmp_path / 'theirs'
  (theirs / 'recipes').mkdir(parents=True)
  (theirs / 'recipes' / 'demo.gin').write_text('BATCH_SIZE = 7\n')
  parsed = config.parse('train', ['recipes/demo'], flags, [str(theirs)])
  assert parsed.kwargs()['batch_size'] == 7
  (tmp_path / 'recipes').mkdir()
  (tmp_path / 'recipes' / 'demo.gin').write_text('BATCH_SIZE = 5\n')
  parsed = config.parse('train', ['recipes/demo'], flags, [str(theirs)])
  assert parsed.kwargs()['batch_size'] == 5


def test_a_file_includes_its_neighbours_wherever_it_lies(tmp_path, flags):
  folder = tmp_path / 'project'
  folder.mkdir()
  (folder / 'base.gin').write_text('BATCH_SIZE = 3\n')
  (folder / 'mine.gin').write_text("include 'base.gin'\nRANDOM_SEED = 9\n")
  kwargs = config.parse('train', [str(folder / 'mine.gin')], flags).kwargs()
  assert (kwargs['batch_size'], kwargs['random_seed']) == (3, 9)


def test_an_unknown_file_is_answered_with_the_nearest_and_what_there_is():
  with pytest.raises(config.ConfigError) as error:
    config.parse('train', ['ste2_nano'])
  message = str(error.value)
  assert 'Did you mean recipes/sst2_nano.gin' in message
  assert 'cb_nano' in message and 'demo' in message


def test_the_librarys_files_never_include_what_lies_in_the_working_folder(tmp_path, flags):
  for name in ('runs/train', 'runs/common', 'methods/soft_prompt', 'models/nano'):
    path = tmp_path / f'{name}.gin'
    path.parent.mkdir(exist_ok=True)
    path.write_text('import not_there\n')
  config.parse('train', ['t5x_exact'], [*flags, 'TRAIN_STEPS=1_100_010'])
  with pytest.raises(config.ConfigError, match='not_there'):
    config.parse('train', ['models/nano'], flags)


def test_a_name_that_fits_several_files_is_refused(tmp_path):
  for folder in ('a', 'b'):
    (tmp_path / 'extra' / folder).mkdir(parents=True)
    (tmp_path / 'extra' / folder / 'same.gin').write_text('')
  with pytest.raises(config.ConfigError, match='name the folder'):
    config.parse('train', ['same'], search_paths=[str(tmp_path / 'extra')])


def test_a_search_path_that_is_no_folder_is_refused():
  with pytest.raises(config.ConfigError, match='nowhere is not a folder'):
    config.parse('train', search_paths=['nowhere'])


# Overlays.


@pytest.mark.parametrize('recipe', ['demo', 'cb_nano', 'methods/model_tuning', 'uniform'])
def test_t5x_exact_wins_over_a_recipe_wherever_it_is_named(recipe, flags):
  texts = []
  for files in ([recipe, 't5x_exact'], ['t5x_exact', recipe]):
    parsed = config.parse('train', files, [*flags, 'TRAIN_STEPS=1_100_005'])
    kwargs = parsed.kwargs()
    texts.append((parsed.full(), parsed.operative()))
  assert texts[0] == texts[1]
  assert (kwargs['batch_size'], kwargs['dropout_rate'], kwargs['train_steps']) == (128, 0.1, 5)
  assert parsed.notes == ()


def test_flags_win_over_an_overlay(flags):
  parsed = config.parse(
      'train', ['t5x_exact', 'demo'], [*flags, 'TRAIN_STEPS=1_100_005', 'BATCH_SIZE=4']
  )
  assert parsed.kwargs()['batch_size'] == 4


def test_an_overlay_leaves_alone_what_it_does_not_name(flags):
  alone = config.parse('evaluate', ['demo'], flags).kwargs()
  exact = config.parse('evaluate', ['demo', 't5x_exact'], flags).kwargs()
  different = {name for name in alone if alone[name] != exact[name]}
  # The objects are made anew.
  assert different - {'backbone', 'method', 'trainable'} == {
      'lengths', 'eval_method', 'decoding'
  }


def test_overlays_keep_their_order_among_each_other_and_an_include_counts_where_it_stands(
    tmp_path, flags
):
  (tmp_path / 'plain.gin').write_text('BATCH_SIZE = 1\nRANDOM_SEED = 1\n')
  (tmp_path / 'one.gin').write_text('# overlay: first\nBATCH_SIZE = 2\nLOG_PERIOD = 2\n')
  (tmp_path / 'two.gin').write_text('#overlay\nBATCH_SIZE = 3\n')
  (tmp_path / 'mine.gin').write_text("include 'one.gin'\nBATCH_SIZE = 4\n")

  def values(*files):
    kwargs = config.parse('train', files, flags).kwargs()
    return [kwargs[name] for name in ('batch_size', 'log_period', 'random_seed')]

  assert values('one', 'two', 'plain') == values('one', 'plain', 'two') == [3, 2, 1]
  assert values('two', 'one', 'plain') == [2, 2, 1]
  assert values('mine') == [4, 2, 0]
  assert values('plain', 'mine') == [4, 2, 1]
  assert values('mine', 'plain') == [1, 2, 1]


def test_only_a_first_line_makes_an_overlay(tmp_path, flags):
  (tmp_path / 'late.gin').write_text('# Not one.\n# overlay\nBATCH_SIZE = 2\n')
  (tmp_path / 'word.gin').write_text('# overlays are explained elsewhere\nBATCH_SIZE = 3\n')
  for first, last, expected in (('late', 'word', 3), ('word', 'late', 2)):
    assert config.parse('train', [first, last], flags).kwargs()['batch_size'] == expected


def test_a_file_that_ends_in_the_middle_of_a_value_is_named(flags, tmp_path):
  (tmp_path / 'cut.gin').write_text('CLASS_LABELS = [\n  "a",\n')
  (tmp_path / 'whole.gin').write_text("include 'cut.gin'\n")
  (tmp_path / 'after.gin').write_text("include 'recipes/demo.gin'\nCLASS_LABELS = [\n")
  with pytest.raises(config.ConfigError, match=r'Cannot read \S*/after.gin: a bracket is not cl'):
    config.parse('train', [str(tmp_path / 'after.gin')], flags)
  with pytest.raises(config.ConfigError, match=r'Cannot read \S*/cut.gin: a bracket is not cl'):
    config.parse('train', [str(tmp_path / 'whole.gin')], flags)
