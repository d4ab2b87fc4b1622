"""The masks that other masks are made of."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from longctx.masks.algebra import KVRetention, Positions, Primitive, Range

# A pattern inside of a program: bits that a word holds (without its sign), and
# the most words.
WORD_BITS, MOST_WORDS = 31, 640


@dataclasses.dataclass(frozen=True)
class Full(Primitive):
  """Every query reads every key."""

  shift_invariant = True

  def allowed(self, q_positions: Positions, k_positions: Positions):
    return q_positions - k_positions == q_positions - k_positions

  def bounds(self, q: Range, k: Range):
    everywhere = q.low - k.low == q.low - k.low
    return everywhere, everywhere


@dataclasses.dataclass(frozen=True)
class Causal(Primitive):
  """A query reads the keys up to its own position."""

  shift_invariant = True

  def allowed(self, q_positions: Positions, k_positions: Positions):
    return q_positions >= k_positions

  @property
  def is_causal(self) -> bool:
    return True

  def bounds(self, q: Range, k: Range):
    return q.high >= k.low, q.low >= k.high


@dataclasses.dataclass(frozen=True)
class SlidingWindow(Primitive):
  """Keys in [q - left, q + right]: left + 1 + right keys, its own included."""

  left: int
  right: int = 0
  shift_invariant = True

  def __post_init__(self):
    _check(self, left=0, right=0)

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
  """Every `dilation`-th key on both sides, `window` of them with its own.

  Keys at q - i dilation and q + i dilation for 0 <= i < window. Combine with
  `Causal()` for a decoder. Longformer (arXiv:2004.05150), section 3.1.
  """

  window: int
  dilation: int
  shift_invariant = True

  def __post_init__(self):
    _check(self, window=1, dilation=1)

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
class PrefixColumns(Primitive):
  """The first n keys, which all queries read: sinks, or global keys."""

  n: int

  def __post_init__(self):
    _check(self, n=0)

  def k_cuts(self, S: int) -> np.ndarray:
    return np.array([min(self.n, S)])

  def allowed(self, q_positions: Positions, k_positions: Positions):
    return k_positions + 0 * q_positions < self.n

  def bounds(self, q: Range, k: Range):
    return k.low + 0 * q.low < self.n, k.high + 0 * q.low < self.n

  def kv_retention(self) -> KVRetention:
    return KVRetention(self.n, 0)


@dataclasses.dataclass(frozen=True)
class PrefixRows(Primitive):
  """The first n queries, which read all keys: global tokens as readers."""

  n: int

  def __post_init__(self):
    _check(self, n=0)

  def q_cuts(self, T: int) -> np.ndarray:
    return np.array([min(self.n, T)])

  def allowed(self, q_positions: Positions, k_positions: Positions):
    return q_positions + 0 * k_positions < self.n

  def bounds(self, q: Range, k: Range):
    return q.low + 0 * k.low < self.n, q.high + 0 * k.low < self.n

  def kv_retention(self) -> KVRetention:
    return KVRetention(self.n, 0)


@dataclasses.dataclass(frozen=True)
class GlobalTokens(Primitive):
  """The first n tokens read all the others and are read by all of them.

  Longformer (arXiv:2004.05150), section 3.1: symmetric global attention.
  """

  n: int

  def __post_init__(self):
    _check(self, n=0)

  def q_cuts(self, T: int) -> np.ndarray:
    return np.array([min(self.n, T)])

  def k_cuts(self, S: int) -> np.ndarray:
    return np.array([min(self.n, S)])

  def allowed(self, q_positions: Positions, k_positions: Positions):
    return (q_positions < self.n) | (k_positions < self.n)

  def bounds(self, q: Range, k: Range):
    some = (q.low < self.n) | (k.low < self.n)
    return some, (q.high < self.n) | (k.high < self.n)

  def kv_retention(self) -> KVRetention:
    return KVRetention(self.n, 0)


@dataclasses.dataclass(frozen=True)
class Beyond(Primitive):
  """Pairs of queries and keys that both lie beyond a prefix.

  What `GlobalTokens` and `PrefixColumns` leave: schedules that treat the first
  tokens apart give the rest of a mask by `mask & Beyond(rows, columns)`.

  Attributes:
    rows: queries from this position on.
    columns: keys from this position on.
  """

  rows: int
  columns: int

  def __post_init__(self):
    _check(self, rows=0, columns=0)

  def q_cuts(self, T: int) -> np.ndarray:
    return np.array([min(self.rows, T)])

  def k_cuts(self, S: int) -> np.ndarray:
    return np.array([min(self.columns, S)])

  def allowed(self, q_positions: Positions, k_positions: Positions):
    return (q_positions >= self.rows) & (k_positions >= self.columns)

  def bounds(self, q: Range, k: Range):
    some = (q.high >= self.rows) & (k.high >= self.columns)
    return some, (q.low >= self.rows) & (k.low >= self.columns)


@dataclasses.dataclass(frozen=True)
class RandomBlocks(Primitive):
  """Each block of queries reads `per_row` random blocks of keys.

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

  block: int
  per_row: int
  seed: int
  num_blocks: int | None = None

  def __post_init__(self):
    _check(self, block=1, per_row=1, seed=0)
    if self.num_blocks is not None:
      _check(self, num_blocks=1)

  def q_cuts(self, T: int) -> np.ndarray:
    return np.arange(0, T, self.block)

  def k_cuts(self, S: int) -> np.ndarray:
    return np.arange(0, S, self.block)

  def allowed(self, q_positions: Positions, k_positions: Positions):
    row, column = q_positions // self.block, k_positions // self.block
    seen = row + column < 0
    for exists, drawn in self._draws(row):
      seen = seen | (exists & (column == drawn))
    return seen

  def bounds(self, q: Range, k: Range):
    row, one_row = (
      q.low // self.block,
      q.low // self.block == q.high // self.block,
    )
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
  """Any pattern of blocks; positions beyond the pattern are not allowed.

  Attributes:
    block: positions per block, of queries and of keys.
    pattern: rows of 0 and 1; pattern[i][j] is 1 where query block i reads key
      block j. An array is accepted and stored as nested tuples.
  """

  block: int
  pattern: tuple | np.ndarray

  def __post_init__(self):
    _check(self, block=1)
    table = np.asarray(self.pattern)
    if table.ndim != 2 or not np.isin(table, (0, 1)).all():
      raise ValueError(
        f'BlockSparse: pattern must be a matrix of 0 and 1, got {table.shape=}'
      )
    rows = tuple(tuple(int(cell) for cell in row) for row in table)
    object.__setattr__(self, 'pattern', rows)

  def q_cuts(self, T: int) -> np.ndarray:
    return np.arange(0, T, self.block)

  def k_cuts(self, S: int) -> np.ndarray:
    return np.arange(0, S, self.block)

  def allowed(self, q_positions: Positions, k_positions: Positions):
    on_device = isinstance(q_positions, jax.Array) or isinstance(
      k_positions, jax.Array
    )
    row, column = q_positions // self.block, k_positions // self.block
    if on_device and self.is_small:
      return self._bits(row, column)
    xp = jnp if on_device else np
    table = xp.asarray(np.asarray(self.pattern, bool))
    inside = (row < table.shape[0]) & (column < table.shape[1])
    row = xp.minimum(row, table.shape[0] - 1)
    column = xp.minimum(column, table.shape[1] - 1)
    return inside & table[row, column]

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
    table = np.asarray(self.pattern, np.int32)
    sums = np.pad(table, ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    on_device = any(isinstance(x, jax.Array) for x in (*q, *k))
    sums = jnp.asarray(sums) if on_device else sums
    xp = jnp if on_device else np
    rows, columns = table.shape
    top, bottom = q.low // self.block, q.high // self.block + 1
    left, right = k.low // self.block, k.high // self.block + 1
    area = (bottom - top) * (right - left)
    top, bottom = xp.minimum(top, rows), xp.minimum(bottom, rows)
    left, right = xp.minimum(left, columns), xp.minimum(right, columns)
    ones = (
      sums[bottom, right]
      - sums[top, right]
      - sums[bottom, left]
      + sums[top, left]
    )
    return ones > 0, ones == area


def _check(mask: Primitive, **minimum: int) -> None:
  """Raises where a field of the mask is below its minimum."""
  for name, least in minimum.items():
    value = getattr(mask, name)
    if value < least:
      raise ValueError(
        f'{type(mask).__name__}: {name}={value} must be at least {least}'
      )


def _random_bits(row: Positions, seed: int, draw: int):
  """31 random bits per row: the finalizer of MurmurHash3 on (row, seed, draw).

  The same integers in numpy and jax.numpy, so that a block map made on the host
  agrees with the element mask inside a kernel.
  """
  xp = jnp if isinstance(row, jax.Array) else np
  salt = (seed * 0x9E3779B9 + draw * 0x85EBCA6B + 1) & 0xFFFFFFFF
  # Wrapping is what the hash is made of; numpy warns of it for scalars.
  with np.errstate(over='ignore'):
    x = xp.asarray(row).astype(xp.uint32) * xp.uint32(0x9E3779B1)
    x = x ^ xp.uint32(salt)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
      x = (x ^ (x >> xp.uint32(shift))) * xp.uint32(factor)
    x = x ^ (x >> xp.uint32(16))
  return (x >> xp.uint32(1)).astype(xp.int32)
