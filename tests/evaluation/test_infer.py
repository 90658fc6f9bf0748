"""Text in, text or ranked choices out."""

import jax
import numpy as np
import pytest

from prompt_tuning_jax import artifact
from prompt_tuning_jax.data.tokenized_task import TokenizedTask
from prompt_tuning_jax.evaluation import text_rows
from prompt_tuning_jax.evaluation.decoding import Decoding
from prompt_tuning_jax.evaluation.evaluate import evaluate
from prompt_tuning_jax.evaluation.infer import ensemble, generate, rank
from prompt_tuning_jax.typing import Injection

# With a prompt of 5 these all make rows of 16, so that few programs are compiled.
TEXTS = ['the sea', 'a boat', 'the old man', '', 'he was there']
LENGTHS = {'inputs': 11, 'targets': 8}
CHOICES = ['yes', 'no', 'not at all']
BEAM = dict(decode='beam', max_length=6, num_beams=2)


@pytest.fixture(scope='module')
def other_prompt(backbone):
  shape = (5, backbone.spec.d_model)
  return Injection(2.0 * jax.random.normal(jax.random.key(2), shape))


@pytest.fixture(scope='module')
def ranked(backbone, soft_prompt):
  return rank(backbone, soft_prompt, TEXTS, CHOICES)


def assert_ranked_alike(left, right):
  assert [r.label for r in left] == [r.label for r in right]
  for a, b in zip(left, right):
    np.testing.assert_allclose(list(a.scores.values()), list(b.scores.values()), rtol=1e-4)


def test_ranking_texts_agrees_with_evaluating_a_task(backbone, soft_prompt, ranked):
  examples = [{'inputs': text, 'targets': 'yes'} for text in TEXTS]
  task = TokenizedTask.from_examples(
      examples, backbone.vocabulary, label_classes=CHOICES
  )
  result = evaluate(
      backbone,
      soft_prompt,
      task,
      batch_size=5,
      feature_lengths=LENGTHS,
      lengths='pad',
      progress=False,
  )
  for answer, prediction in zip(ranked, result.predictions):
    assert answer.label == prediction['prediction_text']
    assert answer.scores == pytest.approx(prediction['scores'], rel=1e-4)


def test_fields_of_a_template_agree_with_evaluating_a_task(backbone, soft_prompt):
  template = '{2} {animal} lives in {place} {3}.</s>'
  examples = [
      {'animal': 'the fish', 'place': 'the sea', 'inputs': 'x', 'targets': 'yes'},
      {'animal': 'a man', 'place': 'a boat', 'inputs': 'x', 'targets': 'no'},
  ]
  task = TokenizedTask.from_examples(examples, backbone.vocabulary, label_classes=CHOICES)
  lengths = {'inputs': 24, 'targets': 8}
  settings = dict(placement=template, feature_lengths=lengths, progress=False)
  result = evaluate(backbone, soft_prompt, task, **settings)
  texts = [{name: example[name] for name in ('animal', 'place')} for example in examples]
  ranked = rank(
      backbone, soft_prompt, texts, CHOICES, placement=template, max_input_length=24
  )
  for answer, prediction in zip(ranked, result.predictions):
    assert answer.scores == pytest.approx(prediction['scores'], rel=1e-4)
  message = r"reads the fields animal, place, but 'the fish' has no 'animal'. Give a mapping"
  with pytest.raises(ValueError, match=message):
    rank(backbone, soft_prompt, ['the fish'], CHOICES, placement=template)


def test_generating_agrees_with_evaluating_a_task(backbone, soft_prompt):
  examples = [{'inputs': text, 'targets': 'yes'} for text in TEXTS]
  task = TokenizedTask.from_examples(examples, backbone.vocabulary)
  decoding = Decoding(strategy='beam', max_length=6, num_beams=2)
  result = evaluate(
      backbone,
      soft_prompt,
      task,
      batch_size=5,
      feature_lengths=LENGTHS,
      lengths='pad',
      decoding=decoding,
      progress=False,
  )
  answers = generate(backbone, soft_prompt, TEXTS, **BEAM)
  assert answers == [p['prediction_text'] for p in result.predictions]
  assert len(set(answers)) > 1


def test_the_batch_size_changes_no_answer(backbone, soft_prompt, ranked):
  assert_ranked_alike(
      rank(backbone, soft_prompt, TEXTS, CHOICES, batch_size=2), ranked
  )


def test_each_text_may_have_a_prompt_of_its_own(
    backbone, soft_prompt, other_prompt, ranked
):
  """Mixed in one batch, every text is answered as with its prompt alone."""
  prompts = [soft_prompt, other_prompt, None, other_prompt, soft_prompt]
  mixed = rank(backbone, prompts, TEXTS, CHOICES)
  with_other = rank(backbone, other_prompt, TEXTS, CHOICES)
  with_none = rank(backbone, None, TEXTS, CHOICES)
  alone = [ranked[0], with_other[1], with_none[2], with_other[3], ranked[4]]
  assert_ranked_alike(mixed, alone)
  assert ranked[0].scores != pytest.approx(with_other[0].scores, rel=1e-3)


