"""Ring attention's arithmetic against its traffic, layer by layer.

What a hop brings is computed while the next one is under way. Forward a block
of scores takes two products, q kᵀ and p v; backward five: q kᵀ, dout vᵀ, and
those that give dv, dk and dq. The TPU kernels compute the first two of them
twice, once for dq and once for dk and dv. Forward keys and values travel,
backward their gradients beside them, in float32.
"""

import dataclasses
import math
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from longctx.attention import Attention
from longctx.costs.attention import HopBlocks, hop_blocks
from longctx.costs.chips import Chip
from longctx.masks import Mask
from longctx.ops.dot_product_attention import BlockSizes
from longctx.parallel.schedule import Ring, without_padding
from longctx.plan.program import Step

# Of the peak, by a kernel. The static schedules of a blockwise kernel reach
# 0.5 to 0.8 on these chips; nothing here was timed.
UTILIZATION = 0.5

# Where a layer leaves them open.
BLOCK_Q, BLOCK_K = 512, 512

# Bytes of a gradient that is not summed up yet.
SUM = 4


@dataclasses.dataclass(frozen=True)
class Pass:
  """One pass of a ring through a layer, on the busiest device.

  Attributes:
    hops: that keys make.
    hop_bytes: that a device sends per hop, in one direction.
    transfer_seconds: of a hop, over one link.
    compute_seconds: of the blocks whose keys a hop brings: the shortest of all
      hops, so that the worst is told.
    own_seconds: of the blocks of a device's own keys, before the first hop.
  """

  hops: int
  hop_bytes: int
  transfer_seconds: float
  compute_seconds: float
  own_seconds: float

  @property
  def ratio(self) -> float:
    """Computing over sending, of a hop."""
    return self.compute_seconds / self.transfer_seconds

  @property
  def hidden(self) -> bool:
    return self.ratio >= 1


@dataclasses.dataclass(frozen=True)
class LayerRing:
  """Ring attention of a layer; keys travel in direction +1 or -1."""

  direction: int
  forward: Pass
  backward: Pass


@dataclasses.dataclass(frozen=True)
class Attended:
  """Attention of one kind of layer: its blocks, and its ring if it has one.

  Attributes:
    layer: as the config writes it.
    count: layers that are alike.
    forward_flops: of the blocks on the busiest device, of one layer.
    backward_flops: likewise.
    rings: one per direction.
    reason: why nothing is known; '' where it is.
  """

  layer: str
  count: int
  forward_flops: float
  backward_flops: float
  rings: tuple[LayerRing, ...] = ()
  reason: str = ''


def attended(step: Step, chip: Chip, utilization: float) -> list[Attended]:
  """The attention of every kind of layer, in the order of the model."""
  found = []
  for layer in dict.fromkeys(step.model.layers):
    index = step.model.layers.index(layer)
    count = step.model.layers.count(layer)
    attention = step.module.blocks[index].attention
    reason = _unknown(attention)
    if reason:
      found.append(Attended(layer, count, 0.0, 0.0, reason=reason))
    else:
      found.append(_attended(layer, count, attention, step, chip, utilization))
  return found


def _unknown(attention: Attention) -> str:
  """Why the blocks of a layer are not known beforehand."""
  if attention.mask is None:
    return 'a recurrence: states travel, whatever the length'
  if attention.mask_is_bound:
    return 'queries choose their keys, which are gathered'
  if attention.recurrence or type(attention).attend is not Attention.attend:
    return 'several branches, of which the formula knows none'
  return ''


