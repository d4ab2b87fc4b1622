"""Work list of a TPU kernel's grid, in one word per block.

A kernel's grid is as long as the list, so an empty block costs nothing: it is
neither loaded nor computed. Entries lie in the scalar memory of a core, which
holds some 260,000 words; longer lists are cut into several calls.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from longctx import masks
from longctx.ops.dot_product_attention.args import TokenIndices
from longctx.ops.dot_product_attention.tiling import Tiling
from longctx.ops.dot_product_attention.work_list import block_kinds
from longctx.typing import Array, Int

# From the lowest bit: the first and the last entry of a row, what the block
# holds (2 bits), the column and the row (14 bits each).
FIRST, LAST, KIND, COLUMN, ROW = 0, 1, 2, 4, 18
MOST_BLOCKS = 2**14

# Entries of one call, half of what the scalar memory holds.
LONGEST = 2**17


class FlatList(NamedTuple):
  """Work list of the calls of a kernel: blocks, row by row.

  Group g has `chunks` calls of `rows` rows each, numbered from 0 in each call;
  call g chunks + c has the rows from c rows on. A row without any pair has one
  entry, so that its result is written.

  Attributes:
    entries: the blocks; those from `count` on mean nothing.
    count: entries of each call.
    groups: 1 where all batch rows have the same blocks, else one per row.
    rows: block rows of a call.
    kinds: which kinds of blocks there may be, of PARTIAL and FULL.
    blocks: blocks with a pair of one group; the most there may be where that
      is known at run time alone.
  """

  entries: Int[Array, 'calls w'] | np.ndarray
  count: Int[Array, ' calls'] | np.ndarray
  groups: int
  rows: int
  kinds: tuple[int, ...]
  blocks: int

  @property
  def calls(self) -> int:
    return len(self.count)

  @property
  def chunks(self) -> int:
    return self.calls // self.groups


def make_flat_list(
  mask: masks.Mask, tiling: Tiling, indices: TokenIndices, *, by_column: bool
) -> FlatList:
  """The list of a mask, on the host or at run time; see `make_work_list`.

  Args:
    mask: who reads whom.
    tiling: of the arrays, with one batch row at a time.
    indices: positions and segments.
    by_column: whether rows of the list are blocks of keys.

  Raises:
    NotImplementedError: more blocks than an entry has bits for.
  """
  most = max(tiling.nq, tiling.nk)
  if most > MOST_BLOCKS:
    raise NotImplementedError(
      f'{most} blocks of queries or keys are more than the {MOST_BLOCKS} that '
      'a TPU kernel numbers: take larger blocks, or spread the sequence over '
      'more devices'
    )
  if all(x is None for x in indices):
    return _static_list(mask, tiling, by_column)
  kinds = block_kinds(mask, tiling, indices)
  if by_column:
    kinds = kinds.swapaxes(1, 2)
  groups, m, n = kinds.shape
  rows = min(m, max(1, LONGEST // n))
  kinds = jnp.pad(kinds, [(0, 0), (0, -m % rows), (0, 0)])
  kinds = kinds.reshape(-1, rows, n)
  entries, count = jax.vmap(_flatten)(kinds)
  both = (masks.PARTIAL, masks.FULL)
  return FlatList(entries, count, groups, rows, both, m * n)


@functools.lru_cache(maxsize=64)
def _static_list(mask: masks.Mask, tiling: Tiling, by_column: bool) -> FlatList:
  kinds = block_kinds(mask, tiling, TokenIndices())
  kinds = kinds.T if by_column else kinds
  visited = np.maximum((kinds != masks.EMPTY).sum(1), 1)
  rows = len(kinds)
  while rows > 1 and _longest(visited, rows) > LONGEST:
    rows = -(-rows // 2)
  parts = [
    _flatten_on_host(kinds[start : start + rows], rows)
    for start in range(0, len(kinds), rows)
  ]
  count = np.array([len(part) for part in parts], np.int32)
  entries = np.zeros((len(parts), count.max()), np.int32)
  for row, part in zip(entries, parts, strict=True):
    row[: len(part)] = part
  some = tuple(
    kind for kind in (masks.PARTIAL, masks.FULL) if (kinds == kind).any()
  )
  blocks = int(np.count_nonzero(kinds))
  return FlatList(entries, count, 1, rows, some, blocks)


def _longest(visited: np.ndarray, rows: int) -> int:
  starts = np.arange(0, len(visited), rows)
  return int(np.add.reduceat(visited, starts).max())


def _flatten_on_host(
  kinds: Int[np.ndarray, 'r n'], rows: int
) -> Int[np.ndarray, ' w']:
  # The last call may have rows beyond the array's, which it writes too.
  kinds = np.pad(kinds.astype(np.int64), [(0, rows - len(kinds)), (0, 0)])
  visited = kinds != masks.EMPTY
  visited[:, 0] |= ~visited.any(1)
  row, column = np.nonzero(visited)
  edge = np.diff(row, prepend=-1, append=-1) != 0
  word = _pack(row, column, kinds[visited], edge[:-1], edge[1:])
  return word.astype(np.uint32).view(np.int32)


def _flatten(kinds: Int[Array, 'r n']) -> tuple[Array, Array]:
  """(entries [r n], their number) of one call, at run time."""
  rows, n = kinds.shape
  visited = kinds != masks.EMPTY
  visited = visited.at[:, 0].set(visited[:, 0] | ~visited.any(1))
  count = visited.sum(dtype=jnp.int32)
  # Visited blocks first, in order.
  order = jnp.argsort(~visited.reshape(-1), stable=True).astype(jnp.int32)
  row, column = order // n, order % n
  edge = row[1:] != row[:-1]
  first = jnp.pad(edge, (1, 0), constant_values=True)
  last = jnp.pad(edge, (0, 1), constant_values=True)
  last |= jnp.arange(rows * n) == count - 1
  words = (row, column, kinds.reshape(-1)[order], first, last)
  return _pack(*(word.astype(jnp.int32) for word in words)), count


def _pack(row: Any, column: Any, kind: Any, first: Any, last: Any) -> Any:
  return (
    row << ROW | column << COLUMN | kind << KIND | last << LAST | first << FIRST
  )


def row_of(entry):
  """The block row of an entry, within its call."""
  return (entry >> ROW) & (MOST_BLOCKS - 1)


def column_of(entry):
  """The block column of an entry."""
  return (entry >> COLUMN) & (MOST_BLOCKS - 1)


def is_first(entry):
  """Whether an entry is the first of its row."""
  return (entry >> FIRST) & 1 == 1


def is_last(entry):
  """Whether an entry is the last of its row."""
  return (entry >> LAST) & 1 == 1


def kind_of(entry):
  """EMPTY, PARTIAL or FULL."""
  return (entry >> KIND) & 3
