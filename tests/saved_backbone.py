"""A tiny random backbone on disk, with the packaged vocabulary, for tests of commands."""

from __future__ import annotations

from pathlib import Path

import jax

import prompt_tuning_jax
from prompt_tuning_jax.backbones.t5 import T5, T5Config
from prompt_tuning_jax.checkpoints import native
from prompt_tuning_jax.data.vocabulary import Vocabulary

VOCABULARY = Path(prompt_tuning_jax.__file__).parent / 'zoo' / 'nano' / 'spiece.model'


def save(folder: Path, seed: int = 0) -> str:
  """Writes the backbone to `folder` and returns it as a string."""
  config = T5Config(
      vocab_size=4224,
      d_model=16,
      num_heads=2,
      d_kv=8,
      d_ff=32,
      num_encoder_layers=1,
      num_decoder_layers=2,
  )
  params = T5(config).init_params(jax.random.key(seed))
  native.save_backbone(str(folder), config, params, Vocabulary(VOCABULARY), dtype='float32')
  return str(folder)
