"""The metrics of T5's tasks: `(targets, predictions) → {name: value}`, in percent.

Names and values are those of the `t5` package (Raffel et al., 2020), which seqio
tasks expect: the two arguments must be called `targets` and `predictions` (or
`targets` and `scores`). Every metric runs over all examples of a split at once.

A metric over nothing, or over a split whose labels are all -1 (SuperGLUE's test
sets), is an error: the number would mean nothing. So is a prediction of -1 (an
invalid answer) for a target of -1 (a missing label), which would count as right.
"""

from __future__ import annotations

import collections
import math
import re
import string
from collections.abc import Sequence
from typing import Any

import numpy as np


def accuracy(targets: Sequence[Any], predictions: Sequence[Any]) -> dict[str, float]:
  """Share of predictions that equal their target (class ids, numbers or texts)."""
  _check(targets, predictions)
  right = [target == prediction for target, prediction in zip(targets, predictions)]
  return {'accuracy': 100.0 * float(np.mean(right))}


def hit_at_1(targets: Sequence[Any], predictions: Sequence[Any]) -> dict[str, float]:
  """The accuracy under the name it has for facts (Petroni et al., 2019).

  What it is worth depends on what the prediction was chosen from: LAMA's own is every
  word of a vocabulary.
  """
  return {'hit_at_1': accuracy(targets, predictions)['accuracy']}


def sequence_accuracy(
    targets: Sequence[Any], predictions: Sequence[Any]
) -> dict[str, float]:
  """Share of predicted sequences that equal their target in every element."""
  _check(targets, predictions)
  right = [np.array_equal(t, p) for t, p in zip(targets, predictions)]
  return {'sequence_accuracy': 100.0 * float(np.mean(right))}


def f1_score_with_invalid(
    targets: Sequence[int], predictions: Sequence[int]
) -> dict[str, float]:
  """F1 of class 1; a prediction that is neither 0 nor 1 counts as the wrong one."""
  _check(targets, predictions)
  targets = np.asarray(targets)
  predictions = np.asarray(predictions)
  valid = (predictions == 0) | (predictions == 1)
  predictions = np.where(valid, predictions, 1 - targets)
  return {'f1': 100.0 * _mean_f1(targets, predictions, [1])}


def mean_multiclass_f1(
    targets: Sequence[int], predictions: Sequence[int], num_classes: int
) -> dict[str, float]:
  """Unweighted mean of the classes' F1; bind `num_classes` with functools.partial.

  A class that occurs neither among targets nor predictions contributes 0.
  """
  _check(targets, predictions)
  f1 = _mean_f1(targets, predictions, range(num_classes))
  return {f'mean_{num_classes}class_f1': 100.0 * f1}


def _mean_f1(
    targets: Sequence[int], predictions: Sequence[int], labels: Sequence[int]
) -> float:
  """Unweighted mean of the F1 of some classes, 0 where a class does not occur."""
  from sklearn import metrics

  return float(
      metrics.f1_score(
          targets, predictions, labels=list(labels), average='macro', zero_division=0
      )
  )


def matthews_corrcoef(
    targets: Sequence[int], predictions: Sequence[int]
) -> dict[str, float]:
  """Matthews correlation of class ids, for any number of classes (Gorodkin, 2004)."""
  _check(targets, predictions)
  from sklearn import metrics

  value = metrics.matthews_corrcoef(targets, predictions)
  return {'matthews_corrcoef': 100.0 * float(value)}


def pearson_corrcoef(
    targets: Sequence[float],
    predictions: Sequence[float | None],
    *,
    minus_one_is_none: bool = True,
) -> dict[str, float]:
  """Pearson correlation; NaN where all targets or all predictions are equal.

  Args:
    targets: the true numbers.
    predictions: as many.
    minus_one_is_none: whether a target of -1 is a label that is not public, as in GLUE. Where it
      is not, a prediction that is no number (None, or not finite) counts as one below all targets.
  """
  value = _correlation('pearsonr', targets, predictions, minus_one_is_none)
  return {'pearson_corrcoef': value}


