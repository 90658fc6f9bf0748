"""What `evaluate` and `infer` make of files, blank lines and settings left out; config.gin."""

from __future__ import annotations

import io
import json
import re
import sys

import gin
import numpy as np
import pytest

from prompt_tuning_jax import artifact, cli, commands, config
from prompt_tuning_jax.checkpoints.load import load_backbone
from prompt_tuning_jax.data.tokenized_task import TokenizedTask
from prompt_tuning_jax.evaluation import evaluate as evaluate_lib
from prompt_tuning_jax.evaluation.decoding import Decoding
from prompt_tuning_jax.evaluation.results import EvalResult
from prompt_tuning_jax.typing import Injection


@pytest.fixture(scope='module')
def backbone(backbone_dir):
  return load_backbone(backbone_dir)


@pytest.fixture(autouse=True)
def _clean():
  yield
  gin.clear_config()


@pytest.fixture
def infer(backbone_dir, capsys, monkeypatch):
  """Runs `infer` on what is piped to it and returns status, lines of output and errors."""

  def run(piped, *flags):
    monkeypatch.setattr(sys, 'stdin', io.StringIO(piped))
    where = f'--gin.INITIAL_CHECKPOINT_PATH={backbone_dir}'
    status = cli.main(['infer', where, '--gin.Decoding.max_length=3', *flags])
    printed, errors = capsys.readouterr()
    return status, printed.split('\n')[:-1], errors

  return run


@pytest.mark.filterwarnings('default')
@pytest.mark.parametrize('labels', [[], ["--gin.CLASS_LABELS=['animal', 'plant']"]])
def test_lines_of_answers_match_lines_of_standard_input(infer, tmp_path, labels):
  status, lines, errors = infer(
      'a dog\n\n  \na tree\n', *labels, f'--gin.INFER_OUTPUT_DIR={tmp_path}'
  )
  assert status == 0, errors
  assert len(lines) == 4
  assert lines[1] == lines[2] == ''
  assert '2 of 4 texts are blank' in errors
  records = [json.loads(x) for x in (tmp_path / 'inferences.jsonl').read_text().splitlines()]
  assert [record['inputs'] for record in records] == ['a dog', '', '  ', 'a tree']
  # Blank lines change nothing for the others.
  assert infer('a dog\na tree\n', *labels)[1] == [lines[0], lines[3]]


def test_nothing_but_blank_lines_is_refused(infer):
  status, lines, errors = infer('\n \n')
  assert (status, lines) == (2, [])
  assert 'infer has no texts' in errors


def test_no_labels_to_choose_from_are_not_taken_for_none_given(infer, backbone):
  status, lines, errors = infer('a dog\n', '--gin.CLASS_LABELS=[]')
  assert (status, lines) == (2, [])
  assert 'CLASS_LABELS is []' in errors
  status, _, errors = infer('a dog\n', '--gin.infer.choices=[]')
  assert status == 2
  assert 'CLASS_LABELS is empty' in errors
  with pytest.raises(ValueError):
    commands.infer(backbone=backbone, texts=['a dog'], choices=[])


def test_fields_of_a_template_are_given_as_json_objects(infer, backbone, tmp_path):
  rows = np.ones((3, backbone.spec.d_model), np.float32)
  path = tmp_path / 'p.safetensors'
  artifact.save_prompt(
      path, Injection(rows), backbone=backbone, placement='{2} {sub} is a {1} <extra_id_0>.</s>'
  )
  prompt = f'--gin.PROMPT_FILE={path}'
  status, lines, errors = infer('{"sub": "a dog"}\n{"sub": "a tree"}\n', prompt)
  assert status == 0, errors
  assert len(lines) == 2
  for text, what in [('a dog', 'Expecting value'), ('{"sub": 3}', 'no object')]:
    status, _, errors = infer(text, prompt)
    assert status == 2
    assert f'each text is a JSON object such as {{"sub": "…"}}; this is none ({what}' in errors
  status, _, errors = infer('{"subject": "a dog"}', prompt)
  assert status == 2
  assert "has no 'sub'" in errors


