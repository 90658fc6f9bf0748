"""An evaluation that was interrupted goes on where it stopped, and ends as if it never had."""

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax import commands
from prompt_tuning_jax.backbones.backbone import Backbone
from prompt_tuning_jax.data.file_task import FileTask
from prompt_tuning_jax.evaluation import decoding, ranking
from prompt_tuning_jax.evaluation.ensemble import EnsembleEvaluator
from prompt_tuning_jax.evaluation.evaluate import evaluate
from prompt_tuning_jax.evaluation.infer import ensemble, generate, rank
from prompt_tuning_jax.evaluation.kept_answers import AnswerFolder
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
  (of_first,) = kept(tmp_path)
  other = Injection(np.asarray(soft_prompt.virtual_embeddings) * 2)
  doubled = jax.tree.map(lambda x: 2 * x, backbone.params)
  reworded = task.with_inputs([f'not {task.text("inputs", n)}' for n in range(len(task))])
  assert reworded.manifest == task.manifest
  for prompt, of_task, changed in (
      (other, task, {}),
      (soft_prompt, task, {'normalize_by_length': True}),
      (soft_prompt, task, {'params': doubled}),
      (soft_prompt, reworded, {}),
  ):
    power.computed = 0
    evaluate(backbone, prompt, of_task, **settings, **changed)
    assert power.computed == 4
    # And what was kept is not theirs to remove.
    assert kept(tmp_path) == [of_first]
  power.computed = 0
  evaluate(backbone, soft_prompt, task, **settings)
  assert power.computed == 1 and kept(tmp_path) == []


def test_weights_of_a_run_go_on_as_well(backbone, soft_prompt, power, tmp_path):
  task = classification(backbone)
  tuned = jax.tree.map(lambda x: 2 * x, backbone.params)
  settings = SHAPE | {'batch_size': 2, 'output_dir': str(tmp_path), 'params': tuned}
  power.cut(3, lambda: evaluate(backbone, soft_prompt, task, **settings))
  evaluate(backbone, soft_prompt, task, **settings)
  assert power.computed == 1


def test_a_task_s_first_evaluation_goes_on_with_what_was_cached(
    backbone, soft_prompt, power, tmp_path
):
  (tmp_path / 'dev.tsv').write_text('text\tlabel\n' + ''.join(f'{t}\tyes\n' for t in texts(7)))
  task = FileTask(
      name='toy',
      files={'validation': str(tmp_path / 'dev.tsv')},
      inputs='{text}',
      targets='{label}',
      label_names=CLASSES,
  )
  settings = SHAPE | {
      'batch_size': 2, 'output_dir': str(tmp_path / 'out'), 'cache_dir': str(tmp_path / 'cache')
  }  # fmt: skip
  power.cut(3, lambda: evaluate(backbone, soft_prompt, task, **settings))
  assert os.listdir(tmp_path / 'cache')
  evaluate(backbone, soft_prompt, task, **settings)
  assert power.computed == 1


def test_what_decides_a_backbone_s_numbers_names_the_file(backbone, tmp_path):
  def named(backbone, params=None):
    answers = AnswerFolder(tmp_path / 'models' / 'eval').answers(backbone, params, dict)
    answers.add([])
    (name,) = kept(tmp_path / 'models' / 'eval')
    answers.forget()
    return name

  def other(module=backbone.module, params=None, source=''):
    return Backbone('other', module, backbone.vocabulary, lambda: params, source=source)

  config = dataclasses.replace(backbone.module.config, relpos_max_distance=7)
  source = str(tmp_path / 'models')
  os.mkdir(source)
  of_files = named(other(source=source))
  for changed in ({'config': config}, {'attention': 'dot_product'}):
    assert named(other(backbone.module.clone(**changed), source=source)) != of_files
  # What is written there by evaluations is none of it.
  assert named(other(source=source)) == of_files
  folder = tmp_path / 'models' / 'kernel'
  folder.mkdir()
  assert named(other(source=source)) == of_files
  (folder / '0.0').write_text('1')
  assert named(other(source=source)) != of_files
  os.symlink('nowhere', folder / '0.1')
  named(other(source=source))
  # Of weights that lie in no file their numbers count; of those in a bucket, its name.
  doubled = jax.tree.map(lambda x: 2 * x, backbone.params)
  in_memory = named(other(params=backbone.params))
  assert named(other(params=jax.tree.map(jnp.copy, backbone.params))) == in_memory
  assert named(other(params=doubled)) != in_memory
  assert named(other(params=None), doubled) == named(other(params=doubled))
  assert named(other(source='gs://b/a')) != named(other(source='gs://b/b'))


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
  def run(folder):
    keep_in = AnswerFolder(folder)
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


def test_answers_to_texts_are_kept_until_they_are_written(backbone, monkeypatch, power, tmp_path):
  def full(path, records):
    raise OSError('No space left on device')

  settings = dict(backbone=backbone, texts=texts(7), choices=CLASSES, batch_size=2)
  whole = commands.infer(**settings)
  with monkeypatch.context() as patched:
    patched.setattr(commands, 'write_jsonl', full)
    with pytest.raises(OSError, match='No space'):
      commands.infer(**settings, output_dir=str(tmp_path))
  power.computed = 0
  assert commands.infer(**settings, output_dir=str(tmp_path)) == whole
  assert power.computed == 0 and kept(tmp_path) == []


def of_seed(folder, backbone, seed=1):
  return AnswerFolder(folder).answers(backbone, None, lambda: {'seed': seed})


def test_batches_that_two_processes_kept_count_once(backbone, tmp_path):
  first, second = (of_seed(tmp_path, backbone) for _ in range(2))
  for of_run in (first, second):
    of_run.add([[0, 'a']])
    of_run.add([[1, 'b']])
  again = of_seed(tmp_path, backbone)
  assert again.read() == [[[0, 'a']], [[1, 'b']]]
  again.add([[2, 'c']])
  (path,) = (tmp_path / '.unfinished').iterdir()
  path.write_text(path.read_text().split('\n', 1)[1])  # What is left begins with batch 1.
  assert of_seed(tmp_path, backbone).read() == []


def test_a_line_that_was_cut_short_is_found_again(backbone, tmp_path):
  of_run = of_seed(tmp_path, backbone)
  of_run.add([[0, 'a']])
  of_run.add([[1, 'b']])
  (path,) = (tmp_path / '.unfinished').iterdir()
  path.write_text(path.read_text()[:-5])
  again = of_seed(tmp_path, backbone)
  assert again.read() == [[[0, 'a']]]
  again.add([[1, 'c']])
  assert [json.loads(line)['answers'] for line in path.read_text().splitlines()] == [
      [[0, 'a']], [[1, 'c']]
  ]  # fmt: skip
  assert of_seed(tmp_path, backbone, seed=2).read() == []
  assert of_seed(None, backbone).read() == []
