"""Full causal softmax attention."""

from longctx import masks
from longctx.attention.base import Attention


class FullAttention(Attention):
  """Full causal softmax attention.

      out_t = Σ_{s ≤ t} softmax_s(q_t k_s / √H) v_s

  'Attention Is All You Need' (arXiv:1706.03762). Time O(T²), memory O(T);
  decoding keeps every key and value, so that any of them can be recalled.
  """

  mask = masks.Causal()
