"""Where a soft prompt starts (Lester et al., 2021, section 3.2).

An initialiser is a function `(key, (P, D), dtype) → array`, as Flax uses them. Those
that start from words take the backbone whose words they are:

  SoftPrompt(100, class_labels(['positive', 'negative'], backbone))
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax import partitioning
from prompt_tuning_jax.typing import KV_FIELDS, Array, Injection

if TYPE_CHECKING:
  from prompt_tuning_jax.backbones.backbone import Backbone

Initializer = Callable[..., Array]

# The vocabulary is sorted by frequency; the paper samples from its most common tokens.
COMMON_TOKENS = 5000


def uniform(scale: float = 0.5, *, centered: bool = True) -> Initializer:
  """Uniform numbers in [-scale, scale], the range the paper states.

  With `centered=False` the range is [0, scale), which is what the original code
  draws from although its configuration says 0.5.
  """

  def init(key, shape, dtype=jnp.float32):
    _check_length(shape)
    if centered:
      return jax.random.uniform(key, shape, dtype, -scale, scale)
    return jax.random.uniform(key, shape, dtype) * scale

  return init


def sampled_vocab(
    backbone: Backbone, population: int | None = COMMON_TOKENS
) -> Initializer:
  """Embeddings of random words: rows drawn from the first `population` of the table.

  Drawn without replacement, unless the prompt is longer than the population. As in the original
  code the first rows are taken as they come: among T5's 5,000 are padding, end of sequence and
  unknown; a table of fewer rows is drawn from whole, sentinels and rows without a token included
  (of `nano` and `pico` one row in twenty).

  Args:
    backbone: whose embeddings.
    population: how many of the first rows may be drawn; None for the whole table.
  """
  if population is not None and population < 1:
    raise ValueError(
        f'sampled_vocab.population is {population}; it must be at least 1, or None for '
        'the whole embedding table.'
    )

  def init(key, shape, dtype=jnp.float32):
    _check_shape(backbone, shape)
    rows = min(population or backbone.spec.vocab_size, backbone.spec.vocab_size)
    drawn_P = jax.random.choice(key, rows, (shape[0],), replace=shape[0] > rows)
    return backbone.embeddings(drawn_P).astype(dtype)

  return init


def class_labels(
    labels: Sequence[str], backbone: Backbone, fallback: Initializer | None = None
) -> Initializer:
  """Embeddings of the words for the classes, one position each, in order.

  A label of several tokens is the mean of their embeddings. Positions beyond the labels
  start from `fallback`; labels beyond the length are left out.

  Args:
    labels: words for the classes.
    backbone: whose embeddings and vocabulary.
    fallback: initialiser of the other positions; `sampled_vocab(backbone)` where None.

  Raises:
    ValueError: if there are no labels, one has no tokens, or the backbone has no
      vocabulary to tokenise them with.
  """
  labels = list(labels)
  fallback = fallback or sampled_vocab(backbone)
  if not labels:
    raise ValueError('class_labels needs at least one label; set CLASS_LABELS to a list.')

  def init(key, shape, dtype=jnp.float32):
    _check_shape(backbone, shape)
    rows_CD = label_embeddings(labels[: shape[0]], backbone)
    prompt_PD = fallback(key, shape, dtype)
    return prompt_PD.at[: len(rows_CD)].set(rows_CD.astype(dtype))

  return init


def label_embeddings(labels: Sequence[str], backbone: Backbone) -> Array:
  """The rows [C, D] that `class_labels` starts from: the mean of each label's tokens.

  Raises:
    ValueError: if a label has no tokens, or the backbone has no vocabulary.
  """
  tokens = [label_tokens(label, backbone) for label in labels]
  rows = backbone.embeddings(np.concatenate(tokens))  # Once: processes may have to gather them.
  of_labels = jnp.split(rows, np.cumsum([len(ids) for ids in tokens])[:-1])
  return jnp.stack([jnp.mean(rows_TD, axis=0) for rows_TD in of_labels])


def label_tokens(label: str, backbone: Backbone) -> list[int]:
  """Token ids of a class label, of which there has to be one; raises as `label_embeddings`."""
  tokens = _encode(label, backbone)
  if not tokens:
    raise ValueError(f'The class label {label!r} has no tokens in this vocabulary.')
  return tokens


def text(words: str, backbone: Backbone, fallback: Initializer | None = None) -> Initializer:
  """Embeddings of a text, token by token; longer texts are cut, shorter ones filled up.

  Args:
    words: the text, for example an instruction.
    backbone: whose embeddings and vocabulary.
    fallback: initialiser of positions beyond the text; `sampled_vocab(backbone)` where
      None.

  Raises:
    ValueError: if the text has no tokens, or the backbone has no vocabulary to tokenise it
      with.
  """
  fallback = fallback or sampled_vocab(backbone)

  def init(key, shape, dtype=jnp.float32):
    _check_shape(backbone, shape)
    tokens = np.array(_encode(words, backbone)[: shape[0]], np.int32)
    if not tokens.size:
      raise ValueError(
          f'The text {words!r}, from which the prompt is to start, has no tokens in this '
          'vocabulary. Set PROMPT_TEXT to some words.'
      )
    rows = backbone.embeddings(tokens).astype(dtype)
    return fallback(key, shape, dtype).at[: len(tokens)].set(rows)

  return init


def keys_values_of(words: str, backbone: Backbone) -> Initializer:
  """The keys and values that the frozen model itself computes for real words.

  For `Prefix` and `DeepPrompt` (Li & Liang, 2021, section 7.4). The encoder's are those of
  the words as its input, cross-attention's those of the encoder's output of them, and the
  decoder's those of the words as what it has written. Texts are cut to the length of the
  prefix; shorter ones are repeated.

  Args:
    words: the text, for example words that the task is about.
    backbone: whose keys and values, and whose vocabulary.

  Raises:
    ValueError: if the text has no tokens, the backbone has no vocabulary, or the prefix is
      for a backbone of other sizes.
  """

  if not isinstance(words, str):
    raise ValueError(
        f'keys_values_of.words is {words!r}; a text was expected. Set PROMPT_TEXT to some words.'
    )

  @functools.cache
  def computed(length: int) -> Injection:
    tokens = _encode(words, backbone)
    if not tokens:
      raise ValueError(
          f'The text {words!r}, from whose keys and values the prefix is to start, has no '
          'tokens in this vocabulary. Set PROMPT_TEXT to some words.'
      )
    # Whoever traces the initialiser gets numbers, not tracers of a program that ends.
    with jax.ensure_compile_time_eval():
      compute = backbone.module.keys_and_values
      if backbone.mesh is not None:
        compute = jax.jit(compute)
      found = compute(backbone.params, np.resize(tokens, length))
    return jax.tree.map(partitioning.whole, found)

  def init(key, shape, dtype=jnp.float32, *, site):
    del key  # Nothing is random here.
    keys_values = jnp.stack(getattr(computed(shape[2]), KV_FIELDS[site])).astype(dtype)
    if keys_values.shape != tuple(shape):
      raise ValueError(
          f'The prefix has the shape {list(shape)} [2, layers, length, heads, d_kv], but the '
          f'keys and values of {backbone.name} have {list(keys_values.shape)}. Initialise '
          'from the backbone that the run uses.'
      )
    return keys_values

  return init


def from_array(
    prompt_PD: np.ndarray | Array,
    origin: str = 'the array',
    fallback: Initializer | None = None,
) -> Initializer:
  """A prompt that is already there; its shape must be the one asked for.

  With a `fallback`, a longer prompt is cut, and positions beyond a shorter one start from that.
  """

  def init(key, shape, dtype=jnp.float32):
    _check_length(shape)
    length, fits = len(prompt_PD), tuple(prompt_PD.shape[1:]) == tuple(shape[1:])
    if not fits or (length != shape[0] and fallback is None):
      raise ValueError(
          f'{origin} holds a prompt of shape {list(prompt_PD.shape)}, but this run needs '
          f'[PROMPT_LENGTH, d_model] = {list(shape)}. '
          + (
              f'Set PROMPT_LENGTH={length}, or use initializers/from_file_any_length, which cuts '
              'it or fills it up with sampled words.'
              if fits
              else 'It was made for a backbone of another width.'
          )
      )
    rows_PD = jnp.asarray(prompt_PD[: shape[0]], dtype)
    if length >= shape[0]:
      return rows_PD
    return fallback(key, shape, dtype).at[:length].set(rows_PD)

  return init


def from_file(
    path: str | os.PathLike[str], fallback: Initializer | None = None
) -> Initializer:
  """A prompt from an artifact of this library or the original code's `.npy`: transfer.

  A prompt of another task may be a better start than words (Vu et al., 2022, SPoT).

  Args:
    path: the file, such as the prompt.safetensors of a run on another task.
    fallback: as in `from_array`; None refuses a prompt of another length.

  Raises:
    ValueError, FileNotFoundError: if the file is missing, damaged or holds no soft prompt.
  """
  from prompt_tuning_jax.prompt_files import load_prompt  # It depends on checkpoints/.

  injection = load_prompt(path).injection
  if injection.virtual_embeddings is None or not injection.num_virtual_tokens:
    raise ValueError(
        f'{path} holds no soft prompt of the encoder to start from; it is {injection}.'
    )
  rows_PD = injection.virtual_embeddings[: injection.num_virtual_tokens]
  return from_array(rows_PD, str(path), fallback)


def _check_shape(backbone: Backbone, shape: Sequence[int]) -> None:
  """Refuses a prompt that is not as wide as the backbone's embeddings, or has no positions."""
  _check_length(shape)
  if backbone.spec.d_model != shape[1]:
    raise ValueError(
        f'The prompt has width {shape[1]}, but the embeddings of {backbone.name} have '
        f'{backbone.spec.d_model}. Initialise from the backbone that the run uses.'
    )


def _check_length(shape: Sequence[int]) -> None:
  if shape[0] < 1:
    raise ValueError(
        f'A prompt of shape {list(shape)} has no positions to initialise. Set PROMPT_LENGTH '
        'to at least 1.'
    )


def _encode(words: str, backbone: Backbone) -> list[int]:
  return backbone.needed_vocabulary(
      f'a prompt cannot start from the words {words!r} (though from uniform or sampled_vocab)'
  ).encode(words)
