"""Block-sparse attention under any pattern."""

from typing import ClassVar

from flax import nnx

from longctx import masks
from longctx.attention.base import Attention, AttentionConfig
from longctx.typing import Positive


class BlockSparseAttention(Attention):
  """Block-sparse softmax attention.

      out_t = Σ_{s: pattern[t // block][s // block]} softmax_s(q_t k_s / √H) v_s

  Any pattern, as in Sparse Transformers (arXiv:1904.10509), written as a row of
  characters per block of queries:

      block_sparse(block=64, pattern=('1', '11', '101', '1011'))

  A short row ends in zeros. Positions count within a document. Those beyond
  the pattern neither read nor are read: out is 0 there. Time and memory are
  those of the blocks with a 1; decoding keeps the keys that a later row reads.

  Attributes:
    block: positions per block, of queries and of keys.
    pattern: per block of queries, '1' where it reads a block of keys.
    causal: whether a query reads no later key, whatever the pattern says.
  """

  small: ClassVar = {
    'block': 4,
    'pattern': ('1', '11', '011', '1001', '10011', '010101'),
  }

  def __init__(
    self,
    config: AttentionConfig,
    *,
    block: Positive = 64,
    pattern: tuple[str, ...],
    causal: bool = True,
    rngs: nnx.Rngs,
  ):
    if set(''.join(pattern)) not in ({'0'}, {'1'}, {'0', '1'}):
      raise ValueError(
        f"block_sparse: {pattern=} must be rows of '0' and '1', as in "
        "('1', '11', '101')"
      )
    super().__init__(config, rngs=rngs)
    width = max(map(len, pattern))
    rows = tuple(tuple(map(int, row.ljust(width, '0'))) for row in pattern)
    self.mask = masks.BlockSparse(block, rows)
    if causal:
      self.mask = masks.Causal() & self.mask
