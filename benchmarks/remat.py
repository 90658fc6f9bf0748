"""What each rematerialisation policy costs: memory of a chip and FLOPs of a step, by size.

  pip install 'jax[tpu]'               # libtpu, the compiler; no TPU is needed
  python benchmarks/remat.py --size base xl xxl

Compiles the train step of a soft prompt for a slice of TPUs, layers scanned, from shapes:
no weights are made. Each line is a process of its own, for one compilation takes gigabytes
of this machine's memory and a minute or more of a core. For each policy:

  weights       bytes of weights, state and batch on a chip, by XLA's TPU compiler
  temporaries   bytes of all that the step computes there; where that does not fit, what the
                compiler says
  at once       bytes that all of it takes at once: temporaries share memory
  step          FLOPs of the step's products over those of a forward pass, counted in their
                jaxprs (`costs.py`): XLA counts the body of a loop once

The last line of each is the same as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys

os.environ.setdefault('JAX_PLATFORMS', 'cpu')


def measure(size: str, remat: str, args: argparse.Namespace) -> dict:
  """One policy: what the plan says, and the compiler."""
  import jax
  import jax.numpy as jnp
  from load_backbone import config_of

  from prompt_tuning_jax import partitioning, plan, plan_compiled
  from prompt_tuning_jax.backbones.backbone import Backbone
  from prompt_tuning_jax.backbones.t5 import T5
  from prompt_tuning_jax.methods.soft_prompt import SoftPrompt

  plan_compiled.quiet_libtpu()
  method = SoftPrompt(args.length)
  module = T5(config_of(size), dtype=jnp.bfloat16, remat=remat)
  found = plan.plan(
      backbone=Backbone(
          f'T5 1.1 {size}',
          module,
          None,
          dict,
          rules=partitioning.RULES[args.parameter_partitioning_dims],
      ),
      target=args.target,
      method=method,
      batch_size=args.batch,
      feature_lengths={'inputs': args.inputs, 'targets': args.targets},
      microbatches=args.microbatches,
      num_partitions=args.partitions or args.default_partitions[size],
      compiled=not args.estimate,
  )
  result = {
      'size': size,
      'remat': remat,
      'partitions': found.setting.num_partitions,
      'step': round(found.flops / forward_flops(module, method, args), 3),
      'estimate_gib': round(found.activations / 2**30, 2),
      'jax': jax.__version__,
  }
  if found.compiled is not None:
    result |= {
        'weights_gib': round(found.compiled.arguments / 2**30, 2),
        'temporaries_gib': round(found.compiled.temporaries / 2**30, 2),
        'at_once_gib': round(found.compiled.total / 2**30, 2),
        'seconds': round(found.compiled.seconds),
        'refusal': found.compiled.refusal,
        'compiler': found.compiled.compiler,
    }
  return result


def forward_flops(module, method, args: argparse.Namespace) -> float:
  """FLOPs of the products of a forward pass of the whole batch."""
  import jax

  from prompt_tuning_jax import costs
  from prompt_tuning_jax.methods import method as method_lib

  params = {
      'prompt': method_lib.shapes(method, module.spec)[0],
      'backbone': jax.eval_shape(module.init_params, jax.random.key(0)),
  }

  def forward(params, batch):
    injection = method.apply({'params': params['prompt']}, module.spec)
    return module.apply({'params': params['backbone']}, batch, injection)

  batch = method_lib.batch_shapes(method, args.batch, args.inputs, args.targets)
  return costs.count(forward, params, batch).flops


def main() -> None:
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--size', nargs='+', default=['base', 'xl', 'xxl'])
  parser.add_argument('--remat', nargs='+', help='policies (default: all)')
  parser.add_argument('--target', default='v5e-8')
  parser.add_argument(
      '--partitions', type=int, help='devices that share a copy (default 1, of xl 2, of xxl 8)'
  )
  parser.add_argument('--parameter_partitioning_dims', type=int, default=1)
  parser.add_argument('--microbatches', type=int, default=1)
  parser.add_argument('--batch', type=int, default=32)
  parser.add_argument('--length', type=int, default=100)
  parser.add_argument('--inputs', type=int, default=512)
  parser.add_argument('--targets', type=int, default=8)
  parser.add_argument('--estimate', action='store_true', help='compile nothing')
  parser.add_argument('--one', action='store_true', help=argparse.SUPPRESS)
  args = parser.parse_args()
  args.default_partitions = {'xl': 2, 'xxl': 8}
  args.default_partitions = {size: args.default_partitions.get(size, 1) for size in args.size}
  if args.one:
    print(json.dumps(measure(args.size[0], args.remat[0], args)))
    return
  from prompt_tuning_jax.backbones.t5_stacks import REMAT_POLICIES

  print('size  policy                     weights  temporaries    at once   step')
  found = []
  for size in args.size:
    for remat in args.remat or REMAT_POLICIES:
      command = [sys.executable, *sys.argv, '--one', '--size', size, '--remat', remat]
      output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
      one = json.loads(output.splitlines()[-1])
      found.append(one)
      temporaries = f'{one.get("temporaries_gib") or one["estimate_gib"]:.2f} GiB'
      if one.get('refusal'):
        temporaries = f'does not fit: {one["refusal"]}'
      print(
          f'{size:5} {remat:24} {one.get("weights_gib", 0):5.2f} GiB  {temporaries:>11}  '
          f'{one.get("at_once_gib", 0):5.2f} GiB  {one["step"]:5.2f}',
          flush=True,
      )
  print(json.dumps(found))


if __name__ == '__main__':
  main()
