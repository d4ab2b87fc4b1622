"""Pallas call of a TPU kernel: how arrays are cut into blocks for its grid.

Heads whose width is a multiple of 128 stay where the model has them, in one
axis with the head dimension: a block is then a window of [T, N H], and nothing
is copied. Others are brought to [N, T, H]. Numbers per query, as lse, lie in
rows [N, 1, T], which take no padding.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from longctx.ops.dot_product_attention import pallas_tpu_work_list
from longctx.ops.dot_product_attention.pallas_tpu_work_list import FlatList
from longctx.ops.dot_product_attention.tiling import Tiling
from longctx.ops.target import target
from longctx.ops.tpu import LANES, VMEM_LIMIT
from longctx.typing import Array


@dataclasses.dataclass(frozen=True)
class Operand:
  """Operand of a Pallas kernel: how an input or output is cut.

  Attributes:
    side: 'q' or 'k', whose tokens and heads it has.
    kind: 'heads' for [B, T, N, D], 'row' for [B, T, N], 'index' for [b, T].
    shape: in the model's order.
    dtype: of its numbers.
    fill: what padding holds.
  """

  side: str
  kind: str
  shape: tuple[int, ...]
  dtype: Any
  fill: float = 0

  @property
  def folded(self) -> bool:
    return self.kind == 'heads' and self.shape[-1] % LANES == 0

  @property
  def token_axis(self) -> int:
    """Of `blocked` arrays."""
    if self.kind == 'heads':
      return 1 if self.folded else 2
    return 3 if self.kind == 'row' else 2

  def block(self, tiling: Tiling) -> int:
    return tiling.block_q if self.side == 'q' else tiling.block_k

  def padded(self, tiling: Tiling) -> int:
    """Tokens in whole blocks."""
    block = self.block(tiling)
    return -(-self.shape[1] // block) * block

  def blocked(self, x: Array, tiling: Tiling) -> Array:
    """The array in whole blocks, in the kernel's order."""
    missing = self.padded(tiling) - x.shape[1]
    if missing:
      widths = [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)
      x = jnp.pad(x, widths, constant_values=self.fill)
    if self.folded:
      return x.reshape(*x.shape[:2], -1)
    if self.kind == 'heads':
      return x.swapaxes(1, 2)
    if self.kind == 'row':
      return x.swapaxes(1, 2)[:, :, None]
    return x[:, None]

  def natural(self, x: Array) -> Array:
    """The inverse of `blocked`."""
    B, T, N = self.shape[:3]
    if self.folded:
      x = x.reshape(B, -1, *self.shape[2:])
    elif self.kind == 'heads':
      x = x.swapaxes(1, 2)
    else:
      x = x[:, :, 0].swapaxes(1, 2)
    return x[:, :T]

  def output(self, B: int, tokens: int) -> jax.ShapeDtypeStruct:
    """What a call of B batch rows and so many tokens writes."""
    shape = (B, tokens, *self.shape[2:])
    if self.folded:
      shape = (B, tokens, self.shape[2] * self.shape[3])
    elif self.kind == 'heads':
      shape = (B, self.shape[2], tokens, self.shape[3])
    else:
      shape = (B, self.shape[2], 1, tokens)
    return jax.ShapeDtypeStruct(shape, self.dtype)

  def spec(
    self, tiling: Tiling, place: Callable[..., tuple[Any, Any, Any]]
  ) -> pl.BlockSpec:
    """Which block a grid step works on.

    Args:
      tiling: block sizes.
      place: from the grid's indices and the prefetched scalars to (batch row,
        head, block).
    """
    block = self.block(tiling)
    if self.folded:
      shape = (None, block, self.shape[-1])
      order = lambda b, head, i: (b, i, head)
    elif self.kind == 'heads':
      shape = (None, None, block, self.shape[-1])
      order = lambda b, head, i: (b, head, i, 0)
    elif self.kind == 'row':
      shape = (None, None, 1, block)
      order = lambda b, head, i: (b, head, 0, i)
    else:
      shape = (None, 1, block)
      # One row of positions may serve all batch rows.
      shared = self.shape[0] == 1
      order = lambda b, head, i: (0 if shared else b, 0, i)
    return pl.BlockSpec(shape, lambda *args: order(*place(*args)))


def places(
  tiling: Tiling, *, by_column: bool
) -> dict[str, Callable[..., tuple[Any, Any, Any]]]:
  """Per side, from grid indices to (batch row, head, block).

  The grid is (b, query head, entry), by column (b, key head, entry, which of
  the query heads that share it).
  """
  G = tiling.G
  row, column = pallas_tpu_work_list.row_of, pallas_tpu_work_list.column_of

  def by_row_q(b, n, w, entries, _):
    return b, n, row(entries[w])

  def by_row_k(b, n, w, entries, _):
    return b, lax.div(n, jnp.int32(G)), column(entries[w])

  def by_column_q(b, kv, w, g, entries, _):
    return b, kv * G + g, column(entries[w])

  def by_column_k(b, kv, w, g, entries, _):
    return b, kv, row(entries[w])

  if by_column:
    return {'q': by_column_q, 'k': by_column_k}
  return {'q': by_row_q, 'k': by_row_k}