def _attended(
  layer: str,
  count: int,
  attention: Attention,
  step: Step,
  chip: Chip,
  utilization: float,
) -> Attended:
  placement, config = step.placement, attention.config
  axes, scheme = placement.axes, placement.scheme
  kernels = chip.platform == 'tpu' and config.implementation in (None, 'pallas')
  blocks = _blocks(scheme, attention.mask, step, config.block_sizes)
  data, model = axes.size(axes.data), axes.size(axes.heads)
  parts = step.config.optimizer.accumulation
  rows = step.config.batch_size // parts // data
  heads = config.num_heads // model
  H, V = config.head_dim, config.value_dim
  rings = ()
  if 'ring' in scheme:
    fold = axes.size(axes.seq[-1]) if scheme == 'ring+ulysses' else 1
    heads //= fold
  elif scheme == 'ulysses':
    # A device has all tokens, for its share of the heads.
    heads //= axes.size(axes.seq)
  area = parts * rows * heads * blocks.area
  products = (H + V, 4 * H + 3 * V if kernels else 3 * H + 2 * V)
  forward, backward = (2 * n * area for n in products)
  if 'ring' in scheme:
    keys = math.lcm(config.num_kv_heads // model, fold) // fold
    itemsize = jnp.dtype(config.dtype).itemsize
    token = rows * keys * (H + V)
    rate = chip.flops * utilization
    seconds = tuple(
      rows * heads * blocks.block_area * 2 * n / rate for n in products
    )
    rings = tuple(_rings(blocks.hops, token, itemsize, seconds, chip))
  return Attended(layer, count, forward, backward, rings)


@dataclasses.dataclass(frozen=True)
class _Blocks:
  """Attention scores computed on the busiest device, and per block."""

  area: float
  block_area: int = 0
  hops: HopBlocks | None = None


def _blocks(scheme: str, mask: Mask, step: Step, sizes: BlockSizes) -> _Blocks:
  layout, axes = step.placement.layout, step.placement.axes
  block_q, block_k = sizes.block_q or BLOCK_Q, sizes.block_k or BLOCK_K
  if 'ring' in scheme:
    fold = axes.size(axes.seq[-1]) if scheme == 'ring+ulysses' else 1
    piece = Ring(layout, fold).contiguous_len or layout.shard_len * fold
    block_q, block_k = min(block_q, piece), min(block_k, piece)
    hops = hop_blocks(mask, layout, block_q, block_k, fold=fold)
    area = block_q * block_k
    return _Blocks(float(hops.total.max()) * area, area, hops)
  # Of allowed pairs: nearly those of the blocks, as positions are in order.
  T = layout.seq_len
  mask = without_padding(mask, layout)
  if scheme == 'ulysses':
    return _Blocks(float(mask.num_allowed(T, T)))
  edges = np.arange(0, T + 1, max(1, T // (2 * layout.num_shards)))
  pairs = mask.count(np.append(edges[:-1], T), np.array([0, T])).sum(1)
  shards = layout.places[edges[:-1]] // layout.shard_len
  if layout.name == 'striped':
    return _Blocks(pairs.sum() / layout.num_shards)
  return _Blocks(float(np.bincount(shards, pairs).max()))


def _rings(
  blocks: HopBlocks,
  token: int,
  itemsize: int,
  seconds: tuple[float, float],
  chip: Chip,
) -> Iterator[LayerRing]:
  """A ring for each direction in which keys travel.

  Args:
    blocks: of the layer.
    token: numbers of a key and a value, of all heads and rows of a device.
    itemsize: bytes of one of them.
    seconds: of a block of all heads and rows, forward and backward.
    chip: whose link it is.
  """
  own = int(blocks.own.max())
  for ring_pass, counts in zip(
    blocks.schedule.passes, blocks.hops, strict=True
  ):
    # The last hop sends nothing meanwhile. The first one of every pass leaves
    # before a device turns to its own keys.
    several = ring_pass.hops > 1
    least = int(counts.max(1)[:-1].min()) if several else own
    keys = ring_pass.length * token * itemsize
    gradients = ring_pass.length * token * SUM if several else 0
    passes = (
      Pass(
        ring_pass.hops,
        sent,
        sent / chip.link_bandwidth,
        least * each,
        own * each,
      )
      for sent, each in zip((keys, keys + gradients), seconds, strict=True)
    )
    yield LayerRing(ring_pass.direction, *passes)
