"""Time and host memory of loading a backbone from disk into the shards of a mesh.

  python benchmarks/load_backbone.py --size xl --format t5x hf --devices 4

A checkpoint of a published size is written once, with random numbers (XL in bfloat16: 5.7
GB for each format), and loaded in a process of its own on as many devices as are asked for;
on a CPU these share its memory. Printed are:

  read      plain reading of the same files, in GB/s: what the disk or its cache gives
  load      loading, in seconds and GB/s
  shards    bytes of the loaded weights, in GB
  over      the most host memory held beyond them while loading, in GB
  largest   the largest single array of the checkpoint, in GB; `over` should stay below
            this and 1 GB

Memory is the process's anonymous memory (RssAnon), sampled every 10 ms, above what it had
before loading: mapped files are the system's cache and not counted.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import threading
import time

SIZES = ('small', 'base', 'large', 'xl')  # of T5 1.1
GB = 1e9


def config_of(size: str):
  """The architecture of a published T5 1.1."""
  from prompt_tuning_jax.backbones.t5 import T5Config
  from prompt_tuning_jax.checkpoints import names

  d_model, d_kv, heads, encoder_layers, decoder_layers, d_ff = names.SIZES[f'T5 1.1 {size}']
  return T5Config(
      vocab_size=32128,
      d_model=d_model,
      num_heads=heads,
      d_kv=d_kv,
      d_ff=d_ff,
      num_encoder_layers=encoder_layers,
      num_decoder_layers=decoder_layers,
  )


def write(folder: str, size: str, format: str, dtype: str) -> None:
  """A checkpoint of random numbers, one array in memory at a time."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from prompt_tuning_jax.checkpoints import hf, names, t5x
  from prompt_tuning_jax.checkpoints.source import Box, Weights

  config = config_of(size)
  specs = {
      entry.t5x: jax.ShapeDtypeStruct(entry.shape, jnp.dtype(dtype))
      for entry in names.entries(config)
  }
  largest = max(math.prod(spec.shape) for spec in specs.values())
  numbers = np.random.default_rng(0).standard_normal(largest, np.float32).astype(dtype)

  def read(name: str, box: Box) -> np.ndarray:
    shape = specs[name].shape
    return np.roll(numbers[: math.prod(shape)], len(name)).reshape(shape)[box]

  if format == 'hf':
    hf.write_hf(folder, config, Weights(specs, read))
  else:
    t5x.write_t5x(folder, config, Weights(specs, read), step=1_100_000)


class Memory:
  """The most anonymous memory of this process while it runs, in bytes."""

  def __enter__(self) -> Memory:
    self.start = self.peak = self._now()
    self._stop = threading.Event()
    self._thread = threading.Thread(target=self._watch)
    self._thread.start()
    return self

  def __exit__(self, *_) -> None:
    self._stop.set()
    self._thread.join()

  def _watch(self) -> None:
    while not self._stop.wait(0.01):
      self.peak = max(self.peak, self._now())

  def _now(self) -> int:
    with open('/proc/self/status', encoding='utf-8') as file:
      line = next(line for line in file if line.startswith('RssAnon'))
    return int(line.split()[1]) * 1024


def load(folder: str, dtype: str, devices: int) -> dict[str, float]:
  """Loads the checkpoint in this process and says what it took."""
  import jax

  import prompt_tuning_jax as ptj
  from prompt_tuning_jax import partitioning
  from prompt_tuning_jax.checkpoints import load as load_lib

  checkpoint = load_lib.open_checkpoint(folder)
  largest = max(
      math.prod(s.shape) * s.dtype.itemsize for s in checkpoint.weights.specs.values()
  )
  mesh = partitioning.make_mesh(devices) if devices > 1 else None
  jax.block_until_ready(jax.numpy.zeros(1))  # The devices are there before the clock runs.
  with Memory() as memory:
    started = time.perf_counter()
    backbone = ptj.load_backbone(folder, dtype=dtype, mesh=mesh)
    params = jax.block_until_ready(backbone.params)
    seconds = time.perf_counter() - started
  shards = sum(
      shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards
  )
  return {
      'seconds': seconds,
      'shards': shards / GB,
      'over': (memory.peak - memory.start - shards) / GB,
      'largest': largest / GB,
  }


def plain_reading(folder: str) -> tuple[float, float]:
  """Seconds and GB of reading every file once."""
  buffer = bytearray(16 * 1024 * 1024)
  size, started = 0, time.perf_counter()
  for root, _, names in os.walk(folder):
    for name in names:
      with open(os.path.join(root, name), 'rb', buffering=0) as file:
        while count := file.readinto(buffer):
          size += count
  return time.perf_counter() - started, size / GB


def in_a_process(*arguments: str, devices: int = 1) -> str:
  """Runs a part of this script by itself and returns what it printed last."""
  flags = f'--xla_force_host_platform_device_count={devices}'
  env = os.environ | {'XLA_FLAGS': f'{os.environ.get("XLA_FLAGS", "")} {flags}'}
  command = [sys.executable, __file__, *arguments]
  printed = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout
  return printed.strip().rsplit('\n', 1)[-1]


def main() -> None:
  """Parses the command line, writes what is not there, and measures."""
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--size', choices=SIZES, default='large')
  parser.add_argument('--format', nargs='+', choices=('t5x', 'hf'), default=['t5x', 'hf'])
  parser.add_argument('--dtype', choices=('float32', 'bfloat16'), default='bfloat16')
  parser.add_argument('--devices', type=int, default=4)
  parser.add_argument('--folder', default='/tmp/load_backbone', help='of the checkpoints')
  parser.add_argument('--part', choices=('write', 'load'), help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.part == 'write':
    write(args.folder, args.size, args.format[0], args.dtype)
    return
  if args.part == 'load':
    print(json.dumps(load(args.folder, args.dtype, args.devices)))
    return
  print('format   read GB/s   load s   GB/s   shards GB   over GB   largest GB')
  for format in args.format:
    folder = os.path.join(args.folder, f'{args.size}_{args.dtype}_{format}')
    part = ('--format', format, '--size', args.size, '--dtype', args.dtype, '--folder', folder)
    if not os.path.exists(folder):
      os.makedirs(args.folder, exist_ok=True)
      in_a_process('--part', 'write', *part)
    plain_reading(folder)  # Once, so that both find the files in the system's cache.
    seconds, size = plain_reading(folder)
    arguments = ('--part', 'load', '--devices', str(args.devices), *part)
    found = json.loads(in_a_process(*arguments, devices=args.devices))
    print(
        f'{format:8} {size / seconds:9.2f} {found["seconds"]:8.1f}'
        f' {size / found["seconds"]:6.2f} {found["shards"]:11.2f} {found["over"]:9.2f}'
        f' {found["largest"]:12.2f}'
    )


if __name__ == '__main__':
  main()
