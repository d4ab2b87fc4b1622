"""Mamba-2: a state space model as linear attention with a decay per head."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from longctx.attention import norms
from longctx.attention.base import QKV, Attention, AttentionConfig, make_linear
from longctx.attention.capabilities import OF_RECURRENCES
from longctx.attention.context import Context
from longctx.attention.recurrence import Recurrence
from longctx.typing import Array, Float


class Mamba2Attention(Attention):
  """Mamba-2: a selective state space model, as linear attention.

      S_t = exp(-A dt_t) S_{t-1} + k_t (dt_t v_t)ᵀ, y_t = q_t S_t + D v_t
      dt_t = softplus(W_dt x_t + b_dt)
      out_t = norm(y_t ⊙ silu(W_z x_t))

  'Transformers are SSMs' (arXiv:2405.21060): v is the paper's x, k its B and q
  its C, each through a silu, and behind a convolution with `short_conv`, 4 in
  the paper. A, D and b_dt are one number per head. The norm is of all heads
  that share a key head. The paper's heads share B and C, and each has its own
  x; here the key head goes with the value head, so that this is
  num_kv_heads = 1 with one x for all.

  Time O(T H V), memory O(T); decoding keeps S, H x V numbers per head.
  """

  unsupported = OF_RECURRENCES
  qkv_activation = staticmethod(jax.nn.silu)
  small: ClassVar = {'chunk_size': 8}

  def __init__(self, config: AttentionConfig, *, rngs: nnx.Rngs):
    super().__init__(config, rngs=rngs)
    N, V, dtype = config.num_heads, config.value_dim, config.param_dtype
    self.dt = make_linear(config, config.d_model, N, rngs=rngs)
    self.gate = make_linear(config, config.d_model, N * V, rngs=rngs)
    self.dt_bias, self.log_rate = norms.decay_parameters(
      config, N, low=1.0, rngs=rngs
    )
    self.skip = nnx.Param(jnp.ones(N, dtype))
    self.norm_scale = nnx.Param(jnp.ones(N * V, dtype))
    self.recurrence = Recurrence.of(config)

  def attend(self, qkv: QKV, context: Context) -> Float[Array, 'B Q N V']:
    """The recurrence, and D v beside it."""
    q, k, v, x = qkv
    dt, log_decay = norms.softplus_decay(
      self.dt(x), self.dt_bias[...], self.log_rate[...]
    )
    # A step is a query head's own, so from here on its keys and values are too.
    group = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
    out = context.recurrence(
      self.recurrence,
      q,
      k,
      (v * dt[..., None]).astype(v.dtype),
      log_decay=log_decay,
    )
    skip = self.skip[...][:, None] * context.at_queries(v)
    return (out + skip).astype(out.dtype)

  def output_transform(
    self, out: Float[Array, 'B Q N V'], x: Float[Array, 'B Q D']
  ) -> Float[Array, 'B Q N V']:
    """The gate, and a norm over the heads of each key head."""
    gate = jax.nn.silu(self.gate(x)).reshape(out.shape)
    gated = out.astype(norms.accum_dtype(out)) * gate
    K = self.config.num_kv_heads
    normed = norms.rms_norm(gated.reshape(*out.shape[:2], K, -1))
    scaled = normed.reshape(*out.shape[:2], -1) * self.norm_scale[...]
    return scaled.reshape(out.shape).astype(out.dtype)
