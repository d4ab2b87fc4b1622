"""What a mask is, how masks combine, and how their pairs are counted.

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
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from longctx.typing import Bool, Int

Positions = jax.Array | np.ndarray | int

EMPTY, PARTIAL, FULL = 0, 1, 2


class Range(NamedTuple):
  """The smallest and the largest position of a block, or of many."""

  low: Positions
  high: Positions


class KVRetention(NamedTuple):
  """KV retention: the first keys and a window, beyond which none is read.

  A query at q reads a key at k <= q only if k < columns or q - k < window.

  Attributes:
    columns: first keys that queries may read from any distance.
    window: keys up to the query, its own position's included; None for all.
  """

  columns: int
  window: int | None

  def slots(self, seq_len: int | None) -> int:
    """How many keys there are to keep of `seq_len`, None for any number.

    Raises:
      ValueError: of any number of keys, all are to be kept.
    """
    most = None if self.window is None else self.columns + self.window
    if most is None and seq_len is None:
      raise ValueError(
        'every key may be read again, so no memory holds an endless stream: '
        'give a capacity, or take layers with a window or a recurrence'
      )
    return min(n for n in (most, seq_len) if n is not None)

  def union(self, other: KVRetention) -> KVRetention:
    """The retention of two masks together."""
    columns = max(self.columns, other.columns)
    if self.window is None or other.window is None:
      return KVRetention(columns, None)
    return KVRetention(columns, max(self.window, other.window))


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

  def bounds(self, q: Range, k: Range):
    """Whether some, and whether all, pairs of two ranges may be allowed.

    For positions that are known only at run time. Where a mask cannot tell, it
    says yes to some and no to all, which costs time and is still right.

    Args:
      q: positions of blocks of queries, any shape.
      k: positions of blocks of keys, broadcastable.

    Returns:
      (some, all): Booleans of the broadcast shape. some is never no where a
      pair is allowed; all is never yes where one is not.
    """
    everywhere = q.low - k.low == q.low - k.low
    return everywhere, ~everywhere

  def kv_retention(self) -> KVRetention:
    """Keys that decoding has to keep, as few as the mask can tell."""
    return KVRetention(0, None)

  @property
  def is_causal(self) -> bool:
    """Whether it is certain that no query reads a later key."""
    return False

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

  def bounds(self, q: Range, k: Range):
    some, all_ = self.a.bounds(q, k)
    also, also_all = self.b.bounds(q, k)
    return some & also, all_ & also_all

  @property
  def is_causal(self) -> bool:
    return self.a.is_causal or self.b.is_causal

  def kv_retention(self) -> KVRetention:
    # Each of both holds; the narrower window keeps less in the end.
    narrow = lambda retention: (
      math.inf if retention.window is None else retention.window,
      retention.columns,
    )
    return min(self.a.kv_retention(), self.b.kv_retention(), key=narrow)


@dataclasses.dataclass(frozen=True)
class Or(_Combination):
  """Pairs that either mask allows."""

  def allowed(self, q_positions: Positions, k_positions: Positions):
    a = self.a.allowed(q_positions, k_positions)
    return a | self.b.allowed(q_positions, k_positions)

  def combine(self, leaf: Callable[[Primitive], np.ndarray]) -> np.ndarray:
    return self.a.combine(leaf) | self.b.combine(leaf)

  def bounds(self, q: Range, k: Range):
    some, all_ = self.a.bounds(q, k)
    also, also_all = self.b.bounds(q, k)
    return some | also, all_ | also_all

  @property
  def is_causal(self) -> bool:
    return self.a.is_causal and self.b.is_causal

  def kv_retention(self) -> KVRetention:
    return self.a.kv_retention().union(self.b.kv_retention())


def _edges(length: int, block: int) -> np.ndarray:
  """Block boundaries 0, block, 2 block, …, length."""
  if length < 1 or block < 1:
    raise ValueError(f'need {length=} >= 1 and {block=} >= 1')
  return np.append(np.arange(0, length, block), length)
