"""Attention masks as specifications, exact per element and per block.

A mask is a frozen, hashable dataclass without arrays. It says one thing, in
`allowed(q_positions, k_positions)`: may this query read this key? All the rest
is derived from that: the dense oracle, the block map that drives kernels and
ring schedules, the number of pairs a computation is worth, the keys a decoder
must keep. Masks combine with `&` and `|`.

How block maps stay exact without a T x S array: a primitive mask either depends
on the offset q - k alone (`Causal`, `SlidingWindow`, `Dilated`), or is constant
on a grid of rectangles whose edges it lists (`PrefixColumns`, `RandomBlocks`).
Cutting the plane along all the edges leaves cells in which any combination of
masks is a function of q - k, and pairs in a cell follow from a table of second
cumulative sums over the T + S - 1 offsets. Memory is O(T + S + cells).
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from longctx.typing import Bool, Int

Positions = jax.Array | np.ndarray | int

EMPTY, PARTIAL, FULL = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class Mask(abc.ABC):
  """Which keys a query may read, as a function of their positions."""

  @abc.abstractmethod
  def allowed(self, q_positions: Positions, k_positions: Positions):
    """True where the query may read the key.

    Args:
      q_positions: integer positions of queries, any shape.
      k_positions: integer positions of keys, broadcastable against the queries.

    Returns:
      Booleans of the broadcast shape, numpy for numpy positions and jax.numpy
      for jax.numpy positions.
    """

  def bounds(
    self,
    q_low: Positions,
    q_high: Positions,
    k_low: Positions,
    k_high: Positions,
  ):
    """Whether some, and whether all, pairs of two ranges may be allowed.

    For positions that are known only at run time. Where a mask cannot tell, it
    says yes to some and no to all, which costs time and is still right.

    Args:
      q_low: smallest position of a block of queries, any shape.
      q_high: largest one.
      k_low: smallest position of a block of keys, broadcastable.
      k_high: largest one.

    Returns:
      (some, all): Booleans of the broadcast shape. some is never no where a
      pair is allowed; all is never yes where one is not.
    """
    everywhere = q_low - k_low == q_low - k_low
    return everywhere, ~everywhere

  @abc.abstractmethod
  def primitives(self) -> tuple[Primitive, ...]:
    """The primitive masks this one is made of."""

  @abc.abstractmethod
  def combine(self, leaf: Callable[[Primitive], np.ndarray]) -> np.ndarray:
    """Evaluates the Boolean expression on values given per primitive mask."""

  def __and__(self, other: Mask) -> Mask:
    return And(self, other)

  def __or__(self, other: Mask) -> Mask:
    return Or(self, other)

  def dense(self, T: int, S: int) -> Bool[np.ndarray, 'T S']:
    """The mask as a T x S array, for oracles and pictures."""
    q, k = np.arange(T)[:, None], np.arange(S)[None, :]
    return np.broadcast_to(self.allowed(q, k), (T, S))

  def block_map(
    self, T: int, S: int, block_q: int, block_k: int
  ) -> Int[np.ndarray, 'nq nk']:
    """Which blocks hold no allowed pair (0), some (1) or only such pairs (2).

    The last block of a row or column may be short; it is full when all the
    pairs that exist are allowed.

    Args:
      T: number of queries, at positions 0 to T - 1.
      S: number of keys, at positions 0 to S - 1.
      block_q: queries per block.
      block_k: keys per block.

    Returns:
      int8[ceil(T / block_q), ceil(S / block_k)].
    """
    q_edges, k_edges = _edges(T, block_q), _edges(S, block_k)
    out = np.empty((len(q_edges) - 1, len(k_edges) - 1), np.int8)
    for row, counts in enumerate(self._count_rows(q_edges, k_edges)):
      area = (q_edges[row + 1] - q_edges[row]) * np.diff(k_edges)
      out[row] = np.where(counts == area, FULL, counts > 0)
    return out

  def count(
    self, q_edges: Int[np.ndarray, ' Q'], k_edges: Int[np.ndarray, ' K']
  ) -> Int[np.ndarray, 'q k']:
    """Allowed pairs, exactly, of each interval of queries with each of keys.

    Args:
      q_edges: ascending positions; interval i is [q_edges[i], q_edges[i + 1]).
      k_edges: likewise for keys.

    Returns:
      int64[Q - 1, K - 1].
    """
    return np.stack(list(self._count_rows(q_edges, k_edges)))

  def num_allowed(self, T: int, S: int) -> int:
    """How many of the T x S pairs are allowed, exactly."""
    # Strips bound the memory of masks that are cut into many small cells.
    strips = self._count_rows(_edges(T, max(1024, T // 64)), np.array([0, S]))
    return sum(int(counts.sum()) for counts in strips)

  def useful_flops(self, T: int, S: int, head_dim: int) -> int:
    """FLOPs of one head's forward pass on the allowed pairs alone.

    Two products, q kᵀ and p v, of 2 head_dim FLOPs per pair each; the backward
    pass has five such products, 2.5 times as many.
    """
    return 4 * head_dim * self.num_allowed(T, S)

  def kv_slots(self, seq_len: int) -> int:
    """Keys that decoding keeps at length `seq_len`, the newest included.

    A key is kept when the newest query or one of the next `seq_len` may read
    it.
    """
    q_edges = np.array([seq_len - 1, 2 * seq_len])
    (counts,) = self._count_rows(q_edges, np.arange(seq_len + 1))
    return int((counts > 0).sum())

  def _count_rows(
    self, q_edges: np.ndarray, k_edges: np.ndarray
  ) -> Iterator[np.ndarray]:
    """Yields, per interval of queries, the allowed pairs per key interval."""
    T, S = int(q_edges[-1]), int(k_edges[-1])
    fixed = tuple(
      p for p in dict.fromkeys(self.primitives()) if not p.shift_invariant
    )
    q_cuts, k_cuts = np.unique(q_edges), np.unique(k_edges)
    for primitive in fixed:
      q_cuts = np.union1d(q_cuts, primitive.q_cuts(T))
      k_cuts = np.union1d(k_cuts, primitive.k_cuts(S))
    k_cuts = k_cuts[(k_cuts >= k_edges[0]) & (k_cuts <= S)]
    first_cell = np.searchsorted(k_cuts, k_edges[:-1])

    @functools.lru_cache(maxsize=2 ** len(fixed))
    def table(code: int) -> np.ndarray:
      # Offsets q - k run from -(S - 1) to T - 1.
      offsets = np.arange(-(S - 1), T)

      def leaf(primitive):
        if primitive.shift_invariant:
          return primitive.allowed(offsets, 0)
        return np.full(offsets.shape, code >> fixed.index(primitive) & 1, bool)

      allowed = self.combine(leaf)
      once = np.concatenate([[0], np.cumsum(allowed, dtype=np.int64)])
      return np.concatenate([[0], np.cumsum(once)])

    for q_start, q_stop in itertools.pairwise(q_edges):
      inside = q_cuts[(q_cuts > q_start) & (q_cuts < q_stop)]
      q_cells = np.concatenate([[q_start], inside, [q_stop]])
      q0, q1 = q_cells[:-1, None], q_cells[1:, None]
      k0, k1 = k_cuts[None, :-1], k_cuts[None, 1:]
      code = np.zeros((q0.shape[0], k0.shape[1]), np.int32)
      for bit, primitive in enumerate(fixed):
        code |= np.asarray(primitive.allowed(q0, k0), np.int32) << bit
      counts = np.zeros(code.shape, np.int64)
      for value in np.unique(code):
        # sums[x] = sum over y < x of (allowed offsets below y - (S - 1)).
        sums = table(int(value))
        cell = (
          sums[q1 - k0 + S]
          - sums[q0 - k0 + S]
          - sums[q1 - k1 + S]
          + sums[q0 - k1 + S]
        )
        counts = np.where(code == value, cell, counts)
      yield np.add.reduceat(counts.sum(0), first_cell)


@dataclasses.dataclass(frozen=True)
class Primitive(Mask):
  """A mask that is not made of other masks.

  Either a function of q - k alone (`shift_invariant`), or constant between the
  positions listed by `q_cuts` and `k_cuts`.
  """

  shift_invariant = False

  def q_cuts(self, T: int) -> np.ndarray:
    return np.array([], np.int64)

  def k_cuts(self, S: int) -> np.ndarray:
    return np.array([], np.int64)

  def primitives(self) -> tuple[Primitive, ...]:
    return (self,)

  def combine(self, leaf: Callable[[Primitive], np.ndarray]) -> np.ndarray:
    return leaf(self)


@dataclasses.dataclass(frozen=True)
class Full(Primitive):
  """Every query reads every key."""

  shift_invariant = True

  def allowed(self, q_positions: Positions, k_positions: Positions):
    return q_positions - k_positions == q_positions - k_positions

  def bounds(
    self,
    q_low: Positions,
    q_high: Positions,
    k_low: Positions,
    k_high: Positions,
  ):
    everywhere = q_low - k_low == q_low - k_low
    return everywhere, everywhere


@dataclasses.dataclass(frozen=True)
class Causal(Primitive):
  """A query reads the keys up to its own position."""

  shift_invariant = True

  def allowed(self, q_positions: Positions, k_positions: Positions):
    return q_positions >= k_positions

  def bounds(
    self,
    q_low: Positions,
    q_high: Positions,
    k_low: Positions,
    k_high: Positions,
  ):
    return q_high >= k_low, q_low >= k_high


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

  def bounds(
    self,
    q_low: Positions,
    q_high: Positions,
    k_low: Positions,
    k_high: Positions,
  ):
    nearest, farthest = q_low - k_high, q_high - k_low
    some = (nearest <= self.left) & (farthest >= -self.right)
    return some, (farthest <= self.left) & (nearest >= -self.right)


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
    return near & (offset % self.dilation == 0)

  def bounds(
    self,
    q_low: Positions,
    q_high: Positions,
    k_low: Positions,
    k_high: Positions,
  ):
    reach = (self.window - 1) * self.dilation
    some = (q_low - k_high <= reach) & (q_high - k_low >= -reach)
    return some, some & (self.dilation == 1) & (
      (q_high - k_low <= reach) & (q_low - k_high >= -reach)
    )


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

  def bounds(
    self,
    q_low: Positions,
    q_high: Positions,
    k_low: Positions,
    k_high: Positions,
  ):
    return k_low + 0 * q_low < self.n, k_high + 0 * q_low < self.n


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

  def bounds(
    self,
    q_low: Positions,
    q_high: Positions,
    k_low: Positions,
    k_high: Positions,
  ):
    some = (q_low < self.n) | (k_low < self.n)
    return some, (q_high < self.n) | (k_high < self.n)


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

  def bounds(
    self,
    q_low: Positions,
    q_high: Positions,
    k_low: Positions,
    k_high: Positions,
  ):
    some = (q_high >= self.rows) & (k_high >= self.columns)
    return some, (q_low >= self.rows) & (k_low >= self.columns)


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
    candidates = row + 1 if self.num_blocks is None else self.num_blocks
    seen = row + column < 0
    for draw in range(self.per_row):
      start = draw * candidates // self.per_row
      size = (draw + 1) * candidates // self.per_row - start
      pick = _random_bits(row, self.seed, draw) % (size + (size == 0))
      seen = seen | ((size > 0) & (column == start + pick))
    return seen


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
    xp = jnp if on_device else np
    table = xp.asarray(np.asarray(self.pattern, bool))
    row, column = q_positions // self.block, k_positions // self.block
    inside = (row < table.shape[0]) & (column < table.shape[1])
    row = xp.minimum(row, table.shape[0] - 1)
    column = xp.minimum(column, table.shape[1] - 1)
    return inside & table[row, column]

  def bounds(
    self,
    q_low: Positions,
    q_high: Positions,
    k_low: Positions,
    k_high: Positions,
  ):
    # Counts of ones in rectangles, from sums over all the blocks before.
    table = np.asarray(self.pattern, np.int32)
    sums = np.pad(table, ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    on_device = any(
      isinstance(x, jax.Array) for x in (q_low, q_high, k_low, k_high)
    )
    sums = jnp.asarray(sums) if on_device else sums
    xp = jnp if on_device else np
    rows, columns = table.shape
    top, bottom = q_low // self.block, q_high // self.block + 1
    left, right = k_low // self.block, k_high // self.block + 1
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


@dataclasses.dataclass(frozen=True)
class _Combination(Mask):
  """Two masks joined by a Boolean operator."""

  a: Mask
  b: Mask

  def primitives(self) -> tuple[Primitive, ...]:
    return self.a.primitives() + self.b.primitives()


@dataclasses.dataclass(frozen=True)
class And(_Combination):
  """Pairs that both masks allow."""

  def allowed(self, q_positions: Positions, k_positions: Positions):
    a = self.a.allowed(q_positions, k_positions)
    return a & self.b.allowed(q_positions, k_positions)

  def combine(self, leaf: Callable[[Primitive], np.ndarray]) -> np.ndarray:
    return self.a.combine(leaf) & self.b.combine(leaf)

  def bounds(
    self,
    q_low: Positions,
    q_high: Positions,
    k_low: Positions,
    k_high: Positions,
  ):
    some, all_ = self.a.bounds(q_low, q_high, k_low, k_high)
    also, also_all = self.b.bounds(q_low, q_high, k_low, k_high)
    return some & also, all_ & also_all


@dataclasses.dataclass(frozen=True)
class Or(_Combination):
  """Pairs that either mask allows."""

  def allowed(self, q_positions: Positions, k_positions: Positions):
    a = self.a.allowed(q_positions, k_positions)
    return a | self.b.allowed(q_positions, k_positions)

  def combine(self, leaf: Callable[[Primitive], np.ndarray]) -> np.ndarray:
    return self.a.combine(leaf) | self.b.combine(leaf)

  def bounds(
    self,
    q_low: Positions,
    q_high: Positions,
    k_low: Positions,
    k_high: Positions,
  ):
    some, all_ = self.a.bounds(q_low, q_high, k_low, k_high)
    also, also_all = self.b.bounds(q_low, q_high, k_low, k_high)
    return some | also, all_ | also_all


def _edges(length: int, block: int) -> np.ndarray:
  """Block boundaries 0, block, 2 block, …, length."""
  if length < 1 or block < 1:
    raise ValueError(f'need {length=} >= 1 and {block=} >= 1')
  return np.append(np.arange(0, length, block), length)


def _check(mask: Mask, **minimum: int) -> None:
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
