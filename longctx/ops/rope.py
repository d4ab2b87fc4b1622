"""Rotary position embedding (RoFormer, arXiv 2104.09864)."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from longctx.ops.rope_scaling import RopeScaling
from longctx.ops.target import target
from longctx.typing import Array, Float, Int, check_floats

UNSCALED = RopeScaling()

# Tokens from which what `_once` saves is worth a product.
LONG = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
  """Rotary position embedding: which channels turn, and how fast.

  Attributes:
    base: the longest wavelength is about 2 pi base.
    dim: first channels R of a head that turn, even; None: all.
    scaling: of the frequencies.
  """

  base: float = 10_000.0
  dim: int | None = None
  scaling: RopeScaling = UNSCALED

  def frequencies(self, head_dim: int) -> np.ndarray:
    """Radians per position of each pair, float64 [R/2]."""
    R = head_dim if self.dim is None else self.dim
    radians = self.base ** (-np.arange(0, R, 2) / R)
    return self.scaling.scale(radians, self.base)

  def rotate(
    self,
    x: Float[Array, 'B T N H'],
    positions: Int[Array, ' T'] | Int[Array, 'B T'],
    *,
    again: bool = False,
  ) -> Float[Array, 'B T N H']:
    """Rotates pair i of the head by positions · frequency_i radians.

    Half-split convention (GPT-NeoX, Llama in Hugging Face): pair i is x[i] and
    x[i + R/2]. The dot product of a rotated query and a rotated key depends on
    the difference of their positions only.

    The angle is exact to 5e-7 radians at every int32 position. The product of
    position and frequency in float32 would be off by 0.06 radians at position
    10^6; here it is taken modulo one turn in integer arithmetic.

    Args:
      x: queries or keys.
      positions: the true position of each step, any layout, negative ones too.
      again: whether x is rotated already, and has the scaling's amplitude.

    Returns:
      The rotated x in its own dtype; the rotation is computed in float32.

    Raises:
      ValueError: if R is odd, or beyond H, or the positions do not fit.
    """
    check_floats(x=x)
    B, T, _, H = x.shape
    R = H if self.dim is None else self.dim
    if R % 2:
      raise ValueError(f'head dim H={R} must be even to be rotated in pairs')
    if R > H:
      raise ValueError(f'{R} channels cannot turn in a head of {H}')
    if positions.shape not in ((T,), (B, T)):
      raise ValueError(f'{positions.shape=} must be {(T,)} or {(B, T)}')
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    angles = _angles(positions, self.frequencies(H), dtype)[..., None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if not again and self.scaling.amplitude != 1:
      cos, sin = (self.scaling.amplitude * y for y in (cos, sin))
    if T >= LONG and target().platform == 'cpu':
      cos, sin = jnp.split(_once(jnp.concatenate([cos, sin], -1)), 2, -1)
    first, second = jnp.split(x[..., :R].astype(dtype), 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    rest = [] if R == H else [x[..., R:].astype(dtype)]
    return jnp.concatenate(rotated + rest, axis=-1).astype(x.dtype)


def apply_rope(
  x: Float[Array, 'B T N H'],
  positions: Int[Array, ' T'] | Int[Array, 'B T'],
  *,
  base: float = 10_000.0,
) -> Float[Array, 'B T N H']:
  """All channels rotated, without a scaling: see `Rope.rotate`."""
  return Rope(base=base).rotate(x, positions)


def _once(x: Float[Array, '*shape R']) -> Float[Array, '*shape R']:
  """x, computed before it is used: a product that XLA on CPU fuses with none.

  Else it computes sines anew for each head and half of it, barriers or not
  (jaxlib 0.10.2), which takes as long as the projection before.
  """
  return jnp.dot(x, jnp.eye(x.shape[-1], dtype=x.dtype), precision='highest')


def _angles(positions, radians, dtype):
  """positions · frequency in [-pi, pi], [..., R/2].

  A turn is 2^32 units, so int32 products wrap around exactly where the circle
  does. A frequency is `coarse` units per step, a 32-bit integer, and `fine`,
  less than one unit, whose product with a position is small enough for a
  float32.
  """
  units = radians / (2 * math.pi) * 2.0**32
  coarse = np.floor(units)
  fine = jnp.asarray(units - coarse, jnp.float32)
  coarse = jnp.asarray(coarse.astype(np.uint32).view(np.int32))
  positions = positions.astype(jnp.int32)[..., None]
  rest = jnp.round(positions.astype(jnp.float32) * fine).astype(jnp.int32)
  turn = positions * coarse + rest
  return turn.astype(dtype) * (2 * math.pi / 2**32)
