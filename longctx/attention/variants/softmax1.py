"""Softmax-off-by-one attention, which may attend to nothing."""

from typing import Any, ClassVar

from flax import nnx

from longctx.attention.base import Attention, AttentionConfig
from longctx.attention.variants.sliding_window import causal_mask
from longctx.typing import Positive


class Softmax1Attention(Attention):
  """Softmax-off-by-one attention: a zero sink in the denominator.

      out_t = Σ_{s ≤ t} exp(z_ts) v_s / (1 + Σ_{s ≤ t} exp(z_ts))

  z_ts = q_t k_s / √H. 'Attention Is Off By One' (Miller, 2023), the 'zero sink'
  of StreamingLLM (arXiv:2309.17453): as if one more key gave logit 0 and value
  0, where softmax has to put a weight of 1 on something. Cost and state are
  those of full attention, or of a window.

  Attributes:
    window: keys that a query reads; None for all earlier ones.
  """

  small: ClassVar = {'window': 5}

  def __init__(
    self,
    config: AttentionConfig,
    *,
    window: Positive | None = None,
    rngs: nnx.Rngs,
  ):
    super().__init__(config, rngs=rngs)
    self.mask = causal_mask(window)

  def logit_options(self) -> dict[str, Any]:
    return {**super().logit_options(), 'normalizer': 'softmax1'}
