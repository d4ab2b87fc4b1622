"""Exact block counts of attention masks, without a T x S array.

A primitive mask either depends on the offset q - k alone (`Causal`, `Dilated`),
or is constant on a grid of rectangles whose edges it lists (`PrefixColumns`,
`RandomBlocks`). Cutting the plane along all the edges leaves cells in which any
combination of masks is a function of q - k, and pairs in a cell follow from a
table of second cumulative sums over the T + S - 1 offsets. Memory is
O(T + S + cells). Masks that declare neither are counted pair by pair.
"""

import functools
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from longctx.typing import Bool, Int

Positions = jax.Array | np.ndarray | int

# Pair by pair: the side of a square that `bounds` may rule out, the keys at a
# time, and the most pairs, 65,536 squared, which take up to a minute.
TILE, KEYS, MOST_PAIRS = 256, 4096, 1 << 32
# A cell has a bit per mask of a grid, in an int32.
MOST_GRIDS = 31


class Range(NamedTuple):
  """Position range of a block: its smallest and its largest, or of many."""

  low: Positions
  high: Positions


def allowed_on_host(
  mask: Any, q: np.ndarray, k: np.ndarray
) -> Bool[np.ndarray, '*pairs']:
  """`mask.allowed` in numpy for all pairs, inside of traced code too."""
  # What a mask computes by jax.numpy is else traced with the program around.
  with jax.ensure_compile_time_eval(), np.errstate(all='ignore'):
    allowed = np.asarray(mask.allowed(q, k))
  if allowed.dtype != bool:
    raise TypeError(
      f'{mask}: allowed must return Booleans, not {allowed.dtype}; compare, as '
      'in q_positions >= k_positions'
    )
  return np.broadcast_to(allowed, np.broadcast_shapes(q.shape, k.shape))


def bounds_on_host(
  mask: Any, q: Range, k: Range
) -> Bool[np.ndarray, '*ranges']:
  """`mask.bounds`, likewise."""
  shape = np.broadcast_shapes(q.low.shape, k.low.shape)
  with jax.ensure_compile_time_eval():
    found = [np.asarray(x) for x in mask.bounds(q, k)]
  if len(found) != 2 or any(x.dtype != bool for x in found):
    raise TypeError(
      f'{mask}: bounds must return (some, all), both Booleans, not '
      f'{[str(x.dtype) for x in found]}; compare, as in q.high >= k.low'
    )
  return np.stack([np.broadcast_to(x, shape) for x in found])


def count_rows(
  mask: Any, q_edges: np.ndarray, k_edges: np.ndarray
) -> Iterator[Int[np.ndarray, ' k']]:
  """Yields, per interval of queries, the allowed pairs per key interval."""
  T, S = int(q_edges[-1]), int(k_edges[-1])
  fixed = tuple(
    p for p in dict.fromkeys(mask.primitives()) if not p.shift_invariant
  )
  cuts = [p.cuts(T, S) for p in fixed]
  if None in cuts or len(fixed) > MOST_GRIDS:
    yield from _count_pairs(
      mask, tuple(q_edges.tolist()), tuple(k_edges.tolist())
    )
    return
  q_cuts, k_cuts = np.unique(q_edges), np.unique(k_edges)
  for q, k in cuts:
    q_cuts = np.union1d(q_cuts, np.asarray(q, int))
    k_cuts = np.union1d(k_cuts, np.asarray(k, int))
  k_cuts = k_cuts[(k_cuts >= k_edges[0]) & (k_cuts <= S)]
  first_cell = np.searchsorted(k_cuts, k_edges[:-1])

  @functools.lru_cache(maxsize=2 ** len(fixed))
  def table(code: int) -> np.ndarray:
    # Offsets q - k run from -(S - 1) to T - 1.
    offsets = np.arange(-(S - 1), T)

    def leaf(primitive):
      if primitive.shift_invariant:
        return allowed_on_host(primitive, offsets, np.zeros(1, int))
      return np.full(offsets.shape, code >> fixed.index(primitive) & 1, bool)

    # At x, the sum over y < x of the allowed offsets below y - (S - 1).
    once = np.cumsum(mask.combine(leaf), dtype=np.int64)
    return np.concatenate([[0, 0], np.cumsum(once)])

  for q_start, q_stop in itertools.pairwise(q_edges):
    inside = q_cuts[(q_cuts > q_start) & (q_cuts < q_stop)]
    cells = np.concatenate([[q_start], inside, [q_stop]])[:, None]
    code = np.zeros((len(cells) - 1, len(k_cuts) - 1), np.int32)
    for bit, primitive in enumerate(fixed):
      value = allowed_on_host(primitive, cells[:-1], k_cuts[None, :-1])
      code |= value.astype(np.int32) << bit
    counts = np.zeros(code.shape, np.int64)
    for value in np.unique(code):
      corners = table(int(value))[cells - k_cuts + S]
      pairs = -np.diff(np.diff(corners, axis=0))
      counts = np.where(code == value, pairs, counts)
    yield np.add.reduceat(counts.sum(0), first_cell)


# Forward and backward passes ask for the same counts.
@functools.lru_cache(maxsize=8)
def _count_pairs(
  mask: Any, q_edges: tuple[int, ...], k_edges: tuple[int, ...]
) -> Int[np.ndarray, 'q k']:
  """`count_rows` from all the pairs that `mask.bounds` does not rule out."""
  start, stop = k_edges[0], k_edges[-1]
  q_cuts = np.union1d(q_edges, np.arange(q_edges[0], q_edges[-1], TILE))
  k_cuts = np.append(np.arange(start, stop, TILE), stop)
  q_ranges = Range(q_cuts[:-1, None], q_cuts[1:, None] - 1)
  some, _ = bounds_on_host(mask, q_ranges, Range(k_cuts[:-1], k_cuts[1:] - 1))
  if (pairs := np.diff(q_cuts) @ some @ np.diff(k_cuts)) > MOST_PAIRS:
    raise NotImplementedError(
      f'{mask}: {pairs:,} pairs are more than the {MOST_PAIRS:,} that are '
      'counted one by one: define shift_invariant or cuts of your own mask, or '
      'bounds that rule most blocks out'
    )
  counts = []
  for q_start, q_stop in itertools.pairwise(q_edges):
    per_key = np.zeros(stop - start, np.int64)
    for row in range(*np.searchsorted(q_cuts, (q_start, q_stop))):
      q = np.arange(q_cuts[row], q_cuts[row + 1], dtype=np.int32)
      keys = np.flatnonzero(np.repeat(some[row], np.diff(k_cuts)))
      for part in np.split(keys, range(KEYS, len(keys), KEYS)):
        k = (part + start).astype(np.int32)
        per_key[part] += allowed_on_host(mask, q[:, None], k[None]).sum(0)
    sums = np.append(0, per_key.cumsum())
    counts.append(np.diff(sums[np.array(k_edges) - start]))
  return np.stack(counts)
