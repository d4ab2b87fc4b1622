"""A bias on attention logits, as a few more channels of queries and keys."""

import jax.numpy as jnp
from jax import lax

from longctx.typing import Array, Float


def add_logit_bias(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  *,
  q_bias: Float[Array, '#B T N'] | None = None,
  k_bias: Float[Array, '#B S N'] | None = None,
  scale: float | None = None,
) -> tuple[Float[Array, 'B T N E'], Float[Array, 'B S K E']]:
  """Queries and keys with products scale q_t · k_s + q_bias_t + k_bias_s.

  Any implementation of attention then has the bias, with `scale=1` and without
  T x S numbers. A bias is cut into three numbers of eight bits, whose products
  with one are exact even where bfloat16 is all that a matrix product reads;
  float64 takes one. A key that G query heads share carries a channel for each.

  The channels come first, a query's beside a key's: summed in this order, two
  large biases that nearly cancel do so before the product is added. In any
  order the logit is exact to 6e-8 times the larger of them.

  Args:
    q: queries.
    k: keys.
    q_bias: per query and query head.
    k_bias: per key and query head.
    scale: of the products; H**-0.5 when None.

  Returns:
    q and k in their dtypes, E = H + 3 + 3 G wide with both biases.
  """
  B, T, N, H = q.shape
  S, K = k.shape[1:3]
  G = N // K
  wide = jnp.promote_types(q.dtype, jnp.float32)
  scale = H**-0.5 if scale is None else scale
  q_parts = [] if q_bias is None else _parts(q_bias, wide)
  k_parts = [] if k_bias is None else _parts(k_bias, wide)
  own = jnp.tile(jnp.eye(G), (K, 1))
  of_queries, of_keys = [], []
  for i in range(max(len(q_parts), len(k_parts))):
    if q_parts:
      of_queries.append(jnp.broadcast_to(q_parts[i], (B, T, N))[..., None])
      of_keys.append(jnp.ones((B, S, K, 1)))
    if k_parts:
      of_queries.append(jnp.broadcast_to(own, (B, T, N, G)))
      part = jnp.broadcast_to(k_parts[i], (B, S, N))
      of_keys.append(part.reshape(B, S, K, G))
  of_queries.append(q.astype(wide) * scale)
  of_keys.append(k)
  return (
    jnp.concatenate([x.astype(q.dtype) for x in of_queries], axis=-1),
    jnp.concatenate([x.astype(k.dtype) for x in of_keys], axis=-1),
  )


def _parts(x: Float[Array, '...'], dtype) -> list[Float[Array, '...']]:
  """Numbers that sum to x, each of eight bits; the last has the gradient."""
  x = x.astype(dtype)
  if dtype == jnp.float64:
    return [x]
  parts = []
  for _ in range(2):
    # Two casts could be taken for none: XLA may keep more precision.
    part = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    parts.append(lax.stop_gradient(part))
    x = x - parts[-1]
  return [*parts, x]
