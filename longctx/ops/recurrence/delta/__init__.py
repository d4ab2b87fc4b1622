"""The gated delta rule: a matrix state per head that corrects itself."""

import jax.numpy as jnp

from longctx.ops.recurrence import chunks_tpu
from longctx.ops.recurrence.chunks import index_segments
from longctx.ops.recurrence.delta import chunked, pallas_tpu, reference
from longctx.ops.target import target
from longctx.typing import Array, Float, Int

IMPLEMENTATIONS = {
  'reference': reference.gated_delta_rule,
  'xla': chunked.gated_delta_rule,
  'pallas': pallas_tpu.gated_delta_rule,
}


def gated_delta_rule(
  q: Float[Array, 'B T N P'],
  k: Float[Array, 'B T K P'],
  v: Float[Array, 'B T K V'],
  beta: Float[Array, 'B T N'],
  *,
  log_decay: Float[Array, 'B T N'] | Float[Array, 'B T N P'] | None = None,
  scale: float = 1.0,
  segment_ids: Int[Array, 'B T'] | None = None,
  initial_state: Float[Array, 'B N P V'] | None = None,
  chunk_size: int = 64,
  implementation: str | None = None,
) -> tuple[Float[Array, 'B T N V'], Float[Array, 'B N P V']]:
  """A linear memory that replaces what it held for a key, rather than adding.

    S_t = (I - beta_t k_t k_tᵀ) exp(log_decay_t) S_{t-1} + beta_t k_t v_tᵀ
    out_t = scale q_t S_t

  For a key of length one, k_t S_t = (1 - beta_t) k_t S_{t-1} + beta_t v_t: a
  step of size beta_t of gradient descent on |k_t S - v_t|² / 2.

  DeltaNet (Yang et al., arXiv 2406.06484) has no decay, Gated DeltaNet (Yang et
  al., arXiv 2412.06464) one per head, Kimi Delta Attention (Kimi Linear, arXiv
  2510.26692) one per head and channel of the key.

  Time T (2 C (P + V) + C² / 3 + 3 P V) per head in chunks of C steps; state P V
  numbers per head, whatever T.

  Args:
    q: queries. k, v: keys and values; K divides N, and N/K neighbouring query
      heads share a key head (each with a state of its own). The caller divides
      keys by their length.
    beta: the size of a step. A key's row of the state is shrunk by
      1 - beta |k|², so the state stays bounded where beta |k|² is in [0, 2].
    log_decay: <= 0, in nats per step; one per head or one per head and channel
      of the key. None: no decay. Anything below -100 counts as -100, which
      forgets everything. A positive value (growth) is right as long as no
      product of it overflows.
    scale: factor of the output.
    segment_ids: the state is set to zero wherever the id changes from one step
      to the next, so packed segments do not see each other.
    initial_state: S_0, as returned by an earlier call; the first segment
      continues it. None: zero.
    chunk_size: C of the chunked implementations, best a power of two; 'pallas'
      takes the next one from 16 to 128. Smaller ones are more precise where
      beta |k|² is near 2 and keys are nearly parallel.
    implementation: 'reference' (one step at a time), 'xla' (chunks), 'pallas'
      (chunks in kernels for TPUs; on a CPU they are interpreted, to check
      values), or None for the best that supports the call: 'pallas' on TPUs,
      else 'xla'.

  Returns:
    out, in the dtype of v, and the last state, in float32 (float64 for float64
    inputs), the dtype of all sums.

  Raises:
    ValueError: if shapes do not fit or `implementation` is not known.
    NotImplementedError: 'pallas' does not support the call: float64, GPUs, more
      than 512 channels.
  """
  _check(q, k, v, beta, log_decay, segment_ids, initial_state, chunk_size)
  B, _, N, P = q.shape
  dtype = jnp.promote_types(jnp.result_type(q, k, v), jnp.float32)
  if initial_state is None:
    initial_state = jnp.zeros((B, N, P, v.shape[-1]), dtype)
  out, state = _implementation(implementation, q, k, v)(
    q,
    k,
    v,
    beta,
    log_decay=log_decay,
    scale=scale,
    segment_index=index_segments(segment_ids),
    initial_state=initial_state.astype(dtype),
    chunk_size=chunk_size,
    out_dtype=v.dtype,
  )
  return out, state


def _implementation(name, q, k, v):
  if name is not None and name not in IMPLEMENTATIONS:
    raise ValueError(
      f'unknown implementation {name!r}; known: {sorted(IMPLEMENTATIONS)}'
    )
  if name == 'pallas' or (name is None and target().platform == 'tpu'):
    reason = chunks_tpu.unsupported_reason(q, k, v)
    if reason and name:
      raise NotImplementedError(f'implementation={name!r}: {reason}')
    name = 'xla' if reason else 'pallas'
  return IMPLEMENTATIONS[name or 'xla']


def _check(q, k, v, beta, log_decay, segment_ids, initial_state, chunk_size):
  B, T, N, P = q.shape
  K, V = v.shape[2:]
  if k.shape != (B, T, K, P) or v.shape[:2] != (B, T):
    raise ValueError(f'{q.shape=}, {k.shape=} and {v.shape=} do not fit')
  if T == 0:
    raise ValueError(f'{q.shape=} has no steps')
  if N % K:
    raise ValueError(f'{N=} query heads must be a multiple of {K=} key heads')
  if beta.shape != (B, T, N):
    raise ValueError(f'{beta.shape=} must be {(B, T, N)}, one per query head')
  if log_decay is not None and log_decay.shape not in (q.shape, q.shape[:3]):
    raise ValueError(f'{log_decay.shape=} must be {q.shape[:3]} or {q.shape}')
  if segment_ids is not None and segment_ids.shape != (B, T):
    raise ValueError(f'{segment_ids.shape=} must be {(B, T)}')
  if initial_state is not None and initial_state.shape != (B, N, P, V):
    raise ValueError(f'{initial_state.shape=} must be {(B, N, P, V)}')
  if chunk_size < 1:
    raise ValueError(f'{chunk_size=} must be at least 1')
