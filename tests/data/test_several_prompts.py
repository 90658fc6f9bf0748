"""Batches with rows of different prompts: whose ids they hold, and whose rows they are."""

import numpy as np
import pytest

from prompt_tuning_jax.data.padding import make_batch
from prompt_tuning_jax.data.several_prompts import PromptLayout, for_prompt, joined
from prompt_tuning_jax.typing import Batch
from tests.data.samples import V, eval_batches, make_task

EXAMPLES = [{'inputs': [7, 9, 1], 'targets': [4, 1]}, {'inputs': [8, 1], 'targets': [1]}]


def batch_of(length, in_decoder=0, width=None):
  return make_batch(
      EXAMPLES,
      input_length=3,
      target_length=2,
      vocab_size=V,
      num_virtual_tokens=length,
      num_decoder_virtual_tokens=in_decoder,
      encoder_width=width,
  )


def test_the_virtual_ids_are_those_of_the_prompt_s_rows():
  batch = for_prompt(
      batch_of(2, in_decoder=1),
      3,
      vocab_size=V,
      num_virtual_tokens=4,
      num_decoder_virtual_tokens=1,
      own_virtual_tokens=2,
  )
  # Prompt 3 begins at 3 · (4 + 1), and its row in the decoder is the last of the five.
  np.testing.assert_array_equal(
      batch.encoder_input_tokens, [[V + 15, V + 16, 7, 9, 1], [V + 15, V + 16, 8, 1, 0]]
  )
  np.testing.assert_array_equal(batch.decoder_input_tokens, [[V + 19, 0, 4], [V + 19, 0, 1]])
  np.testing.assert_array_equal(batch.decoder_target_tokens, batch_of(2, 1).decoder_target_tokens)
  np.testing.assert_array_equal(batch.prompt_ids, [3, 3])
  assert {x.dtype for x in (batch.encoder_input_tokens, batch.decoder_input_tokens,
                            batch.prompt_ids)} == {np.dtype(np.int32)}


def test_the_first_of_equally_long_prompts_keeps_its_ids():
  batch = for_prompt(batch_of(2), 0, vocab_size=V, num_virtual_tokens=2)
  np.testing.assert_array_equal(batch.encoder_input_tokens, batch_of(2).encoder_input_tokens)
  np.testing.assert_array_equal(batch.prompt_ids, [0, 0])


def test_joined_rows_are_padded_to_the_longest():
  parts = [
      for_prompt(batch_of(n), k, vocab_size=V, num_virtual_tokens=3, own_virtual_tokens=n)
      for k, n in enumerate((1, 3))
  ]
  batch = joined(parts)
  np.testing.assert_array_equal(
      batch.encoder_input_tokens[[0, 2]], [[V, 7, 9, 1, 0, 0], [V + 3, V + 4, V + 5, 7, 9, 1]]
  )
  np.testing.assert_array_equal(batch.prompt_ids, [0, 0, 1, 1])
  np.testing.assert_array_equal(batch.decoder_loss_weights[:2], parts[0].decoder_loss_weights)
  assert batch.encoder_segment_ids is None


def test_what_cannot_be_one_batch_is_refused():
  moved = for_prompt(batch_of(2), 1, vocab_size=V, num_virtual_tokens=2)
  with pytest.raises(ValueError, match='has prompt_ids already'):
    for_prompt(moved, 1, vocab_size=V, num_virtual_tokens=2)
  with pytest.raises(ValueError, match='virtual token 1 of prompt 1, which has 1,'):
    for_prompt(batch_of(2), 1, vocab_size=V, num_virtual_tokens=1)
  with pytest.raises(ValueError, match='There are no batches'):
    joined([])
  with pytest.raises(ValueError, match='have the same fields; .*, prompt_ids'):
    joined([moved, batch_of(2)])


@pytest.mark.parametrize('lengths', ['pad', 'bucket'])
def test_every_example_stands_once_for_every_prompt(vocabulary, lengths):
  task = make_task(vocabulary, num_examples=5)
  prompts = [
      PromptLayout(num_virtual_tokens=3, input_length=18),
      PromptLayout(num_virtual_tokens=1, placement='suffix'),
      PromptLayout(),
  ]
  seen = {}
  for batch, numbers in eval_batches(task, 2, prompts=prompts, lengths=lengths):
    assert isinstance(batch, Batch) and len(batch.prompt_ids) == 6
    np.testing.assert_array_equal(batch.prompt_ids, [0, 1, 2, 0, 1, 2])
    for row, number in enumerate(np.repeat(numbers, 3).tolist()):
      seen[number, int(batch.prompt_ids[row])] = batch, row
    # Rows that fill up the last batch are empty for all prompts.
    assert not batch.encoder_input_tokens[3 * len(numbers) :].any()
  assert sorted(seen) == [(number, prompt) for number in range(5) for prompt in range(3)]
  for prompt, layout in enumerate(prompts):
    alone = eval_batches(
        task,
        1,
        feature_lengths={'inputs': layout.input_length or 24, 'targets': 4},
        num_virtual_tokens=layout.num_virtual_tokens,
        placement=layout.placement,
        lengths=lengths,
    )
    for batch, (number,) in alone:
      mixed, row = seen[int(number), prompt]
      ids = mixed.encoder_input_tokens[row]
      ids = np.where(ids >= V, ids - 3 * prompt, ids)
      own = batch.encoder_input_tokens[0]
      np.testing.assert_array_equal(ids[ids > 0], own[own > 0])
      np.testing.assert_array_equal(
          mixed.decoder_target_tokens[row], batch.decoder_target_tokens[0]
      )
