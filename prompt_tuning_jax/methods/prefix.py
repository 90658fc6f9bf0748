"""Prefix tuning: trained keys and values before those of every layer (Li & Liang, 2021)."""

from __future__ import annotations

import functools
import inspect
import numbers
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp

from prompt_tuning_jax.methods.linear import Linear
from prompt_tuning_jax.methods.method import Method, check_length, is_whole
from prompt_tuning_jax.typing import (
    KV_FIELDS,
    POSITIONS,
    Array,
    BackboneSpec,
    Injection,
    KeysValues,
)


class Prefix(Method):
  """Keys and values [L, P, N, H] for each attention site, independent of each other.

  In training they come from a small network (section 4.3): Embedding(P, d_model) →
  Linear(hidden) → Tanh → Linear(2 · L · N · H), one for each site. What the backbone and
  the artifact get is its output alone.

  Attributes:
    length: P, positions of the prefix, at least 1. The paper's best are 10 for
      table-to-text and 200 for summarisation.
    sites: which attention sees a prefix: 'encoder' (self-attention), 'decoder'
      (self-attention) and 'cross' (the decoder's attention over the encoder's output).
    hidden: width of the network's hidden layer (512 for table-to-text, 800 for
      summarisation); None trains the keys and values themselves.
    positions: 'before' the text, with the relative bias of that distance, or 'none'
      (`typing.Injection`). The paper's models have no relative positions.
    dropout_rate: of the keys and values while they train; 0 in the paper. All rows of a
      batch (of a microbatch) have the same prefix and so the same dropped numbers.
    embedding_init: initialiser of the network's input [P, d_model]; N(0, 1) in the paper's
      code. Not used where `hidden` is None.
    keys_values_init: initialiser `(key, (2, L, P, N, H), dtype, site=…) → array` of the keys
      and values, such as `initializers.keys_values_of`. With a network, its last layer
      starts so that it gives them; only nearly, where the prefix is longer than the hidden
      layer is wide. None: N(0, 1), or what the network gives.
  """

  length: int = 10
  sites: tuple[str, ...] = tuple(KV_FIELDS)
  hidden: int | None = 512
  positions: str = 'before'
  dropout_rate: float = 0.0
  embedding_init: Callable[..., Array] = nn.initializers.normal(1.0)
  keys_values_init: Callable[..., Array] | None = None

  def __post_init__(self) -> None:
    name = type(self).__name__
    check_length(self.length, f'{name}.length')
    sites = (self.sites,) if isinstance(self.sites, str) else self.sites
    named = isinstance(sites, (list, tuple)) and all(site in list(KV_FIELDS) for site in sites)
    if not named or not sites or len(set(sites)) < len(sites):
      raise ValueError(
          f'{name}.sites is {self.sites!r}; it names one or more of '
          f'{", ".join(map(repr, KV_FIELDS))}, each once.'
      )
    object.__setattr__(self, 'sites', tuple(sites))
    if self.positions not in POSITIONS:
      raise ValueError(
          f'{name}.positions is {self.positions!r}; a prefix stands '
          f'{" or ".join(map(repr, POSITIONS))}.'
      )
    hidden = self.hidden
    if hidden is not None and not (is_whole(hidden) and hidden >= 1):
      raise ValueError(
          f'{name}.hidden is {hidden!r}; it is the width of a layer, at least 1, or None to '
          'train keys and values without a network.'
      )
    rate = self.dropout_rate
    if not (isinstance(rate, numbers.Real) and 0 <= rate < 1):
      raise ValueError(
          f'{name}.dropout_rate is {rate!r}; it is a share, at least 0 and below 1.'
      )
    super().__post_init__()
    if self.keys_values_init is not None and not _takes_site(self.keys_values_init):
      raise ValueError(
          f'{name}.keys_values_init is {self.keys_values_init!r}, an initialiser that does '
          'not know of attention sites. Give it one that takes `site=`, such as '
          'initializers.keys_values_of; embedding_init takes any.'
      )

  @property
  def has_dropout(self) -> bool:
    return self.dropout_rate > 0

  @nn.compact
  def __call__(self, spec: BackboneSpec) -> Injection:
    """The prefixes as an Injection for a backbone of these sizes."""
    return Injection(
        **{KV_FIELDS[site]: self._keys_values(spec, site) for site in self.sites},
        positions=self.positions,
    )

  def _keys_values(self, spec: BackboneSpec, site: str) -> KeysValues:
    layers = spec.num_encoder_layers if site == 'encoder' else spec.num_decoder_layers
    shape = (2, layers, self.length, spec.num_heads, spec.d_kv)
    init = None
    if self.keys_values_init is not None:
      init = functools.partial(self.keys_values_init, site=site)
    if self.hidden is None:
      keys_values = self.param(site, init or nn.initializers.normal(1.0), shape)
    else:
      keys_values = _Network(
          shape, spec.d_model, self.hidden, self.embedding_init, init, name=site
      )()
    dropout = nn.Dropout(self.dropout_rate, deterministic=not self.has_rng('dropout'))
    keys_values = dropout(keys_values)
    return keys_values[0], keys_values[1]


def _takes_site(init: Callable[..., Array]) -> bool:
  parameters = inspect.signature(init).parameters.values()
  return any(p.name == 'site' or p.kind is p.VAR_KEYWORD for p in parameters)


class _Network(nn.Module):
  """Keys and values [2, L, P, N, H] from an embedding and two linear layers."""

  shape: tuple[int, ...]
  width: int
  hidden: int
  embedding_init: Callable[..., Array]
  keys_values_init: Callable[..., Array] | None

  @nn.compact
  def __call__(self) -> Array:
    _, layers, length, heads, d_kv = self.shape
    embedding_PD = self.param('embedding', self.embedding_init, (length, self.width))
    hidden_PM = jnp.tanh(Linear(self.hidden, name='into')(embedding_PD))
    flat_init = None
    if self.keys_values_init is not None:
      flat_init = lambda key, shape: _flat(self.keys_values_init(key, self.shape))
    flat_PO = Linear(2 * layers * heads * d_kv, flat_init, name='out')(hidden_PM)
    return flat_PO.reshape(length, layers, 2, heads, d_kv).transpose(2, 1, 0, 3, 4)


def _flat(keys_values: Array) -> Array:
  """[2, L, P, N, H] as the paper's code lays out a row: each layer's keys, then its values."""
  return keys_values.transpose(2, 1, 0, 3, 4).reshape(keys_values.shape[2], -1)
