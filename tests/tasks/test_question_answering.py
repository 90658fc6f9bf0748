"""Questions about passages: T5's text, the rows of TFDS, and one prompt in other domains."""

import gzip
import json
import re

import jax.numpy as jnp
import pytest

import prompt_tuning_jax as ptj
from prompt_tuning_jax import cli
from prompt_tuning_jax.data.cache import load_task, load_task_or_mixture
from prompt_tuning_jax.data.seqio_source import import_seqio, mixture_members
from prompt_tuning_jax.typing import Injection

pytestmark = pytest.mark.usefixtures('own_folder')

MRQA = {
    'bioasq': 'BioASQ', 'drop': 'DROP', 'duorc': 'DuoRC.ParaphraseRC', 'race': 'RACE',
    'relation_extraction': 'RelationExtraction', 'textbookqa': 'TextbookQA',
}  # fmt: skip


def question(name, text, *answers):
  found = [{'text': answer, 'answer_start': 3} for answer in answers]
  return {'id': name, 'question': text, 'answers': found}


SQUAD = {
    'version': '1.1',
    'data': [
        {
            'title': 'Denver',
            'paragraphs': [
                {
                    'context': 'Denver (Colorado)\nwon 24–10 in the U.S.',
                    'qas': [
                        question('q1', 'Who won?', 'Denver', 'Denver (Colorado)'),
                        question('q2', '  Where?', 'in the U.S.'),
                    ],
                }
            ],
        },
        {
            'title': 'Café',
            'paragraphs': [{'context': 'A café.', 'qas': [question('q3', 'What?', 'café')]}],
        },
    ],
}  # fmt: skip


def write_squad(tmp_path, content=SQUAD, file='dev-v1.1.json'):
  path = tmp_path / 'squad' / file
  path.parent.mkdir(exist_ok=True)
  path.write_text(content if isinstance(content, str) else json.dumps(content))
  return path


def mrqa_line(context, *qas):
  return {'id': '', 'context': context, 'context_tokens': [['x', 0]], 'qas': list(qas)}


def mrqa_question(name, text, answers, detected):
  return {
      'qid': name,
      'question': text,
      'answers': answers,
      'detected_answers': [{'text': answer, 'char_spans': [[0, 3]]} for answer in detected],
  }


LINES = [
    {'header': {'dataset': 'TextbookQA', 'split': 'dev'}},
    mrqa_line(
        'Rocks\tare  hard.\nWater is\nnot.',
        mrqa_question('a1', 'What is\nhard?', ['rocks', 'a rock,\tor two'], ['Rocks']),
        mrqa_question('a2', 'And water?', ['not'], []),
    ),
]


def write_mrqa(tmp_path, name, lines=None, opener=gzip.open):
  path = tmp_path / 'mrqa' / (f'{MRQA[name]}.jsonl' + ('.gz' if opener is gzip.open else ''))
  path.parent.mkdir(exist_ok=True)
  with opener(path, 'wt') as file:
    file.writelines(json.dumps(line) + '\n' for line in lines or LINES)
  return path


def examples(task):
  return [task.example(index) for index in range(len(task))]


def test_squad_has_the_text_of_t5(tmp_path, vocabulary):
  write_squad(tmp_path)
  for name in ('squad_v010_allanswers', 'taskless_squad_v010_allanswers'):
    task = load_task(name, 'validation', vocabulary)
    # Every character but ASCII's letters, digits and the underscore has spaces around it,
    # which the end of a text keeps.
    passage = 'Denver ( Colorado ) won 24 – 10 in the U . S . '
    assert [(e['inputs_pretokenized'], e['targets_pretokenized']) for e in examples(task)] == [
        (f'question: Who won ? context: {passage}', 'Denver'),
        (f'question: Where ? context: {passage}', 'in the U . S . '),
        ('question: What ? context: A caf é . ', 'caf é '),
    ]
  assert task.target(0) == ['Denver', 'Denver ( Colorado ) ']
  assert [task.postprocess_fn(t, is_target=False) for t in ('a', '')] == ['a', '']
  targets = [task.target(index) for index in range(3)]
  (metric,) = task.metric_fns
  assert metric(targets, ['Denver (Colorado)', 'the U . S .', 'tea']) == {
      'em': pytest.approx(100 / 3), 'f1': pytest.approx(100 / 3 * (1 + 0.8)),
  }  # fmt: skip


def test_squad_s_files_give_the_rows_of_tfds(tmp_path):
  path = write_squad(tmp_path)
  import_seqio()
  from tensorflow_datasets.question_answering import qa_utils

  from prompt_tuning_jax.tasks import question_answering

  files = question_answering.SquadJson({'validation': 'dev-v1.1.json'})
  columns = files.read([str(path)], 'validation')
  rows = [row for _, row in qa_utils.generate_squadlike_examples(str(path))]
  for name in ('id', 'title', 'context', 'question'):
    assert columns[name] == [row[name] for row in rows]
  assert columns['answers/text'] == [row['answers']['text'] for row in rows]


