"""Several processes as one run: who writes, what all of them know, how they end together.

Process 0, the main one, alone touches MODEL_DIR and prints; what it finds there is sent to
the others, so that the folder need not be shared. Every process calls these functions in the
same order, as it calls the compiled programs; in a run of one process they do nothing.
"""

from __future__ import annotations

import functools
import json
import os
import pickle
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from prompt_tuning_jax.typing import Array

Value = TypeVar('Value')

# Seconds. A process that says nothing for so long is lost, and the others end.
_HEARTBEAT = 45
# All processes are to come to the start, and to the end, within these.
_START, _END = 300, 60

# Whether this is within `from_main`, where the main process is on its own.
_alone = False
# Whether `join` was called.
_joined = False
# What messages of a lost connection have in common; their type is not always the same.
_LOSS = re.compile('Gloo|NCCL|RCCL|coordination service|heartbeat|Socket closed')


def check(address: str, count: int, index: int) -> None:
  """Raises ValueError unless a process can be the `index`-th of `count`, found at `address`."""
  if count < 1 or not 0 <= index < count:
    raise ValueError(
        f'--process_index={index} of --process_count={count}: there has to be at least one '
        f'process, and indices count from 0{f" to {count - 1}" if count > 0 else ""}.'
    )
  host, _, port = address.rpartition(':')
  if not host or not port.isdecimal():
    raise ValueError(
        f'--coordinator_address={address} is no address: expected the host and a free port of '
        'process 0, such as localhost:1234.'
    )


def join(address: str, count: int, index: int) -> None:
  """Makes this process one of several; before anything asks for a device.

  Args:
    address: 'host:port' of process 0, which listens there.
    count: how many processes there are.
    index: which of them this is.

  Raises:
    ValueError: as `check` does.
    RuntimeError: if not all of them come within five minutes.
  """
  global _joined
  check(address, count, index)
  # The loop has a way of its own to end all processes at one step, which also knows SIGINT;
  # and before it, a signal is to end the process at once.
  jax.config.update('jax_enable_preemption_service', False)
  jax.distributed.initialize(
      address,
      num_processes=count,
      process_id=index,
      initialization_timeout=_START,
      heartbeat_timeout_seconds=_HEARTBEAT,
      shutdown_timeout_seconds=_END,
  )
  _joined = True


def leave(status: int) -> NoReturn:
  """Ends this process alone, after an error that the others do not know of.

  They notice that it is gone. To shut down in order would be to wait for them, who wait for
  this process.
  """
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)


def ends_alone(error: BaseException) -> bool:
  """Whether an error ends this process while others go on."""
  return _joined and not is_shared(error)


def is_loss(error: BaseException) -> bool:
  """Whether an error means that another process cannot be reached any more."""
  return ends_alone(error) and _LOSS.search(str(error)) is not None


def prints(error: BaseException) -> bool:
  """Whether this process is to show an error: the main one if all have the same."""
  return ends_alone(error) or not _joined or is_main()


def name() -> str:
  """What messages of one of several processes begin with."""
  return f'process {jax.process_index()} of {jax.process_count()}: ' if _joined else ''


def several() -> bool:
  """Whether there are other processes that have to be told."""
  return jax.process_count() > 1 and not _alone


def is_main() -> bool:
  """Whether this is the process that writes and prints."""
  return jax.process_index() == 0


def from_main(compute: Callable[[], Value]) -> Value:
  """What `compute` returns, or raises, in the main process; the others do not call it.

  Args:
    compute: what it returns has to be small, and of a kind that can be pickled; the pickle
      comes from the same program and goes through no file.
  """
  if not several():
    return compute()
  outcome: tuple[Any, Exception | None] = None, None
  if is_main():
    global _alone
    _alone = True
    try:
      outcome = compute(), None
    except Exception as error:
      outcome = None, shared(error)
    finally:
      _alone = False
  value, error = pickle.loads(_sent(_pickled(outcome) if is_main() else b''))
  if is_main():
    value, error = outcome
  if error is not None:
    raise shared(error)
  return value


