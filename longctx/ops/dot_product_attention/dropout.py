"""Attention dropout, counter-based: a function of where a weight is.

A weight is kept or dropped by a hash of (key, batch row, head, segment, query
position, key position), not by the order in which weights are computed: any
block size, and any mesh that hands over global positions, drops the same ones.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from longctx.typing import Array, Float, Int, Key, Num


class Dropout(NamedTuple):
  """Dropout of attention weights, beside the indices that it hashes.

  Attributes:
    threshold: weights whose random bits are below it are dropped.
    factor: of the weights that are kept.
    words: two words of randomness.
    first_batch_row: number in the whole batch of the arrays' first row.
    first_head: number in the whole layer of the arrays' first query head.
  """

  threshold: Num[Array, '']
  factor: Float[Array, '']
  words: Num[Array, '2']
  first_batch_row: int | Int[Array, ''] = 0
  first_head: int | Int[Array, ''] = 0


def make_dropout(
  dropout: tuple[float, Key[Array, '']] | Dropout | None,
) -> Dropout | None:
  """From (rate, key); None if nothing is dropped.

  Raises:
    ValueError: the rate is no probability below 1.
  """
  if dropout is None or isinstance(dropout, Dropout):
    return dropout
  rate, key = dropout
  if not 0 <= rate < 1:
    raise ValueError(f'dropout {rate=} must be in [0, 1)')
  if rate == 0:
    return None
  return Dropout(
    threshold=jnp.uint32(round(rate * 2**32)),
    factor=jnp.float32(1 / (1 - rate)),
    words=jax.random.bits(key, (2,), jnp.uint32),
  )


def keep_factor(
  dropout: Dropout,
  *,
  batch: Int[Array, '...'],
  head: Int[Array, '...'],
  segment: Int[Array, '...'] | None,
  q_positions: Int[Array, '...'],
  k_positions: Int[Array, '...'],
) -> Float[Array, '...']:
  """1 / (1 - rate) where a weight is kept and 0 where it is dropped.

  The indices broadcast against each other; so does the result. Batch rows and
  heads are counted from the first ones that `dropout` names. Segments are
  hashed so that packed segments whose positions start anew draw anew.
  """
  batch = dropout.first_batch_row + batch
  head = dropout.first_head + head
  row = dropout.words[0]
  # No segments are one segment, so that a mesh may add one for its padding.
  segment = jnp.zeros((), jnp.int32) if segment is None else segment
  for index in (batch, head, segment, q_positions):
    row = _mix(row ^ index.astype(jnp.uint32) * jnp.uint32(0x9E3779B1))
  column = k_positions.astype(jnp.uint32) * jnp.uint32(0x85EBCA77)
  # Rows and columns are mixed on their own, so that a pair costs one mix.
  bits = _mix(row + _mix(dropout.words[1] ^ column))
  return jnp.where(bits >= dropout.threshold, dropout.factor, 0)


def _mix(x: Num[Array, '...']) -> Num[Array, '...']:
  """The finalizer of MurmurHash3: every bit in changes half the bits out."""
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
    x = (x ^ (x >> jnp.uint32(shift))) * jnp.uint32(factor)
  return x ^ (x >> jnp.uint32(16))
