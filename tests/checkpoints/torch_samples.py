"""PyTorch's `.bin` files, written instruction by instruction, without PyTorch."""

from __future__ import annotations

import math
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

STORAGES = {'float32': 'FloatStorage', 'bfloat16': 'BFloat16Storage', 'float16': 'HalfStorage'}


def text(value: str) -> bytes:
  """Pushes a text."""
  encoded = value.encode()
  return b'X' + struct.pack('<I', len(encoded)) + encoded


def number(value: int) -> bytes:
  """Pushes an int of 32 bits."""
  return b'J' + struct.pack('<i', value)


def name(module: str, attribute: str) -> bytes:
  """Pushes what a name stands for."""
  return f'c{module}\n{attribute}\n'.encode()


def numbers(values) -> bytes:
  """Pushes a tuple of ints."""
  return b'(' + b''.join(map(number, values)) + b't'


def tensor(
    key: str,
    dtype: str,
    shape,
    *,
    size: int,
    offset: int = 0,
    strides=None,
    storage: bytes | None = None,
) -> bytes:
  """Pushes a tensor, a view of the storage `key` of `size` elements."""
  if strides is None:
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
  if storage is None:
    storage = (
        b'(' + text('storage') + name('torch', STORAGES[dtype]) + text(key) + text('cpu')
        + number(size) + b'tQ'
    )
  return (
      name('torch._utils', '_rebuild_tensor_v2') + b'(' + storage + number(offset)
      + numbers(shape) + numbers(strides) + b'\x89' + name('collections', 'OrderedDict')
      + b')RtR'
  )


def dictionary(items: Mapping[str, bytes], ordered: bool = False) -> bytes:
  """A pickle of a dictionary, its values given as instructions."""
  start = name('collections', 'OrderedDict') + b')R' if ordered else b'}'
  content = b''.join(text(key) + value for key, value in items.items())
  return b'\x80\x02' + start + b'(' + content + b'u.'


def write_archive(path: Path, data: bytes, storages: Mapping[str, bytes], **kwargs) -> Path:
  """The zip layout."""
  with zipfile.ZipFile(path, 'w', **kwargs) as archive:
    archive.writestr('archive/data.pkl', data)
    archive.writestr('archive/byteorder', 'little')
    for key, content in storages.items():
      archive.writestr(f'archive/data/{key}', content)
  return path


def write_stream(path: Path, data: bytes, storages: Mapping[str, np.ndarray]) -> Path:
  """The layout before PyTorch 1.6."""
  system = {'protocol_version': 1001, 'little_endian': True, 'type_sizes': {'int': 4}}
  pickles = [0x1950A86A20F9469CFC6C, 1001, system]
  content = b''.join(pickle.dumps(part, protocol=2) for part in pickles)
  content += data + pickle.dumps(list(storages), protocol=2)
  for array in storages.values():
    content += struct.pack('<q', array.size) + array.tobytes()
  path.write_bytes(content)
  return path


def write(path: Path, arrays: Mapping[str, np.ndarray], layout: str = 'archive') -> Path:
  """A file of tensors, each with a storage of its own."""
  items, storages = {}, {}
  for index, (key, array) in enumerate(arrays.items()):
    items[key] = tensor(str(index), array.dtype.name, array.shape, size=array.size)
    storages[str(index)] = array
  data = dictionary(items, ordered=True)
  if layout == 'stream':
    return write_stream(path, data, storages)
  return write_archive(path, data, {key: a.tobytes() for key, a in storages.items()})
