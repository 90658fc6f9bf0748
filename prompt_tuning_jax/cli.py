"""The command line: `prompt-tuning <command> --gin_file=… --gin.NAME=VALUE`.

What a command does is configured by gin (`config/`) and done by the library; here are the flags
and how errors look. Which commands there are is in `cli_commands.py`, their help in `cli_help.py`.
An error of the user's (or the disk's) is one message and exit status 2; with --debug it keeps its
traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import inspect
import os
import re
import shlex
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from prompt_tuning_jax import cli_help, config, host_memory
from prompt_tuning_jax.cli_commands import COMMANDS, OF_PROCESSES, gin_name
from prompt_tuning_jax.config import errors, registry

# TensorFlow, where seqio needs it, is to say nothing below an error.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')

_PROCESS_FLAGS = ('coordinator_address', 'process_count', 'process_index')
_USER_ERRORS = (ValueError, OSError, ImportError, FloatingPointError, MemoryError)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command.

  Args:
    argv: the command and its flags; those of the process where None.

  Returns:
    The exit status: 0, 1 after an interruption without a state to resume from, 2 after
    an error that was explained.
  """
  if argv is None:
    # Only where the process is this command's.
    host_memory.keep_freed_memory()
  argv = list(sys.argv[1:] if argv is None else argv)
  try:
    return _explained(argv)
  except Exception as error:
    from prompt_tuning_jax import processes

    if processes.ends_alone(error):
      traceback.print_exc()
      processes.leave(1)
    raise


def _explained(argv: list[str]) -> int:
  """Runs one command and explains its errors."""
  try:
    with warnings.catch_warnings():
      warnings.showwarning = _show_warning
      return _main(argv)
  except _Usage as usage:
    print(usage, file=sys.stderr)
    return 2
  except BrokenPipeError:
    # Whoever read the output (`| head`) has enough; Python would complain when it exits.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
  except _USER_ERRORS as error:
    if '--debug' in argv:
      raise
    return _end(error, 2)
  except KeyboardInterrupt as error:
    return _end(error, 1, 'interrupted')
  except Exception as error:
    # Raised once a run has saved its state after a signal: all is well.
    if type(error).__name__ == 'Interrupted':
      return _end(error, 0)
    from prompt_tuning_jax import processes

    if processes.is_loss(error) and '--debug' not in argv:
      return _end(error, 2)
    raise


def _end(error: BaseException, status: int, message: str = '') -> int:
  """Prints what happened; returns the status, unless other processes wait for this one."""
  from prompt_tuning_jax import processes

  message = message or _message(error)
  if processes.is_loss(error):
    message = (
        f'another process of this run is gone ({message.splitlines()[0]}). Its own output says '
        'why. Start all processes again by the same command: training goes on from the newest '
        'state.'
    )
  if processes.prints(error):
    print(f'prompt-tuning: {processes.name()}{message}', file=sys.stderr)
  if processes.ends_alone(error):
    processes.leave(status)
  return status


class _Usage(Exception):
  """The flags make no sense; the message says which and what would."""


class _Parser(argparse.ArgumentParser):
  """An ArgumentParser whose errors are exceptions, so that main has one way out."""

  def error(self, message: str) -> None:
    raise _Usage(f'{self.prog}: {message}\nSee {self.prog} --help.')


def _main(argv: list[str]) -> int:
  if not argv or argv[0] in ('-h', '--help', 'help'):
    print(cli_help.general_help())
    return 0
  if argv[0] == '--version':
    from prompt_tuning_jax import __version__

    print(__version__)
    return 0
  name, *rest = argv
  if name not in COMMANDS:
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f' Did you mean {near[0]}?' if near else ''
    raise _Usage(
        f'prompt-tuning: no command {name!r}.{hint} Commands: {", ".join(COMMANDS)}.'
    )
  parser = _make_parser(name)
  command = COMMANDS[name]
  if not command.uses_gin:
    command.run(_parse(parser, rest))
    return 0
  bindings, others = _take_bindings(rest)
  options = _parse(parser, others)
  if name == 'sweep' and options.report:
    from prompt_tuning_jax.sweep_report import SweepResult

    result = SweepResult.read(options.report)
    result.write(options.report)
    print(result)
    return 0
  if name == 'tasks':
    given = {'MIXTURE_OR_TASK_NAME': options.task, 'SPLIT': options.split}
    bindings += [f'{macro}={value!r}' for macro, value in given.items() if value]
  if options.tfds_data_dir:
    bindings.append(f'TFDS_DATA_DIR={options.tfds_data_dir!r}')
  options.process_count = _check_processes(name, options)
  created_by = shlex.join(['prompt-tuning', *argv])
  _run_configured(gin_name(name), options, bindings, created_by)
  return 0


