"""Which leaves of the parameter tree train, and with which optimiser.

The parameter tree of a run is `{'prompt': …, 'backbone': …}`. A labelling maps path
prefixes in it to optimisers; a leaf belongs to the longest prefix that leads to it,
and a leaf without one is frozen:

  {'prompt': adafactor()}                           prompt tuning, prefix tuning
  {'prompt': adam(1e-4), 'backbone': adam(1e-5)}    P-tuning with a co-tuned model
  {'backbone': adafactor(1e-3)}                     model tuning, pretraining

Only the trainable tree is differentiated, so no gradient and no optimiser state of
a frozen weight ever exists.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import optax
from flax import traverse_util

from prompt_tuning_jax.backbones import int8
from prompt_tuning_jax.typing import PyTree

Labelling = Mapping[str, optax.GradientTransformation]


def as_labelling(
    trainable: optax.GradientTransformation | Labelling, method: nn.Module | None
) -> Labelling:
  """A labelling as it is; an optimiser alone trains the prompt, or a model without one."""
  if isinstance(trainable, Mapping):
    return trainable
  return {'backbone' if method is None else 'prompt': trainable}


def is_nothing(
    trainable: optax.GradientTransformation | Labelling | None, method: nn.Module | None
) -> bool:
  """Whether what trains is a prompt alone, where no method makes one."""
  if method is not None or trainable is None:
    return False
  return all(label.split('/')[0] == 'prompt' for label in as_labelling(trainable, method))


def _labels(flat: Mapping[str, object], labelling: Labelling) -> dict[str, str]:
  """The prefix in charge of each path that has one."""
  labels = {}
  for path in flat:
    prefixes = [p for p in labelling if path == p or path.startswith(p + '/')]
    if prefixes:
      labels[path] = max(prefixes, key=len)
  return labels


def split(params: PyTree, labelling: Labelling) -> tuple[PyTree, PyTree]:
  """Splits the run's parameters into the trainable and the frozen tree.

  Raises:
    ValueError: if a prefix leads to no parameter, nothing would train, or what would is
      not of a floating-point type, or part of a backbone held in int8.
  """
  flat = traverse_util.flatten_dict(params, sep='/')
  labels = _labels(flat, labelling)
  idle = sorted(set(labelling) - set(labels.values()))
  if idle or not labels:
    known = sorted({'/'.join(path.split('/')[:2]) for path in flat})
    raise ValueError(
        f'`trainable` names {idle or "nothing"}, which leads to no parameter of this run. '
        f'Its parameters are under: {", ".join(known)}.'
    )
  trainable = {path: leaf for path, leaf in flat.items() if path in labels}
  frozen = {path: leaf for path, leaf in flat.items() if path not in labels}
  _check_types(trainable, frozen)
  return (
      traverse_util.unflatten_dict(trainable, sep='/'),
      traverse_util.unflatten_dict(frozen, sep='/'),
  )


def _check_types(trainable: Mapping[str, Any], frozen: Mapping[str, Any]) -> None:
  def whole(tree: Mapping[str, Any]) -> list[str]:
    return [path for path, leaf in tree.items() if not jnp.issubdtype(leaf.dtype, jnp.floating)]

  remedy = (
      "Load the backbone unquantised (PARAM_DTYPE=None; load_backbone's param_dtype), or leave "
      "'backbone' out of TRAINABLE and tune the prompt alone."
  )
  # Cast to float32, integers that stand for other numbers would train without a word.
  if found := whole(trainable):
    raise ValueError(
        f'`trainable` leads to {found[0]} of type {trainable[found[0]].dtype}'
        + (f' and {len(found) - 1} more such parameters' if found[1:] else '')
        + f', but only floating-point weights can be trained. {remedy}'
    )
  # The norms alone could train, but not be written with the weights they belong to.
  tuned = next((path for path in trainable if path.startswith('backbone/')), None)
  beside = [path for path in whole(frozen) if path.startswith('backbone/')]
  if tuned and beside:
    raise ValueError(
        f'`trainable` leads to {tuned}, but {beside[0]} and {len(beside) - 1} more weights of '
        f'the same backbone are held in {frozen[beside[0]].dtype}, which stays frozen. {remedy}'
    )


def merge(trainable: PyTree, frozen: PyTree) -> PyTree:
  """The run's whole parameter tree again; the inverse of `split`."""
  flat = traverse_util.flatten_dict(frozen, sep='/')
  flat.update(traverse_util.flatten_dict(trainable, sep='/'))
  return traverse_util.unflatten_dict(flat, sep='/')


def make_optimizer(labelling: Labelling, trainable: PyTree) -> optax.GradientTransformation:
  """One transformation over the trainable tree, each leaf under its own optimiser."""
  if len(labelling) == 1:
    return next(iter(labelling.values()))
  flat = traverse_util.flatten_dict(trainable, sep='/')
  labels = traverse_util.unflatten_dict(_labels(flat, labelling), sep='/')
  return optax.partition(dict(labelling), labels)


def count(tree: PyTree) -> int:
  """Number of parameters in a tree of arrays or shapes."""
  return int8.count(tree)
