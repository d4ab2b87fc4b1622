"""Dropout of attention weights, as a function of where the weight is.

A weight is kept or dropped by a hash of (key, batch row, head, segment, query
position, key position), not by the order in which weights are computed: any
block size, and any mesh that hands over global positions, drops the same ones.
"""

import jax
import jax.numpy as jnp

from longctx.typing import Array, Float, Int, Key, Num


def random_words(key: Key[Array, '']) -> Num[Array, '2']:
  """The two words of randomness that `keep_factor` hashes with positions."""
  return jax.random.bits(key, (2,), jnp.uint32)


def keep_factor(
  rate: float,
  words: Num[Array, '2'],
  *,
  batch: Int[Array, '...'],
  head: Int[Array, '...'],
  segment: Int[Array, '...'] | None,
  q_positions: Int[Array, '...'],
  k_positions: Int[Array, '...'],
) -> Float[Array, '...']:
  """1 / (1 - rate) where a weight is kept and 0 where it is dropped.

  The indices broadcast against each other; so does the result. Segments are
  hashed so that documents whose positions start anew draw anew.
  """
  row = words[0]
  for index in (batch, head, segment, q_positions):
    if index is not None:
      row = _mix(row ^ index.astype(jnp.uint32) * jnp.uint32(0x9E3779B1))
  column = k_positions.astype(jnp.uint32) * jnp.uint32(0x85EBCA77)
  # Rows and columns are mixed on their own, so that a pair costs one mix.
  bits = _mix(row + _mix(words[1] ^ column))
  kept = bits >= jnp.uint32(round(rate * 2**32))
  return jnp.where(kept, jnp.float32(1 / (1 - rate)), 0)


def _mix(x: Num[Array, '...']) -> Num[Array, '...']:
  """The finalizer of MurmurHash3: every bit in changes half the bits out."""
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
    x = (x ^ (x >> jnp.uint32(shift))) * jnp.uint32(factor)
  return x ^ (x >> jnp.uint32(16))
