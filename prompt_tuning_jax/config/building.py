"""What gin files build a run from, where the library's own functions would do too much.

`registry.py` offers these under their own names in gin. In a dry run they check what can
be checked without reading anything large.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
from jax.sharding import Mesh

from prompt_tuning_jax import partitioning
from prompt_tuning_jax.backbones.backbone import Backbone
from prompt_tuning_jax.backbones.t5 import T5, T5Config
from prompt_tuning_jax.checkpoints import load
from prompt_tuning_jax.data.tokenized_task import TokenizedTask
from prompt_tuning_jax.data.vocabularies import open_vocabulary
from prompt_tuning_jax.data.vocabulary import Vocabulary
from prompt_tuning_jax.training.description import describe

# In a dry run weights may be missing where the sizes are known, and texts stay unread.
_dry_run = False
# Backbones by what they were asked for with, where they are shared.
_shared: dict[tuple[Mesh | None, str], Backbone] | None = None
# How many processes a dry run stands for; it sees the devices of one.
_num_processes = 1


@contextlib.contextmanager
def dry_run(num_processes: int = 1) -> Iterator[None]:
  """In this context gin's objects are built as far as nothing large is read."""
  global _dry_run, _num_processes
  _dry_run, _num_processes = True, num_processes
  try:
    yield
  finally:
    _dry_run, _num_processes = False, 1


@contextlib.contextmanager
def shared_backbones() -> Iterator[None]:
  """In this context backbones that are asked for by the same arguments are one object.

  The runs of a sweep are configured one by one, and have one copy of the weights.
  """
  global _shared
  _shared = {}
  try:
    yield
  finally:
    _shared = None


def make_mesh(model: int = 1) -> Mesh | None:
  """A mesh of all devices; None where there is one, and in a dry run of several processes.

  Args:
    model: devices that share one copy of the model, NUM_PARTITIONS.

  Raises:
    ValueError: if `model` does not divide the number of devices.
  """
  if _num_processes > 1 or (model == 1 and jax.device_count() == 1):
    return None
  return partitioning.make_mesh(model)


def logical_axis_rules(parameter_partitioning_dims: int = 1) -> partitioning.Rules:
  """T5X's rules for parameters that are split over one or over both axes of the mesh.

  Args:
    parameter_partitioning_dims: 1 splits them over `model`; 2 over `data` as well, so that
      they are gathered layer by layer.
  """
  if parameter_partitioning_dims not in partitioning.RULES:
    raise ValueError(
        f'PARAMETER_PARTITIONING_DIMS is {parameter_partitioning_dims!r}; it may be 1 (split over '
        "the mesh's axis 'model') or 2 (over 'data' as well)."
    )
  return partitioning.RULES[parameter_partitioning_dims]


def _shared_where_asked(load: Callable[..., Backbone]) -> Callable[..., Backbone]:
  """Decorates a loader: within `shared_backbones` the same arguments give the same object."""

  @functools.wraps(load)
  def loaded(where, *, mesh=None, **settings):
    if _shared is None:
      return load(where, mesh=mesh, **settings)
    # A mesh keeps what it once computed, and so has no description that lasts.
    key = mesh, json.dumps(describe([where, settings]), sort_keys=True, default=str)
    if key not in _shared:
      _shared[key] = load(where, mesh=mesh, **settings)
    return _shared[key]

  return loaded


