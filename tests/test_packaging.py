"""The wheel holds all that the checkout has, and works where there is no checkout."""

from __future__ import annotations

import re
import shutil
import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from prompt_tuning_jax import config

ROOT = Path(__file__).resolve().parent.parent
PACKAGED = ('prompt_tuning_jax', 'gin', 'tasks')
OTHERS = ('setup.py', 'pyproject.toml', 'MANIFEST.in', 'LICENSE', 'README.md')

pytestmark = pytest.mark.skipif(
    not (ROOT / 'setup.py').is_file(), reason='needs a checkout: there is no setup.py'
)


def _run(*command: str | Path, cwd: Path) -> str:
  result = subprocess.run(
      list(map(str, command)), cwd=cwd, capture_output=True, text=True, check=False
  )
  assert result.returncode == 0, f'{result.stdout}\n{result.stderr}'
  return result.stdout


@pytest.fixture(scope='module')
def wheel(tmp_path_factory) -> Path:
  """The wheel, built from a copy so that nothing is left in the checkout."""
  folder = tmp_path_factory.mktemp('build')
  source = folder / 'source'
  for name in PACKAGED:
    shutil.copytree(
        ROOT / name, source / name, ignore=shutil.ignore_patterns('__pycache__')
    )
  for name in OTHERS:
    shutil.copy(ROOT / name, source / name)
  # fmt: off
  _run(
      sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps',
      '--no-build-isolation', '--wheel-dir', folder, source, cwd=folder,
  )
  # fmt: on
  (found,) = folder.glob('*.whl')
  return found


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_package_the_tasks_and_the_recipes(wheel):
  with zipfile.ZipFile(wheel) as archive:
    inside = set(archive.namelist())
  expected = set()
  installed_as = {
      'prompt_tuning_jax': 'prompt_tuning_jax',
      'gin': 'prompt_tuning_jax/gin_configs',
      'tasks': 'prompt_tuning_jax/tasks',
  }
  for folder, name in installed_as.items():
    for path in (ROOT / folder).rglob('*'):
      if path.is_file() and '__pycache__' not in path.parts:
        expected.add(f'{name}/{path.relative_to(ROOT / folder).as_posix()}')
  assert expected - inside == set()
  top = {name.split('/')[0] for name in inside}
  assert {name for name in top if not name.endswith('.dist-info')} == {'prompt_tuning_jax'}


@pytest.mark.slow
def test_the_wheel_installs_and_runs_where_there_is_no_checkout(wheel, tmp_path):
  environment = tmp_path / 'environment'
  venv.create(environment, with_pip=False)
  python = environment / 'bin' / 'python'
  # What the wheel depends on is taken from this environment: nothing is downloaded. The
  # `.pth` files in there, such as a checkout's, are not followed.
  (packages,) = environment.glob('lib/python*/site-packages')
  (packages / 'dependencies.pth').write_text('\n'.join(site.getsitepackages()))
  # fmt: off
  _run(
      sys.executable, '-m', 'pip', '--python', python, 'install', '--quiet',
      '--no-deps', '--no-index', wheel, cwd=tmp_path,
  )
  # fmt: on
  where = _run(python, '-c', 'import prompt_tuning_jax as p; print(p.__file__)', cwd=tmp_path)
  assert Path(where.strip()).is_relative_to(environment)
  command = environment / 'bin' / 'prompt-tuning'
  assert 'train' in _run(command, '--help', cwd=tmp_path)
  printed = _run(
      command, 'train', '--gin_file=demo', '--gin.MODEL_DIR=run', '--dry_run', cwd=tmp_path
  )
  assert 'demo_gloss_category' in printed
  tasks = 'import prompt_tuning_jax.tasks.demo as t; print(t.__file__)'
  assert str(environment) in _run(python, '-c', tasks, cwd=tmp_path)


def test_constraints_pin_each_dependency_once_per_python():
  lines = (ROOT / 'constraints.txt').read_text().splitlines()
  pins = [line for line in lines if line and not line.startswith('#')]
  assert all(re.fullmatch(r'[\w.-]+==[\w.]+(; python_version [<>=]+ "3\.12")?', p) for p in pins)
  setup = (ROOT / 'setup.py').read_text()
  needed = re.search(r'install_requires=\[(.*?)\n    \]', setup, re.DOTALL)[1]
  names = re.findall(r"'([\w-]+)", needed)
  pinned = {re.split('==', pin)[0].lower() for pin in pins}
  assert {name.lower().replace('_', '-') for name in names} <= pinned


def test_the_gin_folder_cannot_shadow_the_gin_library():
  assert not (ROOT / 'gin' / '__init__.py').exists()
  assert config.gin_folder() == ROOT / 'gin'


def test_continuous_integration_runs_the_command_of_the_readme():
  assert 'make test' in (ROOT / '.ci' / 'run').read_text()
  assert 'make test' in (ROOT / 'README.md').read_text()
