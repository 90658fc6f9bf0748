"""Metrics against the recorded values of the t5 package, and their refusals."""

import functools
import json
import math

import numpy as np
import pytest

from prompt_tuning_jax.evaluation import metrics

# By the name under which the value was recorded.
RECORDED_AS = {
    'accuracy': metrics.accuracy,
    'f1_score_with_invalid': metrics.f1_score_with_invalid,
    'mean_multiclass_f1(3)': functools.partial(metrics.mean_multiclass_f1, num_classes=3),
    'matthews*100': metrics.matthews_corrcoef,
    'pearson': metrics.pearson_corrcoef,
    'spearman': metrics.spearman_corrcoef,
    'squad': metrics.squad,
    'multirc_f1_over_all_answers': metrics.multirc_f1_over_all_answers,
    'mean_group_metric(all_match)': metrics.mean_group_exact_match,
    'deduplicate_metric(squad)': metrics.deduplicated_squad,
    'rouge': metrics.rouge,
}

# The metrics of each recorded task.
OF_TASK = {
    'boolq': [metrics.accuracy],
    'cb': [RECORDED_AS['mean_multiclass_f1(3)'], metrics.accuracy],
    'copa': [metrics.accuracy],
    'multirc': [metrics.multirc_f1_over_all_answers, metrics.mean_group_exact_match],
    'record': [metrics.deduplicated_squad],
    'rte': [metrics.accuracy],
    'wic': [metrics.accuracy],
    'wsc': [metrics.accuracy],
}


def test_every_recorded_call_gives_the_recorded_number(golden):
  calls = json.loads((golden / 'tasks' / 'metric_functions.json').read_text())
  assert {call['metric'] for call in calls} == set(RECORDED_AS)
  for call in calls:
    result = RECORDED_AS[call['metric']](call['targets'], call['predictions'])
    assert result == pytest.approx(call['result'], rel=1e-12), call


def test_every_recorded_task_gives_the_recorded_scores(golden):
  lines = (golden / 'tasks' / 'metrics.jsonl').read_text().splitlines()
  checked = 0
  for record in map(json.loads, lines):
    if not record['metrics'] or 'scores' in record:
      continue
    task = record['task'].partition('super_glue_')[2].partition('_')[0]
    predictions = [
        p['prediction'] if isinstance(p, dict) and 'prediction' in p else p
        for p in record['predictions_post']
    ]
    found = {}
    for metric in OF_TASK[task]:
      found |= metric(record['targets_post'], predictions)
    assert found == pytest.approx(record['metrics'], rel=1e-12), record
    checked += 1
  assert checked == 130


def test_recorded_rank_classification_gives_the_recorded_accuracy(golden):
  lines = (golden / 'tasks' / 'metrics.jsonl').read_text().splitlines()
  records = [r for r in map(json.loads, lines) if 'scores' in r]
  assert len(records) == 4
  for record in records:
    kwargs = {}
    if 'normed' in record['metric']:
      kwargs = dict(normalize_by_target_length=True, prefix='normed')
    found = metrics.rank_classification(
        record['targets_post'], record['scores'], **kwargs
    )
    assert found == pytest.approx(record['metrics'])


def test_rank_classification_takes_the_best_choice_whatever_the_order():
  targets = [
      ((1, 1), True, 1.0, 2),
      ((0, 0), True, 1.0, 4),
      ((1, 0), False, 1.0, 2),
      ((0, 1), False, 1.0, 1),
  ]
  assert metrics.rank_classification(targets, [-1.0, -3.0, -2.0, -2.0]) == {'accuracy': 50}
  # Per token the first example's right choice scores -0.75 against -2.
  normed = metrics.rank_classification(
      targets, [-1.0, -3.0, -2.0, -2.0], normalize_by_target_length=True
  )
  assert normed == {'accuracy': 100}


def test_rank_classification_gives_ties_to_the_lower_choice_and_weighs_examples():
  targets = [((0, 0), False, 3.0, 1), ((0, 1), True, 3.0, 1), ((1, 0), True, 1.0, 1)]
  assert metrics.rank_classification(targets, [-1.0, -1.0, -5.0]) == {'accuracy': 25.0}


