"""Grid and blocks of a chunked recurrence in TPU kernels, and what VMEM holds.

The kernels are given, with L = T / C chunks of C steps,

  [B, K, G, L, C, width]   queries, decays per channel; G is 1 for keys, values
  [B, K, G, L, 1, C]       one number per step and query head
  [B, K, G, L, P, V]       states that enter chunks
  [B, K, G, P, V]          states that pass from chunk to chunk
  [B, L, 2, C]             segments
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from longctx.ops.recurrence.steps import (
  SMALLEST_LOG_DECAY,
  SegmentIndex,
  State,
  Steps,
)
from longctx.typing import Array, Float, Int

# Arrays with one head per key head; all others have one per query head.
KEY_HEADS = ('k', 'v')
# A tile of bfloat16 has this many rows.
_SMALLEST_CHUNK = 16
# Of the states that a forward step holds; a backward step has more of them.
_MOST_STATES = 8 * 2**20


@dataclasses.dataclass(frozen=True)
class ChunkLayout:
  """Grid and blocks of a recurrence: where a step finds what it computes.

  The grid is (B, K / key_heads, T / C, G / query_heads). Key heads and the
  states of all their query heads stay in VMEM while the last axis goes round.

  Attributes:
    B, T, K, G, P, V: sizes of the arrays; G query heads share a key head.
    chunk: C, the steps of the sequence that one of the grid computes, a power
      of two.
    key_heads: of as many key heads.
    query_heads: and of as many query heads of each; several key heads only if
      these are all.
  """

  B: int
  T: int
  K: int
  G: int
  P: int
  V: int
  chunk: int
  key_heads: int
  query_heads: int

  @classmethod
  def choose(cls, steps: Steps, *, chunk: int, heads: int) -> 'ChunkLayout':
    """At most `chunk` steps and `heads` heads, as far as there are as many.

    Heads do not depend on each other, so the matrix unit is busy with one while
    another waits for its last product. Wide states leave room for few.

    Args:
      steps: of the whole sequence.
      chunk: the most steps, a power of two.
      heads: the most query heads.
    """
    B, T, N, P = steps.q.shape
    K, V = steps.v.shape[2:]
    G = N // K
    heads = min(heads, max(1, _MOST_STATES // state_bytes(P, V)))
    chunk = min(chunk, max(_SMALLEST_CHUNK, 1 << (T - 1).bit_length()))
    query_heads = _largest_divisor(G, heads)
    key_heads = _largest_divisor(K, heads // G) if query_heads == G else 1
    return cls(B, T, K, G, P, V, chunk, key_heads, query_heads)

  @property
  def chunks(self) -> int:
    return pl.cdiv(self.T, self.chunk)

  @property
  def grid(self) -> tuple[int, ...]:
    groups = self.K // self.key_heads
    return self.B, groups, self.chunks, self.G // self.query_heads

  def split(self, name: str, x: Float[Array, 'B T *heads']) -> Array:
    """An array of `Steps`, by its name, as the kernels read it."""
    if name == 'log_decay':
      x = jnp.maximum(x, SMALLEST_LOG_DECAY)
    pad = -self.T % self.chunk
    if pad:
      x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
    x = jnp.moveaxis(x, 1, 2)
    rows = x.ndim == 3
    # A row of one number per step is float32 at little cost.
    if rows or x.dtype not in (jnp.float32, jnp.bfloat16):
      x = x.astype(jnp.float32)
    block = (1, self.chunk) if rows else (self.chunk, x.shape[3])
    heads = x.shape[1] // self.K
    return x.reshape(self.B, self.K, heads, self.chunks, *block)

  def split_segments(
    self, segment_index: SegmentIndex
  ) -> Int[Array, 'B L 2 C'] | None:
    """The segment of each step, and of the step before it, chunk by chunk."""
    if segment_index is None:
      return None
    x = segment_index.astype(jnp.int32)
    x = jnp.pad(x, [(0, 0), (0, -self.T % self.chunk)], mode='edge')
    previous = jnp.pad(x[:, :-1], [(0, 0), (1, 0)])
    rows = jnp.stack([x, previous], axis=1)
    rows = rows.reshape(self.B, 2, self.chunks, self.chunk)
    return jnp.moveaxis(rows, 1, 2)

  def by_key_head(self, state: State) -> Float[Array, 'B K G P V']:
    return state.reshape(self.B, self.K, self.G, self.P, self.V)

  def block(
    self, x: Array | jax.ShapeDtypeStruct, *, reverse: bool
  ) -> pl.BlockSpec:
    """What a step of the grid has of an array, with `reverse` from the end."""
    at = lambda c: self.chunks - 1 - c if reverse else c
    if x.ndim == 4:
      return pl.BlockSpec(
        (None, None, *x.shape[2:]), lambda b, k, c, g: (b, at(c), 0, 0)
      )
    if x.ndim == 5:
      return pl.BlockSpec(
        (None, self.key_heads, *x.shape[2:]), lambda b, k, c, g: (b, k, 0, 0, 0)
      )
    shared = x.shape[2] < self.G
    heads = 1 if shared else self.query_heads
    return pl.BlockSpec(
      (None, self.key_heads, heads, None, *x.shape[4:]),
      lambda b, k, c, g: (b, k, 0 if shared else g, at(c), 0, 0),
    )


def block_bytes(spec: pl.BlockSpec, x: jax.ShapeDtypeStruct | Array) -> int:
  """VMEM of one block of x."""
  *outer, rows, width = (1 if n is None else n for n in spec.block_shape)
  size = _rows(rows) * lanes(width) * x.dtype.itemsize
  for n in outer:
    size *= n
  return size


def state_bytes(P: int, V: int) -> int:
  """Of a head: what enters and what leaves, in float32, each of them twice."""
  return 16 * _rows(P) * lanes(V)


def lanes(n: int) -> int:
  """Of the vectors that a row of n numbers fills."""
  return pl.cdiv(n, 128) * 128


def _rows(n: int) -> int:
  return pl.cdiv(n, 8) * 8


def _largest_divisor(n: int, most: int) -> int:
  return max(d for d in range(1, max(1, min(n, most)) + 1) if n % d == 0)
