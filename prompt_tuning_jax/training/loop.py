"""The loop around a train step: resume, train, log, save, evaluate, stop cleanly.

Prompt tuning, model tuning and pretraining all run this one loop; they differ in what
`training/trainable.py` calls trainable and in where the batches come from.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import tqdm

from prompt_tuning_jax import processes
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

  def __post_init__(self):
    for name, least in (
        ('train_steps', 1), ('log_period', 1), ('eval_period', 0), ('checkpoint_period', 0)
    ):
      if getattr(self, name) < least:
        raise ValueError(f'{name} is {getattr(self, name)}; it has to be at least {least}.')

  def evaluates_at(self, step: int) -> bool:
    """Whether the state after this many updates is to be evaluated."""
    return step == self.train_steps or _is_multiple(step, self.eval_period)

  def saves_at(self, step: int) -> bool:
    """Whether the state after this many updates is to be saved."""
    return self.evaluates_at(step) or _is_multiple(step, self.checkpoint_period)


def _is_multiple(step: int, period: int) -> bool:
  return period > 0 and step > 0 and step % period == 0


class OutOfBounds(FloatingPointError):
  """A loss, a gradient or a parameter is not finite.

  Attributes:
    step: the first step of which that is known.
  """

  def __init__(self, message: str, step: int):
    super().__init__(message)
    self.step = step


class Interrupted(Exception):
  """SIGTERM or SIGINT came, to any process; the state was saved before this was raised."""


def run(
    start: Callable[[], TrainState],
    frozen: PyTree,
    train_step: Callable[[TrainState, PyTree, Batch], tuple[TrainState, dict]],
    batches: Batches,
    config: LoopConfig,
    *,
    saver: StateSaver,
    template: TrainState,
    evaluate: Callable[[TrainState], Mapping[str, float]] | None = None,
    source_name: Callable[[int], str] | None = None,
    summarize: Callable[[list[dict[str, Any]]], dict[str, float]] | None = None,
    description: dict[str, Any] | None = None,
    progress: bool = True,
) -> TrainState:
  """Trains until `config.train_steps`, from the newest state in the saver's folder.

  A run that is stopped and started again goes on as if it had never stopped: its
  state is restored to the bit, and batches and dropout are functions of the step.

  Args:
    start: makes the state before the first step, where none was saved; the devices never hold
      both it and a restored one.
    frozen: the tree that is not differentiated.
    train_step: see `training.step.make_train_step`.
    batches: `batches[step]` is the batch of that step, counted from 0.
    config: lengths and periods.
    saver: where states are saved to and restored from.
    template: shapes, types and places of a state, to restore one.
    evaluate: called with the state at every evaluation; its numbers are logged and kept
      beside the state, and the saver keeps the best state by them.
    source_name: name of the mixture component that a step's batch comes from; the loss of
      each is then logged as well.
    summarize: what is logged of the metrics of several steps, `loss_per_token` of all at least;
      default: `summary_of`.
    description: what the states belong to, kept beside each of them.
    progress: whether to show the progress line; the main process does.

  Returns:
    The state after the last step.

  Raises:
    OutOfBounds: if the loss or a parameter is not finite; the last good state stays saved.
    Interrupted: after SIGTERM or SIGINT, once the state is saved.
  """
  processes.check_same(dataclasses.asdict(config), 'steps and periods')
  restored = saver.restore(template)
  state = start() if restored is None else restored[0]
  del restored
  step = int(state.step)
  if step > config.train_steps:
    warnings.warn(
        f'{saver.model_dir} holds a run of {step:,} steps already, more than the '
        f'{config.train_steps:,} asked for. Nothing is trained.',
        stacklevel=2,
    )
  # A run may have been killed after its state was saved and before that was evaluated.
  unmeasured = (
      evaluate is not None and config.evaluates_at(step) and not saver.metrics(step)
  )
  if step >= config.train_steps and not unmeasured:
    return state

  any_process = processes.AnyProcess()
  with _Log(saver, step, config, source_name, summarize, progress) as log, _Stop() as stop:

    def interrupted() -> Interrupted:
      return Interrupted(
          f'Stopped at step {step} of {config.train_steps}; its state is in '
          f'{saver.path(step)}. Run the same command again to go on.'
      )

    def evaluate_state() -> None:
      # Its state is saved: a process that is alone need not finish what may take minutes.
      with stop.at_once(interrupted) if jax.process_count() == 1 else contextlib.nullcontext():
        metrics = evaluate(state)
      log.write(step, {f'eval/{name}': value for name, value in metrics.items()})
      saver.record_metrics(step, metrics)
      if any_process(stop.requested):
        raise processes.shared(interrupted())

    if unmeasured:
      evaluate_state()
    while step < config.train_steps:
      log.begin_step()
      state, metrics = train_step(state, frozen, batches[step])
      step += 1
      log.end_step(step, metrics)
      stopping = any_process(stop.requested)
      saving = stopping or config.saves_at(step)
      if saving or step % config.log_period == 0:
        log.flush(state)  # Raises where the state is not fit to be saved.
      if saving:
        saver.save(step, state, description=description)
      if stopping:
        raise processes.shared(interrupted())
      if evaluate is not None and config.evaluates_at(step):
        evaluate_state()
    if any_process(stop.requested):  # While the last state was saved.
      raise processes.shared(interrupted())
  return state


class _Stop:
  """Takes SIGTERM and SIGINT, which then do not end the process in mid-step.

  A second SIGINT does what it always did.

  Attributes:
    requested: whether one of them came.
  """

  def __init__(self):
    self.requested = False
    self._error: Callable[[], Exception] | None = None
    self._previous: dict[int, Any] = {}

  def __enter__(self) -> _Stop:
    # Python lets no other thread take signals.
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGTERM, signal.SIGINT):
        self._previous[number] = signal.signal(number, self._take)
    return self

  def __exit__(self, *exception: object) -> None:
    for number, handler in self._previous.items():
      # None is a handler that was not set from Python.
      signal.signal(number, handler or signal.SIG_DFL)

  @contextlib.contextmanager
  def at_once(self, error: Callable[[], Exception]) -> Iterator[None]:
    """What runs within is given up when a signal comes, by this error."""
    self._error = error
    try:
      yield
    finally:
      self._error = None

  def _take(self, number: int, frame: Any) -> None:
    del frame
    self.requested = True
    if number == signal.SIGINT:
      signal.signal(number, self._previous[number] or signal.SIG_DFL)
    if self._error is not None:
      error, self._error = self._error, None
      raise error()
    if number == signal.SIGINT:
      # Not through sys.stderr, which the signal may have found in the middle of a line. Who reads
      # it (`| tee`) has had the same signal and may be gone: no reason to lose the state.
      with contextlib.suppress(OSError):
        os.write(2, b'\nStopping after this step; Ctrl-C again stops at once.\n')


class _Log:
  """Collects the metrics of steps, and checks, sums up, shows and writes them."""

  def __init__(
      self,
      saver: StateSaver,
      step: int,
      config: LoopConfig,
      source_name: Callable[[int], str] | None,
      summarize: Callable[[list[dict[str, Any]]], dict[str, float]] | None,
      progress: bool,
  ):
    self._saver = saver
    self._summarize = summarize or summary_of
    self._source_name = source_name
    self._pending: list[tuple[int, dict]] = []  # Metrics still on the device.
    self._seconds = 0.0
    self._writer = None
    if processes.is_main():
      self._writer = MetricsWriter(saver.model_dir, resume_step=step)
    # A terminal is redrawn often, a log file gets a line now and then.
    interval = 0.2 if sys.stderr.isatty() else 30.0
    self._bar = tqdm.tqdm(
        total=config.train_steps,
        initial=step,
        unit='step',
        disable=not (progress and processes.is_main()),
        file=sys.stderr,
        mininterval=interval,
        maxinterval=max(interval, 10.0),
        dynamic_ncols=True,
    )

  def __enter__(self) -> _Log:
    return self

  def __exit__(self, *exception: object) -> None:
    with contextlib.suppress(OSError):
      self._bar.close()
    if self._writer is not None:
      self._writer.close()

  def begin_step(self) -> None:
    """Starts the clock; what is done between two steps does not count."""
    self._started = time.perf_counter()

  def end_step(self, step: int, metrics: dict) -> None:
    """Takes a step's metrics and waits for the step before it.

    The device always has a step to compute, but never so many that a signal to stop
    would find the host far ahead of it.
    """
    self._pending.append((step, metrics))
    if len(self._pending) > 1:
      jax.block_until_ready(self._pending[-2][1])
    self._seconds += time.perf_counter() - self._started
    with contextlib.suppress(OSError):  # Nobody reads it any more.
      self._bar.update()

  def flush(self, state: TrainState) -> None:
    """Checks and writes the metrics of the steps since the last record.

    Raises:
      OutOfBounds: if one of the losses, or a parameter, is not finite.
    """
    waited = time.perf_counter()
    steps = [step for step, _ in self._pending]
    fetched = jax.device_get([metrics for _, metrics in self._pending])
    self._seconds += time.perf_counter() - waited
    if not (all(math.isfinite(m['loss']) for m in fetched) and is_finite(state.trainable)):
      raise processes.shared(self._out_of_bounds(steps, fetched))
    summary = self._summarize(fetched)
    summary['train/steps_per_second'] = len(fetched) / self._seconds
    if self._source_name is not None:
      names = [self._source_name(step - 1) for step in steps]
      for source in sorted(set(names)):
        of_source = [m for name, m in zip(names, fetched) if name == source]
        summary.update(per_token(f'train/{source}', of_source))
    self.write(steps[-1], summary)
    self._bar.set_postfix_str(f'loss {summary["train/loss_per_token"]:.3f}/token', refresh=False)
    self._pending.clear()
    self._seconds = 0.0

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    """Writes a record to metrics.jsonl and TensorBoard."""
    if self._writer is not None:
      self._writer.write(step, metrics)

  def _out_of_bounds(self, steps: list[int], fetched: list[dict]) -> OutOfBounds:
    """Which step went wrong: the first whose loss or gradient is not finite."""
    bad = [
        (step, m)
        for step, m in zip(steps, fetched)
        if not (math.isfinite(m['loss']) and math.isfinite(m['gradient_norm']))
    ]
    step, metrics = bad[0] if bad else (steps[-1], fetched[-1])
    updated = '' if bad else 'what it trains is not finite after its update, '
    source = f' (of {self._source_name(step - 1)})' if self._source_name else ''
    kept = self._saver.latest()
    return OutOfBounds(
        f'Step {step} went out of bounds: {updated}its loss is {metrics["loss"]:g}, the norm of '
        f'its gradient {metrics["gradient_norm"]:g}, its batch is batches[{step - 1}]{source}. '
        + (f'The last good state is {kept.path}. ' if kept else 'No state was saved yet. ')
        + 'Start again in another MODEL_DIR with a lower learning rate or another '
        'RANDOM_SEED.',
        step,
    )


def summary_of(steps: Sequence[Mapping[str, Any]]) -> dict[str, float]:
  """What is logged of the metrics of several steps of a run."""
  factor = sum(float(metrics['loss_factor']) for metrics in steps)
  norms = [float(metrics['gradient_norm']) for metrics in steps]
  return {
      'train/loss': sum(float(metrics['loss']) for metrics in steps) / max(factor, 1e-30),
      **per_token('train', steps),
      'train/gradient_norm': sum(norms) / len(norms),
  }


def per_token(prefix: str, steps: Sequence[Mapping[str, Any]]) -> dict[str, float]:
  """Means over the target tokens of several steps, by names that begin with `prefix`."""
  names = ('tokens', 'token_loss', 'token_z_loss', 'right_tokens')
  total = {name: sum(float(metrics[name]) for metrics in steps) for name in names}
  tokens = max(total['tokens'], 1)
  return {
      f'{prefix}/loss_per_token': total['token_loss'] / tokens,
      f'{prefix}/z_loss_per_token': total['token_z_loss'] / tokens,
      f'{prefix}/token_accuracy': total['right_tokens'] / tokens,
  }


@jax.jit
def is_finite(tree: PyTree) -> jax.Array:
  """Whether every number of a tree is."""
  return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()
