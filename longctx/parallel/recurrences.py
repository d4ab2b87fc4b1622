"""Linear recurrences over sequences that no single device holds: state scan.

What a span of tokens does to a recurrent state is an element (decay, state),
S' = decay S + state, whose size does not depend on the span. Every shard makes
the elements of its spans; a scan over the shards gives each span the state that
enters it; then every shard computes its outputs as if it were alone.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from longctx.ops import recurrence as ops
from longctx.ops.recurrence.final_state import final_state
from longctx.ops.recurrence.steps import Steps
from longctx.parallel import reorder
from longctx.parallel.axes import make_axes, make_layout
from longctx.parallel.layout import SequenceLayout
from longctx.parallel.state_scan import (
  of_last_span,
  span_states,
  starts_segment,
)
from longctx.typing import Array, Float, Int


def linear_attention(
  q: Float[Array, 'B T N P'],
  k: Float[Array, 'B T K P'],
  v: Float[Array, 'B T K V'],
  *,
  mesh: Mesh,
  **options: Any,
) -> tuple[Float[Array, 'B T N V'], Float[Array, 'B N P W']]:
  """`ops.recurrence.linear_attention` of a sequence on several devices.

  Time of a shard: that of the op on its tokens, and T P V / R per head for the
  elements; log2(R) messages per span of P V numbers per head, whatever T (see
  `wire_bytes`).

  Args: as in `linear_recurrence`.
  """
  return linear_recurrence(q, k, v, mesh=mesh, **options)


def gated_delta_rule(
  q: Float[Array, 'B T N P'],
  k: Float[Array, 'B T K P'],
  v: Float[Array, 'B T K V'],
  beta: Float[Array, 'B T N'],
  *,
  mesh: Mesh,
  **options: Any,
) -> tuple[Float[Array, 'B T N V'], Float[Array, 'B N P V']]:
  """`ops.recurrence.gated_delta_rule` of a sequence on several devices.

  A span multiplies the state that enters it by a matrix, so a message is of
  P (P + V) numbers per head, whatever T, and a shard runs the chunked rule
  twice: once on values [v, 0] for that matrix, once for its outputs.

  Args: as in `linear_recurrence`.
  """
  return linear_recurrence(q, k, v, beta, mesh=mesh, **options)


def linear_recurrence(
  q: Float[Array, 'B T N P'],
  k: Float[Array, 'B T K P'],
  v: Float[Array, 'B T K V'],
  beta: Float[Array, 'B T N'] | None = None,
  *,
  mesh: Mesh,
  axis: str | tuple[str, ...] = 'seq',
  layout: str | SequenceLayout = 'contiguous',
  in_layout: bool = False,
  log_decay: Float[Array, 'B T N'] | Float[Array, 'B T N P'] | None = None,
  scale: float = 1.0,
  segment_ids: Int[Array, 'B T'] | None = None,
  initial_state: Float[Array, 'B N P W'] | None = None,
  normalize: bool = False,
  chunk_size: int = 64,
  implementation: str | None = None,
) -> tuple[Float[Array, 'B T N V'], Float[Array, 'B N P W']]:
  """Linear attention, or with `beta` the gated delta rule, on several devices.

  Zigzag takes twice as many messages, one after another, as contiguous, and has
  nothing to balance here: it is for stacks with softmax attention.

  Args:
    q, k, v, beta, log_decay, scale, segment_ids, initial_state, normalize,
    chunk_size, implementation: as in `longctx.ops.recurrence`.
    mesh: batch on 'data', heads on 'model', if the mesh has these axes and
      `axis` does not name them.
    axis: mesh axis of the sequence, or several, the first outermost.
    layout: 'contiguous', 'zigzag', or a SequenceLayout, which is needed with
      `in_layout` if there is padding.
    in_layout: whether the inputs and the output are in the layout's order,
      with length `layout.padded_len`; padding does not change any state.

  Returns:
    out, in the order of q, and the last state, the same on all shards.

  Raises:
    ValueError: shapes do not fit, each other or the mesh.
    NotImplementedError: the layout is striped.
  """
  B, T, N, P = q.shape
  if log_decay is not None and log_decay.shape not in (q.shape, q.shape[:3]):
    raise ValueError(f'{log_decay.shape=} must be {q.shape[:3]} or {q.shape}')
  if beta is not None and beta.shape != q.shape[:3]:
    raise ValueError(f'{beta.shape=} must be {q.shape[:3]}')
  state_shape = (B, N, P, v.shape[-1] + normalize)
  if initial_state is not None and initial_state.shape != state_shape:
    raise ValueError(f'{initial_state.shape=} must be {state_shape}')
  axes = make_axes(mesh, axis)
  axes.check(batch=B, query_heads=N, key_heads=k.shape[2])
  shards = axes.size(axes.seq)
  layout = make_layout(layout, T, shards, in_layout=in_layout)
  if not layout.spans_per_shard:
    raise NotImplementedError(
      'a recurrence needs spans of neighbouring tokens, which a striped '
      "sequence has not: take layout 'contiguous' or 'zigzag'"
    )
  arrays = Steps(q, k, v, beta, log_decay), segment_ids
  if not in_layout:
    arrays = jax.tree.map(lambda x: reorder.pad(x, layout), arrays)
  by_head = axes.spec(heads=True)
  state_spec = PartitionSpec(axes.data, axes.heads)
  local = functools.partial(
    _shard,
    layout=layout,
    axis=axis,
    normalize=normalize,
    scale=scale,
    chunk_size=chunk_size,
    implementation=implementation,
  )

  def local_in_natural_order(steps, segment_ids, initial_state):
    arrays = reorder.into_layout((steps, segment_ids), layout, axis)
    out, state = local(*arrays, initial_state)
    return reorder.into_natural(out, layout, axis), state

  out, state = jax.shard_map(
    local if in_layout else local_in_natural_order,
    mesh=mesh,
    in_specs=(by_head, axes.spec(), state_spec),
    out_specs=(by_head, state_spec),
    check_vma=False,
  )(*arrays, initial_state)
  return out if in_layout else out[:, :T], state


def wire_bytes(
  B: int,
  N: int,
  P: int,
  V: int,
  *,
  mesh: Mesh,
  axis: str | tuple[str, ...] = 'seq',
  layout: str = 'contiguous',
  decay: str | None = None,
  packed: bool = False,
  normalize: bool = False,
  with_state: bool = True,
) -> dict[str, int]:
  """What a recurrence sends forward, all devices together.

  A scan sends R - 1, R - 2, R - 4, ... states P V per head and row, and the
  decays with all but the last of them, which nothing follows. The backward
  pass sends the gradients of all of these back.

  Args:
    B, N, P, V: rows, query heads, size of keys and of values.
    mesh, axis, normalize: as in `linear_attention`.
    layout: 'contiguous' or 'zigzag', with a scan per span.
    decay: None, 'head' or 'channel'; 'matrix' for the delta rule.
    packed: whether there are segment_ids, int32.
    with_state: whether the last state is used; else it is not sent.

  Returns:
    The bytes by kind, as `hlo.collective_bytes` counts them, for float32
    states.
  """
  axes = make_axes(mesh, axis)
  axes.check(batch=B, heads=N)
  R, data, model = map(axes.size, (axes.seq, axes.data, axes.heads))
  n = N // model
  # Of one group of devices that share a sequence.
  state = 4 * (B // data) * n * P * (V + normalize)
  decays = {None: 1, 'head': n, 'channel': n * P, 'matrix': n * P * P}
  decay_bytes = 4 * (B // data) * decays[decay]
  pairs = [R - (1 << step) for step in range((R - 1).bit_length())]
  sent = state * sum(pairs) + decay_bytes * sum(pairs[:-1])
  if packed:
    sent += 4 * (B // data) * (R - 1)
  spans = {'contiguous': 1, 'zigzag': 2}[layout]
  groups = mesh.size // R
  return {
    'collective-permute': groups * spans * sent,
    'all-reduce': groups * 2 * (R - 1) * state * with_state,
  }


def _shard(
  steps: Steps,
  segment_ids: Int[Array, 'B L'] | None,
  initial_state: Float[Array, 'B N P W'] | None,
  *,
  layout: SequenceLayout,
  axis: str | tuple[str, ...],
  normalize: bool,
  chunk_size: int,
  **options: Any,
) -> tuple[Float[Array, 'B L N V'], Float[Array, 'B N P W']]:
  """(out, last state) of one shard; see `linear_recurrence`."""
  B, L, N, P = steps.q.shape
  dtype = jnp.result_type(*jax.tree.leaves(steps))
  dtype = jnp.promote_types(dtype, jnp.float32)
  if initial_state is None:
    # The heads of this device alone.
    width = steps.v.shape[-1] + normalize
    initial_state = jnp.zeros((B, N, P, width), dtype)
  if layout.is_padded:
    steps = _drop_padding(steps, layout, axis)

  def by_span(x: Array) -> Array:
    return x.reshape(B * layout.spans_per_shard, layout.span_len, *x.shape[2:])

  def spans_apart(x: Array) -> Array:
    return x.reshape(B, layout.spans_per_shard, *x.shape[1:])

  steps = jax.tree.map(by_span, steps)
  segment_index = enters = None
  if segment_ids is not None:
    starts = by_span(starts_segment(segment_ids, layout, axis))
    segment_index = jnp.cumsum(
      starts.at[:, 0].set(False), axis=1, dtype=jnp.int32
    )
    # Whether the first token of a span sees the state that enters it.
    enters = ~starts[:, 0, None, None, None]

  written = steps
  if normalize:
    v = [steps.v, jnp.ones_like(steps.v[..., :1])]
    written = steps._replace(v=jnp.concatenate(v, axis=-1))
  decay, change = final_state(written, segment_index, chunk_size=chunk_size)
  if enters is not None:
    decay = jnp.where(enters, decay, 0)
  no_decay, times = jnp.ones_like(decay[:B]), jnp.multiply
  if steps.beta is not None:
    no_decay = jnp.broadcast_to(jnp.eye(P, dtype=decay.dtype), no_decay.shape)
    times = functools.partial(jnp.matmul, precision='highest')

  def combine(earlier, later):
    return times(later[0], earlier[0]), times(later[0], earlier[1]) + later[1]

  state = span_states(
    initial_state.astype(dtype),
    (spans_apart(decay), spans_apart(change)),
    combine,
    (no_decay, jnp.zeros_like(change[:B])),
    layout,
    axis,
  )
  state = state.reshape(-1, *state.shape[2:])
  if enters is not None:
    state = jnp.where(enters, state, 0)
  out, state = ops.linear_recurrence(
    *steps[:4],
    log_decay=steps.log_decay,
    segment_ids=segment_index,
    initial_state=state,
    normalize=normalize,
    chunk_size=chunk_size,
    **options,
  )
  last_state = of_last_span(spans_apart(state), layout, axis)
  return out.reshape(B, L, *out.shape[2:]), last_state


def _drop_padding(
  steps: Steps, layout: SequenceLayout, axis: str | tuple[str, ...]
) -> Steps:
  """The steps, with such as change no state where there is padding."""
  positions = layout.positions(jax.lax.axis_index(axis))

  def drop(name: str, x: Array) -> Array:
    if name not in ('k', 'beta', 'log_decay'):
      return x
    is_token = (positions < layout.seq_len).reshape(-1, *[1] * (x.ndim - 2))
    return jnp.where(is_token, x, 0)

  return steps.map(drop)
