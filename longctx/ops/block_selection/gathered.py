"""Attention of few queries, each to blocks of its own, gathered for it.

For a query or two, as in decoding, that reads no more keys than were chosen.
"""

import jax.numpy as jnp
from jax import lax

from longctx.ops.block_selection.tiles import FLOOR, Extras
from longctx.typing import Array, Float, Int


def attend(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K V'],
  begin: Int[Array, 'B T M n'],
  last: Int[Array, 'B T'],
  *,
  block_size: int,
  scale: float,
  extras: Extras | None = None,
) -> tuple[Float[Array, 'B T N V'], Float[Array, 'B T N']]:
  """Softmax attention of each query to n blocks, without dropout.

  Time and memory O(B T N n block_size); arguments and results are those of
  `tiles.attend`.
  """
  B, T, N, _ = q.shape
  K, M = k.shape[2], begin.shape[2]
  dtype = jnp.promote_types(q.dtype, jnp.float32)
  places = begin[..., None] + jnp.arange(block_size)
  ok = (begin[..., None] >= 0) & (places <= last[:, :, None, None, None])
  places, ok = (x.reshape(B, T, M, -1) for x in (places, ok))
  row = jnp.arange(B)[:, None, None, None]
  head = (jnp.arange(M) * K // M)[:, None]
  k, v = (
    x.at[row, places, head].get(mode='clip').astype(dtype) for x in (k, v)
  )
  heads = q.reshape(B, T, M, N // M, -1).astype(dtype)
  z = jnp.einsum('BTMRH,BTMSH->BTMRS', heads, k) * scale
  if extras is not None and extras.alibi_slopes is not None:
    at = extras.k_positions.at[row, places].get(mode='clip')
    distance = abs(extras.q_positions[:, :, None, None] - at)
    slopes = extras.alibi_slopes.reshape(M, N // M)
    z = z - slopes[..., None] * distance[..., None, :]
  z = jnp.where(ok[..., None, :], z, -jnp.inf)
  peak = lax.stop_gradient(jnp.maximum(z.max(-1, keepdims=True), FLOOR))
  p = jnp.exp(z - peak)
  total = p.sum(-1, keepdims=True)
  some = total > 0
  total = jnp.where(some, total, 1)
  out = jnp.einsum('BTMRS,BTMSV->BTMRV', p / total, v)
  lse = jnp.where(some, peak + jnp.log(total), -jnp.inf)
  return out.reshape(B, T, N, -1), lse.reshape(B, T, N)
