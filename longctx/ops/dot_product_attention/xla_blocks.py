"""Blocks of attention scores in XLA: which to visit, what happens to each."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from longctx.ops.dot_product_attention.args import AttentionArgs, TokenIndices
from longctx.ops.dot_product_attention.dropout import keep_factor
from longctx.ops.dot_product_attention.tiling import Tiling, make_tiling
from longctx.ops.dot_product_attention.work_list import make_work_list
from longctx.typing import Array, Bool, Float, Int, Num, Shaped

Index = int | Int[Array, ''] | Int[np.ndarray, '']

# Scores, forward [X, R, S] and backward [X, S, R].
Scores = Float[Array, 'X _ _']


def tiling_of(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  args: AttentionArgs,
  *,
  backward: bool,
) -> Tiling:
  """How a pass cuts arrays of these shapes."""
  B, T, N, _ = q.shape
  S, K = k.shape[1:3]
  return make_tiling(
    args.static.mask,
    (B, T, S, K, N // K),
    args.static.block_sizes,
    backward=backward,
  )


class ScoreBlocks:
  """Blocks of attention scores of a pass.

  Forward scores are [X, G block_q, block_k], backward ones (`by_column`)
  [X, block_k, G block_q]; X = rows * heads.
  """

  def __init__(self, args: AttentionArgs, tiling: Tiling, *, by_column: bool):
    self.static, self.tiling, self.by_column = args.static, tiling, by_column
    self.slopes, self.dropout = args.alibi_slopes, args.dropout
    self.list = make_work_list(
      args.static.mask, tiling, args.indices, by_column=by_column
    )
    blocks = (tiling.block_q, tiling.block_k) * 2
    self.indices = TokenIndices(
      *(
        None if x is None else tiling.split_positions(x, block)
        for x, block in zip(args.indices, blocks, strict=True)
      )
    )

  def visit(
    self, g: Index, r: Index, step: Callable[..., Any], carry: Any
  ) -> Any:
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

  def triples(self) -> Int[np.ndarray, 'w 3']:
    """(g, i, j) of the blocks to visit; of all if the list is no constant."""
    work, t = self.list, self.tiling
    if isinstance(work.start, np.ndarray):
      counts = (work.stop - work.start)[0]
      rows = np.repeat(np.arange(counts.size), counts)
      pairs = np.stack([rows, work.indices[0, : rows.size]])
      pairs = pairs[::-1] if self.by_column else pairs
    else:
      pairs = np.indices((t.nq, t.nk)).reshape(2, -1)
    g = np.repeat(np.arange(t.groups), pairs.shape[1])
    triples = np.stack([g, *np.tile(pairs, t.groups)], axis=1)
    return triples.astype(np.int32)

  def gradients(
    self,
    g: Index,
    i: Index,
    j: Index,
    queries: tuple[Array, Array, Array, Array],
    keys: tuple[Array, Array, Array],
    *,
    masked: bool,
  ) -> tuple[
    Float[Array, 'X H R'], Float[Array, 'X S H'], Float[Array, 'X S V']
  ]:
    """The block's share of (dq / scale [X, H, R], dk, dv), as `by_column`.

    Args:
      g: the group.
      i: the block of queries.
      j: the block of keys.
      queries: their q * scale, dout, lse and delta, [X, R, ...].
      keys: their k, v and transposed k.
      masked: whether there are pairs to mask.
    """
    (q, dout, lse, delta), (k, v, k_t) = queries, keys
    z = jnp.einsum('XSH,XRH->XSR', k, q)
    z, slope = self.logits(z, g, i, j, masked=masked)
    terms = self.static.normalizer.terms(z, lse[:, None])
    dweight = jnp.einsum('XSV,XRV->XSR', v, dout)
    dweight = self.dropped(dweight, g, i, j)
    dz = terms.logit_gradient(dweight, delta[:, None]) * slope
    weight = self.dropped(terms.weight, g, i, j)
    dv = jnp.einsum('XSR,XRV->XSV', weight, dout)
    dk = jnp.einsum('XSR,XRH->XSH', dz, q)
    return jnp.einsum('XHS,XSR->XHR', k_t, dz), dk, dv

  def logits(
    self, z: Scores, g: Index, i: Index, j: Index, *, masked: bool
  ) -> tuple[Scores, Scores | int]:
    """Soft cap, ALiBi and mask; also the cap's slope."""
    static, slope = self.static, 1
    shape = z.shape
    if static.logits_soft_cap is not None:
      tanh = jnp.tanh(z / static.logits_soft_cap)
      z, slope = static.logits_soft_cap * tanh, 1 - tanh**2
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

  def dropped(self, p: Scores, g: Index, i: Index, j: Index) -> Scores:
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

  def _allowed(
    self, g: Index, i: Index, j: Index, q_pos: Array, k_pos: Array
  ) -> Bool[Array, '#rows _ _ _ _']:
    t = self.tiling
    ok = self.static.mask.allowed(q_pos, k_pos)
    if self.indices.q_segment_ids is not None:
      q_ids = self._at(self.indices.q_segment_ids, g, i)
      k_ids = self._at(self.indices.k_segment_ids, g, j)
      ok &= self._expand_q(q_ids) == self._expand_k(k_ids)
    if t.S % t.block_k:
      exists = j * t.block_k + jnp.arange(t.block_k) < t.S
      ok &= self._expand_k(exists[None])
    return ok

  def _positions(self, g: Index, i: Index, j: Index) -> tuple[Array, Array]:
    t = self.tiling
    q_pos = self._at(self.indices.q_positions, g, i)
    k_pos = self._at(self.indices.k_positions, g, j)
    if q_pos is None:
      q_pos = (i * t.block_q + jnp.arange(t.block_q))[None]
    if k_pos is None:
      k_pos = (j * t.block_k + jnp.arange(t.block_k))[None]
    return self._expand_q(q_pos), self._expand_k(k_pos)

  def _at(
    self, x: Int[Array, 'b n rows block'] | None, g: Index, n: Index
  ) -> Int[Array, 'rows block'] | None:
    """Block n of an index array for the batch rows of group g."""
    if x is None:
      return None
    return x[g // self.tiling.head_groups if x.shape[0] > 1 else 0, n]

  def _unfold(self, z: Scores) -> Float[Array, 'rows heads _ _ _']:
    """Scores with axes rows, heads, then G, block_q and block_k."""
    t = self.tiling
    if self.by_column:
      return z.reshape(t.rows, t.heads, t.block_k, t.G, t.block_q)
    return z.reshape(t.rows, t.heads, t.G, t.block_q, t.block_k)

  def _expand_q(self, x: Int[Array, 'rows block']) -> Array:
    return (
      x[:, None, None, None] if self.by_column else x[:, None, None, :, None]
    )

  def _expand_k(self, x: Shaped[Array, 'rows block']) -> Array:
    return (
      x[:, None, :, None, None] if self.by_column else x[:, None, None, None]
    )

  def _heads(self, x: Num[Array, ' N'], g: Index) -> Array:
    """The group's part of an array [N]."""
    t = self.tiling
    x = x.reshape(t.head_groups, t.heads, t.G)[g % t.head_groups]
    if self.by_column:
      return x[None, :, None, :, None]
    return x[None, :, :, None, None]


def split_lse(
  tiling: Tiling, lse: Float[Array, 'B T N']
) -> Float[Array, 'g nq X R']:
  """Blocks of lse that give rows without keys, and padded rows, no weights."""
  lse = jnp.where(lse == -jnp.inf, jnp.inf, lse)
  return tiling.split_q(lse[..., None], fill=jnp.inf)[..., 0]


def vary_like(tree: Any, *arrays: Array) -> Any:
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
