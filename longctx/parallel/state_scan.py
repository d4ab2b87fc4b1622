"""Recurrences over sequences that no single device holds.

What a run of tokens does to a recurrent state is an element (decay, state),
S' = decay S + state, whose size does not depend on the run. Every shard makes
the elements of its runs; a scan over the shards gives each run the state that
enters it; then every shard computes its outputs as if it were alone.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from longctx.layouts import SequenceLayout
from longctx.ops import linear_attention as local
from longctx.ops.linear_attention.final_state import final_state
from longctx.parallel.axes import make_axes, make_layout
from longctx.parallel.halo import of_preceding_run
from longctx.typing import Array, Bool, Float, Int


def linear_attention(
  q: Float[Array, 'B T N P'],
  k: Float[Array, 'B T K P'],
  v: Float[Array, 'B T K V'],
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
  """`longctx.ops.linear_attention` of a sequence that lies on several devices.

  Time of a shard: that of the op on its tokens, and T P V / R per head for the
  elements; log2(R) messages per run of P V numbers per head, whatever T (see
  `wire_bytes`). Zigzag takes twice as many, one after another, as contiguous,
  and has nothing to balance here: it is for stacks with softmax attention.

  Args:
    q, k, v, log_decay, scale, segment_ids, initial_state, normalize,
    chunk_size, implementation: as in `longctx.ops.linear_attention`.
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
  state_shape = (B, N, P, v.shape[-1] + normalize)
  if initial_state is not None and initial_state.shape != state_shape:
    raise ValueError(
      f'{initial_state.shape=} must be {state_shape} with {normalize=}'
    )
  if log_decay is not None and log_decay.shape not in (q.shape, q.shape[:3]):
    raise ValueError(f'{log_decay.shape=} must be {q.shape[:3]} or {q.shape}')
  axes = make_axes(mesh, axis)
  axes.check(batch=B, query_heads=N, key_heads=k.shape[2])
  shards = axes.size(axes.seq)
  layout = make_layout(layout, T, shards, in_layout=in_layout)
  if not layout.runs:
    raise NotImplementedError(
      'a recurrence needs runs of neighbouring tokens, which a striped '
      "sequence has not: take layout 'contiguous' or 'zigzag'"
    )
  inputs = dict(q=q, k=k, v=v, log_decay=log_decay, segment_ids=segment_ids)
  if not in_layout:
    inputs = jax.tree.map(layout.apply, inputs)
  in_specs = dict.fromkeys(inputs, axes.spec(heads=True))
  in_specs['segment_ids'] = axes.spec()
  state_spec = PartitionSpec(axes.data, axes.heads)
  out, state = jax.shard_map(
    functools.partial(
      _shard,
      layout=layout,
      axis=axis,
      scale=scale,
      normalize=normalize,
      chunk_size=chunk_size,
      implementation=implementation,
    ),
    mesh=mesh,
    in_specs=(in_specs, state_spec),
    out_specs=(in_specs['q'], state_spec),
    check_vma=False,
  )(inputs, initial_state)
  return out if in_layout else layout.restore(out), state


def exclusive_scan(
  element: Any,
  combine: Callable[[Any, Any], Any],
  identity: Any,
  axis: str | tuple[str, ...],
  *,
  reverse: bool = False,
) -> Any:
  """Combines the elements of all shards before this one, in order.

    result_r = element_0 ∘ ... ∘ element_{r-1}, or with `reverse`
    result_r = element_{R-1} ∘ ... ∘ element_{r+1}

  in ceil(log2 R) messages per shard (Hillis and Steele, 1986), for any R. To
  be called inside shard_map.

  Args:
    element: a tree of arrays.
    combine: combine(earlier, later) of two elements, associative.
    identity: a tree like `element` which changes nothing, and the result of
      the first shard.
    axis: the mesh axes of the sequence.
    reverse: whether the last shard comes first.
  """
  R = jax.lax.axis_size(axis)
  # How many shards come before this one.
  index = jax.lax.axis_index(axis)
  index = R - 1 - index if reverse else index
  # Of the last `distance` shards: without this one, and with it.
  result, window = identity, element
  for step in range((R - 1).bit_length()):
    distance = 1 << step
    pairs = [(r, r + distance) for r in range(R - distance)]
    if reverse:
      pairs = [(later, earlier) for earlier, later in pairs]
    received = jax.lax.ppermute(window, axis, pairs)
    # A shard that nothing was sent to has received zeros.
    received = jax.tree.map(
      functools.partial(jnp.where, index >= distance), received, identity
    )
    result, window = combine(received, result), combine(received, window)
  return result


