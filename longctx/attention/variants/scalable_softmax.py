"""Scalable softmax (SSMax): logits that grow with the number of keys."""

import jax.numpy as jnp
from flax import nnx

from longctx import masks
from longctx.attention.base import QKV, Attention, AttentionConfig
from longctx.attention.context import Context
from longctx.typing import Array, Float, PositiveNumber


class ScalableSoftmaxAttention(Attention):
  """Scalable softmax attention: logits grow with log n of the keys.

      out_t = Σ_{s ≤ t} softmax_s(σ log(n_t) q_t k_s / √H) v_s

  'Scalable-Softmax Is Superior for Attention' (arXiv:2501.19399): n_t is the
  number of keys that t may read and σ a learned scalar per head. A gap of g
  between two products q k becomes one of σ g log(n) between their logits, so
  that a key that stands out by σ g > 1 keeps its weight among any number of
  others, where softmax loses it from e^g on. Cost and state are those of full
  attention.

  A document's tokens are counted alone where documents are packed. Without
  them n_t is the position plus one, whatever order the tokens stand in.

  Attributes:
    initial_scale: σ at first. 0.168 is one over the mean of log n at a length
      of 1,024, where logits then start at the size of softmax's.
  """

  mask = masks.Causal()

  def __init__(
    self,
    config: AttentionConfig,
    *,
    initial_scale: PositiveNumber = 0.168,
    rngs: nnx.Rngs,
  ):
    super().__init__(config, rngs=rngs)
    self.logit_scale = nnx.Param(
      jnp.full(config.num_heads, initial_scale, config.param_dtype)
    )

  def attend(self, qkv: QKV, context: Context) -> Float[Array, 'B Q N V']:
    """Softmax attention of queries that are scaled by σ log(n)."""
    q = qkv.q
    n = context.segment_positions(q.shape[1]) + 1
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    scale = jnp.log(n.astype(dtype))[..., None] * self.logit_scale[...]
    q = (q * scale[..., None]).astype(q.dtype)
    return super().attend(qkv._replace(q=q), context)
