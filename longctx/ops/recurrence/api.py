"""Linear attention and the gated delta rule: one recurrence, by two names."""

import jax.numpy as jnp

from longctx.ops.recurrence import chunked, pallas_tpu, reference
from longctx.ops.recurrence.steps import Steps, index_segments
from longctx.ops.target import target
from longctx.typing import Array, Float, Int, check_floats

IMPLEMENTATIONS = {
  'reference': reference.recurrence,
  'xla': chunked.recurrence,
  'pallas': pallas_tpu.recurrence,
}


def linear_attention(
  q: Float[Array, 'B T N P'],
  k: Float[Array, 'B T K P'],
  v: Float[Array, 'B T K V'],
  *,
  log_decay: Float[Array, 'B T N'] | Float[Array, 'B T N P'] | None = None,
  scale: float = 1.0,
  segment_ids: Int[Array, 'B T'] | None = None,
  initial_state: Float[Array, 'B N P W'] | None = None,
  normalize: bool = False,
  chunk_size: int = 64,
  implementation: str | None = None,
) -> tuple[Float[Array, 'B T N V'], Float[Array, 'B N P W']]:
  """Attention whose past is one P × V matrix per head.

    S_t = exp(log_decay_t) S_{t-1} + k_t v_tᵀ        out_t = scale q_t S_t

  and, with `normalize`, out_t = q_t S_t / (q_t · z_t), where z is the sum of
  the keys under the same decay: z_t = exp(log_decay_t) z_{t-1} + k_t
  (Katharopoulos et al., arXiv 2006.16236, with q and k from a feature map).

  Time T C (P + V) + 2 T P V per head in chunks of C steps; state P V numbers
  per head, whatever T.

  Args:
    q: queries. k, v: keys and values; K divides N, and N/K neighbouring query
      heads share a key head (each with a state of its own).
    log_decay: <= 0, in nats per step; one per head (RetNet, Mamba-2) or one
      per head and channel of the key (GLA). None: no decay. Anything below
      -100 counts as -100, which forgets everything. A positive value (growth)
      is right as long as no product of it overflows.
    scale: factor of the output; cancels under `normalize`.
    segment_ids: the state is set to zero wherever the id changes from one step
      to the next, so packed segments do not see each other.
    initial_state: S_0, as returned by an earlier call; the first segment
      continues it. None: zero.
    normalize: divide by q_t · z_t; where that is zero, so is the output.
    chunk_size: C of 'xla'. 'pallas' has chunks of its own, of 128 steps.
    implementation: 'reference' (one step at a time), 'xla' (chunks), 'pallas'
      (chunks in kernels for TPUs; on a CPU they are interpreted, to check
      values), or None for the best that supports the call: 'pallas' on TPUs,
      else 'xla'.

  Returns:
    out, in the dtype of v, and the last state, in float32 (float64 for float64
    inputs), the dtype of all sums. The state is [B, N, P, V]; with `normalize`
    it is [B, N, P, V + 1], and its last column is z.

  Raises:
    ValueError: if shapes do not fit or `implementation` is not known.
    NotImplementedError: 'pallas' does not support the call: float64, GPUs, more
      than 512 channels.
  """
  return linear_recurrence(
    q,
    k,
    v,
    log_decay=log_decay,
    scale=scale,
    segment_ids=segment_ids,
    initial_state=initial_state,
    normalize=normalize,
    chunk_size=chunk_size,
    implementation=implementation,
  )


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
    q, k, v, log_decay, scale, segment_ids, initial_state, implementation: as in
      `linear_attention`. The caller divides keys by their length.
    beta: the size of a step. A key's row of the state is shrunk by
      1 - beta |k|², so the state stays bounded where beta |k|² is in [0, 2].
    chunk_size: C of the chunked implementations, best a power of two; 'pallas'
      takes the next one from 16 to 128. Smaller ones are more precise where
      beta |k|² is near 2 and keys are nearly parallel.

  Returns, Raises: as in `linear_attention`.
  """
  return linear_recurrence(
    q,
    k,
    v,
    beta,
    log_decay=log_decay,
    scale=scale,
    segment_ids=segment_ids,
    initial_state=initial_state,
    chunk_size=chunk_size,
    implementation=implementation,
  )


def linear_recurrence(
  q: Float[Array, 'B T N P'],
  k: Float[Array, 'B T K P'],
  v: Float[Array, 'B T K V'],
  beta: Float[Array, 'B T N'] | None = None,
  *,
  log_decay: Float[Array, 'B T N'] | Float[Array, 'B T N P'] | None = None,
  scale: float = 1.0,
  segment_ids: Int[Array, 'B T'] | None = None,
  initial_state: Float[Array, 'B N P W'] | None = None,
  normalize: bool = False,
  chunk_size: int = 64,
  implementation: str | None = None,
) -> tuple[Float[Array, 'B T N V'], Float[Array, 'B N P W']]:
  """Linear attention, or with `beta` the gated delta rule.

  Args and errors are theirs; the delta rule has nothing to normalize by.
  """
  _check(q, k, v, beta, log_decay, segment_ids, normalize, chunk_size)
  B, _, N, P = q.shape
  V = v.shape[-1]
  dtype = jnp.promote_types(jnp.result_type(q, k, v), jnp.float32)
  out_dtype = v.dtype
  if normalize:
    # z is the state of one more value, which is always one. A quotient is
    # rounded once, after the division.
    v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
    scale, out_dtype = 1.0, dtype
  state_shape = (B, N, P, v.shape[-1])
  if initial_state is None:
    initial_state = jnp.zeros(state_shape, dtype)
  if initial_state.shape != state_shape:
    raise ValueError(
      f'{initial_state.shape=} must be {state_shape} with {normalize=}'
    )
  out, state = _implementation(implementation, q, k, v)(
    Steps(q, k, v, beta, log_decay),
    initial_state.astype(dtype),
    index_segments(segment_ids),
    scale=scale,
    chunk_size=chunk_size,
    out_dtype=out_dtype,
  )
  if normalize:
    total = out[..., V:]
    out = jnp.where(
      total == 0, 0, out[..., :V] / jnp.where(total == 0, 1, total)
    )
  return out.astype(v.dtype), state


def _implementation(name, q, k, v):
  if name is not None and name not in IMPLEMENTATIONS:
    raise ValueError(
      f'unknown implementation {name!r}; known: {sorted(IMPLEMENTATIONS)}'
    )
  if name == 'pallas' or (name is None and target().platform == 'tpu'):
    reason = pallas_tpu.unsupported_reason(q, k, v)
    if reason and name:
      raise NotImplementedError(f'implementation={name!r}: {reason}')
    name = 'xla' if reason else 'pallas'
  return IMPLEMENTATIONS[name or 'xla']


def _check(q, k, v, beta, log_decay, segment_ids, normalize, chunk_size):
  check_floats(q=q, k=k, v=v)
  B, T, N, P = q.shape
  K = k.shape[2]
  if k.shape != (B, T, K, P) or v.shape[:3] != k.shape[:3]:
    raise ValueError(f'{q.shape=}, {k.shape=} and {v.shape=} do not fit')
  if T == 0:
    raise ValueError(f'{q.shape=} has no steps')
  if N % K:
    raise ValueError(f'{N=} query heads must be a multiple of {K=} key heads')
  if beta is not None and beta.shape != (B, T, N):
    raise ValueError(f'{beta.shape=} must be {(B, T, N)}, one per query head')
  if beta is not None and normalize:
    raise ValueError('the delta rule has no sum of keys to normalize by')
  if log_decay is not None and log_decay.shape not in (q.shape, q.shape[:3]):
    raise ValueError(f'{log_decay.shape=} must be {q.shape[:3]} or {q.shape}')
  if segment_ids is not None and segment_ids.shape != (B, T):
    raise ValueError(f'{segment_ids.shape=} must be {(B, T)}')
  if chunk_size < 1:
    raise ValueError(f'{chunk_size=} must be at least 1')
