"""Sigmoid attention: weights that do not compete."""

from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx

from longctx import masks
from longctx.attention.base import QKV, Attention, AttentionConfig
from longctx.attention.capabilities import OF_BIASES
from longctx.attention.context import Context
from longctx.typing import Array, Float, Positive


class SigmoidAttention(Attention):
  """Sigmoid attention: each key is weighed alone.

      out_t = Σ_{s ≤ t} σ(q_t k_s / √H + b) v_s with b = β_n - log n

  'Theory, Analysis, and Best Practices for Sigmoid Self-Attention'
  (arXiv:2409.04431): each key is weighed alone. The bias keeps the sum of n
  weights near one at first; β is 0, or learned per head. Cost and state are
  those of full attention.

  Attributes:
    length: n for all queries, the published form, for training lengths that do
      not change. None counts the keys that each query may read: n_t = t + 1.
    learned_bias: whether β is learned.
  """

  mask = masks.Causal()
  unsupported: ClassVar = OF_BIASES

  def __init__(
    self,
    config: AttentionConfig,
    *,
    length: Positive | None = None,
    learned_bias: bool = False,
    rngs: nnx.Rngs,
  ):
    super().__init__(config, rngs=rngs)
    self.length = length
    self.learned_bias = learned_bias
    if learned_bias:
      self.logit_bias = nnx.Param(
        jnp.zeros(config.num_heads, config.param_dtype)
      )

  def attend(self, qkv: QKV, context: Context) -> Float[Array, 'B Q N V']:
    """The bias is a product of channels, which leaves the op its blocks."""
    q, k, v, _ = qkv
    wide = jnp.promote_types(q.dtype, jnp.float32)
    if self.length is None:
      n = jnp.atleast_2d(context.segment_positions(q.shape[1]) + 1)
    else:
      n = jnp.full((1, q.shape[1]), self.length)
    bias = jnp.zeros(self.config.num_heads, wide)
    if self.learned_bias:
      bias = self.logit_bias[...].astype(wide)
    bias = bias - jnp.log(n.astype(wide))[..., None]
    return context.dot_product_attention(
      q, k, v, mask=self.mask, q_bias=bias, **self.logit_options()
    )

  def logit_options(self) -> dict[str, Any]:
    return {**super().logit_options(), 'normalizer': 'sigmoid'}
