"""Tiling of attention: block sizes, and arrays cut into blocks and joined."""

import dataclasses
import functools
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from longctx.masks import Mask
from longctx.typing import Array, Checked, Num, Positive

BLOCKS = (128, 256, 512, 1024)

# Scores held at once: 4 MB in float32, about what the caches of two cores hold.
SCORES_TOGETHER = 2**20

# The cost of a row or column of a block, and of a step, in scores.
EDGE, STEP = 64, 2**17

# Scores of a head below which XLA's products keep to one core (jaxlib 0.10,
# head dimension 64). It costs so much more where a device has several cores;
# where devices share them, it is what is not kept to one that does.
ON_ONE_CORE, SLOWER = 2**17, 1.8

# Positions on which a mask is sampled to choose block sizes.
COUNTED = 16384


@dataclasses.dataclass(frozen=True)
class BlockSizes(Checked):
  """Block sizes of attention; None leaves a size to a heuristic.

  Any size works for any length: what is missing is padded. A size beyond the
  length is cut to it.

  Attributes:
    block_q: queries per block, forward.
    block_k: keys per block, forward.
    block_q_backward: queries per block, backward.
    block_k_backward: keys per block, backward.
    heads: (batch row, key head) pairs computed together.
    contiguous_len: sizes left to the heuristic divide it: positions jump at
      multiples of this many tokens, and a block across a jump could not be left
      out.
    sharing: devices that share the caches of one machine, as virtual ones do;
      the heuristic then takes fewer heads together.
  """

  prefix: ClassVar[str] = 'BlockSizes: '

  block_q: Positive | None = None
  block_k: Positive | None = None
  block_q_backward: Positive | None = None
  block_k_backward: Positive | None = None
  heads: Positive | None = None
  contiguous_len: Positive | None = None
  sharing: Positive = 1

  def fixed(self, *, backward: bool) -> tuple[int | None, int | None]:
    """(block_q, block_k) of a pass."""
    if backward:
      return self.block_q_backward, self.block_k_backward
    return self.block_q, self.block_k


