"""Reading PyTorch's `.bin` files, without PyTorch and without running what is in them.

Such a file is a Python pickle, and a pickle is a program. Here an interpreter of its own
knows the few instructions that build tensors, dictionaries and plain values, and refuses
all others; nothing that a file names is imported or called. Both layouts are read: the zip
archive of PyTorch 1.6 and later, and the older single stream.
"""

from __future__ import annotations

import dataclasses
import enum
import io
import math
import os
import pickletools
import zipfile
from typing import Any, BinaryIO

import jax
import ml_dtypes
import numpy as np

from prompt_tuning_jax.checkpoints.source import Box, Weights

_DTYPES = {
    'DoubleStorage': np.dtype(np.float64),
    'FloatStorage': np.dtype(np.float32),
    'HalfStorage': np.dtype(np.float16),
    'BFloat16Storage': np.dtype(ml_dtypes.bfloat16),
}

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001


# What zipfile, pickle and our own steps raise on bytes that are not what they should be.
_DAMAGE = (
    zipfile.BadZipFile,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


class _Refused(Exception):
  """The pickle asks for something that building tensors does not need."""


@dataclasses.dataclass(frozen=True)
class _Storage:
  """The numbers of one or several tensors, not read yet."""

  key: str
  dtype: np.dtype
  size: int


@dataclasses.dataclass(frozen=True)
class _Tensor:
  """A view of a storage; offset and strides in elements."""

  storage: _Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


def open_torch(path: str | os.PathLike[str]) -> Weights:
  """Opens a `.bin` file that holds a dictionary of tensors; they are read on demand.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if it is cut off or damaged, holds anything but tensors by name, or its
      pickle has an instruction that building those does not need. Nothing is executed.
  """
  path = os.fspath(path)
  if not os.path.isfile(path):
    raise FileNotFoundError(f'No file {path}. Fetch or copy the checkpoint again.')
  try:
    if _begins_as_archive(path):
      tensors, read_storage = _open_archive(path)
    else:
      tensors, read_storage = _open_stream(path)
  except _Refused as error:
    raise ValueError(
        f'{path} is refused, and nothing in it was executed: {error}. Weights need no such '
        'thing. Use a safetensors version of the model.'
    ) from error
  except _DAMAGE as error:
    raise _damaged(path, error) from error

  specs = {
      name: jax.ShapeDtypeStruct(tensor.shape, tensor.storage.dtype)
      for name, tensor in tensors.items()
  }

  def read(name: str, box: Box) -> np.ndarray:
    tensor = tensors[name]
    itemsize = tensor.storage.dtype.itemsize
    try:
      content = read_storage(tensor.storage)
      _check_bytes(tensor.storage, len(content))
      # Unlike as_strided, this refuses what reaches beyond the buffer.
      return np.ndarray(
          tensor.shape,
          tensor.storage.dtype,
          content,
          tensor.offset * itemsize,
          [stride * itemsize for stride in tensor.strides],
      )[box]
    except _DAMAGE as error:
      raise _damaged(path, error) from error

  places = {
      name: (tensor.storage.key, tensor.offset, tuple(tensor.shape), tuple(tensor.strides))
      for name, tensor in tensors.items()
  }
  return Weights(specs, read, places)


def _damaged(path: str, error: Exception) -> ValueError:
  return ValueError(
      f'{path} is not a whole file of PyTorch weights ({error}); it has '
      f'{os.path.getsize(path):,} bytes. It was probably cut off or changed while it was '
      'copied: fetch or copy it again.'
  )


def _begins_as_archive(path: str) -> bool:
  # As PyTorch itself tells the two. zipfile.is_zipfile looks at the end of a file, and so
  # takes an archive that was cut off for a pickle.
  with open(path, 'rb') as file:
    return file.read(4) == b'PK\x03\x04'


def _open_archive(path: str):
  """The zip layout: data.pkl, and each storage as an entry that is not compressed."""
  archive = zipfile.ZipFile(path)
  entries = {entry.filename: entry for entry in archive.infolist()}
  roots = [name.removesuffix('data.pkl') for name in entries if name.endswith('/data.pkl')]
  if len(roots) != 1:
    raise zipfile.BadZipFile(f'it has {len(roots)} entries data.pkl')
  root = roots[0]
  compressed = [
      entry.filename
      for entry in entries.values()
      if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size
  ]
  if compressed:
    raise _Refused(f'its entry {compressed[0]!r} is compressed, as PyTorch never writes it')
  if f'{root}byteorder' in entries and archive.read(f'{root}byteorder') != b'little':
    raise _Refused('its numbers are big-endian')
  tensors = _checked(_unpickle(io.BytesIO(archive.read(f'{root}data.pkl'))))
  for tensor in tensors.values():
    entry = entries[f'{root}data/{tensor.storage.key}']
    _check_bytes(tensor.storage, entry.file_size)

  def read_storage(storage: _Storage) -> bytes:
    # zipfile compares the entry's checksum.
    return archive.read(f'{root}data/{storage.key}')

  return tensors, read_storage


def _open_stream(path: str):
  """The older layout: five pickles, then for each storage its size and its numbers."""
  with open(path, 'rb') as file:
    if _unpickle(file) != _LEGACY_MAGIC or _unpickle(file) != _LEGACY_PROTOCOL:
      raise ValueError("neither a zip archive nor PyTorch's older layout")
    system = _unpickle(file)
    if not isinstance(system, dict) or not system.get('little_endian', True):
      raise _Refused('its numbers are big-endian')
    tensors = _checked(_unpickle(file))
    keys = _unpickle(file)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
      raise _Refused('its list of storages is none')
    position = file.tell()
    sizes = {t.storage.key: t.storage.dtype.itemsize for t in tensors.values()}
    places = {}
    for key in keys:
      file.seek(position)
      count = int.from_bytes(file.read(8), 'little')
      places[key] = position + 8, count * sizes[key]
      position += 8 + count * sizes[key]
  if position > os.path.getsize(path):
    raise EOFError(f'{position:,} bytes were expected')
  for tensor in tensors.values():
    _check_bytes(tensor.storage, places[tensor.storage.key][1])

  def read_storage(storage: _Storage) -> bytes:
    start, size = places[storage.key]
    with open(path, 'rb') as file:
      file.seek(start)
      return file.read(size)

  return tensors, read_storage


def _check_bytes(storage: _Storage, held: int) -> None:
  expected = storage.size * storage.dtype.itemsize
  if held != expected:
    raise EOFError(f'storage {storage.key} has {held:,} bytes instead of {expected:,}')


def _unpickle(file: BinaryIO) -> Any:
  """The value of one pickle of a file, computed by the few instructions below.

  Every other instruction is refused, and so is every name but those of `_NAMES`, which
  stand for marks of this module. Python's own unpickler is not involved: it would write
  attributes, hash whatever is a key, and make room for as much as a number says.
  """
  stack: list[Any] = []
  marks: list[int] = []
  memo: dict[int, Any] = {}

  def pop_to_mark() -> list[Any]:
    start = marks.pop()
    values = stack[start:]
    del stack[start:]
    return values

  for instruction, argument, _ in pickletools.genops(file):
    name = instruction.name
    if name in _PUSHES_ARGUMENT:
      stack.append(argument)
    elif name in _CONSTANTS:
      stack.append(_CONSTANTS[name])
    elif name in ('EMPTY_DICT', 'EMPTY_LIST'):
      stack.append({} if name == 'EMPTY_DICT' else [])
    elif name == 'MARK':
      marks.append(len(stack))
    elif name == 'TUPLE':
      stack.append(_tuple(pop_to_mark()))
    elif name in _TUPLE_SIZES:
      size = _TUPLE_SIZES[name]
      values = [stack.pop() for _ in range(size)][::-1]
      stack.append(_tuple(values))
    elif name in ('SETITEM', 'SETITEMS'):
      values = pop_to_mark() if name == 'SETITEMS' else [stack.pop() for _ in range(2)][::-1]
      _fill(stack[-1], values)
    elif name in ('APPEND', 'APPENDS'):
      values = pop_to_mark() if name == 'APPENDS' else [stack.pop()]
      _extend(stack[-1], values)
    elif name in ('BINPUT', 'LONG_BINPUT', 'MEMOIZE'):
      memo[len(memo) if argument is None else argument] = stack[-1]
    elif name in ('BINGET', 'LONG_BINGET'):
      stack.append(memo[argument])
    elif name == 'GLOBAL':
      stack.append(_named(argument))
    elif name == 'STACK_GLOBAL':
      attribute, module = stack.pop(), stack.pop()
      stack.append(_named(f'{module} {attribute}' if isinstance(module, str) else ''))
    elif name == 'BINPERSID':
      stack.append(_storage(stack.pop()))
    elif name == 'REDUCE':
      arguments, function = stack.pop(), stack.pop()
      stack.append(_call(function, arguments))
    elif name == 'BUILD':
      stack.pop()  # `_metadata` of a state dict; it is not needed.
    elif name == 'STOP':
      return stack.pop()
    elif name not in ('PROTO', 'FRAME'):
      raise _Refused(f'its pickle has the instruction {name}')
  raise EOFError('its pickle does not end')


_PUSHES_ARGUMENT = (
    'BININT', 'BININT1', 'BININT2', 'LONG1', 'BINFLOAT', 'BINUNICODE', 'SHORT_BINUNICODE'
)
_CONSTANTS = {'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False, 'EMPTY_TUPLE': ()}
_TUPLE_SIZES = {'TUPLE1': 1, 'TUPLE2': 2, 'TUPLE3': 3}


class _Mark(enum.Enum):
  """What the names in a pickle stand for here."""

  ORDERED_DICT = 'collections OrderedDict'
  TENSOR = 'torch._utils _rebuild_tensor_v2'
  PARAMETER = 'torch._utils _rebuild_parameter'


def _named(name: str) -> _Mark | np.dtype:
  """The mark or the type of numbers that `module attribute` stands for."""
  module, _, attribute = name.partition(' ')
  if module == 'torch' and attribute in _DTYPES:
    return _DTYPES[attribute]
  try:
    return _Mark(name)
  except ValueError:
    raise _Refused(f'its pickle asks for {_short(name.replace(" ", "."))}') from None


def _tuple(values: list[Any]) -> tuple[Any, ...]:
  # Shapes, and a storage's description, are the deepest there is.
  if any(isinstance(v, tuple) and any(isinstance(w, tuple) for w in v) for v in values):
    raise _Refused('its pickle nests tuples deeper than tensors do')
  return tuple(values)


def _fill(target: Any, values: list[Any]) -> None:
  keys = values[::2]
  if not isinstance(target, dict) or len(values) % 2 or not all(
      isinstance(key, (str, int)) for key in keys
  ):
    raise _Refused('its pickle builds a dictionary whose keys are not texts')
  target.update(zip(keys, values[1::2], strict=True))


def _extend(target: Any, values: list[Any]) -> None:
  if not isinstance(target, list):
    raise _Refused('its pickle appends to what is no list')
  target.extend(values)


def _storage(identity: Any) -> _Storage:
  if not isinstance(identity, tuple) or len(identity) < 5 or identity[0] != 'storage':
    raise _Refused('its pickle refers to something that is no storage')
  _, dtype, key, _, size, *_ = identity
  if not isinstance(dtype, np.dtype) or not isinstance(key, str) or not _is_count(size):
    raise _Refused('its pickle refers to a storage of an unknown kind')
  return _Storage(key, dtype, size)


def _call(function: Any, arguments: Any) -> Any:
  if isinstance(arguments, tuple):
    if function is _Mark.ORDERED_DICT and not arguments:
      return {}
    if function is _Mark.PARAMETER and arguments:
      return arguments[0]
    if function is _Mark.TENSOR and len(arguments) >= 4:
      return _Tensor(*arguments[:4])
  raise _Refused('its pickle calls something that builds no tensor')


def _is_count(value: Any) -> bool:
  return type(value) is int and 0 <= value < 2**62


def _short(text: str) -> str:
  return text if len(text) <= 80 else text[:80] + '…'


def _checked(tensors: Any) -> dict[str, _Tensor]:
  """The tensors by name, once each is known to lie within its storage."""
  if not isinstance(tensors, dict):
    raise _Refused(f'it holds a {type(tensors).__name__} instead of tensors by name')
  for name, tensor in tensors.items():
    if not isinstance(name, str) or not isinstance(tensor, _Tensor):
      raise _Refused(f'its item {_short(str(name))!r} is not a tensor')
    if not isinstance(tensor.storage, _Storage):
      raise _Refused(f'its tensor {_short(name)!r} has no storage')
    shape, strides = tensor.shape, tensor.strides
    if (
        not isinstance(shape, tuple)
        or not isinstance(strides, tuple)
        or len(shape) != len(strides)
        or len(shape) > 8
        or not all(map(_is_count, (tensor.offset, *shape, *strides)))
    ):
      raise _Refused(f'its tensor {_short(name)!r} has a shape, strides or offset of no array')
    last = tensor.offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    count = math.prod(shape)
    # More elements than numbers would be one number seen many times, in a large copy.
    if count and (last >= tensor.storage.size or count > tensor.storage.size):
      raise _Refused(f'its tensor {_short(name)!r} reaches beyond its numbers')
  return tensors
