"""Texts as rows of batches, each with the virtual tokens of the prompt that it is for."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tqdm

from prompt_tuning_jax import partitioning
from prompt_tuning_jax.backbones.backbone import Backbone
from prompt_tuning_jax.data import array_file
from prompt_tuning_jax.data.several_prompts import moved
from prompt_tuning_jax.data.target_prefix import common_prefix
from prompt_tuning_jax.data.virtual_tokens import Placement, as_placement
from prompt_tuning_jax.data.vocabulary import Vocabulary
from prompt_tuning_jax.evaluation import kept_answers
from prompt_tuning_jax.evaluation.evaluate import AnyPrompt, unpack_prompt
from prompt_tuning_jax.evaluation.kept_answers import AnswerFolder, KeptAnswers
from prompt_tuning_jax.injection_stack import stack_injections
from prompt_tuning_jax.typing import Array, Injection, PyTree


class TextRows:
  """Tokenised texts with their virtual tokens, and the prompts these stand for.

  Attributes:
    backbone: the model.
    injection: all prompts as one, or None.
    target_prefix: what stands before the answers, as before the targets in training.
    target_length: the longest targets that one of the prompts was trained with; 0 if unknown.
    rows_of_text: how often each text stands there, one after another.
  """

  def __init__(
      self,
      backbone: Backbone,
      prompt: AnyPrompt | Sequence[AnyPrompt],
      texts: Sequence[str | Mapping[str, str]],
      placement: Placement | str | None,
      max_input_length: int | None,
      rows_of_text: int = 1,
  ):
    """Reads the prompts and tokenises the texts; see `infer.generate`."""
    check_texts(texts)
    backbone.needed_vocabulary('no text can be read')
    self.backbone = backbone
    self.rows_of_text = rows_of_text
    if isinstance(prompt, (list, tuple)):
      if len(prompt) != len(texts):
        raise ValueError(
            f'{len(prompt)} prompts for {len(texts)} texts: give one prompt for all texts, '
            'or a list with one for each.'
        )
      prompts = list(prompt)
    else:
      prompts = [prompt] * len(texts)
    # A prompt is read and stands in the table once, however many texts it is for.
    keys = [str(p) if isinstance(p, str | os.PathLike) else id(p) for p in prompts]
    unpacked = {
        key: unpack_prompt(backbone, p) for key, p in dict(zip(keys, prompts)).items()
    }
    self.target_prefix = common_prefix(
        manifest.target_prefix if manifest else '' for _, manifest in unpacked.values()
    )
    self.target_length = max(
        (m.feature_lengths.get('targets', 0) for _, m in unpacked.values() if m), default=0
    )
    injections = [injection for injection, _ in unpacked.values()]
    # One prompt needs no stacking, and may be none.
    self.injection = next(iter(injections), None)
    if len(injections) > 1:
      self.injection = stack_injections(injections)
    ids = {key: number for number, key in enumerate(unpacked)}
    self._prompt_ids = np.array([ids[key] for key in keys], np.int32)
    # So are the words of its template tokenised.
    placements = {
        key: as_placement(
            placement or (manifest and manifest.placement) or 'prefix'
        ).bind(backbone.vocabulary)
        for key, (_, manifest) in unpacked.items()
    }
    self._rows = []
    cut = []
    for number, (text, key) in enumerate(zip(texts, keys)):
      injection, manifest = unpacked[key]
      length, place = max_input_length, placements[key]
      if manifest is not None:
        length = length or manifest.feature_lengths.get('inputs')
      fields = _encoded(text, place, backbone.vocabulary)
      ordinary = sum(map(len, fields.values())) + place.num_anchor_tokens
      if length is not None and ordinary > length:
        cut.append((ordinary - length, number, ordinary, length))
      first_id = backbone.spec.vocab_size
      row = place(
          fields.get('inputs', ()),
          (injection or Injection()).num_virtual_tokens,
          first_id,
          length=length,
          fields=fields,
      )
      if self.injection is not None:
        row = moved(row, first_id, ids[key] * self.injection.prompt_stride)
      self._rows.append(row)
    if cut:
      _, number, ordinary, length = max(cut, key=lambda one: one[0])
      warnings.warn(
          f'{len({number // rows_of_text for _, number, _, _ in cut})} of '
          f'{len(texts) // rows_of_text} texts are longer than '
          'max_input_length (by default the length that the prompt was trained with) and are '
          'cut; worst text '
          f'{number // rows_of_text}, counted from 0, of whose {ordinary} tokens the model sees '
          f'{length}.',
          stacklevel=3,
      )

  def __len__(self) -> int:
    return len(self._rows)

  def kept(
      self,
      folder: AnswerFolder,
      params: PyTree | None,
      batch_size: int,
      kind: Callable[[], Mapping[str, Any]],
  ) -> KeptAnswers:
    """The answers to these texts that were found before; `kind` gives what they are."""

    def depends_on() -> dict[str, Any]:
      return {
          'injection': kept_answers.describe_injection(self.injection),
          'rows': array_file.sum_of_arrays(('row', row) for row in self._rows),
          'prompt_ids': self._prompt_ids,
          'rows_of_text': self.rows_of_text,
          'target_prefix': self.target_prefix,
          'batch_size': batch_size,
          **kind(),
      }

    return folder.answers(self.backbone, params, depends_on)

  def batches(
      self, batch_size: int, progress: bool, done: int = 0
  ) -> Iterator[tuple[Array, dict[str, Array], np.ndarray]]:
    """Tokens [B, S], further arguments for these rows, and the numbers of their texts.

    The arrays are split over the devices. Longest texts come first; the first `done` batches are
    left out.
    """
    if batch_size < 1:
      raise ValueError(f'batch_size={batch_size} must be at least 1.')
    lengths = np.array([len(row) for row in self._rows], int)
    order = np.argsort(-lengths, kind='stable')
    batch_size = min(batch_size, max(len(order), 1))
    starts = range(0, len(order), batch_size)
    shown = tqdm.tqdm(
        starts[done:],
        initial=done,
        total=len(starts),
        unit='batch',
        # None: only on a terminal.
        disable=None if progress else True,
        file=sys.stderr,
    )
    for start in shown:
      numbers = order[start : start + batch_size]
      width = _width(int(lengths[numbers].max()))
      # A last batch keeps the shape of the others: its other rows are empty.
      tokens_BS = np.zeros((batch_size, width), np.int32)
      for row, number in enumerate(numbers):
        tokens_BS[row, : lengths[number]] = self._rows[number]
      of_rows = {}
      if self.injection is not None and self.injection.num_prompts > 1:
        of_rows['prompt_ids_B'] = np.zeros(batch_size, np.int32)
        of_rows['prompt_ids_B'][: len(numbers)] = self._prompt_ids[numbers]
      mesh = self.backbone.mesh
      split = {name: partitioning.split_rows(x, mesh) for name, x in of_rows.items()}
      yield partitioning.split_rows(tokens_BS, mesh), split, numbers


def check_texts(texts: Any) -> None:
  """Raises ValueError for a single text in place of a list of them."""
  if isinstance(texts, str):
    raise ValueError(f'texts is the one text {texts!r}; give a list of texts.')


def _encoded(
    text: str | Mapping[str, str], placement: Placement, vocabulary: Vocabulary
) -> dict[str, list[int]]:
  """Token ids of each field that the placement reads of a text."""
  given = {'inputs': text} if isinstance(text, str) else dict(text)
  missing = [name for name in placement.fields if name not in given]
  if missing:
    raise ValueError(
        f'The template of this prompt reads the fields {", ".join(placement.fields)}, but '
        f'{text!r} has no {missing[0]!r}. Give a mapping with the text of each field, such '
        f'as {dict.fromkeys(placement.fields, "…")}.'
    )
  encoded = {name: vocabulary.encode(given[name]) for name in placement.fields}
  if 'inputs' in encoded:
    encoded['inputs'].append(vocabulary.eos_id)
  return encoded


def _width(length: int) -> int:
  """The smallest of 16, 24, 32, 48, 64, 96, … that holds `length`: few compilations."""
  width = 16
  while width < length:
    width += width // 2 if width & (width - 1) == 0 else width // 3
  return width
