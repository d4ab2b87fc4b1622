"""Flash attention in plain XLA: blocks of scores, on any backend.

Forward, for a block of queries, over the blocks of keys that it may read
(Rabe and Staats, arXiv:2112.05682; Dao et al., arXiv:2205.14135):

    m' = max(m, rowmax z)    p = exp(z - m')    l' = exp(m - m') l + rowsum p
    acc' = exp(m - m') acc + p v               out = acc / l,  lse = m + log l

Backward, for a block of keys, over the blocks of queries that read it, with
delta = rowsum(dout * out) - dlse:

    p = exp(z - lse)   dv += pᵀ dout   dz = p (dout vᵀ - delta)
    dk += dzᵀ q        dq += dz k

Only q, k, v, out and lse are kept between the passes, O(T) memory. The backward
pass holds its scores transposed, keys by queries, so that all five products
read and write rows as they lie in memory.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from longctx.masks import Mask
from longctx.ops.dot_product_attention.blocks import (
  BlockSizes,
  Tiling,
  make_tiling,
)
from longctx.ops.dot_product_attention.dropout import Dropout, keep_factor
from longctx.ops.dot_product_attention.work_list import (
  Indices,
  make_work_list,
)
from longctx.typing import Array, Float, Int

# Finite, so that exp(-inf - FLOOR) is 0 in rows that have no key yet.
FLOOR = -1e30


@dataclasses.dataclass(frozen=True)
class Spec:
  """What does not depend on the arrays' contents."""

  mask: Mask
  scale: float
  logits_soft_cap: float | None
  forward: Tiling
  backward: Tiling


