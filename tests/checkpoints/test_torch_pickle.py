"""PyTorch's `.bin` files: read like PyTorch reads them, and never executed."""

import os
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest

from prompt_tuning_jax.checkpoints.torch_pickle import open_torch
from tests.checkpoints import samples, torch_samples

WEIGHTS = np.arange(12, dtype=np.float32).reshape(3, 4)
LAYOUTS = ['archive', 'stream']


def archive_of(tmp_path, item: bytes, storage: bytes = WEIGHTS.tobytes(), **kwargs):
  data = torch_samples.dictionary({'a.weight': item})
  return torch_samples.write_archive(tmp_path / 'model.bin', data, {'0': storage}, **kwargs)


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('dtype', [np.float32, np.float16, ml_dtypes.bfloat16])
def test_both_layouts_give_the_arrays_back(layout, dtype, tmp_path):
  rng = np.random.default_rng(0)
  arrays = {
      'a.weight': rng.normal(size=(3, 4)).astype(dtype),
      'b.weight': rng.normal(size=(5,)).astype(dtype),
      'c.bias': np.array(2.5, dtype),
  }
  weights = open_torch(torch_samples.write(tmp_path / 'model.bin', arrays, layout))
  assert list(weights) == list(arrays)
  for name, array in arrays.items():
    assert weights.specs[name].dtype == weights[name].dtype == array.dtype
    np.testing.assert_array_equal(weights[name], array)


def test_views_share_a_storage(tmp_path):
  data = torch_samples.dictionary({
      'whole': torch_samples.tensor('0', 'float32', (3, 4), size=12),
      'row': torch_samples.tensor('0', 'float32', (4,), size=12, offset=8),
      'transposed': torch_samples.tensor('0', 'float32', (4, 3), size=12, strides=(1, 4)),
  })
  path = torch_samples.write_archive(tmp_path / 'model.bin', data, {'0': WEIGHTS.tobytes()})
  weights = open_torch(path)
  np.testing.assert_array_equal(weights['whole'], WEIGHTS)
  np.testing.assert_array_equal(weights['row'], WEIGHTS[2])
  np.testing.assert_array_equal(weights['transposed'], WEIGHTS.T)


def test_names_of_the_same_numbers_are_told_without_reading_them(tmp_path):
  data = torch_samples.dictionary({
      'shared': torch_samples.tensor('0', 'float32', (2, 3), size=6),
      'copy': torch_samples.tensor('0', 'float32', (2, 3), size=6),
      'turned': torch_samples.tensor('0', 'float32', (3, 2), size=6),
      'other': torch_samples.tensor('1', 'float32', (2, 3), size=6),
  })
  storages = {key: np.zeros(6, np.float32).tobytes() for key in '01'}
  path = torch_samples.write_archive(tmp_path / 'model.bin', data, storages)
  places = open_torch(path).places
  assert places['shared'] == places['copy']
  assert len(set(places.values())) == 3


def test_parameters_and_attributes_of_the_dictionary_are_read_over(tmp_path):
  parameter = (
      torch_samples.name('torch._utils', '_rebuild_parameter') + b'('
      + torch_samples.tensor('0', 'float32', (3, 4), size=12)
      + b'\x88' + torch_samples.name('collections', 'OrderedDict') + b')RtR'
  )
  data = torch_samples.dictionary({'a.weight': parameter}, ordered=True)
  # `_metadata`, as state_dict() leaves it, and a method's name, as an attacker might.
  for attribute in ('_metadata', 'items'):
    data = data[:-1] + b'}' + torch_samples.text(attribute) + b'}sb.'
  path = torch_samples.write_archive(tmp_path / 'model.bin', data, {'0': WEIGHTS.tobytes()})
  np.testing.assert_array_equal(open_torch(path)['a.weight'], WEIGHTS)


class _Runs:
  """Makes a directory where it is unpickled."""

  def __init__(self, mark):
    self.mark = mark

  def __reduce__(self):
    return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize('layout', ['archive', 'bare', 'after the older header'])
