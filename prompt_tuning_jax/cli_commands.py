"""The commands of `prompt-tuning`: what their help says, and the flags of those without gin."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Command:
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


COMMANDS = {
    'demo': Command(
        'train a prompt on the packaged model and show what it learned',
        'Trains a soft prompt on the packaged model, evaluates it before and after on '
        'held-out data, and shows the artifact, predictions and nearest words.',
        run=_demo,
        add_flags=_demo_flags,
    ),
    'tasks': Command(
        'the tasks there are; the examples of one as the model will see them',
        'Without a name: lists the tasks and mixtures. With one: shows examples as the '
        'model will see them (text, tokens, virtual tokens, what is cut), and lengths, '
        'labels and ids of the whole split. A recipe and its flags say for which model, '
        'limits and prompt; no weights are loaded.',
    ),
    'train': Command(
        'tune a prompt (or a model) from a recipe; run again, it resumes',
        'Tunes a prompt on a task and writes MODEL_DIR/prompt.safetensors. The same '
        'command run again goes on where it stopped.',
    ),
    'sweep': Command(
        'an ablation as one command: a grid of runs, trained together, a table and a plot',
        'Trains every point of SWEEP, a grid of macros, from a recipe of `train`, and writes '
        'MODEL_DIR/results.jsonl, table.md (mean ± standard deviation over seeds) and sweep.png. '
        'Runs that differ in their prompts alone train together on one copy of the model. The '
        'same command run again goes on where it stopped; --report makes table and plot anew '
        'from the results alone.',
    ),
    'plan': Command(
        'what a training run will cost on which devices, before anything is loaded',
        'From a recipe of `train` and PLAN_TARGET (8xH100-80GB, v5e-8, here): what trains, the '
        "memory of each device, FLOPs and transfers of a step, whether it fits, and what to "
        "change so that it does. No weights are read. --compile puts XLA's own figures beside "
        'the estimate.',
    ),
    'evaluate': Command(
        'metrics and predictions of prompts, a run, or the bare model on a task or mixture',
        'Evaluates PROMPT_FILE (an artifact or a .npy prompt; several give mean ± standard '
        'deviation, and with ENSEMBLE what they answer together), or what a run left in '
        'CHECKPOINT_PATH, or the backbone alone where neither is set, with words and solved '
        'examples around each input where PROMPT_DESIGN is. Of '
        "SuperGLUE's mixture it prints the score, and EVAL_OUTPUT_DIR receives the "
        "leaderboard's files.",
    ),
    'infer': Command(
        'text in, text or ranked labels out',
        'Answers the texts on the command line, or one a line from standard input, with '
        'PROMPT_FILE (several prompts answer together: ENSEMBLE), with the words of '
        'PROMPT_DESIGN, or the backbone alone. CLASS_LABELS ranks those instead of writing '
        'freely; INFER_OUTPUT_DIR keeps the answers in a file. Answers come one a line in '
        'the order of the texts; a blank line is answered with a blank line.',
    ),
    'export': Command(
        'a saved state of a run as an artifact; a prompt for PEFT or the original code',
        "Writes the best state of a run, or CHECKPOINT_PATH's, as the artifact "
        'PROMPT_FILE. `train` does so by itself when it ends. EXPORT_PATH receives the '
        'prompt as a PEFT adapter (a directory) or an array (a path that ends in .npy).',
    ),
    'import': Command(
        "a PEFT adapter, a .npy or a T5X checkpoint's prompt as an artifact",
        'Writes the prompt at IMPORT_PATH as the artifact PROMPT_FILE, which records the '
        'backbone INITIAL_CHECKPOINT_PATH that it belongs to.',
        gin_name='import_prompt',
    ),
    'convert': Command(
        "a backbone from one format into another: T5X, Hugging Face, the library's own",
        'Reads the backbone INITIAL_CHECKPOINT_PATH, whatever its format, and writes it to '
        'OUTPUT_DIR in OUTPUT_FORMAT. The numbers stay the same to the bit, unless '
        'OUTPUT_DTYPE changes them.',
    ),
    'neighbors': Command(
        'the vocabulary words that the positions of prompts are near to',
        'Reads PROMPT_FILE by the words nearest to each position: how near these are to each '
        'other, which positions say the same, which CLASS_LABELS survive, and how similar '
        'several prompts are. OUTPUT_DIR receives tables, records and pictures.',
    ),
    'pretrain': Command(
        'span corruption on text files: a new backbone',
        'Trains a T5 from fresh weights on TEXT_FILES or any mixture (COMPONENTS) and '
        'writes it to MODEL_DIR/backbone.',
    ),
    'adapt': Command(
        'LM adaptation of a backbone on text files',
        'Goes on training a T5 with the prefix LM objective, so that prompts can steer '
        'it, and writes it to MODEL_DIR/backbone.',
    ),
    'prepare': Command(
        'official files (SuperGLUE, GLUE) as TFDS folders, for machines without a network',
        'Writes the official files of a data set as folders of TensorFlow Datasets, row by '
        'row as TFDS itself would, and reads every row back. Tasks then find them with '
        '--tfds_data_dir.',
        run=_prepare,
        add_flags=_prepare_flags,
    ),
}

# The commands that several processes can run together.
OF_PROCESSES = ('train', 'pretrain', 'adapt', 'evaluate', 'infer', 'export')


def gin_name(name: str) -> str:
  """What gin calls a command."""
  return COMMANDS[name].gin_name or name
