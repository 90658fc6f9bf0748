"""Memory of the host, where JAX computes on it."""

from __future__ import annotations

import ctypes
import sys

# Of malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
  """Tells glibc to keep what is freed for what is allocated next; whether it could be told.

  On a CPU a step allocates its activations anew. glibc gives arrays that large back to the
  system, which then has to clear their pages again: of long rows (704 tokens, T5 1.1 small)
  that is a million page faults and a fifth of a step. A process keeps the most memory it ever
  had instead. To be called before any thread is started; commands do so.
  """
  if not sys.platform.startswith('linux'):
    return False
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (OSError, AttributeError):  # Another C library, such as musl.
    return False
  settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_ARENA_MAX, 1))
  return all(mallopt(name, value) == 1 for name, value in settings)
