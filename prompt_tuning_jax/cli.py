"""The command line: `prompt-tuning <command> --gin_file=… --gin.NAME=VALUE`.

What a command does is configured by gin (`config/`) and done by the library; here are
the flags, the help, and how errors look. An error of the user's (or the disk's) is one
message and exit status 2; with --debug it keeps its traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
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

from prompt_tuning_jax import config, host_memory
from prompt_tuning_jax.config import errors, registry
from prompt_tuning_jax.config.files import is_overlay
from prompt_tuning_jax.config.macros import MACROS

# TensorFlow, where seqio needs it, is to say nothing below an error.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')

_PROCESS_FLAGS = ('coordinator_address', 'process_count', 'process_index')
# The commands that several processes can run together.
_OF_PROCESSES = ('train', 'pretrain', 'adapt', 'evaluate', 'infer', 'export')
_USER_ERRORS = (ValueError, OSError, ImportError, FloatingPointError, MemoryError)
# A macro and its value, where they stand on one line of a gin file.
_MACRO = re.compile(r'^([A-Z][A-Z_]+) = (.+?)\s*$', re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class _Command:
  """A command: its line in the help, a longer text, and its flags.

  Attributes:
    gin_name: its name in gin where that is another; `import` is a statement there.
    run: runs it with its flags; None: gin configures it, and `registry` knows its function.
    add_flags: adds the flags of a command that gin does not configure.
  """

  summary: str
  description: str
  gin_name: str = ''
  run: Callable[[argparse.Namespace], None] | None = None
  add_flags: Callable[[argparse.ArgumentParser], None] | None = None

  @property
  def uses_gin(self) -> bool:
    return self.run is None


def _demo_flags(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
      '--model_dir', metavar='DIR', help='folder of the run; a temporary one by default'
  )


def _demo(options: argparse.Namespace) -> None:
  from prompt_tuning_jax import demo

  demo.demo(options.model_dir)


def _prepare_flags(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
      'data_set', metavar='DATA_SET', help='super_glue, glue, definite_pronoun_resolution or xsum'
  )
  parser.add_argument(
      '--from',
      dest='source_dir',
      required=True,
      metavar='DIR',
      help='folder of the official files, plain or gzipped: the one that holds BoolQ/, CB/ '
      'and so on, or the one above it',
  )
  parser.add_argument(
      '--tfds_data_dir',
      required=True,
      metavar='DIR',
      help='folder that receives the data; name it to other commands by the same flag',
  )
  parser.add_argument(
      '--tasks', metavar='A,B', help='only these parts of the data set: cb,rte'
  )
  parser.add_argument(
      '--dry_run', action='store_true', help='read and check the files, write nothing'
  )


def _prepare(options: argparse.Namespace) -> None:
  from prompt_tuning_jax.data import seqio_source

  # It is slow to load, noisy, and looks for a network unless it is told not to.
  seqio_source.import_seqio()
  from prompt_tuning_jax.tasks import prepare

  prepare.prepare(
      options.data_set,
      options.source_dir,
      options.tfds_data_dir,
      configs=options.tasks.split(',') if options.tasks is not None else None,
      dry_run=options.dry_run,
  )


_COMMANDS = {
    'demo': _Command(
        'train a prompt on the packaged model and show what it learned',
        'Trains a soft prompt on the packaged model, evaluates it before and after on '
        'held-out data, and shows the artifact, predictions and nearest words.',
        run=_demo,
        add_flags=_demo_flags,
    ),
    'tasks': _Command(
        'the tasks there are; the examples of one as the model will see them',
        'Without a name: lists the tasks and mixtures. With one: shows examples as the '
        'model will see them (text, tokens, virtual tokens, what is cut), and lengths, '
        'labels and ids of the whole split. A recipe and its flags say for which model, '
        'limits and prompt; no weights are loaded.',
    ),
    'train': _Command(
        'tune a prompt (or a model) from a recipe; run again, it resumes',
        'Tunes a prompt on a task and writes MODEL_DIR/prompt.safetensors. The same '
        'command run again goes on where it stopped.',
    ),
    'sweep': _Command(
        'an ablation as one command: a grid of runs, trained together, a table and a plot',
        'Trains every point of SWEEP, a grid of macros, from a recipe of `train`, and writes '
        'MODEL_DIR/results.jsonl, table.md (mean ± standard deviation over seeds) and sweep.png. '
        'Runs that differ in their prompts alone train together on one copy of the model. The '
        'same command run again goes on where it stopped; --report makes table and plot anew '
        'from the results alone.',
    ),
    'plan': _Command(
        'what a training run will cost on which devices, before anything is loaded',
        'From a recipe of `train` and PLAN_TARGET (8xH100-80GB, v5e-8, here): what trains, the '
        "memory of each device, FLOPs and transfers of a step, whether it fits, and what to "
        "change so that it does. No weights are read. --compile puts XLA's own figures beside "
        'the estimate.',
    ),
    'evaluate': _Command(
        'metrics and predictions of prompts, a run, or the bare model on a task or mixture',
        'Evaluates PROMPT_FILE (an artifact or a .npy prompt; several give mean ± standard '
        'deviation, and with ENSEMBLE what they answer together), or what a run left in '
        'CHECKPOINT_PATH, or the backbone alone where neither is set, with words and solved '
        'examples around each input where PROMPT_DESIGN is. Of '
        "SuperGLUE's mixture it prints the score, and EVAL_OUTPUT_DIR receives the "
        "leaderboard's files.",
    ),
    'infer': _Command(
        'text in, text or ranked labels out',
        'Answers the texts on the command line, or one a line from standard input, with '
        'PROMPT_FILE (several prompts answer together: ENSEMBLE), with the words of '
        'PROMPT_DESIGN, or the backbone alone. CLASS_LABELS ranks those instead of writing '
        'freely; INFER_OUTPUT_DIR keeps the answers in a file. Answers come one a line in '
        'the order of the texts; a blank line is answered with a blank line.',
    ),
    'export': _Command(
        'a saved state of a run as an artifact; a prompt for PEFT or the original code',
        "Writes the best state of a run, or CHECKPOINT_PATH's, as the artifact "
        'PROMPT_FILE. `train` does so by itself when it ends. EXPORT_PATH receives the '
        'prompt as a PEFT adapter (a directory) or an array (a path that ends in .npy).',
    ),
    'import': _Command(
        "a PEFT adapter, a .npy or a T5X checkpoint's prompt as an artifact",
        'Writes the prompt at IMPORT_PATH as the artifact PROMPT_FILE, which records the '
        'backbone INITIAL_CHECKPOINT_PATH that it belongs to.',
        gin_name='import_prompt',
    ),
    'convert': _Command(
        "a backbone from one format into another: T5X, Hugging Face, the library's own",
        'Reads the backbone INITIAL_CHECKPOINT_PATH, whatever its format, and writes it to '
        'OUTPUT_DIR in OUTPUT_FORMAT. The numbers stay the same to the bit, unless '
        'OUTPUT_DTYPE changes them.',
    ),
    'neighbors': _Command(
        'the vocabulary words that the positions of prompts are near to',
        'Reads PROMPT_FILE by the words nearest to each position: how near these are to each '
        'other, which positions say the same, which CLASS_LABELS survive, and how similar '
        'several prompts are. OUTPUT_DIR receives tables, records and pictures.',
    ),
    'pretrain': _Command(
        'span corruption on text files: a new backbone',
        'Trains a T5 from fresh weights on TEXT_FILES or any mixture (COMPONENTS) and '
        'writes it to MODEL_DIR/backbone.',
    ),
    'adapt': _Command(
        'LM adaptation of a backbone on text files',
        'Goes on training a T5 with the prefix LM objective, so that prompts can steer '
        'it, and writes it to MODEL_DIR/backbone.',
    ),
    'prepare': _Command(
        'official files (SuperGLUE, GLUE) as TFDS folders, for machines without a network',
        'Writes the official files of a data set as folders of TensorFlow Datasets, row by '
        'row as TFDS itself would, and reads every row back. Tasks then find them with '
        '--tfds_data_dir.',
        run=_prepare,
        add_flags=_prepare_flags,
    ),
}


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
    print(_general_help())
    return 0
  if argv[0] == '--version':
    from prompt_tuning_jax import __version__

    print(__version__)
    return 0
  name, *rest = argv
  if name not in _COMMANDS:
    near = difflib.get_close_matches(name, _COMMANDS, n=1)
    hint = f' Did you mean {near[0]}?' if near else ''
    raise _Usage(
        f'prompt-tuning: no command {name!r}.{hint} Commands: {", ".join(_COMMANDS)}.'
    )
  parser = _make_parser(name)
  command = _COMMANDS[name]
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
  _run_configured(_gin_name(name), options, bindings, created_by)
  return 0


def _make_parser(name: str) -> _Parser:
  command = _COMMANDS[name]
  parser = _Parser(
      prog=f'prompt-tuning {name}',
      description=textwrap.fill(command.description, 88),
      epilog=_macros_and_recipes(name) if command.uses_gin else None,
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
      if name in _OF_PROCESSES
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
  if name not in _OF_PROCESSES:
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
  from prompt_tuning_jax.config import building, checks

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
    checks.check_sources(name, kwargs)
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


def _general_help() -> str:
  width = max(map(len, _COMMANDS))
  lines = [
      'usage: prompt-tuning COMMAND [flags]',
      '',
      'Prompt tuning of frozen T5 models in JAX.',
      '',
      *(f'  {name:{width}}  {command.summary}' for name, command in _COMMANDS.items()),
      '',
      'prompt-tuning COMMAND --help shows the flags, macros and recipes of a command.',
  ]
  return '\n'.join(lines)


def _gin_name(name: str) -> str:
  return _COMMANDS[name].gin_name or name


def _macros_and_recipes(name: str) -> str:
  """What `runs/<name>.gin` reads and sets, and the recipes with their first lines."""
  root = config.gin_folder()
  text = _with_includes(f'runs/{_gin_name(name)}.gin')
  used = dict.fromkeys(re.findall(r'%([A-Z][A-Z_]+)', text))
  values = dict(_MACRO.findall(text))
  lines = ['macros (--gin.NAME=VALUE), with their defaults:']
  for macro in used:
    about = MACROS.get(macro)
    default = f' [{values[macro]}]' if macro in values else ' (to be set)'
    lines.append(f'  {macro}{default}')
    if about:
      lines.append(f'      {about.meaning}')
  overlays = [file for file in config.packaged_files() if is_overlay(root / file)]
  sweeps = config.packaged_files('sweeps') if name == 'sweep' else []
  for title, files in (
      *([('grids (--gin_file=sweeps/NAME, behind a recipe)', sweeps)] if sweeps else []),
      ('recipes (--gin_file=NAME)', config.packaged_files('recipes')),
      ('overlays (--gin_file=NAME as well; read after all others wherever named)', overlays),
  ):
    lines += ['', f'{title}:']
    for file in files:
      text = (root / file).read_text(encoding='utf-8')
      first = text.splitlines()[0].lstrip('#').strip().removeprefix('overlay: ')
      lines.append(f'  {file.split("/")[-1].removesuffix(".gin")}\n      {first}')
      if file in sweeps:
        lines += [
            f'      --gin.{macro} [{default}]: {MACROS[macro].meaning}'
            for macro, default in _MACRO.findall(text) if macro != 'SWEEP'
        ]
  return '\n'.join(lines)


def _with_includes(name: str) -> str:
  """The text of a gin file of the library with those it includes."""
  path = config.gin_folder() / name
  if not path.is_file():
    return ''
  text = path.read_text(encoding='utf-8')
  included = re.findall(r"^include '(.+)'", text, re.MULTILINE)
  return '\n'.join([*map(_with_includes, included), text])


def _message(error: BaseException) -> str:
  return errors.without_gin_calls(str(error)).strip() or type(error).__name__


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
  del filename, lineno, line
  kind = '' if issubclass(category, UserWarning) else f' ({category.__name__})'
  print(f'prompt-tuning: warning: {message}{kind}', file=file or sys.stderr)