def test_prefixes_share_a_batch_too(backbone):
  spec = backbone.spec
  rng = np.random.default_rng(0)
  prompts = []
  for _ in range(2):
    shape = (2, spec.num_decoder_layers, 3, spec.num_heads, spec.d_kv)
    prompts.append(Injection(decoder_kv=tuple(rng.normal(size=shape).astype(np.float32))))
  mixed = generate(backbone, [*prompts, prompts[0]], TEXTS[:3], **BEAM)
  alone = [generate(backbone, prompt, TEXTS[:3], **BEAM) for prompt in prompts]
  assert mixed == [alone[0][0], alone[1][1], alone[0][2]]
  assert alone[0] != alone[1]


def test_samples_repeat_with_their_seed_whatever_the_batches(backbone):
  sample = dict(decode='sample', max_length=5)
  first = generate(backbone, None, TEXTS, seed=1, **sample)
  assert first == generate(backbone, None, TEXTS, seed=1, batch_size=2, **sample)
  assert first != generate(backbone, None, TEXTS, seed=2, **sample)


def test_an_artifact_brings_its_placement_and_length(backbone, soft_prompt, tmp_path):
  prompt = artifact.save_prompt(
      tmp_path / 'p.safetensors',
      soft_prompt,
      backbone=backbone,
      placement='suffix',
      feature_lengths={'inputs': 5, 'targets': 4},
  )
  lengths = [len(backbone.vocabulary.encode(text)) + 1 for text in TEXTS]
  worst = f'text {np.argmax(lengths)}, .* of whose {max(lengths)} tokens the model sees 5'
  with pytest.warns(UserWarning, match=f'3 of 5 texts are longer .*; worst {worst}'):
    found = rank(backbone, prompt, TEXTS, CHOICES)
  with pytest.warns(UserWarning, match='are cut'):
    by_hand = rank(
        backbone, soft_prompt, TEXTS, CHOICES, placement='suffix', max_input_length=5
    )
  assert_ranked_alike(found, by_hand)


def test_texts_that_one_prompt_of_several_cuts_are_counted_as_texts(
    backbone, soft_prompt, tmp_path
):
  paths = [str(tmp_path / name) for name in ('short.safetensors', 'long.safetensors')]
  for path, length in zip(paths, (5, 64)):
    lengths = {'inputs': length, 'targets': 4}
    artifact.save_prompt(path, soft_prompt, backbone=backbone, feature_lengths=lengths)
  with pytest.warns(UserWarning, match='^3 of 5 texts are longer'):
    ensemble(backbone, paths, TEXTS, choices=CHOICES)


def test_normalised_scores_are_means_over_tokens(backbone, soft_prompt, ranked):
  means = rank(backbone, soft_prompt, TEXTS, CHOICES, normalize_by_length=True)
  for choice in CHOICES:
    length = len(backbone.vocabulary.encode(choice)) + 1
    assert means[0].scores[choice] == pytest.approx(
        ranked[0].scores[choice] / length, rel=1e-5
    )


def test_no_texts_give_no_answers(backbone):
  assert generate(backbone, None, []) == []
  assert rank(backbone, None, [], CHOICES) == []


def test_widths_are_few_and_hold_their_texts():
  widths = {text_rows._width(length) for length in range(1, 513)}
  assert sorted(widths) == [16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512]
  assert all(length <= text_rows._width(length) for length in range(1, 513))


def test_what_does_not_fit_is_refused(backbone, soft_prompt):
  with pytest.raises(ValueError, match="texts is the one text 'the sea'"):
    generate(backbone, soft_prompt, 'the sea')
  with pytest.raises(ValueError, match='2 prompts for 5 texts'):
    generate(backbone, [soft_prompt, None], TEXTS)
  with pytest.raises(ValueError, match="No decoding strategy 'baem'. Did you mean 'beam'"):
    generate(backbone, soft_prompt, TEXTS, decode='baem')
  with pytest.raises(ValueError, match="Choices stand more than once: 'no'"):
    rank(backbone, soft_prompt, TEXTS, ['no', 'yes', 'no'])
  with pytest.raises(ValueError, match='batch_size=0'):
    generate(backbone, soft_prompt, TEXTS, batch_size=0)
  with pytest.raises(TypeError, match='num_baems'):
    generate(backbone, soft_prompt, TEXTS, num_baems=3)
  spec = backbone.spec
  keys = np.zeros((spec.num_encoder_layers, 2, spec.num_heads, spec.d_kv), np.float32)
  with pytest.raises(ValueError, match='of one kind, .* in virtual_embeddings, encoder_kv'):
    generate(backbone, [soft_prompt, Injection(encoder_kv=(keys, keys))], TEXTS[:2])
