"""What a program costs, counted in its jaxpr: FLOPs of products, and the memory it needs.

Nothing is compiled or computed, so that XXL is counted in seconds on a laptop. Products are
counted exactly, loops as often as they run. The memory is an estimate: products, gathers and
what loops carry are held in memory from where they are made to where they are last used;
elementwise work is taken to be fused with what reads it, as XLA does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex_core

# What XLA computes in the loop that reads it, or sees as another view of the same memory.
# All else is taken to have memory of its own.
_FUSED = frozenset(
    'abs add add_any and bitcast_convert_type broadcast_in_dim ceil clamp convert_element_type '
    'copy copy_p cos div eq erf exp exp2 expand_dims expm1 floor ge gt integer_pow iota '
    'is_finite le log log1p logistic lt max min mul name ne neg not optimization_barrier or pad '
    'pow random_bits random_fold_in random_unwrap random_wrap real reduce_and reduce_max '
    'reduce_min reduce_or reduce_sum rem reshape round rsqrt select_n sharding_constraint '
    'shift_left shift_right_logical sign sin slice split sqrt square squeeze stop_gradient sub '
    'tanh threefry2x32 transpose xor'.split()
)


class Costs(NamedTuple):
  """Costs of a program.

  Attributes:
    flops: of its matrix products, a multiplication and an addition each counting as one.
    peak_bytes: estimate of the memory for all that it computes; arguments not included.
  """

  flops: float
  peak_bytes: int


def count(function: Callable[..., Any], *args: Any) -> Costs:
  """Counts the costs of calling a function on arguments of these shapes.

  Args:
    function: what JAX can trace.
    *args: pytrees of arrays or ShapeDtypeStructs.
  """
  closed = jax.make_jaxpr(function)(*args)
  return Costs(_flops(closed.jaxpr), _peak(closed.jaxpr))


def _flops(jaxpr: Any) -> float:
  total = 0.0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == 'dot_general':
      (contracted, _), _ = eqn.params['dimension_numbers']
      lhs = eqn.invars[0].aval.shape
      total += 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(lhs[d] for d in contracted)
      continue
    inner = [_flops(j) for j in _inner(eqn)]
    if eqn.primitive.name == 'cond':
      total += max(inner)
    else:
      total += eqn.params.get('length', 1) * sum(inner)
  return total


def _inner(eqn: Any) -> Iterator[Any]:
  """The jaxprs inside an equation."""
  for value in eqn.params.values():
    for item in value if isinstance(value, (list, tuple)) else [value]:
      if isinstance(item, jex_core.ClosedJaxpr):
        yield item.jaxpr
      elif isinstance(item, jex_core.Jaxpr):
        yield item


def _bytes(aval: Any) -> int:
  if not hasattr(aval, 'shape'):
    return 0
  return math.prod(aval.shape) * getattr(aval.dtype, 'itemsize', 4)


def _peak(jaxpr: Any) -> int:
  """Most bytes that are held at once, beside the jaxpr's own inputs."""
  # What a variable is made of: the variables that have memory and have to stay for it.
  roots: dict[Any, frozenset[Any]] = {v: frozenset() for v in (*jaxpr.invars, *jaxpr.constvars)}
  last_use: dict[Any, int] = {}
  own: list[tuple[int, int]] = []  # For each equation: bytes it makes, its inner peak.

  def roots_of(atoms: Sequence[Any]) -> frozenset[Any]:
    found: frozenset[Any] = frozenset()
    for atom in atoms:
      if not isinstance(atom, jex_core.Literal):
        found |= roots.get(atom, frozenset())
    return found

  made: list[list[Any]] = []
  for number, eqn in enumerate(jaxpr.eqns):
    needed = roots_of(eqn.invars)
    for root in needed:
      last_use[root] = number
    inner = max((_peak(j) for j in _inner(eqn)), default=0)
    new = []
    for var in eqn.outvars:
      if eqn.primitive.name in _FUSED:
        roots[var] = needed
      else:
        roots[var] = frozenset([var])
        last_use.setdefault(var, number)
        new.append(var)
    made.append(new)
    own.append((sum(_bytes(var.aval) for var in new), inner))
  for root in roots_of(jaxpr.outvars):
    last_use[root] = len(jaxpr.eqns)
  dying: dict[int, list[Any]] = {}
  for var, number in last_use.items():
    dying.setdefault(number, []).append(var)
  held = peak = 0
  for number, (new_bytes, inner) in enumerate(own):
    # A loop's results are filled while it runs.
    peak = max(peak, held + new_bytes + inner)
    held += new_bytes - sum(_bytes(var.aval) for var in dying.get(number, ()))
  return peak
