"""The loop around a train step: resume, train, log, evaluate, save, stop cleanly.

Prompt tuning, model tuning and pretraining all run this one loop; they differ in what
`training/trainable.py` calls trainable and in where the batches come from.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import jax
import numpy as np
import tqdm

from prompt_tuning_jax.training.metrics_writer import MetricsWriter
from prompt_tuning_jax.training.state_saving import StateSaver
from prompt_tuning_jax.training.step import TrainState
from prompt_tuning_jax.typing import Batch, PyTree


class Batches(Protocol):
  """Batches as a pure function of the step."""

  def __getitem__(self, step: int) -> Batch: ...


@dataclasses.dataclass(frozen=True)
class LoopConfig:
  """How long to train and how often to do the rest; periods are in steps.

  Attributes:
    train_steps: total updates of the run, those before a resumption included.
    log_period: between records of the training loss.
    eval_period: between evaluations; 0 evaluates only at the end.
    checkpoint_period: between saved states; 0 saves at evaluations and at the end.
  """

  train_steps: int
  log_period: int = 50
  eval_period: int = 0
  checkpoint_period: int = 0


class Interrupted(Exception):
  """SIGTERM or SIGINT came; the state was saved before this was raised."""


@contextlib.contextmanager
def _stop_signal() -> Iterator[threading.Event]:
  """An event that SIGTERM and SIGINT set, instead of ending the process in mid-step."""
  event = threading.Event()
  if threading.current_thread() is not threading.main_thread():
    yield event
    return
  previous = {
      number: signal.signal(number, lambda *_: event.set())
      for number in (signal.SIGTERM, signal.SIGINT)
  }
  try:
    yield event
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)


def run(
    state: TrainState,
    frozen: PyTree,
    train_step: Callable[[TrainState, PyTree, Batch], tuple[TrainState, dict]],
    batches: Batches,
    config: LoopConfig,
    *,
    saver: StateSaver,
    evaluate: Callable[[TrainState], Mapping[str, float]] | None = None,
    source_name: Callable[[int], str] | None = None,
    description: dict[str, Any] | None = None,
    progress: bool = True,
) -> TrainState:
  """Trains until `config.train_steps`, from the newest state in the saver's folder.

  A run that is stopped and started again goes on as if it had never stopped: its
  state is restored to the bit, and batches and dropout are functions of the step.

  Args:
    state: the state before the first step, also the template for restoring.
    frozen: the tree that is not differentiated.
    train_step: see `training.step.make_train_step`.
    batches: `batches[step]` is the batch of that step.
    config: lengths and periods.
    saver: where states are saved to and restored from.
    evaluate: called with the state at every evaluation; its numbers are logged, and the
      saver keeps the best state by them.
    source_name: name of the mixture component that a step's batch comes from; the loss of
      each is then logged as well.
    description: what the states belong to, kept beside each of them.
    progress: whether to show the progress line.

  Returns:
    The state after the last step.

  Raises:
    FloatingPointError: if the loss is not finite; the last good state stays saved.
    Interrupted: after SIGTERM or SIGINT, once the state is saved.
  """
  restored = saver.restore(state)
  if restored is not None:
    host_state, _ = restored
    state = jax.tree.map(lambda new, old: jax.numpy.asarray(new, old.dtype), host_state, state)
  step = int(state.step)
  if step >= config.train_steps:
    return state
  writer = MetricsWriter(saver.model_dir, resume_step=step)
  bar = tqdm.tqdm(
      total=config.train_steps,
      initial=step,
      unit='step',
      disable=not progress,
      file=sys.stderr,
      # A terminal is redrawn often, a log file gets a line now and then.
      mininterval=0.2 if sys.stderr.isatty() else 30.0,
      dynamic_ncols=True,
  )
  pending: list[tuple[int, dict]] = []  # Metrics still on the device.

  def flush_metrics() -> None:
    """Fetches the metrics since the last record, checks and logs them."""
    nonlocal started
    if not pending:
      return
    fetched = jax.device_get([metrics for _, metrics in pending])
    for (at, _), metrics in zip(pending, fetched):
      if not math.isfinite(metrics['loss']):
        kept = saver.latest()
        raise FloatingPointError(
            f'The loss of step {at} is {metrics["loss"]}. '
            + (f'The last good state is {kept.path}. ' if kept else 'No state was saved yet. ')
            + f'Batch {at - 1} of the data set off the failure; lower the learning rate, or '
            'start again with another RANDOM_SEED.'
        )
    total = {name: np.sum([m[name] for m in fetched]) for name in fetched[0]}
    tokens = max(total['tokens'], 1)
    now = time.perf_counter()
    summary = {
        'train/loss': total['loss'] / max(total['loss_factor'], 1e-30),
        'train/loss_per_token': total['loss'] / tokens,
        'train/token_accuracy': total['right_tokens'] / tokens,
        'train/gradient_norm': total['gradient_norm'] / len(fetched),
        'train/steps_per_second': len(fetched) / (now - started),
    }
    started = now
    if source_name is not None:
      summary.update(_loss_by_source([source_name(at - 1) for at, _ in pending], fetched))
    writer.write(pending[-1][0], summary)
    bar.set_postfix_str(f'loss {summary["train/loss_per_token"]:.3f}/token', refresh=False)
    pending.clear()

  def save(metrics: Mapping[str, float] | None = None) -> None:
    saver.save(step, state, metrics=dict(metrics or {}), description=description)

  try:
    with _stop_signal() as stop:
      started = time.perf_counter()
      while step < config.train_steps:
        state, metrics = train_step(state, frozen, batches[step])
        step += 1
        pending.append((step, metrics))
        bar.update()
        last = step == config.train_steps
        due_eval = evaluate is not None and (
            last or (config.eval_period and step % config.eval_period == 0)
        )
        due_save = last or due_eval or (
            config.checkpoint_period and step % config.checkpoint_period == 0
        )
        if due_save or stop.is_set() or step % config.log_period == 0:
          flush_metrics()
        eval_metrics = None
        if due_eval and not stop.is_set():
          eval_metrics = evaluate(state)
          writer.write(step, {f'eval/{name}': v for name, v in eval_metrics.items()})
          started = time.perf_counter()
        if due_save or stop.is_set():
          save(eval_metrics)
        if stop.is_set() and not last:
          raise Interrupted(
              f'Stopped at step {step} of {config.train_steps}; its state is in '
              f'{saver.path(step)}. Run the same command again to go on.'
          )
  finally:
    bar.close()
    writer.close()
  return state


def _loss_by_source(names: list[str], fetched: list[dict]) -> dict[str, float]:
  """Loss per token of each mixture component that occurs among the steps."""
  losses: dict[str, float] = {}
  for name in sorted(set(names)):
    of_name = [metrics for at, metrics in zip(names, fetched) if at == name]
    tokens = sum(metrics['tokens'] for metrics in of_name)
    losses[f'train/{name}/loss_per_token'] = sum(m['loss'] for m in of_name) / max(tokens, 1)
  return losses
