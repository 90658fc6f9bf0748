"""What devices send, counted in XLA's text, against sums by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from prompt_tuning_jax import collectives, partitioning
from prompt_tuning_jax.collectives import Sent

# As XLA prints it for TPUs: layouts with brackets, loops that say their length in their
# condition, one gathering spread over two fusions, and starts that return their operands.
TEXT = """HloModule jit_step, is_scheduled=true

FileNames
1 "step.py"

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%started (p: bf16[8,4]) -> bf16[32,4] {
  %p = bf16[8,4]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %gathered = bf16[32,4]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=7, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
}

%finished (p: bf16[8,4]) -> bf16[32,4] {
  %p = bf16[8,4]{1,0} parameter(0)
  ROOT %gathered.1 = bf16[32,4]{1,0} all-gather(%p), channel_id=7, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
}

%body (state: (s32[], f32[16])) -> (s32[], f32[16]) {
  %state = (s32[]{:T(128)}, f32[16]{0:T(128)}) parameter(0)
  %x = f32[16]{0:T(128)} get-tuple-element(%state), index=1
  %reduced = f32[16]{0:T(128)} all-reduce(%x), channel_id=1, replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, to_apply=%add
  %start = bf16[32,4]{1,0} fusion(%x), kind=kCustom, calls=%started
  %done = bf16[32,4]{1,0} fusion(%x), kind=kCustom, calls=%finished
  ROOT %next = (s32[]{:T(128)}, f32[16]{0:T(128)}) tuple(%x, %reduced)
}

%condition (state: (s32[], f32[16])) -> pred[] {
  %length = s32[]{:T(128)} constant(24)
  %state = (s32[]{:T(128)}, f32[16]{0:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %more = pred[]{:T(512)} compare(%i, %length), direction=LT
}

ENTRY %main (x: f32[16]) -> f32[16] {
  %x = f32[16]{0:T(128)} parameter(0)
  %loop = (s32[]{:T(128)}, /*index=1*/f32[16]{0:T(128)}) while(%x), condition=%condition, body=%body
  %sent = (bf16[6]{0}, bf16[6]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=2, source_target_pairs={{0,1},{1,0}}
  %arrived = bf16[6]{0} collective-permute-done(%sent)
  %parts = (f32[8]{0}, f32[2]{0}) reduce-scatter-start(%x), channel_id=3, replica_groups={{0,1,2,3},{4,5,6,7}}
  ROOT %both = (f32[8]{0}, pred[4]{0}) all-reduce(%x, %x), channel_id=4, to_apply=%add
}
"""  # noqa: E501


def test_loops_count_as_often_as_they_run_and_rings_send_all_but_their_own_part():
  assert collectives.count(TEXT, 8) == {
      # 16 floats among 4, 24 times; 8 floats and 4 bytes among all 8, once.
      'all-reduce': Sent(24 + 1, 24 * (2 * 64 * 3 // 4) + 2 * 36 * 7 // 8),
      'all-gather': Sent(24, 24 * 256 * 3 // 4),
      'collective-permute': Sent(1, 12),
      'reduce-scatter': Sent(1, 32 * 3 // 4),
  }


def test_a_loop_of_unknown_length_that_sends_is_refused():
  with pytest.raises(ValueError, match='loop around body'):
    collectives.count(TEXT.replace('direction=LT', 'direction=NE'), 8)
  with pytest.raises(ValueError, match='begins ENTRY'):
    collectives.count('HloModule', 8)


def test_what_xla_writes_on_this_machine_is_read():
  mesh = partitioning.make_mesh(4)

  def step(x, kernels):
    return jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels)[0]

  def shaped(shape, *spec):
    where = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where)

  everywhere = NamedSharding(mesh, PartitionSpec())
  text = (
      jax.jit(step, out_shardings=everywhere)
      .lower(shaped((8, 16)), shaped((5, 16, 16), None, 'model', None))
      .compile()
      .as_text()
  )
  # Each product is a sum over four devices, in a loop over five kernels. Of the last each
  # keeps a part until the end.
  size = 4 * 8 * 16
  assert collectives.count(text, 4) == {
      'all-reduce': Sent(5, 5 * 2 * size * 3 // 4),
      'all-gather': Sent(1, size * 3 // 4),
  }
