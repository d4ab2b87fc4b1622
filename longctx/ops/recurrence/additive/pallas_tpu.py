"""Linear attention as Pallas kernels for TPUs: the chunks of chunked.py.

A kernel computes C = 128 steps of several heads at a time, as many as a TPU's
vectors are long, and keeps their states in VMEM; see chunks_tpu.py.
"""

import functools

import jax

from longctx.ops.recurrence import chunks
from longctx.ops.recurrence.additive import chunked
from longctx.ops.recurrence.chunks_tpu import ChunkBlocks, Kernel, scan_chunks
from longctx.ops.recurrence.products_tpu import product, product_costs, products
from longctx.ops.target import target
from longctx.typing import Array, Float, Int

_CHUNK = 128


def linear_attention(
  q: Float[Array, 'B T N P'],
  k: Float[Array, 'B T K P'],
  v: Float[Array, 'B T K V'],
  *,
  log_decay: Float[Array, 'B T N'] | Float[Array, 'B T N P'] | None,
  scale: float,
  segment_index: Int[Array, 'B T'] | None,
  initial_state: Float[Array, 'B N P V'],
  chunk_size: int,
  out_dtype: jax.typing.DTypeLike | None = None,
) -> tuple[Float[Array, 'B T N V'], Float[Array, 'B N P V']]:
  """The recurrence of reference.py, chunk by chunk; same arguments, same sums.

  Time T (C (P + V) + 2 P V) per head, and with a decay per channel
  T C P log2(C) more. The backward pass keeps the inputs only and computes the
  T/C states between chunks again (memory T P V / C per head while it runs).
  Query heads that share a key head read one copy of it. Products of float32
  have JAX's default matmul precision; what is between one pass in bfloat16 and
  full precision counts as full.

  Args:
    chunk_size: not used; the kernel has sizes of its own.
    out_dtype: of out; None: that of `initial_state`.
  """
  del chunk_size
  T, N, P = q.shape[1:]
  K, V = v.shape[2:]
  by_channel = log_decay is not None and log_decay.ndim == 4
  sizes = ChunkBlocks.choose(
    T=T, K=K, G=N // K, P=P, V=V, chunk=_CHUNK, heads=2 if by_channel else 4
  )
  inputs = dict(q=q, k=k, v=v)
  if log_decay is not None:
    inputs['log_decay'] = log_decay
  C = sizes.chunk
  scores, exponentials = product_costs(C, P, log_decay)
  kernel = Kernel(
    'linear_attention',
    functools.partial(_chunk, scale),
    functools.partial(_plain, scale),
    sizes,
    flops=scores + 2 * C * (C * V + 2 * P * V),
    exponentials=exponentials,
    out_dtype=out_dtype or initial_state.dtype,
    interpret=target().platform != 'tpu',
  )
  return scan_chunks(kernel, initial_state, inputs, segment_index)


def _chunk(scale, state, inputs, segments):
  """(out [C, V], next state [P, V]) of one chunk of one head."""
  (scores,), (q,), k, chunk_decay = products(
    [inputs['q']], inputs['k'], inputs.get('log_decay'), segments
  )
  v = inputs['v']
  out = product(scores, v) + product(q, state)
  return scale * out, chunk_decay * state + product(k, v, 'TN')


def _plain(scale, state, inputs, segment_index):
  out, state = chunks.scan_chunks(
    chunked.chunk,
    state,
    tuple(inputs.get(name) for name in ('q', 'k', 'v', 'log_decay')),
    segment_index,
    chunk_size=_CHUNK // 2,
    own_vjp=False,
  )
  return scale * out, state