def _make_parser(name: str) -> _Parser:
  command = COMMANDS[name]
  parser = _Parser(
      prog=f'prompt-tuning {name}',
      description=textwrap.fill(command.description, 88),
      epilog=cli_help.macros_and_recipes(name) if command.uses_gin else None,
      formatter_class=argparse.RawDescriptionHelpFormatter,
      allow_abbrev=False,
  )
  parser.add_argument('--debug', action='store_true', help='show tracebacks of errors')
  if not command.uses_gin:
    command.add_flags(parser)
    return parser
  if name == 'infer':
    parser.add_argument('texts', nargs='*', metavar='TEXT', help='texts to answer')
  if name == 'tasks':
    parser.add_argument('task', nargs='?', metavar='NAME', help='the task or mixture to show')
    parser.add_argument('--examples', type=int, default=3, metavar='N', help='how many [3]')
    parser.add_argument('--split', help='[the first of train, validation, test]')
  if name == 'sweep':
    parser.add_argument(
        '--report',
        metavar='DIR',
        help='train nothing; make table.md and sweep.png of the results in DIR, and print them',
    )
  if name == 'plan':
    parser.add_argument(
        '--compile',
        action='store_true',
        help="compile the step for the target, for XLA's own figures: a minute or two. TPUs "
        'need libtpu, and no TPU',
    )
  parser.add_argument(
      '--gin_file',
      action='append',
      default=[],
      metavar='FILE',
      help='a recipe or gin file, by path or name (demo, models/nano); repeatable, later '
      'wins, overlays last',
  )
  parser.add_argument(
      '--gin.NAME',
      dest='unused',
      metavar='VALUE',
      help='sets a macro, or --gin.scope/function.parameter=VALUE; wins over files',
  )
  parser.add_argument(
      '--gin_search_paths',
      default='',
      metavar='A,B',
      help="folders to look for gin files in, besides here and the library's",
  )
  parser.add_argument('--tfds_data_dir', metavar='DIR', help='folder of TensorFlow Datasets')
  parser.add_argument(
      '--dry_run',
      action='store_true',
      help='check what can be checked without loading weights or data (settings, files, '
      'tasks), print what would run and the configuration',
  )
  group = parser.add_argument_group(
      'several processes',
      'the same command on every host, or several times on one, each with its index'
      if name in OF_PROCESSES
      else f"T5X's flags; {name} runs in one process",
  )
  group.add_argument(
      '--coordinator_address', metavar='HOST:PORT', help='where process 0 can be reached'
  )
  group.add_argument('--process_count', type=int, metavar='N', help='how many there are')
  group.add_argument('--process_index', type=int, metavar='I', help='which this is, from 0')
  return parser


def _take_bindings(argv: Sequence[str]) -> tuple[list[str], list[str]]:
  """Splits gin's bindings, which argparse cannot know, from the other arguments."""
  bindings, others = [], []
  rest = list(argv)
  while rest:
    argument = rest.pop(0)
    if argument == '--':
      others += [argument, *rest]
      break
    if argument.startswith('--gin.'):
      binding = argument.removeprefix('--gin.')
      if '=' not in binding and rest and not rest[0].startswith('--'):
        binding += '=' + rest.pop(0)
      bindings.append(binding)
    else:
      others.append(argument)
  return bindings, others


def _parse(parser: _Parser, argv: Sequence[str]) -> argparse.Namespace:
  """Parses flags and texts in any order; an unknown flag is answered with the nearest."""
  options, unknown = parser.parse_known_intermixed_args(argv)
  if unknown:
    known = re.findall(r'--\w+', parser.format_usage())
    near = difflib.get_close_matches(unknown[0].split('=')[0], known, n=1)
    hint = f' Did you mean {near[0]}?' if near else ''
    parser.error(f'unknown argument {unknown[0]!r}.{hint}')
  return options


