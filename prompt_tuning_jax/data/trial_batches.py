"""The batches of several runs, so that one step trains them all.

Each run has its own examples in its own order, as if it were alone, and its own prompt: the ids
of its virtual tokens are moved behind those of the runs before (`Batch.prompt_ids`). Rows are
packed, and a row holds examples of one run alone. Prompts differ in length, and rows that hold
the longest would be costly for the others, so that a batch has a few sections of rows of one
width, each for the runs that need about as much.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from prompt_tuning_jax.data import buckets
from prompt_tuning_jax.data.batches import TrainBatches, local_rows
from prompt_tuning_jax.data.packing import Packing, first_fit, packed_widths
from prompt_tuning_jax.data.several_prompts import for_prompt, joined
from prompt_tuning_jax.typing import Batch

# Steps whose batches say how many rows one takes.
_SAMPLED_STEPS = 50


class TrialBatches:
  """`batches[step]` holds the rows of that step of every run: a Batch for each section.

  Attributes:
    microbatches: into how many parts each section divides.
  """

  def __init__(
      self,
      of_trials: Sequence[TrainBatches],
      *,
      vocab_size: int,
      num_virtual_tokens: int,
      num_decoder_virtual_tokens: int = 0,
      feature_lengths: Mapping[str, int],
      packed_length: int | None = None,
      at_once: int | None = None,
      microbatches: int = 1,
      row_multiple: int = 1,
      process_index: int = 0,
      process_count: int = 1,
  ):
    """Chooses the sections and their shapes.

    Args:
      of_trials: the batches of each run, whole and not packed; runs whose data and prompt
        lengths are the same may share one.
      vocab_size: V, the first virtual id.
      num_virtual_tokens: P, those of the longest prompt in the encoder's input.
      num_decoder_virtual_tokens: Q, those of each before the decoder's start token.
      feature_lengths: lengths of the features.
      packed_length: the encoder's width of all rows; None for the cheapest of each section.
      at_once: how many runs' rows a step computes at once, about; None for all.
      microbatches: parts of the batch of each run.
      row_multiple: what divides the number of rows of a part.
      process_index: which host this is: it gets so many of the rows.
      process_count: number of hosts.

    Raises:
      ValueError: if an example does not fit packed_length.
    """
    needed = [batches.longest for batches in of_trials]
    bounds = [max(needed)]
    if packed_length is None:
      bounds = buckets.choose(np.array(needed), np.ones(len(needed)))
    in_sections = collections.defaultdict(list)
    for trial, longest in enumerate(needed):
      in_sections[buckets.narrowest(bounds, longest)].append(trial)
    self.microbatches = tuple(
        -(-len(trials) // (at_once or len(trials))) * microbatches
        for trials in in_sections.values()
    )
    self._sections = [
        _Section(
            {trial: of_trials[trial] for trial in trials},
            vocab_size=vocab_size,
            virtual_tokens=(num_virtual_tokens, num_decoder_virtual_tokens),
            feature_lengths=feature_lengths,
            packed_length=packed_length,
            row_multiple=parts * row_multiple,
            share=(process_index, process_count),
        )
        for trials, parts in zip(in_sections.values(), self.microbatches)
    ]

  def __getitem__(self, step: int) -> tuple[Batch, ...]:
    """The batches of a step, one for each section: this host's rows."""
    return tuple(section[step] for section in self._sections)


class _Section:
  """The rows of some of the runs, by their step."""

  def __init__(
      self,
      of_trials: Mapping[int, TrainBatches],
      *,
      vocab_size: int,
      virtual_tokens: tuple[int, int],
      feature_lengths: Mapping[str, int],
      packed_length: int | None,
      row_multiple: int,
      share: tuple[int, int],
  ):
    self._of_trials = dict(of_trials)
    self._vocab_size = vocab_size
    self._virtual_tokens = virtual_tokens
    self._share = share
    distinct = list({id(batches): batches for batches in of_trials.values()}.values())
    longest = max(batches.longest for batches in distinct)
    prompt = max(batches.num_virtual_tokens for batches in distinct)
    packing = Packing.choose(
        (
            batches.needs(batches.rows(step))
            for step in itertools.count()
            for batches in distinct
        ),
        widths=packed_widths(packed_length, longest, feature_lengths, prompt),
        longest=longest,
        longest_target=max(batches.longest_target for batches in distinct),
        batch_size=distinct[0].batch_size,
        multiple=1,
    )
    self._room = packing.width, packing.decoder_width
    multiple = np.lcm(row_multiple, share[1])
    counts = [len(self._laid(step)) for step in range(_SAMPLED_STEPS)]
    # One shape for all but rare batches: a compilation more would cost more than empty rows.
    usual = buckets.round_up(max(counts) + 1, multiple)
    most = buckets.round_up(sum(b.batch_size for b in of_trials.values()), multiple)
    self._row_counts = sorted({int(min(usual, most)), int(most)})

  def __getitem__(self, step: int) -> Batch:
    laid = self._laid(step)
    count = buckets.narrowest(self._row_counts, len(laid))
    own = local_rows(count, *self._share)
    parts = [
        self._part(trial, [row for _, row in rows])
        for trial, rows in itertools.groupby(laid[own], key=lambda row: row[0])
    ]
    if empty := own.stop - own.start - sum(len(part.prompt_ids) for part in parts):
      parts.append(self._part(min(self._of_trials), [[]] * empty))
    return joined(parts)

  def _laid(self, step: int) -> list[tuple[int, list[tuple[int, int]]]]:
    """Of each row the run that it is of, and its examples."""
    laid = []
    for trial, batches in self._of_trials.items():
      examples = batches.rows(step)
      rows = first_fit(*batches.needs(examples), self._room)
      laid += [(trial, [examples[number] for number in row]) for row in rows]
    return laid

  def _part(self, trial: int, rows: Sequence[Sequence[tuple[int, int]]]) -> Batch:
    batches = self._of_trials[trial]
    batch = batches.packed_rows(
        rows, encoder_width=self._room[0], decoder_width=self._room[1], batch_size=len(rows)
    )
    return for_prompt(
        batch,
        trial,
        vocab_size=self._vocab_size,
        num_virtual_tokens=self._virtual_tokens[0],
        num_decoder_virtual_tokens=self._virtual_tokens[1],
        own_virtual_tokens=batches.num_virtual_tokens,
    )
