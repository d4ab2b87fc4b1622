"""The forward and the backward pass in a form that JAX can differentiate.

The loops of `xla` run as often as a work list says, and JAX transposes
only loops whose length it knows. Here one scan visits all the blocks on the
list, or every block where positions or segments are given. With the peak or lse
known, no sum needs a running maximum: blocks just add up, and each is computed
again when its derivative is taken. Memory O(T).

For the derivatives of `xla.add` and `xla.add_gradients` alone.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from longctx.ops.dot_product_attention.xla_blocks import (
  Extras,
  Spec,
  Work,
  vary_like,
)
from longctx.typing import Array, Float


def add(
  spec: Spec,
  extras: Extras,
  old_peak: Float[Array, 'blocks X R'],
  peak: Float[Array, 'blocks X R'],
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K V'],
  values: Float[Array, 'blocks X R V'],
  total: Float[Array, 'blocks X R'],
) -> tuple[Float[Array, 'blocks X R V'], Float[Array, 'blocks X R']]:
  """`xla.add`: its values and total, given the peak that it found."""
  t, dtype = spec.forward, total.dtype
  work = Work(spec, t, extras, by_column=False)
  q_blocks, k_blocks, v_blocks = t.split_q(q), t.split_k(k), t.split_k(v)

  def share(g, i, j):
    q_i = q_blocks[g, i].astype(dtype) * spec.scale
    k_j, v_j = (x[g, j].astype(dtype) for x in (k_blocks, v_blocks))
    z = jnp.einsum('XRH,XSH->XRS', q_i, k_j)
    z, _ = work.logits(z, g, i, j, masked=True)
    terms = spec.normalizer.terms(z, peak[g * t.nq + i][..., None])
    weight = work.dropped(terms.weight, g, i, j)
    out = jnp.einsum('XRS,XSV->XRV', weight, v_j)
    return (out, terms.term.sum(-1)), ()

  (more, more_total), _ = _sum_over_blocks(work, share, q, k, v)
  decay = jnp.exp(old_peak - peak)
  return values * decay[..., None] + more, total * decay + more_total


def gradients(
  spec: Spec,
  extras: Extras,
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K V'],
  lse: Float[Array, 'B T N'],
  dout: Float[Array, 'B T N V'],
  delta: Float[Array, 'B T N'],
) -> tuple[
  Float[Array, 'blocks X H R'], Float[Array, 'B S K H'], Float[Array, 'B S K V']
]:
  """`xla.add_gradients` to nothing."""
  t, dtype = spec.backward, lse.dtype
  work = Work(spec, t, extras, by_column=True)
  lse = _split_lse(t, lse)
  delta = t.split_q(delta[..., None])[..., 0]
  q_blocks, do_blocks = t.split_q(q), t.split_q(dout)
  k_blocks, v_blocks = t.split_k(k), t.split_k(v)

  def share(g, i, j):
    q_i = q_blocks[g, i].astype(dtype) * spec.scale
    do_i = do_blocks[g, i].astype(dtype)
    k_j, v_j = (x[g, j].astype(dtype) for x in (k_blocks, v_blocks))
    queries = (q_i, do_i, lse[g, i], delta[g, i])
    keys = (k_j, v_j, k_j.swapaxes(1, 2))
    dq, dk, dv = work.gradients(g, i, j, queries, keys, masked=True)
    return (dq,), (dk, dv)

  (dq,), (dk, dv) = _sum_over_blocks(work, share, q, k, v, dout)
  return dq, t.join_k(dk), t.join_k(dv)


def _split_lse(tiling, lse):
  # exp(z - inf) = 0: rows without keys and padded rows have no weights.
  lse = jnp.where(lse == -jnp.inf, jnp.inf, lse)
  return tiling.split_q(lse[..., None], fill=jnp.inf)[..., 0]


def _sum_over_blocks(work: Work, share, *arrays):
  """The sums of share(g, i, j) = (per query, per key), by block of either.

  They vary over the mesh axes that one of the arrays varies over.
  """
  t = work.tiling
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
  return lax.scan(step, totals, work.triples())[0]
