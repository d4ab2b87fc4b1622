"""Work list of block-sparse attention: the blocks to visit, no empty one.

A list says, for every block row, which blocks to visit: first those whose pairs
are all allowed, which need no element mask, then those with some. The backward
pass reads the same blocks by column.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from longctx import masks
from longctx.ops.dot_product_attention.args import TokenIndices
from longctx.ops.dot_product_attention.tiling import Tiling
from longctx.typing import Array, Bool, Int, Num


class WorkList(NamedTuple):
  """Work list by rows: r of group g visits indices[g, start:stop].

  Blocks before `full` are full, and those from there on partial.

  Groups are groups of batch rows; one group serves all where nothing depends on
  the batch row.
  """

  start: Num[Array, 'g n'] | np.ndarray
  full: Num[Array, 'g n'] | np.ndarray
  stop: Num[Array, 'g n'] | np.ndarray
  indices: Num[Array, 'g w'] | np.ndarray


def make_work_list(
  mask: masks.Mask, tiling: Tiling, indices: TokenIndices, *, by_column: bool
) -> WorkList:
  """The list from the mask alone, or from positions and segments at run time.

  With default positions and no segments the list is made on the host. Else it
  is computed from the smallest and largest position and segment of each block,
  O(nq nk) numbers: exact for sorted segments and as exact as
  `mask.bounds`, else a block that is empty may be visited, where its element
  mask drops every pair.
  """
  if all(x is None for x in indices):
    return _static_work_list(mask, tiling, by_column)
  kinds = block_kinds(mask, tiling, indices)
  if by_column:
    kinds = kinds.swapaxes(1, 2)
  g, n, width = kinds.shape
  order = jnp.argsort(-kinds, axis=-1, stable=True)
  start = jnp.broadcast_to(jnp.arange(n) * width, (g, n))
  full = start + (kinds == masks.FULL).sum(-1)
  stop = start + (kinds != masks.EMPTY).sum(-1)
  return WorkList(start, full, stop, order.reshape(g, n * width))


@functools.lru_cache(maxsize=64)
def _static_work_list(
  mask: masks.Mask, tiling: Tiling, by_column: bool
) -> WorkList:
  kinds = block_kinds(mask, tiling, TokenIndices())
  if by_column:
    kinds = kinds.T
  # Full before partial, in ascending order within each.
  parts = [
    np.concatenate(
      [np.flatnonzero(row == masks.FULL), np.flatnonzero(row == masks.PARTIAL)]
    )
    for row in kinds
  ]
  stop = np.cumsum([len(part) for part in parts], dtype=np.int32)
  start = np.concatenate([[0], stop[:-1]]).astype(np.int32)
  full = start + (kinds == masks.FULL).sum(1, dtype=np.int32)
  # One entry at least, so that the array can be indexed.
  indices = np.concatenate([*parts, [0]]).astype(np.int32)
  return WorkList(start[None], full[None], stop[None], indices[None])


def _static_kinds(mask: masks.Mask, tiling: Tiling) -> Int[np.ndarray, 'nq nk']:
  t = tiling
  kinds = mask.block_map(t.T, t.S, t.block_q, t.block_k)
  if t.S % t.block_k:
    # Padded keys are for the element mask to drop.
    kinds[:, -1] = np.minimum(kinds[:, -1], masks.PARTIAL)
  return kinds


def block_kinds(
  mask: masks.Mask, tiling: Tiling, indices: TokenIndices
) -> Int[np.ndarray, 'nq nk'] | Int[Array, 'g nq nk']:
  """What each block holds: EMPTY, PARTIAL or FULL, see `make_work_list`.

  On the host for default positions without segments, else at run time and per
  group of batch rows.
  """
  t = tiling
  if all(x is None for x in indices):
    return _static_kinds(mask, t)
  if indices.q_positions is None and indices.k_positions is None:
    kinds = jnp.asarray(_static_kinds(mask, t))[None]
    possible, certain = kinds > masks.EMPTY, kinds == masks.FULL
  else:
    q_positions, k_positions = indices.q_positions, indices.k_positions
    if q_positions is None:
      q_positions = jnp.arange(t.T)[None]
    if k_positions is None:
      k_positions = jnp.arange(t.S)[None]
    possible, certain = mask.bounds(*_ranges(t, q_positions, k_positions))
  if indices.q_segment_ids is not None:
    q, k = _ranges(t, indices.q_segment_ids, indices.k_segment_ids)
    possible &= (q.low <= k.high) & (k.low <= q.high)
    certain &= (q.low == k.high) & (k.low == q.high)
  if t.S % t.block_k:
    certain = certain.at[..., -1].set(False)
  possible = _over_rows(possible, t).any(1)
  certain = _over_rows(certain, t).all(1)
  return jnp.where(possible & certain, masks.FULL, possible.astype(jnp.int32))


def _over_rows(
  x: Bool[Array, 'b nq nk'], tiling: Tiling
) -> Bool[Array, 'g rows nq nk']:
  rows = 1 if x.shape[0] == 1 else tiling.rows
  return x.reshape(x.shape[0] // rows, rows, tiling.nq, tiling.nk)


def _ranges(
  tiling: Tiling, q: Int[Array, 'bq T'], k: Int[Array, 'bk S']
) -> tuple[masks.Range, masks.Range]:
  """Those of the blocks of queries [b, nq, 1] and of keys [b, 1, nk]."""

  def blocks(x, block):
    missing = -x.shape[1] % block
    x = jnp.pad(x, ((0, 0), (0, missing)), mode='edge')
    return x.reshape(x.shape[0], -1, block)

  q, k = blocks(q, tiling.block_q), blocks(k, tiling.block_k)
  return (
    masks.Range(q.min(-1)[:, :, None], q.max(-1)[:, :, None]),
    masks.Range(k.min(-1)[:, None], k.max(-1)[:, None]),
  )
