"""Prompts that are named by a path, a pattern, a list, or for each task."""

import pytest

from prompt_tuning_jax.evaluation.prompt_paths import find_prompts


def test_prompts_of_a_task_are_found_by_path_pattern_list_and_dict(tmp_path):
  for name in ('cb/9', 'cb/10', 'cb/1', 'rte/1', 'p[1]'):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()

  def found(where, task):
    return [path.removeprefix(f'{tmp_path}/') for path in find_prompts(where, task)]

  every = f'{tmp_path}/{{task}}/*'
  assert found(every, 'cb') == ['cb/1', 'cb/9', 'cb/10']
  assert found(every, 'rte') == ['rte/1']
  assert found([f'{tmp_path}/rte/1', f'{tmp_path}/cb/?'], 'any') == ['rte/1', 'cb/1', 'cb/9']
  assert found({'cb': every, 'rte': [f'{tmp_path}/cb/1']}, 'rte') == ['cb/1']
  # Tasks of SuperGLUE have short names too.
  assert found(every, 'taskless_super_glue_rte_v102') == ['rte/1']
  assert found(f'{tmp_path}/{{task}}/**/1', 'super_glue_cb_v102') == ['cb/1']
  # A name that is there is no pattern.
  assert found(f'{tmp_path}/p[1]', 'any') == ['p[1]']
  # What is in a bucket is known when it is read.
  assert find_prompts('gs://bucket/run', 'any') == ['gs://bucket/run']
  with pytest.raises(FileNotFoundError, match=r'no file .*/wic/\* \(for the task wic\)'):
    find_prompts(every, 'wic')
  with pytest.raises(ValueError, match="no prompt for wic, only for cb, wicc. Did you mean 'wic'"):
    find_prompts({'cb': 'x', 'wicc': 'y'}, 'wic')
