"""An average over tasks counts every task alike, and is never over nothing."""

import pytest

from prompt_tuning_jax.evaluation.averages import macro_average


def test_every_task_counts_once_and_metrics_that_one_lacks_do_not():
  metrics = {
      'lama_trex_P36': {'hit_at_1': 50.0, 'other': 1.0},
      'lama_trex_P103': {'hit_at_1': 20.0},
      'lama_trex_P17': {'more': 3.0, 'hit_at_1': 5.0},
  }
  assert macro_average(metrics) == {'hit_at_1': 25.0}
  assert macro_average({'a': {'em': 10.0, 'f1': 30.0}, 'b': {'f1': 40.0, 'em': 20.0}}) == {
      'em': 15.0, 'f1': 35.0
  }  # fmt: skip


def test_no_task_nothing_in_common_and_no_number_are_refused():
  with pytest.raises(ValueError, match='no tasks to average'):
    macro_average({})
  with pytest.raises(ValueError, match='no metric in common .a: em; b: bleu, rougeL.'):
    macro_average({'a': {'em': 1.0}, 'b': {'bleu': 2.0, 'rougeL': 3.0}})
  with pytest.raises(ValueError, match='b has em = nan'):
    macro_average({'a': {'em': 1.0}, 'b': {'em': float('nan')}})
