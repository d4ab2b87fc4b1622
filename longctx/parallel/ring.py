"""Ring attention: keys and values visit the devices that read them.

Every device holds the queries, keys and values of its tokens. Keys and values
travel along the passes of a `Schedule`; at every stop the device goes on from
what it has summed so far, in float32. Ring Attention (arXiv:2310.01889), with
the hops, their direction and what travels derived from the mask.

The backward pass sends keys and values again, with the gradients that they have
collected so far, and those home at the end. Between the passes a device keeps
its own q, k, v, out and lse, O(T / R) memory. Second derivatives are those of
the two passes as JAX takes them, and keep what is at hand at every hop, O(T).

All functions here run inside of `shard_map`, on one device's arrays.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from longctx.masks import Mask
from longctx.ops.dot_product_attention import (
  AttentionArgs,
  flash,
)
from longctx.ops.dot_product_attention.args import Gradients, OutLse
from longctx.ops.merge import merge, merge_devices
from longctx.parallel.schedule import (
  Ring,
  RingPass,
  Schedule,
  full_schedule,
  make_schedule,
)
from longctx.typing import Array, Bool, Float, Int

Axis = str | tuple[str, ...]


class Queries(NamedTuple):
  """Queries of a ring and where they are."""

  q: Float[Array, 'B T N H']
  positions: Int[Array, 'b T'] | None
  segment_ids: Int[Array, 'B T'] | None


class Keys(NamedTuple):
  """Keys, values and where they are: what travels in a ring.

  Attributes:
    positions: None where they follow from the shard.
  """

  k: Float[Array, 'B S K H']
  v: Float[Array, 'B S K V']
  positions: Int[Array, 'b S'] | None
  segment_ids: Int[Array, 'B S'] | None


def attend(
  q: Float[Array, 'B L N H'],
  k: Float[Array, 'B L K H'],
  v: Float[Array, 'B L K V'],
  args: AttentionArgs,
  *,
  axis: Axis,
  ring: Ring,
  backend: flash.Backend,
) -> OutLse:
  """Attention of this device's queries to the keys of all of `axis`.

  Args:
    q: this device's queries, of L = ring.shard_len tokens.
    k: its keys.
    v: its values.
    args: of this device's tokens and heads. Where positions are None they are
      the natural ones, and only then the schedule knows which hops nobody
      reads.
    axis: the mesh axis that the ring runs along.
    ring: the layout of the tokens.
    backend: of the parts.

  Returns:
    out in the dtype of q, lse in float32.
  """
  indices = args.indices
  natural = indices.q_positions is None and indices.k_positions is None
  make = make_schedule if natural else full_schedule
  schedule = make(args.static.mask, ring)
  if not natural:
    own = ring.positions(lax.axis_index(axis))[None]
    args = args.with_indices(
      q_positions=own if indices.q_positions is None else indices.q_positions,
      k_positions=own if indices.k_positions is None else indices.k_positions,
    )
  args = args.with_block_sizes(contiguous_len=ring.contiguous_len)
  passes = RingPasses(axis, ring, schedule, backend)
  return flash.attend(passes, q, k, v, args)


@dataclasses.dataclass(frozen=True)
class RingPasses(flash.Passes):
  """Ring attention's forward and backward pass over a mesh axis."""

  axis: Axis
  ring: Ring
  schedule: Schedule
  backend: flash.Backend

  def forward(
    self,
    q: Float[Array, 'B L N H'],
    k: Float[Array, 'B L K H'],
    v: Float[Array, 'B L K V'],
    args: AttentionArgs,
    dtype: Any = None,
  ) -> OutLse:
    schedule, backend = self.schedule, self.backend
    device = _Device(self, args)
    queries, keys = device.queries(q), device.keys(k, v)
    arriving = [device.send(ring_pass, keys) for ring_pass in schedule.passes]
    part = device.args(schedule.travelling, queries, keys)
    out, lse = backend.forward(q, k, v, part)
    if schedule.prefix_keys:
      far = device.broadcast_keys(keys, schedule.prefix_keys)
      part = device.args(schedule.mask, queries, far)
      out, lse = merge(out, lse, *backend.forward(q, far.k, far.v, part))
    if schedule.prefix_queries:
      n = schedule.prefix_queries
      far = device.broadcast_queries(queries, n)
      part = device.args(schedule.of_prefix_queries, far, keys)
      part = merge_devices(*backend.forward(far.q, k, v, part), axis=self.axis)
      own = device.take((out, lse), n)
      out, lse = device.put((out, lse), merge(*own, *part))

    for ring_pass, arrived in zip(schedule.passes, arriving, strict=True):

      def stop(hop, state, arrived, ring_pass=ring_pass):
        keys = device.arrived(ring_pass, arrived, hop)
        part = device.args(schedule.travelling, queries, keys)
        return backend.accumulate(q, keys.k, keys.v, part, state)

      def body(carry, hop, ring_pass=ring_pass, stop=stop):
        arrived, state = carry
        # On its way before the work that it will overlap with.
        following = device.shift(arrived, ring_pass.pairs)
        return (following, stop(hop, state, arrived)), None

      part = device.args(schedule.travelling, queries, arrived)
      state = backend.from_partial(q, arrived.k, part, out, lse)
      if ring_pass.hops > 1:
        hops = jnp.arange(1, ring_pass.hops)
        (arrived, state), _ = lax.scan(body, (arrived, state), hops)
      state = stop(ring_pass.hops, state, arrived)
      out, lse = backend.finalize(q, arrived.k, part, state)
    return out, lse

  def backward(
    self,
    q: Float[Array, 'B L N H'],
    k: Float[Array, 'B L K H'],
    v: Float[Array, 'B L K V'],
    args: AttentionArgs,
    lse: Float[Array, 'B L N'],
    dout: Float[Array, 'B L N V'],
    delta: Float[Array, 'B L N'],
    dtype: Any = None,
  ) -> Gradients:
    schedule, backend = self.schedule, self.backend
    device = _Device(self, args)
    queries, keys = device.queries(q), device.keys(k, v)
    # What the backward pass knows of queries, which goes where they go.
    known = (lse, dout, delta)
    arriving = [device.send(ring_pass, keys) for ring_pass in schedule.passes]
    part = device.args(schedule.travelling, queries, keys)
    dq, dk, dv = backend.backward(q, k, v, part, *known)
    if schedule.prefix_keys:
      far = device.broadcast_keys(keys, schedule.prefix_keys)
      part = device.args(schedule.mask, queries, far)
      share, *far = backend.backward(q, far.k, far.v, part, *known)
      dq += share
      dk, dv = device.collect((dk, dv), far)
    if schedule.prefix_queries:
      n = schedule.prefix_queries
      far = device.broadcast_queries(queries, n)
      part = device.args(schedule.of_prefix_queries, far, keys)
      far_known = device.broadcast(known, n)
      share = backend.backward(far.q, k, v, part, *far_known)
      (dq,) = device.collect((dq,), share[:1])
      dk, dv = dk + share[1], dv + share[2]

    for ring_pass, arrived in zip(schedule.passes, arriving, strict=True):
      everyone = device.neighbours(ring_pass.direction)

      def stop(hop, state, arrived, ring_pass=ring_pass):
        keys = device.arrived(ring_pass, arrived, hop)
        part = device.args(schedule.travelling, queries, keys)
        state, *share = backend.accumulate_gradients(
          q, keys.k, keys.v, part, *known, state
        )
        return state, tuple(share)

      def body(carry, hop, ring_pass=ring_pass, stop=stop, everyone=everyone):
        arrived, collected, state = carry
        following = device.shift(arrived, ring_pass.pairs)
        collected = device.shift(collected, everyone)
        state, share = stop(hop, state, arrived)
        collected = jax.tree.map(jnp.add, collected, share)
        return (following, collected, state), None

      part = device.args(schedule.travelling, queries, arrived)
      state, collected = backend.init_dq(q, arrived.k, part, dq.dtype), None
      if ring_pass.hops > 1:
        zeros = tuple(
          jnp.zeros_like(x[:, : ring_pass.length]) for x in (dk, dv)
        )
        hops = jnp.arange(1, ring_pass.hops)
        carry, _ = lax.scan(body, (arrived, zeros, state), hops)
        arrived, collected, state = carry
        collected = device.shift(collected, everyone)
      state, share = stop(ring_pass.hops, state, arrived)
      dq += backend.finalize_dq(q, arrived.k, part, state)
      if collected is not None:
        share = jax.tree.map(jnp.add, collected, share)
      back = -ring_pass.direction * ring_pass.hops
      home = device.shift(share, device.neighbours(back))
      dk = dk.at[:, ring_pass.start : ring_pass.stop].add(home[0])
      dv = dv.at[:, ring_pass.start : ring_pass.stop].add(home[1])
    return dq, dk, dv


