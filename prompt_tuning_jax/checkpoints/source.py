"""What every checkpoint reader returns: a configuration and lazily read arrays.

All readers speak one language: T5X's parameter names (`encoder/layers_0/...`),
kernels [in, out]. Nothing is read from disk before it is asked for, array by
array, so that a model is never held twice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from types import EllipsisType
from typing import TYPE_CHECKING, Any

import jax
import ml_dtypes
import numpy as np
import safetensors

from prompt_tuning_jax.typing import Array

if TYPE_CHECKING:
  from prompt_tuning_jax.backbones.t5 import T5Config

# Stored types that hold weights. float16 is safe to store, though not to compute in.
_STORED_DTYPES = {
    'F64': np.dtype(np.float64),
    'F32': np.dtype(np.float32),
    'F16': np.dtype(np.float16),
    'BF16': np.dtype(ml_dtypes.bfloat16),
}
_STORED_NAMES = {dtype: name for name, dtype in _STORED_DTYPES.items()}


# What reading raises where a description has other types or sizes than it should.
_MISREAD = (
    ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError
)


@contextlib.contextmanager
def damage_named(path: str | os.PathLike[str]) -> Iterator[None]:
  """Whatever a file's content makes a reader trip over becomes a ValueError that names it."""
  try:
    yield
  except _MISREAD as error:
    raise ValueError(
        f'{os.fspath(path)} is damaged, or not what it says it is: a value in it is of '
        f'another kind than was expected ({type(error).__name__}: {str(error)[:200]}). Fetch '
        'or copy it again.'
    ) from error


# A part of an array: a slice of each axis. `...` is all of it.
Box = tuple[slice, ...] | EllipsisType


class Weights(Mapping[str, np.ndarray]):
  """Arrays by name, each read from disk when it is asked for (and not kept).

  Attributes:
    specs: shape and stored type of each array, known without reading it.
    places: where an array is stored, if known; names with equal ones have the same numbers.
  """

  def __init__(
      self,
      specs: Mapping[str, jax.ShapeDtypeStruct],
      read: Callable[[str, Box], np.ndarray],
      places: Mapping[str, Hashable] | None = None,
  ):
    """Names arrays; none is read yet.

    Args:
      specs: shape and stored type of each.
      read: gives what lies in a box of a named array; it may read more than that.
      places: where each is stored, for formats in which names may share their numbers.
    """
    self.specs = dict(specs)
    self.places = dict(places or {})
    self._read = read

  @classmethod
  def of(cls, arrays: Mapping[str, np.ndarray | Array]) -> Weights:
    """Arrays that are in memory already."""
    specs = {
        name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in arrays.items()
    }
    return cls(specs, lambda name, box: arrays[name][box])

  def only(self, names: Iterable[str]) -> Weights:
    """Those of these names, in this order."""
    return Weights({name: self.specs[name] for name in names}, self._read)

  def __getitem__(self, name: str) -> np.ndarray:
    return self.part(name, ...)

  def part(self, name: str, box: Box) -> np.ndarray:
    """What lies in a box of an array; no more is read, where the format allows that."""
    if name not in self.specs:
      raise KeyError(name)
    return self._read(name, box)

  def __iter__(self) -> Iterator[str]:
    return iter(self.specs)

  def __len__(self) -> int:
    return len(self.specs)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """A backbone on disk, in any format.

  Attributes:
    format: `native`, `hf`, `t5x` or `orbax`.
    path: the directory.
    config: the architecture.
    weights: the arrays under their T5X names.
    prompts: prompts that lay in the checkpoint beside the model, by T5X name.
    step: training step of the checkpoint, where the format records it.
    fingerprint: recorded content hash, '' where the format records none.
    manifest: whatever else the format records.
  """

  format: str
  path: str
  config: T5Config
  weights: Weights
  prompts: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
  step: int | None = None
  fingerprint: str = ''
  manifest: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def open_safetensors(path: str | os.PathLike[str]) -> tuple[Weights, dict[str, str]]:
  """Opens a safetensors file.

  Returns:
    Its arrays, and the text metadata of its header.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if it is truncated, has a malformed header, or holds a type that
      is not a floating-point type.
  """
  path = os.fspath(path)
  if not os.path.isfile(path):
    raise FileNotFoundError(f'No file {path}. Fetch or copy the checkpoint again.')
  try:
    file = safetensors.safe_open(path, framework='numpy')
    headers = {name: file.get_slice(name) for name in file.keys()}
    metadata = file.metadata() or {}
  except (safetensors.SafetensorError, OSError) as error:
    raise ValueError(
        f'{path} is not a whole safetensors file ({error}); it has '
        f'{os.path.getsize(path):,} bytes. It was probably cut off while it was copied: '
        'fetch or copy it again.'
    ) from error
  specs = {}
  for name, header in headers.items():
    if header.get_dtype() not in _STORED_DTYPES:
      raise ValueError(
          f'{path}: {name} is stored as {header.get_dtype()}, but weights are read '
          f'from {", ".join(_STORED_DTYPES)} only. Use a copy of the model that is not '
          'quantised.'
      )
    specs[name] = jax.ShapeDtypeStruct(
        tuple(header.get_shape()), _STORED_DTYPES[header.get_dtype()]
    )

  def read(name: str, box: Box) -> np.ndarray:
    shape = specs[name].shape
    if box is ... or len(box) > len(shape) or 0 in shape:
      return file.get_tensor(name)[box]
    # Unlike numpy, safetensors does not stop at the end of an axis.
    return file.get_slice(name)[
        tuple(slice(*part.indices(size)) for part, size in zip(box, shape))
    ]

  return Weights(specs, read), metadata


