"""The packaged models: their size, their names, and what LM adaptation made of them."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import prompt_tuning_jax
from prompt_tuning_jax import cli
from prompt_tuning_jax.checkpoints import ladder, load
from prompt_tuning_jax.checkpoints.load import load_backbone
from prompt_tuning_jax.json_files import read_jsonl
from prompt_tuning_jax.typing import Batch

ZOO = Path(prompt_tuning_jax.__file__).parent / 'zoo'
STEPS = (0, 100, 200, 400, 800)


@pytest.fixture(scope='module')
def adapted():
  """`pico` by its steps of LM adaptation."""
  return {steps: load_backbone(load.after_adaptation('pico', steps)) for steps in STEPS}


@pytest.fixture(scope='module')
def definitions():
  """Of the demo's test split, which no packaged model was trained on."""
  rows = read_jsonl(ZOO / 'demo' / 'test.jsonl')
  return [row['definition'] for row in rows]


def test_they_are_few_and_small():
  assert load.packaged_names() == ['nano', 'pico', 'pico_0', 'pico_100', 'pico_200', 'pico_400']
  assert sum(file.stat().st_size for file in ZOO.rglob('*') if file.is_file()) < 25e6


def test_the_sizes_are_a_ladder(adapted):
  nano = load_backbone('nano')
  assert (adapted[800].num_params, nano.num_params) == (825_344, 3_884_320)
  assert len({backbone.fingerprint for backbone in (nano, *adapted.values())}) == 6
  assert {backbone.vocabulary.path for backbone in adapted.values()} == {nano.vocabulary.path}
  assert [ladder.adaptation_steps(adapted[steps].source) for steps in STEPS] == list(STEPS)
  assert [adapted[steps].name for steps in STEPS[:-1]] == [f'pico_{n}' for n in STEPS[:-1]]


def test_adaptation_teaches_to_go_on(adapted, definitions):
  before, *after = [_loss_of_second_halves(adapted[steps], definitions) for steps in STEPS]
  assert before > 7.5 and max(after) < 6.2


def test_a_command_takes_a_step_of_it(capsys, elsewhere):
  flags = ['--gin_file=demo', '--gin_file=models/pico', '--gin.ADAPTATION_STEPS=100', '--dry_run']
  assert cli.main(['evaluate', *flags]) == 0
  assert 'pico_100' in capsys.readouterr().out


def _loss_of_second_halves(backbone, texts) -> float:
  """Loss per token of the second half of each text after its first, as prefix LM has it."""
  ids = [backbone.vocabulary.encode(text) for text in texts]
  halves = [(tokens[: len(tokens) // 2], tokens[len(tokens) // 2 :]) for tokens in ids]
  inputs, targets = (
      np.stack([np.pad(tokens[:16], (0, 16 - len(tokens[:16]))) for tokens in side])
      for side in zip(*halves)
  )
  weights = (targets > 0).astype(np.int32)
  batch = Batch(inputs, np.pad(targets[:, :-1], ((0, 0), (1, 0))), targets, weights)
  apply = jax.jit(lambda params, batch: backbone.module.apply({'params': params}, batch))
  logits = apply(backbone.params, jax.tree.map(jnp.asarray, batch))
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
  return float(jnp.sum(losses * weights) / weights.sum())
