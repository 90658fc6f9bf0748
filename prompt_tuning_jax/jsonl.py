"""Reading jsonl files that a crash may have cut short."""

from __future__ import annotations

import json
import os


def read_jsonl(path: str) -> list[dict]:
  """The records of a jsonl file; a last line cut short by a crash is passed over.

  Raises:
    ValueError: if another line is not JSON, naming it.
  """
  records = []
  if os.path.exists(path):
    with open(path, encoding='utf-8') as file:
      lines = file.read().split('\n')
    for number, line in enumerate(lines):
      if not line.strip():
        continue
      try:
        records.append(json.loads(line))
      except json.JSONDecodeError as error:
        if any(rest.strip() for rest in lines[number + 1 :]):
          raise ValueError(f'{path}, line {number + 1}, is not JSON: {error}') from error
  return records