@pytest.mark.filterwarnings('default')
def test_words_around_a_text_are_put_to_the_model(infer, tmp_path):
  labels = "--gin.CLASS_LABELS=['animal', 'plant']"
  design = ['--gin_file=methods/prompt_design', '--gin.PromptDesign.examples=0']
  status, lines, errors = infer(
      'a dog\n\na tree\n', labels, *design, f'--gin.INFER_OUTPUT_DIR={tmp_path}'
  )
  assert status == 0, errors
  assert lines == infer('a dog answer:\n\na tree answer:\n', labels)[1] != infer(
      'a dog\n\na tree\n', labels
  )[1]
  records = [json.loads(x) for x in (tmp_path / 'inferences.jsonl').read_text().splitlines()]
  assert [record['inputs'] for record in records] == ['a dog', '', 'a tree']
  # Fields of the design's template, as those of a prompt's, come as a JSON object.
  fields = '--gin.PromptDesign.template=Is {sub} a {obj}?'
  status, lines, errors = infer('{"sub": "a dog", "obj": "tree"}\n', labels, *design, fields)
  assert status == 0, errors
  assert lines == infer('Is a dog a tree?\n', labels)[1]
  status, _, errors = infer('a dog\n', labels, *design, fields)
  assert status == 2
  assert 'reads the fields sub, obj, so that each text is a JSON object' in errors
  broken = '--gin.PromptDesign.template="Think.\\n{inputs}"'
  status, _, errors = infer('a dog\n', labels, *design, broken)
  assert status == 0
  assert 'line breaks of PromptDesign are spaces to this model' in errors


def test_an_answer_stays_on_its_line():
  assert commands._answer_line({'prediction': 'one\ntwo'}) == 'one two'


@pytest.fixture
def evaluated(backbone, monkeypatch):
  """Calls `evaluate` up to the evaluation itself and returns what that is given."""
  examples = [{'inputs': 'a dog', 'targets': 'animal'}] * 70
  task = TokenizedTask.from_examples(examples, backbone.vocabulary, name='a_task')

  def run(**kwargs):
    seen = {}

    def evaluator(*args, **settings):
      seen.update(settings)
      return lambda *call, **step: EvalResult('a_task', 'train', {'accuracy': 0.0}, [])

    monkeypatch.setattr(evaluate_lib, 'load_designed', lambda *args, **others: [(task, 1.0)])
    monkeypatch.setattr(evaluate_lib, 'Evaluator', evaluator)
    commands.evaluate(backbone=backbone, task='a_task', **kwargs)
    return seen

  return run


def test_answers_may_be_as_long_as_the_targets_the_prompt_was_trained_with(
    evaluated, backbone, tmp_path
):
  path = str(tmp_path / 'prompt.safetensors')
  artifact.save_prompt(
      path,
      Injection(virtual_embeddings=np.ones((3, 16), np.float32)),
      backbone=backbone,
      feature_lengths={'inputs': 9, 'targets': 7},
  )
  open_end = Decoding(strategy='beam', max_length=None)
  assert evaluated(decoding=open_end, prompt_file=path)['decoding'].max_length == 7
  assert evaluated(decoding=open_end)['decoding'].max_length == 64
  lengths = {'inputs': 9, 'targets': 5}
  given = evaluated(decoding=open_end, prompt_file=path, feature_lengths=lengths)
  assert given['decoding'].max_length == 5
  assert evaluated(decoding=Decoding(max_length=2), prompt_file=path)['decoding'].max_length == 2
  assert evaluated(prompt_file=path)['decoding'] is None


def test_texts_are_answered_at_the_length_the_prompt_was_trained_with(backbone, monkeypatch):
  asked = []

  def generate(backbone, prompt, texts, **settings):
    asked.append(settings['max_length'])
    return [''] * len(texts)

  monkeypatch.setattr(commands.infer_lib, 'generate', generate)
  commands.infer(backbone=backbone, texts=['a dog'])
  kwargs = config.parse('infer', [], ["INITIAL_CHECKPOINT_PATH='nano'"], []).kwargs()
  commands.infer(**kwargs | {'backbone': backbone, 'texts': ['a dog']})
  assert asked == [None, None]


def test_the_configuration_of_a_training_run_leaves_the_batch_size_open(evaluated):
  assert evaluated(batch_size=None)['batch_size'] == 64


