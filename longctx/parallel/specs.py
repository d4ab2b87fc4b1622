"""Where the arrays of an operation lie on a mesh, and what has to divide."""

import math

from jax.sharding import Mesh

from longctx.layouts import SequenceLayout


def num_shards(mesh: Mesh, axis: str | tuple[str, ...]) -> int:
  """R: shards of a sequence that lies on one mesh axis, or on several."""
  names = _names(axis)
  unknown = [name for name in names if name not in mesh.shape]
  if unknown:
    raise ValueError(f'no {axis=} in a mesh with axes {tuple(mesh.shape)}')
  return math.prod(mesh.shape[name] for name in names)


def batch_axis(
  mesh: Mesh, axis: str | tuple[str, ...], batch: int
) -> str | None:
  """'data' where the mesh splits batches, else None.

  Raises:
    ValueError: it cannot split one of this size.
  """
  return _splitting_axis('data', mesh, axis, {'batch': batch})


def model_axis(
  mesh: Mesh, axis: str | tuple[str, ...], **sizes: int
) -> str | None:
  """'model' where the mesh splits heads or channels, else None.

  Args:
    mesh: the mesh.
    axis: the axes of the sequence, which split nothing else.
    sizes: what is split, by the names that an error shall give.

  Raises:
    ValueError: it cannot split all of them.
  """
  return _splitting_axis('model', mesh, axis, sizes)


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


def _splitting_axis(name, mesh, axis, sizes):
  if name in _names(axis) or mesh.shape.get(name, 1) == 1:
    return None
  for what, size in sizes.items():
    if size % mesh.shape[name]:
      raise ValueError(
        f'{what}={size} must be a multiple of the mesh axis '
        f'{name}={mesh.shape[name]}; take another {what} or a smaller axis'
      )
  return name


def _names(axis):
  return (axis,) if isinstance(axis, str) else axis
