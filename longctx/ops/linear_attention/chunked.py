"""Linear attention in chunks of C steps: matrix products, and a custom VJP.

With L_t the sum of log_decay from the start of the chunk to t, and S the state
before the chunk,

  out_i = scale ( exp(L_i) q_i S + Σ_{j<=i} (q_i · exp(L_i - L_j) k_j) v_j )
  S'    = exp(L_C) S + Σ_j exp(L_C - L_j) k_j v_jᵀ

which is the form of Mamba-2 (arXiv 2405.21060) for one decay per head and of
GLA (arXiv 2312.06635) for one decay per head and channel.

Where log_decay <= 0, no exponent is positive, so nothing overflows, however
strong the decay: differences are taken before the exponential, and where q and
k must be scaled apart (one decay per channel), both are scaled towards a step
that lies between them.
"""

import jax
import jax.numpy as jnp

from longctx.typing import Array, Float, Int

# exp(-100) is zero in float32; a stronger decay would only cost precision in
# the sums of its neighbours.
SMALLEST_LOG_DECAY = -100.0
# Below this many steps the [C, C, P] exponentials of a decay per channel cost
# less than another halving.
_SMALLEST_HALF = 8


def linear_attention(
  q: Float[Array, 'B T N P'],
  k: Float[Array, 'B T K P'],
  v: Float[Array, 'B T K V'],
  *,
  log_decay: Float[Array, 'B T N'] | Float[Array, 'B T N P'] | None,
  scale: float,
  document: Int[Array, 'B T'] | None,
  initial_state: Float[Array, 'B N P V'],
  chunk_size: int,
) -> tuple[Float[Array, 'B T N V'], Float[Array, 'B N P V']]:
  """The recurrence of reference.py, chunk by chunk; same arguments, same sums.

  Time T (C (P + V) + 2 P V) per head. The backward pass keeps the inputs only
  and computes the T/C states between chunks again (memory T P V / C per head
  while it runs). Any T works: the last chunk is padded with steps that change
  nothing. Products of float32 have JAX's default matmul precision.
  """
  T = q.shape[1]
  # A power of two for the sake of halving.
  chunk_size = min(chunk_size, 1 << (T - 1).bit_length())
  pad = -T % chunk_size

  def chunks(x, mode='constant'):
    if x is None:
      return None
    x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2), mode=mode)
    x = x.reshape(x.shape[0], -1, chunk_size, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)

  inputs = (chunks(q), chunks(k), chunks(v), chunks(log_decay))
  documents = None
  if document is not None:
    within = chunks(document, 'edge')
    # The document of the state that enters each chunk.
    before = jnp.concatenate(
      [jnp.zeros_like(within[:1, :, 0]), within[:-1, :, -1]]
    )
    documents = (within, before)
  out, state = _scan_chunks(initial_state, inputs, documents)
  out = jnp.moveaxis(out, 0, 1).reshape(out.shape[1], -1, *out.shape[3:])
  return scale * out[:, :T], state


@jax.custom_vjp
def _scan_chunks(state, inputs, documents):
  """(out [T/C, B, C, N, V], last state) of inputs stacked chunk by chunk."""

  def step(state, chunk):
    out, state = _chunk(state, *chunk)
    return state, out

  state, out = jax.lax.scan(step, state, (inputs, documents))
  return out, state


def _scan_chunks_fwd(state, inputs, documents):
  return _scan_chunks(state, inputs, documents), (state, inputs, documents)


def _scan_chunks_bwd(saved, cotangents):
  state, inputs, documents = saved
  out_bar, state_bar = cotangents

  def forward(state, chunk):
    # The output of the chunk is not used, so XLA does not compute it.
    return _chunk(state, *chunk)[1], state

  def backward(state_bar, chunk):
    state, inputs, documents, out_bar = chunk
    _, vjp = jax.vjp(lambda *x: _chunk(*x, documents), state, inputs)
    return vjp((out_bar, state_bar))

  _, states = jax.lax.scan(forward, state, (inputs, documents))
  state_bar, inputs_bar = jax.lax.scan(
    backward, state_bar, (states, inputs, documents, out_bar), reverse=True
  )
  return state_bar, inputs_bar, None


_scan_chunks.defvjp(_scan_chunks_fwd, _scan_chunks_bwd)