@pytest.mark.parametrize('protocol', [0, 2, 4])
def test_nothing_is_executed(layout, protocol, tmp_path):
  mark = tmp_path / 'executed'
  data = pickle.dumps({'a.weight': _Runs(mark)}, protocol=protocol)
  path = tmp_path / 'model.bin'
  if layout == 'archive':
    torch_samples.write_archive(path, data, {})
  elif layout == 'bare':
    path.write_bytes(data)
  else:
    torch_samples.write_stream(path, data, {})
  with pytest.raises(ValueError, match='is refused, and nothing in it was executed'):
    open_torch(path)
  assert not mark.exists()


@pytest.mark.parametrize(
    ('module', 'attribute'),
    [
        ('os', 'system'),
        ('builtins', 'eval'),
        ('torch', 'load'),
        ('torch.serialization', 'load'),
        ('torch', 'LongStorage'),
        ('torch.storage', '_load_from_bytes'),
        ('collections', 'OrderedDict.fromkeys'),
        ('numpy.core.multiarray', '_reconstruct'),
    ],
)
def test_any_other_name_is_refused(module, attribute, tmp_path):
  path = archive_of(tmp_path, torch_samples.name(module, attribute))
  with pytest.raises(ValueError, match=f'asks for {module}.{attribute}'):
    open_torch(path)


@pytest.mark.parametrize(
    ('item', 'instruction'),
    [
        (b'(ios\nsystem\n', 'INST'),
        (b'(' + torch_samples.name('collections', 'OrderedDict') + b'o', 'OBJ'),
        (torch_samples.name('collections', 'OrderedDict') + b')\x81', 'NEWOBJ'),
        (b'\x82\x01', 'EXT1'),
        (b'\x96' + b'\xff' * 7 + b'\x0f', 'BYTEARRAY8'),
    ],
)
def test_instructions_that_tensors_do_not_need_are_refused(item, instruction, tmp_path):
  with pytest.raises(ValueError, match=rf'instruction {instruction}|cut off or changed'):
    open_torch(archive_of(tmp_path, item))


def test_a_huge_memo_number_takes_no_room(tmp_path):
  tensor = torch_samples.tensor('0', 'float32', (3, 4), size=12)
  weights = open_torch(archive_of(tmp_path, tensor + b'r\xff\xff\xff\x7f'))
  np.testing.assert_array_equal(weights['a.weight'], WEIGHTS)


def test_what_is_built_on_a_storage_changes_nothing_of_it(tmp_path):
  # With an OrderedDict for its type, numpy would read other bytes than were checked.
  hostile = b'}' + torch_samples.text('dtype') + torch_samples.text('V1000') + b'sb'
  storage = (
      b'(' + torch_samples.text('storage') + torch_samples.name('torch', 'FloatStorage')
      + torch_samples.text('0') + torch_samples.text('cpu') + torch_samples.number(12)
      + b'tQ' + hostile
  )
  item = torch_samples.tensor('0', 'float32', (3, 4), size=12, storage=storage)
  np.testing.assert_array_equal(open_torch(archive_of(tmp_path, item))['a.weight'], WEIGHTS)


