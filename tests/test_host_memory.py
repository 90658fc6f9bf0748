"""What is freed stays with the process, so that a step does not fault its memory in again."""

import subprocess
import sys

import pytest

_FAULTS = """
import resource, sys
import numpy as np
from prompt_tuning_jax.host_memory import keep_freed_memory

if sys.argv[1] == 'kept':
  if not keep_freed_memory():
    print('unknown')
    sys.exit()

def faults():
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  np.ones(2**25, np.uint8)  # 8,192 pages.
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
print(faults())
"""


def _faults(how):
  done = subprocess.run(
      [sys.executable, '-c', _FAULTS, how], capture_output=True, text=True, check=True
  )
  return done.stdout.strip()


def test_memory_that_is_freed_is_not_given_back():
  kept = _faults('kept')
  if kept == 'unknown':
    pytest.skip('This C library has no mallopt.')
  assert int(kept) < 100 < int(_faults('given back'))
