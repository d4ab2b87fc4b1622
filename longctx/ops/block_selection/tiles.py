"""Block-sparse attention to the blocks that each query chose, in tiles of XLA.

Gathering its blocks for every query would move as many numbers as it multiplies
and leave no matrix product. Here queries come to the keys: those that chose a
block are sorted next to each other and cut into tiles of C, and a tile reads
one block, C x block scores (as experts are served in MoE, arXiv:2211.15841).
Each of a query's choices is such a round, and rounds merge by their sums.

    z = scale q k    p = exp(z - lse)    out = Σ p v
    dv += pᵀ dout    dz = p (dout vᵀ - delta)    dk += dzᵀ q    dq += dz k

with delta = rowsum(dout * out) - dlse. Only q, k, v, out, lse and the plan of
who is served where are kept between the passes, four integers for a choice. For
n choices, time O(T n block), memory O(T).
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from longctx.ops.dot_product_attention.dropout import Dropout, keep_factor
from longctx.typing import Array, Float, Int, Num

# Finite, so that exp(-inf - FLOOR) is 0 in rows that have no key yet.
FLOOR = -1e30

# Scores held at once: 4 MB in float32.
SCORES_TOGETHER = 2**20

# Queries of a tile, at least and at most.
TILE = (8, 128)


class LogitModifiers(NamedTuple):
  """ALiBi and dropout of the chosen blocks, and what they depend on."""

  q_positions: Int[Array, 'B T']
  k_positions: Int[Array, 'B S']
  q_segment_ids: Int[Array, 'B T'] | None
  alibi_slopes: Float[Array, ' N'] | None
  dropout: Dropout | None


@dataclasses.dataclass(frozen=True)
class QueryTiling:
  """Tiling of T queries of N heads over the blocks of S keys of K heads.

  Keys are cut into cells of one block; B K heads have `cells` each, E together.
  A choice is made by M = K or N heads, so that there are P = B K T M / K of
  them, each of R = N / M query rows.

  Attributes:
    aligned: whether blocks are cells; else one may reach into the next cell.
  """

  B: int
  T: int
  S: int
  K: int
  M: int
  R: int
  block: int
  aligned: bool
  scale: float

  @property
  def cells(self) -> int:
    """Cells of one head."""
    return -(-self.S // self.block) + (not self.aligned)

  @property
  def span(self) -> int:
    """Keys that a tile reads."""
    return self.block * (1 if self.aligned else 2)

  @property
  def E(self) -> int:
    return self.B * self.K * self.cells

  @property
  def P(self) -> int:
    return self.B * self.T * self.M

  @property
  def C(self) -> int:
    """Queries of a tile: half of what a cell gets, if all get the same."""
    least, most = TILE
    return min(max(self.P // (2 * self.E), least), most, self.P)

  @property
  def together(self) -> int:
    """Tiles of a group, which are computed at once."""
    scores = self.C * self.R * self.span
    return min(max(SCORES_TOGETHER // scores, 1), self._enough)

  @property
  def groups(self) -> int:
    return -(-self._enough // self.together)

  @property
  def _enough(self) -> int:
    """Tiles for any choice: the last tile of a cell may have one query."""
    return min(self.P, self.P // self.C + self.E)

  def split_q(self, x: Num[Array, 'B T N D']) -> Num[Array, 'P R D']:
    D = x.shape[-1]
    x = x.reshape(self.B, self.T, self.K, self.M // self.K, self.R, D)
    return x.swapaxes(1, 2).reshape(self.P, self.R, D)

  def join_q(self, x: Num[Array, 'P R D']) -> Num[Array, 'B T N D']:
    """The inverse of `split_q`."""
    D = x.shape[-1]
    x = x.reshape(self.B, self.K, self.T, self.M // self.K, self.R, D)
    return x.swapaxes(1, 2).reshape(self.B, self.T, self.M * self.R, D)

  def split_k(self, x: Num[Array, 'B S K D']) -> Num[Array, 'E block D']:
    D, missing = x.shape[-1], self.cells * self.block - self.S
    x = jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0)))
    return x.swapaxes(1, 2).reshape(self.E, self.block, D)

  def join_k(self, x: Num[Array, 'E block D']) -> Num[Array, 'B S K D']:
    """The inverse of `split_k`."""
    x = x.reshape(self.B, self.K, self.cells * self.block, x.shape[-1])
    return x.swapaxes(1, 2)[:, : self.S]

  def owner(self, p: Int[Array, '...']) -> tuple[Int[Array, '...'], ...]:
    """Batch row, query and first query head of choice p."""
    p, m = _divide(p, self.M // self.K)
    p, t = _divide(p, self.T)
    b, k = _divide(p, self.K)
    return b, t, (k * (self.M // self.K) + m) * self.R


def attend(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K V'],
  begin: Int[Array, 'B T M n'],
  last: Int[Array, 'B T'],
  *,
  block_size: int,
  aligned: bool,
  scale: float,
  modifiers: LogitModifiers | None = None,
) -> tuple[Float[Array, 'B T N V'], Float[Array, 'B T N']]:
  """Softmax attention of each query to n blocks.

  Args:
    k: keys, in the order of places.
    begin: places at which the blocks begin, no two of them in common; -1 for
      none. M = K where the heads of a group share their blocks, or N.
    last: the place of the last key that a query may read.
    block_size: keys of a block.
    aligned: whether all blocks begin at multiples of their size.

  Returns:
    out and lse, in the dtype of the sums.
  """
  B, T, N, _ = q.shape
  S, K = k.shape[1:3]
  M, n = begin.shape[2:]
  t = QueryTiling(B, T, S, K, M, N // M, block_size, aligned, scale)
  begin = begin.astype(jnp.int32)
  # The last key of each block that is read; before the first one for none.
  last = last.astype(jnp.int32)[:, :, None, None]
  end = jnp.where(begin < 0, -2, jnp.minimum(begin + block_size - 1, last))
  choices = dataclasses.replace(t, R=1)
  begin, end = (choices.split_q(x)[:, 0].T for x in (begin, end))
  plan = lax.map(lambda x: _plan(t, *x), (begin, end))
  arrays = t.split_q(q), t.split_k(k), t.split_k(v)
  out, lse = _attend(t, *arrays, plan, modifiers)
  return t.join_q(out), t.join_q(lse[..., None])[..., 0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(t: QueryTiling, q, k, v, plan, modifiers: LogitModifiers | None):
  return _forward(t, q, k, v, plan, modifiers)


def _attend_fwd(
  t: QueryTiling, q, k, v, plan, modifiers: LogitModifiers | None
):
  # Not _attend itself, which has no derivative but this one: the second
  # derivative is that of the loops below.
  out, lse = _forward(t, q, k, v, plan, modifiers)
  return (out, lse), (q, k, v, plan, modifiers, out, lse)


def _attend_bwd(t: QueryTiling, residuals, cotangents):
  q, k, v, plan, modifiers, out, lse = residuals
  dout, dlse = cotangents
  delta = (dout * out).sum(-1) - dlse
  grads = _backward(t, q, k, v, plan, modifiers, lse, dout, delta)
  grads = (g.astype(x.dtype) for g, x in zip(grads, (q, k, v), strict=True))
  return *grads, None, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _forward(t: QueryTiling, q, k, v, plan, modifiers: LogitModifiers | None):
  dtype = jnp.promote_types(q.dtype, jnp.float32)

  def choice(carry, plan):
    def tiles(group):
      z, keep, _, (_, v_j) = _logits(t, q, (k, v), modifiers, *group)
      row_max = lax.stop_gradient(jnp.maximum(z.max(-1), FLOOR))
      p = jnp.exp(z - row_max[..., None])
      # Else XLA computes the exponential twice, for the sum and the product.
      p = lax.optimization_barrier(p)
      acc = jnp.einsum('ICRS,ISV->ICRV', p * keep, v_j)
      return acc, row_max, p.sum(-1)

    new = lax.map(tiles, plan.tiles)
    acc, row_max, row_sum = carry
    fills = (0, FLOOR, 0)
    new_acc, new_max, new_sum = (
      _back(plan, x, fill) for x, fill in zip(new, fills, strict=True)
    )
    next_max = jnp.maximum(row_max, new_max)
    old, new = jnp.exp(row_max - next_max), jnp.exp(new_max - next_max)
    acc = acc * old[..., None] + new_acc * new[..., None]
    return (acc, next_max, row_sum * old + new_sum * new), None

  rows = (t.P, t.R)
  carry = (
    jnp.zeros((*rows, v.shape[-1]), dtype),
    jnp.full(rows, FLOOR, dtype),
    jnp.zeros(rows, dtype),
  )
  (acc, row_max, row_sum), _ = lax.scan(choice, carry, plan)
  some = row_sum > 0
  row_sum = jnp.where(some, row_sum, 1)
  lse = jnp.where(some, row_max + jnp.log(row_sum), -jnp.inf)
  return acc / row_sum[..., None], lse


def _backward(
  t: QueryTiling,
  q,
  k,
  v,
  plan,
  modifiers: LogitModifiers | None,
  lse,
  dout,
  delta,
):
  # exp(-inf - 0) = 0: in a row without keys all logits are -inf.
  lse = jnp.where(lse == -jnp.inf, 0, lse)

  def choice(carry, plan):
    dq, dk, dv = carry

    def tiles(carry, group):
      dk, dv = carry
      queries, *_, cells = group
      z, keep, q_i, (k_j, v_j) = _logits(t, q, (k, v), modifiers, *group)
      lse_i, do_i, delta_i = (_take(x, queries) for x in (lse, dout, delta))
      p = jnp.exp(z - lse_i[..., None])
      dp = jnp.einsum('ICRV,ISV->ICRS', do_i, v_j) * keep
      dz = p * (dp - delta_i[..., None])
      dv_j = jnp.einsum('ICRS,ICRV->ISV', p * keep, do_i)
      dk_j = jnp.einsum('ICRS,ICRH->ISH', dz, q_i)
      dq_i = jnp.einsum('ICRS,ISH->ICRH', dz, k_j)
      return (_add(t, dk, cells, dk_j), _add(t, dv, cells, dv_j)), dq_i

    (dk, dv), dq_i = lax.scan(tiles, (dk, dv), plan.tiles)
    return (dq + _back(plan, dq_i, 0), dk, dv), None

  zeros = tuple(jnp.zeros(x.shape, lse.dtype) for x in (q, k, v))
  (dq, dk, dv), _ = lax.scan(choice, zeros, plan)
  return dq * t.scale, dk, dv


class _ServingPlan(NamedTuple):
  """Plan of the tiles: the queries of each, and where a query is served.

  Attributes:
    queries: of each tile, P for none.
    begin: the first key of each that it reads.
    end: the last one.
    cells: that each tile reads.
    rows: of each query among the rows of all tiles.
  """

  queries: Int[Array, 'groups I C']
  begin: Int[Array, 'groups I C']
  end: Int[Array, 'groups I C']
  cells: Int[Array, 'groups I']
  rows: Int[Array, ' P']

  @property
  def tiles(self) -> tuple[Array, Array, Array, Array]:
    return self.queries, self.begin, self.end, self.cells


def _plan(
  t: QueryTiling, begin: Int[Array, ' P'], end: Int[Array, ' P']
) -> _ServingPlan:
  """Cuts the queries that read a cell into tiles, for one choice of each."""
  p = jnp.arange(t.P, dtype=jnp.int32)
  head, _ = _divide(p, t.T * t.M // t.K)
  within, _ = _divide(begin, t.block)
  cell = jnp.where(begin < 0, t.E, head * t.cells + within)
  order = jnp.argsort(cell, stable=True)
  place = jnp.zeros_like(p).at[order].set(p, unique_indices=True)
  count = jnp.zeros(t.E + 1, jnp.int32).at[cell].add(1)
  size, _ = _divide(count + t.C - 1, t.C)
  first = (_before(size) * t.C - _before(count))[cell]
  n = t.groups * t.together
  # A query without a block stands beyond all tiles.
  rows = jnp.where(begin < 0, n * t.C, first + place)
  queries = jnp.full(n * t.C, t.P, jnp.int32).at[rows].set(p, mode='drop')
  cells = jnp.zeros(n, jnp.int32)
  cells = cells.at[_divide(rows, t.C)[0]].set(cell, mode='drop')
  groups = (t.groups, t.together)
  # No place lies between these.
  begin, end = jnp.append(begin, 0)[queries], jnp.append(end, -1)[queries]
  return _ServingPlan(
    *(x.reshape(*groups, t.C) for x in (queries, begin, end)),
    cells.reshape(groups),
    rows,
  )


def _logits(t: QueryTiling, q, keys, modifiers, queries, begin, end, cells):
  """Of a group of tiles: logits, dropout's factors, queries, keys and values.

  Args:
    t: the tiling.
    q: queries of all.
    keys: k and v, of all.
    modifiers: for ALiBi and dropout, or None.
    queries: [I, C], as the next ones in a plan.
    begin: [I, C].
    end: [I, C].
    cells: [I].

  Returns:
    z [I, C, R, S] with S = t.span, -inf where nothing is read; keep, which
    broadcasts to it; scaled q [I, C, R, H]; k and v [I, S, ...].
  """
  dtype = jnp.promote_types(q.dtype, jnp.float32)
  q = _take(q, queries).astype(dtype) * t.scale
  reach = cells[:, None] + jnp.arange(t.span // t.block)
  k, v = (
    x.at[reach].get(mode='clip').reshape(len(cells), t.span, -1).astype(dtype)
    for x in keys
  )
  head, cell = _divide(cells, t.cells)
  places = (cell[:, None] * t.block + jnp.arange(t.span))[:, None]
  ok = (places >= begin[..., None]) & (places <= end[..., None])
  z = jnp.einsum('ICRH,ISH->ICRS', q, k)
  keep = jnp.ones((), dtype)
  if modifiers is not None:
    b, _ = _divide(head, t.K)
    k_pos = modifiers.k_positions.at[b[:, None, None], places].get(mode='clip')
    bias, keep = _modify(t, modifiers, queries, k_pos[:, :, None])
    z, keep = z + jnp.asarray(bias, dtype), keep.astype(dtype)
  return jnp.where(ok[:, :, None], z, -jnp.inf), keep, q, (k, v)


def _modify(t: QueryTiling, modifiers: LogitModifiers, queries, k_positions):
  """Biases that ALiBi adds to logits, and dropout's factors of weights."""
  b, i, head = t.owner(jnp.minimum(queries, t.P - 1))
  head = (head[..., None] + jnp.arange(t.R))[..., None]
  expand = lambda x: x[:, :, None, None]
  q_positions = expand(modifiers.q_positions[b, i])
  bias, keep = 0, jnp.ones(())
  if modifiers.alibi_slopes is not None:
    slopes = modifiers.alibi_slopes[head]
    bias = -slopes * abs(q_positions - k_positions)
  if modifiers.dropout is not None:
    segment = modifiers.q_segment_ids
    keep = keep_factor(
      modifiers.dropout,
      batch=expand(b),
      head=head,
      segment=None if segment is None else expand(segment[b, i]),
      q_positions=q_positions,
      k_positions=k_positions,
    )
  return bias, keep


