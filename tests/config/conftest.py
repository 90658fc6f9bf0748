"""What the tests of gin files and flags share."""

from __future__ import annotations

import pytest

from prompt_tuning_jax import config

# What `train` needs besides a backbone.
NEEDED = [
    'MODEL_DIR=/tmp/run',
    'MIXTURE_OR_TASK_NAME=some_task',
    "TASK_FEATURE_LENGTHS={'inputs': 8, 'targets': 4}",
]


@pytest.fixture(autouse=True)
def _elsewhere(elsewhere):
  """No test here reads a file of the working folder or another's configuration."""


@pytest.fixture
def flags(backbone_dir):
  return [*NEEDED, f'INITIAL_CHECKPOINT_PATH={backbone_dir}']


def file_names(parsed: config.Config) -> list[str]:
  """Every file that was read, as 'folder/file.gin'."""
  return ['/'.join(name.split('/')[-2:]) for name in parsed.files]
