"""Chunkwise linear attention and the delta rule (WY form), with a custom VJP.

With L_t the sum of log_decay from the start of the chunk to t, and S the state
before the chunk, every step writes one row u_i,

  out_i = scale ( exp(L_i) q_i S + Σ_{j<=i} (q_i · exp(L_i - L_j) k_j) u_j )
  S'    = exp(L_C) S + Σ_j exp(L_C - L_j) k_j u_jᵀ

In linear attention u = v, which is the form of Mamba-2 (arXiv 2405.21060) for
one decay per head and of GLA (arXiv 2312.06635) for one decay per head and
channel. In the delta rule

  u_i   = beta_i ( v_i - exp(L_i) k_i S
                   - Σ_{j<i} (k_i · exp(L_i - L_j) k_j) u_j )

so all u of a chunk are the solution of one unit lower triangular system of size
C (DeltaNet, arXiv 2406.06484; with one decay per head, Gated DeltaNet, arXiv
2412.06464; with one per head and channel, Kimi Linear, arXiv 2510.26692).

Where beta |k|² is near 2 and the keys of a chunk are nearly parallel, that
system is ill conditioned, by a factor that grows as C²: the u then alternate in
sign and cancel in S. Smaller chunks are the remedy.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from longctx.ops.recurrence.chunk_products import ChunkSegments, products
from longctx.ops.recurrence.steps import Results, SegmentIndex, State, Steps
from longctx.typing import Array, Float

_Stacked = Float[Array, 'L B C N V']
_Inputs = tuple[State, Steps, ChunkSegments | None]


def recurrence(
  steps: Steps,
  state: State,
  segment_index: SegmentIndex,
  *,
  scale: float,
  chunk_size: int,
  out_dtype: jax.typing.DTypeLike,
  own_vjp: bool = True,
) -> Results:
  """The recurrence of reference.py, chunk by chunk; same arguments, same sums.

  Time T (C (P + V) + 2 P V) per head, and with beta
  T (2 C (P + V) + C² / 3 + 3 P V). The backward pass keeps the inputs only and
  computes the T/C states between chunks again (memory T P V / C per head while
  it runs); it can itself be differentiated, forwards and backwards, with a few
  times that memory. Any T works: the last chunk is padded with steps that
  change nothing. Products of float32 have JAX's default matmul precision, those
  that solve the system the full one.

  Args:
    chunk_size: C, best a power of two for the sake of halving. A sequence that
      is shorter makes one chunk, as long as the next power of two.
    own_vjp: if not, JAX derives the backward pass, which keeps every state, and
      the scan can be differentiated forwards too.
  """
  B, T = steps.q.shape[:2]
  chunk_size = min(chunk_size, 1 << (T - 1).bit_length())
  pad = -T % chunk_size

  def split(x: Array, mode: str = 'constant') -> Array:
    x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2), mode=mode)
    x = x.reshape(B, -1, chunk_size, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)

  segments = None
  if segment_index is not None:
    within = split(segment_index, 'edge')
    before = jnp.concatenate(
      [jnp.zeros_like(within[:1, :, 0]), within[:-1, :, -1]]
    )
    segments = ChunkSegments(within, before)
  scan = _scan if own_vjp else _scan_forward
  out, state = scan(state, jax.tree.map(split, steps), segments)
  out = jnp.moveaxis(out, 0, 1).reshape(B, -1, *out.shape[3:])
  return (scale * out[:, :T]).astype(out_dtype), state


def _scan_forward(
  state: State, steps: Steps, segments: ChunkSegments | None
) -> tuple[_Stacked, State]:
  """(out, last state) of arrays that are stacked chunk by chunk."""

  def step(state, stacked):
    out, state = chunk(state, *stacked)
    return state, out

  state, out = jax.lax.scan(_recomputed(step), state, (steps, segments))
  return out, state


_scan = jax.custom_vjp(_scan_forward)


def _scan_fwd(*inputs: Any) -> tuple[tuple[_Stacked, State], _Inputs]:
  return _scan_forward(*inputs), inputs


def _scan_bwd(
  inputs: _Inputs, dresults: tuple[_Stacked, State]
) -> tuple[State, Steps, None]:
  state, steps, segments = inputs
  dout, dstate = dresults

  def forward(state, stacked):
    # The output of the chunk is not used, so XLA does not compute it.
    return chunk(state, *stacked)[1], state

  def backward(dstate, stacked):
    state, steps, segments, dout = stacked
    _, vjp = jax.vjp(lambda *x: chunk(*x, segments), state, steps)
    return vjp((dout, dstate))

  _, states = jax.lax.scan(_recomputed(forward), state, (steps, segments))
  dstate, dsteps = jax.lax.scan(
    _recomputed(backward),
    dstate,
    (states, steps, segments, dout),
    reverse=True,
  )
  return dstate, dsteps, None


def _recomputed(step: Callable[..., Any]) -> Callable[..., Any]:
  """A step of which a second derivative keeps what it is given, and no more."""
  return jax.checkpoint(step, prevent_cse=False)


_scan.defvjp(_scan_fwd, _scan_bwd)


def chunk(
  state: State, steps: Steps, segments: ChunkSegments | None
) -> tuple[Float[Array, 'B C N V'], State]:
  """(out, next state) of one chunk, in the dtype of `state`."""
  # [B, N, C, ...] from here to the end.
  q, k, v, beta, log_decay = jax.tree.map(
    lambda x: jnp.swapaxes(x, 1, 2), steps.per_query_head(state.dtype)
  )
  if log_decay is not None:
    log_decay = log_decay.reshape(*q.shape[:3], -1)
  if beta is None:
    scores, q, k, decay = products(q, k, log_decay, segments)
    u = v
  else:
    # A key asks what the state holds for it, as a query does.
    (scores, overlaps), (q, reader), k, decay = products(
      jnp.stack([q, k]), k, log_decay, segments
    )
    beta = beta[..., None]
    inverse = _inverse(beta * jnp.tril(overlaps, -1))
    u = inverse @ (beta * (v - reader @ state))
  out = scores @ u + q @ state
  return jnp.swapaxes(out, 1, 2), decay * state + jnp.swapaxes(k, -1, -2) @ u


def _inverse(below: Float[Array, '... C C']) -> Float[Array, '... C C']:
  """(I + below)^-1 of strictly lower triangular matrices.

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


def _inverse_of_all(below: Float[Array, 'M C C']) -> Float[Array, 'M C C']:
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