@pytest.mark.parametrize(
    ('bad', 'reason'),
    [
        ('{"data": [', 'Expecting value'),
        ('[]', 'list indices must be'),
        ('{}', "no field 'data'"),
        ({'data': [{'paragraphs': [{'qas': [question('q', 'x?', 'y')]}]}]}, "field 'context'"),
        ({'data': [{'paragraphs': [{'context': 'c', 'qas': [question('q', 'x?')]}]}]},
         'the question q has no answer'),
        ({'data': [{'paragraphs': [{'context': 'c', 'qas': [question('q', None, 'y')]}]}]},
         "'question' is not a text"),
        ({'data': SQUAD['data'] * 2}, 'holds 6 questions, of which 3 have an id of their own'),
        ({'data': []}, 'holds 0 questions'),
    ],
)  # fmt: skip
def test_what_is_wrong_with_squad_s_file_is_said(tmp_path, vocabulary, bad, reason):
  write_squad(tmp_path, bad)
  with pytest.raises(ValueError, match=rf'dev-v1\.1\.json.*{reason}'):
    load_task('squad_v010_allanswers', 'validation', vocabulary)


@pytest.mark.parametrize('name', MRQA)
def test_mrqa_s_files_give_all_of_their_questions(tmp_path, vocabulary, name):
  write_mrqa(tmp_path, name, opener=open if name == 'race' else gzip.open)
  for prefix in ('', 'taskless_'):
    task = load_task(f'{prefix}mrqa_{name}_v001', 'validation', vocabulary)
    passage = 'Rocks are hard . Water is not . '
    # The target is what the passage holds; without that, the first answer.
    assert [(e['inputs_pretokenized'], e['targets_pretokenized']) for e in examples(task)] == [
        (f'question: What is hard ? context: {passage}', 'Rocks'),
        (f'question: And water ? context: {passage}', 'not'),
    ]
  assert [task.target(0), task.target(1)] == [['rocks', 'a rock , or two'], ['not']]
  assert [e['id'] for e in examples(task)] == ['a1', 'a2']


@pytest.mark.parametrize(
    ('bad', 'reason'),
    [
        (mrqa_line('c', mrqa_question('a3', 'x?', [], [])), 'question a3 has no answer'),
        (mrqa_line('c', mrqa_question('a3', 'x?', ['y', ''], [])), 'or an empty one'),
        (mrqa_line('c', {'qid': 'a3', 'question': 'x?'}), "no field 'answers'"),
        ({'context': 'c'}, "no field 'qas'"),
        ({'header': {}}, "no field 'context'"),
    ],
)
def test_a_bad_line_of_mrqa_is_named(tmp_path, vocabulary, bad, reason):
  write_mrqa(tmp_path, 'drop', [*LINES, bad])
  with pytest.raises(ValueError, match=rf'(?s)DROP\.jsonl\.gz.*line 3.*{reason}'):
    load_task('mrqa_drop_v001', 'validation', vocabulary)


def test_a_missing_file_is_named_with_where_to_get_it(vocabulary):
  with pytest.raises(FileNotFoundError, match=r'mrqa/RACE\.jsonl.*download_out_of_domain_dev'):
    load_task('mrqa_race_v001', 'validation', vocabulary)


@pytest.mark.parametrize('prefix', ['', 'taskless_'])
def test_mixtures_train_on_squad_and_evaluate_on_the_others_too(tmp_path, vocabulary, prefix):
  squad = f'{prefix}squad_v010_allanswers'
  for target in MRQA:
    both = mixture_members(f'{prefix}squad_to_{target}', 'prompt_tuning_jax.tasks')
    assert dict(both['members']) == {squad: 1.0, f'{prefix}mrqa_{target}_v001': 1.0}
  write_squad(tmp_path)
  write_squad(tmp_path, file='train-v1.1.json')
  for name in MRQA:
    write_mrqa(tmp_path, name)
  ((train, _),) = load_task_or_mixture(f'{prefix}squad_to_mrqa', 'train', vocabulary)
  assert (train.name, len(train)) == (squad, 3)
  dev = load_task_or_mixture(f'{prefix}squad_to_mrqa', 'validation', vocabulary)
  assert {task.name: len(task) for task, _ in dev} == {
      squad: 3, **{f'{prefix}mrqa_{name}_v001': 2 for name in MRQA}
  }  # fmt: skip


@pytest.mark.slow
def test_a_prompt_for_squad_is_evaluated_in_other_domains(tmp_path, capsys):
  write_squad(tmp_path)
  write_mrqa(tmp_path, 'textbookqa')
  backbone = ptj.load_backbone('nano')
  injection = Injection(virtual_embeddings=jnp.ones((5, backbone.spec.d_model)))
  prompt = tmp_path / 'prompt.safetensors'
  ptj.save_prompt(prompt, injection, backbone=backbone)
  arguments = [
      'evaluate', '--gin_file=models/nano', f'--gin.PROMPT_FILE={prompt}',
      "--gin.MIXTURE_OR_TASK_NAME='squad_to_textbookqa'", f'--gin.EVAL_OUTPUT_DIR={tmp_path}',
      "--gin.TASK_FEATURE_LENGTHS={'inputs': 64, 'targets': 16}", "--gin.EVAL_METHOD='generate'",
  ]  # fmt: skip
  assert cli.main(arguments) == 0, capsys.readouterr().err
  told = capsys.readouterr().err
  for name, size in (('squad_v010_allanswers', 3), ('mrqa_textbookqa_v001', 2)):
    assert re.search(rf'{name}, validation: em .*, f1 .* \({size} examples\)', told)
    folder = tmp_path / 'inference_eval'
    (metrics,) = (folder / f'{name}-metrics.jsonl').read_text().splitlines()
    assert {'em', 'f1'} <= json.loads(metrics).keys()
    lines = (folder / f'{name}-validation-predictions.jsonl').read_text().splitlines()
    assert len(lines) == size
    assert all(isinstance(json.loads(line)['prediction'], str) for line in lines)
