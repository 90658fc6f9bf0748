"""A backbone as the rest of the library holds it: module, weights, vocabulary."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from prompt_tuning_jax import partitioning
from prompt_tuning_jax.backbones import int8
from prompt_tuning_jax.data.vocabulary import T5_VOCABULARY, Vocabulary
from prompt_tuning_jax.typing import Array, BackboneSpec, PyTree


class Backbone:
  """A pretrained model and what belongs to it; the weights are read on first use.

  Attributes:
    name: short name for messages and manifests, for example `nano`.
    module: the Linen module that computes `(params, Batch, Injection) → logits`.
    vocabulary: the vocabulary it was trained with.
    source: where the weights come from.
    mesh: the devices that the weights are split over; None is one device.
    rules: which axes of the weights are split over which axis of the mesh.
    param_dtype: type the weights are held in; None where it is the computation's.
  """

  def __init__(
      self,
      name: str,
      module: nn.Module,
      vocabulary: Vocabulary | None,
      load_params: Callable[[], PyTree],
      *,
      source: str = '',
      fingerprint: Callable[[], str] | str = '',
      mesh: Mesh | None = None,
      rules: partitioning.Rules = partitioning.DEFAULT_RULES,
      param_dtype: str | None = None,
  ):
    self.name = name
    self.module = module
    self.vocabulary = vocabulary
    self.source = source
    self.mesh = mesh
    self.rules = rules
    self.param_dtype = param_dtype
    self._load_params = load_params
    self._fingerprint = fingerprint

  def __repr__(self) -> str:
    return f'Backbone({self.name!r}, {self.num_params:,} parameters, from {self.source!r})'

  @functools.cached_property
  def params(self) -> PyTree:
    """The weights, loaded when first asked for."""
    return self._load_params()

  @functools.cached_property
  def fingerprint(self) -> str:
    """Identity of the weights, independent of the format they were read from."""
    return self._fingerprint() if callable(self._fingerprint) else self._fingerprint

  @property
  def held_as(self) -> str:
    """Type the weights are held in, which decides their numbers."""
    return self.param_dtype or jnp.dtype(self.module.dtype).name

  def description(self) -> dict[str, Any]:
    """What decides the numbers that it computes, as JSON values."""
    return {'backbone_fingerprint': self.fingerprint, **self.computation()}

  def computation(self) -> dict[str, Any]:
    """What decides the numbers besides the weights, as JSON values; no file is read."""
    return {
        'vocabulary': None if self.vocabulary is None else self.vocabulary.fingerprint,
        'architecture': dataclasses.asdict(self.module.config),
        'dtype': jnp.dtype(self.module.dtype).name,
        'weights': self.held_as,
        'attention': getattr(self.module, 'attention', ''),
    }

  def let_go(self) -> None:
    """Forgets the weights, which are read again when they are asked for."""
    self.__dict__.pop('params', None)

  def needed_vocabulary(self, purpose: str) -> Vocabulary:
    """The vocabulary, for what cannot do without.

    Args:
      purpose: what cannot be done without it, for the error: a sentence's end.

    Raises:
      ValueError: if there is none; T5X checkpoints have none beside their weights.
    """
    if self.vocabulary is None:
      raise ValueError(
          f'{self.name} has no vocabulary beside its weights, without which {purpose}. Set '
          'VOCABULARY (or load_backbone(…, vocabulary=…)) to the SentencePiece model it was '
          f'trained with; of T5 1.1, LM-adapted or not, that is a copy of {T5_VOCABULARY}.'
      )
    return self.vocabulary

  @property
  def spec(self) -> BackboneSpec:
    """The sizes that a prompt method may know."""
    return self.module.spec

  @functools.cached_property
  def shapes(self) -> PyTree:
    """Shapes and types of the weights, without loading them."""
    return jax.eval_shape(self.module.init_params, jax.random.key(0))

  @property
  def num_params(self) -> int:
    """Number of weights, counted from the shapes."""
    return int8.count(self.shapes)

  @property
  def embedding_VD(self) -> Array:
    """The token embedding table [V, D], from which prompts may be initialised."""
    table_VD, scale_V = self._embedding()
    if scale_V is None:
      return table_VD
    return int8.dequantize(table_VD, scale_V, -1, self.module.dtype)

  def embeddings(self, ids: np.ndarray | Array | slice) -> Array:
    """Some rows of `embedding_VD`, [ids, D]; of a table in int8 no others are converted."""
    table_VD, scale_V = self._embedding()
    rows = jnp.asarray(table_VD)[ids]
    if scale_V is None:
      return rows
    return int8.dequantize(rows, jnp.asarray(scale_V)[ids], -1, self.module.dtype)

  def _embedding(self) -> tuple[Array, Array | None]:
    """The table as it is held, and its scales where that is in int8."""
    embedder = self.params['token_embedder']
    table_VD, scale_V = embedder['embedding'], embedder.get('embedding_scale')
    if jax.process_count() > 1 and self.mesh is not None:
      # No process has all of it where several share the model. Whoever traces an initialiser
      # gets numbers all the same.
      with jax.ensure_compile_time_eval():
        table_VD = partitioning.whole(table_VD)
        scale_V = None if scale_V is None else partitioning.whole(scale_V)
    return table_VD, scale_V