def test_a_design_is_evaluated_by_gin_alone(backbone_dir, tmp_path, capsys, monkeypatch):
  monkeypatch.setenv('PTJ_CACHE_DIR', str(tmp_path / 'cache'))
  for split, rows in (
      ('train', [f'thing {i}\t{i % 2}' for i in range(12)]),
      ('dev', [f'other {i}\t{i % 2}' for i in range(4)]),
  ):
    (tmp_path / f'{split}.tsv').write_text('\n'.join(['text\tlabel', *rows]))
  flags = [
      f'--gin.INITIAL_CHECKPOINT_PATH={backbone_dir}',
      '--gin.MIXTURE_OR_TASK_NAME=@FileTask()',
      '--gin.FileTask.name=things',
      f"--gin.FileTask.files={{'train': '{tmp_path}/train.tsv', "
      f"'validation': '{tmp_path}/dev.tsv'}}",
      '--gin.FileTask.inputs={text}',
      '--gin.FileTask.targets=label',
      "--gin.FileTask.label_names={'0': 'food', '1': 'plant'}",
      '--gin_file=methods/prompt_design',
  ]

  def predictions(*more):
    out = tmp_path / 'out'
    status = cli.main(['evaluate', *flags, f'--gin.EVAL_OUTPUT_DIR={out}', *more])
    printed, errors = capsys.readouterr()
    assert status == 0, errors
    assert re.fullmatch(r'things, validation: accuracy \S+ \(4 examples\)\n', printed)
    path = out / 'inference_eval' / 'things-validation-predictions.jsonl'
    lines = path.read_text().splitlines()
    return [json.loads(line)['inputs'] for line in lines]

  first = predictions()
  pattern = r'(thing (\d+) answer: (food|plant); ){4}other 3 answer:'
  assert re.fullmatch(pattern, first[3])
  shown = re.findall(r'thing (\d+) answer: (\w+);', first[0])
  assert [('food', 'plant')[int(i) % 2] for i, _ in shown] == [label for _, label in shown]
  assert sorted(label for _, label in shown) == ['food', 'food', 'plant', 'plant']
  assert predictions('--gin.RANDOM_SEED=0') == first
  assert predictions('--gin.RANDOM_SEED=1') != first
  assert predictions('--gin.PROMPT_DESIGN=None') == [f'other {i}' for i in range(4)]

  # `tasks` shows the same inputs, of a split that is not the one of the examples.
  assert cli.main(['tasks', *flags, '--examples=1']) == 0
  printed, _ = capsys.readouterr()
  assert printed.startswith("things, split 'validation', 4 examples\n")
  shown = printed[: printed.index('encoder,')].replace('\n           ', ' ')
  assert 'prompt     words, PromptDesign(template=' in printed
  assert repr(first[0]) in shown


# The configuration in the folder of a run.


def _config(folder):
  return (folder / 'config.gin').read_text()


def test_a_new_run_has_its_configuration_from_the_start(tmp_path):
  with commands.kept_config(str(tmp_path / 'run'), 'A = 1\n'):
    assert _config(tmp_path / 'run') == 'A = 1\n'


@pytest.mark.parametrize('what_it_left', ['run.json', 'results.jsonl'])
def test_a_refused_run_leaves_the_configuration_of_the_one_before(tmp_path, what_it_left):
  (tmp_path / what_it_left).write_text('{}')
  (tmp_path / 'config.gin').write_text('A = 1\n')
  with pytest.raises(ValueError), commands.kept_config(str(tmp_path), 'A = 2\n'):
    raise ValueError('MODEL_DIR holds another run')
  assert _config(tmp_path) == 'A = 1\n'


def test_a_resumed_run_that_ends_well_leaves_its_configuration(tmp_path):
  (tmp_path / 'run.json').write_text('{}')
  (tmp_path / 'config.gin').write_text('A = 1\n')
  with commands.kept_config(str(tmp_path), 'A = 2\n'):
    assert _config(tmp_path) == 'A = 1\n'
  assert _config(tmp_path) == 'A = 2\n'


def test_several_prompts_are_evaluated_into_a_table_and_files(
    backbone, backbone_dir, tmp_path, capsys
):
  rng = np.random.default_rng(0)
  for seed in range(2):
    rows = rng.normal(size=(3, backbone.spec.d_model)).astype(np.float32)
    artifact.save_prompt(
        tmp_path / 'demo_gloss_category' / f'{seed}.safetensors', Injection(rows),
        backbone=backbone, feature_lengths={'inputs': 64, 'targets': 4},
    )  # fmt: skip
  command = [
      'evaluate', f'--gin.INITIAL_CHECKPOINT_PATH={backbone_dir}',
      '--gin.MIXTURE_OR_TASK_NAME=demo_gloss_category', '--gin.SPLIT=validation',
      f'--gin.EVAL_OUTPUT_DIR={tmp_path}/out',
  ]  # fmt: skip
  pattern = f'--gin.PROMPT_FILE={tmp_path}/{{task}}/*.safetensors'
  assert cli.main([*command, pattern]) == 0
  printed, errors = capsys.readouterr()
  report = json.loads((tmp_path / 'out' / 'report.json').read_text())
  (name,) = report['tasks']
  accuracies = report['tasks'][name]['metrics']['accuracy']['values']
  assert len(accuracies) == 2
  assert f'{np.mean(accuracies):.2f} ± {np.std(accuracies, ddof=1):.2f} |      480 |' in printed
  assert errors.count('demo_gloss_category, validation: accuracy') == 2
  both = repr([f'{tmp_path}/demo_gloss_category/{seed}.safetensors' for seed in range(2)])
  assert cli.main([*command, f'--gin.PROMPT_FILE={both}', '--dry_run']) == 0
  for where, message in [
      (f'{tmp_path}/{{task}}/*.npy', 'no file .*/demo_gloss_category/.*.npy .for the task'),
      (f"{{'other': '{tmp_path}/demo_gloss_category/0.safetensors'}}", 'no prompt for demo_gloss'),
      ('[3]', 'expected a path, a list of paths, or a dict from tasks'),
  ]:
    assert cli.main([*command, f'--gin.PROMPT_FILE={where}']) == 2
    assert re.search(message, capsys.readouterr().err)


