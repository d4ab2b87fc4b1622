"""Which axes of a mesh split what."""

import dataclasses
import math

from jax import lax
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P


@dataclasses.dataclass(frozen=True)
class Axes:
  """Which axes of a mesh split the batch, the sequence and the heads.

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

  def index(self, names: str | tuple[str, ...] | None):
    """Inside of `shard_map`: which of them this device is."""
    return lax.axis_index(names) if names else 0

  def spec(self, *, heads: bool = False) -> P:
    """Of an array [B, T, ...], or [B, T, N, ...] with its heads split."""
    return P(self.data, self.seq, *((self.heads,) if heads else ()))

  def check(self, B: int, N: int, K: int) -> None:
    """Raises where batch or heads do not divide by the mesh.

    Raises:
      ValueError: with the sizes and what to change.
    """
    data, heads = self.size(self.data), self.size(self.heads)
    if B % data:
      raise ValueError(
        f'a batch of {B=} rows does not divide over {data} devices on data; '
        'change batch_size or the mesh'
      )
    if N % heads or K % heads:
      raise ValueError(
        f'{N=} query and {K=} key heads do not divide over {heads} devices on '
        "model; change the heads or the mesh, or take scheme 'ring+ulysses', "
        'which puts the sequence on model too'
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
