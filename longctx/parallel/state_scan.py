"""Recurrences over sequences that no single device holds.

What a run of tokens does to a recurrent state is an element (decay, state),
S' = decay S + state, whose size does not depend on the run. Every shard makes
the elements of its runs; a scan over the shards gives each run the state that
enters it; then every shard computes its outputs as if it were alone.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from longctx.parallel.axes import make_axes, make_layout
from longctx.parallel.halo import of_preceding_run
from longctx.parallel.layout import SequenceLayout
from longctx.typing import Array, Bool, Float, Int


@dataclasses.dataclass(frozen=True)
class ShardedRecurrence:
  """S' = decay S + state, as three functions of a stretch of tokens.

  The functions take arrays [B, L, ...] by name, and how often the
  segment id has changed so far, int32[B, L], or None without segments.

  Attributes:
    element: (arrays, segment_index) -> (decay, state) of the whole
      stretch, with axes [B, ...].
    combine: of two elements, the earlier first.
    no_decay: the decay that changes nothing, like another decay.
    outputs: (arrays, segment_index, entering state) -> (out, state at the end).
    writes: names of arrays that are set to zero where there is padding, so that
      it changes no state.
    state_shape: of one row, without the axis B.
  """

  element: Callable[[Mapping[str, Any], Any], tuple[Array, Array]]
  combine: Callable[[Any, Any], Any]
  no_decay: Callable[[Array], Array]
  outputs: Callable[[Mapping[str, Any], Any, Array], tuple[Array, Array]]
  writes: tuple[str, ...]
  state_shape: tuple[int, ...]


def run_recurrence(
  recurrence: ShardedRecurrence,
  inputs: Mapping[str, Array | None],
  *,
  mesh: Mesh,
  axis: str | tuple[str, ...],
  layout: str | SequenceLayout,
  in_layout: bool,
  segment_ids: Int[Array, 'B T'] | None,
  initial_state: Float[Array, 'B N *state'] | None,
) -> tuple[Float[Array, 'B T N V'], Float[Array, 'B N *state']]:
  """(out, last state) of a recurrence over a sequence on several devices.

  Args:
    recurrence: what to compute.
    inputs: arrays [B, T, heads, ...] by name; 'q' and 'k' are among them.
    mesh: batch on 'data', heads on 'model', if the mesh has these axes and
      `axis` does not name them.
    axis: mesh axis of the sequence, or several, the first outermost.
    layout: 'contiguous', 'zigzag', or a SequenceLayout.
    in_layout: whether arrays are in the layout's order.
    segment_ids: the state is set to zero wherever the id changes.
    initial_state: what enters the first token; None: zero.

  Raises:
    ValueError: shapes do not fit, each other or the mesh.
    NotImplementedError: the layout is striped.
  """
  B, T, N = inputs['q'].shape[:3]
  state_shape = (B, *recurrence.state_shape)
  if initial_state is not None and initial_state.shape != state_shape:
    raise ValueError(f'{initial_state.shape=} must be {state_shape}')
  axes = make_axes(mesh, axis)
  axes.check(batch=B, query_heads=N, key_heads=inputs['k'].shape[2])
  shards = axes.size(axes.seq)
  layout = make_layout(layout, T, shards, in_layout=in_layout)
  if not layout.spans_per_shard:
    raise NotImplementedError(
      'a recurrence needs runs of neighbouring tokens, which a striped '
      "sequence has not: take layout 'contiguous' or 'zigzag'"
    )
  if not in_layout:
    inputs = jax.tree.map(layout.apply, dict(inputs))
    segment_ids = jax.tree.map(layout.apply, segment_ids)
  in_specs = dict.fromkeys(inputs, axes.spec(heads=True))
  state_spec = PartitionSpec(axes.data, axes.heads)
  out, state = jax.shard_map(
    functools.partial(_shard, recurrence, layout=layout, axis=axis),
    mesh=mesh,
    in_specs=(in_specs, axes.spec(), state_spec),
    out_specs=(in_specs['q'], state_spec),
    check_vma=False,
  )(dict(inputs), segment_ids, initial_state)
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
  if layout.spans_per_shard == 1:
    return before[:, None]
  second, _ = enter(after, 1, True)
  return jnp.stack([before, second], axis=1)


def of_last_run(
  x: Array, layout: SequenceLayout, axis: str | tuple[str, ...]
) -> Array:
  """What the last run of all holds, on every shard; x is [B, runs, ...].

  To be called inside shard_map.
  """
  owner = layout.num_shards - 1 if layout.spans_per_shard == 1 else 0
  is_owner = jax.lax.axis_index(axis) == owner
  return jax.lax.psum(jnp.where(is_owner, x[:, -1], 0), axis)


def starts_segment(
  segment_ids: Int[Array, 'B L'],
  layout: SequenceLayout,
  axis: str | tuple[str, ...],
) -> Bool[Array, 'B L']:
  """Whether the id changes from the token before, which may lie elsewhere.

  To be called inside shard_map. The first token of all changes nothing, nor
  does padding: what enters it leaves it.
  """
  ids = segment_ids.reshape(
    segment_ids.shape[0], layout.spans_per_shard, layout.span_len
  )
  last = of_preceding_run(ids[:, :, -1], layout, axis)
  before = jnp.concatenate([last[:, :, None], ids[:, :, :-1]], axis=2)
  positions = layout.positions(jax.lax.axis_index(axis))
  inside = (positions > 0) & (positions < layout.seq_len)
  return (ids != before).reshape(segment_ids.shape) & inside


def _drop_padding(
  inputs: dict[str, Array | None],
  names: tuple[str, ...],
  layout: SequenceLayout,
  axis: str | tuple[str, ...],
) -> dict[str, Array | None]:
  """The inputs with steps that change no state where there is padding."""
  positions = layout.positions(jax.lax.axis_index(axis))

  def drop(x):
    is_token = (positions < layout.seq_len).reshape(-1, *[1] * (x.ndim - 2))
    return jnp.where(is_token, x, 0)

  return inputs | jax.tree.map(drop, {name: inputs[name] for name in names})


def _shard(recurrence, inputs, segment_ids, initial_state, *, layout, axis):
  """(out, last state) of one shard; see `run_recurrence`."""
  B, L, N = inputs['q'].shape[:3]
  arrays = [x for x in inputs.values() if x is not None]
  dtype = jnp.promote_types(jnp.result_type(*arrays), jnp.float32)
  if initial_state is None:
    # The heads of this device alone.
    initial_state = jnp.zeros((B, N, *recurrence.state_shape[1:]), dtype)
  if layout.is_padded:
    inputs = _drop_padding(inputs, recurrence.writes, layout, axis)

  def by_run(x):
    return x.reshape(B * layout.spans_per_shard, layout.span_len, *x.shape[2:])

  def runs_apart(x):
    return x.reshape(B, layout.spans_per_shard, *x.shape[1:])

  inputs = jax.tree.map(by_run, inputs)
  segment_index = enters = None
  if segment_ids is not None:
    starts = by_run(starts_segment(segment_ids, layout, axis))
    segment_index = jnp.cumsum(
      starts.at[:, 0].set(False), axis=1, dtype=jnp.int32
    )
    # Whether the first token of a run sees the state that enters it.
    enters = ~starts[:, 0, None, None, None]

  decay, change = recurrence.element(inputs, segment_index)
  if enters is not None:
    decay = jnp.where(enters, decay, 0)
  state = run_states(
    initial_state.astype(dtype),
    (runs_apart(decay), runs_apart(change)),
    recurrence.combine,
    (recurrence.no_decay(decay[:B]), jnp.zeros_like(change[:B])),
    layout,
    axis,
  )
  state = state.reshape(-1, *state.shape[2:])
  if enters is not None:
    state = jnp.where(enters, state, 0)
  out, state = recurrence.outputs(inputs, segment_index, state)
  last_state = of_last_run(runs_apart(state), layout, axis)
  return out.reshape(B, L, *out.shape[2:]), last_state
