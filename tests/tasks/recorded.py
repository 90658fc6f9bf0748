"""Holding a task's text against the recorded text of the original."""

import json

from prompt_tuning_jax.data.cache import load_task


def assert_recorded_examples(
    golden, vocabulary, tmp_path, monkeypatch, name, file, task_word
):
  """Feeds the recorded raw rows to a task through an official file, and compares.

  The recording holds the `taskless_` form; the other form has `task_word` in front.
  """
  with open(golden / 'tasks' / 'task_text.jsonl') as lines:
    recorded = next(r for r in map(json.loads, lines) if r['task'] == f'taskless_{name}')
  path = tmp_path / file
  path.parent.mkdir(parents=True)
  path.write_text('\n'.join(map(json.dumps, recorded['raw'])) + '\n')
  monkeypatch.setenv('PTJ_LOCAL_DATA', str(tmp_path))
  taskless = load_task(f'taskless_{name}', 'validation', vocabulary)
  with_word = load_task(name, 'validation', vocabulary)
  assert len(taskless) == len(with_word) == len(recorded['outputs'])
  for index, expected in enumerate(recorded['outputs']):
    example = taskless.example(index)
    assert taskless[index]['inputs'].tolist() == expected['inputs']
    assert taskless[index]['targets'].tolist() == expected['targets']
    assert {'inputs': expected['inputs'], 'targets': expected['targets'], **example} == expected
    text = f'{task_word} {expected["inputs_pretokenized"]}'
    assert with_word.example(index)['inputs_pretokenized'] == text
    assert with_word[index]['inputs'].tolist() == [*vocabulary.encode(text), 1]
