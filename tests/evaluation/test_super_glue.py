"""The score of SuperGLUE against published tables, and evaluation of grouped examples."""

import itertools
import math

import numpy as np
import pytest

from prompt_tuning_jax.checkpoints.load import load_backbone
from prompt_tuning_jax.data.cache import load_task_or_mixture
from prompt_tuning_jax.evaluation import ranking
from prompt_tuning_jax.evaluation.evaluate import evaluate
from prompt_tuning_jax.evaluation.super_glue import METRICS, super_glue_score, task_scores
from tests.tasks.super_glue_samples import NEWS, OFFICIAL, PARTY, QUERIES, TASKS, write_official


def published(boolq, cb, copa, multirc, record, rte, wic, wsc):
  """A row of a table: accuracies, and the pairs of the tasks that have two metrics."""
  return {
      'boolq': {'accuracy': boolq},
      'cb': {'accuracy': cb[0], 'mean_3class_f1': cb[1]},
      'copa': {'accuracy': copa},
      'multirc': {'exact_match': multirc[0], 'f1': multirc[1]},
      'record': {'em': record[0], 'f1': record[1]},
      'rte': {'accuracy': rte},
      'wic': {'accuracy': wic},
      'wsc': {'accuracy': wsc},
  }


# Lester et al. (2021), T5 XXL: the mean of five prompts, and their majority vote.
MEAN = published(91.1, (99.3, 99.0), 98.8, (65.7, 88.7), (92.7, 93.4), 92.6, 76.2, 95.8)
VOTE = published(91.7, (100, 100), 100, (67.1, 89.4), (93.2, 93.9), 93.5, 77.4, 96.2)


@pytest.mark.parametrize(('row', 'score'), [(MEAN, 90.5), (VOTE, 91.3)])
def test_the_score_of_a_published_row_is_the_published_score(row, score):
  assert round(super_glue_score(row), 1) == score
  assert task_scores(row)['multirc'] == pytest.approx(
      (row['multirc']['f1'] + row['multirc']['exact_match']) / 2
  )


def test_names_of_tasks_are_taken_in_full_and_other_tasks_do_not_count():
  for pattern in ('super_glue_{}_v102', 'taskless_super_glue_{}_v102', 'super_glue_{}_v102/test'):
    named = {
        pattern.format(task).replace('wsc_v102', 'wsc_v102_simple_eval'): values
        for task, values in MEAN.items()
    }
    others = {
        'super_glue_axb_v102': {'matthews_corrcoef': 3.0},
        'axg': {'accuracy': 7.0},
        'glue_rte_v200': {'accuracy': 1.0},
    }
    assert super_glue_score(named | others) == super_glue_score(MEAN)


def test_what_is_missing_is_named_all_at_once():
  for left_out in METRICS:
    rest = {task: values for task, values in MEAN.items() if task != left_out}
    with pytest.raises(ValueError, match=f'metrics in percent: {left_out} missing .there is '):
      super_glue_score(rest)
  bad = {'cb': {'accuracy': 90.0}, 'super_glue_cb_v102': MEAN['cb'], 'rte': {'accuracy': math.nan}}
  with pytest.raises(ValueError) as error:
    super_glue_score(bad)
  for text in (
      'boolq, copa, multirc, record, wic, wsc missing (there is cb, super_glue_cb_v102, rte)',
      'cb given as cb and as super_glue_cb_v102',
      "cb has {'accuracy': 90.0} for accuracy, mean_3class_f1",
      "rte has {'accuracy': nan}",
  ):
    assert text in str(error.value)
  with pytest.raises(ValueError, match='there is nothing'):
    super_glue_score({})


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """Where the tasks look for their official files."""
  monkeypatch.setenv('PTJ_CACHE_DIR', str(tmp_path / 'cache'))
  monkeypatch.setenv('PTJ_LOCAL_DATA', str(tmp_path))
  return tmp_path


def evaluate_each_way(backbone, task, **settings):
  """Evaluates a task in batches of several sizes and lengths, and yields the results."""
  for batch_size, lengths in [(1, 'bucket'), (2, 'pad'), (4, 'bucket'), (7, 'pad'), (64, 'pad')]:
    yield evaluate(
        backbone, None, task, batch_size=batch_size, lengths=lengths,
        feature_lengths={'inputs': 128, 'targets': 16}, progress=False, **settings,
    )  # fmt: skip


# Judgements of each question's answers: (label, what the model says). No batch of two, four
# or seven holds these groups whole.
JUDGED = {
    31: [(1, 1), (0, 0), (0, 0)],
    32: [(1, 1), (1, 0)],
    40: [(0, 0)],
    41: [(0, 1), (1, 1), (1, 1), (0, 0)],
}


