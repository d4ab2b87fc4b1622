"""The gated delta rule one step at a time: the equation, and the oracle."""

import jax
import jax.numpy as jnp

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
  """The recurrence as one `lax.scan` over the steps.

    S_t = (I - beta_t k_t k_tᵀ) exp(log_decay_t) S_{t-1} + beta_t k_t v_tᵀ
    out_t = scale q_t S_t

  Time T P V per head. The backward pass keeps every state: memory T P V.

  Args:
    q, k, v, beta, log_decay, scale: as in `gated_delta_rule`.
    segment_index: how often the id has changed so far; the state does not pass
      from one number to another. Zero continues `initial_state`.
    initial_state: S_0, in the dtype in which everything is summed.
    chunk_size: not used; taken so that every implementation is called alike.
    out_dtype: of out; None: that of `initial_state`.

  Returns:
    out, and the last state in the dtype of `initial_state`.
  """
  del chunk_size
  B, T, N, P = q.shape
  dtype = initial_state.dtype
  group = N // k.shape[2]
  k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
  q, k, v, beta = (x.astype(dtype) for x in (q, k, v, beta))
  if log_decay is None:
    log_decay = jnp.zeros((B, T, N), dtype)
  if log_decay.ndim == 3:
    log_decay = jnp.broadcast_to(log_decay[..., None], (B, T, N, P))
  decay = jnp.exp(log_decay.astype(dtype))
  if segment_index is None:
    segment_index = jnp.zeros((B, T), int)
  same = jnp.diff(segment_index, axis=1, prepend=0) == 0
  decay = jnp.where(same[:, :, None, None], decay, 0)

  def step(state, inputs):
    q, k, v, beta, decay = inputs
    state = decay[..., None] * state
    error = v - jnp.einsum('BNP,BNPV->BNV', k, state)
    state += jnp.einsum('BN,BNP,BNV->BNPV', beta, k, error)
    return state, scale * jnp.einsum('BNP,BNPV->BNV', q, state)

  steps = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (q, k, v, beta, decay))
  state, out = jax.lax.scan(step, initial_state, steps)
  out = jnp.moveaxis(out, 0, 1).astype(out_dtype or dtype)
  return out, state
