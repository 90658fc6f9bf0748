"""What a run is, as plain JSON values, so that two runs can be told apart.

Optimisers, schedules and initialisers are functions that other functions made. What they
do lies in the variables they close over and the defaults of their arguments, so these are what is
described, and of a function of the user's own the constants in its body. Nothing described differs
between two identical runs: no addresses, no times.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import hashlib
import inspect
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import numpy as np

_Maker = TypeVar('_Maker', bound=Callable[..., Any])

# Fields that Flax adds to every module.
_FLAX_FIELDS = ('parent', 'name')
# Whose functions' bodies change with their versions alone, and not from run to run.
_LIBRARIES = ('flax', 'jax', 'numpy', 'optax', 'prompt_tuning_jax')


def keeps_arguments(make: _Maker) -> _Maker:
  """Decorates a maker of optimisers or schedules; they are described by its arguments.

  Without it they are described by what optax made of the arguments, which is longer and
  may change with its version.
  """
  signature = inspect.signature(make)

  @functools.wraps(make)
  def made(*args, **kwargs):
    value = make(*args, **kwargs)
    arguments = signature.bind(*args, **kwargs)
    arguments.apply_defaults()
    # An optimiser is a tuple of functions, of which `update` does the work.
    function = getattr(value, 'update', value)
    function.made_by = {make.__name__: dict(arguments.arguments)}
    return value

  return made


def describe(value: Any) -> Any:
  """A value as JSON holds it: numbers and texts as they are, functions by their variables."""
  return _describe(value, ())


def differences(before: Any, now: Any) -> list[str]:
  """A line for each place in which two descriptions differ."""
  old, new = dict(_leaves(before)), dict(_leaves(now))
  places = [*new, *(place for place in old if place not in new)]
  return [
      f'{".".join(place)}: {_shown(old, place)} there, {_shown(new, place)} here'
      for place in places
      if place not in old or place not in new or old[place] != new[place]
  ]


def _describe(value: Any, outer: tuple[Any, ...]) -> Any:
  if value is None or isinstance(value, (bool, int, float, str)):
    return value
  if any(value is other for other in outer):
    return '…'

  def inner(part: Any) -> Any:
    return _describe(part, (*outer, value))

  if hasattr(value, 'made_by'):
    return inner(value.made_by)
  if hasattr(value, '__array__') and not isinstance(value, type):
    return _array(np.asarray(value))
  if isinstance(value, Mapping):
    return {str(key): inner(part) for key, part in value.items()}
  if hasattr(value, 'fingerprint'):  # A backbone or a vocabulary.
    return {type(value).__name__: value.fingerprint}
  if isinstance(value, tuple) and hasattr(value, 'update'):  # An optax transformation.
    return inner(value.update)
  if isinstance(value, (list, tuple)):
    return [inner(part) for part in value]
  if isinstance(value, (type, enum.Enum, np.dtype)):
    return getattr(value, '__name__', str(value))
  if isinstance(value, functools.partial):
    return {_name(value.func): [inner(value.func), inner(value.args), inner(value.keywords)]}
  if callable(value) and hasattr(value, '__qualname__'):
    variables = {name: inner(part) for name, part in _variables(value).items()}
    return {_name(value): variables} if variables else _name(value)
  if dataclasses.is_dataclass(value):
    names = [f.name for f in dataclasses.fields(value) if f.name not in _FLAX_FIELDS]
    return {type(value).__name__: {name: inner(getattr(value, name)) for name in names}}
  return {type(value).__name__: inner(getattr(value, '__dict__', {}))}


def _array(array: np.ndarray) -> Any:
  if array.ndim == 0:
    return array.item()
  content = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
  return f'{array.dtype}{list(array.shape)} {content}'


def _name(function: Callable[..., Any]) -> str:
  return function.__qualname__.replace('.<locals>', '')


def _variables(function: Callable[..., Any]) -> dict[str, Any]:
  """What a function knows besides its arguments: closed-over variables, its object."""
  if inspect.ismethod(function):
    return dict(getattr(function.__self__, '__dict__', {}))
  function = inspect.unwrap(function)
  code = getattr(function, '__code__', None)
  names = getattr(code, 'co_freevars', ())
  cells = getattr(function, '__closure__', None) or ()
  variables = {}
  for name, cell in zip(names, cells):
    # A variable that the maker never set is not there to be read.
    with contextlib.suppress(ValueError):
      variables[name] = cell.cell_contents
  by_place = getattr(function, '__defaults__', None) or ()
  by_name = getattr(function, '__kwdefaults__', None) or {}
  if defaults := [*_literals(by_place), *_literals(by_name.values())]:
    variables['defaults'] = defaults
  library = (getattr(function, '__module__', None) or '').split('.')[0] in _LIBRARIES
  if code is not None and (not library or code.co_name == '<lambda>'):
    if constants := _constants(code, function):
      variables['constants'] = constants
  return variables


def _constants(code: types.CodeType, function: Callable[..., Any]) -> list[Any]:
  """The numbers and texts in a function's body, and in those of functions within it."""
  found = [value for value in _literals(code.co_consts) if value != function.__doc__]
  # A number of the module, such as a rate that several schedules share.
  known = [function.__globals__.get(name) for name in code.co_names]
  found += [value for value in _literals(known) if not isinstance(value, str)]
  for inner in code.co_consts:
    if isinstance(inner, types.CodeType):
      found += _constants(inner, function)
  return found


def _literals(values: Iterable[Any]) -> list[Any]:
  return [value for value in values if isinstance(value, (int, float, str))]


def _leaves(value: Any, place: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
  if isinstance(value, Mapping) and (value or not place):
    parts = value.items()
  elif isinstance(value, list) and value:
    parts = enumerate(value)
  else:
    return [(place, value)]
  return [leaf for key, part in parts for leaf in _leaves(part, (*place, str(key)))]


def _shown(leaves: Mapping[tuple[str, ...], Any], place: tuple[str, ...]) -> str:
  return repr(leaves[place]) if place in leaves else 'nothing'
