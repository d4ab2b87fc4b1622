"""State scan over the shards of a sequence: what enters each span of tokens.

An element is (decay, state), S' = decay S + state, of a span of tokens; see
recurrences.py.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from longctx.parallel.halo import of_preceding_span
from longctx.parallel.layout import SequenceLayout
from longctx.typing import Array, Bool, Int


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


def span_states(
  initial_state: Array,
  elements: tuple[Array, Array],
  combine: Callable[[Any, Any], Any],
  identity: tuple[Array, Array],
  layout: SequenceLayout,
  axis: str | tuple[str, ...],
) -> Array:
  """The state that enters each span of this shard, [B, spans, ...].

  To be called inside shard_map. Zigzag: the first spans of the shards ascend,
  the second descend, so the one scan starts where the other ends, on the last
  shard, which holds the two spans in the middle.

  Args:
    initial_state: what enters the first span of all.
    elements: (decay, state) of each span, with axes [B, spans, ...]: what it
      makes of no state, and by which factor, or matrix, of the entering one.
    combine: of two elements, the earlier first.
    identity: the element that changes nothing, without the axis of spans.
    layout: contiguous or zigzag.
    axis: the mesh axes of the sequence.
  """

  def enter(state: Array, span: int, reverse: bool) -> tuple[Array, Array]:
    """The states that enter the spans, where `state` enters the first."""
    decay, change = jax.tree.map(lambda x: x[:, span], elements)
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


def of_last_span(
  x: Array, layout: SequenceLayout, axis: str | tuple[str, ...]
) -> Array:
  """What the last span of all holds, on every shard; x is [B, spans, ...].

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
  last = of_preceding_span(ids[:, :, -1], layout, axis)
  before = jnp.concatenate([last[:, :, None], ids[:, :, :-1]], axis=2)
  positions = layout.positions(jax.lax.axis_index(axis))
  inside = (positions > 0) & (positions < layout.seq_len)
  return (ids != before).reshape(segment_ids.shape) & inside