class Extras(NamedTuple):
  """Arrays without a gradient; None where not used."""

  indices: Indices = Indices()
  alibi_slopes: Float[Array, ' N'] | None = None
  dropout: Dropout | None = None


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
  block_sizes: BlockSizes | None,
) -> Spec:
  """The tilings for arrays of these shapes, and what else is static.

  Args:
    q: queries, of which the shape is read.
    k: keys, likewise.
    mask: as in `dot_product_attention`, like the next ones.
    scale: of the logits.
    logits_soft_cap: cap on the logits.
    block_sizes: None for heuristics.
  """
  B, T, N, _ = q.shape
  S, K = k.shape[1:3]
  sizes = block_sizes or BlockSizes()
  forward, backward = (
    make_tiling(mask, (B, T, S, K, N // K), sizes, backward=backward)
    for backward in (False, True)
  )
  return Spec(mask, scale, logits_soft_cap, forward, backward)


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
  out, lse = forward(spec, q, k, v, extras)
  return out.astype(q.dtype), lse


def _attend_fwd(spec: Spec, q, k, v, extras: Extras):
  out, lse = _attend(spec, q, k, v, extras)
  return (out, lse), (q, k, v, extras, out, lse)


def _attend_bwd(spec: Spec, residuals, cotangents):
  q, k, v, extras, out, lse = residuals
  dout, dlse = cotangents
  delta = make_delta(out, dout, dlse)
  grads = backward(spec, q, k, v, extras, lse, dout, delta)
  grads = (g.astype(x.dtype) for g, x in zip(grads, (q, k, v), strict=True))
  return *grads, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def forward(
  spec: Spec,
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K V'],
  extras: Extras,
) -> tuple[Float[Array, 'B T N V'], Float[Array, 'B T N']]:
  """(out, lse) over the keys given, both in the dtype of the sums.

  Parts over disjoint sets of keys are put together by `ops.merge`.
  """
  t = spec.forward
  dtype = jnp.promote_types(q.dtype, jnp.float32)
  q_blocks, k_blocks, v_blocks = t.split_q(q), t.split_k(k), t.split_k(v)
  work = _Work(spec, t, extras, by_column=False)
  V, R = v.shape[-1], t.G * t.block_q

  def row(n):
    g, i = n // t.nq, n % t.nq
    q_i = q_blocks[g, i].astype(dtype) * spec.scale

    def step(j, carry, *, masked):
      acc, peak, total = carry
      k_j, v_j = (x[g, j].astype(dtype) for x in (k_blocks, v_blocks))
      z = jnp.einsum('XRH,XSH->XRS', q_i, k_j)
      z, _ = work.logits(z, g, i, j, masked=masked)
      new_peak = jnp.maximum(peak, z.max(-1))
      p = jnp.exp(z - new_peak[..., None])
      # Else XLA computes the exponential twice, for the sum and the product.
      p = lax.optimization_barrier(p)
      decay = jnp.exp(peak - new_peak)
      total = total * decay + p.sum(-1)
      p = work.dropped(p, g, i, j)
      acc = acc * decay[..., None] + jnp.einsum('XRS,XSV->XRV', p, v_j)
      return acc, new_peak, total

    carry = (
      jnp.zeros((t.X, R, V), dtype),
      jnp.full((t.X, R), FLOOR, dtype),
      jnp.zeros((t.X, R), dtype),
    )
    acc, peak, total = work.visit(g, i, step, _vary_like(carry, q, k, v))
    some = total > 0
    total = jnp.where(some, total, 1)
    out = acc / total[..., None]
    return out, jnp.where(some, peak + jnp.log(total), -jnp.inf)

  out, lse = lax.map(row, jnp.arange(t.groups * t.nq))
  return t.join_q(out), t.join_q(lse[..., None])[..., 0]


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
  t = spec.backward
  dtype = lse.dtype
  delta = t.split_q(delta[..., None])[..., 0]
  # exp(z - inf) = 0: rows without keys and padded rows have no weights.
  lse = jnp.where(lse == -jnp.inf, jnp.inf, lse)
  lse = t.split_q(lse[..., None], fill=jnp.inf)[..., 0]
  q_blocks, do_blocks = t.split_q(q), t.split_q(dout)
  k_blocks, v_blocks = t.split_k(k), t.split_k(v)
  work = _Work(spec, t, extras, by_column=True)
  H, V, R = q.shape[-1], v.shape[-1], t.G * t.block_q

  def column(dq, n):
    g, j = n // t.nk, n % t.nk
    k_j, v_j = (x[g, j].astype(dtype) for x in (k_blocks, v_blocks))
    k_t = k_j.swapaxes(1, 2)

    def step(i, carry, *, masked):
      dq, dk, dv = carry
      q_i = q_blocks[g, i].astype(dtype) * spec.scale
      do_i = do_blocks[g, i].astype(dtype)
      z = jnp.einsum('XSH,XRH->XSR', k_j, q_i)
      z, slope = work.logits(z, g, i, j, masked=masked)
      p = jnp.exp(z - lse[g, i][:, None])
      dp = jnp.einsum('XSV,XRV->XSR', v_j, do_i)
      dp = work.dropped(dp, g, i, j)
      dz = p * (dp - delta[g, i][:, None]) * slope
      dv += jnp.einsum('XSR,XRV->XSV', work.dropped(p, g, i, j), do_i)
      dk += jnp.einsum('XSR,XRH->XSH', dz, q_i)
      dq_i = jnp.einsum('XHS,XSR->XHR', k_t, dz)
      dq = dq.at[g * t.nq + i].add(dq_i)
      return dq, dk, dv

    zeros = (
      jnp.zeros((t.X, t.block_k, H), dtype),
      jnp.zeros((t.X, t.block_k, V), dtype),
    )
    carry = (dq, *_vary_like(zeros, q, k, v, dout))
    dq, dk, dv = work.visit(g, j, step, carry)
    return dq, (dk, dv)

  dq = jnp.zeros((t.groups * t.nq, t.X, H, R), dtype)
  dq = _vary_like(dq, q, k, v, dout)
  dq, (dk, dv) = lax.scan(column, dq, jnp.arange(t.groups * t.nk))
  dq = t.join_q(dq.swapaxes(2, 3) * spec.scale)
  return dq, t.join_k(dk), t.join_k(dv)


class _Work:
  """The blocks to visit, and what happens to the scores of a block.

  Forward scores are [X, G block_q, block_k], backward ones (`by_column`)
  [X, block_k, G block_q]; X = rows * heads.
  """

  def __init__(
    self, spec: Spec, tiling: Tiling, extras: Extras, *, by_column: bool
  ):
    self.spec, self.tiling, self.by_column = spec, tiling, by_column
    self.slopes, self.dropout = extras.alibi_slopes, extras.dropout
    self.list = make_work_list(
      spec.mask, tiling, extras.indices, by_column=by_column
    )
    q_block, k_block = tiling.block_q, tiling.block_k
    blocks = (q_block, k_block, q_block, k_block)
    self.indices = Indices(
      *(
        None if x is None else tiling.split_positions(x, block)
        for x, block in zip(extras.indices, blocks, strict=True)
      )
    )

  def visit(self, g, r, step, carry):
    """Runs `step` on the full blocks of row r, then on the partial ones."""
    work = self.list
    group = g // self.tiling.head_groups if len(work.start) > 1 else 0
    for first, last, masked in (
      (work.start, work.full, False),
      (work.full, work.stop, True),
    ):
      if isinstance(first, np.ndarray) and (first == last).all():
        # Known on the host, and half of the compilation.
        continue
      first, last, indices = map(jnp.asarray, (first, last, work.indices))
      step_of_kind = functools.partial(step, masked=masked)

      def body(w, carry, step=step_of_kind, indices=indices):
        return step(indices[group, w], carry)

      carry = lax.fori_loop(first[group, r], last[group, r], body, carry)
    return carry

  def logits(self, z, g, i, j, *, masked: bool):
    """Soft cap, ALiBi and mask; also the cap's slope."""
    spec, slope = self.spec, 1
    shape = z.shape
    if spec.logits_soft_cap is not None:
      tanh = jnp.tanh(z / spec.logits_soft_cap)
      z, slope = spec.logits_soft_cap * tanh, 1 - tanh**2
    if self.slopes is None and not masked:
      return z, slope
    z = self._unfold(z)
    q_pos, k_pos = self._positions(g, i, j)
    if self.slopes is not None:
      slopes = self._heads(self.slopes, g)
      z -= slopes * abs(q_pos - k_pos).astype(z.dtype)
    if masked:
      z = jnp.where(self._allowed(g, i, j, q_pos, k_pos), z, -jnp.inf)
    return z.reshape(shape), slope

  def dropped(self, p, g, i, j):
    """The scores times 0 where dropped, else 1 / (1 - rate)."""
    if self.dropout is None:
      return p
    t = self.tiling
    q_pos, k_pos = self._positions(g, i, j)
    batch = g // t.head_groups * t.rows + jnp.arange(t.rows)
    segment = self._at(self.indices.q_segment_ids, g, i)
    keep = keep_factor(
      self.dropout,
      batch=batch.reshape(-1, 1, 1, 1, 1),
      head=self._heads(jnp.arange(t.K * t.G), g),
      segment=None if segment is None else self._expand_q(segment),
      q_positions=q_pos,
      k_positions=k_pos,
    )
    return (self._unfold(p) * keep.astype(p.dtype)).reshape(p.shape)

  def _allowed(self, g, i, j, q_pos, k_pos):
    t = self.tiling
    ok = self.spec.mask.allowed(q_pos, k_pos)
    if self.indices.q_segment_ids is not None:
      q_ids = self._at(self.indices.q_segment_ids, g, i)
      k_ids = self._at(self.indices.k_segment_ids, g, j)
      ok &= self._expand_q(q_ids) == self._expand_k(k_ids)
    if t.S % t.block_k:
      exists = j * t.block_k + jnp.arange(t.block_k) < t.S
      ok &= self._expand_k(exists[None])
    return ok

  def _positions(self, g, i, j):
    t = self.tiling
    q_pos = self._at(self.indices.q_positions, g, i)
    k_pos = self._at(self.indices.k_positions, g, j)
    if q_pos is None:
      q_pos = (i * t.block_q + jnp.arange(t.block_q))[None]
    if k_pos is None:
      k_pos = (j * t.block_k + jnp.arange(t.block_k))[None]
    return self._expand_q(q_pos), self._expand_k(k_pos)

  def _at(self, x, g, n):
    """Block n of an index array for the batch rows of group g."""
    if x is None:
      return None
    return x[g // self.tiling.head_groups if x.shape[0] > 1 else 0, n]

  def _unfold(self, z):
    """Scores with axes rows, heads, then G, block_q and block_k."""
    t = self.tiling
    if self.by_column:
      return z.reshape(t.rows, t.heads, t.block_k, t.G, t.block_q)
    return z.reshape(t.rows, t.heads, t.G, t.block_q, t.block_k)

  def _expand_q(self, x):
    return (
      x[:, None, None, None] if self.by_column else x[:, None, None, :, None]
    )

  def _expand_k(self, x):
    return (
      x[:, None, :, None, None] if self.by_column else x[:, None, None, None]
    )

  def _heads(self, x, g):
    """The group's part of an array [N]."""
    t = self.tiling
    x = x.reshape(t.head_groups, t.heads, t.G)[g % t.head_groups]
    if self.by_column:
      return x[None, :, None, :, None]
    return x[None, :, :, None, None]


def _vary_like(tree, *arrays):
  """Marks constants as varying over the manual mesh axes of the arrays.

  Inside `shard_map` with check_vma a loop's carry must start as varying as it
  ends.
  """
  axes = frozenset().union(
    *(jax.typeof(x).manual_axis_type.varying for x in arrays)
  )
  if not axes:
    return tree
  return jax.tree.map(lambda x: lax.pcast(x, tuple(axes), to='varying'), tree)
