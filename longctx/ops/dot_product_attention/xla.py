"""Flash attention in plain XLA: blocks of scores, on any backend.

Forward, for a block of queries, over the blocks of keys that it may read
(Rabe and Staats, arXiv:2112.05682; Dao et al., arXiv:2205.14135):

    m' = max(m, rowmax z)    p = exp(z - m')    l' = exp(m - m') l + rowsum p
    acc' = exp(m - m') acc + p v               out = acc / l,  lse = m + log l

Backward, for a block of keys, over the blocks of queries that read it, with
delta as in `flash`:

    p = exp(z - lse)   dv += pᵀ dout   dz = p (dout vᵀ - delta)
    dk += dzᵀ q        dq += dz k

That is the softmax; `normalizers` has the others. The backward pass holds its
scores transposed, keys by queries, so that all five products read and write
rows as they lie in memory.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from longctx.ops.dot_product_attention import second_order
from longctx.ops.dot_product_attention.args import (
  AttentionArgs,
  Gradients,
  OutLse,
)
from longctx.ops.dot_product_attention.flash import Backend
from longctx.ops.dot_product_attention.normalizers import Terms
from longctx.ops.dot_product_attention.xla_blocks import (
  ScoreBlocks,
  split_lse,
  tiling_of,
  vary_like,
)
from longctx.typing import Array, Float


class SoftmaxState(NamedTuple):
  """Running softmax of flash attention, by block of queries.

  Attributes:
    values: the values, weighted relative to the maximum.
    row_max: the largest logit, where the normalizer needs one.
    row_sum: of what a weight is divided by, relative to the maximum.
  """

  values: Float[Array, 'blocks X R V']
  row_max: Float[Array, 'blocks X R']
  row_sum: Float[Array, 'blocks X R']


@jax.custom_jvp
def _accumulate(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K V'],
  args: AttentionArgs,
  state: SoftmaxState,
) -> SoftmaxState:
  t = tiling_of(q, k, args, backward=False)
  dtype = state.row_sum.dtype
  q_blocks, k_blocks, v_blocks = t.split_q(q), t.split_k(k), t.split_k(v)
  blocks = ScoreBlocks(args, t, by_column=False)
  scale, normalizer = args.static.scale, args.static.normalizer

  def row(place):
    n, state = place
    g, i = n // t.nq, n % t.nq
    q_i = q_blocks[g, i].astype(dtype) * scale

    def step(j, state, *, masked):
      values, row_max, row_sum = state
      k_j, v_j = (x[g, j].astype(dtype) for x in (k_blocks, v_blocks))
      z = jnp.einsum('XRH,XSH->XRS', q_i, k_j)
      z, _ = blocks.logits(z, g, i, j, masked=masked)
      if normalizer.least_row_max is not None:
        new_max = jnp.maximum(row_max, z.max(-1))
        decay = jnp.exp(row_max - new_max)
        values, row_sum = values * decay[..., None], row_sum * decay
        row_max = new_max
      weight, term = _weight_and_term(normalizer.terms(z, row_max[..., None]))
      row_sum += term.sum(-1)
      weight = blocks.dropped(weight, g, i, j)
      values += jnp.einsum('XRS,XSV->XRV', weight, v_j)
      return SoftmaxState(values, row_max, row_sum)

    return blocks.visit(g, i, step, state)

  return lax.map(row, (jnp.arange(t.groups * t.nq), state))


@_accumulate.defjvp
def _accumulate_jvp(primals, tangents):
  q, k, v, args, state = primals
  found = _accumulate(*primals)
  again = functools.partial(
    second_order.accumulate, args, state.row_max, found.row_max
  )
  # Whatever the maximum, what comes of the state is the same.
  parts = (q, k, v, state.values, state.row_sum)
  tangents = (*tangents[:3], tangents[4].values, tangents[4].row_sum)
  _, (values, row_sum) = jax.jvp(again, parts, tangents)
  return found, SoftmaxState(values, jnp.zeros_like(found.row_max), row_sum)


def _weight_and_term(
  terms: Terms,
) -> tuple[Float[Array, 'X R S'], Float[Array, 'X R S']]:
  """Both as they are, but computed once.

  Else XLA computes the exponential twice, for the sum and the product.
  """
  if terms.weight is terms.term:
    p = lax.optimization_barrier(terms.weight)
    return p, p
  return lax.optimization_barrier((terms.weight, terms.term))


@jax.custom_jvp
def _accumulate_gradients(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K V'],
  args: AttentionArgs,
  lse: Float[Array, 'B T N'],
  dout: Float[Array, 'B T N V'],
  delta: Float[Array, 'B T N'],
  dq: Float[Array, 'blocks X H R'],
) -> tuple[
  Float[Array, 'blocks X H R'], Float[Array, 'B S K H'], Float[Array, 'B S K V']
]:
  t = tiling_of(q, k, args, backward=True)
  dtype = lse.dtype
  delta = t.split_q(delta[..., None])[..., 0]
  lse = split_lse(t, lse)
  q_blocks, do_blocks = t.split_q(q), t.split_q(dout)
  k_blocks, v_blocks = t.split_k(k), t.split_k(v)
  blocks = ScoreBlocks(args, t, by_column=True)
  H, V = q.shape[-1], v.shape[-1]

  def column(dq, n):
    g, j = n // t.nk, n % t.nk
    k_j, v_j = (x[g, j].astype(dtype) for x in (k_blocks, v_blocks))
    keys = (k_j, v_j, k_j.swapaxes(1, 2))

    def step(i, carry, *, masked):
      dq, dk, dv = carry
      q_i = q_blocks[g, i].astype(dtype) * args.static.scale
      do_i = do_blocks[g, i].astype(dtype)
      queries = (q_i, do_i, lse[g, i], delta[g, i])
      shares = blocks.gradients(g, i, j, queries, keys, masked=masked)
      dq = dq.at[g * t.nq + i].add(shares[0])
      return dq, dk + shares[1], dv + shares[2]

    zeros = (
      jnp.zeros((t.X, t.block_k, H), dtype),
      jnp.zeros((t.X, t.block_k, V), dtype),
    )
    carry = (dq, *vary_like(zeros, q, k, v, dout))
    dq, dk, dv = blocks.visit(g, j, step, carry)
    return dq, (dk, dv)

  dq, (dk, dv) = lax.scan(column, dq, jnp.arange(t.groups * t.nk))
  return dq, t.join_k(dk), t.join_k(dv)


@_accumulate_gradients.defjvp
def _accumulate_gradients_jvp(primals, tangents):
  q, k, v, args, *given, _ = primals
  again = functools.partial(second_order.gradients, args)
  *tangents, dq = *tangents[:3], *tangents[4:]
  _, (share, dk, dv) = jax.jvp(again, (q, k, v, *given), tuple(tangents))
  return _accumulate_gradients(*primals), (dq + share, dk, dv)


@dataclasses.dataclass(frozen=True)
class XLABackend(Backend):
  """Flash attention backend 'xla': time O(blocks with an allowed pair)."""

  def forward(
    self,
    q: Float[Array, 'B T N H'],
    k: Float[Array, 'B S K H'],
    v: Float[Array, 'B S K V'],
    args: AttentionArgs,
    dtype: Any = None,
  ) -> OutLse:
    t = tiling_of(q, k, args, backward=False)
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    shape = (t.groups * t.nq, t.X, t.G * t.block_q)
    state = SoftmaxState(
      jnp.zeros((*shape, v.shape[-1]), dtype),
      jnp.full(shape, args.static.normalizer.least_row_max or 0, dtype),
      jnp.zeros(shape, dtype),
    )
    state = _accumulate(q, k, v, args, vary_like(state, q, k, v))
    return self.finalize(q, k, args, state)

  def from_partial(
    self,
    q: Float[Array, 'B T N H'],
    k: Float[Array, 'B S K H'],
    args: AttentionArgs,
    out: Float[Array, 'B T N V'],
    lse: Float[Array, 'B T N'],
  ) -> SoftmaxState:
    t = tiling_of(q, k, args, backward=False)
    least = args.static.normalizer.least_row_max
    row_max = jnp.zeros_like(lse) if least is None else jnp.maximum(lse, least)
    # Any maximum will do, so it has no derivative; lse has it by the sum.
    row_max = lax.stop_gradient(row_max)
    row_sum = jnp.exp(lse - row_max)
    shape = (t.groups * t.nq, t.X, t.G * t.block_q)
    row_max, row_sum = row_max[..., None], row_sum[..., None]
    values, row_max, row_sum = (
      t.split_q(x).reshape(*shape, -1)
      for x in (out * row_sum, row_max, row_sum)
    )
    return SoftmaxState(values, row_max[..., 0], row_sum[..., 0])

  accumulate = staticmethod(_accumulate)

  def finalize(
    self,
    q: Float[Array, 'B T N H'],
    k: Float[Array, 'B S K H'],
    args: AttentionArgs,
    state: SoftmaxState,
  ) -> OutLse:
    some = state.row_sum > 0
    row_sum = jnp.where(some, state.row_sum, 1)
    lse = jnp.where(some, state.row_max + jnp.log(row_sum), -jnp.inf)
    join = tiling_of(q, k, args, backward=False).join_q
    return join(state.values / row_sum[..., None]), join(lse[..., None])[..., 0]

  def backward(
    self,
    q: Float[Array, 'B T N H'],
    k: Float[Array, 'B S K H'],
    v: Float[Array, 'B S K V'],
    args: AttentionArgs,
    lse: Float[Array, 'B T N'],
    dout: Float[Array, 'B T N V'],
    delta: Float[Array, 'B T N'],
    dtype: Any = None,
  ) -> Gradients:
    dq = vary_like(self.init_dq(q, k, args, lse.dtype), q, k, v, dout)
    dq, dk, dv = _accumulate_gradients(q, k, v, args, lse, dout, delta, dq)
    return self.finalize_dq(q, k, args, dq), dk, dv

  def init_dq(
    self,
    q: Float[Array, 'B T N H'],
    k: Float[Array, 'B S K H'],
    args: AttentionArgs,
    dtype: Any,
  ) -> Float[Array, 'blocks X H R']:
    t = tiling_of(q, k, args, backward=True)
    shape = (t.groups * t.nq, t.X, q.shape[-1], t.G * t.block_q)
    return jnp.zeros(shape, dtype)

  accumulate_gradients = staticmethod(_accumulate_gradients)

  def finalize_dq(
    self,
    q: Float[Array, 'B T N H'],
    k: Float[Array, 'B S K H'],
    args: AttentionArgs,
    dq: Float[Array, 'blocks X H R'],
  ) -> Float[Array, 'B T N H']:
    t = tiling_of(q, k, args, backward=True)
    return t.join_q(dq.swapaxes(2, 3) * args.static.scale)