def spearman_corrcoef(
    targets: Sequence[float],
    predictions: Sequence[float | None],
    *,
    minus_one_is_none: bool = True,
) -> dict[str, float]:
  """Pearson correlation of the ranks; equal values share the mean of their ranks.

  Its arguments are those of `pearson_corrcoef`.
  """
  value = _correlation('spearmanr', targets, predictions, minus_one_is_none)
  return {'spearman_corrcoef': value}


def _correlation(
    name: str,
    targets: Sequence[float],
    predictions: Sequence[float | None],
    minus_one_is_none: bool,
) -> float:
  if minus_one_is_none:
    _check(targets, predictions)
  else:
    _check_counts(targets, predictions)
    wrong = min(targets) - 1
    predictions = [wrong if p is None or not math.isfinite(p) else p for p in predictions]
  if len(set(targets)) == 1 or len(set(predictions)) == 1:
    return float('nan')
  from scipy import stats

  return 100.0 * float(getattr(stats, name)(targets, predictions).statistic)


def squad(
    targets: Sequence[Sequence[str]], predictions: Sequence[str]
) -> dict[str, float]:
  """Exact match and token F1, the best over the answers of a question.

  Texts are compared without case, punctuation, articles and extra spaces
  (Rajpurkar et al., 2016).

  Args:
    targets: the right answers of each question.
    predictions: one answer to each question.
  """
  _check(targets, predictions)
  exact, f1 = [], []
  for answers, prediction in zip(targets, predictions):
    prediction = _normalize_answer(prediction)
    answers = [_normalize_answer(answer) for answer in answers]
    exact.append(max(answer == prediction for answer in answers))
    f1.append(max(_token_f1(answer, prediction) for answer in answers))
  return {'em': 100.0 * float(np.mean(exact)), 'f1': 100.0 * float(np.mean(f1))}


def _normalize_answer(text: str) -> str:
  text = ''.join(c for c in text.lower() if c not in string.punctuation)
  return ' '.join(re.sub(r'\b(a|an|the)\b', ' ', text).split())


def _token_f1(target: str, prediction: str) -> float:
  target_tokens, predicted_tokens = target.split(), prediction.split()
  common = collections.Counter(target_tokens) & collections.Counter(predicted_tokens)
  num_common = sum(common.values())
  if num_common == 0:
    return 0.0
  precision = num_common / len(predicted_tokens)
  recall = num_common / len(target_tokens)
  return 2 * precision * recall / (precision + recall)


def deduplicated_squad(
    targets: Sequence[dict[str, Any]], predictions: Sequence[dict[str, Any]]
) -> dict[str, float]:
  """ReCoRD's metric: `squad` over the first example of each group.

  ReCoRD repeats a question for every right answer; only one copy counts.

  Args:
    targets: {'value': right answers, 'group': (passage, query)} of each example.
    predictions: {'value': answer} of each example.
  """
  _check(targets, predictions)
  first: dict[Any, tuple[Any, Any]] = {}
  for target, prediction in zip(targets, predictions):
    first.setdefault(_hashable(target['group']), (target['value'], prediction['value']))
  answers, predicted = zip(*first.values())
  return squad(answers, predicted)


def multirc_f1_over_all_answers(
    targets: Sequence[dict[str, Any]], predictions: Sequence[dict[str, Any]]
) -> dict[str, float]:
  """MultiRC's F1a: the F1 over all answers, whatever their question."""
  return f1_score_with_invalid(
      [target['value'] for target in targets],
      [prediction['value'] for prediction in predictions],
  )