def run_states(
  initial_state: Array,
  elements: tuple[Array, Array],
  combine: Callable[[Any, Any], Any],
  identity: tuple[Array, Array],
  layout: SequenceLayout,
  axis: str | tuple[str, ...],
) -> Array:
  """The state that enters each run of this shard, [B, runs, ...].

  To be called inside shard_map. Zigzag: the first runs of the shards ascend,
  the second descend, so the one scan starts where the other ends, on the last
  shard, which holds the two runs in the middle.

  Args:
    initial_state: what enters the first run of all.
    elements: (decay, state) of each run, with axes [B, runs, ...]: what it
      makes of no state, and by which factor, or matrix, of the entering one.
    combine: of two elements, the earlier first.
    identity: the element that changes nothing, without the axis of runs.
    layout: contiguous or zigzag.
    axis: the mesh axes of the sequence.
  """

  def enter(state, run, reverse):
    """The states that enter the runs, where `state` enters the first."""
    decay, change = jax.tree.map(lambda x: x[:, run], elements)
    first = layout.num_shards - 1 if reverse else 0
    is_first = jax.lax.axis_index(axis) == first
    # As part of the first element, the state decays with what follows.
    _, after = combine((identity[0], state), (decay, change))
    element = decay, jnp.where(is_first, after, change)
    _, before = exclusive_scan(
      element, combine, identity, axis, reverse=reverse
    )
    before = jnp.where(is_first, state, before)
    _, after = combine((identity[0], before), (decay, change))
    return before, after

  before, after = enter(initial_state, 0, False)
  if layout.runs == 1:
    return before[:, None]
  second, _ = enter(after, 1, True)
  return jnp.stack([before, second], axis=1)


def of_last_run(
  x: Array, layout: SequenceLayout, axis: str | tuple[str, ...]
) -> Array:
  """What the last run of all holds, on every shard; x is [B, runs, ...].

  To be called inside shard_map.
  """
  owner = layout.num_shards - 1 if layout.runs == 1 else 0
  is_owner = jax.lax.axis_index(axis) == owner
  return jax.lax.psum(jnp.where(is_owner, x[:, -1], 0), axis)


