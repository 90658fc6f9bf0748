"""The devices that a run may be planned for: their number, memory and speed, by name."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re

import jax

_GIB = 2**30

# Share of a device's memory that a run may plan with: the rest is the runtime's, and what
# the estimate of the activations may be wrong by.
_USABLE = 0.9

# Name → GiB of memory, and dense bfloat16 TFLOP/s, by the makers' data sheets; None where
# there are no units for bfloat16.
_GPUS = {
    'T4-16GB': (16, None),
    'L4-24GB': (24, 121),
    'A10-24GB': (24, 125),
    'RTX4090-24GB': (24, 165),
    'V100-16GB': (16, None),
    'V100-32GB': (32, None),
    'A100-40GB': (40, 312),
    'A100-80GB': (80, 312),
    'H100-80GB': (80, 989),
    'H200-141GB': (141, 989),
    'B200-180GB': (180, 2250),
}
# A chip; v2 and v3 have two devices a chip, of half of it each.
_TPUS = {
    'v2': (8, 22.5),
    'v3': (16, 61.5),
    'v4': (32, 275),
    'v5e': (16, 197),
    'v5p': (95, 459),
    'v6e': (32, 918),
}


@dataclasses.dataclass(frozen=True)
class Target:
  """Devices of one kind.

  Attributes:
    name: as it was asked for.
    count: how many there are.
    memory: bytes of each.
    flops: FLOP/s of each in bfloat16, by its data sheet; None where it is not known.
    kind: 'H100-80GB', 'v5e', …; 'here' for those of this machine.
    slices: of TPUs, in how many slices they are.
  """

  name: str
  count: int
  memory: int
  flops: float | None
  kind: str
  slices: int = 1

  @property
  def usable(self) -> float:
    """Bytes of each that a run may plan with."""
    return _USABLE * self.memory

  @property
  def of_slice(self) -> int:
    """Devices of a slice; only those can share a copy of the model."""
    return self.count // self.slices


def parse(name: str) -> Target:
  """'8xH100-80GB', 'v5e-8', or 'here' for the devices of this machine.

  Raises:
    ValueError: if there is no such device; names those there are.
  """
  if name == 'here':
    return _here()
  count, _, device = name.partition('x') if re.match(r'\d+x', name) else ('1', '', name)
  wanted = device.lower()
  for known, (memory, tflops) in _GPUS.items():
    if wanted in (known.lower(), known.lower().partition('-')[0]) and _is_the_only(wanted):
      _check_count(name, int(count))
      flops = None if tflops is None else tflops * 1e12
      return Target(name, int(count), memory * _GIB, flops, known)
  tpu = re.fullmatch(r'(v\d\w?)-(\d+)', wanted)
  if tpu and tpu[1] in _TPUS:
    memory, tflops = _TPUS[tpu[1]]
    # The number after v4 and v5p counts cores, of which a device has two.
    slices, (number, rest) = int(count), divmod(
        int(tpu[2]), 2 if tpu[1] in ('v4', 'v5p') else 1
    )
    _check_count(name, slices * number)
    if rest:
      raise ValueError(
          f'PLAN_TARGET {name!r}: the number after {tpu[1]} counts cores, two to a device, and is '
          f'even: {tpu[1]}-8 are four devices.'
      )
    return Target(name, slices * number, memory * _GIB, tflops * 1e12, tpu[1], slices)
  if sizes := [known for known in _GPUS if known.lower().startswith(f'{wanted}-')]:
    raise ValueError(
        f'PLAN_TARGET {name!r}: there is more than one {device}; name its memory: '
        f'{" or ".join(sizes)}.'
    )
  if wanted == 'here':
    raise ValueError(
        f"PLAN_TARGET {name!r}: 'here' is all devices of this machine; leave the number out."
    )
  known = [*_GPUS, *(f'{kind}-8' for kind in _TPUS), 'here']
  near = difflib.get_close_matches(device, known, n=1, cutoff=0.4)
  hint = f' Did you mean {near[0]!r}?' if near else ''
  raise ValueError(
      f'PLAN_TARGET {name!r}: there is no device {device!r}.{hint} There are '
      f'{", ".join(known)}; several as 8xH100-80GB, TPUs with their number behind.'
  )


def _is_the_only(wanted: str) -> bool:
  """Whether a name without its memory is that of one device."""
  return '-' in wanted or sum(known.lower().startswith(f'{wanted}-') for known in _GPUS) == 1


def _check_count(name: str, count: int) -> None:
  if count < 1:
    raise ValueError(f'PLAN_TARGET {name!r}: there has to be at least one device, as in 1xH100.')


def memory_here() -> int | None:
  """Bytes that JAX may use of each of this machine's devices; None where it does not say."""
  return (jax.local_devices()[0].memory_stats() or {}).get('bytes_limit')


def _here() -> Target:
  devices = jax.devices()
  memory = memory_here()
  if memory is None:
    ram = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    memory = ram // len(jax.local_devices())
  name = f'here: {len(devices)} × {devices[0].device_kind}'
  return Target(name, len(devices), memory, None, 'here')