def mean_group_exact_match(
    targets: Sequence[dict[str, Any]], predictions: Sequence[dict[str, Any]]
) -> dict[str, float]:
  """MultiRC's EM: share of the questions all of whose answers are judged right.

  Needs complete groups: over a sample of the examples it is another number.

  Args:
    targets: {'value': class id, 'group': question} of each example.
    predictions: {'value': class id} of each example.
  """
  _check(targets, predictions)
  groups: dict[Any, list[bool]] = collections.defaultdict(list)
  for target, prediction in zip(targets, predictions):
    groups[_hashable(target['group'])].append(target['value'] == prediction['value'])
  return {'exact_match': 100.0 * float(np.mean([all(r) for r in groups.values()]))}


def gender_parity(targets: Sequence[int], predictions: Sequence[int]) -> dict[str, float]:
  """AX-g's parity: share of the pairs whose two examples are answered alike.

  Its examples come in pairs, one after the other, that differ by the gender of a pronoun
  and have the same label (Rudinger et al., 2018).

  Raises:
    ValueError: if the examples are not pairs.
  """
  _check(targets, predictions)
  unlike = [n for n in range(0, len(targets) - 1, 2) if targets[n] != targets[n + 1]]
  if len(targets) % 2 or unlike:
    what = f'examples {unlike[0]} and {unlike[0] + 1} differ in their label' if unlike else (
        f'there are {len(targets)}'
    )
    raise ValueError(
        f'Gender parity is of pairs of examples, one after the other, with one label: {what}. '
        'Evaluate the whole of AX-g, in the order of its file.'
    )
  alike = [a == b for a, b in zip(predictions[::2], predictions[1::2], strict=True)]
  return {'gender_parity': 100.0 * float(np.mean(alike))}


def rank_classification(
    targets: Sequence[tuple[Sequence[int], bool, float, int]],
    scores: Sequence[float],
    normalize_by_target_length: bool = False,
    prefix: str = '',
) -> dict[str, float]:
  """Accuracy where every choice of an example is an example of its own.

  Args:
    targets: ((example, choice), is right, weight, target length) of each choice.
    scores: log-probability of each choice.
    normalize_by_target_length: whether to divide scores by the target length.
    prefix: put before the metric's name, with an underscore.
  """
  _check(targets, scores)
  best: dict[int, tuple[float, int, bool, float]] = {}
  for ((example, choice), is_right, weight, length), score in zip(targets, scores):
    score = score / length if normalize_by_target_length else score
    # Of equal scores the lowest choice wins.
    candidate = (score, -choice, is_right, weight)
    if example not in best or candidate[:2] > best[example][:2]:
      best[example] = candidate
  right = sum(weight * is_right for _, _, is_right, weight in best.values())
  total = sum(weight for _, _, _, weight in best.values())
  name = f'{prefix}_accuracy' if prefix else 'accuracy'
  return {name: 100.0 * float(right / total)}


def bleu(
    targets: Sequence[str | Sequence[str]],
    predictions: Sequence[str],
    lowercase: bool = False,
) -> dict[str, float]:
  """BLEU of the corpus (Papineni et al., 2002), as sacrebleu computes it.

  Tokens are those of mteval-v13a, and so is the smoothing of orders without a match. Of
  several references every n-gram counts, and the length is that of the closest.

  Args:
    targets: the reference of each example, or several; examples may have unequally many.
    predictions: one text for each example.
    lowercase: whether case is ignored.

  Raises:
    ValueError: if an example has no reference.
  """
  import sacrebleu

  _check(targets, predictions)
  score = sacrebleu.corpus_bleu(
      list(predictions), _reference_streams(targets), lowercase=lowercase
  )
  return {'bleu': float(score.score)}


def chrf(
    targets: Sequence[str | Sequence[str]], predictions: Sequence[str]
) -> dict[str, float]:
  """chrF++ of the corpus (Popović, 2017), as sacrebleu computes it.

  The F-score of runs of up to six characters and two words, with recall counting twice as
  much as precision; of several references the best counts.

  Raises:
    ValueError: if an example has no reference.
  """
  import sacrebleu

  _check(targets, predictions)
  score = sacrebleu.corpus_chrf(
      list(predictions), _reference_streams(targets), word_order=2
  )
  return {'chrf++': float(score.score)}


