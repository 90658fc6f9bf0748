"""JSON and jsonl files, the latter of which a crash may cut short, and values as they hold them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from prompt_tuning_jax.writing import written_whole


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
  """The object in a JSON file.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if it is no JSON, or no object.
  """
  try:
    with open(path, encoding='utf-8') as file:
      content = json.load(file)
  except ValueError as error:
    raise ValueError(
        f'{path} is not JSON ({error}); it was probably cut off. Fetch it again.'
    ) from error
  if not isinstance(content, dict):
    raise ValueError(f'{path} is not a JSON object. Fetch it again.')
  return content


def write_json(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
  """Writes an object as a JSON file for people to read."""
  with open(path, 'w', encoding='utf-8') as file:
    json.dump(content, file, indent=2, ensure_ascii=False)
    file.write('\n')


def read_jsonl(
    path: str | os.PathLike[str], *, needs: Sequence[str] = ()
) -> list[dict[str, Any]]:
  """The records of a jsonl file; a last line cut short by a crash is passed over.

  Args:
    path: the file; one that does not exist holds nothing.
    needs: what every record has to hold, for example ['step'].

  Raises:
    ValueError: if another line is not JSON, or a record lacks what it needs; names the
      line.
  """
  records = []
  if os.path.exists(path):
    with open(path, encoding='utf-8') as file:
      lines = file.read().split('\n')
    for number, line in enumerate(lines):
      if not line.strip():
        continue
      where = f'{path}, line {number + 1},'
      try:
        record = json.loads(line)
      except json.JSONDecodeError as error:
        if any(rest.strip() for rest in lines[number + 1 :]):
          raise ValueError(f'{where} is not JSON: {error}') from error
        continue
      missing = [name for name in needs if not isinstance(record, dict) or name not in record]
      if missing:
        raise ValueError(
            f'{where} has no {" and no ".join(map(repr, missing))}: {line[:60]}. This '
            'library did not write it; delete the line.'
        )
      records.append(record)
  return records


def write_jsonl(path: str | os.PathLike[str], records: Iterable[Mapping[str, Any]]) -> None:
  """Writes the file as a whole or not at all.

  Raises:
    OSError: if it cannot be written; names the file.
  """
  with written_whole(path) as unfinished:
    with open(unfinished, 'w', encoding='utf-8') as file:
      for record in records:
        file.write(json.dumps(record, ensure_ascii=False) + '\n')


def as_json(value: Any) -> Any:
  """A value in JSON's own types: bytes as text, arrays as lists, keys as texts."""
  if isinstance(value, bytes):
    return value.decode('utf-8', errors='replace')
  if isinstance(value, Mapping):
    return {str(key): as_json(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [as_json(item) for item in value]
  if hasattr(value, '__array__'):  # numpy's and JAX's, arrays and numbers.
    return as_json(np.asarray(value).tolist())
  return value


def canonical_json(value: Mapping[str, Any]) -> str:
  """One text for equal values, to be summed; `value` must be in JSON's types (`as_json`)."""
  return json.dumps(value, sort_keys=True, ensure_ascii=False)
