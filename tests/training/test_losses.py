"""The loss and its gradient do not depend on how much padding the batches have."""

import jax
import numpy as np
import pytest

from prompt_tuning_jax.data.batches import TrainBatches
from prompt_tuning_jax.methods.soft_prompt import SoftPrompt
from prompt_tuning_jax.training.losses import NORMALIZATIONS, LossConfig, weights_and_factor
from prompt_tuning_jax.training.step import loss_and_grad
from tests.conftest import assert_close
from tests.training.conftest import make_task

METHOD = SoftPrompt(4)
BATCH_SIZE, TARGET_LENGTH = 6, 24


def batch_of(backbone, vocabulary, lengths):
  batches = TrainBatches(
      make_task(vocabulary, 'which_animal', 'train', 20),
      BATCH_SIZE,
      feature_lengths={'inputs': 40, 'targets': TARGET_LENGTH},
      vocab_size=backbone.spec.vocab_size,
      num_virtual_tokens=METHOD.length,
      lengths=lengths,
  )
  return batches[0]


@pytest.mark.parametrize('factor', [None, 100.0, *NORMALIZATIONS])
def test_padded_equals_bucketed(random_backbone, vocabulary, factor):
  prompt = METHOD.init(jax.random.key(1), random_backbone.spec)['params']
  loss = LossConfig(normalizing_factor=factor)
  padded, bucketed = (
      batch_of(random_backbone, vocabulary, lengths) for lengths in ('pad', 'bucket')
  )
  assert bucketed.encoder_input_tokens.size < padded.encoder_input_tokens.size
  expected, expected_gradient = loss_and_grad(random_backbone, METHOD, prompt, padded, loss)
  found, gradient = loss_and_grad(random_backbone, METHOD, prompt, bucketed, loss)
  assert float(expected) > 0
  assert_close(found, expected, 1e-5, 'loss')
  jax.tree.map(lambda *leaves: assert_close(*leaves, 1e-5), gradient, expected_gradient)


@pytest.mark.parametrize('lengths', ['pad', 'bucket'])
def test_the_total_number_of_target_tokens_counts_padding_as_t5x_does(
    random_backbone, vocabulary, lengths
):
  batch = batch_of(random_backbone, vocabulary, lengths)
  _, factor = weights_and_factor(batch, 'NUM_TOTAL_TARGET_TOKENS')
  assert factor == BATCH_SIZE * TARGET_LENGTH
  _, real = weights_and_factor(batch, 'NUM_REAL_TARGET_TOKENS')
  assert real == np.sum(batch.decoder_target_tokens > 0) < factor


@pytest.mark.parametrize(
    ('settings', 'answer'),
    [
        ({'normalizing_factor': 0}, 'LOSS_NORMALIZING_FACTOR is 0; .* a positive number'),
        ({'normalizing_factor': -2.0}, 'LOSS_NORMALIZING_FACTOR is -2.0'),
        ({'normalizing_factor': float('nan')}, 'LOSS_NORMALIZING_FACTOR is nan'),
        ({'normalizing_factor': 'NUM_TOKENS'}, "is 'NUM_TOKENS'; it may be None"),
        ({'z_loss': -1e-4}, 'Z_LOSS is -0.0001'),
        ({'label_smoothing': 1.0}, 'LABEL_SMOOTHING is 1.0'),
    ],
)
def test_settings_that_make_no_loss_are_refused_by_name(settings, answer):
  with pytest.raises(ValueError, match=answer):
    LossConfig(**settings)
