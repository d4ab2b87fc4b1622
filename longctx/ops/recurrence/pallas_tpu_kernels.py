"""Pallas TPU kernels of a chunked recurrence, forward and backward.

What a chunk of one head computes is one function of its state and steps, as in
chunked.py; the kernel of the gradients calls its VJP. All is float32 inside.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from longctx.ops.recurrence.pallas_tpu_layout import KEY_HEADS, ChunkLayout
from longctx.ops.recurrence.pallas_tpu_products import (
  SegmentRows,
  indices,
  product,
  products,
)
from longctx.ops.recurrence.steps import Steps
from longctx.typing import Array, Float, Int

# A reference to a block, in VMEM.
Ref = Any
# Rows of a tile of float32.
_TILE_ROWS = 8


@dataclasses.dataclass(frozen=True)
class ScanKernel:
  """Recurrence in TPU kernels, all but its arrays.

  Attributes:
    name: of the recurrence, as profiles show it.
    layout: its grid and blocks.
    scale: factor of the output.
    flops, exponentials: of one chunk of one head.
    out_dtype: of the output.
    interpret: whether the kernel is run by XLA operations, for its values.
  """

  name: str
  layout: ChunkLayout
  scale: float
  flops: int
  exponentials: int
  out_dtype: jax.typing.DTypeLike
  interpret: bool


def forward_kernel(
  kernel: ScanKernel,
  with_states: bool,
  first: Float[Ref, 'K G P V'],
  steps: Steps,
  segments: Int[Ref, '2 C'] | None,
  out: Float[Ref, 'K g C V'] | Float[Ref, 'K g P V'],
  carried: Float[Ref, 'K G P V'],
) -> None:
  """Writes outputs, or with `with_states` the states that enter the chunks.

  `first` are the states that enter the sequence, `carried` those from chunk to
  chunk, at last those of the end; `out` is of g query heads of each key head.
  """

  @pl.when((pl.program_id(2) == 0) & (pl.program_id(3) == 0))
  def _():
    carried[...] = first[...]

  rows = _read_segments(segments)
  heads = _heads(kernel.layout)
  entering = [carried[k, n] for k, _, n in heads]
  if with_states:
    for (k, g, _), state in zip(heads, entering, strict=True):
      out[k, g] = state
  results = [
    chunk(kernel.scale, state, _read(steps, k, g), rows)
    for (k, g, _), state in zip(heads, entering, strict=True)
  ]
  for (k, g, n), (values, state) in zip(heads, results, strict=True):
    carried[k, n] = state
    if not with_states:
      out[k, g] = values.astype(out.dtype)


def backward_kernel(
  kernel: ScanKernel,
  states: Float[Ref, 'K g P V'],
  steps: Steps,
  segments: Int[Ref, '2 C'] | None,
  dout: Float[Ref, 'K g C V'],
  dlast: Float[Ref, 'K G P V'],
  dcarried: Float[Ref, 'K G P V'],
  dsteps: Steps,
  *sums: Float[Ref, '1 C _'],
) -> None:
  """Writes the gradients of the steps and, in the end, of the first state.

  `states` enter the chunk, `dcarried` is the gradient of the state from chunk
  to chunk, at last of the first. `sums` over the query heads that share a key
  head are kept where a step of the grid has some of them only.
  """
  group_step = pl.program_id(3)

  @pl.when((pl.program_id(2) == 0) & (group_step == 0))
  def _():
    dcarried[...] = dlast[...]

  rows = _read_segments(segments)
  heads = _heads(kernel.layout)
  gradients = []
  for k, g, n in heads:
    _, vjp = jax.vjp(
      lambda state, steps: chunk(kernel.scale, state, steps, rows),
      states[k, g],
      _read(steps, k, g),
    )
    gradients.append(vjp((dout[k, g].astype(jnp.float32), dcarried[k, n])))

  of_keys = {}
  for (k, g, n), (dstate, dchunk) in zip(heads, gradients, strict=True):
    dcarried[k, n] = dstate
    for name, x in dchunk._asdict().items():
      if name in KEY_HEADS:
        of_keys[name, k] = of_keys[name, k] + x if (name, k) in of_keys else x
      elif x is not None:
        ref = getattr(dsteps, name)
        ref[k, g] = x.astype(ref.dtype)
  for (name, k), x in of_keys.items():
    if sums:
      total = sums[KEY_HEADS.index(name)]

      @pl.when(group_step == 0)
      def _(total=total):
        total[...] = jnp.zeros(total.shape, total.dtype)

      total[k] += x
      x = total[k]
    # Overwritten until the last query heads have added theirs.
    ref = getattr(dsteps, name)
    ref[k, 0] = x.astype(ref.dtype)


def chunk(
  scale: float,
  state: Float[Array, 'P V'],
  steps: Steps,
  segments: SegmentRows | None,
) -> tuple[Float[Array, 'C V'], Float[Array, 'P V']]:
  """(out, next state) of one chunk of one head, as `chunked.chunk` has them.

  Args:
    scale: factor of the output.
    state: what enters.
    steps: matrices [C, ...], and rows [1, C] of what is one number per step.
    segments: None where there is one only.
  """
  q, k, v, beta, log_decay = steps
  if beta is None:
    (scores,), (q,), k, decay = products([q], k, log_decay, segments)
    u = v
  else:
    # A key asks what the state holds for it, as a query does.
    (scores, overlaps), (q, reader), k, decay = products(
      [q, k], k, log_decay, segments
    )
    beta = beta.T
    i, j = indices(k.shape[0])
    below = jnp.where(i > j, beta * overlaps, 0)
    u = _solve(below, beta * (v - product(reader, state)))
  out = product(scores, u) + product(q, state)
  return scale * out, decay * state + product(k, u, 'TN')


@jax.custom_vjp
def _solve(
  below: Float[Array, 'C C'], right: Float[Array, 'C V']
) -> Float[Array, 'C V']:
  """(I + below)^-1 right, of a strictly lower triangular matrix."""
  return product(_inverse(below), right)


def _solve_fwd(
  below: Float[Array, 'C C'], right: Float[Array, 'C V']
) -> tuple[Array, tuple[Array, Array]]:
  inverse = _inverse(below)
  solution = product(inverse, right)
  return solution, (inverse, solution)


def _solve_bwd(
  saved: tuple[Array, Array], dsolution: Float[Array, 'C V']
) -> tuple[Float[Array, 'C C'], Float[Array, 'C V']]:
  inverse, solution = saved
  dright = product(inverse, dsolution, 'TN')
  return -product(dright, solution, 'NT'), dright


_solve.defvjp(_solve_fwd, _solve_bwd)


def _inverse(below: Float[Array, 'C C']) -> Float[Array, 'C C']:
  """(I + below)^-1 by halves, as in chunked.py, of whole matrices.

  The inverses of all blocks of `size` steps on the diagonal, in one matrix,
  make those of twice as many steps.
  """
  C = below.shape[0]
  i, j = indices(C)
  # Where i and j are in the two halves of a block.
  rest = lambda size: jnp.where(((i ^ j) & -size) == size, below, 0)
  inverse = (i == j).astype(below.dtype) - rest(1)
  exact = functools.partial(product, form='NN', exact=True)
  size = 2
  while size < C:
    # Only second halves change; whole tiles of rows can be taken apart.
    begins = range(size, C, 2 * size) if size >= _TILE_ROWS else [0]
    rows = size if size >= _TILE_ROWS else C
    changing = [inverse[n : n + rows] for n in begins]
    change = exact(exact(jnp.concatenate(changing), rest(size)), inverse)
    parts = []
    for m, n in enumerate(begins):
      parts += [inverse[n - rows : n]] if n else []
      parts.append(changing[m] - change[m * rows : (m + 1) * rows])
    inverse = jnp.concatenate(parts)
    size *= 2
  return inverse


def _heads(layout: ChunkLayout) -> list[tuple[int, int, Any]]:
  """(key head, query head in the block, query head in the state) of a step."""
  first = 0
  if layout.query_heads < layout.G:
    first = pl.program_id(3) * layout.query_heads
  return [
    (k, g, first + g)
    for k in range(layout.key_heads)
    for g in range(layout.query_heads)
  ]


def _read(steps: Steps, k: int, g: int) -> Steps:
  """The steps of one query head."""
  return steps.map(
    lambda name, x: x[k, 0 if name in KEY_HEADS else g].astype(jnp.float32)
  )


def _read_segments(segments: Int[Ref, '2 C'] | None) -> SegmentRows | None:
  if segments is None:
    return None
  rows = segments[...]
  return SegmentRows(rows[:1], rows[1:])
