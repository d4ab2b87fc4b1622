"""GGUF files: what is read, dequantised and refused."""

import struct

import jax.numpy as jnp
import numpy as np
import pytest

from longctx.pretrained import gguf
from tests.pretrained.gguf_files import write

METADATA = {
  'general.architecture': 'llama',
  'llama.block_count': 2,
  'llama.attention.layer_norm_rms_epsilon': 1e-5,
  'tokenizer.ggml.add_bos_token': False,
  'tokenizer.ggml.tokens': ['a', 'ü', ''],
  'tokenizer.ggml.scores': [0.5, -1.0],
}
# Name, number and blocks of 32 by a scale of 2, a minimum of -1 and 0 ... 31.
Q = np.arange(32)
LOW, HIGH = Q[:16] & 15, Q[16:] & 15
NIBBLES = bytes((LOW | HIGH << 4).astype(np.uint8))
QUANTISED = {
  'Q4_0': (2, struct.pack('<e', 2) + NIBBLES, 2 * (Q % 16 - 8)),
  'Q4_1': (3, struct.pack('<ee', 2, -1) + NIBBLES, 2 * (Q % 16) - 1),
  'Q8_0': (8, struct.pack('<e', 2) + bytes(Q.astype(np.int8)), 2 * Q),
}


def small(path, **changes):
  """A file of one tensor."""
  tensors = {'a.weight': np.arange(6, dtype=np.float32).reshape(2, 3)}
  return write(path / 'model.gguf', METADATA | changes, tensors)


def test_metadata_is_read(tmp_path):
  assert gguf.open_gguf(small(tmp_path)).metadata == METADATA


@pytest.mark.parametrize('version', [2, 3])
@pytest.mark.parametrize('alignment', [32, 64])
def test_plain_tensors_are_read_as_they_are_stored(
  tmp_path, version, alignment
):
  tensors = {
    'a': np.arange(6, dtype=np.float32).reshape(2, 3),
    'b': np.arange(8).astype(np.float16).reshape(2, 2, 2),
    'c': np.arange(3).astype(jnp.bfloat16),
  }
  kinds = dict(zip('abc', (0, 1, 30), strict=True))
  stored = {k: (kinds[k], x.shape, x.tobytes()) for k, x in tensors.items()}
  metadata = METADATA | {'general.alignment': alignment}
  file = gguf.open_gguf(write(tmp_path / 'x', metadata, stored, version))
  for name, tensor in tensors.items():
    assert file.tensors[name].shape == tensor.shape
    found = file.read(name)
    assert found.dtype == tensor.dtype
    np.testing.assert_array_equal(found, tensor)
    found[:] = 0
  np.testing.assert_array_equal(file.read('a'), tensors['a'])


@pytest.mark.parametrize('name', QUANTISED)
def test_blocks_are_dequantised(tmp_path, name):
  kind, block, expected = QUANTISED[name]
  # More than are dequantised at once.
  count = gguf.CHUNK + 1
  tensors = {'a': (kind, (count, 32), block * count)}
  found = gguf.open_gguf(write(tmp_path / 'x', {}, tensors)).read('a')
  assert found.dtype == np.float32
  np.testing.assert_array_equal(found, np.tile(expected, (count, 1)))


@pytest.mark.parametrize('name', [*QUANTISED, 'Q5_0', 'BF16'])
def test_quantised_tensors_are_those_of_the_package(tmp_path, name):
  package = pytest.importorskip('gguf')
  kind = package.GGMLQuantizationType[name]
  weights = np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32)
  packed = package.quantize(weights, kind)
  tensors = {'a': (int(kind), weights.shape, packed.tobytes())}
  found = gguf.open_gguf(write(tmp_path / 'x', {}, tensors)).read('a')
  expected = package.dequantize(packed, kind)
  np.testing.assert_array_equal(found.astype(np.float32), expected)


def test_other_quantisations_are_refused_without_the_package(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(gguf, 'gguf_package', lambda: None)
  path = write(tmp_path / 'x', {}, {'a': (12, (1, 256), bytes(144))})
  with pytest.raises(
    NotImplementedError, match='a is quantised as Q4_K, which'
  ):
    gguf.open_gguf(path)


def test_unknown_types_are_refused(tmp_path):
  pytest.importorskip('gguf')
  path = write(tmp_path / 'x', {}, {'a': (999, (1, 256), bytes(144))})
  with pytest.raises(NotImplementedError, match='a is of an unknown type 999'):
    gguf.open_gguf(path)
  path = write(tmp_path / 'x', {}, {'a': (26, (4,), bytes(16))})
  with pytest.raises(NotImplementedError, match=r'a: .*I32'):
    gguf.open_gguf(path).read('a')


def refuse(path, message):
  with pytest.raises(ValueError, match=message) as error:
    gguf.open_gguf(path)
  assert '\n' not in str(error.value)


def test_a_file_that_is_cut_short_anywhere_is_refused(tmp_path):
  path = small(tmp_path)
  whole = path.read_bytes()
  # The last bytes are padding.
  for size in range(len(whole) - 8):
    path.write_bytes(whole[:size])
    refuse(path, 'model.gguf')
  refuse(path, r'a\.weight ends at byte \d+ of \d+: it is cut short')


def test_damaged_headers_end_in_a_refusal(tmp_path):
  path = small(tmp_path, **{'general.alignment': 32, 'split.count': 1})
  whole = path.read_bytes()
  for at in range(len(whole) - 32):
    for byte in (0, 0x7F, 0xFF):
      path.write_bytes(whole[:at] + bytes([byte]) + whole[at + 1 :])
      try:
        gguf.open_gguf(path)
      except (ValueError, NotImplementedError) as error:
        assert str(path) in str(error)


@pytest.mark.parametrize(
  'start, message',
  [(b'GGML', "it does not begin with b'GGUF'"), (b'', 'cannot read')],
)
def test_other_files_are_refused(tmp_path, start, message):
  path = tmp_path / 'x.gguf'
  path.write_bytes(start)
  refuse(path, message)
  refuse(tmp_path / 'gone', r'cannot read .*gone')


def test_versions_and_parts_are_refused_by_number(tmp_path):
  with pytest.raises(NotImplementedError, match='version 1 of GGUF; known'):
    gguf.open_gguf(write(tmp_path / 'x', {}, {}, version=1))
  with pytest.raises(NotImplementedError, match='one of 3 parts'):
    gguf.open_gguf(small(tmp_path, **{'split.count': 3}))
