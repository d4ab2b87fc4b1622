"""Block summaries: vectors that stand for blocks when a query chooses.

They change only where a block becomes complete, so that a decoder keeps them
and makes one every `stride` tokens.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from longctx.ops.block_selection.compression import Compression, compress
from longctx.ops.rope import Rope
from longctx.typing import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Summary:
  """Block summary: one vector for each complete block of keys or values.

  Block i is tokens i stride, …, i stride + length - 1.

  Attributes:
    length: tokens of a block.
    stride: tokens from one block to the next.
    make: of (blocks [B, C, L, K, D], the position of each one's first token
      [B, C]) the vectors [B, C, K, D].
    key: which of the op's keys and values it is of, counted from 0.
    replaces: whether the op has no other use for those.
  """

  length: int
  stride: int
  make: Callable[[Array, Array], Array]
  key: int
  replaces: bool


def moba_summaries(*, block_size: int, **_: Any) -> tuple[Summary, ...]:
  """The means of blocks of keys; arguments are those of `moba`."""
  return (Summary(block_size, block_size, _mean, key=0, replaces=False),)


def _mean(
  blocks: Float[Array, 'B C L K H'], _: Int[Array, 'B C']
) -> Float[Array, 'B C K H']:
  return blocks.mean(2)


def nsa_summaries(
  *,
  compress_k: Compression,
  compress_v: Compression,
  stride: int,
  rope: Rope | None,
  **_: Any,
) -> tuple[Summary, ...]:
  """Compressed keys, rotated, and values; arguments are those of `nsa`."""

  def make(blocks, first, *, weights, rope):
    x = compress(blocks, weights)
    return x if rope is None else rope.rotate(x, first)

  both = ((compress_k, rope), (compress_v, None))
  return tuple(
    Summary(
      weights.embedding.shape[0],
      stride,
      functools.partial(make, weights=weights, rope=rope),
      key=key,
      replaces=True,
    )
    for key, (weights, rope) in enumerate(both)
  )
