"""Attention costs on a mesh: blocks computed and bytes sent, by formula."""

import dataclasses
import math
from collections import Counter

import numpy as np
from jax.sharding import AbstractMesh, Mesh

from longctx.masks import Causal, Mask, Range
from longctx.parallel.axes import make_axes
from longctx.parallel.layout import SequenceLayout
from longctx.parallel.schedule import (
  Ring,
  Schedule,
  full_schedule,
  make_schedule,
  without_padding,
)
from longctx.parallel.schemes import check_scheme
from longctx.typing import Int

# Bytes of an index, of lse and of sums, for inputs up to 32 bits.
WORD = 4


@dataclasses.dataclass(frozen=True)
class HopBlocks:
  """Attention blocks that each of R devices computes, by ring hop.

  Attributes:
    schedule: whose passes these are.
    own: int64[R], of its own keys and of what is broadcast.
    hops: per ring pass int64[hops, R], of the keys that a hop brings.
  """

  schedule: Schedule
  own: Int[np.ndarray, ' R']
  hops: tuple[Int[np.ndarray, 'hops R'], ...]

  @property
  def total(self) -> Int[np.ndarray, ' R']:
    return self.own + sum(ring_pass.sum(0) for ring_pass in self.hops)


def hop_blocks(
  mask: Mask,
  layout: SequenceLayout,
  block_q: int,
  block_k: int,
  *,
  fold: int = 1,
) -> HopBlocks:
  """Blocks of scores that each device of a ring computes, in either pass.

  At natural positions and without segments, by the rule of the work list: the
  blocks whose ranges of positions may hold an allowed pair, of its own keys, of
  those that are broadcast and of those that arrive at every hop. Times
  `block_q block_k` their number is the area of scores, and times 4 H that in
  FLOPs of a head's forward pass.

  Args:
    mask: who reads whom.
    layout: of the tokens.
    block_q: queries per block; cut to what a part has, like the next one.
    block_k: keys per block.
    fold: devices along the second axis of 'ring+ulysses'; then each of them
      computes that many blocks for its share of the heads.
  """
  ring = Ring(layout, fold)
  schedule = make_schedule(without_padding(mask, layout), ring)
  R = ring.size
  positions = [ring.positions(shard) for shard in range(R)]
  queries = [_ranges(own, block_q) for own in positions]

  def blocks(mask: Mask, q: Range, k: Range) -> int:
    some, _ = mask.bounds(Range(q.low[:, None], q.high[:, None]), k)
    return int(np.count_nonzero(some))

  columns = _ranges(np.arange(schedule.prefix_keys), block_k)
  rows = _ranges(np.arange(schedule.prefix_queries), block_q)
  own = np.zeros(R, np.int64)
  for shard in range(R):
    keys = _ranges(positions[shard], block_k)
    own[shard] = blocks(schedule.travelling, queries[shard], keys)
    if schedule.prefix_keys:
      own[shard] += blocks(schedule.mask, queries[shard], columns)
    if schedule.prefix_queries:
      own[shard] += blocks(schedule.of_prefix_queries, rows, keys)
  hops = []
  for ring_pass in schedule.passes:
    sent = [
      _ranges(p[ring_pass.start : ring_pass.stop], block_k) for p in positions
    ]
    counts = np.zeros((ring_pass.hops, R), np.int64)
    for hop, shard in np.ndindex(*counts.shape):
      keys = sent[(shard - ring_pass.direction * (hop + 1)) % R]
      counts[hop, shard] = blocks(schedule.travelling, queries[shard], keys)
    hops.append(counts)
  return HopBlocks(schedule, own, tuple(hops))


def _ranges(positions: Int[np.ndarray, ' L'], block: int) -> Range:
  """The smallest and the largest position of each block."""
  if not len(positions):
    return Range(positions, positions)
  starts = np.arange(0, len(positions), min(block, len(positions)))
  lowest = np.minimum.reduceat(positions, starts)
  return Range(lowest, np.maximum.reduceat(positions, starts))


@dataclasses.dataclass(frozen=True)
class _Sizes:
  """Sizes in bytes per token of what a device sends.

  Attributes:
    q: a query of all the heads here.
    out: an output, in the dtype of q.
    heads: a number per query head, as lse is.
    kv: a key and a value of all the key heads here.
    indices: the integers that travel with keys.
    segments: those of them that say the segment.
    q_sum: a gradient of q, not yet rounded.
    out_sum: an output, likewise.
    kv_sum: gradients of k and v, likewise.
  """

  q: int
  out: int
  heads: int
  kv: int
  indices: int
  segments: int
  q_sum: int
  out_sum: int
  kv_sum: int