def call_kernel(
  kernel: Callable[..., None],
  work: FlatList,
  tiling: Tiling,
  inputs: list[tuple[Operand, Array]],
  scalars: list[Array],
  outputs: list[Operand],
  scratch: list[tuple[int, ...]],
  *,
  by_column: bool,
  products: int,
  name: str,
) -> list[Array]:
  """Runs a kernel over a work list, in as many calls as the list has.

  Args:
    kernel: takes references to the list's entries, to (group, first block row)
      of the call, to inputs, scalars, outputs and scratch.
    work: the blocks to visit.
    tiling: how arrays are cut.
    inputs: arrays in the model's order.
    scalars: small arrays that go to scalar memory as they are.
    outputs: what the kernel writes.
    scratch: shapes of what it keeps between blocks, in float32.
    by_column: whether rows of the list are blocks of keys.
    products: how many products of a block it computes.
    name: of the kernel, in profiles and compiled programs.

  Returns:
    The outputs, in the model's order.
  """
  listed = 'k' if by_column else 'q'
  arrays = [operand.blocked(x, tiling) for operand, x in inputs]
  tokens = work.rows * (tiling.block_k if by_column else tiling.block_q)
  # All batch rows at once, where they share the list.
  B = tiling.B if work.groups == 1 else 1
  shapes = [
    out.output(B, tokens if out.side == listed else out.padded(tiling))
    for out in outputs
  ]
  operands = [operand for operand, _ in inputs]
  grid = _Grid(tiling, B, by_column)
  options = dict(
    out_shape=shapes,
    compiler_params=grid.compiler_params(),
    cost_estimate=_cost(work, tiling, B, operands, arrays, products),
    # For want of a TPU.
    interpret=target().platform == 'cpu',
    name=name,
  )

  def call(number, entries, count):
    group, chunk = divmod(number, work.chunks)
    given = [
      _part(
        operand,
        x,
        work,
        tokens,
        group,
        chunk if operand.side == listed else None,
      )
      for operand, x in zip(operands, arrays, strict=True)
    ]
    run = pl.pallas_call(
      kernel,
      grid_spec=grid.spec(count, operands, len(scalars), outputs, scratch),
      **options,
    )
    place = jnp.stack([group, chunk * work.rows]).astype(jnp.int32)
    return run(entries, place, *given, *scalars)

  if work.calls == 1:
    count = work.count[0]
    results = call(jnp.int32(0), jnp.asarray(work.entries)[0], count)
  else:
    numbers = jnp.arange(work.calls, dtype=jnp.int32)
    lists = jnp.asarray(work.entries), jnp.asarray(work.count)
    results = lax.map(lambda x: call(*x), (numbers, *lists))
    results = [
      _join(x, work, out.token_axis)
      for x, out in zip(results, outputs, strict=True)
    ]
  return [out.natural(x) for out, x in zip(outputs, results, strict=True)]


@dataclasses.dataclass(frozen=True)
class _Grid:
  """Grid [B, heads, entries], by column with a key head's query heads last.

  Attributes:
    tiling: of the arrays.
    B: batch rows of a call.
    by_column: whether rows of the list are blocks of keys.
  """

  tiling: Tiling
  B: int
  by_column: bool

  def spec(
    self,
    count: Array | np.integer,
    inputs: list[Operand],
    scalars: int,
    outputs: list[Operand],
    scratch: list[tuple[int, ...]],
  ) -> pltpu.PrefetchScalarGridSpec:
    t = self.tiling
    place = places(t, by_column=self.by_column)
    of = lambda operand: operand.spec(t, place[operand.side])
    small = pl.BlockSpec(memory_space=pltpu.SMEM)
    grid = (self.B, t.K * t.G, count)
    if self.by_column:
      grid = (self.B, t.K, count, t.G)
    return pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=grid,
      in_specs=[*map(of, inputs), *[small] * scalars],
      out_specs=[*map(of, outputs)],
      scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
    )

  def compiler_params(self) -> pltpu.CompilerParams:
    # Entries of a row follow each other, as they share what is summed.
    in_order = ('arbitrary',) * (1 + self.by_column)
    return pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', *in_order),
      vmem_limit_bytes=VMEM_LIMIT,
    )


def _cost(
  work: FlatList,
  tiling: Tiling,
  B: int,
  operands: list[Operand],
  arrays: list[Array],
  products: int,
) -> pl.CostEstimate:
  """What the compiler's scheduler is told of a call."""
  t = tiling
  scores = t.block_q * t.block_k * -(-work.blocks // work.chunks)
  scores *= B * t.K * t.G
  widest = max(x.shape[-1] for x in operands if x.kind == 'heads')
  return pl.CostEstimate(
    flops=2 * products * scores * widest,
    bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays),
    transcendentals=scores,
  )


def _part(
  operand: Operand,
  x: Array,
  work: FlatList,
  tokens: int,
  group: Array,
  chunk: Array | None,
) -> Array:
  """What of an array a call needs.

  Args:
    operand: how it is cut.
    x: the array, in blocks.
    work: the list.
    tokens: of the block rows of a call.
    group: which batch row, where each has its own list.
    chunk: which of the calls of a group; None where all tokens are needed.
  """
  if work.groups > 1 and x.shape[0] > 1:
    x = lax.dynamic_slice_in_dim(x, group, 1, 0)
  if work.chunks > 1 and chunk is not None:
    axis = operand.token_axis
    x = _pad_to(x, axis, work.chunks * tokens)
    x = lax.dynamic_slice_in_dim(x, chunk * tokens, tokens, axis)
  return x


def _pad_to(x: Array, axis: int, length: int) -> Array:
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, length - x.shape[axis])
  return jnp.pad(x, widths)


def _join(x: Array, work: FlatList, axis: int) -> Array:
  """[groups chunks, B, ...] of calls to [groups B, ...] of whole arrays."""
  x = x.reshape(work.groups, work.chunks, *x.shape[1:])
  # The chunks, before the tokens that they are cut of.
  x = jnp.moveaxis(x, 1, axis + 1)
  x = x.reshape(*x.shape[: axis + 1], -1, *x.shape[axis + 3 :])
  return x.reshape(-1, *x.shape[2:])