@pytest.mark.parametrize('claimed', [4, 8000, 10**9])
def test_an_entry_that_claims_another_size_is_refused(claimed, tmp_path):
  item = torch_samples.tensor('0', 'float32', (claimed // 4,), size=claimed // 4)
  path = archive_of(tmp_path, item)
  content = bytearray(path.read_bytes())
  # The size in the central directory, of which zipfile believes the compressed one.
  entry = content.rindex(b'archive/data/0') - 46
  content[entry + 24 : entry + 28] = claimed.to_bytes(4, 'little')
  path.write_bytes(content)
  with pytest.raises(ValueError, match='is refused|is not a whole file'):
    open_torch(path)['a.weight']


@pytest.mark.parametrize(
    'item',
    [
        b')' + b'\x85' * 100_000,
        torch_samples.number(1) + b'\x85' + b'q\x01h\x01\x86' * 40,
        b'}' + b')' + b'\x85' * 5 + torch_samples.number(1) + b's',
    ],
    ids=['deep', 'doubled again and again', 'as a key'],
)
def test_tuples_within_tuples_are_refused(item, tmp_path):
  with pytest.raises(ValueError, match='nests tuples deeper than tensors do'):
    open_torch(archive_of(tmp_path, item))


def test_one_number_seen_many_times_is_refused(tmp_path):
  item = torch_samples.tensor('0', 'float32', (10**4, 10**4), size=12, strides=(0, 0))
  with pytest.raises(ValueError, match='reaches beyond its numbers'):
    open_torch(archive_of(tmp_path, item))


def test_an_encrypted_entry_is_refused(tmp_path):
  path = archive_of(tmp_path, torch_samples.tensor('0', 'float32', (3, 4), size=12))
  content = bytearray(path.read_bytes())
  content[content.rindex(b'archive/data/0') - 46 + 8] |= 1
  path.write_bytes(content)
  with pytest.raises(ValueError, match='model.bin is not a whole file'):
    open_torch(path)['a.weight']


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(shape=(4, 4)), 'reaches beyond its numbers'),
        (dict(shape=(3, 4), offset=1), 'reaches beyond its numbers'),
        (dict(shape=(3, 4), strides=(400, 1)), 'reaches beyond its numbers'),
        (dict(shape=(3, 4), strides=(-4, 1), offset=8), 'a shape, strides or offset of no array'),
        (dict(shape=(3, 4), offset=-4), 'a shape, strides or offset of no array'),
        (dict(shape=(3, 4), strides=(1,)), 'a shape, strides or offset of no array'),
        (dict(shape=(3, 4), size=13), 'storage 0 has 48 bytes instead of 52'),
        (dict(shape=(3, 4), storage=torch_samples.text('no storage')), 'has no storage'),
    ],
)
def test_tensors_that_lie_about_their_numbers_are_refused(changes, message, tmp_path):
  item = torch_samples.tensor('0', 'float32', **{'size': 12} | changes)
  with pytest.raises(ValueError, match=message):
    open_torch(archive_of(tmp_path, item))


def test_what_is_not_a_tensor_is_refused(tmp_path):
  with pytest.raises(ValueError, match="its item 'a.weight' is not a tensor"):
    open_torch(archive_of(tmp_path, torch_samples.number(7)))
  path = torch_samples.write_archive(tmp_path / 'list.bin', pickle.dumps([1], protocol=2), {})
  with pytest.raises(ValueError, match='a list instead of tensors by name'):
    open_torch(path)


def test_what_is_left_of_an_archive_is_not_read_as_a_pickle(tmp_path):
  path = tmp_path / 'model.bin'
  path.write_bytes(b"PK\x03\x04\\'\n")  # To a pickle: a name, with an escape that is none.
  with pytest.raises(ValueError, match='not a whole file of PyTorch weights.*not a zip file'):
    open_torch(path)


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('share', [0.0, 0.1, 0.5, 0.99])
def test_a_file_cut_off_anywhere_is_named(layout, share, tmp_path):
  path = torch_samples.write(tmp_path / 'model.bin', {'a.weight': WEIGHTS}, layout)
  os.truncate(path, int(share * path.stat().st_size))
  with pytest.raises(ValueError, match='model.bin is not a whole file of PyTorch weights'):
    open_torch(path)['a.weight']


def test_a_flipped_bit_is_found_when_its_tensor_is_read(tmp_path):
  path = torch_samples.write(tmp_path / 'model.bin', {'a.weight': WEIGHTS})
  samples.flip_byte(path, path.read_bytes().index(WEIGHTS.tobytes()) + 5)
  weights = open_torch(path)
  with pytest.raises(ValueError, match='Bad CRC-32'):
    weights['a.weight']


def test_compressed_storages_are_refused(tmp_path):
  item = torch_samples.tensor('0', 'float32', (3, 4), size=12)
  path = archive_of(tmp_path, item, compression=zipfile.ZIP_DEFLATED)
  with pytest.raises(ValueError, match='is compressed'):
    open_torch(path)


def test_a_missing_file_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match='No file .*model.bin'):
    open_torch(tmp_path / 'model.bin')
