"""Tensors of a checkpoint and the parameters that they hold, both ways."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
  """Tensor of a checkpoint: its name there and what it holds here.

  Attributes:
    name: in the checkpoint.
    paths: of the parameters, as in 'blocks/0/attention/query/kernel', that lie
      beside each other along the tensor's outputs.
    transposed: whether outputs are the first axis there.
    offset: what is added to it, as Gemma's norms have w for 1 + w.
    groups: heads that lie one after the other, each with its part of every
      parameter; 1: the parameters do.
  """

  name: str
  paths: tuple[str, ...]
  transposed: bool = False
  offset: float = 0.0
  groups: int = 1

  def split(self, x: np.ndarray, widths: Sequence[int]) -> list[np.ndarray]:
    """The parameters, of as many outputs each, from the tensor."""
    if self.transposed:
      x = x.T
    if self.offset:
      x = x + np.asarray(self.offset, x.dtype)
    if self.groups > 1:
      parts = (*x.shape[:-1], self.groups, len(widths), -1)
      x = x.reshape(parts).swapaxes(-3, -2).reshape(x.shape)
    return np.split(x, np.cumsum(widths)[:-1], axis=-1)

  def join(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
    """The tensor, from the parameters."""
    x = np.concatenate(arrays, axis=-1)
    if self.groups > 1:
      parts = (*x.shape[:-1], len(arrays), self.groups, -1)
      x = x.reshape(parts).swapaxes(-3, -2).reshape(x.shape)
    if self.offset:
      x = x - np.asarray(self.offset, x.dtype)
    return x.T if self.transposed else x

  def shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Of the tensor, from those of its parameters."""
    lead, widths = shapes[0][:-1], [shape[-1] for shape in shapes]
    shape = (*lead, sum(widths))
    return shape[::-1] if self.transposed else shape


def linear(
  name: str, *paths: str, bias: bool = False, groups: int = 1
) -> Iterator[Tensor]:
  """The tensors of a `torch.nn.Linear`, of one or several projections."""
  yield Tensor(
    name=f'{name}.weight',
    paths=tuple(f'{path}/kernel' for path in paths),
    transposed=True,
    groups=groups,
  )
  if bias:
    yield Tensor(
      name=f'{name}.bias',
      paths=tuple(f'{path}/bias' for path in paths),
      groups=groups,
    )


def norm(
  name: str, path: str, *, bias: bool = False, offset: float = 0.0
) -> Iterator[Tensor]:
  """The tensors of a norm."""
  yield Tensor(name=f'{name}.weight', paths=(f'{path}/scale',), offset=offset)
  if bias:
    yield Tensor(name=f'{name}.bias', paths=(f'{path}/bias',))
