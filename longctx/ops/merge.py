"""Log-sum-exp merge of attention over disjoint sets of keys."""

import jax.numpy as jnp
from jax import lax

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
  # Of two parts without a key a logaddexp has no derivative.
  none = (lse_a == -jnp.inf) & (lse_b == -jnp.inf)
  total = jnp.logaddexp(jnp.where(none, 0, lse_a), jnp.where(none, 0, lse_b))
  lse = jnp.where(none, -jnp.inf, total)
  out = (
    jnp.exp(lse_a - total)[..., None] * out_a
    + jnp.exp(lse_b - total)[..., None] * out_b
  )
  return out, lse


def merge_devices(
  out: Float[Array, 'B T N V'],
  lse: Float[Array, 'B T N'],
  *,
  axis: str | tuple[str, ...],
) -> tuple[Float[Array, 'B T N V'], Float[Array, 'B T N']]:
  """`merge` over the devices of a mesh axis, inside of `shard_map`.

  Two sums over devices of the size of out, whatever the number of keys (Tree
  Attention, arXiv:2408.04093). Every device gets the result.
  """
  # Any number near the largest will do, so it needs no gradient.
  row_max = lax.pmax(lax.stop_gradient(lse), axis)
  row_max = jnp.where(row_max == -jnp.inf, 0, row_max)
  weight = jnp.exp(lse - row_max)
  row_sum = lax.psum(weight, axis)
  some = row_sum > 0
  row_sum = jnp.where(some, row_sum, 1)
  out = lax.psum(out * weight[..., None], axis) / row_sum[..., None]
  return out, jnp.where(some, row_max + jnp.log(row_sum), -jnp.inf)
