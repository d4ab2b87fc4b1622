"""Flash attention kernels for TPUs: one block of scores, keys by queries.

With z the logits [block_k, block_q], and rows of one number per query:
    forward   the running maximum, sum and values of `xla`
    dq        dqᵀ += kᵀ dz
    dk, dv    dk += dz q, dv += p dout

Softmax is taken to base 2, which is what the chip computes: the factor of the
logits is one with their scale.
"""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from longctx import masks
from longctx.ops.dot_product_attention import pallas_tpu_work_list
from longctx.ops.dot_product_attention.args import StaticArgs
from longctx.ops.dot_product_attention.dropout import Dropout, keep_factor
from longctx.ops.dot_product_attention.normalizers import SOFTMAX, Terms
from longctx.ops.dot_product_attention.tiling import Tiling
from longctx.ops.tpu import precision
from longctx.typing import Array, Bool, Float, Int

FLOAT = jnp.float32

# References to blocks: queries [R, H], keys [C, H], rows of a number per query
# [1, R]; scores, keys by queries, are arrays [C, R].
Ref = Any
Scores = Float[Array, 'C R']
Row = Float[Array, '1 R']

# The contracted axes of a @ b, of a @ bᵀ and of aᵀ @ b.
_AB, _ABT, _ATB = ((1,), (0,)), ((1,), (1,)), ((0,), (0,))


def _product(
  a: Float[Array, '_ _'], b: Float[Array, '_ _'], axes: Any
) -> Float[Array, '_ _']:
  # Products of bfloat16 are exact, and ask for nothing else.
  narrow = a.dtype == jnp.bfloat16
  return lax.dot_general(
    a,
    b,
    (axes, ((), ())),
    precision=lax.Precision.DEFAULT if narrow else precision(),
    preferred_element_type=FLOAT,
  )


