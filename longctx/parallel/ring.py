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
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from longctx.masks import Mask
from longctx.ops.dot_product_attention import (
  BlockSizes,
  Dropout,
  pallas_tpu,
  xla,
)
from longctx.ops.dot_product_attention.normalizers import Normalizer
from longctx.ops.dot_product_attention.work_list import Indices
from longctx.ops.merge import merge, merge_devices
from longctx.ops.remat import keep
from longctx.parallel.schedule import (
  Ring,
  RingPass,
  Schedule,
  full_schedule,
  make_schedule,
)
from longctx.typing import Array, Float, Int

Axis = str | tuple[str, ...]

# What computes the parts, by the same functions: sums to go on from, forward
# and backward.
PARTS = {'xla': xla, 'pallas': pallas_tpu}


@dataclasses.dataclass(frozen=True)
class Spec:
  """What does not depend on the arrays' contents."""

  axis: Axis
  ring: Ring
  schedule: Schedule
  scale: float
  logits_soft_cap: float | None
  normalizer: Normalizer
  block_sizes: BlockSizes | None
  implementation: str

  @property
  def parts(self) -> Any:
    return PARTS[self.implementation]


class Queries(NamedTuple):
  """Queries and where they are."""

  q: Float[Array, 'B T N H']
  positions: Int[Array, 'b T'] | None
  segment_ids: Int[Array, 'B T'] | None


class Keys(NamedTuple):
  """Keys, values and where they are; what travels.

  Attributes:
    positions: None where they follow from the shard.
  """

  k: Float[Array, 'B S K H']
  v: Float[Array, 'B S K V']
  positions: Int[Array, 'b S'] | None
  segment_ids: Int[Array, 'B S'] | None


class Extras(NamedTuple):
  """Arrays without a gradient; None where not used."""

  indices: Indices
  alibi_slopes: Float[Array, ' N'] | None
  dropout: Dropout | None


def attend(
  q: Float[Array, 'B L N H'],
  k: Float[Array, 'B L K H'],
  v: Float[Array, 'B L K V'],
  *,
  axis: Axis,
  ring: Ring,
  mask: Mask,
  q_positions: Int[Array, 'b L'] | None,
  k_positions: Int[Array, 'b L'] | None,
  q_segment_ids: Int[Array, 'B L'] | None,
  k_segment_ids: Int[Array, 'B L'] | None,
  scale: float,
  logits_soft_cap: float | None,
  alibi_slopes: Float[Array, ' N'] | None,
  normalizer: Normalizer,
  dropout: Dropout | None,
  block_sizes: BlockSizes | None,
  implementation: str,
) -> tuple[Float[Array, 'B L N V'], Float[Array, 'B L N']]:
  """Attention of this device's queries to the keys of all of `axis`.

  Args:
    q: this device's queries, of L = ring.shard_len tokens.
    k: its keys.
    v: its values.
    axis: the mesh axis that the ring runs along.
    ring: the layout of the tokens.
    mask: as in ops.
    q_positions: of this device's queries; None takes the natural ones, and only
      then the schedule knows which hops nobody reads.
    k_positions: of its keys, likewise.
    q_segment_ids: of its queries.
    k_segment_ids: of its keys.
    scale: as in ops, like the next ones.
    logits_soft_cap: cap on the logits.
    alibi_slopes: of this device's heads.
    normalizer: of the logits; what it finishes is left to the caller.
    dropout: with this device's first batch row and head.
    block_sizes: of the parts.
    implementation: of the parts, of `PARTS`.

  Returns:
    out in the dtype of q, lse in float32.
  """
  natural = q_positions is None and k_positions is None
  make = make_schedule if natural else full_schedule
  schedule = make(mask, ring)
  spec = Spec(
    axis,
    ring,
    schedule,
    scale,
    logits_soft_cap,
    normalizer,
    block_sizes,
    implementation,
  )
  if not natural:
    own = ring.positions(lax.axis_index(axis))[None]
    q_positions = own if q_positions is None else q_positions
    k_positions = own if k_positions is None else k_positions
  indices = Indices(q_positions, k_positions, q_segment_ids, k_segment_ids)
  return _attend(spec, q, k, v, Extras(indices, alibi_slopes, dropout))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(spec: Spec, q, k, v, extras: Extras):
  return _attend_fwd(spec, q, k, v, extras)[0]


def _attend_fwd(spec: Spec, q, k, v, extras: Extras):
  out, lse = _forward(_Device(spec, extras), q, k, v)
  out, lse = keep(out.astype(q.dtype), lse)
  return (out, lse), (q, k, v, extras, out, lse)


