"""XSum reads as T5 writes summaries, and what is wrong with a line is said."""

import json

import pytest

from prompt_tuning_jax.data.cache import load_task

pytestmark = pytest.mark.usefixtures('own_folder')

ROWS = [
    {'document': 'It rained.\nAll day.', 'summary': 'Rain fell all day.', 'id': '1'},
    {'document': 'The sun shone.', 'summary': 'Sun.', 'id': '2'},
]


def write(tmp_path, rows, split='validation'):
  path = tmp_path / 'xsum' / f'{split}.jsonl'
  path.parent.mkdir(exist_ok=True)
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))


@pytest.mark.parametrize('split', ['train', 'validation', 'test'])
@pytest.mark.parametrize(('prefix', 'word'), [('', 'summarize: '), ('taskless_', '')])
def test_an_article_becomes_its_sentence(tmp_path, vocabulary, split, prefix, word):
  write(tmp_path, ROWS, split)
  task = load_task(f'{prefix}xsum_v110', split, vocabulary)
  assert [task.example(index) for index in range(2)] == [
      {
          'inputs_pretokenized': word + row['document'],
          'targets_pretokenized': row['summary'],
      }
      for row in ROWS
  ]
  targets = [task.target(index) for index in range(2)]
  assert targets == [row['summary'] for row in ROWS]
  (metric,) = task.metric_fns
  scores = metric(targets, ['Rain fell.', 'Sun.'])
  # Of four words two, and of three pairs of words one.
  f1, f2 = 2 * 0.5 / 1.5, 2 * (1 / 3) / (4 / 3)
  assert scores == {
      'rouge1': pytest.approx(50 * (f1 + 1)), 'rouge2': pytest.approx(50 * f2),
      'rougeL': pytest.approx(50 * (f1 + 1)), 'rougeLsum': pytest.approx(50 * (f1 + 1)),
  }  # fmt: skip


@pytest.mark.parametrize(
    ('bad', 'reason'),
    [
        ({'document': 'x'}, "no field 'summary'"),
        ({'document': 'x', 'summary': ' '}, "'summary' is empty"),
        ({'document': None, 'summary': 'x'}, "'document' is not a text"),
    ],
)
def test_a_bad_line_is_named(tmp_path, vocabulary, bad, reason):
  write(tmp_path, [ROWS[0], bad])
  with pytest.raises(ValueError, match=rf'(?s)validation\.jsonl.*line 2.*{reason}'):
    load_task('xsum_v110', 'validation', vocabulary)
