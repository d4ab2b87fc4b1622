"""Linear attention in chunks of C steps: matrix products, and a custom VJP.

With L_t the sum of log_decay from the start of the chunk to t, and S the state
before the chunk,

  out_i = scale ( exp(L_i) q_i S + Σ_{j<=i} (q_i · exp(L_i - L_j) k_j) v_j )
  S'    = exp(L_C) S + Σ_j exp(L_C - L_j) k_j v_jᵀ

which is the form of Mamba-2 (arXiv 2405.21060) for one decay per head and of
GLA (arXiv 2312.06635) for one decay per head and channel.
"""

import jax
import jax.numpy as jnp

from longctx.ops.recurrence.chunks import products, scan_chunks
from longctx.typing import Array, Float, Int


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

  Time T (C (P + V) + 2 P V) per head. The backward pass keeps the inputs only
  and computes the T/C states between chunks again (memory T P V / C per head
  while it runs). Any T works: the last chunk is padded with steps that change
  nothing. Products of float32 have JAX's default matmul precision.
  """
  out, state = scan_chunks(
    chunk,
    initial_state,
    (q, k, v, log_decay),
    segment_index,
    chunk_size=chunk_size,
  )
  return (scale * out).astype(out_dtype or state.dtype), state


def chunk(state, inputs, segments):
  """(out [B, C, N, V], next state) of one chunk, in the dtype of `state`."""
  q, k, v, log_decay = inputs
  group = q.shape[2] // k.shape[2]
  k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
  # [B, N, C, ...] from here to the end.
  q, k, v = (jnp.swapaxes(x.astype(state.dtype), 1, 2) for x in (q, k, v))
  if log_decay is not None:
    log_decay = jnp.swapaxes(log_decay.astype(state.dtype), 1, 2)
    log_decay = log_decay.reshape(*q.shape[:3], -1)
  scores, q, k, chunk_decay = products(q, k, log_decay, segments)
  out = scores @ v + q @ state
  return jnp.swapaxes(out, 1, 2), chunk_decay * state + jnp.swapaxes(
    k, -1, -2
  ) @ v
