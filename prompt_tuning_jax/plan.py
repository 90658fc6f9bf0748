"""`prompt-tuning plan`: what a run will cost, from shapes alone: no weights are made or read.

`plan_device.py` counts what a device holds and does, `plan_setting.py` has what may be changed so
that a run fits, and with --compile XLA's own figures stand beside it (`plan_compiled.py`).
"""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from prompt_tuning_jax import partitioning, plan_compiled, targets
from prompt_tuning_jax.backbones.backbone import Backbone
from prompt_tuning_jax.data import buckets, packing
from prompt_tuning_jax.methods import method as method_lib
from prompt_tuning_jax.methods.method import Method
from prompt_tuning_jax.plan_compiled import CompiledStep
from prompt_tuning_jax.plan_device import Counts, Run
from prompt_tuning_jax.plan_setting import Setting, easier_settings
from prompt_tuning_jax.targets import Target
from prompt_tuning_jax.training import trainable as trainable_lib
from prompt_tuning_jax.training.optimizers import default_optimizer


@dataclasses.dataclass(frozen=True)
class Plan(Counts):
  """What a step of a run costs on a target, and whether it fits.

  Attributes:
    target: the devices.
    setting: how the run lies on them.
    description: the run, in a line.
    advice: the flags that would make it fit, where it does not; '' where nothing would, or
      nothing was looked for.
    compiled: what XLA says of the same step, where it was asked.
    shares_heads: whether devices compute each head of attention together, for their number
      does not divide the heads; what they send for that is not counted.
  """

  target: Target
  setting: Setting
  description: str = ''
  advice: str = ''
  compiled: CompiledStep | None = None
  shares_heads: bool = False

  @property
  def fits(self) -> bool:
    """Whether that is surely there."""
    return self.total <= self.target.usable

  def __repr__(self) -> str:
    setting, target = self.setting, self.target
    partitions = setting.num_partitions
    data = target.count // partitions
    share = 100 * self.trained / max(self.trained + self.frozen, 1)
    seconds = ''
    if target.flops:
      least = self.flops / target.count / target.flops
      seconds = f'; {least:.3g} s at the full speed of the devices in bfloat16'
    held_as = setting.dtype
    if setting.param_dtype not in (None, setting.dtype):
      held_as = f'{setting.param_dtype}, computed in {setting.dtype}'
    verdict = 'fits'
    if not self.fits:
      verdict = 'does not fit' + (
          f'; would with {self.advice}' if self.advice else ', whatever is changed: use more '
          'or larger devices'
      )
    sent = ', '.join(f'{what} {_shown(size)}' for what, size in self.transfers.items() if size)
    if self.shares_heads:
      sent = f'at least {sent or "something"}: the heads do not divide among {partitions}'
    return '\n'.join([
        *([self.description] if self.description else []),
        f'target       {target.name}: {target.count} × {_shown(target.memory)}, mesh data {data} '
        f'× model {setting.num_partitions}',
        f'trains       {self.trained:,} of {self.trained + self.frozen:,} numbers ({share:.3g} %)',
        f'each device  weights      {_shown(self.weights)} ({held_as})',
        f'             state        {_shown(self.state)}',
        f'             activations  {_shown(self.activations)} (estimate; REMAT={setting.remat}, '
        f'MICROBATCHES={setting.microbatches})',
        f'             together     {_shown(self.total)} of {_shown(target.memory)}: {verdict}',
        f'a step       {self.flops / 1e12:.4g} TFLOP{seconds}',
        f'each sends   {sent or "nothing"}',
        *(self._compiled_lines() if self.compiled else []),
    ])

  def _compiled_lines(self) -> list[str]:
    """XLA's figures beside the estimate."""
    found = self.compiled
    lines = [f'compiled     by {found.compiler} in {found.seconds:.0f} s']
    arguments = (
        f'             arguments    {_shown(found.arguments)} (weights, state and batch; '
        f'estimate {_shown(self.weights + self.state)} without the batch)'
    )
    if found.refusal:
      return [*lines, arguments, f'             does not fit: {found.refusal}']
    sent = [
        f'{kind} {_shown(of.bytes)} in {of.count:,}' for kind, of in sorted(found.sent.items())
    ]
    fits = 'fits' if found.total <= self.target.memory else 'does not fit'
    return [
        *lines,
        arguments,
        f'             temporaries  {_shown(found.temporaries)} (estimate '
        f'{_shown(self.activations)})',
        f'             results      {_shown(found.results)}, beside what takes the place of '
        'arguments',
        f'             at once      {_shown(found.total)} of {_shown(self.target.memory)}: {fits}',
        # XLA's own count of FLOPs takes the body of a loop once, however often it runs.
        f'             each sends   {", ".join(sent) or "nothing"} (estimate '
        f'{_shown(sum(self.transfers.values()))})',
    ]


