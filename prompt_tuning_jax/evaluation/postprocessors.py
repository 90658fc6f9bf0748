"""From a predicted text to what a metric compares: the postprocessors of T5's tasks.

Signature and results are those of the `t5` package: `(text, **bound arguments,
example=raw fields, is_target=whether the text is the target)`. Class texts must
match exactly; anything else is class -1, which every metric of classes counts as wrong.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

_DETERMINERS = frozenset(
    'a an few her his each every many much my our some that the their these this '
    'those which whose your'.split()
)


def string_label_to_class_id(
    string_label: str,
    label_classes: Sequence[str],
    default: int = -1,
    **unused_kwargs: Any,
) -> int:
  """Index of the text among the classes, or `default` if it is none of them."""
  if string_label in label_classes:
    return list(label_classes).index(string_label)
  return default


def class_id_in_other_words(
    string_label: str,
    label_classes: Sequence[str],
    own_classes: Sequence[str],
    **unused_kwargs: Any,
) -> int:
  """Class of a text that names it as another task does, or as its own; else -1.

  A prompt that was trained on QQP answers a question of MRPC in QQP's words.

  Args:
    string_label: the text.
    label_classes: the other task's names of the classes, from which ranking chooses.
    own_classes: the task's own names of the same classes, those of its targets.
  """
  own = string_label_to_class_id(string_label, own_classes)
  return string_label_to_class_id(string_label, label_classes, default=own)


def string_to_float(
    string: str, default: float | None = -1.0, **unused_kwargs: Any
) -> float | None:
  """The number that the text spells, or `default` if it spells none.

  Where -1 is a number like others the default is None, which metrics take for a wrong answer.
  """
  try:
    return float(string)
  except ValueError:
    return default


def multirc(
    string_label: str,
    label_classes: Sequence[str] = ('False', 'True'),
    example: Mapping[str, Any] | None = None,
    is_target: bool = False,
) -> dict[str, Any]:
  """Class id as 'value'; of a target also its question as 'group'."""
  result = {'value': string_label_to_class_id(string_label, label_classes)}
  if is_target:
    result['group'] = _field(example, 'idx/question')
  return result


def record(
    answer: str, example: Mapping[str, Any] | None = None, is_target: bool = False
) -> dict[str, Any]:
  """The answer as 'value'; of a target all right answers, and its question as 'group'."""
  if not is_target:
    return {'value': answer}
  group = (_field(example, 'idx/passage'), _field(example, 'idx/query'))
  return {'value': list(_field(example, 'answers')), 'group': group}


def all_references(
    text: str, example: Mapping[str, Any] | None = None, is_target: bool = False
) -> str | list[str]:
  """The text; of a target all texts that are as good, the field `references`."""
  return list(_field(example, 'references')) if is_target else text


def qa(
    answer: str, example: Mapping[str, Any] | None = None, is_target: bool = False
) -> str | list[str]:
  """The answer; of a target all right answers, the field `answers`."""
  return list(_field(example, 'answers')) if is_target else answer


def wsc_simple(
    prediction: str,
    example: Mapping[str, Any] | None = None,
    is_target: bool = False,
) -> int:
  """Whether the predicted words are the referent that the example proposes.

  The Winograd schemas are cast as generation: the model says what a pronoun stands
  for, and agrees with the proposed referent if its words are a subset or a superset
  of the referent's, determiners and case aside. An empty prediction is -1.
  """
  if is_target:
    return int(_field(example, 'label'))
  prediction = _without_determiners(prediction)
  if not prediction:
    return -1
  referent = _without_determiners(_field(example, 'targets_pretokenized'))
  # "Bob" is not "Bob's hat".
  if ("'" in prediction) != ("'" in referent):
    return 0
  predicted_words, referent_words = set(prediction.split(' ')), set(referent.split(' '))
  return int(predicted_words <= referent_words or referent_words <= predicted_words)


def _without_determiners(text: str) -> str:
  words = text.strip().lower().split(' ')
  return ' '.join(word for word in words if word not in _DETERMINERS)


def _field(example: Mapping[str, Any] | None, name: str) -> Any:
  if example is None or name not in example:
    found = ', '.join(map(repr, example or ())) or 'nothing'
    raise ValueError(
        f'This postprocessor needs the raw field {name!r} of the example; it has '
        f'{found}. Keep the field in the preprocessor of the task.'
    )
  return example[name]


def remove_extra_id_0(text: str, **unused_kwargs: Any) -> str:
  """The text without a leading `<extra_id_0>`, for targets that begin with a sentinel."""
  return re.sub('^<extra_id_0>', '', text).strip()


def mrpc_to_qqp(text: str, **unused_kwargs: Any) -> str:
  """MRPC's labels in QQP's words, for prompts that move between the two tasks."""
  words = {'equivalent': 'duplicate', 'not_equivalent': 'not_duplicate'}
  return words.get(text, text)


def qqp_to_mrpc(text: str, **unused_kwargs: Any) -> str:
  """QQP's labels in MRPC's words, for prompts that move between the two tasks."""
  words = {'duplicate': 'equivalent', 'not_duplicate': 'not_equivalent'}
  return words.get(text, text)
