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
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from prompt_tuning_jax import partitioning
from prompt_tuning_jax.backbones.backbone import Backbone
from prompt_tuning_jax.data.target_prefix import without_prefix
from prompt_tuning_jax.data.virtual_tokens import Placement
from prompt_tuning_jax.evaluation import ranking
from prompt_tuning_jax.evaluation.decoding import Decoding
from prompt_tuning_jax.evaluation.evaluate import AnyPrompt
from prompt_tuning_jax.evaluation.kept_answers import AnswerFolder, KeepIn, kept_in
from prompt_tuning_jax.evaluation.text_rows import TextRows, check_texts
from prompt_tuning_jax.evaluation.voting import Answer, agreed, check_ensemble
from prompt_tuning_jax.typing import PyTree


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
    keep_in: KeepIn = None,
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
      the same call, interrupted, goes on when it is made again (in one process: of several none
      has all answers); None keeps none. Of an `AnswerFolder` its owner decides until when.
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
  inputs = TextRows(backbone, prompt, texts, placement, max_input_length)
  with kept_in(keep_in) as answer_folder:
    answers = _decoded(inputs, decoding, batch_size, params, progress, answer_folder)
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
    keep_in: KeepIn = None,
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
  inputs = TextRows(backbone, prompt, texts, placement, max_input_length)
  with kept_in(keep_in) as answer_folder:
    return _ranked(
        inputs, choices, batch_size, params, progress, answer_folder, normalize_by_length
    )


def _ranked(
    inputs: TextRows,
    choices: Sequence[str],
    batch_size: int,
    params: PyTree | None,
    progress: bool,
    answer_folder: AnswerFolder,
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
      answer_folder,
      params,
      batch_size,
      lambda: {'choices': list(choices), 'normalize_by_length': normalize_by_length},
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
    keep_in: KeepIn = None,
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
  check_texts(texts)
  if not isinstance(prompts, (list, tuple)) or not prompts:
    raise ValueError(f'prompts is {prompts}; give a list of the prompts of the ensemble.')
  if how == 'mean' and choices is None:
    raise ValueError(
        "An ensemble by 'mean' compares mean log-probabilities of choices, but there are none "
        "(choices, CLASS_LABELS). Name them, or use 'vote'."
    )
  count = len(prompts)
  every = [prompt for _ in texts for prompt in prompts], [text for text in texts for _ in prompts]
  inputs = TextRows(backbone, *every, placement, max_input_length, rows_of_text=count)
  answers: list[Answer]
  with kept_in(keep_in) as answer_folder:
    rows = batch_size, params, progress, answer_folder
    if choices is not None:
      ranked = _ranked(inputs, choices, *rows, **settings)
      answers = [(answer.label, {'scores': answer.scores}) for answer in ranked]
    else:
      strategy = settings.pop('decode', Decoding.strategy)
      answers = _decoded(inputs, Decoding(strategy=strategy, **settings), *rows)
  found = [agreed(answers[n : n + count], how) for n in range(0, len(answers), count)]
  return [
      Agreed(text, about['votes'], about.get('scores') or {text: about['score']})
      for text, about in found
  ]


def _decoded(
    inputs: TextRows,
    decoding: Decoding,
    batch_size: int,
    params: PyTree | None,
    progress: bool,
    answer_folder: AnswerFolder,
) -> list[Answer]:
  """The best answer to each text, with its score.

  Where each text stands there several times, they share the randomness of sampling.
  """
  backbone = inputs.backbone
  if decoding.max_length is None:
    length = inputs.target_length or Decoding.max_length
    decoding = dataclasses.replace(decoding, max_length=length)
  kept = inputs.kept(
      answer_folder,
      params,
      batch_size,
      lambda: {'decoding': dataclasses.asdict(decoding)},
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
  return answers
