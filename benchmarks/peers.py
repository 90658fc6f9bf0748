"""This library against PEFT: training, ranking and decoding on SuperGLUE's own lengths.

  pip install torch transformers peft
  python benchmarks/peers.py --vocabulary spiece.model --output peers.jsonl

Both sides hold the same weights (T5 1.1 with random numbers) and the same prompt, and see the
same examples: the first 256 of each task's training split, as T5 has them in text. Each side
is a process that stays alive; they take turns, a quarter of the examples at a time, so that
whatever slows the machine slows both. A side works as its users do:

  ours   batches padded to a few widths (LENGTHS='bucket') or packed, one compiled program
         for each; ranking encodes an input once for all choices, and takes the longest
         examples first; decoding keeps keys and values.
  PEFT   PeftModel on transformers' T5, batches padded to their longest example; ranking is a
         pass for each choice; decoding is `generate`.

The kinds of work: `train` is a step of the prompt (its optimiser included), `rank` scores two
answers for each input, `decode` generates eight tokens greedily. There is no dropout. What
both compute is compared first: the loss, the scores, the tokens.

Printed are examples a second on both sides and their ratio, the median of the turns, and the
geometric mean of the ratios over the tasks. Compilation, and PEFT's first step, are not
counted and are given apart. Results are added to --output as they come; what stands there
already, of the same sizes and settings, is not measured again. A row ends in ! where both sides
do not find the same.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

TASKS = {
    'boolq': 'taskless_super_glue_boolq_v102',
    'cb': 'taskless_super_glue_cb_v102',
    'copa': 'taskless_super_glue_copa_v102',
    'multirc': 'taskless_super_glue_multirc_v102',
    'record': 'taskless_super_glue_record_v102',
    'rte': 'taskless_super_glue_rte_v102',
    'wic': 'taskless_super_glue_wic_v102',
    'wsc': 'taskless_super_glue_wsc_v102_simple_train',
}
KINDS = ('train', 'rank', 'decode')
CASE = ('task', 'kind', 'prompt_length', 'batch_size')
# How much of a loss, a score, or the share of the tokens may differ.
TOLERANCE = {'float32': 1e-3, 'bfloat16': 0.1}
# CB has 250 examples to train on, and no batch is to be filled up.
EXAMPLES, CHOICES = 256, ('True', 'False')
HERE = os.path.dirname(os.path.abspath(__file__))


def write_tokens(path: str, vocabulary_path: str) -> None:
  """Writes the examples' token ids, and those of the two answers, as JSON."""
  from prompt_tuning_jax.data.cache import load_task
  from prompt_tuning_jax.data.vocabulary import Vocabulary

  vocabulary = Vocabulary(vocabulary_path)
  tokens: dict[str, Any] = {
      'choices': [[*vocabulary.encode(text), vocabulary.eos_id] for text in CHOICES]
  }
  for short, name in TASKS.items():
    task = load_task(name, 'train', vocabulary)
    # A task with fewer examples begins again.
    rows = [task[index % len(task)] for index in range(EXAMPLES)]
    tokens[short] = [{key: ids.tolist() for key, ids in row.items()} for row in rows]
  with open(path, 'w') as file:
    json.dump(tokens, file)


