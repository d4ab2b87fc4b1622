"""Ring schedule: hops and blocks, derived from the mask and the layout.

A mask is cut into three parts that share no pair:

    prefix keys     the first keys, where many queries read them (sinks, global
                    keys): broadcast once
    prefix queries  the first queries, where they read far keys (global
                    queries): broadcast once, their partial results merged
    the rest        keys and values that travel from neighbour to neighbour, as
                    far and in those directions as anything is read, no farther
"""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np

from longctx.masks import (
  Beyond,
  GlobalTokens,
  Mask,
  PrefixColumns,
  PrefixRows,
  check_mask,
)
from longctx.parallel.layout import SequenceLayout
from longctx.typing import Bool, Int

# What a neighbour reads is found to 1 / TRIMMING of a span.
TRIMMING = 64


@dataclasses.dataclass(frozen=True)
class RingPass:
  """Ring pass: keys and values that travel `hops` times by one shard.

  Attributes:
    direction: +1 or -1, added to the index of the shard at every hop.
    hops: how often; hop h brings shard r the keys of shard r - direction h.
    start: the first token of a shard that is sent.
    stop: the token after the last one.
    pairs: (from, to) of shards that send at every hop.
  """

  direction: int
  hops: int
  start: int
  stop: int
  pairs: tuple[tuple[int, int], ...]

  @property
  def length(self) -> int:
    return self.stop - self.start


@dataclasses.dataclass(frozen=True)
class Schedule:
  """Ring schedule of what is sent where.

  Attributes:
    mask: all pairs.
    prefix_keys: number of first keys that are broadcast.
    prefix_queries: number of first queries that are broadcast.
    passes: how the other keys travel; at most one per direction.
  """

  mask: Mask
  prefix_keys: int
  prefix_queries: int
  passes: tuple[RingPass, ...]

  @property
  def travelling(self) -> Mask:
    """The pairs that neither the broadcast keys nor queries cover."""
    if self.prefix_keys == self.prefix_queries == 0:
      return self.mask
    return self.mask & Beyond(self.prefix_queries, self.prefix_keys)

  @property
  def of_prefix_queries(self) -> Mask:
    """The pairs of broadcast queries that no broadcast key covers."""
    return self.mask & Beyond(0, self.prefix_keys)


@dataclasses.dataclass(frozen=True)
class Ring:
  """Ring of the shards of a layout, `fold` neighbours into one.

  Folding is what Ulysses inside of a ring does: one device then holds, for some
  of the heads, the tokens of `fold` shards.
  """

  layout: SequenceLayout
  fold: int = 1

  @property
  def size(self) -> int:
    """Shards R of the ring."""
    return self.layout.num_shards // self.fold

  @property
  def shard_len(self) -> int:
    """Tokens L of a shard of the ring."""
    return self.layout.shard_len * self.fold

  @property
  def contiguous_len(self) -> int | None:
    """Between multiples of this many tokens of a shard no position jumps."""
    if self.layout.name == 'zigzag':
      return self.layout.span_len
    if self.layout.name == 'striped' and self.fold > 1:
      return self.layout.shard_len
    return None

  def positions(self, shard):
    """Natural positions of a shard's tokens, int32[L]; it may be traced."""
    parts = [
      self.layout.positions(shard * self.fold + i) for i in range(self.fold)
    ]
    if self.fold == 1:
      return parts[0]
    xp = np if isinstance(parts[0], np.ndarray) else jnp
    return xp.concatenate(parts)

  def place_of(self, n: int) -> tuple[np.ndarray, np.ndarray]:
    """(shard, token within the shard) of the natural positions below n."""
    places = self.layout.places[:n]
    return places // self.shard_len, places % self.shard_len


def without_padding(
  mask: Mask, layout: SequenceLayout, *, natural: bool = True
) -> Mask:
  """A mask that leaves padding out, for keys at natural positions.

  Args:
    mask: which often does so by itself, as every causal one.
    layout: of the keys.
    natural: whether queries are at natural positions too; else they may be
      anywhere.
  """
  T = layout.seq_len
  check_mask(mask, T)
  beyond = np.array([T, layout.padded_len])
  reads = layout.is_padded and (
    not natural or mask.count(np.array([0, T]), beyond).any()
  )
  return mask & PrefixColumns(T) if reads else mask


