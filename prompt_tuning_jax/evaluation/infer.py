"""Text in, text or a ranking of choices out.

    generate(backbone, prompt, ['hypothesis: … premise: …'])         # ['entailment']
    rank(backbone, prompt, texts, ['yes', 'no'])[0].label            # 'yes'
    ensemble(backbone, prompts, texts, choices=['yes', 'no'])[0].votes    # {'yes': 4, 'no': 1}

Texts of different prompts share a batch where each has a prompt of its own: the prompts are
stacked (`injection_stack.py`), and each row says which of them it has.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tqdm

from prompt_tuning_jax import partitioning
from prompt_tuning_jax.backbones.backbone import Backbone
from prompt_tuning_jax.data.several_prompts import moved
from prompt_tuning_jax.data.target_prefix import common_prefix, without_prefix
from prompt_tuning_jax.data.virtual_tokens import Placement, as_placement
from prompt_tuning_jax.data.vocabulary import Vocabulary
from prompt_tuning_jax.evaluation import kept_answers, ranking
from prompt_tuning_jax.evaluation.decoding import Decoding
from prompt_tuning_jax.evaluation.evaluate import AnyPrompt, unpack_prompt
from prompt_tuning_jax.evaluation.kept_answers import KeptAnswers
from prompt_tuning_jax.evaluation.voting import Answer, agreed, check_ensemble
from prompt_tuning_jax.injection_stack import stack_injections
from prompt_tuning_jax.typing import Array, Injection, PyTree


class Ranked(NamedTuple):
  """The outcome of ranking choices for one text.

  Attributes:
    label: the choice with the best score.
    scores: log-probability of every choice.
  """

  label: str
  scores: dict[str, float]


class Agreed(NamedTuple):
  """What several prompts answer one text with, together.

  Attributes:
    label: their answer.
    votes: how many of them answer what.
    scores: the mean log-probability of every choice; of texts that were written freely, over
      the prompts that wrote them, that of the answer alone.
  """

  label: str
  votes: dict[str, int]
  scores: dict[str, float]


def generate(
    backbone: Backbone,
    prompt: AnyPrompt | Sequence[AnyPrompt],
    texts: Sequence[str | Mapping[str, str]],
    *,
    decode: str = 'greedy',
    max_length: int | None = 64,
    batch_size: int = 32,
    max_input_length: int | None = None,
    placement: Placement | str | None = None,
    params: PyTree | None = None,
    keep_in: str | None = None,
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
    max_length: most tokens of an answer, end-of-sequence included; None is the length of the
      targets that the prompt was trained with, else 64.
    batch_size: most texts in a batch; it changes no answer.
    max_input_length: longer inputs are cut, with a warning; default: the length the
      prompt was trained with, else nothing is cut.
    placement: where the virtual tokens stand; default: as the prompt was trained.
    params: the backbone's weights, where they are not its own.
    keep_in: folder in which answers are kept as they are found, until all of them are, so that
      the same call, interrupted, goes on when it is made again; None keeps none.
    progress: whether to show a progress line, on a terminal.
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
  answers = _decoded(inputs, decoding, batch_size, params, progress, keep_in)
  return [text for text, _ in answers]


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
    keep_in: str | None = None,
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
    keep_in: as in `generate`.
    progress: as in `generate`.

  Returns:
    Label and scores of each text.

  Raises:
    ValueError: if there are no choices, one of them has no tokens or stands twice,
      or as `generate`.
  """
  inputs = _Inputs(backbone, prompt, texts, placement, max_input_length)
  return _ranked(inputs, choices, batch_size, params, progress, keep_in, normalize_by_length)


def _ranked(
    inputs: _Inputs,
    choices: Sequence[str],
    batch_size: int,
    params: PyTree | None,
    progress: bool,
    keep_in: str | None,
    normalize_by_length: bool = False,
) -> list[Ranked]:
  backbone = inputs.backbone
  choices_CT = ranking.encode_choices(choices, backbone.vocabulary, inputs.target_prefix)
  repeated = sorted({choice for choice in choices if list(choices).count(choice) > 1})
  if repeated:
    raise ValueError(
        f'Choices stand more than once: {", ".join(map(repr, repeated))}. Name each once.'
    )
  kept = inputs.kept(
      keep_in if params is None else None,
      batch_size,
      choices=list(choices),
      normalize_by_length=normalize_by_length,
  )
  found = kept.read()
  params = backbone.params if params is None else params
  for tokens_BS, of_rows, numbers in inputs.batches(batch_size, progress, len(found)):
    with partitioning.on(backbone.mesh):
      scores_BC = ranking.score_choices(
          backbone.module,
          params,
          tokens_BS,
          choices_CT,
          inputs.injection,
          normalize_by_length=normalize_by_length,
          **of_rows,
      )
    scores_BC = partitioning.whole(scores_BC)
    best_B = ranking.best_choice(scores_BC).tolist()
    found.append(list(zip(numbers.tolist(), best_B, scores_BC.tolist())))
    kept.add(found[-1])
  ranked: list[Any] = [None] * len(inputs)
  for number, best, scores_C in itertools.chain(*found):
    ranked[number] = Ranked(choices[best], dict(zip(choices, scores_C)))
  kept.forget()
  return ranked


