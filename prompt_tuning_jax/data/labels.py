"""Examples without a label, which may be predicted but neither scored nor trained on.

TensorFlow Datasets writes -1 for a label that is not public (the test sets of GLUE and
SuperGLUE), and T5's tasks make the text `<unk>` of it. Trained on, it would teach the
model to answer `<unk>`; scored, an invalid answer, which is -1 too, would be right.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

UNKNOWN = '<unk>'

# What the manifest of a task says where every example has its label.
NONE_UNLABELLED = {'count': 0, 'first': None}


def count_unlabelled(
    targets: Iterable[Any], texts: Iterable[str | None], *, minus_one_is_none: bool = True
) -> dict[str, int | None]:
  """Counts the examples without a label: `{'count': …, 'first': example number}`.

  Args:
    targets: what metrics compare with, of each example.
    texts: the targets as text.
    minus_one_is_none: whether a target of -1 is a label that is not public; it may be a number
      like any other.
  """
  pairs = enumerate(zip(targets, texts, strict=True))
  unlabelled = [number for number, pair in pairs if _is_unlabelled(*pair, minus_one_is_none)]
  if not unlabelled:
    return NONE_UNLABELLED
  return {'count': len(unlabelled), 'first': unlabelled[0]}


def _is_unlabelled(target: Any, text: str | None, minus_one_is_none: bool) -> bool:
  # MultiRC and ReCoRD keep the group of an example beside its value.
  value = target.get('value') if isinstance(target, Mapping) else target
  is_minus_one = isinstance(value, (int, float)) and value == -1
  return text == UNKNOWN or (minus_one_is_none and is_minus_one)


def require(manifest: Mapping[str, Any]) -> None:
  """Raises ValueError unless every example of a tokenised task has a label."""
  count, first = manifest['unlabelled']['count'], manifest['unlabelled']['first']
  if not count:
    return
  split, total = manifest['split'], manifest['num_examples']
  name = f'{manifest["task"]}, split {split!r},'
  files = manifest['source']['files']
  file = files[0]['path'] if len(files) == 1 else None
  if count == total:
    # Another split is no help to training, nor to those who evaluate on this one.
    is_hidden = split.partition('[')[0] not in ('train', 'validation')
    raise ValueError(
        f'{name} has no labels (all {total:,} targets are -1 or {UNKNOWN}), so it can be '
        'predicted but neither scored nor trained on. '
        + ("Use another split, for example 'validation'" if is_hidden else 'Use other data')
        + (f', or write the labels into {file}.' if file else '.')
    )
  raise ValueError(
      f'{name} has no label for {count:,} of its {total:,} examples (the target is -1 or '
      f'{UNKNOWN}; the first is example {first}, counted from 0), so it can be predicted '
      'but neither scored nor trained on. '
      + (
          f'Label them in {file} or take them out of it.'
          if file
          else 'Let the task leave them out, with a filter among its preprocessors.'
      )
      + (
          ''
          if manifest['label_classes']
          else ' Where -1 is a true answer, number the answers from 0, or keep them as text, '
          'without a postprocess_fn.'
      )
  )
