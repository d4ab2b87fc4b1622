"""Placement of tokens on a mesh, as one value to hand down."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from longctx.parallel import (
  gathered_kv,
  halo,
  parameters,
  recurrences,
  reorder,
  schemes,
)
from longctx.parallel.all_gather import gather
from longctx.parallel.axes import Axes
from longctx.parallel.layout import SequenceLayout
from longctx.parallel.schemes import SCHEMES
from longctx.typing import Array, Shaped


@dataclasses.dataclass(frozen=True)
class Placement:
  """Placement on a mesh: the layout of sequences, and how attention crosses it.

  Attributes:
    mesh: from `make_mesh`.
    layout: of the sequences, one shard per device of `axis`.
    scheme: of softmax attention, see `parallel.dot_product_attention`.
  """

  mesh: Mesh
  layout: SequenceLayout
  scheme: str

  @property
  def axis(self) -> tuple[str, ...]:
    return sequence_axes(self.scheme)

  @property
  def axes(self) -> Axes:
    return Axes(self.mesh, self.axis)

  @property
  def required_capabilities(self) -> tuple[str, ...]:
    """What a layer must be able to do here, as capabilities are called."""
    heads = () if self.axes.heads is None else ('model',)
    return (self.scheme, self.layout.name, *heads)

  @property
  def sharding(self) -> NamedSharding:
    """Of arrays [B, T, ...]."""
    return NamedSharding(self.mesh, self.axes.spec())

  def row_group(self) -> tuple[int, int]:
    """(index, count): this process holds group `index` of `count` of the rows.

    Processes that hold other parts of the same rows have the same index.

    Raises:
      NotImplementedError: its rows are no such group.
    """
    mesh = self.mesh
    count = 1 if self.axes.data is None else mesh.shape['data']
    if count == 1 or jax.process_count() == 1:
      return 0, 1
    own = mesh.local_mesh.device_ids
    ids = mesh.device_ids
    groups = [
      i for i in range(count) if np.isin(ids.take(i, axis=0), own).any()
    ]
    size = len(groups)
    whole = groups == list(range(groups[0], groups[0] + size))
    if not whole or count % size or groups[0] % size:
      raise NotImplementedError(
        f'process {jax.process_index()} holds the rows of {groups=} of {count} '
        'on data: take a mesh whose data axis divides by the processes, or the '
        'other way round'
      )
    return groups[0] // size, count // size

  def put(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Moves a batch in natural order to the mesh, in the layout's order.

    Args:
      batch: arrays [rows of this process, T], and `query_indices` [rows, Q].
    """
    index, count = self.row_group()
    placed = {}
    for name, x in self.layout.place(batch).items():
      first = index * x.shape[0]
      shape = (x.shape[0] * count, *x.shape[1:])
      sharding = self.rows if name == 'query_indices' else self.sharding
      placed[name] = jax.make_array_from_callback(
        shape,
        sharding,
        lambda at, x=x, first=first: x[_within(at[0], first, len(x)), at[1]],
      )
    return placed

  def into_layout(
    self, x: Shaped[Array, 'B T ...'], *, fill: Any = 0
  ) -> Shaped[Array, 'B L ...']:
    """Brings tokens in natural order into the layout's, on the mesh."""
    return self._reorder(reorder.into_layout, reorder.pad(x, self.layout, fill))

  def into_natural(
    self, x: Shaped[Array, 'B L ...']
  ) -> Shaped[Array, 'B T ...']:
    """The inverse of `into_layout`: natural order, without the padding."""
    out = self._reorder(reorder.into_natural, x)
    return out[:, : self.layout.seq_len]

  def _reorder(self, function: Callable[..., Array], x: Array) -> Array:
    if self.layout.is_natural:
      return x
    spec = self.axes.spec()
    return jax.shard_map(
      functools.partial(function, layout=self.layout, axis=self.axis),
      mesh=self.mesh,
      in_specs=spec,
      out_specs=spec,
      check_vma=False,
    )(x)

  def of_whole_rows(
    self,
    function: Callable[..., Array],
    *arrays: Shaped[Array, 'B L ...'] | None,
  ) -> Shaped[Array, 'B L ...']:
    """function(*arrays) of whole rows; every device keeps its own part.

    For a few numbers per token: each device has those of all tokens. Sums along
    a sequence, and their gradients, reverse it, which the compiler is not to
    spread (see `reorder`).

    Args:
      function: of arrays [rows, T, ...] in natural order, without padding;
        gives one of that length.
      *arrays: in the layout's order.
    """
    axes, layout = self.axes, self.layout

    def local(*arrays):
      whole = [gather(x, axis=axes.seq, layout=layout) for x in arrays]
      out = layout.apply(function(*whole), local=True)
      own, L = axes.index(axes.seq), layout.shard_len
      return lax.dynamic_slice_in_dim(out, own * L, L, axis=1)

    spec = axes.spec()
    return jax.shard_map(
      local, mesh=self.mesh, in_specs=spec, out_specs=spec, check_vma=False
    )(*arrays)

  @property
  def rows(self) -> NamedSharding:
    """Of arrays [B, ...] that every device of the sequence has."""
    return NamedSharding(self.mesh, P(self.axes.data))

  def state_shardings(self, state: Any, *, fsdp: bool) -> Any:
    """A sharding per array of a training state, see `parameters`."""
    axes = self.axes
    return parameters.state_shardings(
      state,
      self.mesh,
      data=axes.size(axes.data) if fsdp else 1,
      model=axes.size(axes.heads),
    )

  @property
  def dot_product_attention(self) -> Callable[..., Any]:
    """`parallel.dot_product_attention` of arrays that lie here."""
    attend = schemes.dot_product_attention
    return functools.partial(attend, scheme=self.scheme, **self._place())

  @property
  def with_gathered_kv(self) -> Callable[..., Any]:
    """`parallel.with_gathered_kv` of arrays that lie here."""
    return functools.partial(
      gathered_kv.with_gathered_kv,
      mesh=self.mesh,
      axis=self.axis,
      layout=self.layout,
    )

  @property
  def linear_recurrence(self) -> Callable[..., Any]:
    """`parallel.linear_recurrence` of arrays that lie here."""
    return functools.partial(recurrences.linear_recurrence, **self._place())

  @property
  def short_conv(self) -> Callable[..., Any]:
    """`parallel.short_conv` of arrays that lie here."""
    return functools.partial(halo.short_conv, **self._place())

  def _place(self) -> dict[str, Any]:
    return dict(
      mesh=self.mesh, axis=self.axis, layout=self.layout, in_layout=True
    )

  def sum_over_tokens(self, function: Callable[..., Any]) -> Callable[..., Any]:
    """Runs function(shared, *per_token) on each device's own tokens.

    The results are summed over the devices that split batch and sequence.
    """
    axes = self.axes
    names = (*axes.seq, *([axes.data] if axes.data else []))

    def local(shared, *per_token):
      return lax.psum(function(shared, *per_token), names)

    def run(shared, *per_token):
      specs = (P(), *(axes.spec() for _ in per_token))
      return jax.shard_map(
        local,
        mesh=self.mesh,
        in_specs=specs,
        out_specs=P(),
        check_vma=False,
      )(shared, *per_token)

    return run


def _within(rows: slice, first: int, count: int) -> slice:
  """Rows of the whole batch, counted in a group of it."""
  start = 0 if rows.start is None else rows.start - first
  return slice(start, count if rows.stop is None else rows.stop - first)


def sequence_axes(scheme: str) -> tuple[str, ...]:
  """The mesh axes that a scheme spreads a sequence over.

  Raises:
    ValueError: there is no such scheme.
  """
  if scheme not in SCHEMES:
    raise ValueError(f'unknown {scheme=}; known: {", ".join(SCHEMES)}')
  return ('seq', 'model') if scheme == 'ring+ulysses' else ('seq',)
