"""What importing the package costs and brings along."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

import prompt_tuning_jax as ptj

_HEAVY = ('tensorflow', 'seqio', 'gin', 'torch', 'transformers')


def _run(code: str) -> str:
  result = subprocess.run(
      [sys.executable, '-c', code], capture_output=True, text=True, check=False
  )
  assert result.returncode == 0, result.stderr
  return result.stdout


def test_importing_the_package_is_fast_and_brings_no_framework():
  code = (
      'import sys, time; start = time.perf_counter()\n'
      'import prompt_tuning_jax\n'
      'print((time.perf_counter() - start, sorted(sys.modules)))'
  )
  seconds, modules = ast.literal_eval(_run(code))
  assert seconds < 2
  assert not set(modules) & {*_HEAVY, 'jax'}


def test_using_every_public_name_imports_neither_tensorflow_nor_gin():
  code = (
      'import sys\nimport prompt_tuning_jax as ptj\n'
      'values = [getattr(ptj, name) for name in ptj.__all__]\n'
      'assert all(value.__doc__ for value in values)\n'
      'print(sorted(sys.modules))'
  )
  modules = ast.literal_eval(_run(code))
  assert 'jax' in modules
  assert not set(modules) & set(_HEAVY)


def test_public_names_are_listed_and_others_are_refused():
  assert set(ptj.__all__) <= set(dir(ptj))
  assert set(ptj.__all__) == set(ptj._MODULES)
  with pytest.raises(AttributeError, match='train_prompt'):
    _ = ptj.train_prompt