class _Device:
  """Device of a ring: who it is, what it has, what it sends."""

  def __init__(self, passes: RingPasses, args: AttentionArgs):
    self.axis, self.ring, self.given = passes.axis, passes.ring, args
    self.me = lax.axis_index(passes.axis)
    # Of its own tokens, where none are given.
    self.positions = self.ring.positions(self.me)[None]

  def queries(self, q: Float[Array, 'B L N H']) -> Queries:
    positions = self.given.indices.q_positions
    if positions is None:
      positions = self.positions
    return Queries(q, positions, self.given.indices.q_segment_ids)

  def keys(
    self, k: Float[Array, 'B L K H'], v: Float[Array, 'B L K V']
  ) -> Keys:
    indices = self.given.indices
    return Keys(k, v, indices.k_positions, indices.k_segment_ids)

  def args(self, mask: Mask, queries: Queries, keys: Keys) -> AttentionArgs:
    """How some queries read some keys."""
    positions = self.positions if keys.positions is None else keys.positions
    return self.given.with_static(mask=mask).with_indices(
      q_positions=queries.positions,
      k_positions=positions,
      q_segment_ids=queries.segment_ids,
      k_segment_ids=keys.segment_ids,
    )

  def neighbours(self, offset: int) -> tuple[tuple[int, int], ...]:
    R = self.ring.size
    return tuple((r, (r + offset) % R) for r in range(R))

  def shift(self, tree: Any, pairs: tuple[tuple[int, int], ...]) -> Any:
    return jax.tree.map(lambda x: lax.ppermute(x, self.axis, pairs), tree)

  def send(self, ring_pass: RingPass, keys: Keys) -> Keys:
    """The first hop of a ring pass."""
    sent = jax.tree.map(lambda x: x[:, ring_pass.start : ring_pass.stop], keys)
    return self.shift(sent, ring_pass.pairs)

  def arrived(
    self, ring_pass: RingPass, keys: Keys, hop: int | Int[Array, '']
  ) -> Keys:
    """The keys of a hop with their positions."""
    if keys.positions is not None:
      return keys
    shard = (self.me - ring_pass.direction * hop) % self.ring.size
    positions = self.ring.positions(shard)[ring_pass.start : ring_pass.stop]
    return keys._replace(positions=positions[None])

  def broadcast_keys(self, keys: Keys, n: int) -> Keys:
    """The first n keys of the sequence, on every device."""
    positions = jnp.arange(n, dtype=jnp.int32)[None]
    return self.broadcast(keys, n)._replace(positions=positions)

  def broadcast_queries(self, queries: Queries, n: int) -> Queries:
    """The first n queries of the sequence, on every device."""
    positions = jnp.arange(n, dtype=jnp.int32)[None]
    rows = self.broadcast(queries._replace(positions=None), n)
    return rows._replace(positions=positions)

  def broadcast(self, tree: Any, n: int) -> Any:
    """The first n tokens of the sequence, on every device."""
    mine = self._owned(n)

    def sum_of_owners(x, rows):
      own = mine.reshape(1, n, *(1,) * (x.ndim - 2))
      return lax.psum(jnp.where(own, rows, 0), self.axis)

    return jax.tree.map(sum_of_owners, tree, self.take(tree, n))

  def take(self, tree: Any, n: int) -> Any:
    """Rows of this device's arrays at the places of the first n tokens."""
    tokens = self.ring.place_of(n)[1]
    return jax.tree.map(lambda x: x[:, tokens], tree)

  def put(self, tree: Any, rows: Any) -> Any:
    """Replaces the first tokens of the sequence where this device has them."""

    def replace(x, rows):
      tokens = self._own_tokens(rows.shape[1])
      return x.at[:, tokens].set(rows, mode='drop')

    return jax.tree.map(replace, tree, rows)

  def collect(self, tree: Any, rows: Any) -> Any:
    """Adds all devices' shares of the first tokens at their owner."""

    def add(x, rows):
      tokens = self._own_tokens(rows.shape[1])
      return x.at[:, tokens].add(lax.psum(rows, self.axis), mode='drop')

    return tuple(add(x, r) for x, r in zip(tree, rows, strict=True))

  def _own_tokens(self, n: int) -> Int[Array, ' n']:
    """Their places; out of range, and so dropped, on another device."""
    tokens = self.ring.place_of(n)[1]
    return jnp.where(self._owned(n), tokens, self.ring.shard_len)

  def _owned(self, n: int) -> Bool[Array, ' n']:
    """Which of the first n tokens of the sequence this device has."""
    return self.ring.place_of(n)[0] == self.me
