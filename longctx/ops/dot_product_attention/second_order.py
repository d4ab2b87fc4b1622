"""Second derivatives of the XLA backend: passes that JAX can differentiate.

The loops of `xla` run as often as a work list says, and JAX transposes only
loops whose length it knows. Here one scan visits all the blocks on the list, or
every block where positions or segments are given. With the maximum or lse
known, no sum needs a running maximum: blocks just add up, and each is computed
again when its derivative is taken. Memory O(T).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from longctx.ops.dot_product_attention.args import AttentionArgs
from longctx.ops.dot_product_attention.xla_blocks import (
  ScoreBlocks,
  split_lse,
  tiling_of,
  vary_like,
)
from longctx.typing import Array, Float


def accumulate(
  args: AttentionArgs,
  old_max: Float[Array, 'blocks X R'],
  row_max: Float[Array, 'blocks X R'],
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K V'],
  values: Float[Array, 'blocks X R V'],
  row_sum: Float[Array, 'blocks X R'],
) -> tuple[Float[Array, 'blocks X R V'], Float[Array, 'blocks X R']]:
  """The values and row_sum that a pass makes of these, given its row_max."""
  t, dtype = tiling_of(q, k, args, backward=False), row_sum.dtype
  blocks = ScoreBlocks(args, t, by_column=False)
  q_blocks, k_blocks, v_blocks = t.split_q(q), t.split_k(k), t.split_k(v)

  def share(g, i, j):
    q_i = q_blocks[g, i].astype(dtype) * args.static.scale
    k_j, v_j = (x[g, j].astype(dtype) for x in (k_blocks, v_blocks))
    z = jnp.einsum('XRH,XSH->XRS', q_i, k_j)
    z, _ = blocks.logits(z, g, i, j, masked=True)
    terms = args.static.normalizer.terms(z, row_max[g * t.nq + i][..., None])
    weight = blocks.dropped(terms.weight, g, i, j)
    out = jnp.einsum('XRS,XSV->XRV', weight, v_j)
    return (out, terms.term.sum(-1)), ()

  (more, more_sum), _ = _sum_over_blocks(blocks, share, q, k, v)
  decay = jnp.exp(old_max - row_max)
  return values * decay[..., None] + more, row_sum * decay + more_sum


def gradients(
  args: AttentionArgs,
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K V'],
  lse: Float[Array, 'B T N'],
  dout: Float[Array, 'B T N V'],
  delta: Float[Array, 'B T N'],
) -> tuple[
  Float[Array, 'blocks X H R'], Float[Array, 'B S K H'], Float[Array, 'B S K V']
]:
  """(dq, dk, dv), the first by block and without its scale."""
  t, dtype = tiling_of(q, k, args, backward=True), lse.dtype
  blocks = ScoreBlocks(args, t, by_column=True)
  lse = split_lse(t, lse)
  delta = t.split_q(delta[..., None])[..., 0]
  q_blocks, do_blocks = t.split_q(q), t.split_q(dout)
  k_blocks, v_blocks = t.split_k(k), t.split_k(v)

  def share(g, i, j):
    q_i = q_blocks[g, i].astype(dtype) * args.static.scale
    do_i = do_blocks[g, i].astype(dtype)
    k_j, v_j = (x[g, j].astype(dtype) for x in (k_blocks, v_blocks))
    queries = (q_i, do_i, lse[g, i], delta[g, i])
    keys = (k_j, v_j, k_j.swapaxes(1, 2))
    dq, dk, dv = blocks.gradients(g, i, j, queries, keys, masked=True)
    return (dq,), (dk, dv)

  (dq,), (dk, dv) = _sum_over_blocks(blocks, share, q, k, v, dout)
  return dq, t.join_k(dk), t.join_k(dv)


def _sum_over_blocks(
  blocks: ScoreBlocks, share: Callable[..., tuple[Any, Any]], *arrays: Array
) -> tuple[Any, Any]:
  """The sums of share(g, i, j) = (per query, per key), by block of either.

  They vary over the mesh axes that one of the arrays varies over.
  """
  t = blocks.tiling
  # Inside of a scan nothing is there to be merged with what is computed again.
  share = jax.checkpoint(share, prevent_cse=False)
  shapes = jax.eval_shape(share, *(jnp.zeros((), jnp.int32),) * 3)
  counts = (t.groups * t.nq, t.groups * t.nk)

  def zeros(n, x):
    return jnp.zeros((n, *x.shape), x.dtype)

  def add(n, total, x):
    return total.at[n].add(x)

  def step(totals, triple):
    g, i, j = triple
    shares = share(g, i, j)
    places = (g * t.nq + i, g * t.nk + j)
    totals = tuple(
      jax.tree.map(functools.partial(add, n), total, x)
      for n, total, x in zip(places, totals, shares, strict=True)
    )
    return totals, None

  totals = tuple(
    jax.tree.map(functools.partial(zeros, n), x)
    for n, x in zip(counts, shapes, strict=True)
  )
  totals = vary_like(totals, *arrays)
  return lax.scan(step, totals, blocks.triples())[0]
