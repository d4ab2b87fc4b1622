"""The gated delta rule as Pallas kernels for TPUs: the chunks of chunked.py.

A kernel computes a chunk of several heads at a time and keeps their states in
VMEM; see chunks_tpu.py.
"""

import functools

import jax
import jax.numpy as jnp

from longctx.ops.recurrence import chunks
from longctx.ops.recurrence.chunks_tpu import ChunkBlocks, Kernel, scan_chunks
from longctx.ops.recurrence.delta import chunked
from longctx.ops.recurrence.products_tpu import (
  indices,
  product,
  product_costs,
  products,
)
from longctx.ops.target import target
from longctx.typing import Array, Float, Int

_LARGEST_CHUNK = 128
# Of float32.
_TILE_ROWS = 8


def gated_delta_rule(
  q: Float[Array, 'B T N P'],
  k: Float[Array, 'B T K P'],
  v: Float[Array, 'B T K V'],
  beta: Float[Array, 'B T N'],
  *,
  log_decay: Float[Array, 'B T N'] | Float[Array, 'B T N P'] | None,
  scale: float,
  segment_index: Int[Array, 'B T'] | None,
  initial_state: Float[Array, 'B N P V'],
  chunk_size: int,
  out_dtype: jax.typing.DTypeLike | None = None,
) -> tuple[Float[Array, 'B T N V'], Float[Array, 'B N P V']]:
  """The recurrence of reference.py, chunk by chunk; same arguments, same sums.

  Time T (2 C (P + V) + C² log2(C) + 3 P V) per head, and with a decay per
  channel 2 T C P log2(C) more. The backward pass keeps the inputs only and
  computes the T/C states between chunks again (memory T P V / C per head while
  it runs). Query heads that share a key head read one copy of it. Products of
  float32 have JAX's default matmul precision, as `linear_attention`'s kernels
  read it, those that solve the system the full one.

  Args:
    chunk_size: C is the next power of two, from 16 to 128.
    out_dtype: of out; None: that of `initial_state`.
  """
  T, N, P = q.shape[1:]
  K, V = v.shape[2:]
  by_channel = log_decay is not None and log_decay.ndim == 4
  sizes = ChunkBlocks.choose(
    T=T,
    K=K,
    G=N // K,
    P=P,
    V=V,
    chunk=min(1 << (chunk_size - 1).bit_length(), _LARGEST_CHUNK),
    heads=2 if by_channel else 4,
  )
  inputs = dict(q=q, k=k, v=v, beta=beta)
  if log_decay is not None:
    inputs['log_decay'] = log_decay
  C = sizes.chunk
  scores, exponentials = product_costs(C, P, log_decay)
  # A product in full precision is six in bfloat16.
  solving = 6 * 2 * C**3 * C.bit_length()
  kernel = Kernel(
    'delta_rule',
    functools.partial(_chunk, scale),
    functools.partial(_plain, scale),
    sizes,
    flops=2 * scores + solving + 2 * C * (2 * C * V + 3 * P * V),
    exponentials=exponentials,
    out_dtype=out_dtype or initial_state.dtype,
    interpret=target().platform != 'tpu',
  )
  return scan_chunks(kernel, initial_state, inputs, segment_index)


def _chunk(scale, state, inputs, segments):
  """(out [C, V], next state [P, V]) of one chunk of one head."""
  k = inputs['k']
  # A key asks what the state holds for it, as a query does.
  (scores, overlaps), (q, reader), k, chunk_decay = products(
    [inputs['q'], k], k, inputs.get('log_decay'), segments
  )
  beta = inputs['beta'].T
  i, j = indices(k.shape[0])
  below = jnp.where(i > j, beta * overlaps, 0)
  u = _solve(below, beta * (inputs['v'] - product(reader, state)))
  out = product(scores, u) + product(q, state)
  return scale * out, chunk_decay * state + product(k, u, 'TN')


@jax.custom_vjp
def _solve(below, right):
  """(I + below)^-1 right, of a strictly lower triangular matrix [C, C]."""
  return product(_inverse(below), right)


def _solve_fwd(below, right):
  inverse = _inverse(below)
  solution = product(inverse, right)
  return solution, (inverse, solution)


def _solve_bwd(saved, dsolution):
  inverse, solution = saved
  dright = product(inverse, dsolution, 'TN')
  return -product(dright, solution, 'NT'), dright


_solve.defvjp(_solve_fwd, _solve_bwd)


def _inverse(below):
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


def _plain(scale, state, inputs, segment_index):
  names = ('q', 'k', 'v', 'beta', 'log_decay')
  out, state = chunks.scan_chunks(
    chunked.chunk,
    state,
    tuple(inputs.get(name) for name in names),
    segment_index,
    chunk_size=64,
    own_vjp=False,
  )
  return scale * out, state
