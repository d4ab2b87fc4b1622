"""The last state of linear attention alone, without any output."""

import jax
import jax.numpy as jnp

from longctx.ops.recurrence.chunks import SMALLEST_LOG_DECAY
from longctx.typing import Array, Float, Int


def final_state(
  k: Float[Array, 'B T K P'],
  v: Float[Array, 'B T K V'],
  *,
  num_heads: int,
  log_decay: Float[Array, 'B T N'] | Float[Array, 'B T N P'] | None = None,
  segment_index: Int[Array, 'B T'] | None = None,
) -> tuple[Float[Array, 'B N_or_1 P_or_1 1'], Float[Array, 'B N P V']]:
  """What T steps do to a state: S_T = decay S_0 + state.

    decay = exp(Σ_t log_decay_t)
    state = Σ_t exp(Σ_{s>t} log_decay_s) k_t v_tᵀ

  The sums run from the last step backwards: those of recent steps have few
  terms and so are precise, and those that have many are of forgotten steps.

  Time T P V per head in one matrix product; memory T P per head, of which the
  backward pass keeps the inputs.

  Args:
    k, v, log_decay: as in `longctx.ops.recurrence.linear_attention`.
    num_heads: N, a multiple of K.
    segment_index: how often the id has changed so far; the state does not pass
      from one number to another. Zero continues S_0.

  Returns:
    decay, with axes of length 1 where it does not vary, and state, in float32
    (float64 for float64 inputs).
  """
  compute = jax.checkpoint(_final_state, static_argnums=0)
  return compute(num_heads, k, v, log_decay, segment_index)


def _final_state(num_heads, k, v, log_decay, segment_index):
  B, T, K, P = k.shape
  N, V = num_heads, v.shape[-1]
  dtype = jnp.promote_types(jnp.result_type(k, v), jnp.float32)
  k, v = k.astype(dtype)[:, :, :, None], v.astype(dtype)
  decay = jnp.ones((B, 1, 1, 1), dtype)
  if log_decay is not None:
    log_decay = jnp.maximum(log_decay.astype(dtype), SMALLEST_LOG_DECAY)
    log_decay = log_decay.reshape(B, T, N, -1)
    total = jax.lax.cumsum(log_decay, axis=1, reverse=True)
    after = jnp.pad(total[:, 1:], [(0, 0), (0, 1), (0, 0), (0, 0)])
    k = k * jnp.exp(after).reshape(B, T, K, N // K, -1)
    decay = jnp.exp(total[:, 0])[..., None]
  if segment_index is not None:
    last = segment_index[:, -1:]
    k = jnp.where((segment_index == last)[:, :, None, None, None], k, 0)
    decay = jnp.where((last == 0)[:, :, None, None], decay, 0)
  state = jnp.einsum('BTKGP,BTKV->BKGPV', k, v)
  state = jnp.broadcast_to(state, (B, K, N // K, P, V))
  return decay, state.reshape(B, N, P, V)
