"""Tiling for TPU kernels: block sizes that fit each generation of chips."""

import functools

from longctx.masks import Mask
from longctx.ops.dot_product_attention.tiling import (
  BLOCKS,
  BlockSizes,
  Tiling,
  count_blocks,
)
from longctx.ops.tpu import LANES

# The cost of a grid step and of a block's row or column of vectors, in scores:
# from the compiler's instructions for blocks of several sizes.
STEP, EDGE = 2**16, 32

# Scores of a block that fit into VMEM beside queries, keys and sums, forward
# and backward, by device kind: a chip that is missing has the least.
SCORES = {
  'TPU v5 lite': (512 * 1024, 512 * 512),
  'TPU v5': (512 * 1024, 512 * 1024),
  'TPU v6 lite': (1024 * 1024, 512 * 1024),
  'TPU7x': (512 * 1024, 512 * 1024),
}


@functools.lru_cache(maxsize=256)
def make_tiling(
  mask: Mask,
  shape: tuple[int, int, int, int, int],
  sizes: BlockSizes,
  *,
  kind: str,
  wide: bool,
  backward: bool,
) -> Tiling:
  """The cheapest blocks for a mask, among those that `sizes` allows.

  Args:
    mask: counted at the first few thousand positions.
    shape: B, T, S, K, G.
    sizes: where a size is given, it is taken; it is a multiple of 128.
    kind: of device.
    wide: whether a head takes more than 256 bytes per token, so that fewer
      scores fit.
    backward: which of the sizes to read.
  """
  B, T, S, K, G = shape
  fixed_q, fixed_k = sizes.fixed(backward=backward)
  most = SCORES.get(kind, min(SCORES.values()))[backward]
  most = most // 2 if wide else most
  best, least = None, None
  for block_q in _candidates(fixed_q, T, sizes.contiguous_len):
    for block_k in _candidates(fixed_k, S, sizes.contiguous_len):
      fits = block_q * block_k <= most
      if not fits and not (fixed_q and fixed_k):
        continue
      tiling = Tiling(B, T, S, K, G, block_q, block_k, 1, 1)
      cost = (_cost(mask, tiling), -block_k, -block_q)
      if least is None or cost < least:
        best, least = tiling, cost
  if best is None:
    raise ValueError(
      f'block sizes {fixed_q=}, {fixed_k=} leave no room for the other: at '
      f'most {most} scores fit a block here'
    )
  return best


def _candidates(
  fixed: int | None, length: int, contiguous: int | None
) -> list[int]:
  """Multiples of 128 that are no longer than the array, rounded up."""
  if fixed:
    return [fixed]
  rounded = -(-length // LANES) * LANES
  sizes = [b for b in BLOCKS if b <= rounded]
  within = [b for b in sizes if contiguous and contiguous % b == 0]
  # Where no block divides the pieces, some blocks reach across a jump.
  return within or sizes


def _cost(mask: Mask, tiling: Tiling) -> float:
  area = (tiling.block_q + EDGE) * (tiling.block_k + EDGE) + STEP
  return float(count_blocks(mask, tiling) * area)
