"""One answer of several: majorities, ties, means."""

import pytest

from prompt_tuning_jax.evaluation.voting import agreed


def ranked(**scores):
  return max(scores, key=scores.get), {'scores': scores}


THREE = [
    ranked(a=-1.0, b=-9.0, c=-2.0),
    ranked(a=-1.5, b=-8.0, c=-2.0),
    ranked(a=-5.0, b=-0.1, c=-2.0),
]


def test_the_majority_wins_whatever_the_scores():
  text, found = agreed(THREE)
  assert text == 'a'
  assert found['votes'] == {'a': 2, 'b': 1}
  assert found['scores'] == pytest.approx({'a': -2.5, 'b': -5.7, 'c': -2.0})


def test_the_highest_mean_may_be_nobody_s_choice():
  text, found = agreed(THREE, 'mean')
  assert text == 'c'
  assert found == agreed(THREE)[1]


def test_a_tie_is_decided_by_the_mean_of_all_prompts():
  answers = [ranked(a=-1.0, b=-2.0), ranked(a=-4.0, b=-0.5)]
  assert agreed(answers)[0] == 'b'
  # One prompt that is sure is not enough where the others are surer of the other.
  answers = [ranked(a=-1.0, b=-2.0), ranked(a=-2.0, b=-1.9)]
  assert agreed(answers)[0] == 'a'
  # Of equal means the earlier choice wins, as in ranking.
  answers = [ranked(a=-2.0, b=-1.0), ranked(a=-1.0, b=-2.0)]
  assert agreed(answers)[0] == agreed(answers, 'mean')[0] == 'a'


def test_texts_are_voted_on_and_ties_go_to_the_likelier():
  answers = [('x', {'score': -3.0}), ('y', {'score': -2.0}), ('x', {'score': -4.0})]
  assert agreed(answers) == ('x', {'score': -3.5, 'votes': {'x': 2, 'y': 1}})
  assert agreed(answers[:2]) == ('y', {'score': -2.0, 'votes': {'x': 1, 'y': 1}})


def test_an_ensemble_of_one_is_that_prompt():
  for answer in (THREE[0], ('x', {'score': -3.0})):
    text, found = agreed([answer])
    assert text == answer[0]
    assert found == answer[1] | {'votes': {text: 1}}


def test_what_there_is_not_is_refused():
  with pytest.raises(ValueError, match="ENSEMBLE is 'votes'; .* 'vote' or 'mean'"):
    agreed(THREE, 'votes')
  with pytest.raises(ValueError, match="no score for each choice.*Use 'vote'"):
    agreed([('x', {'score': -3.0})], 'mean')
