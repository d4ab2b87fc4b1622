"""Attention masks as specifications, exact per element and per block.

A mask is a frozen, hashable dataclass without arrays. It says one thing, in
`allowed(q_positions, k_positions)`: may this query read this key? All the rest
is derived from that: the dense oracle, the block map that drives kernels and
ring schedules, the number of pairs a computation is worth, the keys a decoder
must keep. Masks combine with `&` and `|`.
"""

from longctx.masks.algebra import (
  EMPTY,
  FULL,
  PARTIAL,
  And,
  KVRetention,
  Mask,
  Or,
  Positions,
  Primitive,
  Range,
  check_mask,
)
from longctx.masks.patterns import (
  Beyond,
  BlockSparse,
  Causal,
  Dilated,
  Full,
  GlobalTokens,
  PrefixColumns,
  PrefixRows,
  RandomBlocks,
  SlidingWindow,
)

__all__ = [
  'EMPTY',
  'FULL',
  'PARTIAL',
  'And',
  'Beyond',
  'BlockSparse',
  'Causal',
  'Dilated',
  'Full',
  'GlobalTokens',
  'KVRetention',
  'Mask',
  'Or',
  'Positions',
  'PrefixColumns',
  'PrefixRows',
  'Primitive',
  'RandomBlocks',
  'Range',
  'SlidingWindow',
  'check_mask',
]
