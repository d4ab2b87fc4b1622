"""Putting attention over disjoint sets of keys together."""

import jax.numpy as jnp

from longctx.typing import Array, Float


def merge(
  out_a: Float[Array, 'B T N V'],
  lse_a: Float[Array, 'B T N'],
  out_b: Float[Array, 'B T N V'],
  lse_b: Float[Array, 'B T N'],
) -> tuple[Float[Array, 'B T N V'], Float[Array, 'B T N']]:
  """Attention over both sets of keys, from that over each.

    lse = log(exp(lse_a) + exp(lse_b))
    out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b

  A part without any key has lse = -inf; two of them stay one.
  """
  lse = jnp.logaddexp(lse_a, lse_b)
  total = jnp.where(lse == -jnp.inf, 0, lse)
  out = (
    jnp.exp(lse_a - total)[..., None] * out_a
    + jnp.exp(lse_b - total)[..., None] * out_b
  )
  return out, lse
