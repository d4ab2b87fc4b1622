"""Forgetting attention: softmax with data-dependent forget gates."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from longctx import masks
from longctx.attention.base import QKV, Attention, AttentionConfig, make_linear
from longctx.attention.capabilities import OF_BIASES
from longctx.attention.context import Context
from longctx.typing import Array, Float


class ForgettingAttention(Attention):
  """Forgetting attention: softmax with forget gates.

      out_t = Σ_{s ≤ t} softmax_s(q_t k_s / √H + c_t - c_s) v_s
      c_t = Σ_{s ≤ t} log f_s        f_s = σ(w_n x_s + b_n), per head

  Forgetting Transformer (arXiv:2503.02130): a key's logit falls by the gates
  since, ALiBi with slopes that the inputs set. The sum begins anew in each
  document. Time and memory are those of full attention with 3 + 3 G more
  channels of queries and keys, G query heads per key head; decoding keeps
  c_t, and c_s beside each key, one float32 per query head.

  c in float32 is exact to 6e-8 of the sum since the document's beginning, and
  so is a logit: 0.003 nats at a million tokens with f = 0.95.
  """

  mask = masks.Causal()
  unsupported: ClassVar = OF_BIASES

  def __init__(self, config: AttentionConfig, *, rngs: nnx.Rngs):
    super().__init__(config, rngs=rngs)
    self.forget = make_linear(
      config, config.d_model, config.num_heads, use_bias=True, rngs=rngs
    )

  def attend(self, qkv: QKV, context: Context) -> Float[Array, 'B Q N V']:
    """Softmax attention; the decays are channels of queries and keys."""
    q, k, v, x = qkv
    wide = jnp.promote_types(q.dtype, jnp.float32)
    log_forget = jax.nn.log_sigmoid(self.forget(x).astype(wide))
    c = context.cumulative_sum(log_forget)
    return context.dot_product_attention(
      q, k, v, mask=self.mask, q_bias=c, k_bias=-c, **self.logit_options()
    )
