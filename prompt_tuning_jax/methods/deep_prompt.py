"""Deep prompts: free keys and values in every layer (P-tuning v2, Liu et al., 2022)."""

from __future__ import annotations

from prompt_tuning_jax.methods.prefix import Prefix


class DeepPrompt(Prefix):
  """A prefix as P-tuning v2 trains it: the keys and values themselves, with dropout.

  The paper's models are encoders alone, in which a deep prompt is one in self-attention.
  In an encoder-decoder that is the self-attention of both stacks; cross-attention is left
  as it is, unless `sites` names it. The authors draw dropout for each row of a batch; here
  all rows have the same (`Prefix.dropout_rate`). Attributes are those of `Prefix`;
  `hidden=512` is the paper's variant with a network.
  """

  length: int = 20
  sites: tuple[str, ...] = ('encoder', 'decoder')
  hidden: int | None = None
  dropout_rate: float = 0.1
