"""Decode attention: few queries, whose keys are read once, where they lie.

The key heads of a token lie side by side in memory. A product per head would
first gather each head's keys, which for a single query costs more than the
product. Here every query head is as wide as all key heads together and zero but
at its own, so that one product reads the keys in their order:

    keys [S, K H]    queries [K H, T N]    scores [S, T N]

K times the multiplications, of which few queries have few; grouped heads need
no copies of their keys. On a CPU a single query pays for them, and where heads
are grouped each head of a key is a row of its own there, and values are summed
without a product (jaxlib 0.10.2: 0.7 of the time at 2,048 keys of 3 heads):

    keys [S K, H]    queries [H, N]        scores [S K, N]
"""

import functools

import jax.numpy as jnp

from longctx.ops.dot_product_attention import reference
from longctx.ops.target import target
from longctx.typing import Array, Float

# Columns that XLA's products on CPU take at once.
COLUMNS = 16


def _own(N: int, K: int, dtype) -> Float[Array, 'N K']:
  """1 where a query head reads a key head."""
  heads = jnp.arange(N) // (N // K)
  return (heads[:, None] == jnp.arange(K)).astype(dtype)


def _sums(T: int, N: int, K: int) -> bool:
  """Whether to have none of the K times more multiplications."""
  return T == 1 and 1 < K < N and target().platform == 'cpu'


def _scores(
  q: Float[Array, 'B T N H'], k: Float[Array, 'B S K H']
) -> Float[Array, 'B N T S']:
  B, T, N, H = q.shape
  S, K = k.shape[1:3]
  if _sums(T, N, K):
    columns = q.reshape(B, N, H).swapaxes(1, 2)
    columns = jnp.pad(columns, [(0, 0), (0, 0), (0, -N % COLUMNS)])
    z = jnp.einsum('BRH,BHN->BRN', k.reshape(B, S * K, H), columns)
    z = z[..., :N].reshape(B, S, K, K, N // K)
    z = jnp.stack([z[:, :, head, head] for head in range(K)], axis=2)
    return z.reshape(B, S, 1, N).transpose(0, 3, 2, 1)
  own = _own(N, K, q.dtype)
  wide = jnp.einsum('BTNH,NK->BKHTN', q, own).reshape(B, K * H, T * N)
  z = jnp.einsum('BSF,BFR->BSR', k.reshape(B, S, K * H), wide)
  return z.reshape(B, S, T, N).transpose(0, 3, 2, 1)


def _mix(
  weight: Float[Array, 'B N T S'], v: Float[Array, 'B S K V']
) -> Float[Array, 'B T N V']:
  B, N, T, S = weight.shape
  K, V = v.shape[2:]
  if _sums(T, N, K):
    each = weight.transpose(0, 3, 2, 1).reshape(B, S, K, N // K, 1)
    return (each * v[:, :, :, None]).sum(1).reshape(B, 1, N, V)
  rows = weight.swapaxes(1, 2).reshape(B, T * N, S)
  wide = jnp.einsum('BRS,BSF->BRF', rows, v.reshape(B, S, K * V))
  wide = wide.reshape(B, T, N, K, V)
  return jnp.einsum('BTNKV,NK->BTNV', wide, _own(N, K, v.dtype))


dot_product_attention = functools.partial(
  reference.dot_product_attention,
  products=reference.AttentionProducts(_scores, _mix),
)
