"""What devices send each other in a compiled program, counted in its text.

XLA decides while it compiles which arrays devices exchange, and says so only in the
optimised program (`compiled.as_text()`). Loops count as often as they run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

KINDS = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute')

_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$')
# The name, the type of the result, and the operation, which alone has a space before it.
_INSTRUCTION = re.compile(r'^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][\w\-]*)\((.*)$')
_CALLED = re.compile(
    r'(?:calls|to_apply|body|branch_computations|called_computations|'
    r'true_computation|false_computation)=(\{[^}]*\}|%?[\w.\-]+)'
)
_ARRAY = re.compile(r'\b([a-z]+\d+\w*|pred)\[([\d,]*)\]')
_BITS = re.compile(r'[a-z]+(\d+)')


class Sent(NamedTuple):
  """Collectives of one kind.

  Attributes:
    count: how often a device takes part in one.
    bytes: what it sends in all of them together, in rings.
  """

  count: int
  bytes: int


def count(text: str, num_devices: int) -> dict[str, Sent]:
  """Counts the collectives that a device takes part in while the program runs once.

  Args:
    text: the optimised program, as XLA prints it.
    num_devices: devices that run it.

  Returns:
    By kind, those that there are.

  Raises:
    ValueError: if the text has no entry, or a loop in it that does not say how often it
      runs and exchanges something.
  """
  computations, entry = _parse(text)
  # XLA spreads a collective over several computations so that others run beside it; all
  # parts of it have its channel.
  often: dict[str, tuple[int, str, int]] = {}
  for number, ((op, result, attributes), times) in enumerate(_executed(computations, entry, 1)):
    channel = re.search(r'channel_id=(\d+)', attributes)
    key = channel[0] if channel else f'without a channel {number}'
    one = (times, op.removesuffix('-start'), _sent(op, result, attributes, num_devices))
    often[key] = max(often.get(key, one), one)
  found: dict[str, Sent] = {}
  for times, kind, sent in often.values():
    before = found.get(kind, Sent(0, 0))
    found[kind] = Sent(before.count + times, before.bytes + times * sent)
  return found


_Line = tuple[str, str, str]  # Operation, type of the result, operands and attributes.


def _parse(text: str) -> tuple[dict[str, list[_Line]], str]:
  computations: dict[str, list[_Line]] = {}
  entry, lines = '', []
  for line in text.splitlines():
    if header := _COMPUTATION.match(line):
      lines = computations.setdefault(header[2], [])
      entry = header[2] if header[1] else entry
    elif instruction := _INSTRUCTION.match(line):
      lines.append((instruction[2], instruction[1], instruction[3]))
  if not entry:
    raise ValueError('This is not a program as XLA prints it: it has no line that begins ENTRY.')
  return computations, entry


def _executed(
    computations: Mapping[str, list[_Line]], name: str, times: int | None
) -> Iterator[tuple[_Line, int]]:
  """Collectives of a computation and of those it calls, each with how often it runs.

  `times` is None inside a loop of unknown length.
  """
  for line in computations.get(name, ()):
    op, _, attributes = line
    if op.removesuffix('-start') in KINDS:
      if times is None:
        raise ValueError(
            f'The loop around {name} exchanges something, but does not say how often it runs.'
        )
      yield line, times
      continue
    inside = times
    if op == 'while':
      length = _length(computations, attributes)
      inside = None if length is None or times is None else times * length
    for called in _CALLED.findall(attributes):
      for inner in re.findall(r'[\w.\-]+', called):
        yield from _executed(computations, inner, inside)


def _length(computations: Mapping[str, list[_Line]], attributes: str) -> int | None:
  """How often a loop runs: XLA's own word, or the number that its condition compares with."""
  if known := re.search(r'known_trip_count[^\d]*(\d+)', attributes):
    return int(known[1])
  condition = re.search(r'condition=%?([\w.\-]+)', attributes)
  lines = computations.get(condition[1], []) if condition else []
  compared = any(op == 'compare' and 'direction=LT' in rest for op, _, rest in lines)
  numbers = {
      int(rest.split(')')[0])
      for op, result, rest in lines
      if op == 'constant' and result.startswith('s32[]')
  }
  return numbers.pop() if compared and len(numbers) == 1 else None


def _sent(op: str, result: str, attributes: str, num_devices: int) -> int:
  """Bytes that a device sends in one collective, in a ring.

  An all-reduce sends everything but a device's own part twice, the others once.
  """
  size = sum(_bytes(dtype, dims) for dtype, dims in _ARRAY.findall(result))
  devices = _group(attributes, num_devices)
  kind = op.removesuffix('-start')
  if kind == 'collective-permute':
    # When it starts it has its operand as well, and two numbers to wait for.
    return (size - 8) // 2 if op != kind else size
  if op == 'all-gather-start':
    size = size * devices // (devices + 1)  # Its operand is a device's part of the result.
  if op == 'reduce-scatter-start':
    size = size // (devices + 1)
  factor = {'all-reduce': 2, 'reduce-scatter': devices}.get(kind, 1)
  return factor * size * (devices - 1) // devices


def _bytes(dtype: str, dims: str) -> int:
  bits = 8 if dtype == 'pred' else int(_BITS.match(dtype)[1])
  return math.prod(int(size) for size in dims.split(',') if size) * bits // 8


def _group(attributes: str, num_devices: int) -> int:
  """How many devices exchange with each other."""
  if listed := re.search(r'replica_groups=\{\{([\d,]*)\}', attributes):
    return len(listed[1].split(','))
  if shaped := re.search(r'replica_groups=\[(\d+),(\d+)\]', attributes):
    return int(shaped[2])
  if named := re.search(r'replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}', attributes):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
  return num_devices
