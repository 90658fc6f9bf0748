"""Text in, text or a ranking of choices out.

    generate(backbone, prompt, ['hypothesis: … premise: …'])         # ['entailment']
    rank(backbone, prompt, texts, ['yes', 'no'])[0].label            # 'yes'

Texts of different prompts share a batch where each has a prompt of its own: the rows
then name their virtual tokens in one table of all prompts.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from prompt_tuning_jax import partitioning
from prompt_tuning_jax.backbones.backbone import Backbone
from prompt_tuning_jax.data.virtual_tokens import Placement, as_placement
from prompt_tuning_jax.data.vocabulary import Vocabulary
from prompt_tuning_jax.evaluation import ranking
from prompt_tuning_jax.evaluation.decoding import Decoding
from prompt_tuning_jax.evaluation.evaluate import AnyPrompt, unpack_prompt
from prompt_tuning_jax.typing import Injection, PyTree


class Ranked(NamedTuple):
  """The outcome of ranking choices for one text.

  Attributes:
    label: the choice with the best score.
    scores: log-probability of every choice.
  """

  label: str
  scores: dict[str, float]


def generate(
    backbone: Backbone,
    prompt: AnyPrompt | Sequence[AnyPrompt],
    texts: Sequence[str | Mapping[str, str]],
    *,
    decode: str = 'greedy',
    max_length: int = 64,
    batch_size: int = 32,
    max_input_length: int | None = None,
    placement: Placement | str | None = None,
    params: PyTree | None = None,
    progress: bool = False,
    **settings: Any,
) -> list[str]:
  """Lets the model answer each text.

  Args:
    backbone: the model.
    prompt: for all texts a loaded artifact or the path of one, an Injection, or None
      (the bare model); or a sequence with one of these for each text.
    texts: the inputs, as the task words them; or, where the prompt stands in a template of
      other fields, a mapping with the text of each field: {'sub': 'Windows'}.
    decode: 'greedy', 'beam' or 'sample'.
    max_length: most tokens of an answer, end-of-sequence included.
    batch_size: most texts in a batch; it changes no answer.
    max_input_length: longer inputs are cut, with a warning; default: the length the
      prompt was trained with, else nothing is cut.
    placement: where the virtual tokens stand; default: as the prompt was trained.
    params: the backbone's weights, where they are not its own.
    progress: whether to show a progress line.
    **settings: further settings of `decoding.Decoding`: num_beams, alpha,
      temperature, top_k, top_p, seed.

  Returns:
    The best answer to each text.

  Raises:
    ValueError: if a prompt does not belong to the backbone, or an argument is out of
      its range.
  """
  decoding = Decoding(strategy=decode, max_length=max_length, **settings)
  inputs = _Inputs(backbone, prompt, texts, placement, max_input_length)
  params = backbone.params if params is None else params
  answers = [''] * len(texts)
  for tokens_BS, numbers in inputs.batches(batch_size, progress):
    with partitioning.on(backbone.mesh):
      decoded = decoding(
          backbone.module,
          params,
          partitioning.split_rows(tokens_BS, backbone.mesh),
          inputs.injection,
          eos_id=backbone.vocabulary.eos_id,
          numbers=numbers,
      )
    for number, tokens_T in zip(numbers, partitioning.whole(decoded.tokens_BKT)[:, -1]):
      answers[number] = backbone.vocabulary.decode(tokens_T)
  return answers


def rank(
    backbone: Backbone,
    prompt: AnyPrompt | Sequence[AnyPrompt],
    texts: Sequence[str | Mapping[str, str]],
    choices: Sequence[str],
    *,
    normalize_by_length: bool = False,
    batch_size: int = 32,
    max_input_length: int | None = None,
    placement: Placement | str | None = None,
    params: PyTree | None = None,
    progress: bool = False,
) -> list[Ranked]:
  """Scores the same choices for each text, with one pass of the encoder for all.

  Args:
    backbone: the model.
    prompt: as in `generate`.
    texts: as in `generate`.
    choices: the texts to choose from; of equal scores the earlier one wins.
    normalize_by_length: score the mean log-probability of a choice's tokens instead
      of the sum.
    batch_size: most texts in a batch; it changes no score.
    max_input_length: as in `generate`.
    placement: as in `generate`.
    params: the backbone's weights, where they are not its own.
    progress: whether to show a progress line.

  Returns:
    Label and scores of each text.

  Raises:
    ValueError: if there are no choices, one of them has no tokens or stands twice,
      or as `generate`.
  """
  inputs = _Inputs(backbone, prompt, texts, placement, max_input_length)
  choices_CT = ranking.encode_choices(choices, backbone.vocabulary)
  repeated = sorted({choice for choice in choices if list(choices).count(choice) > 1})
  if repeated:
    raise ValueError(
        f'Choices stand more than once: {", ".join(map(repr, repeated))}. Name each once.'
    )
  params = backbone.params if params is None else params
  ranked: list[Any] = [None] * len(texts)
  for tokens_BS, numbers in inputs.batches(batch_size, progress):
    with partitioning.on(backbone.mesh):
      scores_BC = ranking.score_choices(
          backbone.module,
          params,
          partitioning.split_rows(tokens_BS, backbone.mesh),
          choices_CT,
          inputs.injection,
          normalize_by_length=normalize_by_length,
      )
    scores_BC = partitioning.whole(scores_BC)
    for number, best, scores_C in zip(
        numbers, ranking.best_choice(scores_BC), scores_BC.tolist()
    ):
      ranked[number] = Ranked(choices[best], dict(zip(choices, scores_C)))
  return ranked


def infer(
    backbone: Backbone,
    prompt: AnyPrompt | Sequence[AnyPrompt],
    texts: Sequence[str | Mapping[str, str]],
    *,
    choices: Sequence[str] | None = None,
    **kwargs: Any,
) -> list[str] | list[Ranked]:
  """`rank` where there are choices, else `generate`; with their further arguments."""
  if choices is None:
    return generate(backbone, prompt, texts, **kwargs)
  return rank(backbone, prompt, texts, choices, **kwargs)


class _Inputs:
  """Tokenised texts with their virtual tokens, and the prompts these stand for.

  Attributes:
    injection: all prompts as one, or None.
  """

  def __init__(
      self,
      backbone: Backbone,
      prompt: AnyPrompt | Sequence[AnyPrompt],
      texts: Sequence[str | Mapping[str, str]],
      placement: Placement | str | None,
      max_input_length: int | None,
  ):
    if isinstance(texts, str):
      raise ValueError(f'texts is the one text {texts!r}; give a list of texts.')
    if backbone.vocabulary is None:
      raise ValueError(
          f'{backbone.name} has no vocabulary to read texts with. Load it with '
          'vocabulary=<the SentencePiece model it was trained with>.'
      )
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
    self.injection, offsets = _join({key: i for key, (i, _) in unpacked.items()})
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
      self._rows.append(np.where(row >= first_id, row + offsets[key], row))
    if cut:
      _, number, ordinary, length = max(cut, key=lambda one: one[0])
      warnings.warn(
          f'{len(cut)} of {len(texts)} texts are longer than max_input_length (by default '
          'the length that the prompt was trained with) and are cut; worst text '
          f'{number}, counted from 0, of whose {ordinary} tokens the model sees {length}.',
          stacklevel=3,
      )

  def batches(
      self, batch_size: int, progress: bool
  ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of tokens [B, S] and the numbers of their texts; longest texts first."""
    if batch_size < 1:
      raise ValueError(f'batch_size={batch_size} must be at least 1.')
    lengths = np.array([len(row) for row in self._rows], int)
    order = np.argsort(-lengths, kind='stable')
    batch_size = min(batch_size, max(len(order), 1))
    starts = range(0, len(order), batch_size)
    for start in tqdm.tqdm(starts, unit='batch', disable=not progress, file=sys.stderr):
      numbers = order[start : start + batch_size]
      width = _width(int(lengths[numbers].max()))
      # A last batch keeps the shape of the others: its other rows are empty.
      tokens_BS = np.zeros((batch_size, width), np.int32)
      for row, number in enumerate(numbers):
        tokens_BS[row, : lengths[number]] = self._rows[number]
      yield tokens_BS, numbers


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


def _join(
    injections: dict[Hashable, Injection | None],
) -> tuple[Injection | None, dict[Hashable, int]]:
  """All prompts as one injection, and where the virtual tokens of each begin in it."""
  if len(injections) <= 1:
    return next(iter(injections.values()), None), dict.fromkeys(injections, 0)
  tables, offsets, start = [], {}, 0
  for key, injection in injections.items():
    offsets[key] = start
    if injection is None:
      continue
    others = [x for x in jax.tree.leaves(injection) if x is not injection.virtual_embeddings]
    if others or injection.num_decoder_virtual_tokens:
      raise ValueError(
          f"Prompts can share a batch only if they are soft prompts of the encoder's input; "
          f'one is {injection}. Run the texts of that prompt on their own.'
      )
    if injection.virtual_embeddings is not None:
      tables.append(injection.virtual_embeddings)
      start += injection.num_virtual_tokens
  joined = Injection(virtual_embeddings=jnp.concatenate(tables)) if tables else None
  return joined, offsets
