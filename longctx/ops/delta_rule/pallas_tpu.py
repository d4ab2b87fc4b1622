"""The gated delta rule as Pallas kernels for TPUs: the chunks of chunked.py.

A kernel computes a chunk of several heads at a time and keeps their states in
VMEM; see `ops.chunks_tpu`.
"""

import functools

import jax
import jax.numpy as jnp

from longctx.ops import chunks
from longctx.ops.chunks_tpu import (
  BlockSizes,
  Kernel,
  check_supported,
  scan_chunks,
)
from longctx.ops.delta_rule import chunked
from longctx.ops.products_tpu import indices, product, products
from longctx.ops.target import target
from longctx.typing import Array, Float, Int

_CHUNK = 128
_HEADS = 4


def gated_delta_rule(
  q: Float[Array, 'B T N P'],
  k: Float[Array, 'B T K P'],
  v: Float[Array, 'B T K V'],
  beta: Float[Array, 'B T N'],
  *,
  log_decay: Float[Array, 'B T N'] | Float[Array, 'B T N P'] | None,
  scale: float,
  document: Int[Array, 'B T'] | None,
  initial_state: Float[Array, 'B N P V'],
  chunk_size: int,
  out_dtype: jax.typing.DTypeLike | None = None,
) -> tuple[Float[Array, 'B T N V'], Float[Array, 'B N P V']]:
  """The recurrence of reference.py, chunk by chunk; same arguments, same sums.

  Raises:
    NotImplementedError: if the kernel does not take the call; see
      `chunks_tpu.why_unsupported`.
  """
  check_supported(q, k, v)
  T, N, P = q.shape[1:]
  K, V = v.shape[2:]
  sizes = BlockSizes.choose(T=T, K=K, G=N // K, chunk=_CHUNK, heads=_HEADS)
  inputs = dict(q=q, k=k, v=v, beta=beta)
  if log_decay is not None:
    inputs['log_decay'] = log_decay
  C = sizes.chunk
  levels = 1
  exponentials = 0
  if log_decay is not None:
    exponentials = C * (C + 3)
  if log_decay is not None and log_decay.ndim == 4:
    levels = C.bit_length()
    exponentials = (levels + 2) * C * P
  solving = 2 * 6 * (C.bit_length() - 2) * C
  kernel = Kernel(
    'delta_rule',
    functools.partial(_chunk, scale),
    functools.partial(_plain, scale),
    sizes,
    flops=2 * C * (C * (2 * levels * P + 2 * V + solving) + 3 * P * V),
    exponentials=exponentials,
    out_dtype=out_dtype or initial_state.dtype,
    interpret=target().platform != 'tpu',
  )
  return scan_chunks(kernel, initial_state, inputs, document)


def _chunk(scale, state, inputs, documents):
  """(out [C, V], next state [P, V]) of one chunk of one head."""
  k = inputs['k']
  # A key asks what the state holds for it, as a query does.
  (scores, overlaps), (q, reader), k, kept = products(
    [inputs['q'], k], k, inputs.get('log_decay'), documents
  )
  beta = inputs['beta'].T
  i, j = indices(k.shape[0])
  below = jnp.where(i > j, beta * overlaps, 0)
  u = _solve(below, beta * (inputs['v'] - product(reader, state)))
  out = product(scores, u) + product(q, state)
  return scale * out, kept * state + product(k, u, 'TN')


@jax.custom_vjp
def _solve(below, right):
  """(I + below)^-1 right, of a strictly lower triangular matrix [C, C]."""
  return product(_inverse(below), right)


def _solve_fwd(below, right):
  inverse = _inverse(below)
  solution = product(inverse, right)
  return solution, (inverse, solution)


def _solve_bwd(saved, bar):
  inverse, solution = saved
  bar = product(inverse, bar, 'TN')
  return -product(bar, solution, 'NT'), bar


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
  size = 2
  while size < C:
    change = product(
      product(inverse, rest(size), 'NN', True), inverse, 'NN', True
    )
    inverse = inverse - change
    size *= 2
  return inverse


def _plain(scale, state, inputs, document):
  names = ('q', 'k', 'v', 'beta', 'log_decay')
  out, state = chunks.scan_chunks(
    chunked.chunk,
    state,
    tuple(inputs.get(name) for name in names),
    document,
    chunk_size=64,
    own_vjp=False,
  )
  return scale * out, state
