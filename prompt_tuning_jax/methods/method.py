"""What every prompt method is: a Flax module from its parameters to an Injection."""

from __future__ import annotations

import dataclasses
import numbers
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from prompt_tuning_jax.typing import BackboneSpec, Batch, Injection, PyTree


class Method(nn.Module):
  """Base of the prompt methods: `method.apply({'params': params}, spec) → Injection`.

  A method gives `__call__`, and says what the data pipeline and the train step have to do
  for it. It draws dropout only where it is applied with a key `dropout`.
  """

  def __post_init__(self) -> None:
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.name.endswith('_init') and value is not field.default and not callable(value):
        raise ValueError(
            f'{type(self).__name__}.{field.name} is {value!r}; an initialiser was expected, '
            'such as initializers.uniform() in Python and @uniform() in gin.'
        )
    super().__post_init__()

  @property
  def num_virtual_tokens(self) -> int:
    """How many virtual tokens the data pipeline has to place in every input."""
    return 0

  @property
  def num_decoder_virtual_tokens(self) -> int:
    """How many it has to place before the decoder's start token."""
    return 0

  @property
  def has_dropout(self) -> bool:
    """Whether the method itself drops anything while it trains."""
    return False

  def __call__(self, spec: BackboneSpec) -> Injection:
    """What the parameters amount to for a backbone of these sizes."""
    raise NotImplementedError


class VirtualTokens(Method):
  """Base of the methods whose virtual tokens stand among the encoder's inputs.

  Attributes:
    length: P, the number of virtual tokens, at least 1.
  """

  length: int = 100

  def __post_init__(self) -> None:
    check_length(self.length, f'{type(self).__name__}.length')
    super().__post_init__()

  @property
  def num_virtual_tokens(self) -> int:
    return self.length


def shapes(method: Method, spec: BackboneSpec) -> tuple[PyTree, Injection]:
  """Shapes of a method's parameters and of its Injection; no weights are read."""
  without_weights = without_initializers(method)

  def init_and_apply(key):
    params = without_weights.init(key, spec)['params']
    return params, without_weights.apply({'params': params}, spec)

  return jax.eval_shape(init_and_apply, jax.random.key(0))


def batch_shapes(method: Method | None, rows: int, input_length: int, target_length: int) -> Batch:
  """Shapes of a batch with the virtual tokens of a method."""

  def tokens(length: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((rows, length), jnp.int32)

  if method is not None:
    input_length += method.num_virtual_tokens
    target_length += method.num_decoder_virtual_tokens
  targets_BT = tokens(target_length)
  return Batch(tokens(input_length), targets_BT, targets_BT, targets_BT)


def without_initializers(method: Method) -> Method:
  """The method without initialisers, which may read embeddings and change no shape."""

  def zeros(key, shape, dtype=jnp.float32, **_):
    del key
    return jnp.zeros(shape, dtype)

  changes = {}
  for field in dataclasses.fields(method):
    value = getattr(method, field.name)
    if field.name.endswith('_init') and value is not None:
      changes[field.name] = zeros
    elif isinstance(value, Method) and field.name != 'parent':
      changes[field.name] = without_initializers(value)
    elif isinstance(value, (list, tuple)) and any(isinstance(x, Method) for x in value):
      changes[field.name] = [without_initializers(x) for x in value]
  return method.clone(**changes)


def is_whole(value: Any) -> bool:
  """Whether a setting is a whole number; True and False are none."""
  return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_method(value: Any, where: str) -> None:
  """Raises ValueError unless `value`, the setting `where`, is a method."""
  if not isinstance(value, Method):
    raise ValueError(
        f'{where} is {value!r}; a prompt method was expected: SoftPrompt(20) in Python, '
        '@SoftPrompt() with its parentheses in gin.'
    )


def check_length(length: Any, where: str) -> None:
  """Raises ValueError unless `length` is a whole number of positions, at least 1."""
  if not (is_whole(length) and length >= 1):
    raise ValueError(
        f'PROMPT_LENGTH is {length!r} ({where}); a prompt has a whole number of '
        'positions, at least 1. Set PROMPT_LENGTH = 20 for example; for the model without a '
        'prompt set PROMPT = None.'
    )
