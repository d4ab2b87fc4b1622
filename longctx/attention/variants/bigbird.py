"""BigBird: sparse attention to a window, global tokens and random blocks."""

from typing import Annotated, ClassVar

from flax import nnx

from longctx import masks
from longctx.attention.base import Attention, AttentionConfig
from longctx.typing import Between, Natural, Positive, Seed


class BigBirdAttention(Attention):
  """BigBird: softmax attention to a window, global tokens and random blocks.

      t reads s   if |t - s| < window
                  or t < num_global or s < num_global
                  or block s // block is drawn for block t // block

  BigBird (arXiv:2007.14062), section 2, with global tokens among the sequence's
  own (ITC), and causally with s ≤ t besides. Random edges make any two tokens
  near each other in few layers. Time O(T (window + num_global + num_random
  block)), memory O(T).

  The draws are the same for all heads: give layers seeds of their own. A block
  that is drawn may lie in the window or among the global tokens, and then adds
  nothing. Causal rows draw among the blocks up to their own, and later rows
  still may, so that decoding keeps every key and reads few (`num_allowed`: by
  default 506 of 65,536 in the mean). Positions count within
  a document.

  Attributes:
    window: keys that a query reads on each side, its own position's included.
    num_global: first tokens that read all and are read by all.
    block: positions per random block.
    num_random: blocks drawn per block of queries.
    seed: of the draws.
    causal: whether a query reads no later key.
    num_blocks: of a bidirectional layer: its draws are among so many blocks,
      which is ⌈T / block⌉ for the longest sequence.
  """

  small: ClassVar = dict(window=2, num_global=2, block=2, num_random=2)

  def __init__(
    self,
    config: AttentionConfig,
    *,
    window: Positive = 192,
    num_global: Natural = 128,
    block: Positive = 64,
    num_random: Annotated[int, Between(1, 1024)] = 3,
    seed: Seed = 0,
    causal: bool = True,
    num_blocks: Positive | None = None,
    rngs: nnx.Rngs,
  ):
    if causal == (num_blocks is not None):
      raise ValueError(
        f'bigbird: {causal=} with {num_blocks=}: a bidirectional layer draws '
        'among ⌈T / block⌉ blocks and has to be told, a causal one among those '
        'before'
      )
    super().__init__(config, rngs=rngs)
    self.mask = (
      masks.SlidingWindow(window - 1, window - 1)
      | masks.GlobalTokens(num_global)
      | masks.RandomBlocks(block, num_random, seed, num_blocks)
    )
    if causal:
      self.mask = masks.Causal() & self.mask
