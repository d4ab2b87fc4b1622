"""Mixture of block attention (MoBA): top-k blocks by their mean keys."""

from typing import ClassVar

import numpy as np
from flax import nnx

from longctx import masks
from longctx.attention.base import QKV, Attention, AttentionConfig
from longctx.attention.capabilities import OF_SELECTIONS
from longctx.attention.context import Context
from longctx.ops import block_selection
from longctx.typing import Array, Float, Positive


class MixtureOfBlockAttention(Attention):
  """Mixture of block attention: softmax over the top-k blocks of a query.

      out_t = Σ_{s ≤ t, s in chosen blocks} softmax_s(q_t k_s / √H) v_s

  MoBA (arXiv:2502.13189): chosen are the query's own block and, of the blocks
  before it, the top_k - 1 with the largest gates q_t · mean(keys of the block),
  by each query head for itself. There are no parameters but those of full
  attention, which it equals where top_k blocks are all there are.

  Time O(T top_k block_size) and O(T² / block_size) for the gates, memory O(T).
  Decoding keeps every key and value, and the mean of each complete block: a
  token reads those, and the keys of the blocks that it chooses.

  Attributes:
    block_size: tokens of a block.
    top_k: blocks that a query reads, its own included.
  """

  mask = masks.Causal()
  mask_is_bound = True
  unsupported: ClassVar = OF_SELECTIONS
  small: ClassVar = {'block_size': 4, 'top_k': 2}

  def __init__(
    self,
    config: AttentionConfig,
    *,
    block_size: Positive = 512,
    top_k: Positive = 3,
    rngs: nnx.Rngs,
  ):
    super().__init__(config, rngs=rngs)
    self.block_size, self.top_k = block_size, top_k

  def attend(self, qkv: QKV, context: Context) -> Float[Array, 'B Q N V']:
    """Chooses blocks and attends to them."""
    q, k, v, _ = qkv
    options = self.logit_options()
    scale = options.pop('scale', None)
    return context.with_gathered_kv(
      block_selection.moba,
      q,
      k,
      v,
      per_head=options,
      scale=scale,
      summarize=block_selection.moba_summaries,
      block_size=self.block_size,
      top_k=self.top_k,
    )

  def mixing_flops(self, seq_len: int) -> int:
    """Of means, gates and the pairs that are read."""
    config = self.config
    before, within = np.divmod(np.arange(seq_len), self.block_size)
    chosen = np.minimum(before, self.top_k - 1) * self.block_size
    pairs = int((chosen + within + 1).sum())
    gates = int(before.sum())
    width = config.head_dim + config.value_dim
    means = seq_len * config.num_kv_heads * config.head_dim
    mixing = width * pairs + config.head_dim * gates
    return 2 * config.num_heads * mixing + means
