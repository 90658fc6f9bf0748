"""What data cost beside a training step of T5 1.1 small: tokenising, reading, batching.

  python benchmarks/input_pipeline.py
  PTJ_LOCAL_DATA=FOLDER python benchmarks/input_pipeline.py --vocabulary=spiece.model \\
    --task=taskless_super_glue_boolq_v102 --split=validation

Prints one JSON line: seconds to import seqio and TensorFlow, to tokenise the split into an
empty cache, to load it from there, the median and the slowest of the batches that are made
for the first steps (milliseconds, of `batch_size` rows of up to 512 + P tokens, bucketed),
the median training step on such batches (random weights, float32) and the batches' share of
it. A run makes the next batch while the device computes, so that even this share is not lost
unless batches take longer than steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import train_step

INPUTS = 512


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
  """Seconds that a call takes, and what it returns."""
  start = time.perf_counter()
  result = call()
  return time.perf_counter() - start, result


def timed_step(vocab_size: int) -> Callable[[Any], Any]:
  """One step of T5 1.1 small's prompt, as a function of the batch."""
  import jax

  step, state, frozen = train_step.small_step(vocab_size)

  def call(batch: Any) -> None:
    nonlocal state
    state, metrics = step(state, frozen, batch)
    jax.block_until_ready((state, metrics))

  return call


def main() -> None:
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--task', default='demo_gloss_category')
  parser.add_argument('--split', default='train')
  parser.add_argument('--vocabulary', help="SentencePiece model; default: nano's")
  parser.add_argument('--batch_size', type=int, default=8)
  parser.add_argument('--batches', type=int, default=200, help='timed batches')
  parser.add_argument('--steps', type=int, default=5, help='timed steps')
  args = parser.parse_args()

  import prompt_tuning_jax as ptj
  from prompt_tuning_jax.data import seqio_source
  from prompt_tuning_jax.data.batches import TrainBatches
  from prompt_tuning_jax.data.cache import load_task
  from prompt_tuning_jax.data.vocabulary import Vocabulary

  where = args.vocabulary
  vocabulary = Vocabulary(where) if where else ptj.load_backbone('nano').vocabulary
  vocab_size = -(-vocabulary.size // 128) * 128
  importing, _ = timed(seqio_source.import_seqio)
  with tempfile.TemporaryDirectory() as cache:
    tokenizing, _ = timed(lambda: load_task(args.task, args.split, vocabulary, cache_dir=cache))
    loading, task = timed(lambda: load_task(args.task, args.split, vocabulary, cache_dir=cache))
    batches = TrainBatches(
        task,
        batch_size=args.batch_size,
        vocab_size=vocab_size,
        num_virtual_tokens=train_step.PROMPT,
        feature_lengths={'inputs': INPUTS, 'targets': task.longest('targets')},
        lengths='bucket',
        seed=0,
    )
    making = [timed(lambda step=step: batches[step])[0] for step in range(args.batches)]
    step_of = timed_step(vocab_size)
    for number in range(args.steps):  # Compiles whatever widths occur.
      step_of(batches[number])
    steps = [timed(lambda n=n: step_of(batches[n]))[0] for n in range(args.steps)]
  making_ms = [1000 * seconds for seconds in making]
  step_ms = 1000 * statistics.median(steps)
  numbers = {
      'examples': len(task),
      'import_s': importing,
      'tokenize_s': tokenizing,
      'load_s': loading,
      'batch_ms': statistics.median(making_ms),
      'slowest_batch_ms': max(making_ms),
      'step_ms': step_ms,
      'share_percent': 100 * statistics.median(making_ms) / step_ms,
  }
  print(json.dumps({'task': args.task, **{k: round(v, 3) for k, v in numbers.items()}}))


if __name__ == '__main__':
  main()