def cast(weights: Weights, dtype: np.typing.DTypeLike | None) -> Weights:
  """The same weights in another floating-point type, each cast when it is read.

  None keeps every array's own type.
  """
  if dtype is None:
    return weights
  dtype = np.dtype(dtype)
  specs = {
      name: jax.ShapeDtypeStruct(spec.shape, dtype) for name, spec in weights.specs.items()
  }
  return Weights(
      specs, lambda name, box: weights.part(name, box).astype(dtype, copy=False)
  )


def write_safetensors(
    path: str | os.PathLike[str], weights: Weights, metadata: Mapping[str, str] | None = None
) -> None:
  """Writes weights as one safetensors file, reading and holding one array at a time.

  The safetensors package writes arrays that are in memory together; a model may not fit.
  """
  header: dict[str, Any] = {'__metadata__': dict(metadata)} if metadata else {}
  end = 0
  for name, spec in weights.specs.items():
    start, end = end, end + math.prod(spec.shape) * spec.dtype.itemsize
    header[name] = {
        'dtype': _STORED_NAMES[spec.dtype],
        'shape': list(spec.shape),
        'data_offsets': [start, end],
    }
  encoded = json.dumps(header, separators=(',', ':')).encode()
  encoded += b' ' * (-len(encoded) % 8)  # The numbers start on a multiple of 8 bytes.
  with open(path, 'wb') as file:
    file.write(len(encoded).to_bytes(8, 'little'))
    file.write(encoded)
    for name, spec in weights.specs.items():
      array = np.ascontiguousarray(weights[name])
      if (array.shape, array.dtype) != (spec.shape, spec.dtype):
        raise ValueError(f'{name} is {array.dtype} {array.shape}, not as announced {spec}.')
      file.write(array.reshape(-1).view(np.uint8))


def fingerprint(weights: Mapping[str, np.ndarray | Array]) -> str:
  """Content hash of a backbone that does not depend on the format it came from.

  sha256 over a line for each array, in the order of their T5X names: name, shape, and the
  sha256 of its values as little-endian float32. All weights are read, one array at a time;
  that an array's sum stands for it leaves it open to sum several at once, or while they
  are loaded. Models that differ by rounding (a bfloat16 copy) differ in fingerprint.

  Args:
    weights: arrays under their per-layer T5X names.
  """
  lines = []
  for name in weights:  # In the order in which they are quickest to read.
    array = np.ascontiguousarray(np.asarray(weights[name]), dtype='<f4')
    content = hashlib.sha256(array.reshape(-1).view(np.uint8)).hexdigest()
    lines.append(f'{name} {list(array.shape)} {content}\n')
  return hashlib.sha256(''.join(sorted(lines)).encode()).hexdigest()
