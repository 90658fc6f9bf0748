"""`prompt-tuning demo`: a prompt is trained, measured, saved, used and read, in minutes.

Nothing here is made for show: it is the recipe `recipes/demo.gin` run as the command
`train` runs it, and the functions that every user has.
"""

from __future__ import annotations

import collections
import os
import tempfile
import time

import jax

from prompt_tuning_jax import config
from prompt_tuning_jax.data.cache import load_task
from prompt_tuning_jax.evaluation.evaluate import EvalResult, evaluate
from prompt_tuning_jax.neighbors import nearest_words
from prompt_tuning_jax.training import trainable as trainable_lib
from prompt_tuning_jax.training.train import train

RECIPE = 'demo'
METRIC = 'accuracy'


def demo(model_dir: str | None = None) -> None:
  """Trains the demo's prompt and prints what came of it.

  Args:
    model_dir: where the run and its artifact go; a new temporary folder where None.
  """
  model_dir = model_dir or tempfile.mkdtemp(prefix='prompt-tuning-demo-')
  parsed = config.parse('train', [RECIPE], [f'MODEL_DIR={model_dir!r}'], [])
  kwargs = parsed.kwargs()
  backbone, method, task_name = kwargs['backbone'], kwargs['method'], kwargs['task']
  test = load_task(task_name, 'test', backbone.vocabulary)

  _heading('The task')
  print(f'{task_name}: {len(test):,} held-out test examples such as')
  for index in range(2):
    example = test.example(index)
    print(f'  {example["inputs_pretokenized"]!r} → {example["targets_pretokenized"]!r}')

  _heading('Before training')
  plain = evaluate(backbone, None, test, batch_size=128)
  start = method.init(jax.random.key(kwargs['random_seed']), backbone.spec)
  untrained = evaluate(
      backbone,
      method.apply(start, backbone.spec),
      test,
      batch_size=128,
      feature_lengths=kwargs['feature_lengths'],
  )
  print(f'without a prompt {plain.metrics[METRIC]:.1f} %, '
        f'with the untrained prompt {untrained.metrics[METRIC]:.1f} %')

  _heading('Training')
  started = time.perf_counter()
  result = train(**kwargs)
  seconds = time.perf_counter() - started
  tuned = evaluate(backbone, result.prompt, test, batch_size=128)

  _heading(f'{METRIC} on the {len(test):,} test examples')
  count = trainable_lib.count(result.params)
  rows = [
      ('majority class', _majority(test), 0),
      ('no prompt', plain.metrics[METRIC], 0),
      ('prompt, untrained', untrained.metrics[METRIC], 0),
      (f'prompt, {result.step:,} steps', tuned.metrics[METRIC], count),
  ]
  print(f'{"":24} {METRIC:>9} {"trained numbers":>16}')
  for name, score, trained in rows:
    print(f'{name:24} {score:8.1f} % {trained:>15,}')
  print(
      f'\ntrained in {seconds:.0f} s, {count:,} of {backbone.num_params:,} parameters '
      f'({100 * count / backbone.num_params:.2f} %)\n'
      f'artifact {result.path}: {os.path.getsize(result.path):,} bytes'
  )

  _heading('Five predictions')
  for prediction in _mixed(tuned):
    right = prediction['prediction'] == prediction['target']
    target = test.example(prediction['index'])['targets_pretokenized']
    print(
        f'{"✓" if right else "✗"} {prediction["prediction_text"]:14} {prediction["inputs"]}'
        + ('' if right else f'  [{target}]')
    )

  _heading('Nearest words of the first prompt positions (cosine)')
  words = nearest_words(backbone, result.prompt.injection, k=4)
  for position, neighbors in enumerate(words[:10]):
    near = '  '.join(f'{word.lstrip("▁")} {cosine:.2f}' for word, cosine in neighbors)
    print(f'{position:3}  {near}')

  _heading('Next')
  print(
      f'prompt-tuning infer --gin_file=demo --gin.PROMPT_FILE={result.path} \\\n'
      '  "definition: a small animal with long ears that eats grass"\n'
      'prompt-tuning train --help    # the recipes and what can be set'
  )


def _heading(text: str) -> None:
  print(f'\n{text}\n{"─" * len(text)}', flush=True)


def _majority(task) -> float:
  """Accuracy in percent of always answering the most frequent class."""
  counts = collections.Counter(task.target(index) for index in range(len(task)))
  return 100 * max(counts.values()) / len(task)


def _mixed(result: EvalResult, count: int = 5) -> list[dict]:
  """Predictions spread evenly over the split, as they come, right or wrong."""
  step = max(len(result.predictions) // count, 1)
  return result.predictions[::step][:count]
