"""Loading a backbone, whatever its format: `load_backbone(where)`."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from prompt_tuning_jax import partitioning
from prompt_tuning_jax.backbones.backbone import Backbone
from prompt_tuning_jax.backbones.t5 import T5
from prompt_tuning_jax.backbones.t5_layers import check_cudnn
from prompt_tuning_jax.checkpoints import hf, hub, ladder, native, orbax, placing, t5x
from prompt_tuning_jax.checkpoints.source import Checkpoint, damage_named, fingerprint
from prompt_tuning_jax.data import byte_vocabulary
from prompt_tuning_jax.data.byte_vocabulary import ByteVocabulary
from prompt_tuning_jax.data.vocabularies import open_vocabulary
from prompt_tuning_jax.data.vocabulary import Vocabulary
from prompt_tuning_jax.json_files import read_json
from prompt_tuning_jax.typing import PyTree
from prompt_tuning_jax.writing import is_remote

_ZOO = Path(__file__).parent.parent / 'zoo'
_DTYPES = ('float32', 'bfloat16')
_VOCABULARY_FILES = ('spiece.model', 'sentencepiece.model')


def load_backbone(
    where: str | os.PathLike[str],
    *,
    dtype: str = 'auto',
    mesh: Mesh | None = None,
    rules: partitioning.Rules = partitioning.DEFAULT_RULES,
    param_dtype: str | None = None,
    max_distance: int | None = None,
    vocabulary: Vocabulary | str | os.PathLike[str] | None = None,
    dropout_rate: float = 0.0,
    remat: str = 'none',
    unroll: bool = False,
    attention: str = 'xla',
) -> Backbone:
  """A pretrained backbone from a directory, or a packaged one by name.

  The format is told from the files: the library's own layout, a Hugging Face folder of a
  T5, mT5 or umT5 (safetensors or `.bin`, in one file or sharded), or a T5X checkpoint
  (version 3, or Orbax). Shapes are checked now; weights are read when `.params` is first
  used.

  Args:
    where: a directory; a T5X checkpoint in a bucket (`gs://…`); the name of a packaged
      model such as 'nano' (a directory of that name here is './nano'), or of one of the same
      family that was made here (`ladder.py`); or that of a published one, T5X's
      ('t5_1_1_lm100k_base') or the Hugging Face hub's ('google/t5-base-lm-adapt'), which is
      downloaded once.
    dtype: type of the computation, 'float32' or 'bfloat16'; 'auto' is bfloat16 on a GPU or
      TPU and float32 on a CPU.
    mesh: the devices that the weights are split over (`partitioning.make_mesh`), read
      straight into their shards; one device where None.
    rules: which axes of the weights are split over which axis of the mesh.
    param_dtype: type the weights are held in; `dtype` unless named. A model whose
      weights will be trained in bfloat16 arithmetic should hold them in float32. 'int8' is
      for weights that stay frozen (`backbones/int8.py`), half of the memory of bfloat16.
    max_distance: maximal relative distance of the attention bias. T5X checkpoints do
      not record it: 128 if the model has T5's 32 buckets, else it must be given.
    vocabulary: the SentencePiece model, or its path, or 'bytes' (ByT5); by default the
      one that lies in the directory, if any. A backbone of the library's own layout
      records which one it was trained with, and takes no other; of the rest only the size
      can be checked.
    dropout_rate: of the frozen model while something trains.
    remat: name of a rematerialisation policy (`backbones.t5_stacks.REMAT_POLICIES`).
    unroll: whether to compile every layer for itself instead of scanning them.
    attention: how attention is computed (`T5.attention`): 'xla', 'dot_product' or 'cudnn'.

  Raises:
    FileNotFoundError: if there is no such directory or packaged model, or a file of
      it is missing.
    ValueError: if the format is unknown or not supported, files are damaged, shapes
      do not fit, or the vocabulary is not the recorded one or has more ids than the
      embedding has rows.
  """
  dtype = computation_dtype(dtype, mesh)
  int8 = check_param_dtype(param_dtype)
  if attention == 'cudnn':
    check_cudnn(dtype, _platform(mesh))
  path = find(where)
  checkpoint = open_checkpoint(path, max_distance)
  config = checkpoint.config
  vocabulary = vocabulary_of(checkpoint, vocabulary)
  held_as = dtype if param_dtype is None or int8 else jnp.dtype(param_dtype)

  def load_params() -> PyTree:
    return placing.load_params(
        checkpoint.weights, config, held_as, int8=int8, mesh=mesh, rules=rules
    )

  def content_hash() -> str:
    # Of the files, not of the weights as they are held: it must not depend on their type.
    return fingerprint(checkpoint.weights)

  return Backbone(
      name=_name(os.fspath(where), path),
      module=T5(
          config,
          dtype=dtype,
          dropout_rate=dropout_rate,
          remat=remat,
          unroll=unroll,
          attention=attention,
          int8=int8,
      ),
      vocabulary=vocabulary,
      load_params=load_params,
      source=path,
      fingerprint=checkpoint.fingerprint or content_hash,
      mesh=mesh,
      rules=rules,
      param_dtype=None if param_dtype is None else jnp.dtype(param_dtype).name,
  )


def packaged_names() -> list[str]:
  """Names of the models that ship inside the package."""
  if not _ZOO.is_dir():
    return []
  return sorted(path.name for path in _ZOO.iterdir() if native.is_native(path))


def computation_dtype(dtype: Any, mesh: Mesh | None = None) -> jnp.dtype:
  """The type that a backbone computes in.

  Args:
    dtype: 'float32', 'bfloat16', or 'auto' for what suits the devices.
    mesh: the devices; JAX's default where None.

  Raises:
    ValueError: if it is another.
  """
  if isinstance(dtype, str) and dtype == 'auto':
    return jnp.dtype('float32' if _platform(mesh) == 'cpu' else 'bfloat16')
  check_dtype('dtype', dtype, "'auto' is bfloat16 on a GPU or TPU and float32 on a CPU.")
  return jnp.dtype(dtype)


def _platform(mesh: Mesh | None) -> str:
  return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def check_param_dtype(param_dtype: Any) -> bool:
  """Whether weights are to be held in int8; refuses a type that they cannot be held in."""
  if isinstance(param_dtype, str) and param_dtype == 'int8':
    return True
  if param_dtype is not None:
    check_dtype('param_dtype', param_dtype, "Frozen weights may also be 'int8'.")
  return False


def check_dtype(label: str, dtype: Any, hint: str = '') -> None:
  """Raises ValueError unless `dtype`, called `label`, is one that weights may have.

  What else may stand there is in `hint`.
  """
  try:
    name = jnp.dtype(dtype).name
  except TypeError:
    name = repr(dtype)
  if name == 'float16':
    raise ValueError(
        f'{label} is float16, in which T5 overflows (its feed-forward outputs exceed '
        '65,504). Use bfloat16, which takes the same space, or float32.'
    )
  if name not in _DTYPES:
    raise ValueError(f'{label} is {name}; it may be {" or ".join(_DTYPES)}. {hint}'.rstrip())


def find(where: str | os.PathLike[str]) -> str:
  """The directory meant by a path or a name; a published model is downloaded.

  Raises:
    FileNotFoundError: if there is none; the message names the nearest.
    ValueError: if `where` is a file.
    OSError: if a published model cannot be fetched.
  """
  where = os.fspath(where)
  if where in packaged_names():
    return str(_ZOO / where)
  text = os.path.expanduser(where)
  if (made := ladder.made(text)) is not None:
    return made
  if os.path.isdir(text):
    return text.rstrip('/') or '/'
  if is_remote(text):
    return text.rstrip('/')
  if os.path.isfile(text):
    raise ValueError(
        f'{text} is a file; a backbone is a directory. Name the one that holds it: '
        f'{os.path.dirname(text) or "."}'
    )
  if is_elsewhere(text):
    return hub.fetch(hub.repository(text))
  raise FileNotFoundError(_not_found(text))


def after_adaptation(where: str | os.PathLike[str], steps: int) -> str:
  """The name or directory of a backbone after so many steps of LM adaptation.

  Args:
    where: the adapted backbone, by its name, or the directory that `adapt` ended with.
    steps: of adaptation; 0 is the model before.

  Raises:
    FileNotFoundError: if it was not kept at this step, or as `find`.
  """
  name, path = os.fspath(where), find(where)
  if not ladder.is_name(name):
    return ladder.at_step(path, steps)
  if ladder.adaptation_steps(path) == steps:
    return name
  known = [other for other in available() if re.fullmatch(rf'{name}_\d+', other)]
  if f'{name}_{steps}' in known:
    return f'{name}_{steps}'
  return ladder.at_step(path, steps, name, [int(other.rpartition('_')[2]) for other in known])


def available() -> list[str]:
  """Names of the packaged models, and of those of their family that were made here."""
  return list(dict.fromkeys([*packaged_names(), *ladder.names_made()]))


def is_elsewhere(where: str | os.PathLike[str]) -> bool:
  """Whether it takes a network to find a backbone: one in a bucket, or on the hub.

  What looks like `owner/model`, but begins with a folder of this machine, is a path.
  """
  text = os.path.expanduser(os.fspath(where))
  if is_remote(text):
    return True
  if text in available() or os.path.exists(text) or hub.repository(text) is None:
    return False
  folder = os.path.dirname(text)
  return not folder or not os.path.isdir(folder)


def fetched(where: str | os.PathLike[str]) -> str | None:
  """The folder of a published model that was downloaded before; None if it was not."""
  repository = hub.repository(os.fspath(where))
  return hub.fetched(repository) if repository else None


def _not_found(text: str) -> str:
  known = available()
  path = Path(text)
  if ladder.is_name(text):
    return (
        f'No backbone {text!r}: it is neither packaged nor was it made on this machine. There '
        f'are: {", ".join(known) or "none"}. {ladder.how_to_make(text)}'
    )
  near = [str(path.parent / name) for name in _near(path.name, _siblings(path))]
  if len(path.parts) == 1:
    near = list(dict.fromkeys(_near(text, [*known, *hub.PUBLISHED]) + near))
  hint = f' Did you mean {" or ".join(near)}?' if near else ''
  return (
      f'No backbone {text!r}: there is no such directory, and no packaged model of that '
      f'name.{hint} Packaged: {", ".join(known) or "none"}. Else name a directory that '
      'holds a T5X checkpoint, a Hugging Face model, or a backbone saved by this library; '
      'or a published model (t5_1_1_lm100k_base, google/t5-base-lm-adapt, …).'
  )


def _near(name: str, known: list[str]) -> list[str]:
  return difflib.get_close_matches(name, known, n=2, cutoff=0.5)


def _siblings(path: Path) -> list[str]:
  try:
    return [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
  except OSError:
    return []


def open_checkpoint(path: str, max_distance: int | None = None) -> Checkpoint:
  """Opens a directory with the reader its files call for.

  Raises:
    FileNotFoundError: if a file of it is missing.
    ValueError: if the format is unknown or not supported, or files are damaged.
  """
  with damage_named(path):
    return _open(path, max_distance)


def _open(path: str, max_distance: int | None) -> Checkpoint:
  if is_remote(path):
    try:
      return t5x.read_t5x(path, max_distance=max_distance)
    except FileNotFoundError as error:
      raise FileNotFoundError(
          f'{error} In a bucket only checkpoints that T5X itself wrote (a file `checkpoint`) are '
          'read: copy a model of another format to this machine first.'
      ) from error
  held = set(os.listdir(path))
  if native.is_native(path):
    return _with_distance(native.read_native(path), max_distance)
  if 'config.json' in held:
    return _with_distance(hf.read_hf(path), max_distance)
  if orbax.is_orbax(path):
    return orbax.read_orbax(path, max_distance=max_distance)
  if t5x.is_t5x(path):
    return t5x.read_t5x(path, max_distance=max_distance)
  inside = sorted(name for name in held if name.startswith('checkpoint_'))
  if inside:
    raise ValueError(
        f'{path} holds what a T5X run saved; name one of its steps: '
        + ', '.join(os.path.join(path, name) for name in inside)
    )
  raise ValueError(
      f'{path} is not a backbone of a known format. Expected config.json with '
      'model.safetensors (Hugging Face, or saved by this library), or a file `checkpoint` '
      f'(T5X); found {", ".join(sorted(held)[:8]) or "an empty directory"}.'
  )


def _with_distance(checkpoint: Checkpoint, max_distance: int | None) -> Checkpoint:
  recorded = checkpoint.config.relpos_max_distance
  if max_distance is not None and max_distance != recorded:
    raise ValueError(
        f'max_distance={max_distance} was given, but {checkpoint.path}/config.json says '
        f'{recorded}. Leave it out: only T5X checkpoints do not record it.'
    )
  return checkpoint


def vocabulary_of(
    checkpoint: Checkpoint, given: Vocabulary | str | os.PathLike[str] | None = None
) -> Vocabulary | None:
  """The vocabulary given, or the one beside the weights, if it can be the model's.

  Raises:
    FileNotFoundError, ValueError: if it is missing or damaged, is not the recorded one, or
      has more ids than the embedding has rows.
  """
  if not isinstance(given, Vocabulary):
    with damage_named(checkpoint.path):
      given = _find_vocabulary(checkpoint, given)
  if given is not None:
    _check_recorded(given, checkpoint)
    native.check_vocabulary(given, checkpoint.config.vocab_size)
  return given


def _find_vocabulary(
    checkpoint: Checkpoint, given: str | os.PathLike[str] | None
) -> Vocabulary | None:
  extra_ids = _extra_ids(checkpoint)
  if given is not None:
    return open_vocabulary(given, extra_ids)
  if checkpoint.format == 'native':
    recorded = checkpoint.manifest['vocabulary']
    if recorded is None:
      return None
    if recorded['file'] == byte_vocabulary.NAME:
      return ByteVocabulary(extra_ids)
    return Vocabulary(_own_vocabulary(checkpoint.path), extra_ids)
  if _tokenizer(checkpoint).get('tokenizer_class') == hf.BYTE_TOKENIZER:
    return ByteVocabulary()
  for name in _VOCABULARY_FILES:
    path = os.path.join(checkpoint.path, name)
    if os.path.isfile(path):
      return Vocabulary(path, extra_ids)
  return None


def _own_vocabulary(path: str) -> str:
  """The vocabulary's file in a directory; packaged models share one."""
  own = os.path.join(path, native.VOCABULARY_FILE)
  if not os.path.exists(own) and Path(path).parent == _ZOO:
    return str(_ZOO / 'nano' / native.VOCABULARY_FILE)
  return own


