"""Recurrences with a matrix state, in chunks of C steps.

What linear attention and the delta rule have in common: the scan over chunks
with its custom VJP, and the products of queries and keys of a chunk under a
decay, where L_t is the sum of log_decay from the start of the chunk to t.

Where log_decay <= 0, no exponent is positive, so nothing overflows, however
strong the decay: differences are taken before the exponential, and where q and
k must be scaled apart (one decay per channel), both are scaled towards a step
that lies between them.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from longctx.typing import Array, Float, Int

# exp(-100) is zero in float32; a stronger decay would only cost precision in
# the sums of its neighbours.
SMALLEST_LOG_DECAY = -100.0
# Below this many steps the [C, C, P] exponentials of a decay per channel cost
# less than another halving.
_SMALLEST_HALF = 8


class ChunkSegments(NamedTuple):
  """The segments of one chunk, as numbers that never come back.

  within: [B, C], of each step. before: [B], of the state that enters.
  """

  within: Int[Array, 'B C']
  before: Int[Array, ' B']


class ChunkProducts(NamedTuple):
  """What the steps of a chunk have to do with each other and with the state.

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


def index_segments(
  segment_ids: Int[Array, 'B T'] | None,
) -> Int[Array, 'B T'] | None:
  """How often the id has changed so far: an id may come back, a count not."""
  if segment_ids is None:
    return None
  changed = segment_ids[:, 1:] != segment_ids[:, :-1]
  return jnp.pad(jnp.cumsum(changed, axis=1, dtype=jnp.int32), [(0, 0), (1, 0)])


def scan_chunks(
  chunk: Callable[[Array, Any, ChunkSegments | None], tuple[Array, Array]],
  state: Array,
  inputs: Any,
  segment_index: Int[Array, 'B T'] | None,
  *,
  chunk_size: int,
  own_vjp: bool = True,
) -> tuple[Float[Array, 'B T N V'], Array]:
  """(out, last state) of a recurrence that `chunk` computes C steps at a time.

  The backward pass keeps the inputs only and computes the T/C states between
  chunks again (memory T P V / C per head while it runs); it can itself be
  differentiated, forwards and backwards, with a few times that memory. Any T
  works: the last chunk is padded with zeros, steps that must change nothing.

  Args:
    chunk: chunk(state, inputs, segments) -> (out [B, C, N, V], next state), a
      function of its arguments alone.
    state: what enters the first chunk.
    inputs: a tree of arrays [B, T, ...].
    segment_index: how often the id of the row has changed so far.
    chunk_size: C, best a power of two for the sake of halving. A sequence that
      is shorter makes one chunk, as long as the next power of two.
    own_vjp: if not, JAX derives the backward pass, which keeps every state, and
      the scan can be differentiated forwards too.
  """
  B, T = jax.tree.leaves(inputs)[0].shape[:2]
  chunk_size = min(chunk_size, 1 << (T - 1).bit_length())
  pad = -T % chunk_size

  def split(x, mode='constant'):
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
  out, state = scan(chunk, state, jax.tree.map(split, inputs), segments)
  out = jnp.moveaxis(out, 0, 1).reshape(B, -1, *out.shape[3:])
  return out[:, :T], state


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(chunk, state, inputs, segments):
  """(out [T/C, B, C, N, V], last state) of inputs stacked chunk by chunk."""
  return _scan_forward(chunk, state, inputs, segments)


def _scan_forward(chunk, state, inputs, segments):
  def step(state, stacked):
    out, state = chunk(state, *stacked)
    return state, out

  state_and_out = jax.lax.scan(_recomputed(step), state, (inputs, segments))
  return state_and_out[::-1]


def _scan_fwd(chunk, state, inputs, segments):
  results = _scan_forward(chunk, state, inputs, segments)
  return results, (state, inputs, segments)


def _scan_bwd(chunk, saved, dresults):
  state, inputs, segments = saved
  dout, dstate = dresults

  def forward(state, stacked):
    # The output of the chunk is not used, so XLA does not compute it.
    return chunk(state, *stacked)[1], state

  def backward(dstate, stacked):
    state, inputs, segments, dout = stacked
    _, vjp = jax.vjp(lambda *x: chunk(*x, segments), state, inputs)
    return vjp((dout, dstate))

  _, states = jax.lax.scan(_recomputed(forward), state, (inputs, segments))
  dstate, dinputs = jax.lax.scan(
    _recomputed(backward),
    dstate,
    (states, inputs, segments, dout),
    reverse=True,
  )
  return dstate, dinputs, None


def _recomputed(step):
  """A step of which a second derivative keeps what it is given, and no more."""
  return jax.checkpoint(step, prevent_cse=False)


_scan.defvjp(_scan_fwd, _scan_bwd)


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


def _product(q, k):
  return q @ jnp.swapaxes(k, -1, -2)


def _decayed_scores(q, k, total, visible):
  if total.shape[-1] == 1:
    gap = _gap(total, jnp.swapaxes(total, -1, -2))
    return _product(q, k) * jnp.exp(jnp.where(visible, gap, -jnp.inf))
  # As many leading axes as q has, and one in front for the halves.
  stack = tuple(range(1 + q.ndim - k.ndim))
  k = jnp.expand_dims(k, stack)
  total = jnp.expand_dims(total, tuple(1 + axis for axis in stack))
  return jnp.where(visible, _decayed_products(q[None], k, total)[0], 0)


def _decayed_products(q, k, total):
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
  # The decays of earlier segments cancel in every gap that is used. Without
  # them in the gradient they cancel there exactly too, not up to rounding.
  own = jnp.matmul(
    affected.astype(parts.dtype), parts, precision=jax.lax.Precision.HIGHEST
  )
  return own + jax.lax.stop_gradient(total - own)


def _gap(later, earlier):
  """The sum of log_decay after `earlier`, up to `later`."""
  coarse, fine = later - earlier
  return coarse + fine
