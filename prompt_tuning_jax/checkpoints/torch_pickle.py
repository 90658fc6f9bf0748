"""Reading PyTorch's `.bin` files, without PyTorch and without running what is in them.

Such a file is a Python pickle, and a pickle is a program. Here it is read as a list of
instructions first, and refused unless every one of them only builds tensors, dictionaries
and plain values; nothing that a file can name is imported or called. Both layouts are
read: the zip archive of PyTorch 1.6 and later, and the older single stream.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import math
import os
import pickle
import pickletools
import zipfile
from typing import Any, BinaryIO

import jax
import ml_dtypes
import numpy as np

from prompt_tuning_jax.checkpoints.source import Weights

_DTYPES = {
    'DoubleStorage': np.dtype(np.float64),
    'FloatStorage': np.dtype(np.float32),
    'HalfStorage': np.dtype(np.float16),
    'BFloat16Storage': np.dtype(ml_dtypes.bfloat16),
}

# Instructions that push values, build tuples, lists and dictionaries, and remember them;
# and the three that look up a name (GLOBAL, STACK_GLOBAL), call it (REDUCE), and set
# attributes of the result (BUILD, for OrderedDict's `_metadata`).
_ALLOWED = frozenset(
    'PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT '
    'BINUNICODE SHORT_BINUNICODE EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND '
    'APPENDS EMPTY_DICT SETITEM SETITEMS BINPUT LONG_BINPUT BINGET LONG_BINGET MEMOIZE '
    'BINPERSID GLOBAL STACK_GLOBAL REDUCE BUILD'.split()
)
_MEMO_INSTRUCTIONS = ('BINPUT', 'LONG_BINPUT')

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001


# What zipfile, pickle and our own steps raise on bytes that are not what they should be.
_DAMAGE = (
    zipfile.BadZipFile,
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    NotImplementedError,
    OSError,
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
    if zipfile.is_zipfile(path):
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

  def read(name: str) -> np.ndarray:
    tensor = tensors[name]
    try:
      flat = np.frombuffer(read_storage(tensor.storage), tensor.storage.dtype)
    except _DAMAGE as error:
      raise _damaged(path, error) from error
    return np.lib.stride_tricks.as_strided(
        flat[tensor.offset :],
        tensor.shape,
        [stride * flat.itemsize for stride in tensor.strides],
        writeable=False,
    )

  return Weights(specs, read)


def _damaged(path: str, error: Exception) -> ValueError:
  return ValueError(
      f'{path} is not a whole file of PyTorch weights ({error}); it has '
      f'{os.path.getsize(path):,} bytes. It was probably cut off or changed while it was '
      'copied: fetch or copy it again.'
  )


def _open_archive(path: str):
  """The zip layout: data.pkl, and each storage as an entry that is not compressed."""
  archive = zipfile.ZipFile(path)
  entries = {entry.filename: entry for entry in archive.infolist()}
  roots = [name.removesuffix('data.pkl') for name in entries if name.endswith('/data.pkl')]
  if len(roots) != 1:
    raise zipfile.BadZipFile(f'it has {len(roots)} entries data.pkl')
  root = roots[0]
  compressed = [e.filename for e in entries.values() if e.compress_type != zipfile.ZIP_STORED]
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
      raise pickle.UnpicklingError("neither a zip archive nor PyTorch's older layout")
    if not _unpickle(file).get('little_endian', True):
      raise _Refused('its numbers are big-endian')
    tensors = _checked(_unpickle(file))
    keys = _unpickle(file)
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
  """One pickle of a file, after every instruction of it was found harmless."""
  start = file.tell()
  for count, (instruction, argument, _) in enumerate(pickletools.genops(file)):
    if instruction.name not in _ALLOWED:
      raise _Refused(f'its pickle has the instruction {instruction.name}')
    # The unpickler makes room for as many values as the largest number says.
    if instruction.name in _MEMO_INSTRUCTIONS and argument > count:
      raise _Refused(f'its pickle remembers a value as number {argument:,}')
  file.seek(start)
  return _Unpickler(file).load()


class _Unpickler(pickle.Unpickler):
  """Builds descriptions of tensors; every name goes through `_meaning`."""

  def find_class(self, module: str, name: str) -> Any:
    return _meaning(module, name)

  def persistent_load(self, identity: Any) -> _Storage:
    kind, dtype, key, _, size, *_ = identity
    if kind != 'storage' or not isinstance(dtype, _Dtype) or not isinstance(key, str):
      raise _Refused(f'its pickle refers to {identity!r}')
    return _Storage(key, dtype.dtype, int(size))


class _Dtype:
  """What a pickle gets for the name of a storage class. It has no attributes to set."""

  __slots__ = ('dtype',)

  def __init__(self, dtype: np.dtype):
    self.dtype = dtype


class _RebuildTensor:
  """What a pickle gets for `torch._utils._rebuild_tensor_v2`."""

  __slots__ = ()

  def __call__(self, storage, offset, shape, strides, *_) -> _Tensor:
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


class _RebuildParameter:
  """What a pickle gets for `torch._utils._rebuild_parameter`: the tensor in it."""

  __slots__ = ()

  def __call__(self, tensor, *_) -> _Tensor:
    return tensor


def _meaning(module: str, name: str) -> Any:
  """What a pickle gets for a name; all other names are refused."""
  if (module, name) == ('collections', 'OrderedDict'):
    return collections.OrderedDict
  if (module, name) == ('torch._utils', '_rebuild_tensor_v2'):
    return _RebuildTensor()
  if (module, name) == ('torch._utils', '_rebuild_parameter'):
    return _RebuildParameter()
  if module == 'torch' and name in _DTYPES:
    return _Dtype(_DTYPES[name])
  raise _Refused(f'its pickle asks for {module}.{name}')


def _checked(tensors: Any) -> dict[str, _Tensor]:
  """The tensors by name, once each is known to lie within its storage."""
  if not isinstance(tensors, dict):
    raise _Refused(f'it holds a {type(tensors).__name__} instead of tensors by name')
  # A pickle may have given the dictionary attributes; its own methods are not asked.
  checked = dict(dict.items(tensors))
  for name, tensor in checked.items():
    if not isinstance(name, str) or not isinstance(tensor, _Tensor):
      raise _Refused(f'its item {name!r} is not a tensor')
    numbers = (tensor.offset, *tensor.shape, *tensor.strides)
    if not all(isinstance(n, int) and n >= 0 for n in numbers) or (
        len(tensor.shape) != len(tensor.strides)
    ):
      raise _Refused(f'its tensor {name!r} has the shape {tensor.shape!r}')
    last = tensor.offset + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides))
    if math.prod(tensor.shape) and last >= tensor.storage.size:
      raise _Refused(f'its tensor {name!r} reaches beyond its numbers')
  return checked
