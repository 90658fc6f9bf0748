"""Producing text token by token: greedy, beam search and sampling, with a KV cache.

All three take a backbone's module, its weights and encoder inputs, run as one
program (`jax.lax.while_loop`, compiled once for each module and shape) that stops
when every row is done, and return `Decoded`. `Decoding` names one of them with its
settings.

Rows whose encoder input is all padding (the rows that fill up a last batch) never
keep the loop going; what is decoded for them means nothing.
"""

from __future__ import annotations

import dataclasses
import difflib
import warnings
from collections.abc import Sequence

import flax.linen as nn
import jax
import numpy as np

from prompt_tuning_jax.evaluation.beam_search import UNFILLED, beam_search, check_beams
from prompt_tuning_jax.evaluation.decoder import Decoded, check_counts
from prompt_tuning_jax.evaluation.sampling import check_sampling, greedy, sample
from prompt_tuning_jax.typing import Array, Injection, PyTree

__all__ = ['UNFILLED', 'Decoded', 'Decoding', 'beam_search', 'greedy', 'sample']

STRATEGIES = ('greedy', 'beam', 'sample')

# The strategy that reads a setting, of those that not all do.
_READ_BY = {
    'num_beams': 'beam',
    'alpha': 'beam',
    'temperature': 'sample',
    'top_k': 'sample',
    'top_p': 'sample',
    'seed': 'sample',
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding:
  """How text is to be decoded: a strategy and its settings.

  Attributes:
    strategy: 'greedy', 'beam' or 'sample'. T5X's default is 'beam' with num_beams=1.
    max_length: most tokens of an answer, end-of-sequence included; None where whoever decodes
      knows it: the length of the targets that a prompt was trained with.
    num_beams: of 'beam'.
    alpha: of 'beam', exponent of the brevity penalty.
    temperature, top_k, top_p: of 'sample', see `sample`.
    seed: of 'sample'; with it and its number, a row's answer is determined.

  Raises:
    ValueError: if there is no such strategy, or a setting is out of its range. It warns of one
      that the strategy does not read.
  """

  strategy: str = 'greedy'
  max_length: int | None = 64
  num_beams: int = 4
  alpha: float = 0.6
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  seed: int = 0

  def __post_init__(self):
    if self.strategy not in STRATEGIES:
      near = difflib.get_close_matches(str(self.strategy), STRATEGIES, n=1)
      hint = f' Did you mean {near[0]!r}?' if near else ''
      raise ValueError(
          f'No decoding strategy {self.strategy!r}.{hint} There are '
          f'{", ".join(map(repr, STRATEGIES))}.'
      )
    if self.max_length is not None:
      check_counts(max_length=self.max_length)
    check_beams(self.num_beams, self.alpha)
    check_sampling(self.temperature, self.top_k, self.top_p)
    unread = [
        f'{field.name}={getattr(self, field.name)!r}'
        for field in dataclasses.fields(self)
        if self.strategy != _READ_BY.get(field.name, self.strategy)
        and getattr(self, field.name) != field.default
    ]
    if unread:
      warnings.warn(
          f'Decoding.strategy is {self.strategy!r}, which does not read {", ".join(unread)}. Set '
          f'strategy={_READ_BY[unread[0].partition("=")[0]]!r} to use it.',
          stacklevel=3,
      )

  def __call__(
      self,
      module: nn.Module,
      params: PyTree,
      encoder_input_tokens_BS: Array,
      injection: Injection | None = None,
      *,
      eos_id: int = 1,
      numbers: Sequence[int] | None = None,
      prompt_ids_B: Array | None = None,
  ) -> Decoded:
    """Decodes a batch.

    Args:
      module: the backbone's module.
      params: its weights.
      encoder_input_tokens_BS: inputs, virtual tokens included.
      injection: the prompt, or None.
      eos_id: the token that ends a sequence.
      numbers: of 'sample', the number of each row among all inputs, which with the
        seed gives its randomness; default 0, 1, …
      prompt_ids_B: which of several prompts a row has (`typing.Batch`).
    """
    arguments = (module, params, encoder_input_tokens_BS, injection)
    common = dict(max_length=self.max_length, eos_id=eos_id, prompt_ids_B=prompt_ids_B)
    if self.strategy == 'greedy':
      return greedy(*arguments, **common)
    if self.strategy == 'beam':
      return beam_search(
          *arguments, num_beams=self.num_beams, alpha=self.alpha, **common
      )
    if numbers is None:
      numbers = range(len(encoder_input_tokens_BS))
    # Rows that fill up a batch have no number; what they sample means nothing.
    numbers_B = np.zeros(len(encoder_input_tokens_BS), np.uint32)
    numbers_B[: len(numbers)] = numbers
    return sample(
        *arguments,
        keys_B=jax.vmap(jax.random.fold_in, (None, 0))(
            jax.random.key(self.seed), numbers_B
        ),
        temperature=self.temperature,
        top_k=self.top_k,
        top_p=self.top_p,
        **common,
    )
