"""Attention sinks as a learned logit per head."""

from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx

from longctx.attention.base import Attention, AttentionConfig
from longctx.attention.variants.sliding_window import causal_mask
from longctx.typing import Positive


class SinkLogitsAttention(Attention):
  """Softmax attention with an attention sink, a learned logit per head.

      out_t = Σ_{s ≤ t} exp(z_ts) v_s / (exp(b_n) + Σ_{s ≤ t} exp(z_ts))

  z_ts = q_t k_s / √H and b_n a learned number per head: the sinks of gpt-oss
  (arXiv:2508.10925). At b = 0, where it starts, this is `softmax1`; at -∞ it is
  softmax. Cost and state are those of full attention, or of a window.

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
    self.sink_logits = nnx.Param(
      jnp.zeros(config.num_heads, config.param_dtype)
    )

  def logit_options(self) -> dict[str, Any]:
    return {**super().logit_options(), 'sink_logits': self.sink_logits[...]}