def _divide(x: Int[Array, '*n'], by: int) -> tuple[Array, Array]:
  """Quotient and rest of numbers that are not negative, in fewer steps."""
  by = jnp.full((), by, x.dtype)
  by = jnp.broadcast_to(by, x.shape)
  return lax.div(x, by), lax.rem(x, by)


def _before(x: Int[Array, ' n']) -> Int[Array, ' n']:
  """Sums of the numbers before each."""
  return jnp.cumsum(x, dtype=x.dtype) - x


def _take(x: Num[Array, 'P ...'], queries: Int[Array, 'I C']):
  """The rows of a tile's queries; zeros for none."""
  return x.at[queries].get(mode='fill', fill_value=0)


def _back(plan: _ServingPlan, x: Num[Array, 'groups I C ...'], fill):
  """From the rows of tiles to the queries; `fill` where a query has none."""
  x = x.reshape(-1, *x.shape[3:])
  return x.at[plan.rows].get(mode='fill', fill_value=fill)


def _add(t: QueryTiling, x, cells, tiles):
  """Adds what tiles have for the keys that they read."""
  reach = cells[:, None] + jnp.arange(t.span // t.block)
  tiles = tiles.reshape(*reach.shape, t.block, -1)
  return x.at[reach].add(tiles, mode='drop')
