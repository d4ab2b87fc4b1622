"""Kimi Delta Attention (KDA): the delta rule under a decay per channel."""

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


class KimiDeltaAttention(Attention):
  """Kimi Delta Attention: the delta rule under a decay per channel.

      S_t = (I - β_t k_t k_tᵀ) diag(α_t) S_{t-1} + β_t k_t v_tᵀ
      out_t = norm(q_t S_t / √H) ⊙ σ(W_4 W_3 x_t + b)
      α_t = exp(-A softplus(W_2 W_1 x_t + b_α))        β_t = σ(W_β x_t)

  'Kimi Linear' (arXiv:2510.26692): α is one number per head and channel of the
  key, A one per head; W_1 and W_3 have the rank V of a head; all else and the
  state as in `deltanet`. Memory O(T H). The paper has no positions.
  """

  unsupported = OF_RECURRENCES
  qkv_activation = staticmethod(jax.nn.silu)
  small: ClassVar = {'chunk_size': 8}

  def __init__(self, config: AttentionConfig, *, rngs: nnx.Rngs):
    super().__init__(config, rngs=rngs)
    N, H, V = config.num_heads, config.head_dim, config.value_dim
    dtype = config.param_dtype
    self.beta = make_linear(config, config.d_model, N, rngs=rngs)
    self.decay_down, self.decay_up = norms.low_rank(config, V, N * H, rngs=rngs)
    self.dt_bias, self.log_rate = norms.decay_parameters(
      config, N * H, low=1.0, rngs=rngs
    )
    self.gate_down, self.gate_up = norms.low_rank(
      config, V, N * V, use_bias=True, rngs=rngs
    )
    self.norm_scale = nnx.Param(jnp.ones(V, dtype))
    self.recurrence = Recurrence.of(config, delta=True, scale=H**-0.5)

  def attend(self, qkv: QKV, context: Context) -> Float[Array, 'B Q N V']:
    """The delta rule under α."""
    q, _, _, x = qkv
    _, log_decay = norms.softplus_decay(
      self.decay_up(self.decay_down(x)).reshape(q.shape),
      self.dt_bias[...].reshape(q.shape[2:]),
      self.log_rate[...][:, None],
    )
    return norms.delta_rule(self, qkv, context, log_decay=log_decay)

  def output_transform(
    self, out: Float[Array, 'B Q N V'], x: Float[Array, 'B Q D']
  ) -> Float[Array, 'B Q N V']:
    """Norm of each head, and the gate."""
    gate = jax.nn.sigmoid(self.gate_up(self.gate_down(x))).reshape(out.shape)
    return (norms.rms_norm(out) * self.norm_scale[...] * gate).astype(out.dtype)
