"""Flash attention in plain XLA: blocks of scores, on any backend.

Forward, for a block of queries, over the blocks of keys that it may read
(Rabe and Staats, arXiv:2112.05682; Dao et al., arXiv:2205.14135):

    m' = max(m, rowmax z)    p = exp(z - m')    l' = exp(m - m') l + rowsum p
    acc' = exp(m - m') acc + p v               out = acc / l,  lse = m + log l

Backward, for a block of keys, over the blocks of queries that read it, with
delta = rowsum(dout * out) - dlse:

    p = exp(z - lse)   dv += pᵀ dout   dz = p (dout vᵀ - delta)
    dk += dzᵀ q        dq += dz k

That is the softmax; `normalizers` has the others. Only q, k, v, out and lse are
kept between the passes, O(T) memory. The backward pass holds its scores
transposed, keys by queries, so that all five products read and write rows as
they lie in memory.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from longctx.masks import Mask
from longctx.ops.dot_product_attention import second_order
from longctx.ops.dot_product_attention.dropout import Dropout
from longctx.ops.dot_product_attention.normalizers import Normalizer
from longctx.ops.dot_product_attention.tiling import BlockSizes, make_tiling
from longctx.ops.dot_product_attention.work_list import Indices
from longctx.ops.dot_product_attention.xla_blocks import (
  Extras,
  Spec,
  Work,
  vary_like,
)
from longctx.ops.remat import keep
from longctx.typing import Array, Float, Int


def dot_product_attention(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K V'],
  *,
  mask: Mask,
  q_positions: Int[Array, 'Bq T'] | None,
  k_positions: Int[Array, 'Bk S'] | None,
  q_segment_ids: Int[Array, 'B T'] | None,
  k_segment_ids: Int[Array, 'B S'] | None,
  scale: float,
  logits_soft_cap: float | None,
  sink_logits: Float[Array, ' N'] | None,
  alibi_slopes: Float[Array, ' N'] | None,
  normalizer: Normalizer,
  dropout: Dropout | None,
  block_sizes: BlockSizes | None,
) -> tuple[Float[Array, 'B T N V'], Float[Array, 'B T N']]:
  """Blockwise attention; arguments as in the reference, memory O(T).

  Time is proportional to the blocks that hold an allowed pair.

  Returns:
    out in the dtype of q, lse in float32 (float64 for float64 inputs).
  """
  spec = make_spec(
    q,
    k,
    mask=mask,
    scale=scale,
    logits_soft_cap=logits_soft_cap,
    normalizer=normalizer,
    block_sizes=block_sizes,
  )
  indices = Indices(q_positions, k_positions, q_segment_ids, k_segment_ids)
  out, lse = _attend(spec, q, k, v, Extras(indices, alibi_slopes, dropout))
  if sink_logits is not None:
    out, lse = add_sink(out, lse, sink_logits)
  return out, lse


def make_spec(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  *,
  mask: Mask,
  scale: float,
  logits_soft_cap: float | None,
  normalizer: Normalizer,
  block_sizes: BlockSizes | None,
) -> Spec:
  """The tilings for arrays of these shapes, and what else is static.

  Args:
    q: queries, of which the shape is read.
    k: keys, likewise.
    mask: as in `dot_product_attention`, like the next ones.
    scale: of the logits.
    logits_soft_cap: cap on the logits.
    normalizer: of the logits.
    block_sizes: None for heuristics.
  """
  B, T, N, _ = q.shape
  S, K = k.shape[1:3]
  sizes = block_sizes or BlockSizes()
  forward, backward = (
    make_tiling(mask, (B, T, S, K, N // K), sizes, backward=backward)
    for backward in (False, True)
  )
  return Spec(mask, scale, logits_soft_cap, normalizer, forward, backward)


def add_sink(
  out: Float[Array, 'B T N V'],
  lse: Float[Array, 'B T N'],
  sink_logits: Float[Array, ' N'],
) -> tuple[Float[Array, 'B T N V'], Float[Array, 'B T N']]:
  """Lets a logit per head take its share of the probability.

  It joins after the fact, so its gradient comes from that of lse, and a ring
  counts it once.
  """
  total = jnp.logaddexp(lse, sink_logits.astype(lse.dtype))
  return (out * jnp.exp(lse - total)[..., None]).astype(out.dtype), total


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(spec: Spec, q, k, v, extras: Extras):
  return _attend_fwd(spec, q, k, v, extras)[0]


def _attend_fwd(spec: Spec, q, k, v, extras: Extras):
  out, lse = forward(spec, q, k, v, extras)
  out, lse = keep(out.astype(q.dtype), lse)
  return (out, lse), (q, k, v, extras, out, lse)


def _attend_bwd(spec: Spec, residuals, cotangents):
  q, k, v, extras, out, lse = residuals
  dout, dlse = cotangents
  delta = make_delta(out, dout, dlse)
  grads = backward(spec, q, k, v, extras, lse, dout, delta)
  grads = (g.astype(x.dtype) for g, x in zip(grads, (q, k, v), strict=True))
  return *grads, None


_attend.defvjp(_attend_fwd, _attend_bwd)


class Sums(NamedTuple):
  """What queries have found in the keys that they have seen, by block.

  Attributes:
    values: the values, weighted relative to the peak.
    peak: the largest logit, where the normalizer needs one.
    total: the sum of what a weight is divided by, relative to the peak.
  """

  values: Float[Array, 'blocks X R V']
  peak: Float[Array, 'blocks X R']
  total: Float[Array, 'blocks X R']


def forward(
  spec: Spec,
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K V'],
  extras: Extras,
) -> tuple[Float[Array, 'B T N V'], Float[Array, 'B T N']]:
  """(out, lse) over the keys given, both in the dtype of the sums.

  Parts over disjoint sets of keys are put together by `ops.merge`, or go on
  from each other's `Sums`.
  """
  t = spec.forward
  dtype = jnp.promote_types(q.dtype, jnp.float32)
  shape = (t.groups * t.nq, t.X, t.G * t.block_q)
  sums = Sums(
    jnp.zeros((*shape, v.shape[-1]), dtype),
    jnp.full(shape, spec.normalizer.least_peak or 0, dtype),
    jnp.zeros(shape, dtype),
  )
  return finish(spec, add(spec, q, k, v, extras, vary_like(sums, q, k, v)))


def resume(
  spec: Spec, out: Float[Array, 'B T N V'], lse: Float[Array, 'B T N']
) -> Sums:
  """The sums that `finish` makes these of, to go on from."""
  t, least = spec.forward, spec.normalizer.least_peak
  peak = jnp.zeros_like(lse) if least is None else jnp.maximum(lse, least)
  # Any peak will do, so it has no derivative; lse has it by the total.
  peak = lax.stop_gradient(peak)
  total = jnp.exp(lse - peak)
  shape = (t.groups * t.nq, t.X, t.G * t.block_q)
  values, peak, total = (
    t.split_q(x).reshape(*shape, -1)
    for x in (out * total[..., None], peak[..., None], total[..., None])
  )
  return Sums(values, peak[..., 0], total[..., 0])


def finish(
  spec: Spec, sums: Sums
) -> tuple[Float[Array, 'B T N V'], Float[Array, 'B T N']]:
  """(out, lse) of all the keys that were seen."""
  some = sums.total > 0
  total = jnp.where(some, sums.total, 1)
  lse = jnp.where(some, sums.peak + jnp.log(total), -jnp.inf)
  join = spec.forward.join_q
  return join(sums.values / total[..., None]), join(lse[..., None])[..., 0]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def add(
  spec: Spec,
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K V'],
  extras: Extras,
  sums: Sums,
) -> Sums:
  """The sums over these keys too."""
  t = spec.forward
  dtype = sums.total.dtype
  q_blocks, k_blocks, v_blocks = t.split_q(q), t.split_k(k), t.split_k(v)
  work = Work(spec, t, extras, by_column=False)
  normalizer = spec.normalizer

  def row(place):
    n, sums = place
    g, i = n // t.nq, n % t.nq
    q_i = q_blocks[g, i].astype(dtype) * spec.scale

    def step(j, sums, *, masked):
      values, peak, total = sums
      k_j, v_j = (x[g, j].astype(dtype) for x in (k_blocks, v_blocks))
      z = jnp.einsum('XRH,XSH->XRS', q_i, k_j)
      z, _ = work.logits(z, g, i, j, masked=masked)
      if normalizer.least_peak is not None:
        new_peak = jnp.maximum(peak, z.max(-1))
        decay = jnp.exp(peak - new_peak)
        values, peak, total = values * decay[..., None], new_peak, total * decay
      weight, term = _weight_and_term(normalizer.terms(z, peak[..., None]))
      total += term.sum(-1)
      weight = work.dropped(weight, g, i, j)
      values += jnp.einsum('XRS,XSV->XRV', weight, v_j)
      return Sums(values, peak, total)

    return work.visit(g, i, step, sums)

  return lax.map(row, (jnp.arange(t.groups * t.nq), sums))


@add.defjvp
def _add_jvp(spec: Spec, primals, tangents):
  q, k, v, extras, sums = primals
  found = add(spec, *primals)
  again = functools.partial(
    second_order.add, spec, extras, sums.peak, found.peak
  )
  # Whatever the peak, what comes of the sums is the same.
  parts = (q, k, v, sums.values, sums.total)
  tangents = (*tangents[:3], tangents[4].values, tangents[4].total)
  _, (values, total) = jax.jvp(again, parts, tangents)
  return found, Sums(values, jnp.zeros_like(found.peak), total)


def _weight_and_term(terms):
  """Both as they are, but computed once.

  Else XLA computes the exponential twice, for the sum and the product.
  """
  if terms.weight is terms.term:
    p = lax.optimization_barrier(terms.weight)
    return p, p
  return lax.optimization_barrier((terms.weight, terms.term))


def make_delta(
  out: Float[Array, 'B T N V'],
  dout: Float[Array, 'B T N V'],
  dlse: Float[Array, 'B T N'],
) -> Float[Array, 'B T N']:
  """rowsum(dout * out) - dlse, which is all that `backward` needs of them."""
  delta = jnp.einsum(
    'BTNV,BTNV->BTN', dout, out, preferred_element_type=dlse.dtype
  )
  return delta - dlse


def backward(
  spec: Spec,
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K V'],
  extras: Extras,
  lse: Float[Array, 'B T N'],
  dout: Float[Array, 'B T N V'],
  delta: Float[Array, 'B T N'],
) -> tuple[
  Float[Array, 'B T N H'], Float[Array, 'B S K H'], Float[Array, 'B S K V']
]:
  """(dq, dk, dv) of the pairs of q and k, in the dtype of the sums.

  With lse and delta of all the keys, the keys given may be a part of them: then
  dq is that part's share, and dk and dv are whole.
  """
  dq = vary_like(no_queries(spec, q, lse.dtype), q, k, v, dout)
  dq, dk, dv = add_gradients(spec, q, k, v, extras, lse, dout, delta, dq)
  return join_queries(spec, dq), dk, dv


def no_queries(spec: Spec, q: Float[Array, 'B T N H'], dtype: Any) -> Array:
  """Zeros for `add_gradients` to go on from, [blocks, X, H, R]."""
  t = spec.backward
  shape = (t.groups * t.nq, t.X, q.shape[-1], t.G * t.block_q)
  return jnp.zeros(shape, dtype)


def join_queries(
  spec: Spec, dq: Float[Array, 'blocks X H R']
) -> Float[Array, 'B T N H']:
  """The gradient of the queries, of what `add_gradients` has summed."""
  return spec.backward.join_q(dq.swapaxes(2, 3) * spec.scale)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def add_gradients(
  spec: Spec,
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K V'],
  extras: Extras,
  lse: Float[Array, 'B T N'],
  dout: Float[Array, 'B T N V'],
  delta: Float[Array, 'B T N'],
  dq: Float[Array, 'blocks X H R'],
) -> tuple[
  Float[Array, 'blocks X H R'], Float[Array, 'B S K H'], Float[Array, 'B S K V']
]:
  """`backward`, its dq added to the one given, by block and transposed."""
  t = spec.backward
  dtype = lse.dtype
  delta = t.split_q(delta[..., None])[..., 0]
  # exp(z - inf) = 0: rows without keys and padded rows have no weights.
  lse = jnp.where(lse == -jnp.inf, jnp.inf, lse)
  lse = t.split_q(lse[..., None], fill=jnp.inf)[..., 0]
  q_blocks, do_blocks = t.split_q(q), t.split_q(dout)
  k_blocks, v_blocks = t.split_k(k), t.split_k(v)
  work = Work(spec, t, extras, by_column=True)
  H, V = q.shape[-1], v.shape[-1]

  def column(dq, n):
    g, j = n // t.nk, n % t.nk
    k_j, v_j = (x[g, j].astype(dtype) for x in (k_blocks, v_blocks))
    k_t = k_j.swapaxes(1, 2)

    def step(i, carry, *, masked):
      dq, dk, dv = carry
      q_i = q_blocks[g, i].astype(dtype) * spec.scale
      do_i = do_blocks[g, i].astype(dtype)
      shares = work.gradients(
        g,
        i,
        j,
        (q_i, do_i, lse[g, i], delta[g, i]),
        (k_j, v_j, k_t),
        masked=masked,
      )
      dq = dq.at[g * t.nq + i].add(shares[0])
      return dq, dk + shares[1], dv + shares[2]

    zeros = (
      jnp.zeros((t.X, t.block_k, H), dtype),
      jnp.zeros((t.X, t.block_k, V), dtype),
    )
    carry = (dq, *vary_like(zeros, q, k, v, dout))
    dq, dk, dv = work.visit(g, j, step, carry)
    return dq, (dk, dv)

  dq, (dk, dv) = lax.scan(column, dq, jnp.arange(t.groups * t.nk))
  return dq, t.join_k(dk), t.join_k(dv)


@add_gradients.defjvp
def _add_gradients_jvp(spec: Spec, primals, tangents):
  q, k, v, extras, *bars, _ = primals
  again = functools.partial(second_order.gradients, spec, extras)
  *tangents, dq = *tangents[:3], *tangents[4:]
  _, (share, dk, dv) = jax.jvp(again, (q, k, v, *bars), tuple(tangents))
  return add_gradients(spec, *primals), (dq + share, dk, dv)