def starts_document(
  segment_ids: Int[Array, 'B L'],
  layout: SequenceLayout,
  axis: str | tuple[str, ...],
) -> Bool[Array, 'B L']:
  """Whether the id changes from the token before, which may lie elsewhere.

  To be called inside shard_map. The first token of all changes nothing, nor
  does padding: what enters it leaves it.
  """
  ids = segment_ids.reshape(segment_ids.shape[0], layout.runs, layout.run_len)
  last = of_preceding_run(ids[:, :, -1], layout, axis)
  before = jnp.concatenate([last[:, :, None], ids[:, :, :-1]], axis=2)
  positions = layout.positions(jax.lax.axis_index(axis))
  inside = (positions > 0) & (positions < layout.seq_len)
  return (ids != before).reshape(segment_ids.shape) & inside


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
  """What `linear_attention` sends forward, all devices together.

  A scan sends R - 1, R - 2, R - 4, ... states P V per head and row, and the
  decays with all but the last of them, which nothing follows. The backward
  pass sends the gradients of all of these back.

  Args:
    B, N, P, V: rows, query heads, size of keys and of values.
    mesh, axis, normalize: as in `linear_attention`.
    layout: 'contiguous' or 'zigzag', with a scan per run.
    decay: None, 'head' or 'channel'.
    packed: whether there are segment_ids, int32.
    with_state: whether the last state is used; else it is not sent.

  Returns:
    The bytes by kind, as `hlo.collective_bytes` counts them, for float32
    states.
  """
  axes = make_axes(mesh, axis)
  axes.check(batch=B, heads=N)
  R, data, model = map(axes.size, (axes.seq, axes.data, axes.heads))
  # Of one group of devices that share a sequence.
  state = 4 * (B // data) * (N // model) * P * (V + normalize)
  decays = {None: 1, 'head': N // model, 'channel': N // model * P}
  decay_bytes = 4 * (B // data) * decays[decay]
  pairs = [R - (1 << step) for step in range((R - 1).bit_length())]
  sent = state * sum(pairs) + decay_bytes * sum(pairs[:-1])
  if packed:
    sent += 4 * (B // data) * (R - 1)
  runs = {'contiguous': 1, 'zigzag': 2}[layout]
  groups = mesh.size // R
  return {
    'collective-permute': groups * runs * sent,
    'all-reduce': groups * 2 * (R - 1) * state * with_state,
  }


def _combine(earlier, later):
  """The element of two runs, one after the other."""
  return earlier[0] * later[0], later[0] * earlier[1] + later[1]


def _drop_padding(k, log_decay, layout, axis):
  """k and log_decay of steps that change no state where there is padding."""
  positions = layout.positions(jax.lax.axis_index(axis))

  def drop(x):
    is_token = (positions < layout.seq_len).reshape(-1, *[1] * (x.ndim - 2))
    return jnp.where(is_token, x, 0)

  return jax.tree.map(drop, (k, log_decay))


def _shard(inputs, initial_state, *, layout, axis, normalize, **kwargs):
  """(out, last state) of one shard; see `linear_attention`."""
  q, k, v = (inputs[name] for name in 'qkv')
  log_decay, segment_ids = inputs['log_decay'], inputs['segment_ids']
  B, L, N, P = q.shape
  dtype = jnp.promote_types(jnp.result_type(q, k, v), jnp.float32)
  if initial_state is None:
    initial_state = jnp.zeros((B, N, P, v.shape[-1] + normalize), dtype)
  if layout.is_padded:
    k, log_decay = _drop_padding(k, log_decay, layout, axis)

  def by_run(x):
    return x.reshape(B * layout.runs, layout.run_len, *x.shape[2:])

  def runs_apart(x):
    return x.reshape(B, layout.runs, *x.shape[1:])

  q, k, v, log_decay = jax.tree.map(by_run, (q, k, v, log_decay))
  document = enters = None
  if segment_ids is not None:
    starts = by_run(starts_document(segment_ids, layout, axis))
    document = jnp.cumsum(starts.at[:, 0].set(False), axis=1, dtype=jnp.int32)
    # Whether the first token of a run sees the state that enters it.
    enters = ~starts[:, 0, None, None, None]

  values = v
  if normalize:
    values = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
  decay, change = final_state(
    k, values, num_heads=N, log_decay=log_decay, document=document
  )
  if enters is not None:
    decay = jnp.where(enters, decay, 0)
  state = run_states(
    initial_state.astype(dtype),
    (runs_apart(decay), runs_apart(change)),
    _combine,
    (jnp.ones_like(decay[:B]), jnp.zeros_like(change[:B])),
    layout,
    axis,
  )
  state = state.reshape(-1, *state.shape[2:])
  if enters is not None:
    state = jnp.where(enters, state, 0)
  out, state = local.linear_attention(
    q,
    k,
    v,
    log_decay=log_decay,
    segment_ids=document,
    initial_state=state,
    normalize=normalize,
    **kwargs,
  )
  last_state = of_last_run(runs_apart(state), layout, axis)
  return out.reshape(B, L, N, -1), last_state
