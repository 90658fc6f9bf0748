"""Records of jsonl files, whole or cut short by a crash."""

from __future__ import annotations

import pytest

from prompt_tuning_jax.json_files import read_jsonl


@pytest.fixture
def path(tmp_path):
  return tmp_path / 'metrics.jsonl'


def test_a_last_line_cut_short_is_passed_over_and_another_is_named(path):
  path.write_text('{"step": 1}\n\n{"step": 2}\n{"st')
  assert read_jsonl(path) == [{'step': 1}, {'step': 2}]
  path.write_text('{"step": 1}\n{"st\n{"step": 2}\n')
  with pytest.raises(ValueError, match='metrics.jsonl, line 2, is not JSON'):
    read_jsonl(path)


def test_a_file_that_is_not_there_holds_nothing(path):
  assert read_jsonl(path) == []


@pytest.mark.parametrize('line', ['{"loss": 3}', '[1, 2]', '"step"', '7'])
def test_a_record_without_what_it_needs_is_named(path, line):
  path.write_text('{"step": 1}\n' + line + '\n')
  assert len(read_jsonl(path)) == 2
  with pytest.raises(ValueError, match="metrics.jsonl, line 2, has no 'step'.*delete the line"):
    read_jsonl(path, needs=['step'])