def test_several_prompts_answer_together(backbone, backbone_dir, tmp_path, capsys):
  rng = np.random.default_rng(0)
  paths = [str(tmp_path / f'{seed}.safetensors') for seed in range(3)]
  for length, path in enumerate(paths, start=2):
    rows = 3 * rng.normal(size=(length, backbone.spec.d_model)).astype(np.float32)
    artifact.save_prompt(
        path, Injection(rows), backbone=backbone, feature_lengths={'inputs': 64, 'targets': 4}
    )
  where = f'--gin.INITIAL_CHECKPOINT_PATH={backbone_dir}'
  every, out = f'--gin.PROMPT_FILE={tmp_path}/*.safetensors', f'{tmp_path}/out'
  evaluate = [
      'evaluate', where, every, '--gin.ENSEMBLE=vote', f'--gin.EVAL_OUTPUT_DIR={out}',
      '--gin.MIXTURE_OR_TASK_NAME=demo_gloss_category',
  ]  # fmt: skip
  assert cli.main(evaluate) == 0
  printed = capsys.readouterr().out
  report = json.loads((tmp_path / 'out' / 'report.json').read_text())
  (task,) = report['tasks'].values()
  assert report['ensemble'] == 'vote' and task['prompts'] == paths
  row = next(line for line in printed.splitlines() if line.startswith('| demo_gloss_category'))
  values = task['metrics']['accuracy']['values']
  expected = [f'{max(values):.2f}', f"{task['ensemble']['accuracy']:.2f}", '480', '3']
  assert [cell.strip() for cell in row.strip('|').split('|')][4:] == expected
  infer = ['infer', where, f'--gin.PROMPT_FILE={paths!r}', 'a dog']
  labels = "--gin.CLASS_LABELS=['animal', 'plant']"
  assert cli.main([*infer, labels, f'--gin.INFER_OUTPUT_DIR={out}']) == 0
  answer, *told = capsys.readouterr().out.rstrip('\n').split('\t')
  kept = json.loads((tmp_path / 'out' / 'inferences.jsonl').read_text())
  assert answer == kept['prediction'] and sum(kept['votes'].values()) == 3
  best = max(kept['scores'], key=kept['scores'].get)
  assert told[0] == f"{best} {kept['scores'][best]:.3f}, {kept['votes'].get(best, 0)} of 3"
  assert cli.main([*infer, '--gin.Decoding.max_length=2']) == 0
  assert re.search(r'\t[123] of 3\n$', capsys.readouterr().out)
  for flags, message in [
      ([*infer, '--gin.ENSEMBLE=mean'], 'mean log-probabilities of CLASS_LABELS, which are not'),
      (['infer', where, "--gin.PROMPT_FILE={'cb': 'x'}", 'a dog'], 'infer knows of no task'),
      (['infer', where, '--gin.PROMPT_FILE=/tmp/{task}/x', 'a dog'], 'infer knows of no task'),
      ([*evaluate, '--gin.EVAL_METHOD=generate', '--gin.ENSEMBLE=mean'], 'writes answers freely'),
  ]:
    assert cli.main(flags) == 2
    assert message in capsys.readouterr().err
  wide = str(tmp_path / 'of_template.safetensors')
  artifact.save_prompt(
      wide, Injection(np.ones((1, 16), np.float32)), backbone=backbone, placement='{1} {sub}'
  )
  assert cli.main(['infer', where, f'--gin.PROMPT_FILE={[paths[0], wide]!r}', 'a dog']) == 2
  assert 'templates of different fields (inputs; sub)' in capsys.readouterr().err
