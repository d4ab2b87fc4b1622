"""Decode attention: few queries, whose keys are read once, where they lie.

The key heads of a token lie side by side in memory. A product per head would
first gather each head's keys, which for a single query costs more than the
product. Here every query head is as wide as all key heads together and zero but
at its own, so that one product reads the keys in their order:

    keys [S, K H]    queries [K H, T N]    scores [S, T N]

K times the multiplications, of which few queries have few; grouped heads need
no copies of their keys.
"""

import functools

import jax.numpy as jnp

from longctx.ops.dot_product_attention import reference
from longctx.typing import Array, Float


def _own(N: int, K: int, dtype) -> Float[Array, 'N K']:
  """1 where a query head reads a key head."""
  heads = jnp.arange(N) // (N // K)
  return (heads[:, None] == jnp.arange(K)).astype(dtype)


def _scores(
  q: Float[Array, 'B T N H'], k: Float[Array, 'B S K H']
) -> Float[Array, 'B N T S']:
  B, T, N, H = q.shape
  S, K = k.shape[1:3]
  own = _own(N, K, q.dtype)
  wide = jnp.einsum('BTNH,NK->BKHTN', q, own).reshape(B, K * H, T * N)
  z = jnp.einsum('BSF,BFR->BSR', k.reshape(B, S, K * H), wide)
  return z.reshape(B, S, T, N).transpose(0, 3, 2, 1)


def _mix(
  weight: Float[Array, 'B N T S'], v: Float[Array, 'B S K V']
) -> Float[Array, 'B T N V']:
  B, N, T, S = weight.shape
  K, V = v.shape[2:]
  rows = weight.swapaxes(1, 2).reshape(B, T * N, S)
  wide = jnp.einsum('BRS,BSF->BRF', rows, v.reshape(B, S, K * V))
  wide = wide.reshape(B, T, N, K, V)
  return jnp.einsum('BTNKV,NK->BTNV', wide, _own(N, K, v.dtype))


dot_product_attention = functools.partial(
  reference.dot_product_attention,
  products=reference.AttentionProducts(_scores, _mix),
)
