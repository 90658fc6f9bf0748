"""SentencePiece vocabularies whose sentinels are pieces of the file already, as mT5's are."""

import io

import pytest
import sentencepiece

from prompt_tuning_jax.data.vocabulary import Vocabulary


@pytest.fixture
def path(tmp_path):
  """A file of a few letters whose last pieces are `▁<extra_id_2>` to `▁<extra_id_0>`."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(['a small vocabulary of letters'] * 4),
      model_writer=model,
      model_type='char',
      vocab_size=20,
      hard_vocab_limit=False,
      pad_id=0,
      eos_id=1,
      unk_id=2,
      bos_id=-1,
      minloglevel=2,
  )
  from sentencepiece import sentencepiece_model_pb2

  proto = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
  for number in (2, 1, 0):
    piece = proto.pieces.add()
    piece.piece, piece.score, piece.type = f'▁<extra_id_{number}>', 0.0, piece.USER_DEFINED
  (tmp_path / 'spiece.model').write_bytes(proto.SerializeToString())
  return tmp_path / 'spiece.model'


@pytest.mark.parametrize('extra_ids', [0, 100])
def test_sentinels_that_are_pieces_are_found_and_none_are_added(path, extra_ids):
  vocabulary = Vocabulary(path, extra_ids)
  last = vocabulary.num_pieces - 1
  assert (vocabulary.size, vocabulary.extra_ids) == (vocabulary.num_pieces, 0)
  assert vocabulary.sentinel_ids == [last, last - 1, last - 2]
  ids = vocabulary.encode('small <extra_id_1> letters')
  assert ids.count(last - 1) == 1
  assert vocabulary.decode(ids) == 'small <extra_id_1> letters'
  assert vocabulary.fingerprint == Vocabulary(path).fingerprint
