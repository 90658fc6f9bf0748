"""A prefix before every target: what the batches hold, and what is refused."""

import numpy as np
import pytest

from prompt_tuning_jax.data.batches import EvalBatches
from prompt_tuning_jax.data.cache import load_task_or_mixture
from prompt_tuning_jax.data.target_prefix import (
    common_prefix,
    with_target_prefix,
    without_prefix,
)
from prompt_tuning_jax.data.tokenized_task import TokenizedTask

SENTINEL = '<extra_id_0>'


@pytest.fixture
def task(vocabulary):
  pairs = [('a small animal', 'cat'), ('it falls', 'heavy rain'), ('it shines', 'sun')]
  return TokenizedTask.from_examples(
      [{'inputs': i, 'targets': t} for i, t in pairs], vocabulary, name='riddles'
  )


def test_the_sentinel_stands_before_every_target(task, vocabulary):
  prefixed = with_target_prefix(task, SENTINEL)
  for index in range(len(task)):
    sentinel = vocabulary.sentinel_ids[0]
    np.testing.assert_array_equal(
        prefixed[index]['targets'], [sentinel, *task[index]['targets']]
    )
    np.testing.assert_array_equal(prefixed[index]['inputs'], task[index]['inputs'])
    # What a prediction is compared with is the answer alone.
    assert prefixed.text('targets', index) == task.text('targets', index)
    assert prefixed.target(index) == task.target(index)
  assert prefixed.longest('targets') == task.longest('targets') + 1
  assert prefixed[0]['targets'].dtype == task[0]['targets'].dtype
  assert task.target_prefix == '' and prefixed.target_prefix == SENTINEL


def test_a_prefix_of_several_tokens_is_what_the_text_is(task, vocabulary):
  prefixed = with_target_prefix(task, 'the answer is')
  before = vocabulary.encode('the answer is')
  assert len(before) > 1
  for index in range(len(task)):
    np.testing.assert_array_equal(prefixed[index]['targets'], [*before, *task[index]['targets']])


def test_batches_train_and_score_the_prefix(task, vocabulary):
  batches = EvalBatches(
      with_target_prefix(task, SENTINEL),
      3,
      feature_lengths={'inputs': 8, 'targets': 6},
      vocab_size=4224,
  )
  ((batch, numbers),) = batches
  assert numbers.tolist() == [0, 1, 2]
  sentinel = vocabulary.sentinel_ids[0]
  assert (batch.decoder_target_tokens[:, 0] == sentinel).all()
  assert (batch.decoder_input_tokens[:, 1] == sentinel).all()
  assert (batch.decoder_loss_weights[:, 0] == 1).all()


def test_a_task_has_one_prefix(task):
  prefixed = with_target_prefix(task, SENTINEL)
  assert with_target_prefix(prefixed, SENTINEL) is prefixed
  assert with_target_prefix(prefixed, None) is prefixed and with_target_prefix(task, '') is task
  with pytest.raises(ValueError, match="begin with '<extra_id_0>' already, and 'it is' was"):
    with_target_prefix(prefixed, 'it is')
  with pytest.raises(ValueError, match="TARGET_PREFIX=' ' has no tokens"):
    with_target_prefix(task, ' ')


def test_it_is_taken_off_what_a_model_wrote():
  assert without_prefix('<extra_id_0> cat', SENTINEL) == 'cat'
  assert without_prefix('cat <extra_id_0>', SENTINEL) == 'cat <extra_id_0>'
  assert without_prefix('<extra_id_0> cat', '') == '<extra_id_0> cat'


def test_prompts_that_answer_together_have_the_same():
  assert common_prefix([SENTINEL, SENTINEL]) == SENTINEL and common_prefix([]) == ''
  with pytest.raises(ValueError, match="differently \\('<extra_id_0>', '', TARGET_PREFIX\\)"):
    common_prefix([SENTINEL, ''])


def test_the_cache_holds_targets_without_it(task, vocabulary, tmp_path):
  from prompt_tuning_jax.data import cache

  task.save(cache.cache_path('riddles', 'train', vocabulary, str(tmp_path)))
  for prefix in (SENTINEL, None):
    ((loaded, rate),) = load_task_or_mixture(
        'riddles', 'train', vocabulary, cache_dir=str(tmp_path), target_prefix=prefix
    )
    assert rate == 1.0 and loaded.target_prefix == (prefix or '')
    assert len(loaded[0]['targets']) == len(task[0]['targets']) + bool(prefix)