def _chunk(state, inputs, documents):
  """(out [B, C, N, V], next state) of one chunk, in the dtype of `state`."""
  q, k, v, log_decay = inputs
  group = q.shape[2] // k.shape[2]
  k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
  # [B, N, C, ...] from here to the end.
  q, k, v = (jnp.swapaxes(x.astype(state.dtype), 1, 2) for x in (q, k, v))
  C = q.shape[2]
  visible, affected = jnp.tril(jnp.ones((C, C), bool)), None
  if documents is not None:
    within, before = documents
    visible &= (within[:, :, None] == within[:, None, :])[:, None]
    continues = jnp.diff(within, axis=1, prepend=before[:, None]) == 0
    affected = visible & continues[:, None, None, :]

  if log_decay is None:
    scores, forget = jnp.where(visible, _products(q, k), 0), 1
  else:
    log_decay = jnp.swapaxes(log_decay.astype(state.dtype), 1, 2)
    scores, q, k, forget = _decayed(q, k, log_decay, visible, affected)

  kept = forget * state
  if documents is not None:
    # Only steps of the entering document see the entering state, and only the
    # last document of the chunk goes on.
    last = within[:, -1]
    q = jnp.where((within == before[:, None])[:, None, :, None], q, 0)
    k = jnp.where((within == last[:, None])[:, None, :, None], k, 0)
    kept = jnp.where((before == last)[:, None, None, None], kept, 0)
  out = scores @ v + q @ state
  return jnp.swapaxes(out, 1, 2), kept + jnp.swapaxes(k, -1, -2) @ v


def _decayed(q, k, log_decay, visible, affected):
  """Scores [B, N, C, C], q for the entering state, k for the next, its factor.

  log_decay: [B, N, C] or [B, N, C, P].
  """
  if log_decay.ndim == 3:
    total = _cumulative(log_decay[..., None], affected)
    gap = _gap(total, jnp.swapaxes(total, -1, -2))
    scores = _products(q, k) * jnp.exp(jnp.where(visible, gap, -jnp.inf))
  else:
    total = _cumulative(log_decay, affected)
    scores = jnp.where(visible, _decayed_products(q, k, total), 0)
  end = total[..., -1:, :]
  q = q * jnp.exp(_gap(total, 0))
  k = k * jnp.exp(_gap(end, total))
  return scores, q, k, jnp.swapaxes(jnp.exp(_gap(end, 0)), -1, -2)


def _products(q, k):
  return q @ jnp.swapaxes(k, -1, -2)


def _decayed_products(q, k, total):
  """Σ_p q_ip exp(L_ip - L_jp) k_jp for j <= i; anything finite for j > i.

  The chunk is halved again and again: where i lies in the second half and j in
  the first, both are scaled to the last step m of the first half,
  L_i - L_m <= 0 and L_m - L_j <= 0, and a matrix product is left.
  """
  C = q.shape[-2]
  if C % 2 or C <= _SMALLEST_HALF:
    i, j = total[..., :, None, :], total[..., None, :, :]
    causal = jnp.tril(jnp.ones((C, C), bool))[..., None]
    decay = jnp.exp(jnp.where(causal, _gap(i, j), -jnp.inf))
    return jnp.einsum('...CP,...DP,...CDP->...CD', q, k, decay)
  q1, q2 = jnp.split(q, 2, axis=-2)
  k1, k2 = jnp.split(k, 2, axis=-2)
  total1, total2 = jnp.split(total, 2, axis=-2)
  middle = total1[..., -1:, :]
  below = _products(
    q2 * jnp.exp(_gap(total2, middle)), k1 * jnp.exp(_gap(middle, total1))
  )
  # Both halves in one call, so that the program grows with log C only.
  first, second = _decayed_products(
    jnp.stack([q1, q2]), jnp.stack([k1, k2]), jnp.stack([total1, total2], 1)
  )
  above = jnp.zeros_like(below)
  return jnp.block([[first, above], [below, second]])


def _cumulative(log_decay, affected):
  """The sums of log_decay over the steps so far, [2, B, N, C, P].

  A sum of -500 in one float32 has an error of 3e-5, which would be a relative
  error of the scores between weakly decaying steps after strong ones. So the
  sum is kept in two parts, of which the first, in multiples of 1/1024, is
  exact.

  affected: [B, 1, C, C], whether the state of a step depends on the decay of an
  earlier one, or None where it always does.
  """
  log_decay = jnp.maximum(log_decay, SMALLEST_LOG_DECAY)
  coarse = jnp.round(log_decay * 1024) / 1024
  parts = jnp.stack([coarse, log_decay - coarse])
  total = jnp.cumsum(parts, axis=-2)
  if affected is None:
    return total
  # The decays of earlier documents cancel in every gap that is used. Without
  # them in the gradient they cancel there exactly too, not up to rounding.
  own = jnp.matmul(
    affected.astype(parts.dtype), parts, precision=jax.lax.Precision.HIGHEST
  )
  return own + jax.lax.stop_gradient(total - own)


def _gap(later, earlier):
  """The sum of log_decay after `earlier`, up to `later`."""
  coarse, fine = later - earlier
  return coarse + fine
