"""Flash attention for TPUs: Pallas kernels over a flat work list.

The equations are those of `xla`. Three kernels, each with a grid of batch rows,
heads and list entries:

    forward   for a block of queries, over the blocks of keys that it reads
    dq        the same blocks again
    dk, dv    for a block of keys, over the blocks of queries that read it, and
              over the query heads that share the key head

The list is in scalar memory before a kernel starts, so that blocks are fetched
while others are computed. Scores lie transposed, keys by queries: then maxima,
sums and lse are rows of one number per query, which fill the lanes of a vector
register, where columns would fill one lane of each.

Sums are float32. Products of bfloat16 are exact, and the weights are rounded to
the dtype of the values that they meet.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from longctx import masks
from longctx.ops import tpu
from longctx.ops.dot_product_attention import pallas_tpu_kernels as kernels
from longctx.ops.dot_product_attention.args import (
  AttentionArgs,
  Gradients,
  OutLse,
)
from longctx.ops.dot_product_attention.flash import Backend
from longctx.ops.dot_product_attention.pallas_tpu_call import (
  Operand,
  call_kernel,
)
from longctx.ops.dot_product_attention.pallas_tpu_tiling import make_tiling
from longctx.ops.dot_product_attention.pallas_tpu_work_list import (
  make_flat_list,
)
from longctx.ops.dot_product_attention.tiling import Tiling
from longctx.ops.target import target
from longctx.ops.tpu import LANES
from longctx.typing import Array, Float

DTYPES = ('float32', 'bfloat16')

# Heads wider than this leave no room for blocks that fill the chip.
WIDEST_HEAD = 256


def unsupported_reason(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K V'],
  args: AttentionArgs,
  *,
  uses_lse: bool,
) -> str | None:
  """Why the kernels do not support a call, or None where they do."""
  del uses_lse
  if reason := tpu.unsupported_reason(target()):
    return reason
  dtypes = {x.dtype.name for x in (q, k, v)}
  if len(dtypes) > 1 or not dtypes <= set(DTYPES):
    return (
      f'q, k and v are of {sorted(dtypes)}, and must all be of one {DTYPES}'
    )
  H, V = q.shape[-1], v.shape[-1]
  if max(H, V) > WIDEST_HEAD:
    return f'{H=} and {V=} must be at most {WIDEST_HEAD}'
  for name, size in dataclasses.asdict(args.static.block_sizes).items():
    if name.startswith('block_') and size is not None and size % LANES:
      return f'{name}={size} must be a multiple of {LANES}'
  for primitive in args.static.mask.primitives():
    if isinstance(primitive, masks.BlockSparse) and not primitive.is_small:
      return (
        f'a pattern of {len(primitive.pattern)} x '
        f'{len(primitive.pattern[0])} blocks is too large to be looked up in a '
        'kernel'
      )
  return None


def _differentiated_once(function: Callable[..., Any]) -> Callable[..., Any]:
  """A pass of the custom derivative, which has no derivative of its own."""
  # Their last argument is a dtype.
  last = len(inspect.signature(function).parameters) - 1
  function = jax.custom_jvp(function, nondiff_argnums=(last,))

  @function.defjvp
  def refuse(*_):
    raise NotImplementedError(
      "implementation='pallas' has no second derivative: take "
      "implementation='xla' where gradients are differentiated again"
    )

  return function


@_differentiated_once
def _forward(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K V'],
  args: AttentionArgs,
  dtype: Any = None,
) -> OutLse:
  t = _tiling(q, k, args, backward=False)
  dtype = jnp.float32 if dtype is None else dtype
  rows, V = q.shape[:3], v.shape[-1]
  out, lse = _run(
    kernels.forward,
    t,
    args,
    [_heads('q', q), _heads('k', k), _heads('k', v)],
    [
      Operand('q', 'heads', (*rows, V), dtype),
      Operand('q', 'row', rows, jnp.float32),
    ],
    [(1, t.block_q), (1, t.block_q), (V, t.block_q)],
    by_column=False,
    products=2,
  )
  return out, lse


@_differentiated_once
def _backward(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K V'],
  args: AttentionArgs,
  lse: Float[Array, 'B T N'],
  dout: Float[Array, 'B T N V'],
  delta: Float[Array, 'B T N'],
  dtype: Any = None,
) -> Gradients:
  t = _tiling(q, k, args, backward=True)
  # exp(z - inf) = 0: rows without keys, and padded rows, have no weights.
  lse = jnp.where(lse == -jnp.inf, jnp.inf, lse)
  dtype = jnp.float32 if dtype is None else dtype
  rows, H, V = q.shape[:3], q.shape[-1], v.shape[-1]
  inputs = [
    _heads('q', q),
    _heads('k', k),
    _heads('k', v),
    _heads('q', dout.astype(v.dtype)),
    (Operand('q', 'row', rows, lse.dtype, fill=jnp.inf), lse),
    (Operand('q', 'row', rows, delta.dtype), delta),
  ]
  (dq,) = _run(
    kernels.dq,
    t,
    args,
    inputs,
    [Operand('q', 'heads', q.shape, dtype)],
    [(H, t.block_q)],
    by_column=False,
    products=3,
  )
  dk, dv = _run(
    kernels.dkv,
    t,
    args,
    inputs,
    [Operand('k', 'heads', x.shape, dtype) for x in (k, v)],
    [(t.block_k, H), (t.block_k, V)],
    by_column=True,
    products=4,
  )
  return dq, dk, dv


@dataclasses.dataclass(frozen=True)
class PallasTPUBackend(Backend):
  """Flash attention backend 'pallas'; interpreted on a CPU, which is slow."""

  forward = staticmethod(_forward)
  backward = staticmethod(_backward)


def _tiling(
  q: Array, k: Array, args: AttentionArgs, *, backward: bool
) -> Tiling:
  B, T, N, H = q.shape
  S, K = k.shape[1:3]
  return make_tiling(
    args.static.mask,
    (B, T, S, K, N // K),
    args.static.block_sizes,
    kind=target().kind,
    wide=H > LANES or q.dtype != jnp.bfloat16,
    backward=backward,
  )


def _heads(side: str, x: Array) -> tuple[Operand, Array]:
  return Operand(side, 'heads', x.shape, x.dtype), x


def _run(
  kernel: Callable[..., None],
  tiling: Tiling,
  args: AttentionArgs,
  inputs: list[tuple[Operand, Array]],
  outputs: list[Operand],
  scratch: list[tuple[int, ...]],
  *,
  by_column: bool,
  products: int,
) -> list[Array]:
  """The outputs of a kernel; see `pallas_tpu_call.call_kernel`."""
  work = make_flat_list(
    args.static.mask, tiling, args.indices, by_column=by_column
  )
  indices = {n: x for n, x in args.indices._asdict().items() if x is not None}
  places = [
    (Operand(name[0], 'index', x.shape, jnp.int32), x.astype(jnp.int32))
    for name, x in indices.items()
  ]
  scalars = []
  if args.alibi_slopes is not None:
    scalars.append(args.alibi_slopes.astype(jnp.float32))
  if args.dropout is not None:
    scalars.extend(kernels.dropout_scalars(args.dropout))

  def run(entries, call, *refs):
    refs = list(refs)
    take = lambda n: [refs.pop(0) for _ in range(n)]
    given, index_refs = take(len(inputs)), take(len(indices))
    slopes = take(1)[0] if args.alibi_slopes is not None else None
    dropout = take(2) if args.dropout is not None else None
    block = kernels.ScoreBlock(
      args.static,
      tiling,
      work.kinds,
      by_column=by_column,
      entries=entries,
      call=call,
      indices=dict(zip(indices, index_refs, strict=True)),
      slopes=slopes,
      dropout=dropout,
    )
    kernel(block, *given, *refs)

  return call_kernel(
    run,
    work,
    tiling,
    [*inputs, *places],
    scalars,
    outputs,
    scratch,
    by_column=by_column,
    products=products,
    name=f'attention_{kernel.__name__}',
  )
