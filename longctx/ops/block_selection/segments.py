"""Segments of packed rows and their blocks, in any order of the tokens.

Keys are sorted by segment and position. What a query may read under a causal
mask within its segment is then a range of places, `first` to `last`, and its
blocks begin at first, first + C, first + 2 C, …: those of the segment alone,
so that packed segments have the blocks that they have on their own.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from longctx.ops.block_selection.arguments import SelectionArgs
from longctx.typing import Array, Int, Num, Shaped


class Segments(NamedTuple):
  """Segments of a batch, by places: keys of a row counted in sorted order.

  Attributes:
    order: the key that stands at each place; None where all stand there.
    begin: place at which the segment of each place begins; None: 0.
    end: the place after its last one; None: S.
    first: where the segment of each query begins.
    last: the last key that a query may read; `first` - 1 where there is none.
  """

  order: Int[Array, 'B S'] | None
  begin: Int[Array, 'B S'] | None
  end: Int[Array, 'B S'] | None
  first: Int[Array, 'B T']
  last: Int[Array, 'B T']

  def sort(self, x: Shaped[Array, 'b S ...']) -> Shaped[Array, '_ S ...']:
    """Brings keys, or what belongs to them, in order."""
    if self.order is None:
      return x
    B = self.order.shape[0]
    x = jnp.broadcast_to(x, (B, *x.shape[1:]))
    return x[jnp.arange(B)[:, None], self.order]


def locate_segments(B: int, T: int, S: int, args: SelectionArgs) -> Segments:
  """The segments of B rows of T queries and S keys.

  Time O((S + T) log(S + T)), nothing for keys at their natural positions in one
  segment.
  """
  q_positions, k_positions, q_segment_ids, k_segment_ids, *_ = args
  q_positions = _rows(q_positions, B, T)
  if k_positions is None and k_segment_ids is None:
    last = jnp.clip(q_positions, -1, S - 1)
    return Segments(None, None, None, jnp.zeros_like(last), last)
  k_positions = _rows(k_positions, B, S)
  packed = k_segment_ids is not None
  if not packed:
    q_segment_ids = jnp.zeros((B, T), jnp.int32)
    k_segment_ids = jnp.zeros((B, S), jnp.int32)
  place = _places(
    jnp.concatenate([k_segment_ids, q_segment_ids], axis=1),
    jnp.concatenate([k_positions, q_positions], axis=1),
    S,
  )
  place, last = place[:, :S], place[:, S:]
  order = _inverse(place)
  if not packed:
    return Segments(order, None, None, jnp.zeros_like(last), last)
  ids = k_segment_ids[jnp.arange(B)[:, None], order]
  place, ones = _rows(None, B, S), jnp.ones((B, 1), bool)
  changes = ids[:, 1:] != ids[:, :-1]
  begins = jnp.concatenate([ones, changes], axis=1)
  ends = jnp.concatenate([changes, ones], axis=1)
  begin = lax.cummax(jnp.where(begins, place, 0), axis=1)
  end = lax.cummin(jnp.where(ends, place + 1, S), axis=1, reverse=True)
  at_last = (jnp.arange(B)[:, None], jnp.maximum(last, 0))
  some = (last >= 0) & (ids[at_last] == q_segment_ids)
  first = jnp.where(some, begin[at_last], last + 1)
  return Segments(order, begin, end, first, last)


def complete_blocks(
  segments: Segments, S: int, *, length: int, stride: int
) -> Int[Array, 'B C']:
  """Places at which complete blocks begin, ascending; S stands for none.

  A segment's blocks begin at every `stride`-th of its tokens; complete are
  those of `length` tokens, however many of these a query may read.
  """
  count = max(0, (S - length) // stride + 1)
  if segments.begin is None:
    B = segments.first.shape[0]
    return jnp.broadcast_to(jnp.arange(count) * stride, (B, count))
  B, place = segments.begin.shape[0], _rows(None, *segments.begin.shape)
  begins = (place - segments.begin) % stride == 0
  begins &= place + length <= segments.end
  index = jnp.where(begins, jnp.cumsum(begins, axis=1) - 1, count)
  found = jnp.full((B, count), S, jnp.int32)
  return found.at[jnp.arange(B)[:, None], index].set(place, mode='drop')


def take_blocks(
  x: Num[Array, 'B S ...'], begin: Int[Array, 'B C'], length: int
) -> Num[Array, 'B C L ...']:
  """The `length` keys from each place on; any numbers where it is S."""
  places = begin[..., None] + jnp.arange(length)
  return x.at[jnp.arange(x.shape[0])[:, None, None], places].get(mode='clip')


def _rows(x: Array | None, B: int, length: int) -> Int[Array, 'B length']:
  x = jnp.arange(length)[None] if x is None else x
  return jnp.broadcast_to(x.astype(jnp.int32), (B, length))


def _places(
  segment_ids: Int[Array, 'B L'], positions: Int[Array, 'B L'], S: int
) -> Int[Array, 'B L']:
  """The place of each key, and of the last key that a query may read.

  Keys come first, then queries. In the order of segments and positions, a key
  before the query that equals it, both follow from how many keys there are so
  far; for a query without a key to read, it is one of another segment.
  """
  index = _rows(None, *positions.shape)
  index = lax.sort((segment_ids, positions, index), num_keys=3, dimension=1)[2]
  count = jnp.cumsum(index < S, axis=1, dtype=jnp.int32)
  rows = jnp.arange(len(index))[:, None]
  return jnp.zeros_like(index).at[rows, index].set(count - 1)


def _inverse(place: Int[Array, 'B S']) -> Int[Array, 'B S']:
  rows = jnp.arange(len(place))[:, None]
  index = _rows(None, *place.shape)
  return jnp.zeros_like(place).at[rows, place].set(index)
