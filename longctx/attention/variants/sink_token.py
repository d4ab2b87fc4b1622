"""Learned attention sinks: keys and values that all queries read."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from longctx.attention.base import QKV, Attention, AttentionConfig
from longctx.attention.context import Context
from longctx.attention.variants.sliding_window import causal_mask
from longctx.ops.merge import merge
from longctx.typing import Array, Float, Positive


class SinkTokenAttention(Attention):
  """Softmax attention to earlier tokens and to learned attention sinks.

      z_ts = q_t k_s / √H        z_tm = q_t κ_m / √H
      out_t ∝ Σ_{s ≤ t} exp(z_ts) v_s + Σ_m exp(z_tm) υ_m

  κ and υ are learned per key head and layer. The learnable sink token of
  StreamingLLM (arXiv:2309.17453), section 3.3, at the level of a layer; with
  υ = 0 and one κ, a sink logit that depends on the query. The sinks are nowhere
  in the sequence: queries read them unrotated, ALiBi lowers nothing, every
  document has them, and dropout leaves them.

  Time is that of full attention, or of a window, and num_sinks products per
  query; decoding keeps nothing more, as the sinks are parameters.

  Attributes:
    num_sinks: learned keys and values per key head.
    window: keys that a query reads beside them; None for all earlier ones.
  """

  undecayed: ClassVar = ('sink_key', 'sink_value')
  small: ClassVar = {'num_sinks': 2, 'window': 5}

  def __init__(
    self,
    config: AttentionConfig,
    *,
    num_sinks: Positive = 1,
    window: Positive | None = None,
    rngs: nnx.Rngs,
  ):
    super().__init__(config, rngs=rngs)
    self.mask = causal_mask(window)
    self.num_sinks = num_sinks
    # Of the size of keys and values that come from inputs of variance one.
    normal = nnx.initializers.normal(1.0)
    shape = (num_sinks, config.num_kv_heads)
    self.sink_key, self.sink_value = (
      nnx.Param(normal(rngs.params(), (*shape, width), config.param_dtype))
      for width in (config.head_dim, config.value_dim)
    )

  def attend(self, qkv: QKV, context: Context) -> Float[Array, 'B Q N V']:
    """The tokens' attention and the sinks', merged."""
    q, k, v, _ = qkv
    config = self.config
    tokens = context.dot_product_attention(
      q, k, v, mask=self.mask, return_lse=True, **self.logit_options()
    )
    if config.rope is not None:
      back = -context.true_positions(q.shape[1])
      q = config.rope.rotate(q, back, again=True)
    q = context.at_queries(q)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    sink_key, sink_value = (
      y[...].astype(wide) for y in (self.sink_key, self.sink_value)
    )
    B, Q, N, H = q.shape
    by_key_head = q.astype(wide).reshape(B, Q, config.num_kv_heads, -1, H)
    z = jnp.einsum('BQKGH,MKH->BQKGM', by_key_head, sink_key)
    z *= config.attention_scale or H**-0.5
    # Of no token.
    sink_value = context.values(
      sink_value, jnp.zeros((*sink_value.shape[:2], v.shape[-1]), wide)
    )
    out = jnp.einsum('BQKGM,MKV->BQKGV', jax.nn.softmax(z), sink_value)
    lse = jax.nn.logsumexp(z, axis=-1)
    out, _ = merge(*tokens, out.reshape(B, Q, N, -1), lse.reshape(B, Q, N))
    return out.astype(q.dtype)

  def mixing_flops(self, seq_len: int) -> int:
    config = self.config
    width = config.head_dim + config.value_dim
    sinks = 2 * config.num_heads * width * self.num_sinks * seq_len
    return super().mixing_flops(seq_len) + sinks
