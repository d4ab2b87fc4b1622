"""KV cache at work: a layer's next tokens beside those that it remembers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from longctx import parallel
from longctx.attention.cache_spec import CacheBuilder
from longctx.attention.context import Context, biased
from longctx.masks import KVRetention, check_mask
from longctx.ops import recurrence as recurrences
from longctx.ops import short_conv as convolution
from longctx.ops.block_selection import Summary
from longctx.ops.block_selection.segments import take_blocks
from longctx.parallel.axes import Axes
from longctx.parallel.layout import SequenceLayout
from longctx.typing import Array, Bool, Float, Int, Shaped

# Where there is no token: later than any query, which causal masks exclude.
NOWHERE = 2**30
# So far masks are checked for rows without an end.
MANY_TOKENS = 2**16


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodingContext(Context):
  """Decoding context: the next tokens of each row, after those of a KV cache.

  Methods take and give what those of `Context` do.

  Attributes:
    builder: the layer's cache.
    lengths: tokens that each row has read before.
    valid: which of the tokens are a row's own, the first ones; None: all.
    axes: of the mesh that the cache is spread over; None: one device.
  """

  builder: CacheBuilder
  lengths: Int[Array, ' B']
  valid: Bool[Array, 'B T'] | None = None
  axes: Axes | None = None

  def segment_positions(self, T: int) -> Int[Array, 'B T']:
    return self.positions

  def natural_length(self, T: int) -> int | None:
    # Asked for when the length is decided; an endless one is above any limit.
    if not self.builder.is_tracing:
      return None
    return self.builder.capacity or NOWHERE

  def cumulative_sum(self, x: Float[Array, 'B T N']) -> Float[Array, 'B T N']:
    place = self.builder.state(x.shape[2:], x.dtype, is_sum=True)
    before = self.builder.arrays[place][:, None]
    sums = before + jnp.cumsum(self._own(x), axis=1)
    self.builder.arrays[place] = sums[:, -1]
    return sums

  def short_conv(
    self, x: Float[Array, 'B T E'], kernel: Float[Array, 'W E']
  ) -> Float[Array, 'B T E']:
    before = kernel.shape[0] - 1
    place = self.builder.state((before, x.shape[2]), x.dtype)
    tail = self.builder.arrays[place]
    kernel = kernel.astype(x.dtype)
    out, last = convolution.short_conv(x, kernel, initial_state=tail)
    if self.valid is not None:
      inputs = jnp.concatenate([tail, x], axis=1)
      cut = functools.partial(lax.dynamic_slice_in_dim, slice_size=before)
      last = jax.vmap(cut)(inputs, self.counts(x.shape[1]))
    self.builder.arrays[place] = last
    return out

  def recurrence(self, recurrence, q, k, v, *, beta=None, log_decay=None):
    dtype = jnp.promote_types(jnp.result_type(q, k, v), jnp.float32)
    place = self.builder.state(recurrence.state_shape, dtype, is_sum=True)
    # A token that is not the row's own adds nothing, and nothing fades by it.
    k, beta, log_decay = map(self._own, (k, beta, log_decay))
    implementation = self.implementation
    if implementation is None and q.shape[1] == 1:
      # The equation itself, where a chunk would be mostly padding.
      implementation = 'reference'
    elif self.axes is not None and implementation in (None, 'pallas'):
      # What the compiler itself spreads over a mesh cannot be a kernel.
      if implementation:
        raise NotImplementedError(
          f'{implementation=} does not read a cache that lies on a mesh: take '
          "'xla' or None"
        )
      implementation = 'xla'
    out, self.builder.arrays[place] = recurrence.run(
      recurrences,
      *(q, k, v, beta),
      log_decay=log_decay,
      initial_state=self.builder.arrays[place],
      chunk_size=min(recurrence.chunk_size, q.shape[1]),
      implementation=implementation,
    )
    return self.at_queries(out)

  def dot_product_attention(
    self, q, k, v, *, mask, q_bias=None, k_bias=None, **options
  ):
    # Steps check a mask as far as a cache has slots: what it lets a cache
    # forget has to hold as far as a row may get.
    length = self.builder.capacity or MANY_TOKENS
    check_mask(mask, length if self.builder.is_tracing else None)
    retention = mask.kv_retention()
    if not mask.is_causal:
      self.builder.reads_later.append(mask)
    if k_bias is not None:
      k_bias = jnp.broadcast_to(k_bias, (k.shape[0], *k_bias.shape[1:]))
      k_bias, _ = self._keep(k_bias, retention, is_sum=True)
    k, k_positions = self._keep(k, retention)
    v, _ = self._keep(v, retention)
    q, k, v, options = biased(q, k, v, q_bias, k_bias, options)
    attend = self.softmax_op if self.axes is None else self._attend_on_mesh
    q = self.at_queries(q)
    options |= dict(mask=mask, block_sizes=self.block_sizes)
    options['implementation'] = self.implementation
    if self.implementation is None and q.shape[1] == 1:
      # The scores of a token fit anywhere, and blocks of one row are all
      # overhead.
      options['implementation'] = 'decode'

    def run(q, k, v, q_positions, k_positions):
      at = dict(q_positions=q_positions, k_positions=k_positions)
      return attend(q, k, v, **at, **options)

    return self._apart(
      run, q, k, v, self.at_queries(self.positions), k_positions
    )

  def _apart(self, run: Callable[..., Any], *arrays: Array | None) -> Any:
    """run(*arrays); zeros where no row has a token yet.

    For a single token as a branch, which XLA on CPU does not fuse with what was
    before: it would write the token twice, for the cache and for the product
    that reads it, and copy the cache to do so.
    """
    if self.positions.shape[1] > 1 or self.axes is not None:
      return run(*arrays)
    is_some = (self.lengths + self.counts(self.positions.shape[1]) > 0).any()
    nothing = jax.eval_shape(run, *arrays)

    def zeros(*_):
      return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), nothing)

    return lax.cond(is_some, run, zeros, *arrays)

  def _attend_on_mesh(
    self,
    q: Float[Array, 'B Q N H'],
    k: Float[Array, 'B S K H'],
    v: Float[Array, 'B S K V'],
    *,
    k_positions: Int[Array, 'B S'],
    **options: Any,
  ) -> Any:
    """Every device has the queries and reads its slots; parts are merged."""
    shards = self.axes.size(self.axes.seq)
    missing = -k.shape[1] % shards
    k, v = (jnp.pad(x, [(0, 0), (0, missing), (0, 0), (0, 0)]) for x in (k, v))
    k_positions = jnp.pad(
      k_positions, [(0, 0), (0, missing)], constant_values=NOWHERE
    )
    return parallel.dot_product_attention(
      q,
      k,
      v,
      k_positions=k_positions,
      mesh=self.axes.mesh,
      axis=self.axes.seq,
      scheme='all_gather',
      layout=SequenceLayout('contiguous', k.shape[1], shards),
      in_layout=True,
      **options,
    )

  def with_gathered_kv(
    self, op, q, *keys, per_head=None, shared=None, summarize=None, **options
  ):
    options |= {**(per_head or {}), **(shared or {})}
    options['implementation'] = self.implementation
    keys = list(keys)
    if summarize is not None and self.implementation != 'reference':
      parts = summarize(**options)
      options['summaries'] = tuple(
        self._summarize(part, keys[part.key]) for part in parts
      )
      for part in parts:
        if part.replaces:
          keys[part.key] = None
    # All are kept, so that the slot of a key is its position.
    retention = KVRetention(0, None)
    kept = [None if x is None else self._keep(x, retention)[0] for x in keys]

    def run(q, q_positions, *kept):
      return op(q, *kept, q_positions=q_positions, **options)

    return self._apart(
      run, self.at_queries(q), self.at_queries(self.positions), *kept
    )

  def _summarize(
    self, summary: Summary, x: Float[Array, 'B T K D']
  ) -> Float[Array, 'B C K D']:
    """The vectors of all blocks, of which some are complete by now."""
    B, T = x.shape[:2]
    L, stride = summary.length, summary.stride
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    tail_place = self.builder.state((L - 1, *x.shape[2:]), x.dtype)
    C = 0
    if self.builder.is_tracing:
      everything = KVRetention(0, None).slots(self.builder.capacity)
      C = max(0, (everything - L) // stride + 1)
    place = self.builder.state((C, *x.shape[2:]), dtype, is_sum=True)
    # Of token p the index is p - lengths + L - 1.
    tokens = jnp.concatenate([self.builder.arrays[tail_place], x], axis=1)
    count = self.counts(T)
    cut = functools.partial(lax.dynamic_slice_in_dim, slice_size=L - 1)
    self.builder.arrays[tail_place] = jax.vmap(cut)(tokens, count)
    vectors = self.builder.arrays[place]
    C = vectors.shape[1]
    if not C:
      return vectors
    # Those that may become complete: the first ones that were not before.
    block = jnp.maximum((self.lengths - L) // stride + 1, 0)
    block = block[:, None] + jnp.arange(T // stride + 1)
    begin, end = block * stride, (self.lengths + count)[:, None]
    made = summary.make(
      take_blocks(tokens, begin - self.lengths[:, None] + L - 1, L).astype(
        dtype
      ),
      begin,
    )
    block = jnp.where(begin + L <= end, block, C)
    rows = jnp.arange(B)[:, None]
    self.builder.arrays[place] = vectors.at[rows, block].set(made, mode='drop')
    return self.builder.arrays[place]

  def counts(self, T: int) -> Int[Array, ' B']:
    """How many of the T tokens are each row's own."""
    if self.valid is None:
      return jnp.full(self.lengths.shape, T)
    return self.valid.sum(1)

  def _own(self, x: Shaped[Array, 'B T ...'] | None):
    """x with zeros where a token is not the row's own."""
    if x is None or self.valid is None:
      return x
    valid = self.valid.reshape(*self.valid.shape, *[1] * (x.ndim - 2))
    return jnp.where(valid, x, 0)

  def _keep(
    self,
    x: Shaped[Array, 'B T ...'],
    retention: KVRetention,
    *,
    is_sum: bool = False,
  ) -> tuple[Shaped[Array, 'B S ...'], Int[Array, 'B S']]:
    """Puts tokens into their slots; returns all to be read, with positions.

    Slot s < columns is that of token s, the others are used in turn. A single
    token is read from its slot, as is any number where none pushes out another.
    More are read beside the slots that were there before.
    """
    place, found = self.builder.slots(x, retention, is_sum=is_sum)
    if found is None:
      found = x, self.positions
      if not self.builder.is_tracing:
        found = self._write(x, place)
      self.builder.known.append((x, place, found))
    return found

  def _write(
    self, x: Shaped[Array, 'B T ...'], place: int
  ) -> tuple[Shaped[Array, 'B S ...'], Int[Array, 'B S']]:
    entry, slots = self.builder.spec[place], self.builder.arrays[place]
    S, T = slots.shape[1], x.shape[1]
    columns = min(entry.retention.columns, S)
    ring = S - columns
    positions = self.positions
    if self.valid is not None:
      positions = jnp.where(self.valid, positions, NOWHERE)
    end = self.lengths + self.counts(T)
    slot = positions
    if ring:
      turn = columns + (positions - columns) % ring
      slot = jnp.where(positions < columns, positions, turn)
    # Tokens that others of the same call push out are not written at all.
    stay = (positions < columns) | (positions >= end[:, None] - ring)
    slot = jnp.where(stay & (positions < NOWHERE), slot, S)
    rows = jnp.arange(x.shape[0])[:, None]
    written = slots.at[rows, slot].set(x.astype(slots.dtype), mode='drop')
    self.builder.arrays[place] = written
    if T == 1 or entry.retention.window is None:
      return written, _slot_positions(end, columns, S)
    before = _slot_positions(self.lengths, columns, S)
    return (
      jnp.concatenate([slots, x.astype(slots.dtype)], axis=1),
      jnp.concatenate([before, positions], axis=1),
    )


def _slot_positions(
  lengths: Int[Array, ' B'], columns: int, S: int
) -> Int[Array, 'B S']:
  """Positions of the tokens in S slots, NOWHERE in those not used yet."""
  slot, last = jnp.arange(S), lengths[:, None] - 1
  positions = jnp.broadcast_to(slot, (lengths.shape[0], S))
  if columns < S:
    newest = last - (last - slot) % (S - columns)
    positions = jnp.where(slot < columns, slot, newest)
  used = (positions >= jnp.where(slot < columns, 0, columns)) & (
    positions <= last
  )
  return jnp.where(used, positions, NOWHERE)
