"""Reading and writing jsonl files, which a crash may cut short."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


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


def write_jsonl(path: str, records: Iterable[Mapping[str, Any]]) -> None:
  """Writes the file as a whole or not at all."""
  with open(path + '.tmp', 'w', encoding='utf-8') as file:
    for record in records:
      file.write(json.dumps(record, ensure_ascii=False) + '\n')
  os.replace(path + '.tmp', path)