def _check_recorded(vocabulary: Vocabulary, checkpoint: Checkpoint) -> None:
  """Refuses a vocabulary other than the one that the backbone's config.json records."""
  recorded = checkpoint.manifest['vocabulary'] if checkpoint.format == 'native' else None
  if recorded is None or recorded['fingerprint'] == vocabulary.fingerprint:
    return
  own = _own_vocabulary(checkpoint.path)
  if os.path.realpath(vocabulary.path) != os.path.realpath(own):
    remedy = (
        f'Its ids stand for other words. Leave VOCABULARY unset, so that {own} is used, or '
        'name a copy of that file.'
    )
  elif vocabulary.extra_ids != recorded['extra_ids']:
    remedy = f'Give it extra_ids={recorded["extra_ids"]}, or leave the vocabulary out.'
  else:
    remedy = 'Fetch or copy the directory again.'
  raise ValueError(
      f'{vocabulary.path} with {vocabulary.extra_ids} sentinels is not the vocabulary this '
      f'backbone was saved with: its fingerprint is {vocabulary.fingerprint}, but '
      f'{os.path.join(checkpoint.path, native.CONFIG_FILE)} says '
      f'{recorded["fingerprint"]}, with {recorded["extra_ids"]} sentinels. {remedy}'
  )


def _extra_ids(checkpoint: Checkpoint) -> int:
  """How many sentinels follow the pieces: recorded beside the model, else T5's 100."""
  recorded = checkpoint.manifest.get('vocabulary')
  if checkpoint.format == 'native' and recorded is not None:
    return recorded['extra_ids']
  return int(_tokenizer(checkpoint).get('extra_ids', 100))


def _tokenizer(checkpoint: Checkpoint) -> dict[str, Any]:
  """What Hugging Face's tokenizer_config.json says, {} where there is none."""
  try:
    return read_json(os.path.join(checkpoint.path, 'tokenizer_config.json'))
  except FileNotFoundError:
    return {}


def _name(where: str, path: str) -> str:
  """A short name for messages: what it is published as, else the directory's.

  That of a run's step has the run's name before it.
  """
  if ladder.is_name(where) or (hub.repository(where) and not os.path.isdir(where)):
    return where
  resolved = Path(path).resolve()
  if resolved.name.startswith('checkpoint_'):
    return f'{resolved.parent.name}/{resolved.name}'
  return resolved.name
