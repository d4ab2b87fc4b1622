"""Learned compression of NSA: a block of tokens as one vector."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from longctx.typing import Array, Float


class Compression(NamedTuple):
  """Compression weights, which all heads share.

  Attributes:
    embedding: [L, H], added by place within the block of L tokens.
    inner: [L, H, F], from a whole block to the hidden layer.
    outer: [F, H].
  """

  embedding: Float[Array, 'L H']
  inner: Float[Array, 'L H F']
  outer: Float[Array, 'F H']


def compress(
  x: Float[Array, '*blocks L K H'], weights: Compression
) -> Float[Array, '*blocks K H']:
  """W_outer gelu(Σ_i W_inner,i (x_i + e_i)) over the L tokens of a block.

  Args:
    x: blocks of keys or of values, in the dtype to compute in.
  """
  embedding, inner, outer = (w.astype(x.dtype) for w in weights)
  x = x + embedding[:, None]
  hidden = jax.nn.gelu(jnp.einsum('...LKH,LHF->...KF', x, inner))
  return hidden @ outer
