"""Gated DeltaNet: the delta rule under a decay per head."""

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


class GatedDeltaNetAttention(Attention):
  """Gated DeltaNet: the delta rule under a decay per head.

      S_t = α_t (I - β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ
      out_t = norm(q_t S_t / √H) ⊙ silu(W_g x_t)
      α_t = exp(-A softplus(W_α x_t + b_α))        β_t = σ(W_β x_t)

  'Gated Delta Networks' (arXiv:2412.06464): α is Mamba-2's decay, one per head;
  all else, time and state as in `deltanet`.
  """

  unsupported = OF_RECURRENCES
  qkv_activation = staticmethod(jax.nn.silu)
  small: ClassVar = {'chunk_size': 8}

  def __init__(self, config: AttentionConfig, *, rngs: nnx.Rngs):
    super().__init__(config, rngs=rngs)
    N, V, dtype = config.num_heads, config.value_dim, config.param_dtype
    self.beta = make_linear(config, config.d_model, N, rngs=rngs)
    self.dt = make_linear(config, config.d_model, N, rngs=rngs)
    self.dt_bias, self.log_rate = norms.decay_parameters(
      config, N, low=0.0, rngs=rngs
    )
    self.gate = make_linear(config, config.d_model, N * V, rngs=rngs)
    self.norm_scale = nnx.Param(jnp.ones(V, dtype))
    self.recurrence = Recurrence.of(
      config, delta=True, scale=config.head_dim**-0.5
    )

  def attend(self, qkv: QKV, context: Context) -> Float[Array, 'B Q N V']:
    """The delta rule under α."""
    _, log_decay = norms.softplus_decay(
      self.dt(qkv.x), self.dt_bias[...], self.log_rate[...]
    )
    return norms.delta_rule(self, qkv, context, log_decay=log_decay)

  def output_transform(
    self, out: Float[Array, 'B Q N V'], x: Float[Array, 'B Q D']
  ) -> Float[Array, 'B Q N V']:
    """Norm of each head, and the gate."""
    gate = jax.nn.silu(self.gate(x)).reshape(out.shape)
    return (norms.rms_norm(out) * self.norm_scale[...] * gate).astype(out.dtype)
