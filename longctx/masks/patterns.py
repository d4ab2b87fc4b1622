"""Attention mask patterns: causal, windows, sinks, global and block-sparse."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from longctx.masks.algebra import KVRetention, Positions, Primitive, Range
from longctx.typing import LARGEST, Natural, Positive, Seed, check_fields

# A pattern inside of a program: bits that a word holds (without its sign), and
# the most words.
WORD_BITS, MOST_WORDS = 31, 640


@dataclasses.dataclass(frozen=True)
class Full(Primitive):
  """Full (bidirectional) attention mask: every query reads every key."""

  shift_invariant = True

  def allowed(self, q_positions: Positions, k_positions: Positions):
    return q_positions - k_positions == q_positions - k_positions

  def bounds(self, q: Range, k: Range):
    everywhere = q.low - k.low == q.low - k.low
    return everywhere, everywhere


@dataclasses.dataclass(frozen=True)
class Causal(Primitive):
  """Causal mask: a query reads the keys up to its own position."""

  shift_invariant = True

  def allowed(self, q_positions: Positions, k_positions: Positions):
    return q_positions >= k_positions

  @property
  def is_causal(self) -> bool:
    return True

  def bounds(self, q: Range, k: Range):
    return self.allowed(q.high, k.low), self.allowed(q.low, k.high)


@dataclasses.dataclass(frozen=True)
class SlidingWindow(Primitive):
  """Sliding window mask: keys in [q - left, q + right], its own included."""

  left: Natural
  right: Natural = 0
  shift_invariant = True

  def __post_init__(self):
    _check(self)

  def allowed(self, q_positions: Positions, k_positions: Positions):
    offset = q_positions - k_positions
    return (offset <= self.left) & (offset >= -self.right)

  @property
  def is_causal(self) -> bool:
    return self.right == 0

  def bounds(self, q: Range, k: Range):
    nearest, farthest = q.low - k.high, q.high - k.low
    some = (nearest <= self.left) & (farthest >= -self.right)
    return some, (farthest <= self.left) & (nearest >= -self.right)

  def kv_retention(self) -> KVRetention:
    return KVRetention(0, self.left + 1)


@dataclasses.dataclass(frozen=True)
class Dilated(Primitive):
  """Dilated sliding window mask: every `dilation`-th key on both sides.

  Keys at q - i dilation and q + i dilation for 0 <= i < window. Combine with
  `Causal()` for a decoder. Longformer (arXiv:2004.05150), section 3.1.
  """

  window: Positive
  dilation: Positive
  shift_invariant = True

  def __post_init__(self):
    _check(self)
    if self.window * self.dilation > LARGEST:
      raise ValueError(
        f'Dilated: window={self.window} times dilation={self.dilation} must be '
        f'at most {LARGEST}'
      )

  def allowed(self, q_positions: Positions, k_positions: Positions):
    offset = abs(q_positions - k_positions)
    near = offset < self.window * self.dilation
    # A remainder per pair takes as long as the products.
    return near if self.dilation == 1 else near & (offset % self.dilation == 0)

  def bounds(self, q: Range, k: Range):
    reach = (self.window - 1) * self.dilation
    some = (q.low - k.high <= reach) & (q.high - k.low >= -reach)
    return some, some & (self.dilation == 1) & (
      (q.high - k.low <= reach) & (q.low - k.high >= -reach)
    )

  def kv_retention(self) -> KVRetention:
    return KVRetention(0, (self.window - 1) * self.dilation + 1)


@dataclasses.dataclass(frozen=True)
class _Prefix(Primitive):
  """Mask of the first n tokens, as queries, as keys or as both."""

  n: Natural

  def __post_init__(self):
    _check(self)

  def cuts(self, T: int, S: int):
    return np.array([self.n]), np.array([self.n])

  def bounds(self, q: Range, k: Range):
    return self.allowed(q.low, k.low), self.allowed(q.high, k.high)

  def kv_retention(self) -> KVRetention:
    return KVRetention(self.n, 0)


@dataclasses.dataclass(frozen=True)
class PrefixColumns(_Prefix):
  """Attention sinks, or global keys: the first n, which all queries read."""

  def allowed(self, q_positions: Positions, k_positions: Positions):
    return k_positions + 0 * q_positions < self.n


@dataclasses.dataclass(frozen=True)
class PrefixRows(_Prefix):
  """Global queries: the first n, which read all keys."""

  def allowed(self, q_positions: Positions, k_positions: Positions):
    return q_positions + 0 * k_positions < self.n


@dataclasses.dataclass(frozen=True)
class GlobalTokens(_Prefix):
  """Global tokens: the first n read all the others and are read by them.

  Longformer (arXiv:2004.05150), section 3.1: symmetric global attention.
  """

  def allowed(self, q_positions: Positions, k_positions: Positions):
    return (q_positions < self.n) | (k_positions < self.n)


@dataclasses.dataclass(frozen=True)
class Beyond(Primitive):
  """Mask without a prefix: queries and keys that both lie beyond the first.

  What `GlobalTokens` and `PrefixColumns` leave: schedules that treat the first
  tokens apart give the rest of a mask by `mask & Beyond(rows, columns)`.

  Attributes:
    rows: queries from this position on.
    columns: keys from this position on.
  """

  rows: Natural
  columns: Natural

  def __post_init__(self):
    _check(self)

  def cuts(self, T: int, S: int):
    return np.array([self.rows]), np.array([self.columns])

  def allowed(self, q_positions: Positions, k_positions: Positions):
    return (q_positions >= self.rows) & (k_positions >= self.columns)

  def bounds(self, q: Range, k: Range):
    return self.allowed(q.high, k.high), self.allowed(q.low, k.low)


@dataclasses.dataclass(frozen=True)
class RandomBlocks(Primitive):
  """Random block mask: a block of queries reads `per_row` blocks of keys.

  The candidates are cut into `per_row` equal strata and one block is drawn from
  each, so draws never repeat; a row with fewer candidates reads them all.
  BigBird (arXiv:2007.14062), section 2.

  Attributes:
    block: positions per block, of queries and of keys.
    per_row: key blocks drawn per query block.
    seed: seed of the draws.
    num_blocks: candidates are the key blocks 0 to num_blocks - 1. With None
      they are the blocks up to the query's own: rows then do not depend on the
      length of the sequence, as a decoder needs.
  """

  block: Positive
  per_row: Positive
  seed: Seed
  num_blocks: Positive | None = None

  def __post_init__(self):
    _check(self)

  def cuts(self, T: int, S: int):
    return np.arange(0, T, self.block), np.arange(0, S, self.block)

  def allowed(self, q_positions: Positions, k_positions: Positions):
    row, column = q_positions // self.block, k_positions // self.block
    seen = row + column < 0
    for exists, drawn in self._draws(row):
      seen = seen | (exists & (column == drawn))
    return seen

  def bounds(self, q: Range, k: Range):
    row = q.low // self.block
    one_row = row == q.high // self.block
    first, last = k.low // self.block, k.high // self.block
    some = row + first < 0
    for exists, drawn in self._draws(row):
      some = some | (exists & (first <= drawn) & (drawn <= last))
    return some | ~one_row, some & one_row & (first == last)

  def _draws(self, row: Positions):
    """Yields, per draw, whether it exists and which block it is."""
    candidates = row + 1 if self.num_blocks is None else self.num_blocks
    for draw in range(self.per_row):
      start = draw * candidates // self.per_row
      size = (draw + 1) * candidates // self.per_row - start
      pick = _random_bits(row, self.seed, draw) % (size + (size == 0))
      yield size > 0, start + pick


@dataclasses.dataclass(frozen=True)
class BlockSparse(Primitive):
  """Block-sparse mask of any pattern; positions beyond it are not allowed.

  Attributes:
    block: positions per block, of queries and of keys.
    pattern: rows of 0 and 1; pattern[i][j] is 1 where query block i reads key
      block j. An array is accepted and stored as nested tuples.
  """

  block: Positive
  pattern: tuple | list | np.ndarray

  def __post_init__(self):
    _check(self)
    table = np.asarray(self.pattern)
    if table.ndim != 2 or not np.isin(table, (0, 1)).all():
      raise ValueError(
        f'BlockSparse: pattern must be a matrix of 0 and 1, got {table.shape=}'
      )
    rows = tuple(tuple(int(cell) for cell in row) for row in table)
    object.__setattr__(self, 'pattern', rows)

  def cuts(self, T: int, S: int):
    return np.arange(0, T, self.block), np.arange(0, S, self.block)

  def allowed(self, q_positions: Positions, k_positions: Positions):
    row, column = q_positions // self.block, k_positions // self.block
    if _numpy_of(row, column) is jnp and self.is_small:
      return self._bits(row, column)
    # A row and a column of zeros more, for what is beyond.
    return _at(np.pad(self.pattern, (0, 1)) == 1, row, column)

  @property
  def is_small(self) -> bool:
    """Whether the pattern can be part of a program, as kernels need it."""
    words = -(-len(self.pattern[0]) // WORD_BITS)
    return len(self.pattern) * words <= MOST_WORDS

  def _bits(self, row: jax.Array, column: jax.Array) -> jax.Array:
    """Looks the pattern up without a table: a word of bits per row."""
    seen = row + column < 0
    for start in range(0, len(self.pattern[0]), WORD_BITS):
      word = 0 * row
      for index, cells in enumerate(self.pattern):
        bits = sum(x << i for i, x in enumerate(cells[start:][:WORD_BITS]))
        word = jnp.where(row == index, bits, word)
      bit = column - start
      inside = (bit >= 0) & (bit < WORD_BITS)
      bit = jnp.where(inside, bit, 0)
      seen = seen | (inside & ((word >> bit) & 1 == 1))
    return seen

  def bounds(self, q: Range, k: Range):
    # Counts of ones in rectangles, from sums over all the blocks before.
    sums = np.pad(self.pattern, ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    sums = sums.astype(np.int32)
    top, bottom = q.low // self.block, q.high // self.block + 1
    left, right = k.low // self.block, k.high // self.block + 1
    ones = (
      _at(sums, bottom, right)
      - _at(sums, top, right)
      - _at(sums, bottom, left)
      + _at(sums, top, left)
    )
    return ones > 0, ones == (bottom - top) * (right - left)


def _at(table: np.ndarray, row: Positions, column: Positions):
  """table[row, column]; the last of either stands for what is beyond."""
  xp = _numpy_of(row, column)
  row = xp.minimum(row, len(table) - 1)
  return xp.asarray(table)[row, xp.minimum(column, table.shape[1] - 1)]


def _numpy_of(*positions: Positions):
  """jax.numpy for positions in a program, else numpy."""
  return jnp if any(isinstance(x, jax.Array) for x in positions) else np


def _check(mask: Primitive) -> None:
  """Holds the fields of a mask to their types and ranges."""
  check_fields(mask, f'{type(mask).__name__}: ')


def _random_bits(row: Positions, seed: int, draw: int):
  """31 random bits per row: the finalizer of MurmurHash3 on (row, seed, draw).

  The same integers in numpy and jax.numpy, so that a block map made on the host
  agrees with the element mask inside a kernel.
  """
  xp = _numpy_of(row)
  salt = (seed * 0x9E3779B9 + draw * 0x85EBCA6B + 1) & 0xFFFFFFFF
  # Wrapping is what the hash is made of; numpy warns of it for scalars.
  with np.errstate(over='ignore'):
    x = xp.asarray(row).astype(xp.uint32) * xp.uint32(0x9E3779B1)
    x = x ^ xp.uint32(salt)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
      x = (x ^ (x >> xp.uint32(shift))) * xp.uint32(factor)
    x = x ^ (x >> xp.uint32(16))
  return (x >> xp.uint32(1)).astype(xp.int32)