def plan(
    *,
    backbone: Backbone,
    target: str | Target = 'here',
    method: Method | None = None,
    trainable: Any = None,
    batch_size: int = 32,
    feature_lengths: Mapping[str, int] | None = None,
    lengths: str = 'pad',
    packed_length: int | None = None,
    microbatches: int = 1,
    dropout_rate: float = 0.0,
    dtype: str | None = None,
    num_partitions: int = 1,
    compiled: bool = False,
    advise: bool = True,
) -> Plan:
  """Counts what a step of a training run costs, and whether it fits.

  Args:
    backbone: the model and its rules; its sizes count, its weights are not read.
    target: the devices, or their name as `targets.parse` takes it.
    method: the prompt method; None tunes the model.
    trainable: the run's optimiser or labelling.
    batch_size: examples of a batch over all devices, each taken to be of the longest that
      there are.
    feature_lengths: longest inputs and targets in tokens.
    lengths: of them, 'pack' puts several into a row; shorter ones than the longest need
      fewer rows than are counted. The others are the same for the longest.
    packed_length: tokens of a packed row; None counts the longest that a run may choose.
    microbatches: parts of each batch.
    dropout_rate: of the model while it trains.
    dtype: 'auto' plans for what the target's devices compute in, whatever this machine's do;
      else the backbone's own counts.
    num_partitions: devices that share a copy of the model.
    compiled: whether to compile the step as well, for XLA's own figures; it takes a minute
      or two.
    advise: whether to look for what would make it fit where it does not, which takes seconds.

  Raises:
    ValueError: if the target is not known, or the devices, rows and parts do not divide, or
      the step is to be compiled for devices that only a machine with them can compile for.
    ImportError: if it is to be compiled for TPUs, and their compiler is not installed.
  """
  found = targets.parse(target) if isinstance(target, str) else target
  module = backbone.module.clone(dropout_rate=dropout_rate)
  on_accelerators = dtype == 'auto' and found.kind != 'here'
  setting = Setting(
      'bfloat16' if on_accelerators else jnp.dtype(module.dtype).name,
      module.remat,
      microbatches,
      num_partitions,
      tuple(map(tuple, backbone.rules)),
      'int8' if module.int8 else backbone.param_dtype,
  )
  limits = _lengths(feature_lengths)
  if trainable is None:
    trainable = default_optimizer(method)
  labelling = trainable_lib.as_labelling(trainable, method)
  check_divides(found, num_partitions, batch_size, microbatches)
  # What cannot be compiled is said before anything is counted.
  mesh = plan_compiled.mesh_of(found, num_partitions) if compiled else None
  rows, what_rows = batch_size, ''
  if lengths == 'pack':
    rows, limits, what_rows = _packed(method, limits, packed_length, batch_size, found, setting)
  run = Run(module, method, labelling, rows, limits, packed=lengths == 'pack')
  result = Plan(
      target=found,
      setting=setting,
      shares_heads=setting.shares_heads(module.config),
      **vars(run.counts(found, setting)),
  )
  advice = ''
  if advise and not result.fits:
    easier = easier_settings(setting, found, rows)
    if not any(prefix.split('/')[0] == 'backbone' for prefix in labelling):
      if setting.param_dtype == 'float32' and found.kind != 'here':
        easier = easier_settings(dataclasses.replace(setting, param_dtype='bfloat16'), found, rows)
      in_int8 = dataclasses.replace(setting, param_dtype='int8')
      easier = itertools.chain(easier, [in_int8], easier_settings(in_int8, found, rows))
    fitting = (s for s in easier if run.fits(found, s))
    better = next(fitting, None)
    advice = '' if better is None else setting.changes(better)
  what = 'model tuning' if method is None else type(method).__name__
  return dataclasses.replace(
      result,
      description=(
          f'run          {backbone.name}, {what}, {rows} rows of {limits["inputs"]} + '
          f'{run.prompt_length} input and {limits["targets"]} target tokens{what_rows}'
      ),
      advice=advice,
      compiled=run.compile(setting, mesh) if compiled else None,
  )