def wire_bytes(
  scheme: str,
  B: int,
  N: int,
  K: int,
  H: int,
  *,
  mesh: Mesh | AbstractMesh,
  layout: SequenceLayout,
  axis: str | tuple[str, ...] = 'seq',
  mask: Mask = Causal(),
  V: int | None = None,
  itemsize: int = 4,
  packed: bool = False,
  q_positions: tuple[int, ...] | None = None,
  k_positions: tuple[int, ...] | None = None,
  uses_lse: bool = False,
  backward: bool = False,
) -> dict[str, int]:
  """The bytes that attention sends, all devices together.

  Of `parallel.dot_product_attention` with arrays in the layout's order, as many
  queries as keys and no sink logits, whose gradient is a sum over all devices.

  Args:
    scheme: 'ring', 'ulysses', 'all_gather' or 'ring+ulysses'.
    B: rows of the whole batch.
    N: query heads.
    K: key heads.
    H: size of queries and keys.
    mesh: devices, or an AbstractMesh where there are none.
    layout: of the tokens.
    axis: of the sequence; two of them for 'ring+ulysses'.
    mask: who reads whom.
    V: size of values; H when None.
    itemsize: bytes of a number of q, k and v.
    packed: whether there are segment ids, the same for queries and keys.
    q_positions: shape of explicit positions, as given; None without.
    k_positions: likewise.
    uses_lse: whether lse is used beside out.
    backward: whether to count the backward pass too.

  Returns:
    The bytes by kind of collective, as `hlo.collective_bytes` counts them;
    kinds of which nothing is sent are left out.

  Raises:
    ValueError: the scheme lacks this combination.
  """
  axes = make_axes(mesh, axis)
  axes.check(batch=B, query_heads=N, key_heads=K)
  check_scheme(scheme, axes, N, None)
  data, model = axes.size(axes.data), axes.size(axes.heads)
  b, n, k = B // data, N // model, K // model
  V = H if V is None else V

  def index(shape):
    return 0 if shape is None else WORD * (b if shape[:-1] == (B,) else 1)

  sizes = _sizes(b, n, k, H, V, itemsize)
  segments = WORD * b if packed else 0
  positions = index(q_positions), index(k_positions)
  sent = Counter()
  R = axes.size(axes.seq)
  L = layout.shard_len
  if scheme == 'all_gather':
    gathered = sizes.kv + positions[1] + segments
    sent['all-gather'] = (R - 1) * R * L * gathered
    if backward:
      sent['reduce-scatter'] = (R - 1) * R * L * sizes.kv
  U = axes.size(axes.seq[-1])
  if 'ulysses' in scheme:
    repeated = math.lcm(k, U) // k * sizes.kv
    traded = sizes.q + repeated + sizes.out + uses_lse * sizes.heads
    groups = R // U
    sent['all-to-all'] = groups * (U - 1) * L * traded * (1 + backward)
    gathered = sum(positions) + segments
    sent['all-gather'] = groups * (U - 1) * U * L * gathered
  if 'ring' in scheme:
    fold = U if scheme == 'ring+ulysses' else 1
    natural = q_positions is None and k_positions is None
    ring = Ring(layout, fold)
    make = make_schedule if natural else full_schedule
    schedule = make(without_padding(mask, layout), ring)
    n, k = n // fold, math.lcm(k, fold) // fold
    travelling = segments
    if not natural:
      travelling += positions[1] or WORD
    sizes = dataclasses.replace(
      _sizes(b, n, k, H, V, itemsize), indices=travelling, segments=segments
    )
    for kind, size in _ring_bytes(schedule, ring, sizes, backward).items():
      sent[kind] += fold * size
  return {kind: mesh.size // R * s for kind, s in sent.items() if s}


def _sizes(b: int, n: int, k: int, H: int, V: int, itemsize: int) -> _Sizes:
  word = max(WORD, itemsize)
  return _Sizes(
    q=b * n * H * itemsize,
    out=b * n * V * itemsize,
    heads=b * n * word,
    kv=b * k * (H + V) * itemsize,
    indices=0,
    segments=0,
    q_sum=b * n * H * word,
    out_sum=b * n * V * word,
    kv_sum=b * k * (H + V) * word,
  )


def _ring_bytes(
  schedule: Schedule, ring: Ring, sizes: _Sizes, backward: bool
) -> Counter:
  """What one ring sends; see `longctx.parallel.ring`."""
  R, passes = ring.size, 1 + backward
  sent = Counter()
  for ring_pass in schedule.passes:
    arriving = (
      ring_pass.hops * len(ring_pass.pairs) * (sizes.kv + sizes.indices)
    )
    # Gradients leave with the first keys, and go home from the last hop.
    home = R * (1 if ring_pass.hops == 1 else ring_pass.hops + 1) * sizes.kv_sum
    sent['collective-permute'] += ring_pass.length * (
      passes * arriving + backward * home
    )
  columns = passes * (sizes.kv + sizes.segments) + backward * sizes.kv_sum
  rows = passes * (sizes.q + sizes.segments)
  # The largest lse, the weights and the weighted outputs.
  rows += 2 * sizes.heads + sizes.out_sum
  if backward:
    # With lse, dout and delta; dq comes back.
    rows += 2 * sizes.heads + sizes.out + sizes.q_sum
  summed = schedule.prefix_keys * columns + schedule.prefix_queries * rows
  sent['all-reduce'] = 2 * (R - 1) * summed
  return sent
