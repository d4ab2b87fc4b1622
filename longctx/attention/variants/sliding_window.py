"""Sliding window attention: the most recent tokens."""

from typing import ClassVar

from flax import nnx

from longctx import masks
from longctx.attention.base import Attention, AttentionConfig
from longctx.typing import Positive


class SlidingWindowAttention(Attention):
  """Sliding window attention, causal.

      out_t = Σ_{t - window < s ≤ t} softmax_s(q_t k_s / √H) v_s

  Longformer (arXiv:2004.05150), section 3.1, in its causal form. Time
  O(T window), memory O(T); decoding keeps `window` keys and values.

  Attributes:
    window: keys that a query reads, its own position's included.
  """

  small: ClassVar = {'window': 5}

  def __init__(
    self, config: AttentionConfig, *, window: Positive = 256, rngs: nnx.Rngs
  ):
    super().__init__(config, rngs=rngs)
    self.mask = causal_mask(window)


def causal_mask(window: int | None) -> masks.Mask:
  """All earlier tokens, or the last `window` of them, each with its own."""
  if window is None:
    return masks.Causal()
  return masks.SlidingWindow(window - 1)
