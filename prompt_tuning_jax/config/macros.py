"""The macros that recipes and users set in capitals: what each means and may hold.

A wrong value would fail somewhere inside a run, or worse, train without a word. So each
macro has a kind, and `bindings.check_values` holds its value against that as soon as
files and flags are read. A value that a function is to give (`@steps_after()`) is left to
whoever receives it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import gin


@dataclasses.dataclass(frozen=True)
class Kind:
  """What values a macro may have.

  Attributes:
    expected: the same in words, to stand after 'expected'.
    accepts: whether a value without any function or macro in it is one of them.
    is_text: whether it is a text, so that a flag may leave out the quotes.
    is_object: whether only what a function returns will do.
  """

  expected: str
  accepts: Callable[[Any], bool]
  is_text: bool = False
  is_object: bool = False

  def allows(self, value: Any) -> bool:
    """Whether a macro of this kind may have a value, as gin holds it."""
    if isinstance(value, gin.config.ConfigurableReference):
      return value.evaluate or not self.is_object
    return self.accepts(value)


def is_reference(value: Any) -> bool:
  """Whether a value is to come from a function or another macro."""
  return isinstance(value, gin.config.ConfigurableReference) and value.evaluate


def _is_whole(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
  return (_is_whole(value) or isinstance(value, float)) and math.isfinite(value)


def _is_text(value: Any) -> bool:
  return isinstance(value, str) and bool(value.strip())


def _are_texts(value: Any) -> bool:
  return isinstance(value, (list, tuple)) and bool(value) and all(map(_is_text, value))


def _are_rules(value: Any) -> bool:
  return (
      isinstance(value, (list, tuple))
      and bool(value)
      and all(
          isinstance(rule, (list, tuple))
          and len(rule) == 2
          and _is_text(rule[0])
          and (rule[1] is None or _is_text(rule[1]))
          for rule in value
      )
      and len({rule[0] for rule in value}) == len(value)
  )


def _are_lengths(value: Any) -> bool:
  return (
      isinstance(value, Mapping)
      and {'inputs', 'targets'} <= set(value)
      and all(_COUNT.accepts(length) for length in value.values())
  )


_TEXT = Kind('a text', _is_text, is_text=True)
_TEXTS = Kind('a list of texts', _are_texts)
_PATHS = Kind('a path or a list of paths', lambda v: _is_text(v) or _are_texts(v))
_PROMPTS = Kind(
    'a path, a list of paths, or a dict from tasks to these',
    lambda v: (
        all(map(_PATHS.accepts, v.values())) and bool(v)
        if isinstance(v, Mapping)
        else _PATHS.accepts(v)
    ),
    is_text=True,
)
_COUNT = Kind('a whole number, at least 1', lambda v: _is_whole(v) and v >= 1)
_PERIOD = Kind('a whole number, 0 or more', lambda v: _is_whole(v) and v >= 0)
# JAX keeps the lower 32 bits of a seed, so that 2**32 would be the seed 0 again.
_SEED = Kind('a whole number from 0 to 2**32 - 1', lambda v: _is_whole(v) and 0 <= v < 2**32)
_SHARE = Kind('a number from 0 to below 1', lambda v: _is_number(v) and 0 <= v < 1)
_WEIGHT = Kind('a number, 0 or more', lambda v: _is_number(v) and v >= 0)
_RATE = Kind(
    'a number, 0 or more, or a schedule such as @warmup_linear()',
    lambda v: _is_number(v) and v >= 0,
)
_STEPS = Kind(
    'a list of whole numbers, 0 or more',
    lambda v: isinstance(v, (list, tuple)) and all(map(_PERIOD.accepts, v)),
)
_DIVISOR = Kind(
    "None, a number above 0, or one of T5X's names such as 'NUM_REAL_TARGET_TOKENS'",
    lambda v: _is_text(v) or (_is_number(v) and v > 0),
)
_LENGTHS = Kind("a dict with tokens, at least 1, for 'inputs' and 'targets'", _are_lengths)
_DIMS = Kind('1 or 2', lambda v: _is_whole(v) and v in (1, 2))
_RULES = Kind(
    "a list with one pair for each logical axis, such as ('mlp', 'model') or ('layers', None)",
    _are_rules,
)
_PLACEMENT = Kind(
    "a name such as 'prefix', or a template such as '{3} {inputs} {3}'",
    lambda v: _is_text(v) or (isinstance(v, (list, tuple, Mapping)) and bool(v)),
    is_text=True,
)
_OBJECT = Kind('what a function returns, with @ and ()', lambda v: False, is_object=True)
_GRID = Kind(
    'a dict of lists of values, by macros, or of dicts of settings, by names',
    lambda v: isinstance(v, Mapping) and bool(v) and all(map(_is_text, v)),
)
_OPTIMIZERS = Kind(
    'an optimiser with @ and (), or a dict of them',
    lambda v: isinstance(v, Mapping) and bool(v) and all(map(is_reference, v.values())),
    is_object=True,
)
_OBJECTS = Kind(
    'a list of what functions return, each with @ and ()',
    lambda v: isinstance(v, (list, tuple)) and bool(v) and all(map(is_reference, v)),
    is_object=True,
)


@dataclasses.dataclass(frozen=True)
class Macro:
  """A name that recipes and users set in capitals.

  Attributes:
    meaning: one line for help and errors.
    example: a value as it is written in a file.
    kind: what it may hold.
    optional: whether it may be None.
    advice: what to know where a value is refused.
    instead: what to do where it is set and nothing reads it.
  """

  meaning: str
  example: str
  kind: Kind
  optional: bool = False
  advice: str = ''
  instead: str = ''

  @property
  def is_text(self) -> bool:
    """Whether a flag may leave out the quotes."""
    return self.kind.is_text

  def allows(self, value: Any) -> bool:
    """Whether the macro may have a value, as gin holds it."""
    return self.optional if value is None else self.kind.allows(value)


MACROS: Mapping[str, Macro] = {
    'MODEL_DIR': Macro('folder of the run: its states, metrics, config', "'/tmp/run'", _TEXT),
    'MIXTURE_OR_TASK_NAME': Macro(
        'name of the seqio task or mixture, or @FileTask() for files of your own',
        "'taskless_super_glue_cb_v102'",
        _TEXT,
        True,
    ),
    'MIXTURE_OR_TASK_MODULE': Macro(
        'Python module whose import registers the task', "'my_project.tasks'", _TEXT
    ),
    'EVAL_TASK_NAME': Macro(
        'task to evaluate on while training, if another', "'glue_mrpc_v200'", _TEXT, True
    ),
    'TASK_FEATURE_LENGTHS': Macro(
        'longest inputs and targets in tokens; the rest is cut',
        "{'inputs': 512, 'targets': 8}",
        _LENGTHS,
        True,
    ),
    'SPLIT': Macro('split of the task to evaluate, or to show', "'validation'", _TEXT, True),
    'TRAIN_STEPS': Macro(
        "steps counted from the start of pretraining, T5X's way (runs/t5x_exact.gin)",
        '1_130_000',
        _COUNT,
        instead='Set TRAIN_STEPS_RELATIVE, the steps of this run alone, or add '
        '--gin_file=t5x_exact, with which TRAIN_STEPS counts those before it as well.',
    ),
    'TRAIN_STEPS_RELATIVE': Macro('steps of this run', '30_000', _COUNT),
    'PRETRAINED_STEPS': Macro(
        'steps in the pretrained checkpoint, where TRAIN_STEPS is used', '1_100_000', _PERIOD
    ),
    'INITIAL_CHECKPOINT_PATH': Macro(
        'the backbone: a folder (T5X, Hugging Face, ours) or a packaged name', "'nano'", _TEXT
    ),
    'ADAPTATION_STEPS': Macro(
        'the backbone after so many steps of LM adaptation, where `adapt` kept it; 0 is before '
        'the first, None as it is',
        '0',
        _PERIOD,
        True,
    ),
    'VOCABULARY': Macro(
        "SentencePiece model, or 'bytes' (ByT5); None is the one beside the backbone",
        "'/data/spiece.model'",
        _TEXT,
        True,
    ),
    'REMAT': Macro('what the backward pass computes again to save memory', "'full'", _TEXT),
    'EVAL_METHOD': Macro("'rank' the labels or 'generate' text", "'rank'", _TEXT),
    'DECODING': Macro(
        'how text is generated (Decoding.strategy, .num_beams, …); None is greedily, up to '
        'the length of the targets',
        '@Decoding()',
        _OBJECT,
        True,
    ),
    'DTYPE': Macro(
        "type of the computation: 'float32', 'bfloat16', or 'auto': bfloat16 on a GPU or TPU",
        "'bfloat16'",
        _TEXT,
    ),
    'PARAM_DTYPE': Macro(
        "type the weights are held in, 'int8' where they stay frozen; None is DTYPE's",
        "'int8'",
        _TEXT,
        True,
    ),
    'ATTENTION': Macro(
        "how attention is computed: 'xla', 'dot_product' (jax.nn.dot_product_attention) or "
        "'cudnn' (its kernel for GPUs)",
        "'cudnn'",
        _TEXT,
    ),
    'NUM_PARTITIONS': Macro(
        'devices that share one copy of the model; the others split the batch', '8', _COUNT
    ),
    'PARAMETER_PARTITIONING_DIMS': Macro(
        'axes of the mesh that parameters are split over: 1 is NUM_PARTITIONS, 2 is all devices, '
        'which gather them layer by layer',
        '2',
        _DIMS,
    ),
    'LOGICAL_AXIS_RULES': Macro(
        "which axis of the mesh, 'data', 'model' or None, each logical axis is split over",
        "[('batch', 'data'), ('vocab', 'model'), ('mlp', 'model'), ('heads', 'model'), "
        "('joined_kv', 'model'), ('embed', 'data'), ('layers', None), "
        "('relpos_buckets', None)]",
        _RULES,
    ),
    'BACKBONE': Macro('the pretrained model', '@backbone/gin.singleton()', _OBJECT),
    'MODEL_CONFIG': Macro('sizes of the model', '@T5Config()', _OBJECT, True),
    'PLAN_TARGET': Macro(
        "devices to plan for: '8xH100-80GB', 'v5e-8', 'here'", "'8xH100-80GB'", _TEXT
    ),
    'SWEEP': Macro(
        'the grid of a sweep: a dict from macros (or MODEL, METHOD, PROMPT_INIT: gin files) to '
        'lists of their values, or from a name to a dict of several settings by what to call them',
        "{'PROMPT_LENGTH': [1, 20, 100], 'RANDOM_SEED': [0, 1, 2]}",
        _GRID,
    ),
    'MODELS': Macro(
        'the models of a sweep over their sizes: files of gin/models/', "['pico', 'nano']", _TEXTS
    ),
    'DESIGN': Macro(
        'the prompt design of a sweep over methods: a file of gin/methods/, or a recipe',
        "'recipes/demo_prompt_design'",
        _TEXT,
    ),
    'BATCH_SIZE': Macro('examples in a batch', '32', _COUNT),
    'EVAL_BATCH_SIZE': Macro('rows in a batch of an evaluation', '64', _COUNT, True),
    'MICROBATCHES': Macro('parts of a batch, one after the other, to save memory', '1', _COUNT),
    'LENGTHS': Macro(
        "'pad' to the feature lengths, 'bucket' to a few shorter ones, or 'pack' several "
        'examples into a row of training',
        "'bucket'",
        _TEXT,
    ),
    'PACKED_LENGTH': Macro(
        "tokens of a row, prompts included, where LENGTHS is 'pack'; None is what the task's "
        'examples are cheapest in',
        '1024',
        _COUNT,
        True,
    ),
    'PLACEMENT': Macro(
        "where the prompt stands among the tokens: 'prefix', 'after_bos', 'suffix', "
        "'suffix_before_eos', or a template",
        "'{3} {inputs} {3}'",
        _PLACEMENT,
        True,
    ),
    'TARGET_PREFIX': Macro(
        "what stands before every target: '<extra_id_0>' for a model without LM adaptation, which "
        'was taught to begin so',
        "'<extra_id_0>'",
        _TEXT,
        True,
    ),
    'DROPOUT_RATE': Macro('dropout in the backbone while training', '0.1', _SHARE),
    'LEARNING_RATE': Macro("the optimiser's learning rate or schedule", '0.3', _RATE),
    'TRAINABLE': Macro(
        'what trains, and with which optimiser', "{'prompt': @adafactor()}", _OPTIMIZERS, True
    ),
    'Z_LOSS': Macro('weight of the z-loss', '0.0001', _WEIGHT),
    'LABEL_SMOOTHING': Macro('label smoothing', '0.0', _SHARE),
    'LOSS_NORMALIZING_FACTOR': Macro(
        'what the summed loss is divided by', 'None', _DIVISOR, True
    ),
    'EVAL_PERIOD': Macro('steps between evaluations; 0 is at the end only', '1000', _PERIOD),
    'CHECKPOINT_PERIOD': Macro(
        'steps between saved states; 0 is at evaluations only', '1000', _PERIOD
    ),
    'BACKBONE_STEPS': Macro(
        'steps of `pretrain` or `adapt` at which the backbone is kept as well, as '
        'MODEL_DIR/backbone_<step>; 0 is before the first',
        '[0, 1000, 10_000]',
        _STEPS,
    ),
    'LOG_PERIOD': Macro('steps between records of the loss', '50', _COUNT),
    'BEST_METRIC': Macro(
        'metric by which the best state is kept', "'accuracy'", _TEXT, True
    ),
    'BEST_MODE': Macro("whether the best of BEST_METRIC is its 'max' or its 'min'", "'min'", _TEXT),
    'RANDOM_SEED': Macro(
        'seed of the prompt, the data order and dropout; which examples PROMPT_DESIGN shows',
        '0',
        _SEED,
        advice='Runs are always seeded here, so that they can be resumed and repeated; '
        "T5X's None, a seed from the clock, has no counterpart.",
    ),
    'PROMPT': Macro('the prompt method; None for none', '@SoftPrompt()', _OBJECT, True),
    'PROMPT_DESIGN': Macro(
        'words and solved examples around each input, instead of a prompt that is trained; '
        'None for the input as it is',
        '@PromptDesign()',
        _OBJECT,
        True,
    ),
    'PROMPT_LENGTH': Macro(
        'virtual tokens of the prompt, or positions of the prefix; @slots_of() is as many as '
        'the template PLACEMENT has',
        '100',
        _COUNT,
    ),
    'DECODER_PROMPT_LENGTH': Macro(
        "virtual tokens before the decoder's start token", '5', _COUNT
    ),
    'PREFIX_LENGTH': Macro('positions of a prefix beside a soft prompt', '10', _COUNT),
    'PREFIX_LEARNING_RATE': Macro(
        'learning rate of a prefix beside a soft prompt', '5e-05', _RATE
    ),
    'PROMPT_TEXT': Macro('text the prompt or the prefix starts from', "'what is it:'", _TEXT),
    'CLASS_LABELS': Macro(
        'words for the classes: the prompt starts from their embeddings, infer ranks them, '
        'neighbors looks for them',
        "['positive', 'negative']",
        _TEXTS,
        True,
    ),
    'PROMPT_FILE': Macro(
        'a tuned prompt: an artifact or the .npy of the original code; evaluate, infer and '
        "neighbors take several too ('/runs/*/prompt.safetensors', a list), evaluate and "
        "neighbors also those of each task ('{task}' in the path, a dict from tasks)",
        "'/tmp/run/prompt.safetensors'",
        _PROMPTS,
        True,
    ),
    'ENSEMBLE': Macro(
        "how several prompts answer together: by 'vote', or by the 'mean' of their "
        'log-probabilities of each class; None: each for itself',
        "'vote'",
        _TEXT,
        True,
    ),
    'EXPORT_PATH': Macro(
        "where a prompt goes for other programs: a PEFT adapter's directory, or a .npy file",
        "'/tmp/adapter'",
        _TEXT,
        True,
    ),
    'IMPORT_PATH': Macro(
        "a prompt in another form: a PEFT adapter's directory, a .npy file, or a T5X "
        'checkpoint',
        "'/tmp/adapter'",
        _TEXT,
    ),
    'CHECKPOINT_PATH': Macro(
        "a run's folder, or one checkpoint_<step> in it", "'/tmp/run'", _TEXT, True
    ),
    'EVAL_OUTPUT_DIR': Macro('folder for metrics and predictions', "'/tmp/eval'", _TEXT, True),
    'INFER_OUTPUT_DIR': Macro('folder for the answers', "'/tmp/infer'", _TEXT, True),
    'NUM_NEIGHBORS': Macro('nearest words of each position of a prompt', '5', _COUNT),
    'OUTPUT_DIR': Macro(
        'folder for what a command writes: the converted backbone; tables, records and pictures '
        'of neighbors',
        "'/tmp/t5_hf'",
        _TEXT,
        True,
    ),
    'OUTPUT_FORMAT': Macro("'native' (ours), 'hf' (Hugging Face) or 't5x'", "'hf'", _TEXT),
    'OUTPUT_DTYPE': Macro(
        "type of the converted weights: 'float32' or 'bfloat16'; None keeps theirs",
        "'bfloat16'",
        _TEXT,
        True,
    ),
    'CACHE_DIR': Macro(
        'folder of tokenised tasks', "'~/.cache/prompt_tuning_jax'", _TEXT, True
    ),
    'TFDS_DATA_DIR': Macro(
        'folder of TensorFlow Datasets (--tfds_data_dir)', "'/data'", _TEXT, True
    ),
    'TEXT_FILES': Macro('text files, one document a line', "['books.txt']", _PATHS),
    'INPUT_LENGTH': Macro('tokens of an input in pretraining', '512', _COUNT),
    'TARGET_LENGTH': Macro('tokens of a target in pretraining', '512', _COUNT, True),
    'COMPONENTS': Macro('the mixture to pretrain on', '[@books/Component()]', _OBJECTS),
}

# Macros of T5X that have no place here, and what to do instead.
RETIRED = {
    'USE_CACHED_TASKS': 'Tokenised tasks are always cached (CACHE_DIR); leave it out.',
    'SHUFFLE_TRAIN_EXAMPLES': 'The order is always a seeded permutation; leave it out.',
    'ACTIVATION_DTYPE': 'Use DTYPE.',
    'SAVING_PERIOD': 'Use CHECKPOINT_PERIOD.',
    'EVAL_STEPS': 'Evaluation always covers the whole split; leave it out.',
    'OPTIMIZER': 'Use TRAINABLE.',
    'ARCHITECTURE': 'Use BACKBONE, or one of gin/models/.',
    'MODEL': 'Use BACKBONE, or one of gin/models/.',
    'PROMPT_REGEX': 'Use TRAINABLE.',
}