def _attend_bwd(spec: Spec, residuals, cotangents):
  q, k, v, extras, out, lse = residuals
  dout, dlse = cotangents
  delta = xla.make_delta(out, dout, dlse)
  grads = _backward(_Device(spec, extras), q, k, v, lse, dout, delta)
  grads = (g.astype(x.dtype) for g, x in zip(grads, (q, k, v), strict=True))
  return *grads, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _forward(device: '_Device', q, k, v):
  schedule, parts = device.spec.schedule, device.spec.parts
  queries, keys = device.queries(q), device.keys(k, v)
  arriving = [device.send(ring_pass, keys) for ring_pass in schedule.passes]
  out, lse = device.forward(schedule.travelling, queries, keys)
  if schedule.prefix_keys:
    columns = device.broadcast_keys(keys, schedule.prefix_keys)
    part = device.forward(schedule.mask, queries, columns)
    out, lse = merge(out, lse, *part)
  if schedule.prefix_queries:
    rows = device.broadcast_queries(queries, schedule.prefix_queries)
    part = device.forward(schedule.of_prefix_queries, rows, keys)
    part = merge_devices(*part, axis=device.spec.axis)
    own = device.take((out, lse), schedule.prefix_queries)
    out, lse = device.put((out, lse), merge(*own, *part))

  for ring_pass, arrived in zip(schedule.passes, arriving, strict=True):
    part = device.part(schedule.travelling, queries, arrived)

    def stop(hop, sums, arrived, ring_pass=ring_pass, part=part):
      keys = device.arrived(ring_pass, arrived, hop)
      extras = device.extras(queries, keys)
      return parts.add(part, queries.q, keys.k, keys.v, extras, sums)

    def body(carry, hop, ring_pass=ring_pass, stop=stop):
      arrived, sums = carry
      # On its way before the work that it will overlap with.
      following = device.shift(arrived, ring_pass.pairs)
      return (following, stop(hop, sums, arrived)), None

    sums = parts.resume(part, out, lse)
    if ring_pass.hops > 1:
      hops = jnp.arange(1, ring_pass.hops)
      (arrived, sums), _ = lax.scan(body, (arrived, sums), hops)
    out, lse = parts.finish(part, stop(ring_pass.hops, sums, arrived))
  return out, lse


def _backward(device: '_Device', q, k, v, lse, dout, delta):
  schedule, parts = device.spec.schedule, device.spec.parts
  queries, keys = device.queries(q), device.keys(k, v)
  # The cotangents of the queries' rows, which go where the queries go.
  bars = (lse, dout, delta)
  arriving = [device.send(ring_pass, keys) for ring_pass in schedule.passes]
  dq, dk, dv = device.backward(schedule.travelling, queries, keys, bars)
  if schedule.prefix_keys:
    columns = device.broadcast_keys(keys, schedule.prefix_keys)
    part = device.backward(schedule.mask, queries, columns, bars)
    dq += part[0]
    dk, dv = device.collect((dk, dv), part[1:])
  if schedule.prefix_queries:
    rows = device.broadcast_queries(queries, schedule.prefix_queries)
    row_bars = device.broadcast(bars, schedule.prefix_queries)
    part = device.backward(schedule.of_prefix_queries, rows, keys, row_bars)
    (dq,) = device.collect((dq,), part[:1])
    dk, dv = dk + part[1], dv + part[2]

  for ring_pass, arrived in zip(schedule.passes, arriving, strict=True):
    everyone = device.neighbours(ring_pass.direction)
    part = device.part(schedule.travelling, queries, arrived)

    def stop(hop, sums, arrived, ring_pass=ring_pass, part=part):
      keys = device.arrived(ring_pass, arrived, hop)
      extras = device.extras(queries, keys)
      sums, *share = parts.add_gradients(
        part, queries.q, keys.k, keys.v, extras, *bars, sums
      )
      return sums, tuple(share)

    def body(carry, hop, ring_pass=ring_pass, stop=stop, everyone=everyone):
      arrived, collected, sums = carry
      following = device.shift(arrived, ring_pass.pairs)
      collected = device.shift(collected, everyone)
      sums, share = stop(hop, sums, arrived)
      return (following, jax.tree.map(jnp.add, collected, share), sums), None

    collected = None
    sums = parts.no_queries(part, q, dq.dtype)
    if ring_pass.hops > 1:
      zeros = (
        jnp.zeros_like(dk[:, : ring_pass.length]),
        jnp.zeros_like(dv[:, : ring_pass.length]),
      )
      carry = (arrived, zeros, sums)
      carry, _ = lax.scan(body, carry, jnp.arange(1, ring_pass.hops))
      arrived, collected, sums = carry
      collected = device.shift(collected, everyone)
    sums, share = stop(ring_pass.hops, sums, arrived)
    dq += parts.join_queries(part, sums)
    if collected is not None:
      share = jax.tree.map(jnp.add, collected, share)
    back = -ring_pass.direction * ring_pass.hops
    home = device.shift(share, device.neighbours(back))
    dk = dk.at[:, ring_pass.start : ring_pass.stop].add(home[0])
    dv = dv.at[:, ring_pass.start : ring_pass.stop].add(home[1])
  return dq, dk, dv


