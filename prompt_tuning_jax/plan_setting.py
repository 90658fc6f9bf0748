"""What of a run decides whether it fits on given devices, and what makes it smaller."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from prompt_tuning_jax import partitioning
from prompt_tuning_jax.backbones import t5_stacks
from prompt_tuning_jax.backbones.t5 import T5Config
from prompt_tuning_jax.targets import Target


@dataclasses.dataclass(frozen=True)
class Setting:
  """What of a run decides whether it fits, and may be changed so that it does.

  Attributes:
    dtype: of the computation and of frozen weights.
    remat: what the backward pass computes again (`t5_stacks.REMAT_POLICIES`).
    microbatches: parts of a batch, one after the other.
    num_partitions: devices that share a copy of the model.
    rules: which axes of the weights are split over which axis of the mesh.
    param_dtype: type the weights are held in; None where it is `dtype`. 'int8' is of kernels and
      embeddings.
  """

  dtype: str
  remat: str
  microbatches: int
  num_partitions: int
  rules: partitioning.Rules
  param_dtype: str | None = None

  @property
  def held_as(self) -> str:
    """Type of the weights, of those that int8 leaves alone where it is int8."""
    return self.dtype if self.param_dtype in (None, 'int8') else self.param_dtype

  @property
  def gathers_weights(self) -> bool:
    """Whether weights are split over the devices that split the batch, too."""
    return any(to == 'data' for axis, to in self.rules if axis != 'batch')

  def shares_heads(self, config: T5Config) -> bool:
    """Whether devices that share a copy of the model compute each of its heads together."""
    splits = dict(self.rules).get('joined_kv') == 'model'
    return splits and config.num_heads % self.num_partitions != 0

  def part(self, axis: str, size: int) -> int:
    """A device's share of an axis of the weights, while it computes with them."""
    splits = dict(self.rules).get(axis) == 'model' and size % self.num_partitions == 0
    return size // self.num_partitions if splits else size

  def changes(self, other: Setting) -> str:
    """What another setting has that this one has not, as flags."""
    flags = {
        'DTYPE': other.dtype != self.dtype and other.dtype,
        'PARAM_DTYPE': other.param_dtype != self.param_dtype and other.param_dtype,
        'REMAT': other.remat != self.remat and other.remat,
        'MICROBATCHES': other.microbatches != self.microbatches and other.microbatches,
        'NUM_PARTITIONS': other.num_partitions != self.num_partitions and other.num_partitions,
    }
    if other.rules != self.rules:
      if self.rules not in partitioning.RULES.values():
        # Rules of one's own would stay, whatever is said of the dims.
        flags['LOGICAL_AXIS_RULES'] = '@logical_axis_rules()'
      flags['PARAMETER_PARTITIONING_DIMS'] = next(
          dims for dims, rules in partitioning.RULES.items() if rules == other.rules
      )
    return ' '.join(f'--gin.{macro}={value}' for macro, value in flags.items() if value)


def easier_settings(setting: Setting, target: Target, rows: int) -> Iterator[Setting]:
  """Settings that need less memory, those that cost the least speed first."""
  replace = dataclasses.replace
  start = setting if target.kind == 'here' else replace(setting, dtype='bfloat16')
  if start != setting:
    yield start
  remats = list(t5_stacks.REMAT_POLICIES)  # From the fastest to the one that keeps least.
  partitions = setting.num_partitions
  while partitions <= target.of_slice:
    of_size = replace(start, num_partitions=partitions)
    wider = [partitioning.DEFAULT_RULES, partitioning.FULLY_SHARDED_RULES]
    for rules in dict.fromkeys([setting.rules, *wider[: 1 + (partitions < target.count)]]):
      split = replace(of_size, rules=rules)
      for remat in remats[remats.index(setting.remat) :]:
        yield replace(split, remat=remat)
      parts = 2 * setting.microbatches
      of_device = rows * partitions // target.count
      while of_device % parts == 0:
        yield replace(split, remat='full', microbatches=parts)
        parts *= 2
    partitions *= 2
    while partitions <= target.of_slice and target.of_slice % partitions:
      partitions += 1
