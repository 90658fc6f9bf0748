"""Writing the functions of a task into a file, and finding them again safely.

A cached task names its metrics and its postprocessor as
`{'function': 'module:name', 'kwargs': {...}}`. A file may come from anywhere, so
reading one only ever looks up plain functions of this library: nothing that a
file names is imported unless it stands in `TRUSTED_PACKAGES`.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
from collections.abc import Callable, Sequence
from typing import Any

TRUSTED_PACKAGES = ('prompt_tuning_jax.evaluation', 'prompt_tuning_jax.tasks')


def describe(function: Callable[..., Any] | None) -> dict[str, Any] | None:
  """Describes a function or a `functools.partial` of one as plain data.

  Args:
    function: what to describe; keyword arguments of partials are kept when JSON
      holds them exactly, tuples and other sequences as lists.

  Returns:
    `{'function': 'module:name', 'kwargs': {...}}`, with a further entry `problem`
    saying why where the function cannot be found again from that; None for None.
  """
  if function is None:
    return None
  kwargs: dict[str, Any] = {}
  problem = None
  while isinstance(function, functools.partial):
    if function.args:
      problem = 'it is a partial with positional arguments; use keyword arguments'
    kwargs = {**function.keywords, **kwargs}
    function = function.func
  name = getattr(function, '__qualname__', type(function).__qualname__)
  module = getattr(function, '__module__', None) or type(function).__module__
  if not inspect.isfunction(function) or not name.isidentifier():
    problem = 'it is not a function at the top level of its module'
  kwargs = {key: _listed(value) for key, value in kwargs.items()}
  try:
    exact = json.loads(json.dumps(kwargs)) == kwargs
  except (TypeError, ValueError):
    exact = False
  if not exact:
    problem = f'JSON cannot hold its arguments {sorted(kwargs)}'
    kwargs = {}
  description = {'function': f'{module}:{name}', 'kwargs': kwargs}
  return description | {'problem': problem} if problem else description


def _listed(value: Any) -> Any:
  if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
    return [_listed(item) for item in value]
  return value


def is_trusted(description: dict[str, Any]) -> bool:
  """Whether `resolve` may look the described function up."""
  module = description['function'].partition(':')[0]
  inside = any(module == p or module.startswith(p + '.') for p in TRUSTED_PACKAGES)
  return inside and 'problem' not in description


def resolve(description: dict[str, Any]) -> Callable[..., Any]:
  """The function that `describe` described.

  Raises:
    ValueError: if the description names anything but a function defined at the top
      level of a module of `TRUSTED_PACKAGES`.
  """
  name = description['function']
  module_name, _, function_name = name.partition(':')
  if not is_trusted(description):
    raise ValueError(
        f'{name} is named by a cached task but is not a function of '
        f'{" or ".join(TRUSTED_PACKAGES)}; other code is never imported because a '
        'file asks for it. Name the seqio module that registers the task '
        '(MIXTURE_OR_TASK_MODULE), and install seqio, to use it.'
    )
  try:
    function = getattr(importlib.import_module(module_name), function_name, None)
  except ModuleNotFoundError as error:
    raise ValueError(f'Cannot import {module_name} to find {name}: {error}') from error
  if not inspect.isfunction(function) or function.__module__ != module_name:
    raise ValueError(
        f'{module_name} has no function {function_name!r}, which a cached task names. '
        'The cache was written by another version of the library: delete it and '
        'tokenise the task again.'
    )
  kwargs = description.get('kwargs') or {}
  return functools.partial(function, **kwargs) if kwargs else function