@functools.lru_cache(maxsize=128)
def make_schedule(mask: Mask, ring: Ring) -> Schedule:
  """The cheapest schedule, in tokens sent, for tokens at natural positions."""
  T = ring.layout.seq_len
  if ring.size == 1:
    return Schedule(mask, 0, 0, ())

  def prefix(*kinds: type[Mask]) -> int:
    of_kind = [p.n for p in mask.primitives() if isinstance(p, kinds)]
    return max((n for n in of_kind if n < T), default=0)

  keys = prefix(PrefixColumns, GlobalTokens)
  queries = prefix(PrefixRows, GlobalTokens)
  schedules = []
  for broadcast in ((0, 0), (keys, 0), (keys, queries)):
    schedule = Schedule(mask, *broadcast, ())
    passes = _passes(schedule.travelling, ring)
    schedules.append(dataclasses.replace(schedule, passes=passes))
  # The first among equals, which is the simplest.
  return min(schedules, key=_tokens_sent)


def full_schedule(mask: Mask, ring: Ring) -> Schedule:
  """Every shard reaches every other: for positions known at run time only."""
  R = ring.size
  pairs = tuple((r, (r + 1) % R) for r in range(R))
  ring_pass = RingPass(1, R - 1, 0, ring.shard_len, pairs)
  return Schedule(mask, 0, 0, (ring_pass,) if R > 1 else ())


def _tokens_sent(schedule: Schedule) -> int:
  # A broadcast is a sum over devices, twice its operand on the wire; prefix
  # queries send queries and bring results back.
  sent = 2 * schedule.prefix_keys + 4 * schedule.prefix_queries
  return sent + sum(p.hops * p.length for p in schedule.passes)


def _passes(mask: Mask, ring: Ring) -> tuple[RingPass, ...]:
  R = ring.size
  needed = _needed(mask, ring)
  queries, keys = np.nonzero(needed)
  offsets = sorted(set(((queries - keys) % R).tolist()) - {0})
  # The shards up to one offset come one way, the rest the other way.
  splits = [
    (back, R - on if on else 0)
    for back, on in zip([0, *offsets], [*offsets, 0], strict=True)
  ]
  forward, backward = min(splits, key=lambda hops: (sum(hops), hops[1]))
  passes = []
  for direction, hops in ((1, forward), (-1, backward)):
    if hops == 0:
      continue
    start, stop = 0, ring.shard_len
    if hops == 1 and ring.layout.spans_per_shard:
      start, stop = _tokens_read(mask, ring, direction)
    # Sending to r is of use where r, or one farther on, reads what passes.
    pairs = tuple(
      ((r - direction) % R, r)
      for r in range(R)
      if any(
        needed[(r + direction * on) % R, (r - direction * back) % R]
        for back in range(1, hops + 1)
        for on in range(hops - back + 1)
      )
    )
    passes.append(RingPass(direction, hops, start, stop, pairs))
  return tuple(passes)


def _needed(mask: Mask, ring: Ring) -> Bool[np.ndarray, 'R R']:
  """Whether some query of shard r reads some key of shard s."""
  layout, R = ring.layout, ring.size
  T = layout.seq_len
  if layout.spans_per_shard == 0:
    # Neighbouring tokens lie on different shards: whoever reads, reads all.
    return np.full((R, R), mask.num_allowed(T, T) > 0)
  edges = _edges(T, layout.span_len)
  shards = ring.place_of(T)[0][edges[:-1]]
  reads = mask.count(edges, edges) > 0
  needed = np.zeros((R, R), bool)
  np.logical_or.at(needed, (shards[:, None], shards[None, :]), reads)
  return needed


def _tokens_read(mask: Mask, ring: Ring, direction: int) -> tuple[int, int]:
  """The range of a shard's tokens that its neighbour in a direction reads."""
  T, C = ring.layout.seq_len, ring.layout.span_len
  spans = _edges(T, C)
  inside = _edges(C, -(-C // TRIMMING))
  fine = np.unique(np.minimum(spans[:-1, None] + inside, T))
  shards, tokens = ring.place_of(T)
  reader, owner = shards[spans[:-1]], shards[fine[:-1]]
  neighbours = (reader[:, None] - owner) % ring.size == direction % ring.size
  read = ((mask.count(spans, fine) > 0) & neighbours).any(0)
  first = tokens[fine[:-1][read]]
  last = first + np.diff(fine)[read]
  return int(first.min()), int(last.max())


def _edges(length: int, step: int) -> Int[np.ndarray, ' n']:
  return np.append(np.arange(0, length, step), length)