class Side:
  """A process that is asked in JSON, a line each way."""

  def __init__(self, python: str, script: str, settings: Mapping[str, Any]):
    environment = os.environ | {'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'}
    self._process = subprocess.Popen(
        [python, os.path.join(HERE, script), json.dumps(settings)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    self.description = json.loads(self._line())

  def ask(self, what: str, **details: Any) -> dict[str, Any]:
    self._process.stdin.write(json.dumps({'what': what, **details}) + '\n')
    self._process.stdin.flush()
    return json.loads(self._line())

  def _line(self) -> str:
    line = self._process.stdout.readline()
    if not line:
      sys.exit(f'{self._process.args[1]} ended with status {self._process.wait()}.')
    return line


def measure(ours: Side, peft: Side, case: Mapping[str, Any], rounds: int) -> dict[str, Any]:
  """Rounds of one kind of work in turns, after both computed the same."""
  prepared = ours.ask('prepare', **case)
  rows = prepared['rows']
  other = peft.ask('prepare', **case, rows=rows)
  result = dict(case)
  result['difference'] = difference(case['kind'], prepared['values'], other['values'])
  result['first_seconds'] = [prepared['seconds'], other['seconds']]
  seconds: dict[str, list[float]] = {'ours': [], 'peft': []}
  for number in range(rounds):
    turns = [('ours', ours), ('peft', peft)]
    for name, side in turns if number % 2 == 0 else reversed(turns):
      seconds[name].append(side.ask('run', round=number)['seconds'])
  examples = sum(map(len, rows[0]))
  result['seconds'] = seconds
  result['examples'] = examples
  result['ratio'] = statistics.median(
      other / own for own, other in zip(seconds['ours'], seconds['peft'], strict=True)
  )
  if prepared['flops'] and ours.description['peak_flops']:
    # Of the same work: a batch no wider than its longest example.
    for name in seconds:
      share = sum(prepared['flops'][:rounds]) / sum(seconds[name])
      result[f'{name}_utilization'] = share / ours.description['peak_flops']
  result['peak_bytes'] = [side.ask('memory')['peak_bytes'] for side in (ours, peft)]
  return result


def difference(kind: str, ours: Sequence[float], other: Sequence[float]) -> float:
  """The largest of what both sides found; of tokens the share that is not the same."""
  if kind == 'decode':
    return statistics.fmean(a != b for a, b in zip(ours, other, strict=True))
  return max(abs(a - b) for a, b in zip(ours, other, strict=True))


def geometric_mean(values: Sequence[float]) -> float:
  return math.exp(statistics.fmean(map(math.log, values)))


def print_tables(results: Sequence[Mapping[str, Any]]) -> None:
  """A table for each kind of work, prompt length and batch size: tasks and their ratios."""
  tables = collections.defaultdict(list)
  for result in results:
    tables[result['kind'], result['prompt_length'], result['batch_size']].append(result)
  for (kind, length, rows), of_tasks in sorted(tables.items()):
    print(f'\n{kind}, P = {length}, batches of {rows}')
    print(f'  {"task":<10}{"ours/s":>9}{"PEFT/s":>9}{"ratio":>8}{"difference":>13}')
    for result in of_tasks:
      own, other = (
          result['examples'] / statistics.median(result['seconds'][name])
          for name in ('ours', 'peft')
      )
      print(
          f'  {result["task"]:<10}{own:9.2f}{other:9.2f}{result["ratio"]:8.2f}'
          f'{result["difference"]:13.1e}'
          + ' !' * (result['difference'] > TOLERANCE[result['settings']['dtype']])
      )
    mean = geometric_mean([result['ratio'] for result in of_tasks])
    print(f'  geometric mean of {len(of_tasks)} tasks{mean:9.2f}')


def main() -> None:
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--vocabulary', required=True, help="T5's SentencePiece model")
  parser.add_argument('--output', required=True, help='JSON lines of results')
  parser.add_argument('--tokens', help='token ids, written by an earlier run with this flag')
  parser.add_argument('--size', default='small', help='of T5 1.1: small to xxl')
  parser.add_argument('--dtype', default='float32', help='float32 or bfloat16, of both sides')
  parser.add_argument('--lengths', default='bucket', help='how ours lays batches')
  parser.add_argument('--remat', default='none', help='of ours; PEFT keeps all activations')
  parser.add_argument('--compile_peft', action='store_true', help='torch.compile for PEFT')
  parser.add_argument('--peft_python', default=sys.executable, help='its interpreter')
  parser.add_argument('--tasks', nargs='+', default=list(TASKS), choices=TASKS)
  parser.add_argument('--kinds', nargs='+', default=list(KINDS), choices=KINDS)
  parser.add_argument('--prompt_lengths', nargs='+', type=int, default=[20, 100])
  parser.add_argument('--batch_sizes', nargs='+', type=int, default=[32, 8])
  parser.add_argument('--rounds', type=int, default=4, help='turns, 4 for all examples')
  args = parser.parse_args()
  settings = {
      key: getattr(args, key)
      for key in ('size', 'dtype', 'lengths', 'remat', 'compile_peft', 'rounds')
  }
  done = {}
  if os.path.exists(args.output):
    with open(args.output) as file:
      done = {
          tuple(result[key] for key in CASE): result
          for result in map(json.loads, file)
          if result['settings'] == settings
      }
  wanted = [
      dict(zip(CASE, (task, kind, length, rows)))
      for kind in args.kinds
      for length in args.prompt_lengths
      for rows in args.batch_sizes
      for task in args.tasks
  ]
  if missing := [case for case in wanted if tuple(case.values()) not in done]:
    with tempfile.TemporaryDirectory() as folder:
      tokens = args.tokens or os.path.join(folder, 'tokens.json')
      if not os.path.exists(tokens):
        write_tokens(tokens, args.vocabulary)
      told = settings | dict(
          tokens=tokens,
          vocabulary=args.vocabulary,
          weights=os.path.join(folder, 'weights'),
      )
      ours = Side(sys.executable, 'peer_ours.py', told)
      peft = Side(args.peft_python, 'peer_peft.py', told)
      print(f'ours: {ours.description["text"]}\nPEFT: {peft.description["text"]}', flush=True)
      for number, case in enumerate(missing, 1):
        result = measure(ours, peft, case, args.rounds)
        result['settings'] = settings
        result['sides'] = [side.description['text'] for side in (ours, peft)]
        done[tuple(case.values())] = result
        with open(args.output, 'a') as file:
          file.write(json.dumps(result) + '\n')
        print(
            f'{number}/{len(missing)} {case["kind"]} {case["task"]} P={case["prompt_length"]} '
            f'B={case["batch_size"]}: {result["ratio"]:.2f}',
            file=sys.stderr,
            flush=True,
        )
  print_tables([done[tuple(case.values())] for case in wanted])


if __name__ == '__main__':
  main()
