"""KV cache and recurrent state of a layer: its spec, and the arrays."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from longctx.masks import KVRetention, Mask
from longctx.parallel.axes import Axes
from longctx.typing import Array


class CacheEntry(NamedTuple):
  """Entry of a KV cache: one array of keys, values, sums or a state, per row.

  Attributes:
    shape: of a row's numbers.
    dtype: of them.
    retention: which tokens have a slot, the first axis of `shape`; None where
      the numbers are a state that all tokens pass through.
    is_sum: whether they are sums, which are float32 at least in any model.
  """

  shape: tuple[int, ...]
  dtype: str
  retention: KVRetention | None = None
  is_sum: bool = False

  def nbytes(self, dtype: str | None = None) -> int:
    """Bytes of one row, in another dtype of the model if one is given."""
    if dtype is None or self.is_sum:
      dtype = self.dtype
    return int(np.prod(self.shape)) * jnp.dtype(dtype).itemsize

  def sharding(self, axes: Axes) -> NamedSharding:
    """Where the arrays [B, *shape] lie: slots along the sequence's axes.

    What is no slot is on every device that has the row.
    """
    if self.retention is None:
      return NamedSharding(axes.mesh, P(axes.data))
    splits = self.shape[1] % axes.size(axes.heads) == 0
    heads = axes.heads if splits else None
    return NamedSharding(axes.mesh, P(axes.data, axes.seq, heads))


CacheSpec = tuple[CacheEntry, ...]
LayerCache = tuple[Array, ...]


def empty_cache(
  spec: CacheSpec, batch_size: int, axes: Axes | None = None
) -> LayerCache:
  """The cache of rows without tokens yet, spread over a mesh if any."""
  places = (None if axes is None else entry.sharding(axes) for entry in spec)
  return tuple(
    jnp.zeros((batch_size, *entry.shape), entry.dtype, device=place)
    for entry, place in zip(spec, places, strict=True)
  )


class CacheBuilder:
  """KV cache of a layer while it runs: gives its calls their arrays, in order.

  Without a cache it writes the spec.

  Attributes:
    capacity: the most tokens of a row; None for any number.
    shards: the numbers of slots are multiples of it.
    spec: of the cache.
    arrays: what was kept, replaced as the calls come.
    reads_later: masks, among those of the calls, that are not causal.
  """

  def __init__(
    self,
    *,
    capacity: int | None = None,
    shards: int = 1,
    spec: CacheSpec = (),
    cache: LayerCache | None = None,
  ):
    self.capacity = capacity
    self.shards = shards
    self.is_tracing = cache is None
    self.spec = list(spec)
    self.arrays = list(cache or ())
    self.reads_later: list[Mask] = []
    # Arrays that the layer has handed in, with their places and what was read
    # there, for masks that read the same keys. They are held, so that no other
    # array takes their identity.
    self.known: list[tuple[Array, int, Any]] = []
    self._place = 0

  def state(
    self, shape: tuple[int, ...], dtype: Any, *, is_sum: bool = False
  ) -> int:
    """The place of the next state."""
    if self.is_tracing:
      entry = CacheEntry(tuple(shape), jnp.dtype(dtype).name, is_sum=is_sum)
      self.spec.append(entry)
      self.arrays += empty_cache((entry,), 1)
    return self._next()

  def slots(
    self, x: Array, retention: KVRetention, *, is_sum: bool = False
  ) -> tuple[int, Any]:
    """The place of the slots of an array, and what was last read of them."""
    for known, place, found in self.known:
      if known is not x:
        continue
      if self.is_tracing:
        retention = self.spec[place].retention.union(retention)
        self.spec[place] = self._entry(x, retention, is_sum)
      return place, found
    if self.is_tracing:
      self.spec.append(self._entry(x, retention, is_sum))
      # Nothing is read from them yet.
      self.arrays.append(x)
    return self._next(), None

  def _entry(
    self, x: Array, retention: KVRetention, is_sum: bool
  ) -> CacheEntry:
    # A mask may allow no key at all: nobody reads that one then.
    slots = max(retention.slots(self.capacity), 1)
    shape = (slots + -slots % self.shards, *x.shape[2:])
    return CacheEntry(shape, jnp.dtype(x.dtype).name, retention, is_sum)

  def _next(self) -> int:
    self._place += 1
    return self._place - 1
