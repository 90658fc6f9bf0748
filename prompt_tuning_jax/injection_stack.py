"""Several prompts as one Injection, of which each row of a batch has one.

    injection = stack_injections([of_cb.injection, of_rte.injection])

One copy of the frozen weights and one program then serve rows of different prompts: the
members of an ensemble, the tasks of a mixed batch, the runs of an ablation. A batch says by
`Batch.prompt_ids` and by its virtual ids whose rows are whose (`data/several_prompts.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from prompt_tuning_jax.typing import KV_FIELDS, Array, Injection


def stack_injections(injections: Sequence[Injection | None]) -> Injection:
  """One Injection of several prompts, in their order.

  Soft prompts, and prompts in every layer, are filled up with rows of zeros to the longest,
  and no token stands for those. Prefixes have to be alike: the same sites, of the same
  lengths and positions.

  Args:
    injections: the prompts, each of them one. None, the bare model, may be among prompts
      that are virtual tokens of the encoder's input and nothing else.

  Returns:
    The injection; of a single prompt that itself.

  Raises:
    ValueError: if there are none, one of them holds several, or they differ in more than
      the length of a soft prompt.
  """
  prompts = [Injection() if injection is None else injection for injection in injections]
  if not prompts:
    raise ValueError('There is no prompt to stack: give at least one.')
  for number, prompt in enumerate(prompts):
    if prompt.num_prompts > 1:
      raise ValueError(
          f'Prompt {number} of those to be stacked holds {prompt.num_prompts} prompts already. '
          'Stack all of them at once.'
      )
  if len(prompts) == 1:
    return prompts[0]
  first = max(
      range(len(prompts)),
      key=lambda n: (len(jax.tree.leaves(prompts[n])), prompts[n].prompt_stride),
  )
  largest = prompts[first]
  for number, prompt in enumerate(prompts):
    _check_alike(number, prompt, first, largest)
  if not jax.tree.leaves(largest):
    return largest.replace(num_prompts=len(prompts))
  length = max(prompt.num_virtual_tokens for prompt in prompts)
  filled_up = [_filled_up(prompt, length, largest) for prompt in prompts]
  return merge_prompt_axis(jax.tree.map(lambda *arrays: jnp.stack(arrays), *filled_up))


def merge_prompt_axis(injection: Injection) -> Injection:
  """The prompts of an Injection in which every array has a leading axis [K] of them.

  That is what `jax.vmap` makes of a method that is applied to K sets of parameters.

  Raises:
    ValueError: if the arrays have no such axis in common.
  """
  counts = {array.shape[0] for array in jax.tree.leaves(injection)}
  if len(counts) != 1:
    raise ValueError(
        f'{injection} has {", ".join(map(str, sorted(counts))) or "no"} prompts on the first '
        'axes of its arrays; all of them need the same number there.'
    )
  (K,) = counts
  if K == 1:
    return jax.tree.map(lambda array: array[0], injection)

  def layers_first(array: Array | None) -> Array | None:
    return None if array is None else jnp.moveaxis(array, 0, 1)

  def one_table(rows: Array | None) -> Array | None:
    return None if rows is None else rows.reshape(*rows.shape[:-3], -1, rows.shape[-1])

  pairs = {name: getattr(injection, name) for name in KV_FIELDS.values()}
  return injection.replace(
      virtual_embeddings=one_table(injection.virtual_embeddings),
      layer_embeddings=one_table(layers_first(injection.layer_embeddings)),
      **{name: pair and tuple(map(layers_first, pair)) for name, pair in pairs.items()},
      num_prompts=K,
  )


def _check_alike(number: int, prompt: Injection, other_number: int, other: Injection) -> None:
  """Raises ValueError unless rows of the two prompts can share a batch."""
  kinds, other_kinds = structure(prompt), structure(other)
  # The bare model is a prompt of no virtual tokens.
  if not jax.tree.leaves(prompt) and _has_virtual_tokens_alone(other):
    return
  if kinds == other_kinds:
    return
  different = [name for name in kinds if kinds[name] != other_kinds[name]]
  raise ValueError(
      'Prompts can share a batch only if they are of one kind, with prefixes of the same '
      f'lengths; prompts {other_number} and {number}, counted from 0, differ in '
      f'{", ".join(different)}: {other} and {prompt}. Run those of each kind on their own.'
  )


def structure(prompt: Injection) -> dict[str, object]:
  """What has to be the same of all prompts that are stacked; shapes will do for arrays."""

  def shape(array: Array | None, but_axis: int) -> tuple[int, ...] | None:
    if array is None:
      return None
    return tuple(size for axis, size in enumerate(array.shape) if axis != but_axis)

  pairs = {name: getattr(prompt, name) for name in KV_FIELDS.values()}
  return {
      'virtual_embeddings': shape(prompt.virtual_embeddings, 0),
      'layer_embeddings': shape(prompt.layer_embeddings, 1),
      **{name: pair and [array.shape for array in pair] for name, pair in pairs.items()},
      'positions': prompt.positions if any(pairs.values()) else None,
      'num_decoder_virtual_tokens': prompt.num_decoder_virtual_tokens,
  }


def _has_virtual_tokens_alone(prompt: Injection) -> bool:
  prefixes = any(getattr(prompt, name) is not None for name in KV_FIELDS.values())
  return not prefixes and not prompt.num_decoder_virtual_tokens


def _filled_up(prompt: Injection, length: int, like: Injection) -> Injection:
  """The prompt with so many virtual tokens in the encoder's input, in the fields of another."""
  own = prompt.num_virtual_tokens
  rows, layer_rows = prompt.virtual_embeddings, prompt.layer_embeddings
  if like.virtual_embeddings is not None:
    rows = jnp.zeros_like(like.virtual_embeddings[:0]) if rows is None else jnp.asarray(rows)
    empty = jnp.zeros((length - own, rows.shape[1]), rows.dtype)
    # The decoder's own stand behind those of the encoder.
    rows = jnp.concatenate([rows[:own], empty, rows[own:]])
  if like.layer_embeddings is not None:
    if layer_rows is None:
      layer_rows = jnp.zeros_like(like.layer_embeddings[:, :0])
    layer_rows = jnp.pad(layer_rows, ((0, 0), (0, length - own), (0, 0)))
  return prompt.replace(
      virtual_embeddings=rows, layer_embeddings=layer_rows, positions=like.positions
  )
