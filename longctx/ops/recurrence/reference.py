"""Linear recurrence one step at a time: the equation, and the oracle."""

import jax
import jax.numpy as jnp

from longctx.ops.recurrence.steps import Results, SegmentIndex, State, Steps


def recurrence(
  steps: Steps,
  state: State,
  segment_index: SegmentIndex,
  *,
  scale: float,
  chunk_size: int,
  out_dtype: jax.typing.DTypeLike,
) -> Results:
  """The recurrence of `Steps` as one `lax.scan`.

  Time T P V per head. The backward pass keeps every state: memory T P V.

  Args:
    steps: one per token.
    state: S_0, in the dtype in which everything is summed.
    segment_index: how often the id has changed so far; the state does not pass
      from one number to another. Zero continues `state`.
    scale: factor of the output.
    chunk_size: not used; taken so that every implementation is called alike.
    out_dtype: of the output.

  Returns:
    out, and the last state in the dtype of `state`.
  """
  del chunk_size
  B, T, N, _ = steps.q.shape
  q, k, v, beta, log_decay = steps.per_query_head(state.dtype)
  decay = jnp.ones((B, T, 1, 1), state.dtype)
  if log_decay is not None:
    decay = jnp.exp(log_decay).reshape(B, T, N, -1)
  if segment_index is not None:
    same = jnp.diff(segment_index, axis=1, prepend=0) == 0
    decay = jnp.where(same[:, :, None, None], decay, 0)

  def step(state, inputs):
    q, k, v, beta, decay = inputs
    state = decay[..., None] * state
    if beta is not None:
      held = jnp.einsum('BNP,BNPV->BNV', k, state)
      v = beta[..., None] * (v - held)
    state += jnp.einsum('BNP,BNV->BNPV', k, v)
    return state, scale * jnp.einsum('BNP,BNPV->BNV', q, state)

  inputs = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (q, k, v, beta, decay))
  state, out = jax.lax.scan(step, state, inputs)
  return jnp.moveaxis(out, 0, 1).astype(out_dtype), state
