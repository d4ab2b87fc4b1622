"""Rotary position embedding (RoFormer, arXiv 2104.09864)."""

import math

import jax.numpy as jnp
import numpy as np

from longctx.typing import Array, Float, Int, check_floats


def apply_rope(
  x: Float[Array, 'B T N H'],
  positions: Int[Array, ' T'] | Int[Array, 'B T'],
  *,
  base: float = 10_000.0,
) -> Float[Array, 'B T N H']:
  """Rotates pair i of the head by positions · base^(-2i/H) radians.

  Half-split convention (GPT-NeoX, Llama in Hugging Face): pair i is x[i] and
  x[i + H/2]. The dot product of a rotated query and a rotated key depends on
  the difference of their positions only.

  The angle is exact to 5e-7 radians at every int32 position. The product of
  position and frequency in float32 would be off by 0.06 radians at position
  10^6; here it is taken modulo one turn in integer arithmetic.

  Args:
    x: queries or keys, H even.
    positions: the true position of each step, any layout, negative ones too.
    base: the longest wavelength is about 2 pi base.

  Returns:
    The rotated x in its own dtype; the rotation is computed in float32.

  Raises:
    ValueError: if H is odd or the positions do not fit.
  """
  check_floats(x=x)
  B, T, _, H = x.shape
  if H % 2:
    raise ValueError(f'head dim {H=} must be even to be rotated in pairs')
  if positions.shape not in ((T,), (B, T)):
    raise ValueError(f'{positions.shape=} must be {(T,)} or {(B, T)}')
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  angles = _angles(positions, H, base, dtype)[..., None, :]
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  first, second = jnp.split(x.astype(dtype), 2, axis=-1)
  rotated = [first * cos - second * sin, second * cos + first * sin]
  return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def _angles(positions, head_dim, base, dtype):
  """positions · frequency in [-pi, pi], [..., H/2].

  A turn is 2^32 units, so int32 products wrap around exactly where the circle
  does. A frequency is `coarse` units per step, a 32-bit integer, and `fine`,
  less than one unit, whose product with a position is small enough for a
  float32.
  """
  radians = base ** (-np.arange(0, head_dim, 2) / head_dim)
  units = radians / (2 * math.pi) * 2.0**32
  coarse = np.floor(units)
  fine = jnp.asarray(units - coarse, jnp.float32)
  coarse = jnp.asarray(coarse.astype(np.uint32).view(np.int32))
  positions = positions.astype(jnp.int32)[..., None]
  rest = jnp.round(positions.astype(jnp.float32) * fine).astype(jnp.int32)
  turn = positions * coarse + rest
  return turn.astype(dtype) * (2 * math.pi / 2**32)
