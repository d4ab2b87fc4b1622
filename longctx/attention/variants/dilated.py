"""Dilated sliding window attention."""

from typing import ClassVar

from flax import nnx

from longctx import masks
from longctx.attention.base import Attention, AttentionConfig
from longctx.typing import Positive


class DilatedAttention(Attention):
  """Dilated sliding window attention, causal.

      out_t = Σ_{0 ≤ i < window} softmax_i(q_t k_{t - i d} / √H) v_{t - i d}

  d is the dilation. Longformer (arXiv:2004.05150), section 3.1, and Sparse
  Transformers (arXiv:1904.10509), in its causal form. A window reaches d times
  as far at the same cost: time O(T window) in pairs, memory O(T). Decoding
  keeps (window - 1) d + 1 keys and values, as the next tokens read those
  between.

  Tokens whose distance is no multiple of d never meet in such a layer: mix
  dilations over layers, or over heads by `longformer`.

  Attributes:
    window: keys that a query reads, its own position's included.
    dilation: distance d from one to the next.
  """

  small: ClassVar = {'window': 3, 'dilation': 3}

  def __init__(
    self,
    config: AttentionConfig,
    *,
    window: Positive = 128,
    dilation: Positive = 2,
    rngs: nnx.Rngs,
  ):
    super().__init__(config, rngs=rngs)
    self.mask = masks.Causal() & masks.Dilated(window, dilation)
