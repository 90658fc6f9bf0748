"""Gin for the commands: T5X's flags and macros, the search path, the operative config.

The core of the library knows nothing of gin: `registry.py` names its functions, and
`macros.py` the macros. Files are found and read in `files.py`, flags and values are
checked in `bindings.py`; what is asked for here are the keyword arguments of a command's
function, built, ready to be passed.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

import gin

from prompt_tuning_jax.config import bindings as bindings_lib
from prompt_tuning_jax.config import errors, registry
from prompt_tuning_jax.config.errors import ConfigError
from prompt_tuning_jax.config.files import gin_folder, reading


@dataclasses.dataclass(frozen=True)
class Config:
  """A parsed configuration of one command; gin itself holds the bindings.

  Attributes:
    command: the command's name.
    files: every gin file that was read, in order.
    notes: what the user should know but need not change, for example a flag that
      nothing in this run reads.
  """

  command: str
  files: tuple[str, ...]
  notes: tuple[str, ...]

  def kwargs(self) -> dict[str, Any]:
    """Builds the keyword arguments of the command's function.

    Raises:
      ConfigError: if an argument without a default has no value.
      ValueError, OSError: whatever building the objects finds wrong.
    """
    target = registry.command_function(self.command)
    with errors.explained(errors.BUILDING):
      values = gin.get_configurable(self.command)()
    missing = [
        name
        for name, parameter in inspect.signature(target).parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind is not parameter.VAR_KEYWORD
        and name not in values
    ]
    if missing:
      raise ConfigError(
          f'{self.command} needs a value for {", ".join(missing)}. Set '
          + ', '.join(f'--gin.{self.command}.{name}=…' for name in missing)
          + f', or use the defaults of runs/{self.command}.gin.'
      )
    return values

  def operative(self) -> str:
    """All values that counted so far, as a gin file that sets them again."""
    return gin.operative_config_str(max_line_length=90)

  def operative_values(self) -> dict[str, str]:
    """The same, each value as a text by what it is set to."""
    lines = gin.operative_config_str(max_line_length=10**6).splitlines()
    return dict(line.split(' = ', 1) for line in lines if ' = ' in line and line[0] != '#')

  def full(self) -> str:
    """All values of all files and flags, whether used or not, as a gin file."""
    return gin.config_str(max_line_length=90)


def parse(
    command: str,
    files: Sequence[str] = (),
    bindings: Sequence[str] = (),
    search_paths: Sequence[str] = (),
) -> Config:
  """Reads the defaults of a command, then gin files, then bindings from flags.

  Any earlier configuration of this process is dropped first.

  Args:
    command: name of a command that gin configures, such as 'train'.
    files: gin files or recipes; folder and ending may be left out ('demo'). Overlays
      are read after the others (`files.py`).
    bindings: 'NAME=VALUE' or 'scope/function.parameter=VALUE'.
    search_paths: folders in which files are looked for as well.

  Raises:
    ConfigError: on an unknown file, name or macro, a value that cannot be read or that
      its macro cannot have, or a macro that the command needs and nothing sets.
  """
  if command not in registry.commands():
    raise ConfigError(
        f'No command {command!r}.{errors.did_you_mean(command, registry.commands())}'
    )
  gin.clear_config()
  registry.register()
  with (
      reading(search_paths) as reader,
      errors.explained(errors.READING),
  ):
    reader.parse(gin_folder() / 'runs' / f'{command}.gin')
    reader.parse_all(files)
    in_files = bindings_lib.macros_that_are_set()
    flags = [bindings_lib.parse_flag(binding) for binding in bindings]
  reached = bindings_lib.reached_by(command)
  bindings_lib.check_names(flags, in_files, reached)
  bindings_lib.check_values(flags, reader.set_in)
  bindings_lib.check_missing(command, reached)
  notes = bindings_lib.without_effect(flags, reached)
  return Config(command, tuple(reader.read), tuple(notes))
