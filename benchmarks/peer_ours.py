"""This library's side of `peers.py`: a process that works when it is told to."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

ANSWERS = os.fdopen(os.dup(1), 'w')
os.dup2(2, 1)  # What libraries print is no answer.

from prompt_tuning_jax.host_memory import keep_freed_memory

keep_freed_memory()  # As commands do.

import jax
import jax.numpy as jnp
import numpy as np
from load_backbone import config_of

from prompt_tuning_jax import costs, targets
from prompt_tuning_jax.backbones.t5 import T5
from prompt_tuning_jax.checkpoints import hf, names
from prompt_tuning_jax.checkpoints.source import Weights
from prompt_tuning_jax.data.batches import EvalBatches, TrainBatches
from prompt_tuning_jax.data.tokenized_task import TokenizedTask
from prompt_tuning_jax.data.vocabulary import Vocabulary
from prompt_tuning_jax.evaluation import ranking
from prompt_tuning_jax.evaluation.decoding import Decoding
from prompt_tuning_jax.methods import method as method_lib
from prompt_tuning_jax.methods.soft_prompt import SoftPrompt
from prompt_tuning_jax.training import trainable as trainable_lib
from prompt_tuning_jax.training.optimizers import adafactor
from prompt_tuning_jax.training.step import TrainState, make_loss_fn, make_train_step

ROUNDS, DECODED, INPUTS = 4, 8, 512


def initial_prompt(length: int, width: int) -> np.ndarray:
  """The prompt [P, D] that both sides begin with."""
  return np.random.default_rng(length).uniform(-0.5, 0.5, (length, width)).astype(np.float32)


class Ours:
  """The model, and the work that was asked for last."""

  def __init__(self, settings: dict[str, Any]):
    self._settings = settings
    with open(settings['tokens']) as file:
      self._tokens = json.load(file)
    self._vocabulary = Vocabulary(settings['vocabulary'])
    self._module = T5(
        config_of(settings['size']),
        dtype=jnp.dtype(settings['dtype']),
        remat=settings['remat'],
    )
    params = jax.jit(self._module.init_params)(jax.random.key(0))
    params = jax.tree.map(lambda x: x.astype(settings['dtype']), params)
    config = self._module.config
    flat = names.flatten_to_t5x(jax.device_get(params), config)
    hf.write_hf(settings['weights'], config, Weights.of(flat))
    self._params = params
    choices = self._tokens['choices']
    self._choices_CT = np.zeros((len(choices), max(map(len, choices))), np.int32)
    for row, ids in zip(self._choices_CT, choices):
      row[: len(ids)] = ids

  def description(self) -> dict[str, Any]:
    device = jax.devices()[0]
    flops = None
    if device.platform != 'cpu':
      flops = targets.parse(_target_name(device.device_kind)).flops
    text = f'jax {jax.__version__}, {device.device_kind}, {self._settings["lengths"]}'
    return {'text': text, 'peak_flops': flops}

  def prepare(
      self, task: str, kind: str, prompt_length: int, batch_size: int
  ) -> dict[str, Any]:
    """Compiles what the work needs, and computes what the other side is to find too."""
    start = time.perf_counter()
    rows = self._tokens[task]
    tokenized = TokenizedTask.from_examples(rows, self._vocabulary, name=task)
    common = dict(
        feature_lengths={'inputs': INPUTS, 'targets': tokenized.longest('targets')},
        vocab_size=self._module.config.vocab_size,
        num_virtual_tokens=prompt_length,
    )
    method = SoftPrompt(prompt_length)
    prompt = initial_prompt(prompt_length, self._module.config.d_model)
    if kind == 'train':
      work = self._train(tokenized, method, prompt, batch_size, common)
    else:
      work = self._evaluate(kind, tokenized, rows, method, prompt, batch_size, common)
    rows, self._run, values = work
    seconds = time.perf_counter() - start
    flops = self._flops(kind, method, tokenized, rows) if self.description()['peak_flops'] else []
    return {'rows': rows, 'values': values, 'seconds': seconds, 'flops': flops}

  def _train(self, tokenized, method, prompt, batch_size, common):
    batches = TrainBatches(
        tokenized, batch_size, lengths=self._settings['lengths'], seed=0, **common
    )
    tx = adafactor()
    params = {'backbone': self._params, 'prompt': {'prompt': jnp.asarray(prompt)}}
    trainable, frozen = trainable_lib.split(params, {'prompt': tx})
    state = TrainState.create(trainable, tx)
    step = make_train_step(method, self._module, tx)
    each = len(tokenized) // ROUNDS // batch_size
    steps = [range(number * each, (number + 1) * each) for number in range(ROUNDS)]
    rows = [[[i for _, i in batches.rows(step)] for step in of_round] for of_round in steps]
    first = batches[0]
    loss, _ = jax.jit(make_loss_fn(method, self._module, _plain_loss()))(
        state.trainable, frozen, first, first.decoder_loss_weights
    )
    values = [float(loss) / int(np.sum(first.decoder_loss_weights))]

    def run(number: int, seen: set | None = None) -> None:
      nonlocal state
      for index in steps[number]:
        batch = batches[index]
        if seen is None or is_new(batch.encoder_input_tokens, seen):
          state, metrics = step(state, frozen, batch)
      jax.block_until_ready(state)

    seen: set = set()
    for number in range(self._settings['rounds']):  # Compiles every shape that will come.
      run(number, seen)
    return rows, run, values

  def _evaluate(self, kind, tokenized, rows, method, prompt, batch_size, common):
    lengths = dict(lengths='bucket', **common)
    widths = EvalBatches(tokenized, batch_size, **lengths).widths
    each = len(rows) // ROUNDS
    parts = [range(number * each, (number + 1) * each) for number in range(ROUNDS)]
    batches = [
        EvalBatches(
            TokenizedTask.from_examples([rows[i] for i in part], self._vocabulary),
            batch_size,
            buckets=widths,
            **lengths,
        )
        for part in parts
    ]
    injection = method.apply({'params': {'prompt': jnp.asarray(prompt)}}, self._module.spec)
    model = (self._module, self._params)

    def results(number: int, seen: set | None = None) -> np.ndarray:
      """[examples, choices] scores or [examples, tokens], in the order of the examples."""
      found: list[Any] = [np.zeros(1)] * each
      for batch, indices in batches[number]:
        inputs_BS = batch.encoder_input_tokens
        if seen is not None and not is_new(inputs_BS, seen):
          continue
        if kind == 'rank':
          answers = ranking.score_choices(*model, inputs_BS, self._choices_CT, injection)
        else:
          decoded = Decoding(max_length=DECODED)(*model, inputs_BS, injection)
          answers = decoded.tokens_BKT[:, -1]
        for index, answer in zip(indices, np.asarray(answers)):
          found[index] = answer
      return np.stack(found) if seen is None else None

    seen: set = set()
    for number in range(self._settings['rounds']):  # Compiles every shape that will come.
      results(number, seen)
    values = results(0).ravel().astype(float).tolist()
    in_batches = [
        [list(part[start : start + batch_size]) for start in range(0, each, batch_size)]
        for part in parts
    ]
    return in_batches, results, values

  def _flops(self, kind, method, tokenized, rows) -> list[float]:
    """FLOPs of each round's training, were no batch wider than its longest example."""
    if kind != 'train':
      return []

    counted: dict[tuple[int, int], float] = {}
    lengths = np.minimum(tokenized.lengths('inputs'), INPUTS)

    def of_batch(indices: list[int]) -> float:
      shape = len(indices), int(lengths[indices].max())
      if shape not in counted:
        tx = adafactor()
        prompt = jax.ShapeDtypeStruct((method.length, self._module.config.d_model), jnp.float32)
        params = {'backbone': self._params, 'prompt': {'prompt': prompt}}
        trainable, frozen = trainable_lib.split(params, {'prompt': tx})
        state = jax.eval_shape(lambda tree: TrainState.create(tree, tx), trainable)
        step = make_train_step(method, self._module.clone(remat='none'), tx)
        batch = method_lib.batch_shapes(method, *shape, tokenized.longest('targets'))
        counted[shape] = costs.count(step, state, frozen, batch).flops
      return counted[shape]

    return [sum(map(of_batch, of_round)) for of_round in rows]

  def run(self, round: int) -> dict[str, Any]:
    start = time.perf_counter()
    self._run(round)
    return {'seconds': time.perf_counter() - start}

  def memory(self) -> dict[str, Any]:
    stats = jax.devices()[0].memory_stats() or {}
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {'peak_bytes': stats.get('peak_bytes_in_use', own)}


def _plain_loss():
  from prompt_tuning_jax.training.losses import LossConfig

  return LossConfig(z_loss=0.0)


def _target_name(device_kind: str) -> str:
  """'H100-80GB' of 'NVIDIA H100 80GB HBM3'."""
  kind = device_kind.removeprefix('NVIDIA ').replace(' ', '-')
  return '-'.join(kind.split('-')[:2])


def is_new(array: np.ndarray, seen: set) -> bool:
  """Whether no array of this shape was seen, which it is from now on."""
  new = array.shape not in seen
  seen.add(array.shape)
  return new


def answer(ask: Callable[..., dict[str, Any]], **details: Any) -> None:
  print(json.dumps(ask(**details)), file=ANSWERS, flush=True)


def main() -> None:
  side = Ours(json.loads(sys.argv[1]))
  answer(side.description)
  for line in sys.stdin:
    details = json.loads(line)
    answer(getattr(side, details.pop('what')), **details)


if __name__ == '__main__':
  main()
