"""Final state of a linear recurrence alone, for any state before it."""

import jax
import jax.numpy as jnp

from longctx.ops.recurrence import chunked
from longctx.ops.recurrence.steps import (
  SMALLEST_LOG_DECAY,
  SegmentIndex,
  State,
  Steps,
)
from longctx.typing import Array, Float


def final_state(
  steps: Steps,
  segment_index: SegmentIndex = None,
  *,
  chunk_size: int = 64,
) -> tuple[Float[Array, 'B N_or_1 P_or_1 _'], State]:
  """What T steps do to a state: S_T = decay S_0 + state.

  Without beta, decay = exp(Σ_t log_decay_t) is a factor, and

    state = Σ_t exp(Σ_{s>t} log_decay_s) k_t v_tᵀ

  one matrix product, of time T P V and memory T P per head. The sums run from
  the last step backwards: those of recent steps have few terms and so are
  precise, and those that have many are of forgotten steps.

  With beta, decay = Π_t (I - beta_t k_t k_tᵀ) exp(log_decay_t), the last t
  leftmost, is a matrix, and state is S_T of S_0 = 0. The recurrence is linear
  in the state and the values together, so both come from one run over values
  and zeros, [v_t, 0], whose first state is [0, I], in time
  T (2 C (2 P + V) + 3 P (P + V)) per head.

  The backward pass keeps the inputs only.

  Args:
    steps: one per token; queries are not used.
    segment_index: how often the id has changed so far; the state does not pass
      from one number to another. Zero continues S_0.
    chunk_size: C of steps with beta.

  Returns:
    decay, with axes of length 1 where it does not vary, and state, in float32
    (float64 for float64 inputs).
  """
  compute = jax.checkpoint(_final_state, static_argnums=(0, 1))
  heads = steps.q.shape[2]
  return compute(heads, chunk_size, *steps[1:], segment_index)


def _final_state(N, chunk_size, k, v, beta, log_decay, segment_index):
  B, T, K, P = k.shape
  V = v.shape[-1]
  dtype = jnp.promote_types(jnp.result_type(k, v), jnp.float32)
  if beta is not None:
    both = jnp.eye(P, V + P, V, dtype=dtype)
    _, both = chunked.recurrence(
      Steps(
        jnp.zeros((B, T, N, P), k.dtype),
        k,
        jnp.pad(v, [(0, 0)] * 3 + [(0, P)]),
        beta,
        log_decay,
      ),
      jnp.broadcast_to(both, (B, N, P, V + P)),
      segment_index,
      scale=1.0,
      chunk_size=chunk_size,
      out_dtype=dtype,
    )
    return both[..., V:], both[..., :V]
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
