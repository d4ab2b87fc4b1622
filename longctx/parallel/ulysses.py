"""Ulysses attention: the whole sequence for some heads, by all_to_all.

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

from longctx.ops.dot_product_attention import AttentionArgs
from longctx.ops.dot_product_attention.args import OutLse
from longctx.typing import Array, Float


def attend(
  q: Float[Array, 'B L N H'],
  k: Float[Array, 'B L K H'],
  v: Float[Array, 'B L K V'],
  args: AttentionArgs,
  inner: Callable[[Array, Array, Array, AttentionArgs], OutLse],
  *,
  axis: str,
  size: int,
) -> OutLse:
  """Runs `inner` on all the tokens of `axis` and 1 / size of the heads.

  Args:
    q: this device's queries.
    k: its keys.
    v: its values.
    args: of this device's tokens and heads.
    inner: attention, which gets those of all the tokens and fewer heads.
    axis: the mesh axis to trade.
    size: devices U on that axis.

  Returns:
    (out, lse) of this device's tokens and all heads.
  """
  N, K = q.shape[2], k.shape[2]
  repeats = math.lcm(K, size) // K
  first_head = lax.axis_index(axis) * (N // size)

  def split_heads(x):
    return lax.all_to_all(x, axis, split_axis=2, concat_axis=1, tiled=True)

  def join_heads(x):
    return lax.all_to_all(x, axis, split_axis=1, concat_axis=2, tiled=True)

  def own_heads(x):
    return lax.dynamic_slice(x, (first_head,), (N // size,))

  def join_tokens(x):
    return lax.all_gather(x, axis, axis=1, tiled=True)

  dropout = args.dropout
  if dropout is not None:
    dropout = dropout._replace(first_head=dropout.first_head + first_head)
  args = args._replace(
    indices=jax.tree.map(join_tokens, args.indices),
    sink_logits=jax.tree.map(own_heads, args.sink_logits),
    alibi_slopes=jax.tree.map(own_heads, args.alibi_slopes),
    dropout=dropout,
  )
  out, lse = inner(
    split_heads(q),
    split_heads(jnp.repeat(k, repeats, axis=2)),
    split_heads(jnp.repeat(v, repeats, axis=2)),
    args,
  )
  return join_heads(out), join_heads(lse)
