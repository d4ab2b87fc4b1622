"""Decayed scores of a chunk of one head, inside of a Pallas TPU kernel.

`chunk_products.products` in matrices [C, P] and [C, C], of which the TPU's
matrix unit multiplies whole ones alone. C is a power of two. Sums of log_decay
are sums of neighbouring steps only, never differences of longer sums, so they
are precise however strong the decay before them.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from longctx.ops.tpu import precision
from longctx.typing import Array, Float, Int

# The axes that are summed over: A B, A Bᵀ and Aᵀ B.
_CONTRACTED = {'NN': ((1,), (0,)), 'NT': ((1,), (1,)), 'TN': ((0,), (0,))}


class SegmentRows(NamedTuple):
  """Segments of one chunk, as numbers that never come back.

  within: [1, C], of each step. previous: [1, C], of the step before each.
  """

  within: Int[Array, '1 C']
  previous: Int[Array, '1 C']


class HeadProducts(NamedTuple):
  """Decayed scores of one head, as `ChunkProducts`, with a list per reader."""

  scores: list[Float[Array, 'C C']]
  q: list[Float[Array, 'C P']]
  k: Float[Array, 'C P']
  chunk_decay: Float[Array, 'P_or_1 1']


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def product(
  a: Float[Array, 'M N'],
  b: Float[Array, 'X Y'],
  form: str = 'NN',
  exact: bool = False,
) -> Float[Array, 'I J']:
  """A B ('NN'), A Bᵀ ('NT') or Aᵀ B ('TN'); its gradients are such products.

  Args:
    a, b: float32.
    form: which of the two is transposed.
    exact: in full float32, whatever JAX's default precision.
  """
  return lax.dot_general(
    a,
    b,
    (_CONTRACTED[form], ((), ())),
    precision=precision(exact=exact),
    preferred_element_type=jnp.float32,
  )


def _product_fwd(
  a: Float[Array, 'M N'], b: Float[Array, 'X Y'], form: str, exact: bool
) -> tuple[Array, tuple[Array, Array]]:
  return product(a, b, form, exact), (a, b)


def _product_bwd(
  form: str,
  exact: bool,
  saved: tuple[Array, Array],
  dout: Float[Array, 'I J'],
) -> tuple[Float[Array, 'M N'], Float[Array, 'X Y']]:
  a, b = saved
  if form == 'NN':
    return product(dout, b, 'NT', exact), product(a, dout, 'TN', exact)
  if form == 'NT':
    return product(dout, b, 'NN', exact), product(dout, a, 'TN', exact)
  return product(b, dout, 'NT', exact), product(a, dout, 'NN', exact)


product.defvjp(_product_fwd, _product_bwd)


def products(
  readers: Sequence[Float[Array, 'C P']],
  k: Float[Array, 'C P'],
  log_decay: Float[Array, '1 C'] | Float[Array, 'C P'] | None,
  segments: SegmentRows | None,
) -> HeadProducts:
  """The products of a chunk; see `ChunkProducts`.

  Args:
    readers: queries, or several that ask alike, as the delta rule's keys do.
    k: keys.
    log_decay: of the step, as a row for one per head, or per channel.
    segments: None where there is one only.
  """
  C, P = k.shape
  i, j = indices(C)
  visible = i >= j
  if segments is not None:
    within = segments.within.T
    visible &= within == segments.within

  if log_decay is None:
    scores = [product(q, k, 'NT') for q in readers]
    chunk_decay = jnp.ones((1, 1), k.dtype)
  elif log_decay.shape[0] == 1:
    # The row i, column t: what step t adds to the sums up to step i.
    parts = jnp.where(i >= j, log_decay, 0)
    gap = product(parts, (i > j).astype(k.dtype), 'NN', True)
    decay = jnp.exp(jnp.where(visible, gap, -jnp.inf))
    scores = [product(q, k, 'NT') * decay for q in readers]
    so_far = jnp.exp(parts.sum(1, keepdims=True))
    readers = [q * so_far for q in readers]
    still = jnp.where(i >= j, 0, log_decay).sum(1, keepdims=True)
    k = k * jnp.exp(still)
    chunk_decay = jnp.exp(log_decay.sum(1, keepdims=True))
  else:
    levels, so_far, still = _sums(log_decay)
    scores = _decayed_products(readers, k, levels)
    chunk_decay = jnp.exp(so_far[C - 1 :]).T
    so_far = jnp.exp(so_far)
    readers = [q * so_far for q in readers]
    k = k * jnp.exp(still)

  scores = [jnp.where(visible, x, 0) for x in scores]
  if segments is not None:
    # Only steps of the entering segment see the entering state, and only the
    # last segment of the chunk goes on.
    before = segments.previous[:, :1]
    last = segments.within[:, C - 1 :]
    within = jnp.broadcast_to(within, (C, P))
    readers = [jnp.where(within == before, q, 0) for q in readers]
    k = jnp.where(within == last, k, 0)
    chunk_decay = chunk_decay * (before == last).astype(chunk_decay.dtype)
  return HeadProducts(scores, list(readers), k, chunk_decay)


def product_costs(
  C: int, P: int, log_decay: Float[Array, 'B T N *P'] | None
) -> tuple[int, int]:
  """(flops, exponentials) of `products` for one reader."""
  if log_decay is None:
    return 2 * C * C * P, 0
  if log_decay.ndim == 3:
    return 2 * C * C * (P + 6 * C), C * (C + 2)
  levels = C.bit_length()
  return levels * 2 * C * C * P, (levels + 1) * C * P


def indices(C: int) -> tuple[Int[Array, 'C C'], Int[Array, 'C C']]:
  """Of the row, and of the column."""
  i, j = (lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))
  return i, j


def _decayed_products(
  readers: Sequence[Float[Array, 'C P']],
  k: Float[Array, 'C P'],
  levels: Sequence[tuple[int, Float[Array, 'C P']]],
) -> list[Float[Array, 'C C']]:
  """Σ_p q_ip exp(L_ip - L_jp) k_jp for j <= i; anything finite for j > i.

  Where the chunk is halved again and again, every i > j are once in the second
  and the first half of a part. Both are scaled to the step between the halves,
  and one matrix product has the scores of all the parts of a level on it: those
  of the next level overwrite what is wrong, within their smaller parts.
  """
  i, j = indices(k.shape[0])
  scores = [None for _ in readers]
  for size, total in reversed(levels):
    decay = jnp.exp(total)
    decayed = k * decay
    for n, q in enumerate(readers):
      level = product(q * decay, decayed, 'NT')
      if scores[n] is not None:
        level = jnp.where((i ^ j) < 2 * size, level, scores[n])
      scores[n] = level
  return [
    jnp.where(i == j, product(q, k, 'NT'), x)
    for q, x in zip(readers, scores, strict=True)
  ]


def _sums(
  x: Float[Array, 'C P'],
) -> tuple[list[tuple[int, Array]], Float[Array, 'C P'], Float[Array, 'C P']]:
  """(levels, so far, still): sums of x over neighbouring steps.

  Of a level of parts of 2 size steps, (size, total): the sum after the first
  half up to the step, if it is in the second; else that of the steps after it
  in the first half. Over the whole chunk: the sum up to a step, and that of the
  steps after it.
  """
  row = lax.broadcasted_iota(jnp.int32, x.shape, 0)
  so_far, still, whole = x, jnp.zeros_like(x), x
  levels = []
  size = 1
  while size < x.shape[0]:
    second = (row & size) != 0
    levels.append((size, jnp.where(second, so_far, still)))
    other = _other_half(whole, size)
    so_far = so_far + jnp.where(second, other, 0)
    still = still + jnp.where(second, 0, other)
    whole = whole + other
    size *= 2
  return levels, so_far, still


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _other_half(x: Float[Array, 'C P'], size: int) -> Float[Array, 'C P']:
  """x with the halves, `size` steps each, of all parts exchanged."""
  row = lax.broadcasted_iota(jnp.int32, x.shape, 0)
  down = pltpu.roll(x, size, 0)
  up = pltpu.roll(x, x.shape[0] - size, 0)
  return jnp.where((row & size) != 0, down, up)


_other_half.defvjp(
  lambda x, size: (_other_half(x, size), None),
  lambda size, _, dout: (_other_half(dout, size),),
)
