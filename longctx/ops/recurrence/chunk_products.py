"""Decayed scores of a chunk: products of its queries and keys under a decay.

L_t is the sum of log_decay from the start of the chunk to t. Where log_decay
<= 0, no exponent is positive, so nothing overflows, however strong the decay:
differences are taken before the exponential, and where q and k must be scaled
apart (one decay per channel), both are scaled towards a step that lies between
them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from longctx.ops.recurrence.steps import SMALLEST_LOG_DECAY
from longctx.typing import Array, Bool, Float, Int

# Below this many steps the [C, C, P] exponentials of a decay per channel cost
# less than another halving.
_SMALLEST_HALF = 8


class ChunkSegments(NamedTuple):
  """Segments of one chunk, as numbers that never come back.

  within: [B, C], of each step. before: [B], of the state that enters.
  """

  within: Int[Array, 'B C']
  before: Int[Array, ' B']


class ChunkProducts(NamedTuple):
  """Decayed scores of a chunk, and its queries and keys as the state has them.

    scores_ij = Σ_p q_ip exp(L_ip - L_jp) k_jp    where j <= i sees i, else zero
    q = exp(L_i) q_i                              for the state that enters
    k = exp(L_C - L_j) k_j                        for the state that leaves
    chunk_decay = exp(L_C)                        of the entering state

  with zeros where a segment ends in between.
  """

  scores: Float[Array, '*stack B N C C']
  q: Float[Array, '*stack B N C P']
  k: Float[Array, 'B N C P']
  chunk_decay: Float[Array, 'B_or_1 N_or_1 P_or_1 1']


def products(
  q: Float[Array, '*stack B N C P'],
  k: Float[Array, 'B N C P'],
  log_decay: Float[Array, 'B N C P_or_1'] | None,
  segments: ChunkSegments | None,
) -> ChunkProducts:
  """The products of a chunk; see `ChunkProducts`.

  Args:
    q: queries, or several stacks of them, as the delta rule's keys ask too.
    k: keys, one per query head.
    log_decay: of the step, one per head or one per head and channel.
    segments: None where there is one only.
  """
  C = k.shape[-2]
  visible, affected = jnp.tril(jnp.ones((C, C), bool)), None
  if segments is not None:
    within, before = segments
    visible &= (within[:, :, None] == within[:, None, :])[:, None]
    continues = jnp.diff(within, axis=1, prepend=before[:, None]) == 0
    affected = visible & continues[:, None, None, :]

  if log_decay is None:
    scores = jnp.where(visible, _product(q, k), 0)
    chunk_decay = jnp.ones((1, 1, 1, 1), k.dtype)
  else:
    total = _cumulative(log_decay, affected)
    scores = _decayed_scores(q, k, total, visible)
    end = total[..., -1:, :]
    q = q * jnp.exp(_gap(total, 0))
    k = k * jnp.exp(_gap(end, total))
    chunk_decay = jnp.swapaxes(jnp.exp(_gap(end, 0)), -1, -2)

  if segments is not None:
    # Only steps of the entering segment see the entering state, and only the
    # last segment of the chunk goes on.
    last = within[:, -1]
    q = jnp.where((within == before[:, None])[:, None, :, None], q, 0)
    k = jnp.where((within == last[:, None])[:, None, :, None], k, 0)
    chunk_decay = jnp.where(
      (before == last)[:, None, None, None], chunk_decay, 0
    )
  return ChunkProducts(scores, q, k, chunk_decay)


def _product(
  q: Float[Array, '*stack C P'], k: Float[Array, '*#stack D P']
) -> Float[Array, '*stack C D']:
  return q @ jnp.swapaxes(k, -1, -2)


def _decayed_scores(
  q: Float[Array, '*stack B N C P'],
  k: Float[Array, 'B N C P'],
  total: Float[Array, '2 B N C P_or_1'],
  visible: Bool[Array, '*B_1 C C'],
) -> Float[Array, '*stack B N C C']:
  if total.shape[-1] == 1:
    gap = _gap(total, jnp.swapaxes(total, -1, -2))
    return _product(q, k) * jnp.exp(jnp.where(visible, gap, -jnp.inf))
  # As many leading axes as q has, and one in front for the halves.
  stack = tuple(range(1 + q.ndim - k.ndim))
  k = jnp.expand_dims(k, stack)
  total = jnp.expand_dims(total, tuple(1 + axis for axis in stack))
  return jnp.where(visible, _decayed_products(q[None], k, total)[0], 0)


def _decayed_products(
  q: Float[Array, '... C P'],
  k: Float[Array, '... C P'],
  total: Float[Array, '2 ... C P'],
) -> Float[Array, '... C C']:
  """Σ_p q_ip exp(L_ip - L_jp) k_jp for j <= i; anything finite for j > i.

  The chunk is halved again and again: where i lies in the second half and j in
  the first, both are scaled to the last step m of the first half,
  L_i - L_m <= 0 and L_m - L_j <= 0, and a matrix product is left.

  Halves lie along one axis, the first of q and k and the second of `total`: an
  axis for each halving would be more than the eight that XLA's CPU library
  takes (jaxlib 0.10 reads beyond them).
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
  below = _product(
    q2 * jnp.exp(_gap(total2, middle)), k1 * jnp.exp(_gap(middle, total1))
  )
  # Both halves in one call, so that the program grows with log C only.
  halves = _decayed_products(
    jnp.concatenate([q1, q2]),
    jnp.concatenate([k1, k2]),
    jnp.concatenate([total1, total2], axis=1),
  )
  first, second = jnp.split(halves, 2)
  above = jnp.zeros_like(below)
  return jnp.block([[first, above], [below, second]])


def _cumulative(
  log_decay: Float[Array, 'B N C P'], affected: Bool[Array, 'B 1 C C'] | None
) -> Float[Array, '2 B N C P']:
  """The sums of log_decay over the steps so far.

  A sum of -500 in one float32 has an error of 3e-5, which would be a relative
  error of the scores between weakly decaying steps after strong ones. So the
  sum is kept in two parts, of which the first, in multiples of 1/1024, is
  exact.

  affected: whether the state of a step depends on the decay of an earlier one,
  or None where it always does.
  """
  log_decay = jnp.maximum(log_decay, SMALLEST_LOG_DECAY)
  coarse = jnp.round(log_decay * 1024) / 1024
  parts = jnp.stack([coarse, log_decay - coarse])
  total = jnp.cumsum(parts, axis=-2)
  if affected is None:
    return total
  # The decays of earlier segments cancel in every gap that is used. Without
  # them in the gradient they cancel there exactly too, not up to rounding.
  own = jnp.matmul(
    affected.astype(parts.dtype), parts, precision=jax.lax.Precision.HIGHEST
  )
  return own + jax.lax.stop_gradient(total - own)


def _gap(
  later: Float[Array, '2 ...'], earlier: Float[Array, '2 ...'] | int
) -> Float[Array, '...']:
  """The sum of log_decay after `earlier`, up to `later`."""
  coarse, fine = later - earlier
  return coarse + fine
