"""Ulysses: all of the sequence for some heads, not all heads for a part of it.

An all_to_all turns [T / U, N] into [T, N / U] before attention and back after
it (DeepSpeed-Ulysses, arXiv:2309.14509). Every device sends about 1 / U of what
an all_gather of the keys would send it, but there have to be heads to split: U
divides N. Key heads are repeated as far as U asks for, lcm(K, U) / K times.

All functions here run inside of `shard_map`, on one device's arrays.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from longctx.ops.dot_product_attention import Dropout
from longctx.typing import Array, Float

Attend = Callable[..., tuple[Array, Array]]


def attend(
  q: Float[Array, 'B L N H'],
  k: Float[Array, 'B L K H'],
  v: Float[Array, 'B L K V'],
  inner: Attend,
  *,
  axis: str,
  size: int,
  indices: dict[str, Array | None],
  alibi_slopes: Float[Array, ' N'] | None,
  dropout: Dropout | None,
) -> tuple[Float[Array, 'B L N V'], Float[Array, 'B L N']]:
  """Runs `inner` on all the tokens of `axis` and 1 / size of the heads.

  Args:
    q: this device's queries.
    k: its keys.
    v: its values.
    inner: attention, called as inner(q, k, v, alibi_slopes=, dropout=,
      **indices), that returns (out, lse).
    axis: the mesh axis to trade.
    size: devices U on that axis.
    indices: integers [b, L] of this device's tokens by name, or None; `inner`
      gets those of all the tokens.
    alibi_slopes: of this device's heads.
    dropout: with this device's first head.

  Returns:
    (out, lse) of this device's tokens and all heads.
  """
  N, K = q.shape[2], k.shape[2]
  repeats = math.lcm(K, size) // K

  def split_heads(x):
    return lax.all_to_all(x, axis, split_axis=2, concat_axis=1, tiled=True)

  def join_heads(x):
    return lax.all_to_all(x, axis, split_axis=1, concat_axis=2, tiled=True)

  first_head = lax.axis_index(axis) * (N // size)
  if alibi_slopes is not None:
    alibi_slopes = lax.dynamic_slice(alibi_slopes, (first_head,), (N // size,))
  if dropout is not None:
    dropout = dropout._replace(first_head=dropout.first_head + first_head)
  indices = {
    name: None if x is None else lax.all_gather(x, axis, axis=1, tiled=True)
    for name, x in indices.items()
  }
  out, lse = inner(
    split_heads(q),
    split_heads(jnp.repeat(k, repeats, axis=2)),
    split_heads(jnp.repeat(v, repeats, axis=2)),
    alibi_slopes=alibi_slopes,
    dropout=dropout,
    **indices,
  )
  return jax.tree.map(join_heads, (out, lse))