class ScoreBlock:
  """Block of scores of a grid step: where it lies, who reads whom in it.

  Made inside of a kernel, from references to what it was given.

  Args:
    static: arguments of the attention.
    tiling: of the kernel.
    kinds: that may occur, of PARTIAL and FULL.
    by_column: whether the grid's rows are blocks of keys.
    entries: of the work list.
    call: (group of batch rows, first block row) of this call.
    indices: q_positions, k_positions, q_segment_ids and k_segment_ids, rows,
      or None.
    slopes: ALiBi's, per head.
    dropout: (words, factor), see `dropout_scalars`.
  """

  def __init__(
    self,
    static: StaticArgs,
    tiling: Tiling,
    kinds: tuple[int, ...],
    *,
    by_column: bool,
    entries: Ref,
    call: Ref,
    indices: dict[str, Ref],
    slopes: Ref | None,
    dropout: list[Ref] | None,
  ):
    self.static, self.tiling, self.kinds = static, tiling, kinds
    self.indices, self.slopes, self.dropout = indices, slopes, dropout
    self.is_softmax = static.normalizer.terms is SOFTMAX.terms
    # The unit of logits, peaks and lse in here, in nats.
    self.unit = math.log(2) if self.is_softmax else 1.0
    entry = entries[pl.program_id(2)]
    self.kind = pallas_tpu_work_list.kind_of(entry)
    self.first = pallas_tpu_work_list.is_first(entry)
    self.last = pallas_tpu_work_list.is_last(entry)
    row = call[1] + pallas_tpu_work_list.row_of(entry)
    column = pallas_tpu_work_list.column_of(entry)
    self.batch, self.head = pl.program_id(0) + call[0], pl.program_id(1)
    if by_column:
      row, column = column, row
      g = pl.program_id(3)
      self.first &= g == 0
      self.last &= g == tiling.G - 1
      self.head = self.head * tiling.G + g
    self.q_start, self.k_start = row * tiling.block_q, column * tiling.block_k

  def visit(self, step: Callable[..., None]) -> None:
    """Runs step(masked=...) for the kind of block that this is."""
    for kind in self.kinds:
      pl.when(self.kind == kind)(
        lambda masked=kind == masks.PARTIAL: step(masked=masked)
      )

  def logits(self, z: Scores, *, masked: bool) -> tuple[Scores, Scores | int]:
    """Scale, soft cap, ALiBi and mask; also the cap's slope."""
    static, slope = self.static, 1
    if static.logits_soft_cap is None:
      z = z * (static.scale / self.unit)
    else:
      tanh = jnp.tanh(z * (static.scale / static.logits_soft_cap))
      z, slope = tanh * (static.logits_soft_cap / self.unit), 1 - tanh * tanh
    if self.slopes is not None:
      q, k = self._positions()
      steps = abs(q - k).astype(FLOAT)
      z -= (self.slopes[self.head] / self.unit) * steps
    if masked:
      z = jnp.where(self._allowed(), z, -jnp.inf)
    return z, slope

  def exp(self, z: Float[Array, '_ R']) -> Float[Array, '_ R']:
    """Of a difference of logits."""
    return jnp.exp2(z) if self.is_softmax else jnp.exp(z)

  def terms(self, z: Scores, shift: Row, *, exact: bool) -> Terms:
    """Of the logits; shift is at least each of them, unless rounded."""
    if not self.is_softmax:
      return self.static.normalizer.terms(z, shift)
    gap = z - shift
    p = jnp.exp2(gap if exact else jnp.minimum(gap, 0))
    return Terms(p, p, p, p)

  def dropped(self, p: Scores) -> Scores:
    """The scores times 0 where dropped, else 1 / (1 - rate)."""
    if self.dropout is None:
      return p
    words, factor = self.dropout
    unsigned = lambda x: lax.bitcast_convert_type(x, jnp.uint32)
    q, k = self._positions()
    keep = keep_factor(
      Dropout(
        threshold=unsigned(words[0]),
        factor=factor[0],
        words=(unsigned(words[1]), unsigned(words[2])),
        first_batch_row=words[3],
        first_head=words[4],
      ),
      batch=self.batch,
      head=self.head,
      segment=self._row('q_segment_ids'),
      q_positions=q,
      k_positions=k,
    )
    return p * keep

  def _allowed(self) -> Bool[Array, '#C #R']:
    q, k = self._positions()
    ok = self.static.mask.allowed(q, k)
    ids = self._row('q_segment_ids')
    if ids is not None:
      ok &= ids == self._column('k_segment_ids')
    if self.tiling.S % self.tiling.block_k:
      ok &= self.k_start + self._count(0) < self.tiling.S
    return ok

  def _positions(self) -> tuple[Int[Array, '1 R'], Int[Array, 'C 1']]:
    """Of queries [1, block_q] and of keys [block_k, 1]."""
    q, k = self._row('q_positions'), self._column('k_positions')
    if q is None:
      q = self.q_start + self._count(1)
    if k is None:
      k = self.k_start + self._count(0)
    return q, k

  def _count(self, axis: int) -> Int[Array, '_ _']:
    shape = (1, self.tiling.block_q) if axis else (self.tiling.block_k, 1)
    return lax.broadcasted_iota(jnp.int32, shape, axis)

  def _row(self, name: str) -> Int[Array, '1 _'] | None:
    ref = self.indices.get(name)
    return None if ref is None else ref[...]

  def _column(self, name: str) -> Int[Array, '_ 1'] | None:
    row = self._row(name)
    return None if row is None else row.T


def dropout_scalars(dropout: Dropout) -> tuple[Any, Any]:
  """(int32[5], float32[1]): how `ScoreBlock.dropped` reads a dropout."""
  signed = lambda x: lax.bitcast_convert_type(x, jnp.int32)
  words = [signed(x) for x in (dropout.threshold, *dropout.words)]
  words += [dropout.first_batch_row, dropout.first_head]
  return jnp.stack([jnp.int32(x) for x in words]), dropout.factor[None]


