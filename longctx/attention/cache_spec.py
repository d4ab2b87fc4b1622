"""What a layer keeps between tokens: its plan, and the arrays themselves."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from longctx.masks import KVRetention, Mask
from longctx.parallel.axes import Axes
from longctx.typing import Array


class Cell(NamedTuple):
  """One thing that a layer keeps of each row.

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


Plan = tuple[Cell, ...]
Cells = tuple[Array, ...]


def empty(plan: Plan, batch_size: int, axes: Axes | None = None) -> Cells:
  """Cells of rows that have not read a token, spread over a mesh if any."""
  places = (None if axes is None else cell.sharding(axes) for cell in plan)
  return tuple(
    jnp.zeros((batch_size, *cell.shape), cell.dtype, device=place)
    for cell, place in zip(plan, places, strict=True)
  )


class Tape:
  """Hands the calls of a layer their cells in order, and takes the new ones.

  Without cells it writes the plan.

  Attributes:
    capacity: the most tokens of a row; None for any number.
    shards: the numbers of slots are multiples of it.
    plan: one entry per cell.
    cells: what was kept, replaced as the calls come.
    reads_later: masks, among those of the calls, that are not causal.
  """

  def __init__(
    self,
    *,
    capacity: int | None = None,
    shards: int = 1,
    plan: Plan = (),
    cells: Cells | None = None,
  ):
    self.capacity = capacity
    self.shards = shards
    self.is_planning = cells is None
    self.plan = list(plan)
    self.cells = list(cells or ())
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
    if self.is_planning:
      dtype = jnp.dtype(dtype).name
      self.plan.append(Cell(tuple(shape), dtype, is_sum=is_sum))
    return self._next()

  def slots(
    self, x: Array, retention: KVRetention, *, is_sum: bool = False
  ) -> tuple[int, Any]:
    """The place of the slots of an array, and what was last read of them."""
    for known, place, found in self.known:
      if known is not x:
        continue
      if self.is_planning:
        retention = self.plan[place].retention.union(retention)
        self.plan[place] = self._cell(x, retention, is_sum)
      return place, found
    if self.is_planning:
      self.plan.append(self._cell(x, retention, is_sum))
    return self._next(), None

  def _cell(self, x: Array, retention: KVRetention, is_sum: bool) -> Cell:
    slots = retention.slots(self.capacity)
    shape = (slots + -slots % self.shards, *x.shape[2:])
    return Cell(shape, jnp.dtype(x.dtype).name, retention, is_sum)

  def _next(self) -> int:
    self._place += 1
    return self._place - 1
