"""What stands before every target of a task, such as T5's first sentinel.

Span corruption teaches T5 to begin its targets with `<extra_id_0>`; a model without LM adaptation
answers as it was taught if the targets of a task begin so too ("span corruption + sentinel",
Lester et al., 2021, section 2.2). The prefix is trained on and scored like the rest of a target;
of what a model writes it is taken off before anything is compared.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from prompt_tuning_jax.data.tokenized_task import TokenizedTask
from prompt_tuning_jax.data.vocabulary import Vocabulary


def with_target_prefix(task: TokenizedTask, prefix: str | None) -> TokenizedTask:
  """The same task with a prefix before every target; texts and labels stay as they are.

  Args:
    task: the task.
    prefix: a text, `<extra_id_0>` for the sentinel; None or '' for none.

  Raises:
    ValueError: if the prefix has no tokens, or the task has another one already.
  """
  if not prefix or task.target_prefix == prefix:
    return task
  if task.target_prefix:
    raise ValueError(
        f'The targets of {task.name} begin with {task.target_prefix!r} already, and '
        f'{prefix!r} was asked for (TARGET_PREFIX). Load the task without a prefix.'
    )
  ids = prefix_ids(prefix, task.vocabulary)
  tokens, offsets = task.flat_tokens('targets')
  arrays = {
      'targets/tokens': np.insert(
          tokens, np.repeat(offsets[:-1], len(ids)), np.tile(ids, len(task))
      ),
      'targets/offsets': offsets + len(ids) * np.arange(len(offsets), dtype=offsets.dtype),
  }
  return task.with_arrays(arrays, target_prefix=prefix)


def prefix_ids(prefix: str, vocabulary: Vocabulary) -> list[int]:
  """Token ids of a prefix; none of ''.

  Raises:
    ValueError: if a text has no tokens.
  """
  ids = vocabulary.encode(prefix) if prefix else []
  if prefix and not ids:
    raise ValueError(
        f'TARGET_PREFIX={prefix!r} has no tokens, so that nothing would stand before the '
        "targets. Use None, or a text such as '<extra_id_0>'."
    )
  return ids


def without_prefix(text: str, prefix: str) -> str:
  """What a model wrote behind the prefix; all of it where it did not write the prefix."""
  return text.removeprefix(prefix).lstrip() if prefix else text


def common_prefix(prefixes: Iterable[str]) -> str:
  """The prefix of prompts that answer together.

  Raises:
    ValueError: if they have several.
  """
  found = dict.fromkeys(prefixes)
  if len(found) > 1:
    raise ValueError(
        'The prompts were trained with targets that begin differently '
        f'({", ".join(repr(prefix) for prefix in found)}, TARGET_PREFIX), so that they cannot '
        'share a batch. Use those of one kind together.'
    )
  return next(iter(found), '')
