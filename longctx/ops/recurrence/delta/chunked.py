"""The gated delta rule in chunks of C steps: the WY form, and a custom VJP.

With L_t the sum of log_decay from the start of the chunk to t, and S the state
before the chunk, every step of the delta rule writes one row u_i,

  u_i   = beta_i ( v_i - exp(L_i) k_i S
                   - Σ_{j<i} (k_i · exp(L_i - L_j) k_j) u_j )
  out_i = scale ( exp(L_i) q_i S + Σ_{j<=i} (q_i · exp(L_i - L_j) k_j) u_j )
  S'    = exp(L_C) S + Σ_j exp(L_C - L_j) k_j u_jᵀ

which is linear attention of u in place of v. All u of a chunk are the solution
of one unit lower triangular system of size C (DeltaNet, arXiv 2406.06484; with
one decay per head, Gated DeltaNet, arXiv 2412.06464; with one per head and
channel, Kimi Linear, arXiv 2510.26692).

Where beta |k|² is near 2 and the keys of a chunk are nearly parallel, that
system is ill conditioned, by a factor that grows as C²: the u then alternate in
sign and cancel in S. Smaller chunks are the remedy.
"""

import functools

import jax
import jax.numpy as jnp

from longctx.ops.recurrence.chunks import products, scan_chunks
from longctx.typing import Array, Float, Int


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

  Time T (2 C (P + V) + C² / 3 + 3 P V) per head. The backward pass keeps the
  inputs only and computes the T/C states between chunks again (memory T P V / C
  per head while it runs). Any T works: the last chunk is padded with steps that
  change nothing. Products of float32 have JAX's default matmul precision, those
  that solve the system the full one.
  """
  out, state = scan_chunks(
    chunk,
    initial_state,
    (q, k, v, beta, log_decay),
    segment_index,
    chunk_size=chunk_size,
  )
  return (scale * out).astype(out_dtype or state.dtype), state


def chunk(state, inputs, segments):
  """(out [B, C, N, V], next state) of one chunk, in the dtype of `state`."""
  q, k, v, beta, log_decay = inputs
  group = q.shape[2] // k.shape[2]
  k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
  # [B, N, C, ...] from here to the end.
  q, k, v, beta = (
    jnp.swapaxes(x.astype(state.dtype), 1, 2) for x in (q, k, v, beta)
  )
  if log_decay is not None:
    log_decay = jnp.swapaxes(log_decay.astype(state.dtype), 1, 2)
    log_decay = log_decay.reshape(*q.shape[:3], -1)
  # A key asks what the state holds for it, as a query does.
  readers = jnp.stack([q, k])
  (scores, overlaps), (q, reader), k, chunk_decay = products(
    readers, k, log_decay, segments
  )
  beta = beta[..., None]
  inverse = _inverse(beta * jnp.tril(overlaps, -1))
  u = inverse @ (beta * (v - reader @ state))
  out = scores @ u + q @ state
  return jnp.swapaxes(out, 1, 2), chunk_decay * state + jnp.swapaxes(
    k, -1, -2
  ) @ u


def _inverse(below):
  """(I + below)^-1 of strictly lower triangular matrices [..., C, C].

  A solver for all C rows is one row after another. Of two halves, inverted
  both at once, the rest is matrix products,

    [ A 0 ]^-1   [     A^-1         0   ]
    [ X B ]    = [ -B^-1 X A^-1    B^-1 ]

  in full precision, whatever JAX's default: later rows build on the errors of
  earlier ones. No solver is called for small matrices either: on CPU (jaxlib
  0.10) two solves at a time can each wait for the thread that the other holds,
  and never end where there are two threads.
  """
  C = below.shape[-1]
  # One leading axis, along which halves lie, whatever their number.
  return _inverse_of_all(below.reshape(-1, C, C)).reshape(below.shape)


def _inverse_of_all(below):
  C = below.shape[-1]
  if C <= 2:
    return jnp.eye(C, dtype=below.dtype) - below
  if C % 2:
    one_more = jnp.pad(below, [(0, 0), (0, 1), (0, 1)])
    return _inverse_of_all(one_more)[:, :C, :C]
  half = C // 2
  first, rest = below[:, :half, :half], below[:, half:, :half]
  halves = jnp.concatenate([first, below[:, half:, half:]])
  first, second = jnp.split(_inverse_of_all(halves), 2)
  product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
  rest = -product(product(second, rest), first)
  return jnp.block([[first, jnp.zeros_like(rest)], [rest, second]])