def test_matthews_of_random_guesses_equals_pearson_for_two_classes():
  rng = np.random.default_rng(0)
  targets, predictions = rng.integers(0, 2, (2, 200))
  assert metrics.matthews_corrcoef(targets, predictions)['matthews_corrcoef'] == (
      pytest.approx(metrics.pearson_corrcoef(targets, predictions)['pearson_corrcoef'])
  )


def test_correlations_of_a_constant_are_not_a_number():
  assert np.isnan(metrics.pearson_corrcoef([1.0, 1.0], [1.0, 2.0])['pearson_corrcoef'])
  assert metrics.matthews_corrcoef([1, 1], [0, 1]) == {'matthews_corrcoef': 0.0}


def test_spearman_sees_only_the_order():
  x = [0.1, 3.0, 2.0, 9.0]
  assert metrics.spearman_corrcoef(x, np.exp(x))['spearman_corrcoef'] == pytest.approx(100)


def test_sequences_must_match_in_every_element():
  assert metrics.sequence_accuracy([[1, 2], [3]], [[1, 2], [3, 4]]) == {
      'sequence_accuracy': 50.0
  }


@pytest.mark.parametrize('name', sorted(RECORDED_AS))
def test_a_metric_over_nothing_is_refused(name):
  with pytest.raises(ValueError, match='over no examples means nothing'):
    RECORDED_AS[name]([], [])


def test_a_split_without_labels_is_refused():
  with pytest.raises(ValueError, match='All 3 targets are -1'):
    metrics.accuracy([-1, -1, -1], [0, 1, 0])
  unlabelled = [{'value': -1, 'group': 0}, {'value': -1, 'group': 1}]
  with pytest.raises(ValueError, match='All 2 targets are -1'):
    metrics.mean_group_exact_match(unlabelled, [{'value': 1}, {'value': 1}])


@pytest.mark.parametrize(
    'name',
    ['accuracy', 'f1_score_with_invalid', 'mean_multiclass_f1(3)', 'matthews*100',
     'pearson', 'spearman'],
)  # fmt: skip
def test_an_invalid_answer_is_never_right_for_a_missing_label(name):
  metric = RECORDED_AS[name]
  with pytest.raises(ValueError, match='Example 2 has the target -1, .* 1 of 4 targets'):
    metric([0, 1, -1, 1], [0, 1, -1, 0])
  with pytest.raises(ValueError, match='Example 2 has the target -1'):
    metric(np.array([0.0, 1, -1, 1]), np.array([0.0, 1, -1, 0]))
  metric([0, 1, 0, 1], [0, 1, -1, -1])


def test_an_invalid_answer_is_never_right_for_a_missing_label_in_a_group_either():
  targets = [{'value': 1, 'group': 0}, {'value': -1, 'group': 1}]
  for name in ('multirc_f1_over_all_answers', 'mean_group_metric(all_match)'):
    with pytest.raises(ValueError, match='Example 1 has the target -1'):
      RECORDED_AS[name](targets, [{'value': 1}, {'value': -1}])


def test_unequal_numbers_of_targets_and_predictions_are_refused():
  with pytest.raises(ValueError, match='2 targets and 1 predictions'):
    metrics.accuracy([0, 1], [0])


def test_hit_at_1_is_the_accuracy_in_percent():
  assert metrics.hit_at_1([0, 1, 2], [0, 1, -1]) == {'hit_at_1': pytest.approx(200 / 3)}
  with pytest.raises(ValueError, match='no examples'):
    metrics.hit_at_1([], [])


