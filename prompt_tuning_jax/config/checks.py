"""What a command's settings are checked for before anything large is read.

`check` runs before every command, dry or not, so that a mistake in the last minute of a
run's start shows in its first second; where the library has a function that refuses a
value, that is what is called. What a run would find out by itself a little later (is there such a
task?) is looked for by `sources.py`.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from prompt_tuning_jax import initializers, partitioning, plan, plan_device, targets
from prompt_tuning_jax.backbones.backbone import Backbone
from prompt_tuning_jax.checkpoints import convert, load
from prompt_tuning_jax.config import errors
from prompt_tuning_jax.data import buckets
from prompt_tuning_jax.data.file_task import FileTask
from prompt_tuning_jax.data.prompt_design import PromptDesign
from prompt_tuning_jax.data.virtual_tokens import Template, as_placement
from prompt_tuning_jax.evaluation import evaluator
from prompt_tuning_jax.evaluation.prompt_paths import listed, paths_without_tasks
from prompt_tuning_jax.evaluation.voting import check_ensemble
from prompt_tuning_jax.methods import method as method_lib
from prompt_tuning_jax.methods.method import Method
from prompt_tuning_jax.neighbors import clusters, words
from prompt_tuning_jax.neighbors import picture as picture_lib
from prompt_tuning_jax.neighbors.report import prompts_named
from prompt_tuning_jax.training import loop, pretrain
from prompt_tuning_jax.training import trainable as trainable_lib
from prompt_tuning_jax.training.state_saving import StateSaver, nothing_saved, run_and_step
from prompt_tuning_jax.writing import check_local, is_remote


def check(command: str, kwargs: Mapping[str, Any]) -> list[str]:
  """Checks the arguments of a command's function with each other.

  Args:
    command: the command's name.
    kwargs: its arguments, as gin built them.

  Returns:
    Notes on what is right, but may not be what the user means.

  Raises:
    ValueError, OSError: naming the macro and what it may be.
  """
  # Only `tasks` does without.
  for argument, macro in (('task', 'MIXTURE_OR_TASK_NAME'), ('split', 'SPLIT')):
    if command != 'tasks' and kwargs.get(argument, '') is None:
      raise _missing(macro, None, command)
  for argument in ('model_dir', 'output_dir', 'output', 'export_path', 'cache_dir'):
    if isinstance(path := kwargs.get(argument), str | os.PathLike):
      check_local(path)
  notes = _CHECKS[command](**kwargs) or []
  backbone = kwargs.get('backbone')
  if backbone is not None:
    notes += _check_mesh(backbone.mesh, backbone.rules, backbone.module)
  return notes


def _check_train(
    *,
    backbone: Backbone,
    model_dir: str,
    train_steps: int,
    method: Method | None = None,
    trainable: Any = None,
    batch_size: int = 32,
    feature_lengths: Mapping[str, int] | None = None,
    placement: Any = 'prefix',
    lengths: str = 'pad',
    packed_length: int | None = None,
    microbatches: int = 1,
    dropout_rate: float = 0.0,
    eval_method: str = 'rank',
    eval_period: int = 0,
    decoding: Any = None,
    checkpoint_period: int = 0,
    keep_checkpoints: int = 2,
    best_metric: str | None = None,
    best_mode: str = 'max',
    log_period: int = 50,
    **others: Any,
) -> list[str]:
  del others
  loop.LoopConfig(train_steps, log_period, eval_period, checkpoint_period)
  StateSaver(model_dir, keep=keep_checkpoints, best_metric=best_metric, best_mode=best_mode)
  partitioning.check_batch(backbone.mesh, batch_size, microbatches, 'BATCH_SIZE={}')
  backbone.module.clone(dropout_rate=dropout_rate)  # Says what it cannot.
  _check_choice('LENGTHS', lengths, buckets.LENGTHS)
  _check_choice('EVAL_METHOD', eval_method, evaluator.METHODS)
  count = 0 if method is None else method.num_virtual_tokens
  if lengths == 'pack' and packed_length is not None and packed_length <= count:
    raise ValueError(
        f'PACKED_LENGTH={packed_length} leaves no room for an input beside the {count} virtual '
        'tokens of each example. Set it to the longest example and these, or to None.'
    )
  input_length = feature_lengths['inputs'] if feature_lengths else None
  as_placement(placement).bind(backbone.vocabulary).check(count, input_length)
  if trainable is not None:
    labelling = trainable_lib.as_labelling(trainable, method)
    if trainable_lib.is_nothing(trainable, method):
      raise ValueError(
          'PROMPT is None, and TRAINABLE names nothing but the prompt, so that nothing would '
          'train. Tune the model with --gin_file=methods/model_tuning, or name a prompt method; '
          'words around the input (PROMPT_DESIGN) are not trained, `evaluate` scores them.'
      )
    shapes = {'backbone': backbone.shapes}
    if method is not None:
      shapes['prompt'], _ = method_lib.shapes(method, backbone.spec)
    trainable_lib.split(shapes, labelling)
  if decoding is not None and decoding.max_length is None:
    raise ValueError(
        'DECODING does not know how long answers may be: set TASK_FEATURE_LENGTHS, or '
        '--gin.Decoding.max_length=N.'
    )
  notes = _notes_on_decoding(decoding, eval_method)
  if packed_length is not None and lengths != 'pack':
    notes.append(
        f'PACKED_LENGTH={packed_length} is of packed rows, and LENGTHS={lengths!r} makes none.'
    )
  return notes


def _check_evaluate(
    *,
    backbone: Backbone,
    prompt_file: Any = None,
    checkpoint_path: str | None = None,
    design: PromptDesign | None = None,
    placement: Any = None,
    eval_method: str = 'rank',
    lengths: str = 'bucket',
    decoding: Any = None,
    ensemble: str | None = None,
    **others: Any,
) -> list[str]:
  del others
  _check_design(design, placement, PROMPT_FILE=prompt_file, CHECKPOINT_PATH=checkpoint_path)
  if prompt_file and checkpoint_path:
    raise ValueError(
        f'PROMPT_FILE={prompt_file} and CHECKPOINT_PATH={checkpoint_path} are both set; '
        'evaluate takes one of them.'
    )
  if ensemble is not None:
    check_ensemble(ensemble)
    if not prompt_file:
      raise ValueError(
          f'ENSEMBLE={ensemble!r} is of several prompts, but PROMPT_FILE names none: give a list, '
          'or a path with * in it; or set ENSEMBLE=None.'
      )
  if prompt_file:
    paths_without_tasks(prompt_file)
  if checkpoint_path:
    _check_checkpoint(checkpoint_path)
  if placement is not None:
    as_placement(placement).bind(backbone.vocabulary)
  _check_choice('LENGTHS', lengths, buckets.LENGTHS)
  _check_choice('EVAL_METHOD', eval_method, evaluator.METHODS)
  return _notes_on_decoding(decoding, eval_method)


def _check_infer(
    *,
    backbone: Backbone,
    prompt_file: str | Sequence[str] | None = None,
    choices: Sequence[str] | None = None,
    design: PromptDesign | None = None,
    placement: Any = None,
    ensemble: str | None = 'vote',
    **others: Any,
) -> None:
  del others
  _check_design(design, placement, PROMPT_FILE=prompt_file)
  if design is not None:
    design.check_words_alone()
  if isinstance(prompt_file, Mapping) or any('{task}' in p for p in listed(prompt_file or ())):
    raise ValueError(
        f'PROMPT_FILE is {prompt_file!r}, the prompts of each task; infer knows of no task. Name '
        'the prompt, or by a list or a path with * in it several that answer together.'
    )
  count = len(paths_without_tasks(prompt_file)) if prompt_file else 0
  if ensemble is not None:
    check_ensemble(ensemble)
  elif count > 1:
    raise ValueError(
        f'ENSEMBLE is None, but PROMPT_FILE names {count} prompts, and infer gives one answer to '
        "each text. Set ENSEMBLE='vote' or 'mean', or name one prompt."
    )
  if count > 1 and ensemble == 'mean' and choices is None:
    raise ValueError(
        "ENSEMBLE='mean' compares mean log-probabilities of CLASS_LABELS, which are not set. Name "
        "them, or set ENSEMBLE='vote'."
    )
  if placement is not None:
    as_placement(placement).bind(backbone.vocabulary)
  if choices is not None and not choices:
    raise ValueError(
        'CLASS_LABELS is empty: there is nothing to rank. Name the labels, or set '
        'CLASS_LABELS=None to let the model write freely.'
    )


def _check_export(
    *,
    checkpoint_path: str | None,
    output: Any,
    export_path: str | None = None,
    **others: Any,
) -> None:
  del others
  if not output:
    raise ValueError(
        f'PROMPT_FILE is {output!r}, but export needs it: the artifact to write, or the one '
        'that goes to EXPORT_PATH. Set --gin.PROMPT_FILE=PATH.'
    )
  _check_is_path(output)
  if export_path and os.path.lexists(export_path):
    raise FileExistsError(f'EXPORT_PATH {export_path} exists already and is not overwritten.')
  if checkpoint_path:
    _check_checkpoint(checkpoint_path)
  elif export_path:
    _check_prompt_file(output)
  else:
    raise ValueError(
        'Neither CHECKPOINT_PATH (a run to make an artifact of) nor EXPORT_PATH (where the '
        'artifact PROMPT_FILE goes in another form) is set; export needs one of them.'
    )


def _check_import(*, import_path: str, output: Any, **others: Any) -> None:
  del others
  _check_is_path(output)
  if os.path.lexists(output):
    raise FileExistsError(
        f'PROMPT_FILE {output} exists already and is not overwritten. Name the artifact to '
        'write, or remove that file.'
    )
  if not is_remote(import_path) and not os.path.exists(import_path):
    raise FileNotFoundError(
        f'IMPORT_PATH: there is nothing at {import_path}. Name a PEFT adapter, a .npy prompt, '
        'or a T5X checkpoint.'
    )


def _check_convert(
    *, where: str, output_dir: str | None, format: str, dtype: str | None = None, **others: Any
) -> None:
  del others
  if output_dir is None:
    raise _missing('OUTPUT_DIR', None, 'convert')
  _check_choice('OUTPUT_FORMAT', format, convert.FORMATS)
  convert.check_output(output_dir, format)
  if dtype is not None:
    load.check_dtype('OUTPUT_DTYPE', dtype)
  if not load.is_elsewhere(where):
    load.find(where)


def _check_neighbors(
    *,
    backbone: Backbone,
    prompt_file: Any,
    num_neighbors: int = 5,
    labels: Sequence[str] | None = None,
    cluster_cosine: float = 0.5,
    output_dir: str | None = None,
    picture: bool = True,
    **others: Any,
) -> None:
  del others
  if not prompt_file:
    raise _missing('PROMPT_FILE', prompt_file, 'neighbors')
  prompts_named(prompt_file)
  clusters.check_cosine(cluster_cosine)
  # A backbone that is not on the machine of a dry run has no vocabulary there.
  if backbone.vocabulary is not None:
    words.check_count(backbone, num_neighbors)
    for label in labels or ():
      initializers.label_tokens(label, backbone)
  if output_dir and picture:
    picture_lib.check()


def _check_pretrain(
    *,
    components: Sequence[Any],
    train_steps: int,
    trainable: Any,
    config: Any = None,
    vocabulary: Any = None,
    backbone: Backbone | None = None,
    mesh: Mesh | None = None,
    rules: partitioning.Rules = partitioning.DEFAULT_RULES,
    dtype: str = 'auto',
    remat: str = 'none',
    microbatches: int = 1,
    checkpoint_period: int = 500,
    log_period: int = 50,
    backbone_steps: Sequence[int] = (),
    **others: Any,
) -> list[str]:
  del others
  notes = []
  # A backbone that is not on the machine of a dry run has no vocabulary there.
  if backbone is None or backbone.vocabulary is not None:
    module, _ = pretrain.starting_point(
        config, backbone, vocabulary, mesh=mesh, dtype=dtype, remat=remat
    )
    shapes = jax.eval_shape(module.init_params, jax.random.key(0))
    trainable_lib.split({'backbone': shapes}, trainable_lib.as_labelling(trainable, None))
    if backbone is None:
      notes = _check_mesh(mesh, rules, module)
  pretrain.check_components(components, microbatches, backbone.mesh if backbone else mesh)
  loop.LoopConfig(train_steps, log_period, checkpoint_period=checkpoint_period)
  pretrain.check_backbone_steps(backbone_steps, train_steps)
  return notes


def _check_tasks(
    *,
    backbone: Backbone,
    task: str | FileTask | None = None,
    method: Method | None = None,
    feature_lengths: Mapping[str, int] | None = None,
    design: PromptDesign | None = None,
    placement: Any = 'prefix',
    **others: Any,
) -> None:
  del others
  _check_design(design, placement, PROMPT=method and f'@{type(method).__name__}()')
  if task is not None:
    count = 0 if method is None else method.num_virtual_tokens
    input_length = feature_lengths['inputs'] if feature_lengths else None
    as_placement(placement).bind(backbone.vocabulary).check(count, input_length)


def _check_plan(
    *,
    target: str,
    backbone: Backbone,
    num_partitions: int = 1,
    batch_size: int = 32,
    microbatches: int = 1,
    lengths: str = 'pad',
    **others: Any,
) -> list[str]:
  del others
  found = targets.parse(target)
  _check_choice('LENGTHS', lengths, buckets.LENGTHS)
  plan.check_divides(found, num_partitions, batch_size, microbatches)
  mesh = plan_device.mesh_of(found, num_partitions)
  return _notes_on_mesh(mesh, backbone.rules, backbone.module)


_CHECKS: Mapping[str, Callable[..., list[str] | None]] = {
    'train': _check_train,
    'evaluate': _check_evaluate,
    'infer': _check_infer,
    'export': _check_export,
    'import_prompt': _check_import,
    'convert': _check_convert,
    'pretrain': _check_pretrain,
    'adapt': _check_pretrain,
    'tasks': _check_tasks,
    'plan': _check_plan,
    'neighbors': _check_neighbors,
}


def _check_mesh(mesh: Mesh | None, rules: partitioning.Rules, module: Any) -> list[str]:
  """Checks that the mesh can hold the model; notes what it cannot split."""
  if mesh is None:
    return []
  partitioning.data_share(mesh)
  return _notes_on_mesh(mesh, rules, module)


def _notes_on_mesh(
    mesh: Mesh | AbstractMesh, rules: partitioning.Rules, module: Any
) -> list[str]:
  axes = module.logical_axes()
  partitioning.check_rules(rules)
  shapes = jax.eval_shape(module.init_params, jax.random.key(0))
  partitioning.shardings(mesh, axes, shapes, rules)
  notes = []
  for mesh_axis, sizes in partitioning.not_split(mesh, axes, shapes, rules).items():
    named = ', '.join(f'{name} ({size:,})' for name, size in sizes.items())
    count = mesh.shape[mesh_axis]
    note = f"The {count} devices of the mesh axis {mesh_axis!r} do not divide the model's {named}"
    if 'heads' in sizes:
      note += f', so that the {count} compute attention together and not each some heads'
    notes.append(f'{note}; what has only such axes is copied to each of them.')
  return notes


def _missing(macro: str, value: Any, command: str) -> ValueError:
  return ValueError(f'{macro} is {value!r}, but {command} needs it:{errors.how_to_set(macro)}')


def _check_choice(macro: str, value: Any, choices: Sequence[str]) -> None:
  if value not in choices:
    near = difflib.get_close_matches(str(value), choices, n=1)
    hint = f' Did you mean {near[0]!r}?' if near else ''
    raise ValueError(
        f'{macro} is {value!r}; it may be {" or ".join(map(repr, choices))}.{hint}'
    )


def _check_design(design: PromptDesign | None, placement: Any, **tuned: Any) -> None:
  """Refuses a design beside a tuned prompt or a template, by the names of their macros."""
  if design is None:
    return
  for macro, value in tuned.items():
    if value:
      raise ValueError(
          f'PROMPT_DESIGN and {macro}={value} are both set, but what is tuned is tuned on the '
          'inputs as the task has them. Set one of them to None (methods/prompt_design sets '
          'PROMPT to it).'
      )
  if placement is not None and isinstance(as_placement(placement), Template):
    raise ValueError(
        f'PROMPT_DESIGN and the template PLACEMENT={placement!r} both say what stands around an '
        'input. Put the words into PromptDesign.template, and leave PLACEMENT unset.'
    )


def _check_is_path(path: Any) -> None:
  if path is not None and not isinstance(path, str):
    raise ValueError(
        f'PROMPT_FILE is {path!r}; this command takes the path of one prompt. Only evaluate, '
        'infer and neighbors take several.'
    )


def _check_prompt_file(path: Any) -> None:
  _check_is_path(path)
  if path and not os.path.exists(path):
    raise FileNotFoundError(
        f'PROMPT_FILE: there is no file {path}. Name an artifact, such as the '
        'prompt.safetensors in the folder of a run, or a .npy prompt.'
    )


def _check_checkpoint(path: str) -> None:
  """Refuses a path without a saved state, and runs that have neither prompt nor task."""
  run, _ = run_and_step(path)
  saver = StateSaver(run)
  latest = saver.latest()
  if latest is None or not os.path.isdir(path):
    saver.all()  # Names in warnings what lies there and is damaged.
    raise nothing_saved(path)
  if saver.description(latest).get('task') == 'pretraining':
    raise ValueError(
        f'CHECKPOINT_PATH {os.path.abspath(path)} is of a run of `pretrain` or `adapt`, which '
        'makes a backbone and no prompt. Leave CHECKPOINT_PATH out and name the backbone that it '
        f'leaves when it is finished: INITIAL_CHECKPOINT_PATH={os.path.join(run, "backbone")}'
    )


def _notes_on_decoding(decoding: Any, eval_method: str) -> list[str]:
  if decoding is None or eval_method != 'rank':
    return []
  return [
      "DECODING is set, but EVAL_METHOD='rank' ranks the labels of a task that has labels. "
      "Set EVAL_METHOD='generate' to have answers decoded."
  ]