class _Device:
  """One device's view: who it is, and what it does with parts."""

  def __init__(self, spec: Spec, extras: Extras):
    self.spec, self.given = spec, extras
    self.ring = spec.ring
    self.me = lax.axis_index(spec.axis)

  def queries(self, q) -> Queries:
    indices = self.given.indices
    positions = indices.q_positions
    if positions is None:
      positions = self.ring.positions(self.me)[None]
    return Queries(q, positions, indices.q_segment_ids)

  def keys(self, k, v) -> Keys:
    indices = self.given.indices
    return Keys(k, v, indices.k_positions, indices.k_segment_ids)

  def neighbours(self, offset: int) -> tuple[tuple[int, int], ...]:
    R = self.ring.size
    return tuple((r, (r + offset) % R) for r in range(R))

  def shift(self, tree: Any, pairs: tuple[tuple[int, int], ...]) -> Any:
    return jax.tree.map(lambda x: lax.ppermute(x, self.spec.axis, pairs), tree)

  def send(self, ring_pass: RingPass, keys: Keys) -> Keys:
    """The first hop of a ring pass."""
    sent = jax.tree.map(lambda x: x[:, ring_pass.start : ring_pass.stop], keys)
    return self.shift(sent, ring_pass.pairs)

  def arrived(self, ring_pass: RingPass, keys: Keys, hop: int | Array) -> Keys:
    """The keys of a hop with their positions."""
    if keys.positions is not None:
      return keys
    shard = (self.me - ring_pass.direction * hop) % self.ring.size
    positions = self.ring.positions(shard)[ring_pass.start : ring_pass.stop]
    return keys._replace(positions=positions[None])

  def forward(self, mask: Mask, queries: Queries, keys: Keys):
    """(out, lse) of some queries and keys, unrounded."""
    spec, extras = self.part(mask, queries, keys), self.extras(queries, keys)
    return self.spec.parts.forward(spec, queries.q, keys.k, keys.v, extras)

  def backward(self, mask: Mask, queries: Queries, keys: Keys, bars):
    """Their share of (dq, dk, dv), unrounded."""
    spec, extras = self.part(mask, queries, keys), self.extras(queries, keys)
    return self.spec.parts.backward(
      spec, queries.q, keys.k, keys.v, extras, *bars
    )

  def part(self, mask: Mask, queries: Queries, keys: Keys) -> Any:
    """How some queries read some keys."""
    return self.spec.parts.make_spec(
      queries.q,
      keys.k,
      mask=mask,
      scale=self.spec.scale,
      logits_soft_cap=self.spec.logits_soft_cap,
      normalizer=self.spec.normalizer,
      block_sizes=dataclasses.replace(
        self.spec.block_sizes or BlockSizes(),
        contiguous_len=self.ring.contiguous_len,
      ),
    )

  def extras(self, queries: Queries, keys: Keys) -> xla.Extras:
    """Where they are, and what else has no gradient."""
    positions = keys.positions
    if positions is None:
      positions = self.ring.positions(self.me)[None]
    indices = Indices(
      queries.positions, positions, queries.segment_ids, keys.segment_ids
    )
    return xla.Extras(indices, self.given.alibi_slopes, self.given.dropout)

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
      return lax.psum(jnp.where(own, rows, 0), self.spec.axis)

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
      rows = lax.psum(rows, self.spec.axis)
      return x.at[:, tokens].add(rows, mode='drop')

    return tuple(add(x, r) for x, r in zip(tree, rows, strict=True))

  def _own_tokens(self, n: int):
    """Their places; out of range, and so dropped, on another device."""
    tokens = self.ring.place_of(n)[1]
    return jnp.where(self._owned(n), tokens, self.ring.shard_len)

  def _owned(self, n: int):
    """Which of the first n tokens of the sequence this device has."""
    return self.ring.place_of(n)[0] == self.me
