"""The prompt artifact: what users keep and share of a tuned prompt, in one file.

A safetensors file with the folded Injection (no reparameterisation, no optimiser
state, no weights of the backbone) and, in its header, a manifest that says which
backbone the prompt belongs to and how its inputs are laid out. One sha256 over
manifest and arrays is checked on loading; nothing in the file is executed.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.numpy

from prompt_tuning_jax.checkpoints.source import open_safetensors
from prompt_tuning_jax.data.provenance import library_version
from prompt_tuning_jax.injection_arrays import (
    SETTINGS,
    check_numbers,
    injection_of,
    named_arrays,
    prompt_length,
)
from prompt_tuning_jax.json_files import as_json, canonical_json
from prompt_tuning_jax.typing import BackboneSpec, Injection
from prompt_tuning_jax.writing import written_whole

if TYPE_CHECKING:
  from prompt_tuning_jax.backbones.backbone import Backbone

FORMAT = 'prompt_tuning_jax.prompt'
FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
  """What an artifact says of its prompt; '' or None where it is not known.

  Attributes:
    backbone: name of the backbone the prompt was trained with.
    backbone_fingerprint: content hash of that backbone's weights.
    backbone_spec: that backbone's sizes.
    backbone_weights: 'int8' where they were held so while the prompt trained; it goes with the
      weights they were rounded from as well.
    vocabulary_fingerprint: hash of the vocabulary.
    method: the prompt method's class, 'SoftPrompt'.
    num_virtual_tokens: virtual tokens that the data pipeline places in each input.
    placement: where it places them, as `data.virtual_tokens.as_placement` takes it.
    task: the task or mixture it was trained on.
    feature_lengths: lengths of 'inputs' and 'targets' in tokens.
    target_prefix: what stood before every target, such as '<extra_id_0>'.
    metrics: scores on the validation split, by name.
    step: training step.
    created_by: the command that made it.
    library_version: version of this library that wrote it.
    format_version: version of the file's layout.
  """

  backbone: str = ''
  backbone_fingerprint: str = ''
  backbone_spec: BackboneSpec | None = None
  backbone_weights: str = ''
  vocabulary_fingerprint: str = ''
  method: str = ''
  num_virtual_tokens: int = 0
  placement: str | Mapping[str, Any] = ''
  task: str = ''
  feature_lengths: Mapping[str, int] = dataclasses.field(default_factory=dict)
  target_prefix: str = ''
  metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
  step: int | None = None
  created_by: str = ''
  library_version: str = ''
  format_version: int = FORMAT_VERSION


@dataclasses.dataclass(frozen=True, repr=False)
class Prompt:
  """A tuned prompt: the arrays a backbone takes, and where they belong.

  Attributes:
    injection: the folded arrays.
    manifest: what is known of them.
    source: the file it was loaded from, for messages.
  """

  injection: Injection
  manifest: Manifest
  source: str = dataclasses.field(default='', compare=False)

  @property
  def length(self) -> int:
    """Rows of the soft prompt, or positions of the prefix where there is none."""
    return prompt_length(self.injection)

  def save(self, path: str | os.PathLike[str]) -> None:
    """Writes the artifact, or nothing: an existing file is replaced at the end.

    Raises:
      ValueError: if the injection is empty, does not fit its manifest or holds numbers
        that are not finite, or the name promises another format.
      OSError: if it cannot be written.
    """
    if os.fspath(path).endswith('.npy'):
      raise ValueError(
          f'An artifact is a safetensors file and cannot be called {path}: name it '
          '.safetensors.'
      )
    arrays = named_arrays(self.injection)
    _check_own(self.injection, self.manifest, 'The injection to save')
    described = {'format': FORMAT, **as_json(dataclasses.asdict(self.manifest))}
    described['injection'] = {name: getattr(self.injection, name) for name in SETTINGS}
    described['sha256'] = _sha256(described, arrays)
    content = safetensors.numpy.save(arrays, metadata={'manifest': canonical_json(described)})
    with written_whole(path) as unfinished:
      with open(unfinished, 'wb') as file:
        file.write(content)

  def check(
      self,
      backbone: Backbone,
      *,
      length: int | None = None,
      method: str | None = None,
  ) -> None:
    """Refuses the prompt unless it belongs to this backbone and this run.

    Args:
      backbone: the model it is to be used with.
      length: the length the run expects, if it expects one.
      method: the prompt method the run expects, if it expects one.

    Raises:
      ValueError: on another length, method, width, backbone or vocabulary. A prompt
        is never cut, repeated or broadcast to fit.
    """
    what, trained_with = self._what(), self.manifest.backbone or 'another backbone'
    if length is not None and length != self.length:
      raise ValueError(
          f'{what} has length {self.length}, but this run expects {length} '
          f'(PROMPT_LENGTH). Set PROMPT_LENGTH = {self.length}, or use a prompt of '
          f'length {length}.'
      )
    if method is not None and self.manifest.method and method != self.manifest.method:
      raise ValueError(
          f'{what} was made by the method {self.manifest.method}, but this run uses '
          f'{method}. Use the same method, or a prompt made by {method}.'
      )
    spec = self.manifest.backbone_spec
    if spec is not None and spec != backbone.spec:
      raise ValueError(
          f'{what} was trained for {trained_with} ({_differences(spec, backbone.spec)}), '
          f'but this run uses {backbone.name} ({_differences(backbone.spec, spec)}). Load '
          f'the backbone it was trained with, or train a new prompt for {backbone.name}.'
      )
    try:
      self.injection.check(backbone.spec)
    except ValueError as error:
      raise ValueError(f'{what} does not fit {backbone.name}: {error}') from error
    expected = self.manifest.backbone_fingerprint
    if expected and expected != backbone.fingerprint:
      raise ValueError(
          f'{what} was trained for {trained_with} with the weights {expected[:12]}…, but '
          f'{backbone.name} from {backbone.source} has the weights '
          f'{backbone.fingerprint[:12]}…: of the same size, but another model. Load the '
          f'backbone it was trained with, or train a new prompt for {backbone.name}.'
      )
    expected = self.manifest.vocabulary_fingerprint
    if expected and backbone.vocabulary and expected != backbone.vocabulary.fingerprint:
      raise ValueError(
          f'{what} was trained with the vocabulary {expected[:12]}…, but {backbone.name} '
          f'uses {backbone.vocabulary.path} ({backbone.vocabulary.fingerprint[:12]}…). '
          'Load the backbone with the vocabulary the prompt was trained with.'
      )

  def _what(self) -> str:
    return f'The prompt {self.source}' if self.source else 'The prompt'

  def __repr__(self) -> str:
    manifest = self.manifest
    count = sum(array.size for array in named_arrays(self.injection).values())
    lines = [f'Prompt: {self.injection}, {count:,} numbers']

    def add(label: str, *parts: str) -> None:
      text = ', '.join(part for part in parts if part)
      if text:
        lines.append(f'  {label:<10} {text}')

    weights = manifest.backbone_fingerprint
    held_as = manifest.backbone_weights and f'held in {manifest.backbone_weights}'
    add('backbone', manifest.backbone, weights and f'weights {weights[:12]}…', held_as)
    add('method', manifest.method)
    add('placement', _placement(manifest.placement))
    prefix = manifest.target_prefix and f'targets begin with {manifest.target_prefix}'
    add('task', manifest.task, _pairs(manifest.feature_lengths), prefix)
    add('metrics', _pairs(manifest.metrics), _step(manifest.step))
    add('made by', manifest.created_by)
    add('from', self.source)
    return '\n'.join(lines)


def save_prompt(
    path: str | os.PathLike[str],
    injection: Injection,
    *,
    backbone: Backbone | None = None,
    **fields: Any,
) -> Prompt:
  """Writes a tuned prompt as one safetensors file and returns it as loaded.

  Args:
    path: where to; the ending .safetensors is customary.
    injection: the folded arrays, `method.apply({'params': params}, spec)`.
    backbone: the backbone it was trained with: gives name, fingerprint, sizes and
      vocabulary. None where it is unknown; the prompt then fits any of its width.
    **fields: further fields of `Manifest`: method, placement (a `Placement`, or its
      description), task, feature_lengths, target_prefix, metrics, step, created_by.
      `num_virtual_tokens` is the length of the soft prompt unless it is named.

  Raises:
    TypeError: if there is no such field, naming the nearest.
    ValueError: if the injection is empty, does not fit the backbone, or holds numbers
      that are not finite.
    OSError: if it cannot be written.
  """
  known = [field.name for field in dataclasses.fields(Manifest)]
  for name in fields:
    if name not in known:
      near = difflib.get_close_matches(name, known, n=1)
      hint = f' Did you mean {near[0]!r}?' if near else ''
      raise TypeError(
          f'save_prompt got an unknown field {name!r}.{hint} A manifest has '
          f'{", ".join(known)}.'
      )
  if backbone is not None:
    fields = {
        'backbone': backbone.name,
        'backbone_fingerprint': backbone.fingerprint,
        'backbone_spec': backbone.spec,
        'backbone_weights': 'int8' if getattr(backbone.module, 'int8', False) else '',
        'vocabulary_fingerprint': getattr(backbone.vocabulary, 'fingerprint', ''),
    } | fields
  fields.setdefault('num_virtual_tokens', injection.num_virtual_tokens)
  if 'placement' in fields:
    fields['placement'] = getattr(fields['placement'], 'description', fields['placement'])
  fields['library_version'] = library_version()
  prompt = Prompt(injection, Manifest(**fields))
  prompt.save(path)
  return load_artifact(path)


def load_artifact(path: str | os.PathLike[str]) -> Prompt:
  """Reads an artifact; `prompt_files.load_prompt` reads other forms of a prompt as well.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if it is damaged, not an artifact, of a newer version, or holds numbers
      that are not finite.
  """
  path = os.fspath(path)
  stored, metadata = open_safetensors(path)
  try:
    described = json.loads(metadata['manifest'])
    recorded = described.pop('sha256')
    is_ours = described['format'] == FORMAT
  except (KeyError, TypeError, ValueError, AttributeError):
    is_ours = False
  if not is_ours:
    raise ValueError(
        f'{path} is a safetensors file, but not a prompt artifact of this library: it has '
        f'no readable manifest. It holds {", ".join(list(stored)[:4]) or "nothing"}. '
        'Export the prompt again, or name another file.'
    )
  arrays = {name: stored[name] for name in stored}
  found = _sha256(described, arrays)
  if found != recorded:
    raise ValueError(
        f'{path} is damaged: the sha256 of its content is {found}, but its manifest says '
        f'{recorded}. Fetch or copy it again, or export the prompt again.'
    )
  del described['format']
  settings = described.pop('injection', {})
  version = described.get('format_version')
  if version != FORMAT_VERSION:
    raise ValueError(
        f'{path} has format_version {version!r}; this version of the library reads '
        f'{FORMAT_VERSION}. It was written by version '
        f'{described.get("library_version")!r}: install that one or a newer one.'
    )
  try:
    if described['backbone_spec'] is not None:
      described['backbone_spec'] = BackboneSpec(**described['backbone_spec'])
    manifest = Manifest(**described)
  except (KeyError, TypeError) as error:
    raise ValueError(
        f'{path} has a manifest of other fields than format_version {FORMAT_VERSION} '
        f'({error!r}): it was not written by this library. Export the prompt again.'
    ) from error
  _check_types(manifest, path)
  injection = injection_of(arrays, settings, path)
  _check_own(injection, manifest, path)
  return Prompt(injection, manifest, source=path)


def _check_types(manifest: Manifest, path: str) -> None:
  """Refuses fields that are not of the type that whoever reads them relies on."""
  def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)

  def maps_to_numbers(value):
    return isinstance(value, dict) and all(map(is_number, value.values()))

  expected = {
      'num_virtual_tokens': ('a whole number', lambda v: isinstance(v, int) and v >= 0),
      'step': ('a whole number or null', lambda v: v is None or isinstance(v, int)),
      'feature_lengths': ('numbers by name', maps_to_numbers),
      'metrics': ('numbers by name', maps_to_numbers),
      'placement': ('a text or an object', lambda v: isinstance(v, (str, dict))),
  }
  texts = (
      'backbone', 'backbone_fingerprint', 'backbone_weights', 'vocabulary_fingerprint', 'method',
      'task', 'target_prefix',
  )  # fmt: skip
  expected |= {name: ('a text', lambda v: isinstance(v, str)) for name in texts}
  for name, (kind, accepts) in expected.items():
    value = getattr(manifest, name)
    if not accepts(value):
      raise ValueError(
          f'{path} has {name} {value!r} in its manifest; {kind} was expected. It was not '
          'written by this library: export the prompt again.'
      )


def _check_own(injection: Injection, manifest: Manifest, what: str) -> None:
  """Refuses arrays that are none, no numbers, or not those that the manifest speaks of."""
  if injection.num_prompts > 1:
    raise ValueError(
        f'{what} holds {injection.num_prompts} prompts, and a file holds one: save each of those '
        'that were stacked.'
    )
  arrays = named_arrays(injection)
  if not arrays:
    raise ValueError(f'{what} is empty: there is no prompt in it.')
  check_numbers(arrays, what)
  rows = injection.virtual_embeddings
  in_decoder = injection.num_decoder_virtual_tokens
  if in_decoder < 0 or (in_decoder and rows is None):
    raise ValueError(
        f'{what} says that {in_decoder} virtual tokens stand in the decoder, but has no rows '
        'for them.'
    )
  count = manifest.num_virtual_tokens + in_decoder
  if rows is not None and rows.shape[:-1] != (count,):
    raise ValueError(
        f'{what}: virtual_embeddings has shape {list(rows.shape)}, but the manifest says '
        f'num_virtual_tokens={manifest.num_virtual_tokens} (and '
        f'{in_decoder} in the decoder). A file holds one prompt, '
        'as [virtual tokens, d_model].'
    )
  if manifest.backbone_spec is not None:
    try:
      injection.check(manifest.backbone_spec)
    except ValueError as error:
      raise ValueError(f'{what} does not fit the backbone of its manifest: {error}') from error


def _sha256(described: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
  digest = hashlib.sha256(canonical_json(described).encode())
  for name in sorted(arrays):
    array = np.ascontiguousarray(arrays[name])
    digest.update(f'{name} {array.dtype} {list(array.shape)}\n'.encode())
    digest.update(array.tobytes())
  return digest.hexdigest()


def _differences(spec: BackboneSpec, other: BackboneSpec) -> str:
  mine, theirs = dataclasses.asdict(spec), dataclasses.asdict(other)
  return ', '.join(f'{name}={mine[name]}' for name in mine if mine[name] != theirs[name])


def _pairs(values: Mapping[str, Any]) -> str:
  return ', '.join(
      f'{name} {value:.4g}' if isinstance(value, float) else f'{name} {value}'
      for name, value in values.items()
  )


def _placement(placement: str | Mapping[str, Any]) -> str:
  return placement if isinstance(placement, str) else _pairs(placement)


def _step(step: int | None) -> str:
  return '' if step is None else f'step {step:,}'
