"""Prompts in whatever form people keep them: read, taken in as artifacts, and handed on."""

from __future__ import annotations

import difflib
import os
import warnings
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax import peft
from prompt_tuning_jax.artifact import (
    Manifest,
    Prompt,
    load_artifact,
    save_prompt,
)
from prompt_tuning_jax.checkpoints import hub, orbax, t5x
from prompt_tuning_jax.checkpoints.source import Weights, damage_named
from prompt_tuning_jax.injection_arrays import check_numbers
from prompt_tuning_jax.typing import Injection
from prompt_tuning_jax.writing import check_local, is_remote, written_whole

if TYPE_CHECKING:
  from prompt_tuning_jax.backbones.backbone import Backbone

# What an imported prompt's artifact keeps of what was known of it.
_CARRIED_OVER = (
    'method', 'num_virtual_tokens', 'task', 'feature_lengths', 'target_prefix', 'metrics', 'step',
)  # fmt: skip
_NPY_MAGIC = b'\x93NUMPY'
_FORMS = (
    'an artifact of this library (.safetensors), an array [P, D] of the original code '
    "(.npy), a PEFT adapter's directory, or a T5X checkpoint directory with a prompt"
)


def load_prompt(path: str | os.PathLike[str]) -> Prompt:
  """Reads an artifact, a `.npy` array [P, D], a PEFT adapter or a T5X checkpoint's prompt.

  Only an artifact says all that there is to know of a prompt. Of the others, what can be
  checked against a backbone is their shape.

  Args:
    path: an artifact of this library, or a `.npy` file of the original code; or the
      directory of a PEFT adapter, of a T5X checkpoint of a prompt-tuned run, which may lie in
      a bucket (`gs://…`), or the MODEL_DIR of a run of this library.

  Raises:
    FileNotFoundError: if there is no such file or directory.
    ValueError: if it is damaged, not a prompt, empty, of a newer version, a pickle
      (which is never opened), or holds numbers that are not finite.
  """
  path = os.fspath(path)
  with damage_named(path):
    return _load(path)


def _load(path: str) -> Prompt:
  if is_remote(path):
    return _of_checkpoint(path, *t5x.read_prompts(path))
  if os.path.isdir(path):
    return _load_directory(path)
  if not os.path.isfile(path):
    raise FileNotFoundError(_not_found(path))
  with open(path, 'rb') as file:
    start = file.read(9)
  if start.startswith(_NPY_MAGIC):
    return _load_npy(path)
  # The length of a safetensors header may begin like a pickle; a brace follows it.
  is_pickle = start[:1] == b'\x80' and start[8:] not in (b'', b'{')
  if is_pickle or path.endswith('.npy'):
    raise ValueError(
        f'{path} is not an array in .npy format; it may be a Python pickle, which could '
        'run any code and is never opened. Save the prompt with numpy.save(path, array).'
    )
  return load_artifact(path)


def import_prompt(
    *,
    backbone: Backbone,
    import_path: str,
    output: str,
    created_by: str = 'prompt_tuning_jax.import_prompt',
) -> Prompt:
  """Writes a prompt in another form as an artifact that belongs to a backbone.

  Args:
    backbone: the model it was trained with. What is not an artifact does not say which
      that was, so that only its shape can be checked.
    import_path: what to read, as `load_prompt` takes it.
    output: the artifact to write.
    created_by: the command, for the manifest.

  Returns:
    The prompt as its artifact holds it.

  Raises:
    FileNotFoundError, ValueError, OSError: as `load_prompt`, `Prompt.check`, `save_prompt`.
  """
  prompt = load_prompt(import_path)
  prompt.check(backbone)
  said = prompt.manifest.backbone
  is_artifact = bool(prompt.manifest.backbone_fingerprint)
  if said and not is_artifact and _published(said) != _published(backbone.name):
    warnings.warn(
        f'{import_path} says that it was trained with {said}; its artifact will say '
        f'{backbone.name} ({backbone.source}). Their sizes agree; whether it is the same '
        'model cannot be told from the file.',
        stacklevel=2,
    )
  known = {name: getattr(prompt.manifest, name) for name in _CARRIED_OVER}
  if is_artifact:
    known['backbone_weights'] = prompt.manifest.backbone_weights
  return save_prompt(
      output,
      prompt.injection,
      backbone=backbone,
      placement=prompt.manifest.placement or 'prefix',
      created_by=created_by,
      **known,
  )


def _published(name: str) -> str:
  """The one name of a model that has several: T5X's and the Hugging Face hub's."""
  return hub.repository(name) or name