def broadcast(array: np.ndarray | None, shape: Sequence[int], dtype: Any) -> np.ndarray:
  """The main process's array in every process, to the bit.

  Args:
    array: the array; of no account in the other processes.
    shape: its shape.
    dtype: its type.
  """
  if not several():
    return array
  if 0 in shape:
    return np.zeros(shape, dtype)
  size = int(np.prod(shape)) * np.dtype(dtype).itemsize
  # As bytes, for they are added up to be sent, and -0.0 + 0.0 is another number.
  own = np.zeros(size, np.uint8)
  if is_main():
    own = np.ascontiguousarray(array, dtype).reshape(-1).view(np.uint8)
  sent = np.asarray(multihost_utils.broadcast_one_to_all(own))
  return sent.view(dtype).reshape(shape)


def gathered(items: list[Any]) -> list[Any]:
  """The items of all processes, in the order of the processes; every process must call it.

  Args:
    items: of this process, as JSON holds them. Floats stay the same to the bit.
  """
  if not several():
    return items
  own = np.frombuffer(json.dumps(items).encode(), np.uint8)
  lengths = multihost_utils.process_allgather(np.array([len(own)])).ravel()
  # All processes must bring arrays of one shape.
  padded = np.zeros(_rounded(lengths.max()), np.uint8)
  padded[: len(own)] = own
  rows = multihost_utils.process_allgather(padded)
  parts = [json.loads(row[:n].tobytes()) for row, n in zip(rows, lengths, strict=True)]
  return [item for part in parts for item in part]


def check_same(values: Mapping[str, Any], what: str) -> None:
  """Raises ValueError in every process unless all of them have the same values.

  Args:
    values: what has to be the same, as JSON holds it.
    what: how the message names them.
  """
  if not several():
    return
  main, *others = gathered([values])
  for index, other in enumerate(others, start=1):
    different = [
        f'{name}: {main.get(name)!r} in process 0, {other.get(name)!r} in process {index}'
        for name in dict.fromkeys([*main, *other])
        if main.get(name) != other.get(name)
    ]
    if different:
      raise shared(ValueError(
          f'The processes of this run differ in {what}:\n  '
          + '\n  '.join(different)
          + '\nStart all of them by the same command, but for --process_index, with the same '
          'files.'
      ))


class AnyProcess:
  """Tells all processes at the same call that one of them has said yes.

  With several processes an answer is to what was said one call before, so that none has to
  wait for it: it travels while the devices compute.
  """

  def __init__(self):
    self._before: Array | None = None

  def __call__(self, yes: bool) -> bool:
    if not several():
      return yes
    said = jax.make_array_from_process_local_data(
        NamedSharding(_all_devices(), PartitionSpec('device')),
        np.full(jax.local_device_count(), yes, np.int32),
    )
    before, self._before = self._before, _largest(said)
    return before is not None and bool(np.asarray(before))


def shared(error: Exception) -> Exception:
  """The error, marked as one that every process raises."""
  error.is_shared = True
  return error


def is_shared(error: BaseException | None) -> bool:
  """Whether an error, or what it was raised from, is one that every process raises."""
  return error is not None and (getattr(error, 'is_shared', False) or is_shared(error.__cause__))


def _sent(data: bytes) -> bytes:
  """The main process's bytes in every process."""
  (size,) = multihost_utils.broadcast_one_to_all(np.array([len(data)]))
  padded = np.zeros(_rounded(size), np.uint8)
  padded[: len(data)] = np.frombuffer(data, np.uint8)
  return np.asarray(multihost_utils.broadcast_one_to_all(padded))[:size].tobytes()


def _pickled(outcome: tuple[Any, Exception | None]) -> bytes:
  try:
    data = pickle.dumps(outcome)
    pickle.loads(data)
    return data
  except Exception:
    _, error = outcome
    if error is None:
      raise
    return pickle.dumps((None, RuntimeError(f'{type(error).__name__}: {error}')))


def _rounded(size: int) -> int:
  """The power of two from `size` on: a program is compiled for each size."""
  return 1 << max(int(size) - 1, 0).bit_length()


@functools.cache
def _all_devices() -> Mesh:
  return Mesh(np.array(jax.devices()), ('device',))


def _largest(x: Array) -> Array:
  return _largest_of(_all_devices())(x)


@functools.cache
def _largest_of(mesh: Mesh) -> Callable[[Array], Array]:
  return jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