def _packed(
    method: Method | None,
    limits: Mapping[str, int],
    packed_length: int | None,
    batch_size: int,
    target: Target,
    setting: Setting,
) -> tuple[int, dict[str, int], str]:
  """Packed rows of the longest examples: how many, what is in each, and that in words."""
  prompt, in_decoder = 0, 0
  if method is not None:
    prompt, in_decoder = method.num_virtual_tokens, method.num_decoder_virtual_tokens
  longest = limits['inputs'] + prompt
  # The examples there are may be shorter than allowed, and rows too.
  longest = min(longest, packed_length or longest)
  width = packing.packed_widths(packed_length, longest, limits, prompt)[-1]
  in_row = width // longest
  multiple = target.count // setting.num_partitions * setting.microbatches
  rows = buckets.round_up(-(-batch_size // in_row), multiple)
  # Each row gets one prompt from `method.batch_shapes`; those of the others are part of the rest.
  of_row = {
      'inputs': width - prompt,
      'targets': in_row * (limits['targets'] + in_decoder) - in_decoder,
  }
  return rows, of_row, f', of {batch_size} packed examples of the longest'


def plan_here(*, backbone: Backbone, **run: Any) -> Plan:
  """`plan` for the devices of this machine, as the backbone lies on them."""
  here, mesh = targets.parse('here'), backbone.mesh
  if mesh is None:
    here = dataclasses.replace(here, count=1)
  partitions = 1 if mesh is None else mesh.shape['model']
  return plan(backbone=backbone, target=here, num_partitions=partitions, **run)


def check_memory(*, backbone: Backbone, **run: Any) -> None:
  """Looks whether a run fits on this machine's devices, before its weights are read.

  Args:
    backbone: the model, on the mesh of the run.
    **run: what `plan` takes of a run.

  Raises:
    MemoryError: if weights and state alone are larger than an accelerator's memory. Of what
      is an estimate, and of a CPU, which may swap, it warns.
  """
  known = targets.memory_here() is not None
  if not known and jax.default_backend() != 'cpu':
    return
  memory = targets.parse('here').memory
  if _at_most(backbone, **run) < memory:
    return
  found = plan_here(backbone=backbone, **run)
  if found.total <= memory:
    return
  message = f'The devices of this machine are too small for this run:\n{found}'
  if known and found.weights + found.state > memory:
    raise MemoryError(message)
  warnings.warn(f'{message}\nIt is tried all the same.', stacklevel=2)


def _at_most(
    backbone: Backbone,
    method: Method | None = None,
    batch_size: int = 32,
    feature_lengths: Mapping[str, int] | None = None,
    packed_length: int | None = None,
    **others: Any,
) -> float:
  """Bytes that no step of a run reaches on one device, in no time: counting takes seconds.

  As if all of the model trained by Adam, in float32, and a step kept all that it computes.
  """
  del others
  config, lengths = backbone.module.config, _lengths(feature_lengths)
  of_token = 30 * (config.d_model + config.num_heads * config.d_kv) + 10 * config.d_ff
  tokens = lengths['inputs'] + lengths['targets'] + (packed_length or 0)
  trained = 0
  if method is not None:
    tokens += method.num_virtual_tokens + method.num_decoder_virtual_tokens
    trained = trainable_lib.count(method_lib.shapes(method, backbone.spec)[0])
  layers = config.num_encoder_layers + config.num_decoder_layers
  activations = layers * (of_token + 10 * config.num_heads * tokens) + 10 * config.vocab_size
  return 4.0 * (6 * (backbone.num_params + trained) + batch_size * tokens * activations)


def _lengths(given: Mapping[str, int] | None) -> dict[str, int]:
  """The lengths of a run, those of `train` where they are not given."""
  return {'inputs': 512, 'targets': 8, **(given or {})}


def check_divides(target: Target, partitions: int, rows: int, microbatches: int) -> None:
  """Raises ValueError unless a batch divides among a target's devices and its parts."""
  if rows < 1:
    raise ValueError(f'BATCH_SIZE={rows}, but a batch has at least one row.')
  count = target.of_slice
  if count % partitions:
    raise ValueError(
        f'NUM_PARTITIONS={partitions} does not divide the {count} devices of '
        + ('each slice of ' if target.slices > 1 else '')
        + f'{target.name}. It may be {", ".join(map(str, partitioning.divisors(count)))}.'
    )
  data = target.count // partitions
  if rows % data:
    raise ValueError(
        f'BATCH_SIZE={rows} does not divide among the {data} copies of the model on '
        f'{target.name}. Use a multiple of {data}, or a larger NUM_PARTITIONS.'
    )
  partitioning.check_microbatches(microbatches, rows // data, 'the {} rows of a device')


def _shown(size: float) -> str:
  for unit, name in ((2**30, 'GiB'), (2**20, 'MiB'), (2**10, 'KiB')):
    if size >= unit:
      return f'{size / unit:.3g} {name}'
  return f'{size:.0f} bytes'
