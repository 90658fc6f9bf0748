"""A design is scored as the same texts written by hand are."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax.checkpoints.load import load_backbone
from prompt_tuning_jax.data.file_task import FileTask
from prompt_tuning_jax.data.prompt_design import PromptDesign
from prompt_tuning_jax.data.tokenized_task import TokenizedTask
from prompt_tuning_jax.evaluation.evaluate import evaluate
from prompt_tuning_jax.evaluation.infer import generate, rank
from prompt_tuning_jax.evaluation.report import evaluate_prompts
from prompt_tuning_jax.typing import Injection

LABELS = ['negative', 'positive']
TRAIN = [('a warm film', 1), ('dull', 0), ('it was so, so', 0), ('what a joy', 1)]
DEV = [('a delight', 1), ('flat and dull', 0), ('not a joy', 0)]
DESIGN = PromptDesign('{examples}{text} so it is', 2, '{text} so it is {targets}', ' . ')


@pytest.fixture(scope='module')
def tiny(backbone_dir):
  return load_backbone(backbone_dir)


@pytest.fixture
def films(tmp_path):
  for name, rows in (('train', TRAIN), ('dev', DEV)):
    lines = ['text\tlabel', *(f'{text}\t{label}' for text, label in rows)]
    (tmp_path / f'{name}.tsv').write_text('\n'.join(lines))
  files = {'train': str(tmp_path / 'train.tsv'), 'validation': str(tmp_path / 'dev.tsv')}
  return FileTask('films', files, '{text}', 'label', label_names=dict(enumerate(LABELS)))


@pytest.fixture
def settings(tmp_path):
  return dict(cache_dir=str(tmp_path / 'cache'), progress=False)


def by_hand(design, vocabulary):
  """The inputs of the questions, written without the class under test but for its draw."""
  task = TokenizedTask.from_examples(
      [{'inputs': text, 'targets': LABELS[label]} for text, label in TRAIN],
      vocabulary,
      name='films',
      label_classes=LABELS,
  )
  shown = [TRAIN[number] for number in design.draw(task)]
  assert {label for _, label in shown} == {0, 1}
  solved = ''.join(f'{text} so it is {LABELS[label]} . ' for text, label in shown)
  return [f'{solved}{text} so it is' for text, _ in DEV]


def test_a_design_is_ranked_as_the_texts_written_by_hand(tiny, films, settings):
  result = evaluate(tiny, None, films, design=DESIGN, **settings)
  texts = by_hand(DESIGN, tiny.vocabulary)
  ranked = rank(tiny, None, texts, LABELS)
  correct = 0
  for prediction, text, expected, (_, label) in zip(
      result.predictions, texts, ranked, DEV, strict=True
  ):
    assert prediction['inputs'] == text
    assert prediction['prediction_text'] == expected.label
    assert prediction['scores'] == pytest.approx(expected.scores, rel=1e-4)
    correct += expected.label == LABELS[label]
  assert result.metrics == {'accuracy': pytest.approx(100 * correct / len(DEV))}
  # The words and examples do something.
  plain = evaluate(tiny, None, films, **settings)
  assert plain.predictions[0]['scores'] != pytest.approx(ranked[0].scores, rel=1e-3)
  assert (result.prompt, plain.prompt) == (repr(DESIGN), '')


def test_a_design_is_decoded_as_the_texts_written_by_hand(tiny, films, settings):
  lengths = {'inputs': 64, 'targets': 5}
  result = evaluate(
      tiny, None, films, design=DESIGN, method='generate', feature_lengths=lengths, **settings
  )
  answers = generate(tiny, None, by_hand(DESIGN, tiny.vocabulary), max_length=5)
  assert [prediction['prediction_text'] for prediction in result.predictions] == answers


def test_examples_make_room_for_the_question(tiny, films, settings):
  longest = max(len(tiny.vocabulary.encode(text)) + 1 for text, _ in DEV)
  words = len(tiny.vocabulary.encode('so it is'))
  with pytest.warns(UserWarning, match='3 of the 3 inputs of films') as caught:
    result = evaluate(
        tiny, None, films, design=DESIGN,
        feature_lengths={'inputs': longest + words, 'targets': 4}, **settings,
    )  # fmt: skip
  assert [p['inputs'] for p in result.predictions] == [f'{text} so it is' for text, _ in DEV]
  # Nothing of the questions is cut.
  assert len(caught) == 1


def test_a_report_names_the_design_and_keeps_what_was_read(tiny, films, settings, tmp_path):
  report = evaluate_prompts(
      tiny, [None], films, design=DESIGN, output_dir=tmp_path / 'out', **settings
  )
  texts = by_hand(DESIGN, tiny.vocabulary)
  assert [p['inputs'] for p in report.results['films'][0].predictions] == texts
  written = json.loads((tmp_path / 'out' / 'report.json').read_text())
  assert written['tasks']['films']['prompts'] == [repr(DESIGN)]


def test_a_design_and_a_prompt_that_was_trained_are_one_too_many(tiny, films, settings):
  prompt = Injection(virtual_embeddings=jnp.ones((2, tiny.spec.d_model)))
  for evaluated in (
      lambda: evaluate(tiny, prompt, films, design=DESIGN, **settings),
      lambda: evaluate_prompts(tiny, [None, prompt], films, design=DESIGN, **settings),
      lambda: evaluate_prompts(tiny, {'films': [prompt]}, films, design=DESIGN, **settings),
  ):
    with pytest.raises(ValueError, match=r'a design and a prompt, .* design\(task, train\)'):
      evaluated()
  # What the message says: the designed task goes with anything.
  train, dev = (
      TokenizedTask.from_examples(
          [{'inputs': text, 'text': text, 'targets': LABELS[label]} for text, label in rows],
          tiny.vocabulary,
          name='films',
          label_classes=LABELS,
      )
      for rows in (TRAIN, DEV)
  )
  both = evaluate(tiny, prompt, DESIGN(dev, train), progress=False)
  texts = by_hand(DESIGN, tiny.vocabulary)
  np.testing.assert_allclose(
      [list(p['scores'].values()) for p in both.predictions],
      [list(ranked.scores.values()) for ranked in rank(tiny, prompt, texts, LABELS)],
      rtol=1e-4,
  )


def test_a_split_that_is_loaded_needs_its_training_split_for_examples(tiny):
  dev = TokenizedTask.from_examples(
      [{'inputs': text, 'targets': LABELS[label]} for text, label in DEV],
      tiny.vocabulary,
      name='films',
      label_classes=LABELS,
  )
  words = PromptDesign('{inputs} so it is')
  result = evaluate(tiny, None, dev, design=words, progress=False)
  assert [p['inputs'] for p in result.predictions] == [f'{text} so it is' for text, _ in DEV]
  with pytest.raises(ValueError, match='Name the task instead of giving a loaded split'):
    evaluate(tiny, None, dev, design=PromptDesign(examples=1), progress=False)