def ensemble(
    backbone: Backbone,
    prompts: Sequence[AnyPrompt],
    texts: Sequence[str | Mapping[str, str]],
    *,
    choices: Sequence[str] | None = None,
    how: str = 'vote',
    batch_size: int = 32,
    max_input_length: int | None = None,
    placement: Placement | str | None = None,
    params: PyTree | None = None,
    keep_in: str | None = None,
    progress: bool = False,
    **settings: Any,
) -> list[Agreed]:
  """What several prompts answer each text with, together (Lester et al., 2021, section 6).

  Every text is read once with each prompt, all of them in the same batches.

  Args:
    backbone: the model.
    prompts: the members of the ensemble, of one kind (`injection_stack.stack_injections`).
    texts: as in `generate`.
    choices: texts to choose from; None writes freely.
    how: 'vote' or 'mean', see `voting.agreed`.
    batch_size: most rows in a batch, of which each text needs one for every prompt.
    max_input_length, placement, params, keep_in, progress: as in `generate`.
    **settings: further ones of `rank` (normalize_by_length) or `generate` (decode, max_length …).

  Raises:
    ValueError: if there are no prompts, they are not of one kind, or 'mean' has no choices; else
      as `rank` or `generate`.
  """
  check_ensemble(how)
  _check_texts(texts)
  if not isinstance(prompts, (list, tuple)) or not prompts:
    raise ValueError(f'prompts is {prompts}; give a list of the prompts of the ensemble.')
  if how == 'mean' and choices is None:
    raise ValueError(
        "An ensemble by 'mean' compares mean log-probabilities of choices, but there are none "
        "(choices, CLASS_LABELS). Name them, or use 'vote'."
    )
  count = len(prompts)
  rows = dict(batch_size=batch_size, params=params, progress=progress, keep_in=keep_in)
  every = [prompt for _ in texts for prompt in prompts], [text for text in texts for _ in prompts]
  inputs = _Inputs(backbone, *every, placement, max_input_length, rows_of_text=count)
  answers: list[Answer]
  if choices is not None:
    ranked = _ranked(inputs, choices, **rows, **settings)
    answers = [(answer.label, {'scores': answer.scores}) for answer in ranked]
  else:
    strategy = settings.pop('decode', Decoding.strategy)
    answers = _decoded(inputs, Decoding(strategy=strategy, **settings), **rows)
  found = [agreed(answers[n : n + count], how) for n in range(0, len(answers), count)]
  return [
      Agreed(text, about['votes'], about.get('scores') or {text: about['score']})
      for text, about in found
  ]


def _decoded(
    inputs: _Inputs,
    decoding: Decoding,
    batch_size: int,
    params: PyTree | None,
    progress: bool,
    keep_in: str | None,
) -> list[Answer]:
  """The best answer to each text, with its score.

  Where each text stands there several times, they share the randomness of sampling.
  """
  backbone = inputs.backbone
  if decoding.max_length is None:
    length = inputs.target_length or Decoding.max_length
    decoding = dataclasses.replace(decoding, max_length=length)
  kept = inputs.kept(
      keep_in if params is None else None, batch_size, decoding=dataclasses.asdict(decoding)
  )
  found = kept.read()
  params = backbone.params if params is None else params
  for tokens_BS, of_rows, numbers in inputs.batches(batch_size, progress, len(found)):
    with partitioning.on(backbone.mesh):
      decoded = decoding(
          backbone.module,
          params,
          tokens_BS,
          inputs.injection,
          eos_id=backbone.vocabulary.eos_id,
          numbers=numbers // inputs.rows_of_text,
          **of_rows,
      )
    tokens_BKT, scores_BK = map(partitioning.whole, decoded)
    texts = [
        without_prefix(backbone.vocabulary.decode(tokens_T), inputs.target_prefix)
        for tokens_T in tokens_BKT[: len(numbers), -1]
    ]
    found.append(list(zip(numbers.tolist(), texts, scores_BK[:, -1].tolist())))
    kept.add(found[-1])
  answers: list[Any] = [None] * len(inputs)
  for number, text, score in itertools.chain(*found):
    answers[number] = text, {'score': score}
  kept.forget()
  return answers


class _Inputs:
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
    _check_texts(texts)
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
          f'{len(cut) // rows_of_text} of {len(texts) // rows_of_text} texts are longer than '
          'max_input_length (by default the length that the prompt was trained with) and are '
          'cut; worst text '
          f'{number // rows_of_text}, counted from 0, of whose {ordinary} tokens the model sees '
          f'{length}.',
          stacklevel=3,
      )

  def __len__(self) -> int:
    return len(self._rows)

  def kept(self, keep_in: str | None, batch_size: int, **answers: Any) -> KeptAnswers:
    """The answers to these texts that were found before; `answers` says of what kind they are."""
    if keep_in is None:
      return KeptAnswers(None)
    return KeptAnswers(
        keep_in,
        backbone=kept_answers.describe_backbone(self.backbone),
        injection=kept_answers.describe_injection(self.injection),
        rows=kept_answers.sum_of_arrays([*map(np.asarray, self._rows), self._prompt_ids]),
        target_prefix=self.target_prefix,
        batch_size=batch_size,
        **answers,
    )

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


def _check_texts(texts: Any) -> None:
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
