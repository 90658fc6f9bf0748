"""Files for SuperGLUE's leaderboard: names, labels and order are those it asks for."""

import pytest

from prompt_tuning_jax.evaluation.leaderboard import write_leaderboard
from prompt_tuning_jax.evaluation.results import EvalResult
from prompt_tuning_jax.json_files import read_jsonl


def result(task, predictions, **numbers):
  """A result with these predictions; `numbers` holds each one's entries of the fields."""
  return EvalResult(
      task, 'test', {}, [
          {'index': place, 'prediction': prediction}
          | {name.replace('_', '/'): column[place] for name, column in numbers.items()}
          for place, prediction in enumerate(predictions)
      ],
  )  # fmt: skip


@pytest.mark.parametrize(
    ('task', 'file', 'labels'),
    [
        ('super_glue_boolq_v102', 'BoolQ', ['true', 'false']),
        ('taskless_super_glue_cb_v102', 'CB', ['contradiction', 'entailment', 'neutral']),
        ('super_glue_copa_v102', 'COPA', [1, 0]),
        ('super_glue_rte_v102', 'RTE', ['not_entailment', 'entailment']),
        ('super_glue_wic_v102', 'WiC', ['true', 'false']),
        ('taskless_super_glue_wsc_v102_simple_eval', 'WSC', ['True', 'False']),
        ('super_glue_axb_v102', 'AX-b', ['not_entailment', 'entailment']),
        ('super_glue_axg_v102', 'AX-g', ['not_entailment', 'entailment']),
    ],
)
def test_classes_are_called_as_the_leaderboard_does(task, file, labels, tmp_path):
  predictions = [1, 0, 2][: len(labels)]
  # Out of order: the file is in the order of the numbers.
  of_task = result(task, predictions, idx=[12, 30, 7][: len(labels)])
  paths = write_leaderboard([of_task, result('glue_rte_v200', [0], idx=[0])], tmp_path)
  assert paths == [str(tmp_path / f'{file}.jsonl')]
  expected = sorted(zip([12, 30, 7], labels))
  assert read_jsonl(paths[0]) == [{'idx': n, 'label': label} for n, label in expected]


def test_answers_of_multirc_stand_below_their_question_and_passage(tmp_path):
  of_task = result(
      'super_glue_multirc_v102',
      [{'value': value} for value in (1, 0, 1, 0)],
      idx_paragraph=[4, 4, 4, 2], idx_question=[9, 9, 10, 3], idx_answer=[21, 20, 22, 5],
  )  # fmt: skip
  (path,) = write_leaderboard([of_task], tmp_path)
  assert path.endswith('MultiRC.jsonl')
  assert read_jsonl(path) == [
      {'idx': 2, 'passage': {'questions': [
          {'idx': 3, 'answers': [{'idx': 5, 'label': 0}]},
      ]}},
      {'idx': 4, 'passage': {'questions': [
          {'idx': 9, 'answers': [{'idx': 20, 'label': 0}, {'idx': 21, 'label': 1}]},
          {'idx': 10, 'answers': [{'idx': 22, 'label': 1}]},
      ]}},
  ]  # fmt: skip


def test_a_question_of_record_is_answered_once_in_words(tmp_path):
  of_task = result(
      'super_glue_record_v102',
      [{'value': text} for text in ('Rome', 'Oslo', 'Zoë')],
      idx_passage=[1, 1, 0], idx_query=[8, 8, 2],
  )  # fmt: skip
  (path,) = write_leaderboard([of_task], tmp_path)
  assert path.endswith('ReCoRD.jsonl')
  assert read_jsonl(path) == [{'idx': 2, 'label': 'Zoë'}, {'idx': 8, 'label': 'Rome'}]


def test_an_answer_that_is_no_class_is_counted_and_gets_the_first(tmp_path):
  of_task = result('super_glue_wsc_v102_simple_eval', [1, -1, -1], idx=[0, 1, 2])
  with pytest.warns(UserWarning, match="2 of 3 answers .* WSC.jsonl holds 'False' instead"):
    (path,) = write_leaderboard([of_task], tmp_path)
  assert [line['label'] for line in read_jsonl(path)] == ['True', 'False', 'False']


def test_what_a_file_cannot_say_is_refused(tmp_path):
  with pytest.raises(ValueError, match="Prediction 0 of super_glue_cb_v102 has no 'idx'"):
    write_leaderboard([result('super_glue_cb_v102', [0])], tmp_path)
  twice = result('super_glue_wic_v102', [0, 0, 1], idx=[4, 4, 4])
  with pytest.raises(ValueError, match='two examples of the number 4 with unlike answers'):
    write_leaderboard([twice], tmp_path)
  answers = result(
      'super_glue_multirc_v102', [{'value': 0}, {'value': 1}],
      idx_paragraph=[4, 4], idx_question=[9, 9], idx_answer=[21, 21],
  )  # fmt: skip
  with pytest.raises(ValueError, match='two examples of the number 4/9/21 with unlike answers'):
    write_leaderboard([answers], tmp_path)
  questions = result(
      'super_glue_record_v102', [{'value': 'Rome'}, {'value': 'Rome'}],
      idx_passage=[1, 2], idx_query=[8, 8],
  )  # fmt: skip
  with pytest.raises(ValueError, match='two questions of the number 8, of different passages'):
    write_leaderboard([questions], tmp_path)
  one = result('super_glue_rte_v102', [0], idx=[4])
  other = result('taskless_super_glue_rte_v102', [1], idx=[4])
  with pytest.raises(ValueError, match="RTE.jsonl is to hold super_glue_rte_v102, split 'test', "):
    write_leaderboard([one, other], tmp_path)
  assert not list(tmp_path.iterdir())
