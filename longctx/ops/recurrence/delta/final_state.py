"""The last state of the gated delta rule alone, for any state before it."""

import jax
import jax.numpy as jnp

from longctx.ops.recurrence.delta.chunked import gated_delta_rule
from longctx.typing import Array, Float, Int


def final_state(
  k: Float[Array, 'B T K P'],
  v: Float[Array, 'B T K V'],
  beta: Float[Array, 'B T N'],
  *,
  log_decay: Float[Array, 'B T N'] | Float[Array, 'B T N P'] | None = None,
  segment_index: Int[Array, 'B T'] | None = None,
  chunk_size: int = 64,
) -> tuple[Float[Array, 'B N P P'], Float[Array, 'B N P V']]:
  """What T steps do to a state: S_T = decay S_0 + state.

    decay = Π_t (I - beta_t k_t k_tᵀ) exp(log_decay_t)     the last t leftmost
    state = S_T of S_0 = 0

  The recurrence is linear in the state and the values together, so both come
  from one run over values and zeros, [v_t, 0], whose first state is [0, I].

  Time T (2 C (2 P + V) + 3 P (P + V)) per head in chunks of C steps. The
  backward pass keeps the inputs only.

  Args:
    k, v, beta, log_decay, chunk_size: as in `delta_rule`.
    segment_index: how often the id has changed so far; the state does not pass
      from one number to another. Zero continues S_0.

  Returns:
    decay and state, in float32 (float64 for float64 inputs).
  """
  compute = jax.checkpoint(_final_state, static_argnums=0)
  return compute(chunk_size, k, v, beta, log_decay, segment_index)


def _final_state(chunk_size, k, v, beta, log_decay, segment_index):
  B, T, K, P = k.shape
  N, V = beta.shape[2], v.shape[-1]
  dtype = jnp.promote_types(jnp.result_type(k, v), jnp.float32)
  values = jnp.concatenate([v, jnp.zeros((B, T, K, P), v.dtype)], axis=-1)
  both = jnp.broadcast_to(jnp.eye(P, V + P, V, dtype=dtype), (B, N, P, V + P))
  _, both = gated_delta_rule(
    jnp.zeros((B, T, N, P), k.dtype),
    k,
    values,
    beta,
    log_decay=log_decay,
    scale=1.0,
    segment_index=segment_index,
    initial_state=both,
    chunk_size=chunk_size,
  )
  return both[..., V:], both[..., :V]
