"""Packed segments of a row: counting and summing within each."""

import jax
import jax.numpy as jnp
from jax import lax

from longctx.typing import Array, Float, Int


def count_keys(
  positions: Int[Array, '*B T'], segment_ids: Int[Array, 'B T'] | None
) -> Int[Array, '...']:
  """How many keys each token may read under a causal mask, itself included.

  Args:
    positions: of the tokens, 0, 1, …, T - 1 in any order.
    segment_ids: documents, each of which is counted alone, so that positions
      may go through the row or start anew in each.

  Returns:
    int [T] or [B, T].
  """
  if segment_ids is None:
    return positions + 1

  def ranks(positions, segment_ids):
    order, begins = _sorted(positions, segment_ids)
    places = jnp.arange(len(order))
    first = lax.cummax(jnp.where(begins, places, 0))
    return jnp.zeros_like(places).at[order].set(places - first + 1)

  positions = jnp.broadcast_to(positions, segment_ids.shape)
  return jax.vmap(ranks)(positions, segment_ids)


def cumulative_sum(
  x: Float[Array, 'B T N'],
  positions: Int[Array, '*B T'],
  segment_ids: Int[Array, 'B T'] | None,
) -> Float[Array, 'B T N']:
  """Sums of x over the tokens of a document up to each, itself included.

  Args:
    x: in any order of the tokens.
    positions: of the tokens.
    segment_ids: documents, each of which is summed alone.
  """
  if segment_ids is None:
    segment_ids = jnp.zeros(x.shape[:2], jnp.int32)

  def join(a, b):
    # Not a difference of two sums, which would cancel at a row's end.
    return jnp.where(b[1], b[0], a[0] + b[0]), a[1] | b[1]

  def sums(x, positions, segment_ids):
    order, begins = _sorted(positions, segment_ids)
    x = x[order]
    begins = jnp.broadcast_to(begins[:, None], x.shape)
    total, _ = lax.associative_scan(join, (x, begins))
    return jnp.zeros_like(x).at[order].set(total)

  positions = jnp.broadcast_to(positions, segment_ids.shape)
  return jax.vmap(sums)(x, positions, segment_ids)


def _sorted(positions: Int[Array, ' T'], segment_ids: Int[Array, ' T']):
  """The tokens by document and position, and where a document begins."""
  order = jnp.lexsort((positions, segment_ids))
  ids = segment_ids[order]
  return order, jnp.append(True, ids[1:] != ids[:-1])
