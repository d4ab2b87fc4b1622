"""Softpick attention: exact zeros, and weights that need not sum to one."""

from typing import Any

from longctx import masks
from longctx.attention.base import Attention


class SoftpickAttention(Attention):
  """Softpick attention: rectified softmax, with exact zeros.

      out_t = Σ_{s ≤ t} relu(exp(z_ts) - 1) v_s / Σ_{s ≤ t} |exp(z_ts) - 1|

  z_ts = q_t k_s / √H. Softpick (arXiv:2504.20966): keys with a negative logit
  get weight 0 and still count in the sum, through which they have a gradient.
  No sink is needed to attend to nothing. Cost and state are those of full
  attention.
  """

  mask = masks.Causal()

  def logit_options(self) -> dict[str, Any]:
    return {**super().logit_options(), 'normalizer': 'softpick'}
