"""Reordering of a sharded sequence: natural order to a layout's, and back.

Every span goes to its place by one message. These permutations are not left to
the compiler, whose partitioner loses the reversal of an array that is the same
in all rows where a mesh splits both rows and sequence.

All functions but `pad` run inside of `shard_map`, on one device's arrays.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from longctx.parallel.layout import SequenceLayout
from longctx.typing import Array, Shaped

Axis = str | tuple[str, ...]


def pad(
  x: Shaped[Array, 'B T ...'], layout: SequenceLayout, fill: Any = 0
) -> Shaped[Array, 'B _ ...']:
  """The whole sequence in natural order, as long as equal shards need it."""
  missing = _natural_len(layout) * layout.num_shards - x.shape[1]
  if not missing:
    return x
  widths = [(0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)]
  return jnp.pad(x, widths, constant_values=fill)


def into_layout(tree: Any, layout: SequenceLayout, axis: Axis) -> Any:
  """This device's tokens [B, L, ...] in a layout, from natural order.

  Args:
    tree: arrays of a contiguous shard of what `pad` gives.
    layout: to bring them to.
    axis: the mesh axes of the sequence.
  """
  if layout.is_natural:
    return tree
  R = layout.num_shards
  even, odd = _routes(layout)

  def zigzag(x):
    x = _halves(x)
    parts = lax.ppermute(x[0], axis, even), lax.ppermute(x[1], axis, odd)
    # The first span of a shard has the shard's own number.
    return jnp.concatenate(_swapped_if_odd(parts, axis), axis=1)

  def striped(x):
    x = x.reshape(x.shape[0], -1, R, *x.shape[2:])
    x = lax.all_to_all(x, axis, split_axis=2, concat_axis=1, tiled=True)
    return x[:, : layout.shard_len, 0]

  return jax.tree.map(striped if layout.name == 'striped' else zigzag, tree)


def into_natural(tree: Any, layout: SequenceLayout, axis: Axis) -> Any:
  """The inverse of `into_layout`: a contiguous shard, padding included."""
  if layout.is_natural:
    return tree
  even, odd = ([(b, a) for a, b in route] for route in _routes(layout))

  def zigzag(x):
    parts = _swapped_if_odd(_halves(x), axis)
    parts = [
      lax.ppermute(part, axis, route)
      for part, route in zip(parts, (even, odd), strict=True)
    ]
    return jnp.concatenate(parts, axis=1)

  def striped(x):
    widths = [(0, 0), (0, _natural_len(layout) - x.shape[1])]
    x = jnp.pad(x, widths + [(0, 0)] * (x.ndim - 2))[:, :, None]
    x = lax.all_to_all(x, axis, split_axis=1, concat_axis=2, tiled=True)
    return x.reshape(x.shape[0], -1, *x.shape[3:])

  return jax.tree.map(striped if layout.name == 'striped' else zigzag, tree)


def _natural_len(layout: SequenceLayout) -> int:
  """Tokens of a shard in natural order: so many for each of all, if striped."""
  R, L = layout.num_shards, layout.shard_len
  return -(-L // R) * R if layout.name == 'striped' else L


def _routes(layout: SequenceLayout) -> list[list[tuple[int, int]]]:
  """(from, to) of the first span of every shard, and of the second.

  Span c is on shard c, or 2R - 1 - c beyond the middle: even spans on even
  shards and odd ones on odd shards before it, the other way round behind it.
  """
  R = layout.num_shards
  return [
    [(r, min(2 * r + i, 2 * R - 1 - 2 * r - i)) for r in range(R)]
    for i in range(2)
  ]


def _halves(x: Array) -> tuple[Array, Array]:
  return x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]


def _swapped_if_odd(parts: tuple[Array, Array], axis: Axis) -> list[Array]:
  odd = lax.axis_index(axis) % 2 == 1
  a, b = parts
  return [jnp.where(odd, b, a), jnp.where(odd, a, b)]
