"""ByT5's bytes: seqio's ids, and their way through checkpoints and tasks."""

import dataclasses
import json

import pytest

from prompt_tuning_jax.checkpoints import native
from prompt_tuning_jax.checkpoints.convert import convert
from prompt_tuning_jax.checkpoints.load import load_backbone
from prompt_tuning_jax.data.byte_vocabulary import ByteVocabulary
from prompt_tuning_jax.data.cache import load_task
from prompt_tuning_jax.data.vocabularies import open_vocabulary
from tests.checkpoints import samples
from tests.conftest import TINY_CONFIG

TEXTS = ['', 'a b', 'Grüße, 世界 🎉', 'two\nlines\tand \x00']


@pytest.mark.parametrize('extra_ids', [0, 5])
@pytest.mark.parametrize('text', TEXTS)
def test_ids_are_seqio_s(text, extra_ids):
  seqio = pytest.importorskip('seqio')
  ours, theirs = ByteVocabulary(extra_ids), seqio.ByteVocabulary(extra_ids)
  assert ours.encode(text) == list(theirs.encode(text))
  assert ours.decode(ours.encode(text)) == text
  assert ours.size == theirs.vocab_size
  assert (ours.pad_id, ours.eos_id, ours.unk_id) == (theirs.pad_id, theirs.eos_id, theirs.unk_id)


def test_decoding_stops_at_the_end_and_leaves_out_what_is_no_text():
  vocabulary = ByteVocabulary()
  ids = vocabulary.encode('é!')
  assert vocabulary.decode([0, *ids, 1, *ids]) == 'é!'
  assert vocabulary.decode([ids[0], *vocabulary.encode('x'), 300]) == 'x'


def test_sentinels_are_the_last_byte_values_as_byt5_was_pretrained():
  vocabulary = ByteVocabulary()
  assert vocabulary.sentinel_ids[:2] == [258, 257]
  assert len(vocabulary.sentinel_ids) == 100
  a, b = vocabulary.encode('ab')
  assert vocabulary.encode('a<extra_id_1>b<extra_id_100>')[:4] == [a, 257, b, 63]


def test_pieces_are_for_people_to_read():
  vocabulary = ByteVocabulary()
  assert [vocabulary.piece(token) for token in (1, 100, 229, 300)] == [
      '</s>', 'a', '<0xE2>', '<unused_300>'
  ]


def test_the_name_opens_it(tmp_path):
  assert isinstance(open_vocabulary('bytes'), ByteVocabulary)
  assert open_vocabulary('bytes').fingerprint == ByteVocabulary().fingerprint
  assert ByteVocabulary(5).fingerprint != ByteVocabulary().fingerprint
  with pytest.raises(FileNotFoundError, match='No SentencePiece model at'):
    open_vocabulary(tmp_path / 'bytes')


CONFIG = dataclasses.replace(TINY_CONFIG, vocab_size=384)


@pytest.fixture
def byt5(tmp_path):
  native.save_backbone(
      tmp_path / 'byt5', CONFIG, samples.random_params(CONFIG), ByteVocabulary()
  )
  return tmp_path / 'byt5'


def test_it_goes_through_every_format(byt5, tmp_path):
  assert not (byt5 / 'spiece.model').exists()
  for folder in (byt5, convert(byt5, tmp_path / 'hf', 'hf')):
    assert load_backbone(folder).vocabulary.fingerprint == ByteVocabulary().fingerprint
  described = json.loads((tmp_path / 'hf' / 'tokenizer_config.json').read_text())
  assert described['tokenizer_class'] == 'ByT5Tokenizer'
  t5x = convert(byt5, tmp_path / 't5x', 't5x')
  assert load_backbone(t5x).vocabulary is None  # T5X keeps vocabularies elsewhere.
  assert isinstance(load_backbone(t5x, vocabulary='bytes').vocabulary, ByteVocabulary)


def test_a_model_of_bytes_takes_no_other_vocabulary(byt5):
  with pytest.raises(ValueError, match='is not the vocabulary this backbone was saved with'):
    load_backbone(byt5, vocabulary=samples.train_vocabulary(byt5.parent / 'letters.model'))


def test_a_task_is_tokenised_with_it(tmp_path):
  pytest.importorskip('seqio')
  vocabulary = ByteVocabulary()
  task = load_task(
      'demo_gloss_category', 'validation', vocabulary, cache_dir=str(tmp_path)
  )
  tokens = task[0]
  assert vocabulary.decode(tokens['inputs']) == task.example(0)['inputs_pretokenized']
  assert tokens['targets'][-1] == vocabulary.eos_id
