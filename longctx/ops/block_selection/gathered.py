"""Block-sparse attention of a few queries, whose blocks are gathered.

For a query or two, as in decoding, that reads no more keys than were chosen.
"""

import jax.numpy as jnp
from jax import lax

from longctx.ops.block_selection.tiles import FLOOR, LogitModifiers
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
  modifiers: LogitModifiers | None = None,
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
  if modifiers is not None and modifiers.alibi_slopes is not None:
    at = modifiers.k_positions.at[row, places].get(mode='clip')
    distance = abs(modifiers.q_positions[:, :, None, None] - at)
    slopes = modifiers.alibi_slopes.reshape(M, N // M)
    z = z - slopes[..., None] * distance[..., None, :]
  z = jnp.where(ok[..., None, :], z, -jnp.inf)
  p, lse = softmax(z)
  out = jnp.einsum('BTMRS,BTMSV->BTMRV', p, v)
  return out.reshape(B, T, N, -1), lse.reshape(B, T, N)


def softmax(
  z: Float[Array, '*b S'],
) -> tuple[Float[Array, '*b S'], Float[Array, '*b']]:
  """Weights, zero in a row without keys, and the log of their sum."""
  # A finite floor keeps z - row_max defined in a row without keys.
  row_max = lax.stop_gradient(z.max(-1, keepdims=True, initial=FLOOR))
  p = jnp.exp(z - row_max)
  row_sum = p.sum(-1, keepdims=True)
  some = row_sum > 0
  row_sum = jnp.where(some, row_sum, 1)
  lse = jnp.where(some, row_max + jnp.log(row_sum), -jnp.inf)
  return p / row_sum, lse[..., 0]
