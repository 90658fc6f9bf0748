"""Logical axes on a mesh, and weights read straight into their shards."""

import os
import socket
import subprocess
import sys
import textwrap
import types

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from prompt_tuning_jax import partitioning
from prompt_tuning_jax.checkpoints.convert import convert
from tests.conftest import cpu_devices


class FakeMesh:
  """A mesh of sizes alone."""

  shape = {'data': 2, 'model': 4}


@pytest.fixture
def specs(monkeypatch):
  monkeypatch.setattr(partitioning, 'NamedSharding', lambda mesh, spec: spec)
  return lambda axes, shape, **kwargs: partitioning.sharding(FakeMesh(), axes, shape, **kwargs)


@pytest.mark.parametrize(
    ('axes', 'shape', 'expected'),
    [
        (('vocab', 'embed'), (32, 16), ('model', None)),
        (('layers', 'embed', 'mlp'), (3, 16, 24), (None, None, 'model')),
        (('heads', 'relpos_buckets'), (8, 32), ('model', None)),
        (('heads', 'relpos_buckets'), (6, 32), (None, None)),  # 4 does not divide 6.
        (('mlp', 'joined_kv'), (8, 8), ('model', None)),  # A mesh axis is taken once.
        (('batch', 'embed'), (8, 16), ('data', None)),
    ],
)
def test_rules_say_which_axis_is_split(specs, axes, shape, expected):
  assert specs(axes, shape) == PartitionSpec(*expected)


def test_rules_of_one_s_own_and_what_they_may_name(specs):
  rules = (('embed', 'data'), ('mlp', None))
  assert specs(('embed', 'mlp'), (4, 8), rules=rules) == PartitionSpec('data', None)
  with pytest.raises(ValueError, match="No rule for the logical axis 'vocab'. .* embed, mlp"):
    specs(('vocab', 'embed'), (8, 8), rules=rules)
  with pytest.raises(ValueError, match="names the mesh axis 'expert', but .* data, model"):
    specs(('embed',), (8,), rules=(('embed', 'expert'),))


def test_a_mesh_of_what_is_there():
  mesh = partitioning.make_mesh()
  assert dict(mesh.shape) == {'data': len(jax.devices()), 'model': 1}
  with pytest.raises(ValueError, match=r'NUM_PARTITIONS=3 .* does not divide .* may be 1'):
    partitioning.make_mesh(3)


def test_weights_are_read_into_the_shards_of_a_mesh(tmp_path):
  program = textwrap.dedent('''
      import jax, numpy as np
      import prompt_tuning_jax as ptj
      from prompt_tuning_jax import partitioning

      whole = ptj.load_backbone('nano')
      split = ptj.load_backbone('nano', mesh=partitioning.make_mesh(model=2))
      for one, other in zip(jax.tree.leaves(whole.params), jax.tree.leaves(split.params)):
        np.testing.assert_array_equal(one, other)
      table = split.params['token_embedder']['embedding']
      rows, width = table.shape
      assert {s.data.shape for s in table.addressable_shards} == {(rows // 2, width)}
      assert len(table.addressable_shards) == 4
      kernel = split.params['encoder']['layers']['mlp']['wi_0']['kernel']
      assert kernel.sharding.shard_shape(kernel.shape)[2] == kernel.shape[2] // 2
      # Five heads are not split in two; the joined axis of 160 is.
      assert split.params['encoder']['relpos_bias']['rel_embedding'].is_fully_replicated
      assert split.fingerprint == whole.fingerprint
  ''')
  env = os.environ | cpu_devices(4)
  subprocess.run([sys.executable, '-c', program], check=True, env=env, cwd=tmp_path)


_ONE_OF_TWO_PROCESSES = '''
    import sys
    import jax, numpy as np
    jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
    import prompt_tuning_jax as ptj
    from prompt_tuning_jax import partitioning
    from prompt_tuning_jax.checkpoints import source

    read = 0
    part = source.Weights.part

    def counted(weights, name, box):
      global read
      found = part(weights, name, box)
      read += found.size
      return found

    source.Weights.part = counted
    mesh = partitioning.make_mesh(model=2, devices=jax.devices())
    split = ptj.load_backbone(sys.argv[3], mesh=mesh)
    shards = [leaf.addressable_data(0) for leaf in jax.tree.leaves(split.params)]
    assert sum(shard.size for shard in shards) < 0.6 * split.num_params
    # Counted where an array is asked for, and where its file is read.
    assert read < 2 * 0.6 * split.num_params, (read, split.num_params)
    whole = ptj.load_backbone(sys.argv[3], mesh=partitioning.make_mesh(1, jax.local_devices()))
    for one, other in zip(jax.tree.leaves(whole.params), jax.tree.leaves(split.params)):
      shard = other.addressable_shards[0]
      np.testing.assert_array_equal(np.asarray(one)[shard.index], shard.data)
'''


@pytest.mark.slow
@pytest.mark.parametrize('form', ['native', 'hf', 't5x'])
def test_each_of_two_processes_reads_what_its_devices_hold(form, tmp_path):
  convert('nano', tmp_path / 'model', form)
  with socket.socket() as free:
    free.bind(('localhost', 0))
    address = f'localhost:{free.getsockname()[1]}'
  processes = [
      subprocess.Popen(
          [sys.executable, '-c', textwrap.dedent(_ONE_OF_TWO_PROCESSES)]
          + [address, str(number), str(tmp_path / 'model')],
          env=os.environ | cpu_devices(1),
      )
      for number in range(2)
  ]
  try:
    assert [process.wait(timeout=600) for process in processes] == [0, 0]
  finally:
    for process in processes:
      process.kill()


def test_rows_that_a_process_brings_are_found_where_its_devices_are():
  """As on TPUs, whose neighbours in the mesh are those of the torus."""
  devices = np.array([[types.SimpleNamespace(process_index=p)] for p in (0, 1, 1, 0)])
  mesh = types.SimpleNamespace(devices=devices, shape={'data': 4, 'model': 1})
  assert partitioning.placed_order(mesh, 8).tolist() == [0, 1, 4, 5, 6, 7, 2, 3]
  # Rows that do not divide are copied to all, and without a mesh nothing moves.
  assert partitioning.placed_order(mesh, 6).tolist() == list(range(6))
  assert partitioning.placed_order(None, 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize('model', [1, 2, 4, 8, 16])
@pytest.mark.parametrize(
    ('kind', 'shape'),
    [('TPU v5 lite', (4, 4, 1)), ('TPU v6 lite', (4, 4, 1)), ('TPU v5', (2, 2, 4))],
)
def test_every_number_of_partitions_that_divides_has_a_mesh_on_a_torus(
    monkeypatch, kind, shape, model
):
  monkeypatch.setattr(partitioning, 'Mesh', lambda devices, names, axis_types: devices)
  devices = [
      types.SimpleNamespace(
          id=number, platform='tpu', device_kind=kind, coords=at, core_on_chip=0, process_index=0
      )
      for number, at in enumerate(np.ndindex(*shape))
  ]
  mesh = partitioning.make_mesh(model, devices)
  assert mesh.shape == (16 // model, model)
  assert sorted(device.id for device in mesh.flat) == list(range(16))
