"""Sequence layouts (zigzag, striped): where tokens lie on several devices.

A layout is a permutation of the sequence, cut into one shard per device. With
T = 16 tokens on R = 4 devices:

    contiguous   0  1  2  3 |  4  5  6  7 |  8  9 10 11 | 12 13 14 15
    zigzag       0  1 14 15 |  2  3 12 13 |  4  5 10 11 |  6  7  8  9
    striped      0  4  8 12 |  1  5  9 13 |  2  6 10 14 |  3  7 11 15

Under a causal mask the last contiguous shard has 2 - 1/R times the mean work;
zigzag (Llama 3, arXiv:2407.21783) and striped (arXiv:2311.09431) share it out
evenly. A batch is permuted once, where it enters, and every array of it
together: all the rest reads positions, so nothing can come out of line.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longctx.typing import Int, Shaped

LAYOUTS = ('contiguous', 'zigzag', 'striped')

# Zigzag chunks beyond this length are made a multiple of it, so that blocks of
# scores end where chunks do.
CHUNK_MULTIPLE = 128

# Arrays of a batch that have an entry per token.
PER_TOKEN = (
  'tokens',
  'labels',
  'weights',
  'positions',
  'segment_ids',
  'relevant',
)


@dataclasses.dataclass(frozen=True)
class SequenceLayout:
  """Sequence layout: `seq_len` tokens spread over `num_shards` shards.

  Any length works: padding fills the last shards up and stands at the end of
  the natural order, at positions `seq_len` and beyond.

  Attributes:
    name: 'contiguous', 'zigzag' or 'striped'.
    seq_len: tokens T of the sequence, without padding.
    num_shards: shards R.
  """

  name: str
  seq_len: int
  num_shards: int

  def __post_init__(self):
    if self.name not in LAYOUTS:
      raise ValueError(
        f'unknown layout {self.name!r}; known: {", ".join(LAYOUTS)}'
      )
    if self.seq_len < 1 or self.num_shards < 1:
      raise ValueError(
        f'need seq_len={self.seq_len} >= 1 and '
        f'num_shards={self.num_shards} >= 1'
      )

  @property
  def spans_per_shard(self) -> int:
    """Spans of neighbouring tokens in a shard; 0 where there are none."""
    return {'contiguous': 1, 'zigzag': 2, 'striped': 0}[self.name]

  @property
  def span_len(self) -> int:
    """Tokens of a span, C; those of a whole shard where it has none."""
    spans = self.num_shards * max(self.spans_per_shard, 1)
    length = -(-self.seq_len // spans)
    if self.name == 'zigzag' and length > CHUNK_MULTIPLE:
      length = -(-length // CHUNK_MULTIPLE) * CHUNK_MULTIPLE
    return length

  @property
  def shard_len(self) -> int:
    """Tokens of a shard, L, the padding included."""
    return self.span_len * max(self.spans_per_shard, 1)

  @property
  def padded_len(self) -> int:
    """Tokens of all shards, R L."""
    return self.shard_len * self.num_shards

  @property
  def is_padded(self) -> bool:
    return self.padded_len > self.seq_len

  @property
  def is_natural(self) -> bool:
    """Whether the layout leaves the sequence as it is."""
    return self.name == 'contiguous' or self.num_shards == 1

  def positions(self, shard: int | jax.Array) -> Int[Any, ' L']:
    """Natural positions of the tokens of a shard, in their order there.

    Args:
      shard: its index, which may be traced.

    Returns:
      int32[L]; numpy for a Python integer, else a JAX array.
    """
    xp = np if isinstance(shard, (int, np.integer)) else jnp
    i = xp.arange(self.shard_len, dtype=xp.int32)
    R, C = self.num_shards, self.span_len
    if self.name == 'striped':
      return shard + R * i
    if self.name == 'contiguous':
      return shard * C + i
    chunk = xp.where(i < C, shard, 2 * R - 1 - shard)
    return (chunk * C + i % C).astype(xp.int32)

  @functools.cached_property
  def order(self) -> Int[np.ndarray, ' R_L']:
    """The natural position of every place of the layout, int32[R L]."""
    return np.concatenate(
      [self.positions(shard) for shard in range(self.num_shards)]
    )

  @functools.cached_property
  def places(self) -> Int[np.ndarray, ' R_L']:
    """The place in the layout of every natural position: `order` inverted."""
    places = np.empty(self.padded_len, np.int32)
    places[self.order] = np.arange(self.padded_len, dtype=np.int32)
    return places

  def apply(
    self,
    x: Shaped[Any, '...'],
    *,
    axis: int = 1,
    fill: Any = 0,
    local: bool = False,
  ) -> Shaped[Any, '...']:
    """Brings an axis of length T from natural order into the layout, R L.

    Args:
      x: a numpy or JAX array.
      axis: which axis is the sequence.
      fill: value of the padding, a number or a scalar array.
      local: whether x lies on one device, as it does inside of `shard_map`: by
        slices and transpositions then, which cost less than a gather does and
        which the compiler gets wrong for some arrays that it spreads itself.
    """
    if x.shape[axis] != self.seq_len:
      raise ValueError(
        f'axis {axis} of {x.shape=} must have seq_len={self.seq_len}'
      )
    xp = jnp if isinstance(x, jax.Array) else np
    if self.is_padded:
      widths = [(0, 0)] * x.ndim
      widths[axis] = (0, self.padded_len - self.seq_len)
      x = xp.pad(x, widths, constant_values=fill)
    if local:
      return self._permute(x, axis, xp, inverse=False)
    return x if self.is_natural else xp.take(x, self.order, axis)

  def restore(
    self, x: Shaped[Any, '...'], *, axis: int = 1, local: bool = False
  ) -> Shaped[Any, '...']:
    """The inverse of `apply`: natural order, without the padding."""
    if x.shape[axis] != self.padded_len:
      raise ValueError(
        f'axis {axis} of {x.shape=} must have padded_len={self.padded_len}'
      )
    xp = jnp if isinstance(x, jax.Array) else np
    if not local and not self.is_natural:
      return xp.take(x, self.places[: self.seq_len], axis)
    x = self._permute(x, axis, xp, inverse=True)
    return x[(slice(None),) * axis + (slice(self.seq_len),)]

  def _permute(self, x, axis: int, xp, *, inverse: bool):
    """By slices and transpositions.

    On TPUs the gradient of a gather takes a minute to compile.
    """
    R, L, shape = self.num_shards, self.shard_len, x.shape
    if self.is_natural:
      return x
    if self.name == 'striped':
      split = (R, L) if inverse else (L, R)
      x = x.reshape(*shape[:axis], *split, *shape[axis + 1 :])
      return xp.swapaxes(x, axis, axis + 1).reshape(shape)
    # Shard r has the spans r and 2R - 1 - r.
    split = (R, 2) if inverse else (2, R)
    x = x.reshape(*shape[:axis], *split, self.span_len, *shape[axis + 1 :])
    x = xp.moveaxis(x, axis + inverse, 0)
    x = xp.stack([x[0], xp.flip(x[1], axis)], axis + (not inverse))
    return x.reshape(shape)

  def place(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A batch of arrays [B, T] in the layout's order, [B, R L].

    Padding has weight 0, is not relevant and is read by no token: causal and
    other masks on default positions leave out the keys beyond T, and where the
    batch brings its own positions or segments, padding is a segment of its own.

    Args:
      batch: tokens, labels, weights and, where there are, positions,
        segment_ids and relevant; `query_indices` holds places in T instead, and
        is mapped to them.
    """
    batch = dict(batch)
    indices = batch.pop('query_indices', None)
    unknown = sorted(set(batch) - set(PER_TOKEN))
    if unknown:
      raise ValueError(
        f'no layout for {unknown}; known: {PER_TOKEN} and query_indices'
      )
    if self.is_padded and 'positions' in batch and 'segment_ids' not in batch:
      batch['segment_ids'] = np.zeros(batch['tokens'].shape, np.int32)
    placed = {}
    for name, x in batch.items():
      fill = x.max() + 1 if name == 'segment_ids' else 0
      placed[name] = self.apply(x, axis=x.ndim - 1, fill=fill)
    if indices is not None:
      placed['query_indices'] = np.where(indices < 0, -1, self.places[indices])
    return placed
