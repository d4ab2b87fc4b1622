"""GGUF files: metadata, and tensors that are read and dequantised one by one.

The format of llama.cpp, versions 2 and 3. A quantised row is a sequence of
blocks of 32 numbers q with a scale d and perhaps a minimum m in float16:

  Q8_0   x = d q         q an int8
  Q4_0   x = d (q - 8)   q of 4 bits; the low halves of 16 bytes come first
  Q4_1   x = d q + m

Other types are left to the package `gguf`, where it is installed.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from longctx.typing import Float, Shaped

MAGIC, VERSIONS = b'GGUF', (2, 3)

# Metadata types by their numbers, as numpy has them; 8 is a text, 9 an array.
SCALARS = ('u1', 'i1', 'u2', 'i2', 'u4', 'i4', 'f4', '?', '', '', 'u8', 'i8')
SCALARS = [*SCALARS, 'f8']
TEXT, ARRAY = 8, 9

PLAIN = {0: np.dtype('<f4'), 1: np.dtype('<f2'), 30: np.dtype(jnp.bfloat16)}
BLOCKS = {
  2: np.dtype([('d', '<f2'), ('q', 'u1', 16)]),
  3: np.dtype([('d', '<f2'), ('m', '<f2'), ('q', 'u1', 16)]),
  8: np.dtype([('d', '<f2'), ('q', 'i1', 32)]),
}
BLOCK = 32
Q4_0 = 2
# Blocks that are dequantised at once: they stay in a cache.
CHUNK = 2**12

# To say what is refused.
OTHERS = {6: 'Q5_0', 7: 'Q5_1', 10: 'Q2_K', 11: 'Q3_K', 12: 'Q4_K', 13: 'Q5_K'}
OTHERS |= {14: 'Q6_K', 15: 'Q8_K', 20: 'IQ4_NL', 23: 'IQ4_XS', 39: 'MXFP4'}


class TensorInfo(NamedTuple):
  """Tensor of a GGUF file.

  Attributes:
    shape: as numpy has it, rows last.
    kind: the number of its type.
    start: of its bytes in the file.
    size: in bytes.
  """

  shape: tuple[int, ...]
  kind: int
  start: int
  size: int


@dataclasses.dataclass
class GGUFFile:
  """GGUF file, open: its tensors stay on disk until they are read."""

  path: Path
  metadata: Mapping[str, Any]
  tensors: Mapping[str, TensorInfo]

  def read(self, name: str) -> np.ndarray:
    """A tensor in memory of its own, float32 if it is quantised."""
    shape, kind, start, size = self.tensors[name]
    # A mapped file would be in memory beside what is made of it.
    raw = np.fromfile(self.path, np.uint8, size, offset=start)
    if kind in PLAIN:
      return raw.view(PLAIN[kind]).reshape(shape)
    if kind in BLOCKS:
      return dequantize(raw.view(BLOCKS[kind]), kind).reshape(shape)
    package, rows = gguf_package(), raw.reshape(*shape[:-1], -1)
    try:
      return package.dequantize(rows, package.GGMLQuantizationType(kind))
    except NotImplementedError as error:
      raise NotImplementedError(f'{self.path}: {name}: {error}') from error


def dequantize(
  blocks: Shaped[np.ndarray, ' blocks'], kind: int
) -> Float[np.ndarray, 'blocks 32']:
  """Quantised blocks as float32."""
  out = np.empty((len(blocks), BLOCK), np.float32)
  for start in range(0, len(blocks), CHUNK):
    part, x = blocks[start : start + CHUNK], out[start : start + CHUNK]
    q, half = part['q'], BLOCK // 2
    if q.shape[1] == BLOCK:
      x[:] = q
    else:
      x[:, :half], x[:, half:] = q & 15, q >> 4
    if kind == Q4_0:
      x -= 8
    x *= part['d'].astype(np.float32)[:, None]
    if 'm' in part.dtype.names:
      x += part['m'].astype(np.float32)[:, None]
  return out


def gguf_package() -> ModuleType | None:
  """The package `gguf`, if it is installed."""
  try:
    import gguf
  except ImportError:
    return None
  return gguf


class _Header:
  """Header of a GGUF file, read from its beginning to its end."""

  def __init__(self, data: np.ndarray):
    self.bytes, self.at = memoryview(data), 0

  def take(self, dtype: str, count: int = 1) -> np.ndarray:
    """The next numbers; ValueError past the end of the file."""
    found = np.frombuffer(self.bytes, f'<{dtype}', count, self.at)
    self.at += found.nbytes
    return found

  def integer(self, dtype: str) -> int:
    return int(self.take(dtype)[0])

  def text(self) -> str:
    size = self.integer('u8')
    start, self.at = self.at, self.at + size
    if self.at > len(self.bytes):
      raise ValueError(f'a text of {size} bytes goes beyond its end')
    return str(self.bytes[start : self.at], 'utf-8')

  def value(self, kind: int) -> Any:
    if kind == TEXT:
      return self.text()
    if kind != ARRAY:
      value = self.take(_scalar(kind))[0]
      # 1e-05, not the double that is nearest to float32's.
      return float(str(value)) if value.dtype == 'f4' else value.item()
    kind, count = self.integer('u4'), self.integer('u8')
    if kind == TEXT:
      return [self.text() for _ in range(count)]
    return self.take(_scalar(kind), count).tolist()


def _scalar(kind: int) -> str:
  if kind >= len(SCALARS) or not SCALARS[kind]:
    raise ValueError(f'it has metadata of an unknown type {kind}')
  return SCALARS[kind]


def open_gguf(path: Path) -> GGUFFile:
  """Opens a file; the extent of each tensor is held to the file's size.

  Raises:
    ValueError: no GGUF file, or a damaged one.
    NotImplementedError: another version, one part of a split model, or a tensor
      of a type that takes the package `gguf`.
  """
  try:
    data = np.memmap(path, np.uint8, 'r')
  except (OSError, ValueError) as error:
    raise ValueError(f'cannot read {path}: {error}') from error
  header = _Header(data)
  try:
    if bytes(header.take('u1', 4)) != MAGIC:
      raise ValueError(f'it does not begin with {MAGIC}')
    version = header.integer('u4')
    if version not in VERSIONS:
      raise NotImplementedError(
        f'{path}: version {version} of GGUF; known, in little-endian: '
        f'{", ".join(map(str, VERSIONS))}'
      )
    num_tensors, num_values = header.integer('u8'), header.integer('u8')
    metadata = {}
    for _ in range(num_values):
      key, kind = header.text(), header.integer('u4')
      metadata[key] = header.value(kind)
    if (parts := metadata.get('split.count', 1)) > 1:
      raise NotImplementedError(
        f'{path}: one of {parts} parts; join them by llama-gguf-split --merge'
      )
    entries = [_entry(header) for _ in range(num_tensors)]
    tensors = _place(entries, header.at, metadata, path, len(data))
  except (ArithmeticError, TypeError, ValueError) as error:
    raise ValueError(f'{path} is no GGUF file, or damaged: {error}') from error
  return GGUFFile(path, metadata, tensors)


def _entry(header: _Header) -> tuple[str, list[int], int, int]:
  """Name of a tensor, its sizes, the last one first, its type, its offset."""
  name = header.text()
  sizes = header.take('u8', header.integer('u4')).tolist()
  return name, sizes, header.integer('u4'), header.integer('u8')


def _place(
  entries: list[tuple[str, list[int], int, int]],
  end_of_header: int,
  metadata: Mapping[str, Any],
  path: Path,
  file_size: int,
) -> Mapping[str, TensorInfo]:
  """Tensors by name, in the order of the file's list."""
  alignment = metadata.get('general.alignment', 32)
  base = -(-end_of_header // alignment) * alignment
  tensors = {}
  for name, sizes, kind, offset in entries:
    width, size = _block(kind, f'{path}: {name}')
    row = sizes[0] if sizes else 1
    if row % width:
      raise ValueError(f'{name} has rows of {row}, no multiple of {width}')
    start, size = base + offset, math.prod(sizes) // width * size
    if start + size > file_size:
      raise ValueError(
        f'{name} ends at byte {start + size} of {file_size}: it is cut short'
      )
    if name in tensors:
      raise ValueError(f'it has two tensors {name}')
    tensors[name] = TensorInfo((*reversed(sizes),), kind, start, size)
  return tensors


def _block(kind: int, name: str) -> tuple[int, int]:
  """Numbers in a block of a type, and its bytes."""
  if kind in PLAIN:
    return 1, PLAIN[kind].itemsize
  if kind in BLOCKS:
    return BLOCK, BLOCKS[kind].itemsize
  package = gguf_package()
  if package is None:
    raise NotImplementedError(
      f'{name} is quantised as {OTHERS.get(kind, f"type {kind}")}, which takes '
      "the package gguf: pip install -e '.[gguf]'"
    )
  try:
    return package.GGML_QUANT_SIZES[package.GGMLQuantizationType(kind)]
  except ValueError as error:
    raise NotImplementedError(f'{name} is of an unknown type {kind}') from error
