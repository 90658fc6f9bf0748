"""Fixtures that every test may use: recorded values, real data, tiny models."""

from __future__ import annotations

import os
from pathlib import Path

# Tests compile much and compute little: what takes the compiler long is off.
QUICK_COMPILATION = (
    '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true '
    '--xla_cpu_use_fusion_emitters=false'
)


def cpu_devices(count: int) -> dict[str, str]:
  """Environment variables of a process that sees the CPU as so many devices."""
  flags = f'--xla_force_host_platform_device_count={count} {QUICK_COMPILATION}'
  return {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags}


# Before JAX is imported.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {cpu_devices(4)["XLA_FLAGS"]}'
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

import gin
import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from prompt_tuning_jax.backbones.t5 import T5, T5Config
from prompt_tuning_jax.typing import Batch
from tests import saved_backbone

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get('PTJ_SHARED', ROOT.parent / 'shared'))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """Files with slow tests come first, so that no processor waits for one at the end."""
  slow = {item.path for item in items if item.get_closest_marker('slow')}
  items.sort(key=lambda item: item.path not in slow)


def _shared(folder: str) -> Path:
  path = SHARED / folder
  if not path.is_dir():
    pytest.skip(
        f'needs the reference data {path}; set PTJ_SHARED to the folder that holds {folder}/'
    )
  return path


@pytest.fixture(scope='session', autouse=True)
def compiled_once(tmp_path_factory):
  """Keeps compiled programs for the session: many tests build the same one anew."""
  settings = {
      'jax_compilation_cache_dir': str(tmp_path_factory.mktemp('compiled')),
      'jax_persistent_cache_min_compile_time_secs': 0,
      'jax_persistent_cache_min_entry_size_bytes': -1,
  }
  before = {name: getattr(jax.config, name) for name in settings}
  for name, value in settings.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()
  yield
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


@pytest.fixture(scope='module', autouse=True)
def programs_let_go():
  """Programs of a file are dropped after it: each holds memory, and maps of it that Linux counts.

  A worker that kept all of them would near the limit of 65,530 maps a process, and crash there.
  """
  yield
  jax.clear_caches()


@pytest.fixture(scope='session', autouse=True)
def cache_of_its_own(tmp_path_factory):
  """Tasks are tokenised for the session: what lies in the user's cache changes no test."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('PTJ_CACHE_DIR', str(tmp_path_factory.mktemp('tokenized')))
    yield


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
  """An empty working folder; what gin was told is forgotten afterwards."""
  monkeypatch.chdir(tmp_path)
  yield
  gin.clear_config()


@pytest.fixture(scope='session')
def backbone_dir(tmp_path_factory) -> str:
  """A tiny random backbone on disk, for commands; not to be written to."""
  return saved_backbone.save(tmp_path_factory.mktemp('backbone') / 'tiny')


@pytest.fixture(scope='session')
def golden() -> Path:
  """Recorded values of the original implementations."""
  return _shared('golden')


@pytest.fixture(scope='session')
def shared_data() -> Path:
  """Real data sets, the T5 vocabulary, a real T5X checkpoint."""
  return _shared('data')


MINI_CONFIG = T5Config(
    vocab_size=256,
    d_model=32,
    num_heads=4,
    d_kv=8,
    d_ff=64,
    num_encoder_layers=3,
    num_decoder_layers=2,
)

# Nothing that code could confuse is equal: N·H is not D, the stacks differ in depth.
TINY_CONFIG = T5Config(
    vocab_size=64,
    d_model=16,
    num_heads=3,
    d_kv=4,
    d_ff=24,
    num_encoder_layers=2,
    num_decoder_layers=3,
)


@pytest.fixture(scope='session')
def tiny() -> tuple[T5, dict]:
  """A tiny T5 1.1 with random weights: (module, params)."""
  module = T5(TINY_CONFIG)
  return module, jax.jit(module.init_params)(jax.random.key(0))


@pytest.fixture
def tiny_batch() -> Batch:
  """Three rows of different lengths for the tiny model, without virtual tokens."""
  return random_batch(TINY_CONFIG.vocab_size, [7, 4, 5], [3, 2, 3])


def random_batch(
    vocab_size: int, input_lengths: list[int], target_lengths: list[int], seed: int = 0
) -> Batch:
  """A batch of random tokens, each row padded to the longest; every row ends in EOS."""
  rng = np.random.default_rng(seed)

  def rows(lengths):
    tokens = np.zeros((len(lengths), max(lengths)), np.int32)
    for row, length in zip(tokens, lengths):
      row[:length] = rng.integers(3, vocab_size, length)
      row[length - 1] = 1
    return tokens

  targets = rows(target_lengths)
  shifted = np.pad(targets[:, :-1], ((0, 0), (1, 0)))
  return Batch(rows(input_lengths), shifted, targets, (targets > 0).astype(np.int32))


def prepend_virtual(batch: Batch, vocab_size: int, length: int) -> Batch:
  """The batch with virtual tokens 0 … length-1 in front of every row."""
  rows = len(batch.encoder_input_tokens)
  virtual = np.tile(vocab_size + np.arange(length, dtype=np.int32), (rows, 1))
  return batch.replace(
      encoder_input_tokens=np.concatenate([virtual, batch.encoder_input_tokens], axis=1)
  )


def recorded_batch(recorded, prefix: str = 'batch/') -> Batch:
  """The batch of a recorded `.npz` case."""
  return Batch(
      *(
          np.asarray(recorded[prefix + name])
          for name in (
              'encoder_input_tokens',
              'decoder_input_tokens',
              'decoder_target_tokens',
              'decoder_loss_weights',
          )
      )
  )


def mini_params(golden: Path, name: str = 'mini_params.npz') -> dict:
  """The recorded random T5 1.1, stacked for `T5(MINI_CONFIG)`."""
  from prompt_tuning_jax.checkpoints import names

  flat = dict(np.load(golden / 't5x' / name))
  return names.stack_from_t5x(flat, names.config_from_shapes(flat))


def assert_close(actual, expected, relative: float = 1e-4, name: str = '') -> None:
  """Largest difference at most `relative` times the largest recorded magnitude."""
  actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
  assert actual.shape == expected.shape, f'{name}: {actual.shape} != {expected.shape}'
  scale = max(np.abs(expected).max(), 1e-12)
  difference = np.abs(actual - expected).max() / scale
  assert difference <= relative, f'{name}: differs by {difference:.2e} relative'