def _check_processes(name: str, options: argparse.Namespace) -> int:
  """How many processes the flags ask for; 1 where there are none of them."""
  given = [f'--{flag}' for flag in _PROCESS_FLAGS if getattr(options, flag) is not None]
  if not given:
    return 1
  if name not in OF_PROCESSES:
    raise _Usage(f'prompt-tuning: {", ".join(given)}: {name} runs in one process.')
  if missing := [f'--{flag}' for flag in _PROCESS_FLAGS if f'--{flag}' not in given]:
    raise _Usage(
        f'prompt-tuning: {", ".join(given)} given without {", ".join(missing)}. Several processes '
        'need all three, for example --coordinator_address=localhost:1234 --process_count=2 '
        '--process_index=0 (and 1).'
    )
  from prompt_tuning_jax import processes

  processes.check(options.coordinator_address, options.process_count, options.process_index)
  return options.process_count


def _run_configured(
    name: str, options: argparse.Namespace, bindings: Sequence[str], created_by: str
) -> None:
  """Builds a command's arguments with gin and calls its function with them."""
  from prompt_tuning_jax import commands, processes
  from prompt_tuning_jax.config import building, checks, sources

  if name == 'plan' and options.compile:
    from prompt_tuning_jax import plan_compiled

    # JAX loads libtpu as soon as it looks for devices.
    plan_compiled.quiet_libtpu()
  count = options.process_count
  paths = [path for path in options.gin_search_paths.split(',') if path]
  parsed = config.parse(name, options.gin_file, bindings, paths)
  function = registry.command_function(name)
  # These need no weights either.
  without_weights = options.dry_run or name in ('tasks', 'plan')
  if count > 1 and not options.dry_run:
    processes.join(options.coordinator_address, count, options.process_index)
  with building.dry_run(count) if without_weights else contextlib.nullcontext():
    kwargs = parsed.kwargs()
    operative = parsed.operative()
    if name == 'sweep':
      kwargs, notes = _sweep_arguments(kwargs, options, bindings, paths)
  processes.check_same(parsed.operative_values(), 'their configuration')
  if name != 'sweep':
    notes = processes.from_main(lambda: checks.check(name, kwargs))
  for note in (*parsed.notes, *notes):
    if processes.is_main():
      print(f'prompt-tuning: note: {note}', file=sys.stderr)
  if _accepts(function, 'created_by'):
    kwargs.setdefault('created_by', created_by)
  if name == 'infer':
    kwargs['texts'] = options.texts or processes.from_main(lambda: _texts_from_input(options))
  if name == 'tasks':
    kwargs['examples'] = options.examples
  if name == 'plan':
    kwargs['compiled'] = options.compile
  if options.dry_run:
    sources.check_sources(name, kwargs)
    commands.describe(name, kwargs)
    print(f'\n{operative}')
    return
  model_dir = kwargs.get('model_dir')
  if model_dir and _accepts(function, 'model_dir'):
    with commands.kept_config(model_dir, operative):
      result = function(**kwargs)
  else:
    result = function(**kwargs)
  if processes.is_main():
    commands.report(result)


def _sweep_arguments(
    kwargs: dict[str, Any],
    options: argparse.Namespace,
    bindings: Sequence[str],
    paths: Sequence[str],
) -> tuple[dict[str, Any], list[str]]:
  """The arguments of `sweep`: its runs in place of the grid and the recipe."""
  from prompt_tuning_jax.config import sweeping

  runs, notes = sweeping.runs_of(kwargs['grid'], options.gin_file, bindings, paths)
  sweeping.check_sources(runs)
  return {'grid': runs, 'model_dir': kwargs['model_dir']}, notes


def _accepts(function: Callable[..., Any], parameter: str) -> bool:
  return parameter in inspect.signature(function).parameters


def _texts_from_input(options: argparse.Namespace) -> list[str]:
  if options.dry_run:
    return []
  if sys.stdin.isatty():
    print('prompt-tuning: one text a line, Ctrl-D ends the input:', file=sys.stderr)
  return [line.rstrip('\n') for line in sys.stdin]


def _message(error: BaseException) -> str:
  return errors.without_gin_calls(str(error)).strip() or type(error).__name__


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
  del filename, lineno, line
  kind = '' if issubclass(category, UserWarning) else f' ({category.__name__})'
  print(f'prompt-tuning: warning: {message}{kind}', file=file or sys.stderr)