@_shared_where_asked
def load_backbone(
    where: str | os.PathLike[str],
    *,
    config: T5Config | None = None,
    dtype: str = 'auto',
    param_dtype: str | None = None,
    max_distance: int | None = None,
    adaptation_steps: int | None = None,
    vocabulary: Vocabulary | str | None = None,
    remat: str = 'none',
    attention: str = 'xla',
    mesh: Mesh | None = None,
    rules: partitioning.Rules = partitioning.DEFAULT_RULES,
) -> Backbone:
  """`checkpoints.load.load_backbone` for gin files that also state the model's sizes.

  Args:
    config: the sizes that the model must have; None for whatever it has.
    adaptation_steps: the model as it was after so many steps of LM adaptation, where `where` is
      what `adapt` made of it; None is as it is there.

  Raises:
    ValueError: if the model at `where` has other sizes than `config`; else as
      `checkpoints.load.load_backbone`.
  """
  if _dry_run and attention == 'cudnn':
    # Nothing is computed: the devices that could are those of another machine.
    attention = 'dot_product'
  if adaptation_steps is not None:
    where = load.after_adaptation(where, adaptation_steps)
  computed_in = load.computation_dtype(dtype, mesh)
  module = None
  if config is not None:
    int8 = load.check_param_dtype(param_dtype)
    module = T5(config, dtype=computed_in, remat=remat, attention=attention, int8=int8)
  if _dry_run and load.is_elsewhere(where):
    # The folder, whose name asks no network for what may be missing in it.
    where = load.fetched(where) or where
  if _dry_run and load.is_elsewhere(where):
    if config is None:
      raise ValueError(
          f'{where} is not on this machine, and neither a dry run nor `tasks` downloads it: its '
          'sizes are not known. Name its file of gin/models/ (--gin_file=models/…), or fetch it '
          'first.'
      )
    return _absent(os.fspath(where), module, vocabulary, mesh, rules, param_dtype)
  try:
    backbone = load.load_backbone(
        where,
        dtype=computed_in.name,
        param_dtype=param_dtype,
        mesh=mesh,
        rules=rules,
        max_distance=max_distance,
        vocabulary=vocabulary,
        remat=remat,
        attention=attention,
    )
  except (FileNotFoundError, ValueError):
    if not _dry_run or config is None or os.path.exists(where):
      raise
    return _absent(os.fspath(where), module, vocabulary, mesh, rules, param_dtype)
  if config is not None and backbone.spec != T5(config).spec:
    raise ValueError(
        f'{where} holds a model of other sizes ({backbone.spec}) than MODEL_CONFIG says '
        f'({T5(config).spec}). Name the file of gin/models/ that belongs to it, or set '
        'MODEL_CONFIG=None.'
    )
  return backbone


def _absent(
    where: str,
    module: T5,
    vocabulary: Vocabulary | str | None,
    mesh: Mesh | None,
    rules: partitioning.Rules,
    param_dtype: str | None,
) -> Backbone:
  def load_params():
    raise FileNotFoundError(f'{where} is not on this machine.')

  if isinstance(vocabulary, str):
    vocabulary = open_vocabulary(vocabulary)
  name = '/'.join(where.rstrip('/').split('/')[-2:])
  source = f'{where} (not on this machine)'
  return Backbone(
      name,
      module,
      vocabulary,
      load_params,
      source=source,
      mesh=mesh,
      rules=rules,
      param_dtype=param_dtype,
  )


def vocabulary_of(backbone: Backbone) -> Vocabulary:
  """The vocabulary a backbone was trained with.

  Raises:
    ValueError: if it has none.
  """
  if _dry_run:
    return backbone.vocabulary
  return backbone.needed_vocabulary('no text can be tokenised for it')


def text_files(
    paths: str | Sequence[str],
    vocabulary: Vocabulary,
    *,
    name: str | None = None,
    split: str = 'train',
    cache_dir: str | None = None,
) -> TokenizedTask | tuple[str, ...]:
  """`TokenizedTask.from_text_files`; in a dry run the paths, once they are known to exist."""
  if _dry_run:
    return _existing(paths)
  return TokenizedTask.from_text_files(
      paths, vocabulary, name=name, split=split, cache_dir=cache_dir
  )


def jsonl_pairs(
    path: str,
    vocabulary: Vocabulary,
    *,
    name: str | None = None,
    split: str = 'train',
    cache_dir: str | None = None,
) -> TokenizedTask | tuple[str, ...]:
  """`TokenizedTask.from_jsonl`; in a dry run the path, once it is known to exist."""
  if _dry_run:
    return _existing(path)
  return TokenizedTask.from_jsonl(
      path, vocabulary, name=name, split=split, cache_dir=cache_dir
  )


def _existing(paths: str | Sequence[str]) -> tuple[str, ...]:
  paths = (paths,) if isinstance(paths, str) else tuple(paths)
  for path in paths:
    if not os.path.isfile(path):
      raise FileNotFoundError(f'No text file {path}.')
  return paths


def steps_after(total: int, start: int) -> int:
  """Steps of a run that ends at `total`, counted T5X's way from pretraining's start.

  Raises:
    ValueError: if `total` is not beyond `start`.
  """
  if total <= start:
    raise ValueError(
        f'TRAIN_STEPS={total:,} is not beyond PRETRAINED_STEPS={start:,}: in T5X it counts '
        f'the pretraining too. For n steps set TRAIN_STEPS={start:,} + n, or set '
        'TRAIN_STEPS_RELATIVE=n instead.'
    )
  return total - start


def answer_length(feature_lengths: Mapping[str, int] | None) -> int | None:
  """Most tokens of a generated answer: those of the targets; None where nothing says it."""
  return feature_lengths['targets'] if feature_lengths else None
