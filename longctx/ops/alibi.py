"""Attention with linear biases (ALiBi, arXiv 2108.12409)."""

import jax.numpy as jnp
import numpy as np

from longctx.typing import Array, Float


def alibi_slopes(num_heads: int) -> Float[Array, ' N']:
  """The slope of each head, in nats per step of distance, float32.

  See `geometric_slopes`, which has them in float64.
  """
  return jnp.asarray(geometric_slopes(num_heads), jnp.float32)


def geometric_slopes(num_heads: int) -> np.ndarray:
  """One number below 1 per head, [N], float64, each a ratio of the one before.

  For a power of two, 2^(-8/N), 2^(-16/N), ..., 2^-8. For another N, as
  published: the slopes of the next smaller power of two, then every other one
  (the first, the third, ...) of the next larger.

  Raises:
    ValueError: if `num_heads` is less than 1.
  """
  if num_heads < 1:
    raise ValueError(f'{num_heads=} must be at least 1')
  power = 1 << (num_heads.bit_length() - 1)
  more = _geometric(2 * power)[::2][: num_heads - power]
  return np.concatenate([_geometric(power), more])


def _geometric(num_heads):
  return 2.0 ** (-8 * np.arange(1, num_heads + 1) / num_heads)