def export_prompt(
    prompt: Prompt,
    export_path: str | os.PathLike[str],
    backbone: Backbone,
    *,
    base_model: str | None = None,
) -> None:
  """Writes a prompt for other programs.

  Args:
    prompt: the prompt.
    export_path: a file that ends in `.npy` for the array [P, D] of the original code; any
      other path becomes the directory of a PEFT adapter. It must not exist yet.
    backbone: the model it belongs to.
    base_model: that model's Hugging Face name, for the adapter.

  Raises:
    ValueError: if the prompt is of another model, or the form cannot express it.
    FileExistsError, OSError: if it cannot be written.
  """
  export_path = os.fspath(export_path)
  check_local(export_path)
  if export_path.endswith('.safetensors'):
    raise ValueError(
        f'{export_path} is called like an artifact, which the prompt is already. EXPORT_PATH '
        'is the directory of a PEFT adapter, or a file that ends in .npy.'
    )
  if not export_path.endswith('.npy'):
    peft.save_adapter(export_path, prompt, backbone, base_model=base_model)
    return
  prompt.check(backbone)
  rows_PD = prompt.injection.virtual_embeddings
  others = len(jax.tree.leaves(prompt.injection)) > 1
  if rows_PD is None or others or prompt.injection.num_decoder_virtual_tokens:
    raise ValueError(
        f'{prompt.source or "The prompt"} is {prompt.injection}; a .npy file holds a soft '
        'prompt [P, D] and nothing else. Keep the artifact.'
    )
  if prompt.manifest.placement not in ('', 'prefix'):
    raise ValueError(
        f'{prompt.source or "The prompt"} has virtual tokens elsewhere than in front '
        f'({prompt.manifest.placement}), which a .npy file cannot say. Keep the artifact.'
    )
  if os.path.lexists(export_path):
    raise FileExistsError(f'{export_path} exists already and is not overwritten.')
  with written_whole(export_path) as unfinished, open(unfinished, 'wb') as file:
    np.save(file, np.asarray(rows_PD, np.float32))


def _load_directory(path: str) -> Prompt:
  if peft.is_adapter(path):
    return peft.load_adapter(path)
  if os.path.isfile(artifact := os.path.join(path, 'prompt.safetensors')):
    return load_artifact(artifact)  # What a run left in its MODEL_DIR.
  if orbax.is_orbax(path):
    return _of_checkpoint(path, *orbax.read_prompts(path))
  if t5x.is_t5x(path):
    return _of_checkpoint(path, *t5x.read_prompts(path))
  raise FileNotFoundError(f'{path} is a directory, but no prompt. A prompt is {_FORMS}.')


def _of_checkpoint(path: str, prompts: Weights, step: int | None) -> Prompt:
  matrices = [name for name, array in prompts.specs.items() if len(array.shape) == 2]
  if len(matrices) != 1 or not matrices[0].startswith('encoder/'):
    raise ValueError(
        f'{path} holds {", ".join(prompts) or "no prompt"}. A prompt is read from a T5X '
        'checkpoint that holds one of the encoder, such as encoder/prompt/prompt/prompt '
        '[P, D].'
    )
  array = np.asarray(prompts[matrices[0]], np.float32)
  return _soft_prompt(array, path, f'{path}: {matrices[0]}', step=step)


def _load_npy(path: str) -> Prompt:
  try:
    # Mapping the file refuses objects, and headers that claim more than it holds.
    array = np.array(np.load(path, mmap_mode='r', allow_pickle=False))
  except Exception as error:  # numpy parses the header with Python's own tokeniser.
    raise ValueError(
        f'{path} cannot be read as an array ({error}). If it holds Python objects, they '
        'are a pickle, which could run any code and is never opened; else it was probably '
        'cut off. Save the prompt again with numpy.save(path, array).'
    ) from error
  if array.ndim != 2 or not np.issubdtype(array.dtype, np.floating):
    raise ValueError(
        f'{path} holds an array of shape {list(array.shape)} and type {array.dtype}; a '
        'prompt is [prompt length, d_model] of floating-point numbers.'
    )
  with np.errstate(over='ignore'):  # What float32 cannot hold is refused below.
    array = array.astype(np.float32)
  return _soft_prompt(array, path, path)


def _soft_prompt(
    array: np.ndarray, path: str, what: str, *, step: int | None = None
) -> Prompt:
  check_numbers({'virtual_embeddings': array}, what)
  injection = Injection(virtual_embeddings=jnp.asarray(array))
  return Prompt(injection, Manifest(num_virtual_tokens=len(array), step=step), source=path)


def _not_found(path: str) -> str:
  folder, name = os.path.split(path)
  try:
    near = difflib.get_close_matches(name, os.listdir(folder or '.'), n=1)
  except OSError:
    return f'No prompt {path}: there is no directory {folder}.'
  hint = f' Did you mean {os.path.join(folder, near[0])}?' if near else ''
  return f'No prompt {path}: there is no such file.{hint}'
