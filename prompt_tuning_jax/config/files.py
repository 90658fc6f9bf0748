"""Finding and reading gin files: the search path, includes, overlays.

The order of gin files matters only where two of them set the same name (the later one
wins): the defaults of a command, `runs/<command>.gin`, are read first whether a file
includes them or not; an include of a file that was read is passed over. A file whose
first line begins with `# overlay` is made to change what others say, so it is read after
all others that the user names, wherever it stands among them; several of them keep their
order. An include counts where it stands, of an overlay too: a file that includes one and
is to win over others opens with `# overlay` itself.

A gin file is code: it can import and call anything. Files are only read when they are
named by the user, by a file that the user named, or belong to this library; none is
ever taken from a downloaded model or prompt.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import logging
import re
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path

import gin

from prompt_tuning_jax.config.errors import ConfigError, what_is_wrong

# Includes become names with this prefix, which only the reader below can open.
_SCHEME = 'once:'
_INCLUDE = re.compile(r'^(\s*include\s+)([\'"])(.+?)\2', re.MULTILINE)
_OVERLAY = re.compile(r'#\s*overlay\b')
_MACRO = re.compile(r'^([A-Z][A-Z0-9_]*)\s*=\s*(.*?)\s*$')


def gin_folder() -> Path:
  """The library's gin files: `gin/` of a checkout, or those installed with it."""
  package = Path(__file__).resolve().parent.parent
  installed = package / 'gin_configs'
  return installed if installed.is_dir() else package.parent / 'gin'


def packaged_files(folder: str = '') -> list[str]:
  """Names of the library's gin files, such as 'recipes/demo.gin', sorted."""
  root = gin_folder()
  return sorted(
      path.relative_to(root).as_posix() for path in (root / folder).rglob('*.gin')
  )


def is_overlay(path: Path) -> bool:
  """Whether a file is to be read after those that are none."""
  with path.open(encoding='utf-8') as file:
    return bool(_OVERLAY.match(file.readline()))


class Reader:
  """Finds gin files and reads each of them once, includes resolved on the way.

  Attributes:
    read: every file that was read, in order.
    set_in: for each macro, where files set it ('demo.gin, line 3') and to what.
  """

  def __init__(self, search_paths: Sequence[str]):
    self.folders = [
        Path.cwd(),
        *(Path(path).expanduser() for path in search_paths),
        gin_folder(),
    ]
    for folder in self.folders[1:]:
      if not folder.is_dir():
        raise ConfigError(f'--gin_search_paths: {folder} is not a folder.')
    self.read: list[str] = []
    self.set_in: dict[str, list[tuple[str, str]]] = {}

  def parse_all(self, names: Sequence[str]) -> None:
    """Parses the files that the user names, overlays after the others."""
    for path in sorted(map(self.find, names), key=is_overlay):
      self.parse(path)

  def parse(self, path: Path) -> None:
    """Parses a file and those of its includes that were not read before.

    A file that was only included so far is read again, for the user may mean it to win;
    the defaults of the command, always the first, are not.
    """
    if str(path) in self.read[1:]:
      self.read.remove(str(path))
    try:
      gin.parse_config_file(_SCHEME + str(path))
    except tokenize.TokenError as error:
      # Python does not name a file that ends in the middle of a value.
      cut = next(filter(_is_cut, self.read), path)
      raise ConfigError(f'Cannot read {cut}: {what_is_wrong(error)}.') from error

  def find(self, name: str, within: Path | None = None) -> Path:
    """The file that is meant: as named, or without folder or ending.

    Args:
      name: what the user wrote, or an include in the file `within`. The library's own
        files include each other and never a file that happens to lie in the working
        folder: it would be code that nobody asked for.
    """
    folders = self.folders
    if within is not None:
      ours = within.is_relative_to(gin_folder())
      folders = [gin_folder()] if ours else [within.parent, *folders]
    names = [name] if name.endswith('.gin') else [name + '.gin', name]
    for folder in folders:
      for candidate in names:
        if (path := folder / Path(candidate).expanduser()).is_file():
          return path.resolve()
    if '/' not in name:
      for folder in self.folders[1:]:
        found = sorted(folder.glob(f'*/{names[0]}'))
        if len(found) > 1:
          raise ConfigError(
              f'{name!r} may be {" or ".join(map(str, found))}: name the folder too.'
          )
        if found:
          return found[0].resolve()
    raise ConfigError(self._not_found(name))

  def open(self, path: Path) -> io.StringIO:
    """A file's text for gin; nothing if it was read before in this parse."""
    text = ''
    if str(path) not in self.read:
      self.read.append(str(path))
      text = _INCLUDE.sub(
          lambda match: f'{match[1]}{match[2]}{_SCHEME}'
          f'{self.find(match[3], within=path)}{match[2]}',
          path.read_text(encoding='utf-8'),
      )
      for number, line in enumerate(text.splitlines(), start=1):
        if match := _MACRO.match(line):
          self.set_in.setdefault(match[1], []).append((f'{path}, line {number}', match[2]))
    stream = io.StringIO(text)
    stream.name = str(path)  # Gin names it in its messages.
    return stream

  def _not_found(self, name: str) -> str:
    known = {}
    for folder in self.folders[1:]:
      for path in folder.rglob('*.gin'):
        known.setdefault(path.relative_to(folder).as_posix(), path)
    # A name may be near with its folder, or by its last part alone.
    near = difflib.get_close_matches(name, known, n=3)
    stems = {Path(other).stem: other for other in known}
    near += [stems[s] for s in difflib.get_close_matches(Path(name).stem, stems, n=3)]
    hint = f' Did you mean {" or ".join(dict.fromkeys(near))}?' if near else ''
    recipes = ', '.join(Path(other).stem for other in known if other.startswith('recipes/'))
    return (
        f'No gin file {name!r}.{hint} Looked in {", ".join(map(str, self.folders))}. '
        f'Recipes: {recipes or "none"}.'
    )


def _is_cut(path: str) -> bool:
  """Whether Python's tokens of a file end in the middle of a value."""
  with open(path, encoding='utf-8') as file:
    try:
      list(tokenize.generate_tokens(file.readline))
    except tokenize.TokenError:
      return True
    except SyntaxError:
      pass
  return False


_reader: Reader | None = None


@contextlib.contextmanager
def reading(search_paths: Sequence[str]) -> Iterator[Reader]:
  """The reader that gin's includes go through for the length of one parse."""
  global _reader
  gin.config.register_file_reader(_open_once, lambda name: name.startswith(_SCHEME))
  _reader = Reader(search_paths)
  # Gin tries its own readers first, and they log what they cannot find as an error.
  logging.getLogger().addFilter(_not_about_includes)
  try:
    yield _reader
  finally:
    logging.getLogger().removeFilter(_not_about_includes)
    _reader = None


def _open_once(name: str) -> contextlib.AbstractContextManager[io.StringIO]:
  return contextlib.closing(_reader.open(Path(name.removeprefix(_SCHEME))))


def _not_about_includes(record: logging.LogRecord) -> bool:
  return _SCHEME not in record.getMessage()
