"""An evaluation that was interrupted goes on where it stopped, and ends as if it never had."""

import json

import numpy as np
import pytest

from prompt_tuning_jax.evaluation import decoding, ranking
from prompt_tuning_jax.evaluation.ensemble import EnsembleEvaluator
from prompt_tuning_jax.evaluation.evaluate import evaluate
from prompt_tuning_jax.evaluation.infer import ensemble, generate, rank
from prompt_tuning_jax.evaluation.kept_answers import KeptAnswers
from prompt_tuning_jax.evaluation.report import evaluate_prompts
from prompt_tuning_jax.typing import Injection
from tests.evaluation.test_evaluate import CLASSES, SHAPE, classification, texts


class Power:
  """Counts the batches that are computed, and goes off before one of them."""

  def __init__(self, monkeypatch):
    self.computed, self.lasts = 0, None
    for module, name in ((ranking, 'score_choices'), (decoding, 'greedy')):
      monkeypatch.setattr(module, name, self._counted(getattr(module, name)))

  def _counted(self, compute):
    def counted(*args, **kwargs):
      if self.computed == self.lasts:
        raise KeyboardInterrupt
      self.computed += 1
      return compute(*args, **kwargs)

    return counted

  def cut(self, batches, run):
    """Runs until the power goes off after so many batches."""
    self.computed, self.lasts = 0, batches
    with pytest.raises(KeyboardInterrupt):
      run()
    self.computed, self.lasts = 0, None


@pytest.fixture
def power(monkeypatch):
  return Power(monkeypatch)


@pytest.fixture
def prompts(backbone):
  rng = np.random.default_rng(0)
  shape = (5, backbone.spec.d_model)
  return [Injection(rng.normal(size=shape).astype(np.float32)) for _ in range(2)]


def kept(folder):
  return sorted(path.name for path in (folder / '.unfinished').glob('*'))


@pytest.mark.parametrize('method', ['rank', 'generate'])
def test_an_evaluation_goes_on_and_ends_as_if_it_never_stopped(
    method, backbone, soft_prompt, power, tmp_path
):
  task = classification(backbone)
  settings = SHAPE | {'method': method, 'batch_size': 2}

  def run(folder, **changed):
    return evaluate(backbone, soft_prompt, task, output_dir=str(folder), **settings | changed)

  whole = run(tmp_path / 'whole')
  assert power.computed == 4
  power.cut(2, lambda: run(tmp_path))
  assert len(kept(tmp_path)) == 1
  found = run(tmp_path)
  assert power.computed == 2
  assert (found.metrics, found.predictions) == (whole.metrics, whole.predictions)
  assert kept(tmp_path) == []


def test_what_was_kept_of_another_evaluation_is_not_taken(backbone, soft_prompt, power, tmp_path):
  task = classification(backbone)
  settings = SHAPE | {'batch_size': 2, 'output_dir': str(tmp_path)}
  power.cut(3, lambda: evaluate(backbone, soft_prompt, task, **settings))
  other = Injection(np.asarray(soft_prompt.virtual_embeddings) * 2)
  evaluate(backbone, other, task, **settings)
  assert power.computed == 4
  power.cut(3, lambda: evaluate(backbone, soft_prompt, task, **settings))
  evaluate(backbone, soft_prompt, task, **settings, normalize_by_length=True)
  assert power.computed == 4


def test_of_several_prompts_those_that_were_done_are_not_evaluated_again(
    backbone, prompts, power, tmp_path
):
  tasks = [classification(backbone)]
  settings = SHAPE | {'batch_size': 4}

  def run(folder):
    return evaluate_prompts(backbone, prompts, tasks, output_dir=str(folder), **settings)

  whole = run(tmp_path / 'whole')
  power.cut(3, lambda: run(tmp_path))
  found = run(tmp_path)
  assert power.computed == 1
  for one, other in zip(found.results['toy'], whole.results['toy'], strict=True):
    assert one.predictions == other.predictions
  assert kept(tmp_path) == []


def test_an_ensemble_goes_on(backbone, prompts, power, tmp_path):
  def run(keep_in):
    return EnsembleEvaluator(
        backbone, prompts, classification(backbone), keep_in=keep_in, **SHAPE
    )()

  whole = run(None)
  power.cut(2, lambda: run(str(tmp_path)))
  found = run(str(tmp_path))
  assert power.computed == 2
  assert found[1].predictions == whole[1].predictions


def test_answers_to_texts_go_on(backbone, prompts, power, tmp_path):
  asked = texts(7)
  for answer in (
      lambda **kept: rank(backbone, prompts[0], asked, CLASSES, batch_size=2, **kept),
      lambda **kept: generate(backbone, prompts[0], asked, max_length=3, batch_size=2, **kept),
      lambda **kept: ensemble(backbone, prompts, asked, choices=CLASSES, batch_size=4, **kept),
  ):
    power.computed = 0
    whole = answer()
    batches = power.computed
    power.cut(2, lambda answer=answer: answer(keep_in=str(tmp_path)))
    assert len(kept(tmp_path)) == 1
    assert answer(keep_in=str(tmp_path)) == whole
    assert power.computed == batches - 2
    assert not (tmp_path / '.unfinished').exists()


def test_a_line_that_was_cut_short_is_found_again(tmp_path):
  of_run = KeptAnswers(tmp_path, lambda: {'seed': 1})
  of_run.add([[0, 'a']])
  of_run.add([[1, 'b']])
  (path,) = (tmp_path / '.unfinished').iterdir()
  path.write_text(path.read_text()[:-5])
  again = KeptAnswers(tmp_path, lambda: {'seed': 1})
  assert again.read() == [[[0, 'a']]]
  again.add([[1, 'c']])
  assert [json.loads(line)['answers'] for line in path.read_text().splitlines()] == [
      [[0, 'a']], [[1, 'c']]
  ]  # fmt: skip
  assert KeptAnswers(tmp_path, lambda: {'seed': 2}).read() == KeptAnswers(None).read() == []