def test_bleu_of_unequally_many_references_equals_the_one_by_hand():
  # 4 + 3 tokens. Of the unigrams all but 'e' match (6 of 7), of the bigrams ab, bc, cd and
  # xy (4 of 5), of the trigrams abc and bcd (2 of 3: xye is none), of the 4-grams abcd.
  predictions = ['a b c d', 'x y e']
  # The closest references have 5 (4 + 1, rather than 2 = 4 - 2) and 2 (3 - 1) tokens.
  targets = [['a b c d f', 'c d', 'q r s t u v w'], ['x y']]
  score = metrics.bleu(targets, predictions)['bleu']
  precision = math.exp(sum(map(math.log, [6 / 7, 4 / 5, 2 / 3, 1 / 1])) / 4)
  brevity = 1.0  # 7 tokens against 5 + 2
  assert score == pytest.approx(100 * precision * brevity, rel=1e-12)
  # Without its reference of 7 tokens the second example must be as it was.
  assert metrics.bleu([targets[0][:2], 'x y'], predictions)['bleu'] == pytest.approx(score)
  # With references of 9 + 2 tokens, 7 are too few: e^(1 - 11/7).
  longer = [['a b c d f g h i j'], ['x y']]
  assert metrics.bleu(longer, predictions)['bleu'] == pytest.approx(
      100 * precision * math.exp(1 - 11 / 7), rel=1e-12
  )


def test_chrf_equals_the_one_by_hand_and_takes_the_best_reference():
  # Single characters: 2 of 2 and of 3; pairs: 1 of 1 and of 2; words: 0 of 1 and of 1.
  precision, recall = (1 + 1 + 0) / 3, (2 / 3 + 1 / 2 + 0) / 3
  expected = 100 * 5 * precision * recall / (4 * precision + recall)
  assert metrics.chrf(['abc'], ['ab']) == {'chrf++': pytest.approx(expected)}
  assert metrics.chrf([['xyz', 'abc'], 'q'], ['ab', 'q'])['chrf++'] > expected
  assert metrics.chrf([['xyz', 'abc']], ['ab']) == {'chrf++': pytest.approx(expected)}
  with pytest.raises(ValueError, match='Example 1 has no reference'):
    metrics.chrf(['a', []], ['a', 'a'])


def test_bleu_minds_the_case_unless_told():
  targets, predictions = [['The pub is by the river.']], ['the pub is by the river.']
  assert metrics.bleu(targets, predictions, lowercase=True)['bleu'] == pytest.approx(100)
  # 7 tokens, the full stop among them: 6/7, 5/6, 4/5, 3/4 of the n-grams are left.
  precisions = [6 / 7, 5 / 6, 4 / 5, 3 / 4]
  expected = 100 * math.prod(precisions) ** 0.25
  assert metrics.bleu(targets, predictions)['bleu'] == pytest.approx(expected, rel=1e-12)


def test_rouge_takes_the_best_of_several_references():
  # 'a b c' and 'a c': the longest common subsequence has 2 words, F = 2·1·⅔ / (1 + ⅔).
  scores = metrics.rouge([['x y z', 'a c'], ['q']], ['a b c', 'q'], ['rougeL'])
  assert scores == {'rougeL': pytest.approx(100 * (0.8 + 1) / 2)}
  assert metrics.rouge(['a c', 'q'], ['a b c', 'q'], ['rougeL']) == scores


@pytest.mark.parametrize('metric', [metrics.bleu, metrics.rouge])
def test_an_example_without_a_reference_is_refused(metric):
  with pytest.raises(ValueError, match='Example 1 has no reference'):
    metric([['a b'], []], ['a b', 'c'])
  with pytest.raises(ValueError, match='no examples'):
    metric([], [])


def test_gender_parity_is_the_share_of_pairs_answered_alike():
  targets = [0, 0, 1, 1, 0, 0, 1, 1]
  assert metrics.gender_parity(targets, [0, 0, 0, 1, 1, 1, -1, 0]) == {'gender_parity': 50.0}
  with pytest.raises(ValueError, match='with one label: there are 3'):
    metrics.gender_parity([0, 0, 1], [0, 0, 1])
  with pytest.raises(ValueError, match='examples 2 and 3 differ in their label'):
    metrics.gender_parity([0, 0, 1, 0], [0, 0, 1, 1])
