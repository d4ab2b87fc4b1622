"""Where the tokens of a model lie, as one value to hand down."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from longctx.layouts import SequenceLayout
from longctx.parallel.axes import Axes
from longctx.parallel.schemes import SCHEMES


@dataclasses.dataclass(frozen=True)
class Placement:
  """A mesh, the layout of sequences on it, and how attention crosses it.

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
  def sharding(self) -> NamedSharding:
    """Of arrays [B, T, ...]."""
    return NamedSharding(self.mesh, self.axes.spec())

  def bind(self, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of `longctx.parallel` with the place filled in."""
    arguments = dict(
      mesh=self.mesh, axis=self.axis, layout=self.layout, in_layout=True
    )
    if 'scheme' in function.__kwdefaults__:
      arguments['scheme'] = self.scheme
    return functools.partial(function, **arguments)

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


def sequence_axes(scheme: str) -> tuple[str, ...]:
  """The mesh axes that a scheme spreads a sequence over.

  Raises:
    ValueError: there is no such scheme.
  """
  if scheme not in SCHEMES:
    raise ValueError(f'unknown {scheme=}; known: {", ".join(SCHEMES)}')
  return ('seq', 'model') if scheme == 'ring+ulysses' else ('seq',)
