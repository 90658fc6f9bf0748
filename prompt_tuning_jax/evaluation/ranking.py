"""Rank classification: how likely the model finds each of several given texts.

A choice scores the sum of the natural log-probabilities of its tokens, the
end-of-sequence token included, given the input (Brown et al., 2020, section 2.4;
T5X's `score_batch`). The encoder runs once for all choices.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax.data.target_prefix import prefix_ids
from prompt_tuning_jax.data.vocabulary import Vocabulary
from prompt_tuning_jax.typing import Array, Batch, Injection, PyTree

# More choices are scored in several passes of the decoder, so that their logits
# [choices, B, T, V] are never in memory all at once.
_CHOICES_AT_ONCE = 16


def sequence_scores(
    logits_BTV: Array, targets_BT: Array, weights_BT: Array | None = None
) -> Array:
  """Log-probabilities of target sequences under logits of the same positions.

  Args:
    logits_BTV: teacher-forced logits.
    targets_BT: token ids, 0 = padding.
    weights_BT: weight of each position; default 1 on tokens and 0 on padding.

  Returns:
    scores [B] in float32, natural logarithms; 0 for a row of padding.
  """
  if weights_BT is None:
    weights_BT = targets_BT > 0
  log_probs_BTV = jax.nn.log_softmax(logits_BTV.astype(jnp.float32))
  log_probs_BT = jnp.take_along_axis(log_probs_BTV, targets_BT[..., None], -1)[..., 0]
  return jnp.sum(log_probs_BT * weights_BT.astype(jnp.float32), axis=-1)


@functools.partial(jax.jit, static_argnums=0)
def score_targets(
    module: nn.Module,
    params: PyTree,
    batch: Batch,
    injection: Injection | None = None,
) -> Array:
  """Scores [B] of the batch's own targets (T5X's `score_batch`).

  Compiled once for each module and shape.

  Args:
    module: the backbone's module.
    params: its weights.
    batch: inputs and targets.
    injection: the prompt, or None.

  Raises:
    ValueError: if rows of the batch are packed: there is one score a row.
  """
  if batch.decoder_segment_ids is not None:
    raise ValueError(
        'The batch is packed, so that a row is no example to be scored. Use EvalBatches, '
        'whose rows are one example each.'
    )
  logits_BTV = module.apply({'params': params}, batch, injection)
  return sequence_scores(
      logits_BTV, batch.decoder_target_tokens, batch.decoder_loss_weights
  )


def teacher_forced_logits(
    module: nn.Module,
    params: PyTree,
    targets_BT: Array,
    encoded_BSD: Array,
    encoder_input_tokens_BS: Array,
    injection: Injection | None,
    prompt_ids_B: Array | None = None,
) -> Array:
  """Logits [B, T, V] of targets, given the encoder's output."""
  prompt_BQ = jnp.zeros((len(targets_BT), 0), jnp.int32)
  if injection is not None and injection.num_decoder_virtual_tokens:
    prompt = injection.decoder_prompt(module.spec.vocab_size, prompt_ids_B)
    prompt_BQ = jnp.broadcast_to(prompt, (len(targets_BT), prompt.shape[-1]))
  # A prompt of the decoder's own stands before the start token, and has no targets.
  logits = module.apply(
      {'params': params},
      jnp.concatenate([prompt_BQ, jnp.pad(targets_BT[:, :-1], ((0, 0), (1, 0)))], axis=1),
      jnp.concatenate([jnp.zeros_like(prompt_BQ), targets_BT], axis=1),
      encoded_BSD,
      encoder_input_tokens_BS,
      injection,
      method='decode',
      prompt_ids_B=prompt_ids_B,
  )
  return logits[:, prompt_BQ.shape[1] :]


@functools.partial(jax.jit, static_argnums=0, static_argnames='normalize_by_length')
def score_choices(
    module: nn.Module,
    params: PyTree,
    encoder_input_tokens_BS: Array,
    choices_CT: Array,
    injection: Injection | None = None,
    *,
    normalize_by_length: bool = False,
    prompt_ids_B: Array | None = None,
) -> Array:
  """Scores [B, C] of every choice for every input, with one pass of the encoder.

  Compiled once for each module and shape.

  Args:
    module: the backbone's module.
    params: its weights.
    encoder_input_tokens_BS: inputs, virtual tokens included.
    choices_CT: see `encode_choices`.
    injection: the prompt, or None.
    normalize_by_length: divide by the number of tokens, end-of-sequence included.
      Sums favour short choices, means favour long ones; sums are the convention.
    prompt_ids_B: which of several prompts a row has (`typing.Batch`).
  """

  with jax.named_scope('encode'):
    encoded_BSD = module.apply(
        {'params': params},
        encoder_input_tokens_BS,
        injection,
        method='encode',
        prompt_ids_B=prompt_ids_B,
    )
  num_rows = encoder_input_tokens_BS.shape[0]

  def score_one(choice_T: Array) -> Array:
    targets_BT = jnp.broadcast_to(choice_T, (num_rows, len(choice_T)))
    logits_BTV = teacher_forced_logits(
        module,
        params,
        targets_BT,
        encoded_BSD,
        encoder_input_tokens_BS,
        injection,
        prompt_ids_B,
    )
    return sequence_scores(logits_BTV, targets_BT)

  with jax.named_scope('score_choices'):
    if choices_CT.shape[0] <= _CHOICES_AT_ONCE:
      scores_CB = jax.vmap(score_one)(choices_CT)
    else:
      scores_CB = jax.lax.map(score_one, choices_CT, batch_size=_CHOICES_AT_ONCE)
  scores_BC = scores_CB.T
  if normalize_by_length:
    scores_BC = scores_BC / jnp.sum(choices_CT > 0, axis=-1)
  return scores_BC


def best_choice(scores_BC: Array | np.ndarray) -> np.ndarray:
  """Index [B] of the best choice; of equal scores the lower index wins."""
  return np.argmax(scores_BC, axis=-1)


def encode_choices(
    choices: Sequence[str], vocabulary: Vocabulary, prefix: str = ''
) -> np.ndarray:
  """Token ids [C, T] of the choices: end-of-sequence behind each, then padding.

  Args:
    choices: the texts to choose from.
    vocabulary: the backbone's vocabulary.
    prefix: what stands before each of them, as before the targets (`data/target_prefix.py`).

  Raises:
    ValueError: if there are no choices, or one of them has no tokens (it would
      score the chance of an empty answer).
  """
  if isinstance(choices, str):
    raise ValueError(
        f'choices is the one text {choices!r}; give a list of texts to choose from.'
    )
  if not len(choices):
    raise ValueError('There are no choices to rank; give at least one text.')
  tokens = [vocabulary.encode(choice) for choice in choices]
  for choice, ids in zip(choices, tokens):
    if not ids:
      raise ValueError(
          f'The choice {choice!r} has no tokens, so that it would be scored as an empty '
          f'answer. Choices: {", ".join(map(repr, choices))}.'
      )
  before = prefix_ids(prefix, vocabulary)
  tokens = [[*before, *ids] for ids in tokens]
  choices_CT = np.zeros((len(tokens), 1 + max(map(len, tokens))), np.int32)
  for row, ids in enumerate(tokens):
    choices_CT[row, : len(ids) + 1] = [*ids, vocabulary.eos_id]
  return choices_CT
