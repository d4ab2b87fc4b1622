"""Mesh axes: which of them split the batch, the sequence and the heads."""

import dataclasses
import math

from jax import lax
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from longctx.ops.dot_product_attention import Dropout, TokenIndices
from longctx.parallel.layout import SequenceLayout
from longctx.typing import Array, Float


@dataclasses.dataclass(frozen=True)
class Axes:
  """Mesh axes of the batch, the sequence and the heads.

  Attributes:
    mesh: the mesh.
    seq: axes of the sequence; the last one counts fastest.
  """

  mesh: Mesh | AbstractMesh
  seq: tuple[str, ...]

  @property
  def data(self) -> str | None:
    """The axis of the batch, where the mesh has one."""
    return self._other('data')

  @property
  def heads(self) -> str | None:
    """The axis of the heads, where the mesh has one to spare."""
    return self._other('model')

  def _other(self, name: str) -> str | None:
    free = name in self.mesh.axis_names and name not in self.seq
    return name if free and self.mesh.shape[name] > 1 else None

  def size(self, names: str | tuple[str, ...] | None) -> int:
    """Devices along an axis, or along several together."""
    if not isinstance(names, tuple):
      names = (names,) if names else ()
    return math.prod(self.mesh.shape[name] for name in names)

  @property
  def sharing(self) -> int:
    """Devices that share the caches of one machine, as virtual ones do."""
    if isinstance(self.mesh, AbstractMesh):
      return 1
    devices = list(self.mesh.devices.flat)
    if devices[0].platform != 'cpu':
      return 1
    first = devices[0].process_index
    return sum(device.process_index == first for device in devices)

  def index(self, names: str | tuple[str, ...] | None):
    """Inside of `shard_map`: which of them this device is."""
    return lax.axis_index(names) if names else 0

  def own_dropout(
    self, dropout: Dropout | None, q: Float[Array, 'B L N H']
  ) -> Dropout | None:
    """Dropout that counts this device's rows and heads in the whole arrays."""
    if dropout is None:
      return None
    return dropout._replace(
      first_batch_row=self.index(self.data) * q.shape[0],
      first_head=self.index(self.heads) * q.shape[2],
    )

  def spec(self, *, heads: bool = False) -> P:
    """Of an array [B, T, ...], or [B, T, N, ...] with its heads split."""
    return P(self.data, self.seq, *((self.heads,) if heads else ()))

  def queries_spec(self, *, replicated: bool) -> P:
    """Of queries [B, T, N, ...], which all devices have where `replicated`."""
    seq = None if replicated else self.seq
    return P(self.data, seq, self.heads)

  def indices_spec(
    self, indices: TokenIndices, B: int, *, replicated: bool
  ) -> TokenIndices:
    """Of the indices of B rows, None where there are none."""

    def spec(x, seq):
      if x is None:
        return None
      return P(self.data if x.shape[0] == B else None, seq)

    seqs = (None if replicated else self.seq, self.seq) * 2
    return TokenIndices(*map(spec, indices, seqs))

  def check(self, *, batch: int, **split: int) -> None:
    """Raises where an array does not divide by the mesh.

    Args:
      batch: rows, which `data` splits.
      **split: what `model` splits, by the names that an error shall give.

    Raises:
      ValueError: with the sizes and what to change.
    """
    data, heads = self.size(self.data), self.size(self.heads)
    if batch % data:
      raise ValueError(
        f'batch={batch} must be a multiple of the mesh axis {data=}; take '
        'another batch_size or mesh'
      )
    for name, size in split.items():
      if size % heads:
        raise ValueError(
          f'{name}={size} must be a multiple of the mesh axis model={heads}; '
          f"take other {name}, a smaller axis, or scheme 'ring+ulysses', which "
          'puts the sequence on model too'
        )


def make_axes(mesh: Mesh | AbstractMesh, axis: str | tuple[str, ...]) -> Axes:
  """The axes of a sequence that lies along `axis`.

  Raises:
    ValueError: the mesh lacks one of them.
  """
  seq = (axis,) if isinstance(axis, str) else tuple(axis)
  missing = [name for name in seq if name not in mesh.axis_names]
  if missing or not seq:
    raise ValueError(f'{axis=} must be of the mesh {dict(mesh.shape)}')
  return Axes(mesh, seq)


def make_layout(
  layout: str | SequenceLayout,
  length: int,
  shards: int,
  *,
  in_layout: bool,
) -> SequenceLayout:
  """The layout of arrays of that length, which a name alone leaves open.

  Args:
    layout: its name, or the layout itself, which is checked.
    length: of the sequence axis, T, or `padded_len` if `in_layout`.
    shards: R of the mesh.
    in_layout: whether the arrays are in the layout's order already.
  """
  if isinstance(layout, str):
    layout = SequenceLayout(layout, length, shards)
  if layout.num_shards != shards:
    raise ValueError(
      f'{layout.num_shards=} must be the {shards} shards of the mesh'
    )
  expected = layout.padded_len if in_layout else layout.seq_len
  if length != expected:
    raise ValueError(
      f'arrays of {length=} do not fit {layout} with {in_layout=}: they must '
      f'have length {expected}; give a SequenceLayout with the length before '
      'padding'
    )
  return layout