@dataclasses.dataclass(frozen=True)
class Tiling:
  """Tiling of [B, T, N] x [B, S, K]: shapes of blocks and their counts.

  Queries come in blocks [X, G block_q, H] and keys in blocks [X, block_k, H],
  X = rows * heads: the G query heads of a key head are G times as many query
  rows, so keys and values are never repeated.

  Attributes:
    rows: batch rows computed together; divides B.
    heads: key heads computed together; divides K.
  """

  B: int
  T: int
  S: int
  K: int
  G: int
  block_q: int
  block_k: int
  rows: int
  heads: int

  @property
  def X(self) -> int:
    return self.rows * self.heads

  @property
  def row_groups(self) -> int:
    return self.B // self.rows

  @property
  def head_groups(self) -> int:
    return self.K // self.heads

  @property
  def groups(self) -> int:
    return self.row_groups * self.head_groups

  @property
  def nq(self) -> int:
    return -(-self.T // self.block_q)

  @property
  def nk(self) -> int:
    return -(-self.S // self.block_k)

  def split_q(
    self, x: Num[Array, 'B T N D'], fill: float | int = 0
  ) -> Num[Array, 'g nq X R D']:
    """Blocks of a query-side array, R = G block_q rows each."""
    return self._split(x, self.nq, self.block_q, self.G, fill)

  def join_q(self, x: Num[Array, 'blocks X R D']) -> Num[Array, 'B T N D']:
    """The inverse of `split_q`."""
    return self._join(x, self.nq, self.block_q, self.G)[:, : self.T]

  def split_k(self, x: Num[Array, 'B S K D']) -> Num[Array, 'g nk X C D']:
    """Blocks of a key-side array."""
    return self._split(x, self.nk, self.block_k, 1, 0)

  def join_k(self, x: Num[Array, 'blocks X C D']) -> Num[Array, 'B S K D']:
    """The inverse of `split_k`."""
    return self._join(x, self.nk, self.block_k, 1)[:, : self.S]

  def _split(
    self, x: Array, n: int, block: int, G: int, fill: float | int
  ) -> Array:
    x, D = _pad(x, n * block, fill), x.shape[-1]
    rows, heads = (self.row_groups, self.rows), (self.head_groups, self.heads)
    x = x.reshape(*rows, n, block, *heads, G, D)
    x = x.transpose(0, 4, 2, 1, 5, 6, 3, 7)
    return x.reshape(self.groups, n, self.X, G * block, D)

  def _join(self, x: Array, n: int, block: int, G: int) -> Array:
    groups, D = (self.row_groups, self.head_groups), x.shape[-1]
    x = x.reshape(*groups, n, self.rows, self.heads, G, block, D)
    x = x.transpose(0, 3, 2, 6, 1, 4, 5, 7)
    return x.reshape(self.B, n * block, self.K * G, D)

  def split_positions(
    self, x: Num[Array, 'b length'], block: int
  ) -> Num[Array, 'g n rows block']:
    """Blocks of an index array with a batch axis of B or 1."""
    b, length = x.shape
    n = -(-length // block)
    rows = 1 if b == 1 else self.rows
    x = _pad(x, n * block, 0).reshape(b // rows, rows, n, block)
    return x.transpose(0, 2, 1, 3)


def _pad(
  x: Num[Array, 'b length ...'], length: int, fill: float | int
) -> Num[Array, '...']:
  """Lengthens axis 1."""
  missing = length - x.shape[1]
  if missing == 0:
    return x
  widths = [(0, 0)] * x.ndim
  widths[1] = (0, missing)
  return jnp.pad(x, widths, constant_values=fill)


@functools.lru_cache(maxsize=256)
def make_tiling(
  mask: Mask,
  shape: tuple[int, int, int, int, int],
  sizes: BlockSizes,
  *,
  backward: bool,
) -> Tiling:
  """The cheapest tiling by a model of a CPU, among those that `sizes` allows.

  A block of scores costs its area, a little more for every row and column (the
  products fill their registers less well) and a constant for handing some ten
  operations to the threads. Blocks that the mask leaves empty cost nothing, so
  that narrow windows get small blocks.

  Args:
    mask: counted at the first few thousand positions.
    shape: B, T, S, K, G.
    sizes: where a size is given, it is taken.
    backward: which of the sizes to read.
  """
  B, T, S, K, G = shape
  fixed_q, fixed_k = sizes.fixed(backward=backward)
  best, least = None, None
  for block_q in _candidates(fixed_q, T, sizes.contiguous_len):
    for block_k in _candidates(fixed_k, S, sizes.contiguous_len):
      together = SCORES_TOGETHER // (sizes.sharing * G * block_q * block_k)
      together = sizes.heads or max(1, min(together, 64))
      heads = _divisor(K, together)
      rows = _divisor(B, together // K) if heads == K else 1
      tiling = Tiling(*shape, block_q, block_k, rows, heads)
      cost = _cost(mask, tiling, sizes.sharing)
      if least is None or (cost, -block_q, -block_k) < least:
        best, least = tiling, (cost, -block_q, -block_k)
  return best


def _candidates(
  fixed: int | None, length: int, contiguous: int | None
) -> set[int]:
  """The block sizes to choose from, the fixed one alone if there is one."""
  if fixed:
    return {min(fixed, length)}
  contiguous = min(contiguous or length, length)
  sizes = {min(size, contiguous) for size in BLOCKS}
  return (
    {b for b in sizes if contiguous % b == 0} if contiguous < length else sizes
  )


def _cost(mask: Mask, tiling: Tiling, sharing: int) -> float:
  t = tiling
  block_q, block_k = min(t.block_q, COUNTED), min(t.block_k, COUNTED)
  area = (t.G * block_q + EDGE) * (block_k + EDGE)
  # Scores beyond the cache cost about twice as much.
  held = t.X * t.G * t.block_q * t.block_k
  area *= 2 if held > SCORES_TOGETHER else 1
  on_one_core = t.G * t.block_q * t.block_k < ON_ONE_CORE
  area *= SLOWER if on_one_core == (sharing == 1) else 1
  return float(count_blocks(mask, t) * t.groups * (t.X * area + STEP))


def count_blocks(mask: Mask, tiling: Tiling) -> int:
  """Blocks with an allowed pair, at the first positions."""
  T, S = min(tiling.T, COUNTED), min(tiling.S, COUNTED)
  block_q, block_k = min(tiling.block_q, T), min(tiling.block_k, S)
  return int(np.count_nonzero(mask.block_map(T, S, block_q, block_k)))


def _divisor(n: int, most: int) -> int:
  """The largest divisor of n that is at most `most`."""
  return next(d for d in range(min(n, most), 0, -1) if n % d == 0)
