"""A task whose examples are known by their first token, and batches of it."""

from prompt_tuning_jax.data.batches import EvalBatches, TrainBatches
from prompt_tuning_jax.data.tokenized_task import TokenizedTask

V = 500


def make_task(vocabulary, num_examples=50, name='numbers', split='train', longest=20):
  """Example i is known by its first token, 10 + i; lengths vary from 2 to `longest`."""
  return TokenizedTask.from_examples(
      [
          {
              'inputs': [10 + i, *[3] * (i * 7 % (longest - 1)), 1],
              'targets': [4 + i % 3, 1],
              'subject': f'thing {i}',
          }
          for i in range(num_examples)
      ],
      vocabulary,
      name=name,
      split=split,
  )


def train_batches(tasks, batch_size=8, **kwargs):
  kwargs = {
      'feature_lengths': {'inputs': 24, 'targets': 4},
      'vocab_size': V,
      'num_virtual_tokens': 3,
      **kwargs,
  }
  return TrainBatches(tasks, batch_size, **kwargs)


def eval_batches(task, batch_size=8, **kwargs):
  kwargs = {'feature_lengths': {'inputs': 24, 'targets': 4}, 'vocab_size': V, **kwargs}
  return EvalBatches(task, batch_size, **kwargs)
