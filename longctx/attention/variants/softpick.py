"""Softpick attention: exact zeros, and weights that need not sum to one."""

from typing import Any

from flax import nnx

from longctx import masks
from longctx.attention.base import Attention, AttentionConfig


class SoftpickAttention(Attention):
  """Softpick attention: rectified softmax, with exact zeros.

      out_t = Σ_{s ≤ t} relu(exp(z_ts) - 1) v_s / Σ_{s ≤ t} |exp(z_ts) - 1|

  z_ts = q_t k_s / √H. Softpick (arXiv:2504.20966): keys with a negative logit
  get weight 0 and still count in the sum, through which they have a gradient.
  No sink is needed to attend to nothing. Cost and state are those of full
  attention.
  """

  def __init__(self, config: AttentionConfig, *, rngs: nnx.Rngs):
    super().__init__(config, rngs=rngs)
    self.mask = masks.Causal()

  def logit_options(self) -> dict[str, Any]:
    return {**super().logit_options(), 'normalizer': 'softpick'}
