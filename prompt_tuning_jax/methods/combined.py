"""Several methods as one, by composing their Injections; and prompts in the decoder."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from prompt_tuning_jax.methods.layer_prompt import LayerPrompt
from prompt_tuning_jax.methods.method import Method, VirtualTokens, check_method
from prompt_tuning_jax.typing import KV_FIELDS, BackboneSpec, Injection, KeysValues


class InDecoder(Method):
  """A method whose virtual tokens stand before the decoder's start token.

  Attributes:
    prompt: a method of virtual tokens, such as SoftPrompt.
  """

  prompt: Method | None = None

  def __post_init__(self) -> None:
    check_method(self.prompt, 'InDecoder.prompt')
    if not isinstance(self.prompt, VirtualTokens) or isinstance(self.prompt, LayerPrompt):
      raise ValueError(
          f'InDecoder.prompt is {type(self.prompt).__name__}; what stands in the decoder are '
          'the rows of a SoftPrompt or PTuning. Several of them are combined outside: '
          'Combined([InDecoder(…), InDecoder(…)]). For keys and values in the decoder, set '
          "Prefix.sites = ('decoder',)."
      )
    super().__post_init__()

  @property
  def num_decoder_virtual_tokens(self) -> int:
    return self.prompt.num_virtual_tokens

  @property
  def has_dropout(self) -> bool:
    return self.prompt.has_dropout

  def __call__(self, spec: BackboneSpec) -> Injection:
    """The prompt as an Injection, its rows those of the decoder."""
    return self.prompt(spec).replace(
        num_decoder_virtual_tokens=self.prompt.num_virtual_tokens
    )


class Combined(Method):
  """Several methods that train together: a soft prompt and a prefix, say.

  Virtual tokens of one method follow those of the one before; prefixes of the same site
  lie one after the other as well.

  Attributes:
    methods: the methods, two or more.
  """

  methods: Sequence[Method] = ()

  def __post_init__(self) -> None:
    if not isinstance(self.methods, (list, tuple)) or len(self.methods) < 2:
      raise ValueError(
          f'Combined.methods is {self.methods!r}; it is a list of two or more methods, such '
          'as [@SoftPrompt(), @Prefix()].'
      )
    for number, method in enumerate(self.methods):
      check_method(method, f'Combined.methods[{number}]')
    object.__setattr__(self, 'methods', tuple(self.methods))
    super().__post_init__()

  @property
  def num_virtual_tokens(self) -> int:
    return sum(method.num_virtual_tokens for method in self.methods)

  @property
  def num_decoder_virtual_tokens(self) -> int:
    return sum(method.num_decoder_virtual_tokens for method in self.methods)

  @property
  def has_dropout(self) -> bool:
    return any(method.has_dropout for method in self.methods)

  def __call__(self, spec: BackboneSpec) -> Injection:
    """All that the methods inject, as one Injection."""
    return combine([method(spec) for method in self.methods])


def combine(injections: Sequence[Injection]) -> Injection:
  """Several Injections as one; their virtual tokens count on from one to the next.

  Raises:
    ValueError: if their prefixes differ in `positions`.
  """
  positions = {x.positions for x in injections if _has_prefix(x)}
  if len(positions) > 1:
    raise ValueError(
        f'The prefixes of methods that are combined differ in positions '
        f'({" and ".join(sorted(positions))}). Give all the same (Prefix.positions).'
    )
  if any(x.layer_embeddings is not None for x in injections):
    raise ValueError(
        'A prompt in every layer (LayerPrompt) cannot be combined with another method: its '
        'rows stand where the virtual tokens of the other would. Use it alone.'
    )
  encoder = [x.virtual_embeddings[: x.num_virtual_tokens] for x in injections if _has_rows(x)]
  decoder = [x.virtual_embeddings[x.num_virtual_tokens :] for x in injections if _has_rows(x)]
  return Injection(
      virtual_embeddings=jnp.concatenate(encoder + decoder) if encoder else None,
      **{field: _joined([getattr(x, field) for x in injections]) for field in KV_FIELDS.values()},
      positions=next(iter(positions), 'before'),
      num_decoder_virtual_tokens=sum(x.num_decoder_virtual_tokens for x in injections),
  )


def _has_rows(injection: Injection) -> bool:
  return injection.virtual_embeddings is not None


def _has_prefix(injection: Injection) -> bool:
  return any(getattr(injection, field) is not None for field in KV_FIELDS.values())


def _joined(prefixes: Sequence[KeysValues | None]) -> KeysValues | None:
  """Prefixes of one site, each [L, P, N, H], one after the other."""
  present = [prefix for prefix in prefixes if prefix is not None]
  if not present:
    return None
  return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *present)