def forward(
  block: ScoreBlock,
  q: Ref,
  k: Ref,
  v: Ref,
  out: Ref,
  lse: Ref,
  row_max: Ref,
  row_sum: Ref,
  values: Ref,
) -> None:
  """Writes out and lse of a block of queries, after its last block of keys."""
  least = block.static.normalizer.least_row_max

  @pl.when(block.first)
  def _():
    row_max[...] = jnp.full(row_max.shape, least or 0, FLOAT)
    row_sum[...] = jnp.zeros(row_sum.shape, FLOAT)
    values[...] = jnp.zeros(values.shape, FLOAT)

  @block.visit
  def _(*, masked: bool):
    z, _ = block.logits(_product(k[...], q[...], _ABT), masked=masked)
    shift, decay = row_max[...], 1
    if least is not None:
      shift = jnp.maximum(shift, z.max(0, keepdims=True))
      decay = block.exp(row_max[...] - shift)
      row_max[...] = shift
    terms = block.terms(z, shift, exact=True)
    row_sum[...] = row_sum[...] * decay + terms.term.sum(0, keepdims=True)
    weight = block.dropped(terms.weight).astype(v.dtype)
    values[...] = values[...] * decay + _product(v[...], weight, _ATB)

  @pl.when(block.last)
  def _():
    some = row_sum[...] > 0
    sum_ = jnp.where(some, row_sum[...], 1)
    out[...] = (values[...] / sum_).T.astype(out.dtype)
    found = row_max[...] * block.unit + jnp.log(sum_)
    lse[...] = jnp.where(some, found, -jnp.inf)


def dq(block: ScoreBlock, q, k, v, dout, lse, delta, dq, sum_):
  """Writes the gradient of a block of queries."""

  @pl.when(block.first)
  def _():
    sum_[...] = jnp.zeros(sum_.shape, FLOAT)

  @block.visit
  def _(*, masked: bool):
    _, dz = _gradients(block, q, k, v, dout, lse, delta, masked=masked)
    sum_[...] += _product(k[...], dz.astype(k.dtype), _ATB)

  @pl.when(block.last)
  def _():
    dq[...] = (sum_[...] * block.static.scale).T.astype(dq.dtype)


def dkv(block: ScoreBlock, q, k, v, dout, lse, delta, dk, dv, dk_sum, dv_sum):
  """Writes the gradients of a block of keys and values."""

  @pl.when(block.first)
  def _():
    dk_sum[...] = jnp.zeros(dk_sum.shape, FLOAT)
    dv_sum[...] = jnp.zeros(dv_sum.shape, FLOAT)

  @block.visit
  def _(*, masked: bool):
    weight, dz = _gradients(block, q, k, v, dout, lse, delta, masked=masked)
    dv_sum[...] += _product(weight.astype(dout.dtype), dout[...], _AB)
    dk_sum[...] += _product(dz.astype(q.dtype), q[...], _AB)

  @pl.when(block.last)
  def _():
    dk[...] = (dk_sum[...] * block.static.scale).astype(dk.dtype)
    dv[...] = dv_sum[...].astype(dv.dtype)


def _gradients(
  block: ScoreBlock,
  q: Ref,
  k: Ref,
  v: Ref,
  dout: Ref,
  lse: Ref,
  delta: Ref,
  *,
  masked: bool,
) -> tuple[Scores, Scores]:
  """(weights, gradient of the logits before their scale) of a block."""
  z = _product(k[...], q[...], _ABT)
  z, slope = block.logits(z, masked=masked)
  terms = block.terms(z, lse[...] / block.unit, exact=False)
  dweight = block.dropped(_product(v[...], dout[...], _ABT))
  dz = terms.logit_gradient(dweight, delta[...]) * slope
  return block.dropped(terms.weight), dz