def _reference_streams(
    targets: Sequence[str | Sequence[str]],
) -> list[list[str | None]]:
  """The references as sacrebleu asks for them: the first of all examples, the second, …

  Where an example has no further one it takes None.
  """
  references = _references(targets)
  return [
      [texts[number] if number < len(texts) else None for texts in references]
      for number in range(max(map(len, references)))
  ]


def _references(targets: Sequence[str | Sequence[str]]) -> list[list[str]]:
  references = [[t] if isinstance(t, str) else list(t) for t in targets]
  for index, texts in enumerate(references):
    if not any(texts):
      raise ValueError(
          f'Example {index} has no reference to compare with (its target is '
          f'{targets[index]!r}). Give every example at least one text.'
      )
  return references


def rouge(
    targets: Sequence[str | Sequence[str]],
    predictions: Sequence[str],
    score_keys: Sequence[str] = ('rouge1', 'rouge2', 'rougeLsum'),
) -> dict[str, float]:
  """ROUGE F-measures (Lin, 2004), the mean over examples.

  The t5 package reports the median of bootstrapped means, which differs from run
  to run by sampling; this is the mean itself.

  Args:
    targets: the reference of each example, or several, of which the best counts.
    predictions: one text for each example.
    score_keys: the measures ('rougeL' and the like).

  Raises:
    ValueError: if an example has no reference.
    ImportError: if the package rouge_score is not installed.
  """
  _check(targets, predictions)
  try:
    from rouge_score import rouge_scorer
  except ImportError as error:
    raise ImportError(
        'ROUGE is computed by the package rouge_score: pip install rouge_score.'
    ) from error
  scorer = rouge_scorer.RougeScorer(list(score_keys))
  # ROUGE-Lsum compares sentence by sentence and takes a line for a sentence.
  scores = [
      scorer.score_multi(
          targets=[text.replace(' . ', ' .\n') for text in texts],
          prediction=prediction.replace(' . ', ' .\n'),
      )
      for texts, prediction in zip(_references(targets), predictions)
  ]
  return {
      key: 100.0 * float(np.mean([score[key].fmeasure for score in scores]))
      for key in score_keys
  }


def _hashable(group: Any) -> Any:
  # A group that went through JSON comes back as a list.
  return tuple(group) if isinstance(group, list) else group


def _check_counts(targets: Sequence[Any], predictions: Sequence[Any]) -> None:
  if len(targets) != len(predictions):
    raise ValueError(
        f'{len(targets)} targets and {len(predictions)} predictions: a metric compares '
        'them one by one, so there must be as many of both.'
    )
  if not len(targets):
    raise ValueError(
        'A metric over no examples means nothing. The split is empty, or all of its '
        'examples were left out.'
    )


def _check(targets: Sequence[Any], predictions: Sequence[Any]) -> None:
  _check_counts(targets, predictions)
  unlabelled = [index for index, target in enumerate(targets) if _is_minus_one(target)]
  if len(unlabelled) == len(targets):
    raise ValueError(
        f'All {len(targets)} targets are -1: this split has no labels, so it can be '
        'predicted but not scored. Use a split that has labels.'
    )
  for index in unlabelled:
    if _is_minus_one(predictions[index]):
      raise ValueError(
          f'Example {index} has the target -1, a missing label, and the prediction -1, an '
          f'invalid answer, which must not count as right. {len(unlabelled)} of '
          f'{len(targets)} targets are -1; leave these examples out.'
      )


def _is_minus_one(value: Any) -> bool:
  if isinstance(value, dict):
    value = value.get('value')
  return isinstance(value, (int, float, np.number)) and bool(value == -1)
