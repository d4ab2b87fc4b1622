"""Flash attention for TPUs: Pallas kernels over a flat work list.

The equations are those of `blockwise`, and so are the functions' names and
arguments: a ring takes either module. Three kernels, each with a grid of batch
rows, heads and list entries:

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
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from longctx import masks
from longctx.masks import Mask
from longctx.ops import tpu
from longctx.ops.dot_product_attention import pallas_tpu_kernels
from longctx.ops.dot_product_attention import xla as blockwise
from longctx.ops.dot_product_attention.dropout import Dropout
from longctx.ops.dot_product_attention.normalizers import Normalizer
from longctx.ops.dot_product_attention.pallas_tpu_call import (
  Operand,
  call_kernel,
)
from longctx.ops.dot_product_attention.pallas_tpu_tiling import make_tiling
from longctx.ops.dot_product_attention.pallas_tpu_work_list import (
  make_flat_list,
)
from longctx.ops.dot_product_attention.tiling import BlockSizes, Tiling
from longctx.ops.dot_product_attention.work_list import Indices
from longctx.ops.dot_product_attention.xla import add_sink, make_delta
from longctx.ops.dot_product_attention.xla_blocks import Extras
from longctx.ops.merge import merge
from longctx.ops.remat import keep
from longctx.ops.target import target
from longctx.ops.tpu import LANES
from longctx.typing import Array, Float, Int

DTYPES = ('float32', 'bfloat16')

# Heads wider than this leave no room for blocks that fill the chip.
WIDEST_HEAD = 256


@dataclasses.dataclass(frozen=True)
class Spec:
  """What does not depend on the arrays' contents.

  Attributes:
    forward: blocks of the forward kernel.
    backward: blocks of the two others.
    interpret: whether to run in Pallas's interpreter, for want of a TPU.
    xla: how `blockwise` does the same, for second derivatives.
  """

  mask: Mask
  scale: float
  logits_soft_cap: float | None
  normalizer: Normalizer
  forward: Tiling
  backward: Tiling
  interpret: bool
  xla: Any


def unsupported_reason(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K V'],
  *,
  mask: Mask,
  block_sizes: BlockSizes | None,
  **call: Any,
) -> str | None:
  """Why the kernels do not support a call, or None where they do."""
  del call
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
  sizes = dataclasses.asdict(block_sizes or BlockSizes())
  for name, size in sizes.items():
    if name.startswith('block_') and size is not None and size % LANES:
      return f'{name}={size} must be a multiple of {LANES}'
  for primitive in mask.primitives():
    if isinstance(primitive, masks.BlockSparse) and not primitive.is_small:
      return (
        f'a pattern of {len(primitive.pattern)} x '
        f'{len(primitive.pattern[0])} blocks is too large to be looked up in a '
        'kernel'
      )
  return None


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
  """Attention on TPUs; arguments as in the reference, memory O(T).

  On a CPU the kernels are interpreted, to check values: slow. Second
  derivatives are those of 'xla'; see `unsupported_reason` for the rest.

  Returns:
    out in the dtype of q, lse in float32.
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
  """As in `blockwise`."""
  B, T, N, H = q.shape
  S, K = k.shape[1:3]
  sizes = block_sizes or BlockSizes()
  forward, backward = (
    make_tiling(
      mask,
      (B, T, S, K, N // K),
      sizes,
      kind=target().kind,
      wide=H > LANES or q.dtype != jnp.bfloat16,
      backward=backward,
    )
    for backward in (False, True)
  )
  # Blocks of these sizes are no good for CPUs.
  xla = blockwise.make_spec(
    q,
    k,
    mask=mask,
    scale=scale,
    logits_soft_cap=logits_soft_cap,
    normalizer=normalizer,
    block_sizes=None,
  )
  interpret = target().platform == 'cpu'
  return Spec(
    mask,
    scale,
    logits_soft_cap,
    normalizer,
    forward,
    backward,
    interpret,
    xla,
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(spec: Spec, q, k, v, extras: Extras):
  return _attend_fwd(spec, q, k, v, extras)[0]


def _attend_fwd(spec: Spec, q, k, v, extras: Extras):
  out, lse = keep(*_forward(spec, q.dtype.name, q, k, v, extras))
  return (out, lse), (q, k, v, extras, out, lse)


def _attend_bwd(spec: Spec, residuals, cotangents):
  q, k, v, extras, out, lse = residuals
  dout, dlse = cotangents
  delta = make_delta(out, dout, dlse)
  grads = _backward(spec, q.dtype.name, q, k, v, extras, lse, dout, delta)
  return *grads, None


_attend.defvjp(_attend_fwd, _attend_bwd)


class Sums(NamedTuple):
  """What queries have found in the keys that they have seen."""

  out: Float[Array, 'B T N V']
  lse: Float[Array, 'B T N']


def forward(
  spec: Spec,
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K V'],
  extras: Extras,
) -> tuple[Float[Array, 'B T N V'], Float[Array, 'B T N']]:
  """(out, lse) over the keys given, both float32."""
  return _forward(spec, 'float32', q, k, v, extras)


def resume(
  spec: Spec, out: Float[Array, 'B T N V'], lse: Float[Array, 'B T N']
) -> Sums:
  """The sums that `finish` makes these of, to go on from."""
  del spec
  return Sums(out, lse)


def finish(
  spec: Spec, sums: Sums
) -> tuple[Float[Array, 'B T N V'], Float[Array, 'B T N']]:
  """(out, lse) of all the keys that were seen."""
  del spec
  return tuple(sums)


def add(
  spec: Spec,
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K V'],
  extras: Extras,
  sums: Sums,
) -> Sums:
  """The sums over these keys too."""
  return Sums(*merge(*sums, *forward(spec, q, k, v, extras)))


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
  """(dq, dk, dv) of the pairs of q and k, in float32."""
  return _backward(spec, 'float32', q, k, v, extras, lse, dout, delta)


def no_queries(spec: Spec, q: Float[Array, 'B T N H'], dtype: Any) -> Array:
  """Zeros for `add_gradients` to go on from."""
  del spec
  return jnp.zeros(q.shape, dtype)


def join_queries(
  spec: Spec, dq: Float[Array, 'B T N H']
) -> Float[Array, 'B T N H']:
  """The gradient of the queries, of what `add_gradients` has summed."""
  del spec
  return dq


def add_gradients(
  spec: Spec,
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K V'],
  extras: Extras,
  lse: Float[Array, 'B T N'],
  dout: Float[Array, 'B T N V'],
  delta: Float[Array, 'B T N'],
  dq: Float[Array, 'B T N H'],
) -> tuple[
  Float[Array, 'B T N H'], Float[Array, 'B S K H'], Float[Array, 'B S K V']
]:
  """`backward`, its dq added to the one given."""
  share, dk, dv = backward(spec, q, k, v, extras, lse, dout, delta)
  return dq + share, dk, dv


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _forward(spec: Spec, dtype: str, q, k, v, extras: Extras):
  """(out in a dtype, lse in float32)."""
  t = spec.forward
  rows = q.shape[:3]
  out, lse = _run(
    spec,
    t,
    extras,
    pallas_tpu_kernels.forward,
    [_heads('q', q), _heads('k', k), _heads('k', v)],
    [
      Operand('q', 'heads', (*rows, v.shape[-1]), jnp.dtype(dtype)),
      Operand('q', 'row', rows, jnp.float32),
    ],
    [(1, t.block_q), (1, t.block_q), (v.shape[-1], t.block_q)],
    by_column=False,
    products=2,
  )
  return out, lse


@_forward.defjvp
def _forward_jvp(spec: Spec, dtype: str, primals, tangents):
  q, k, v, extras = primals
  again = lambda *x: blockwise.forward(spec.xla, *x, extras)
  _, (out, lse) = jax.jvp(again, (q, k, v), tuple(tangents[:3]))
  return _forward(spec, dtype, *primals), (out.astype(dtype), lse)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _backward(spec: Spec, dtype: str, q, k, v, extras, lse, dout, delta):
  """(dq, dk, dv) in a dtype."""
  t = spec.backward
  # exp(z - inf) = 0: rows without keys, and padded rows, have no weights.
  lse = jnp.where(lse == -jnp.inf, jnp.inf, lse)
  rows = q.shape[:3]
  inputs = [
    _heads('q', q),
    _heads('k', k),
    _heads('k', v),
    _heads('q', dout.astype(v.dtype)),
    (Operand('q', 'row', rows, lse.dtype, fill=jnp.inf), lse),
    (Operand('q', 'row', rows, delta.dtype), delta),
  ]
  like = lambda side, x: Operand(side, 'heads', x.shape, jnp.dtype(dtype))
  H, V = q.shape[-1], v.shape[-1]
  (dq,) = _run(
    spec,
    t,
    extras,
    pallas_tpu_kernels.dq,
    inputs,
    [like('q', q)],
    [(H, t.block_q)],
    by_column=False,
    products=3,
  )
  dk, dv = _run(
    spec,
    t,
    extras,
    pallas_tpu_kernels.dkv,
    inputs,
    [like('k', k), like('k', v)],
    [(t.block_k, H), (t.block_k, V)],
    by_column=True,
    products=4,
  )
  return dq, dk, dv


@_backward.defjvp
def _backward_jvp(spec: Spec, dtype: str, primals, tangents):
  q, k, v, extras, *bars = primals
  again = lambda q, k, v, *bars: blockwise.backward(
    spec.xla, q, k, v, extras, *bars
  )
  moves = (*tangents[:3], *tangents[4:])
  _, grads = jax.jvp(again, (q, k, v, *bars), moves)
  grads = tuple(g.astype(dtype) for g in grads)
  return _backward(spec, dtype, *primals), grads


def _heads(side: str, x: Array) -> tuple[Operand, Array]:
  return Operand(side, 'heads', x.shape, x.dtype), x


def _run(
  spec: Spec,
  tiling: Tiling,
  extras: Extras,
  kernel: Any,
  inputs: list[tuple[Operand, Array]],
  outputs: list[Operand],
  scratch: list[tuple[int, ...]],
  *,
  by_column: bool,
  products: int,
) -> list[Array]:
  """The outputs of a kernel; see `pallas_tpu_call.call_kernel`."""
  work = make_flat_list(spec.mask, tiling, extras.indices, by_column=by_column)
  names, indices = [], []
  for name, x in extras.indices._asdict().items():
    if x is not None:
      names.append(name)
      operand = Operand(name[0], 'index', x.shape, jnp.int32)
      indices.append((operand, x.astype(jnp.int32)))
  scalars = []
  if extras.alibi_slopes is not None:
    scalars.append(extras.alibi_slopes.astype(jnp.float32))
  if extras.dropout is not None:
    scalars.extend(pallas_tpu_kernels.dropout_scalars(extras.dropout))

  def run(entries, call, *refs):
    refs = list(refs)
    take = lambda n: [refs.pop(0) for _ in range(n)]
    given, index_refs = take(len(inputs)), take(len(indices))
    slopes = take(1)[0] if extras.alibi_slopes is not None else None
    dropout = take(2) if extras.dropout is not None else None
    block = pallas_tpu_kernels.Block(
      spec,
      tiling,
      work.kinds,
      by_column=by_column,
      entries=entries,
      call=call,
      indices=dict(zip(names, index_refs, strict=True)),
      slopes=slopes,
      dropout=dropout,
    )
    kernel(block, *given, *refs)

  return call_kernel(
    run,
    work,
    tiling,
    [*inputs, *indices],
    scalars,
    outputs,
    scratch,
    by_column=by_column,
    products=products,
    interpret=spec.interpret,
    name=f'attention_{kernel.__name__}',
  )