def test_questions_of_multirc_are_whole_whatever_the_batches(folder, backbone_dir, monkeypatch):
  counter = itertools.count()
  said = [says for answers in JUDGED.values() for _, says in answers]
  questions = [
      {'idx': number, 'question': 'Who?', 'answers': [
          {'idx': (n := next(counter)), 'text': 'a ' + 'boat ' * n, 'label': label}
          for label, _ in answers
      ]}
      for number, answers in JUDGED.items()
  ]  # fmt: skip
  write_official(folder, 'MultiRC/val.jsonl', [
      {'idx': 3, 'passage': {'text': 'He sails.', 'questions': questions[:2]}},
      {'idx': 4, 'passage': {'text': 'He sails.', 'questions': questions[2:]}},
  ])  # fmt: skip

  def by_length(module, params, tokens_BS, choices_CT, injection, **settings):
    # Each example is longer than the one before it, so that its length tells which it is.
    place_B = [lengths.index(length) for length in np.sum(tokens_BS > 0, axis=1) if length]
    scores_BC = np.zeros((len(tokens_BS), 2))
    scores_BC[np.arange(len(place_B)), [said[place] for place in place_B]] = 1
    return scores_BC

  backbone = load_backbone(backbone_dir)
  ((task, _),) = load_task_or_mixture(
      'taskless_super_glue_multirc_v102', 'validation', backbone.vocabulary
  )
  lengths = task.lengths('inputs').tolist()
  assert lengths == sorted(set(lengths)) and len(lengths) == 10
  monkeypatch.setattr(ranking, 'score_choices', by_length)
  for result in evaluate_each_way(backbone, task):
    assert [p['prediction']['value'] for p in result.predictions] == said
    # All that is said of questions 31 and 40 is right. True is said five times, once wrongly,
    # and once it is not said where it should be.
    assert result.metrics == {
        'exact_match': 50.0,
        'f1': pytest.approx(100 * 2 * 4 / (2 * 4 + 1 + 1)),
    }


def test_questions_of_record_count_once_whatever_the_batches(folder, backbone_dir):
  passage = {'text': 'Rome, Oslo, Bonn.', 'entities': [
      {'start': 0, 'end': 3}, {'start': 6, 'end': 9}, {'start': 12, 'end': 15}
  ]}  # fmt: skip
  # Right answers → what the model says to the copies of the question; the first counts.
  said = {
      ('Oslo', 'Rome'): ['the Rome', 'none'],
      ('Rome',): ['Rome of old'],
      ('Bonn', 'Oslo', 'Rome'): ['none', 'Oslo', 'Rome'],
      ('Bonn',): ['Bonn'],
  }
  queries = [
      {'idx': number, 'query': '@placeholder', 'answers': [{'text': text} for text in right]}
      for number, right in enumerate(said)
  ]
  # The last passage asks a question of the same number.
  write_official(folder, 'ReCoRD/val.jsonl', [
      {'idx': 1, 'passage': passage, 'qas': queries[:3]},
      {'idx': 2, 'passage': passage, 'qas': [queries[3] | {'idx': 0}]},
  ])  # fmt: skip
  backbone = load_backbone(backbone_dir)
  texts = [text for copies in said.values() for text in copies]

  def say(module, params, tokens_BS, injection, *, eos_id, numbers, prompt_ids_B):
    assert prompt_ids_B is None
    tokens_BKT = np.zeros((len(tokens_BS), 1, 16), np.int32)
    for row, number in zip(tokens_BKT[:, 0], numbers):
      ids = [*backbone.vocabulary.encode(texts[number]), eos_id]
      row[: len(ids)] = ids
    return tokens_BKT, np.zeros(tokens_BKT.shape[:2])

  for result in evaluate_each_way(backbone, 'super_glue_record_v102', decoding=say):
    assert [p['prediction']['value'] for p in result.predictions] == texts
    # Right, half right (one word of three is Rome), wrong, right.
    assert result.metrics == {'em': 50.0, 'f1': pytest.approx(100 * (1 + 0.5 + 0 + 1) / 4)}


RANKED = {
    'boolq': ['False', 'True'],
    'cb': ['entailment', 'contradiction', 'neutral'],
    'copa': ['choice1', 'choice2'],
    'multirc': ['False', 'True'],
    'rte': ['entailment', 'not_entailment'],
    'wic': ['False', 'True'],
}


@pytest.mark.slow
def test_the_mixture_is_ranked_where_there_are_labels_and_generated_elsewhere(
    folder, backbone_dir
):
  # The samples that have labels: of others there is nothing to score.
  labelled = {
      'BoolQ/val.jsonl': OFFICIAL['super_glue_boolq_v102', 'BoolQ/val.jsonl'][0][:2],
      'WSC/val.jsonl': OFFICIAL['super_glue_wsc_v102_simple_eval', 'WSC/val.jsonl'][0][:2],
      'MultiRC/val.jsonl': [{'idx': 2, 'passage': PARTY | {'questions': PARTY['questions'][:1]}}],
      'ReCoRD/val.jsonl': [{'idx': 11, 'passage': NEWS, 'qas': QUERIES[:1]}],
  }
  for (task, file), (lines, _) in OFFICIAL.items():
    if TASKS[task][1] == 'validation':
      write_official(folder, file, labelled.get(file, lines))
  backbone = load_backbone(backbone_dir)
  results = evaluate(
      backbone, None, 'taskless_super_glue_v102_proportional',
      feature_lengths={'inputs': 128, 'targets': 16}, batch_size=3, progress=False,
  )  # fmt: skip
  metrics = {name: result.metrics for name, result in results.items()}
  for task, labels in RANKED.items():
    for prediction in results[f'taskless_super_glue_{task}_v102'].predictions:
      assert list(prediction['scores']) == labels
      best = max(prediction['scores'], key=prediction['scores'].get)
      assert prediction['prediction_text'] == best
  for task in ('record_v102', 'wsc_v102_simple_eval'):
    for prediction in results[f'taskless_super_glue_{task}'].predictions:
      assert 'score' in prediction and 'scores' not in prediction
  assert len(results) == 8
  assert 0 <= super_glue_score(metrics) <= 100
  means = [np.mean([metrics[name][m] for m in metrics[name]]) for name in metrics]
  assert super_glue_score(metrics) == pytest.approx(np.mean(means))
