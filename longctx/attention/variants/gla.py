"""Gated linear attention (GLA): a learned decay per channel of the key."""

from typing import ClassVar

import jax
from flax import nnx

from longctx.attention.base import QKV, Attention, AttentionConfig, make_linear
from longctx.attention.capabilities import OF_RECURRENCES
from longctx.attention.context import Context
from longctx.attention.norms import accum_dtype, layer_norm, low_rank
from longctx.attention.recurrence import Recurrence
from longctx.typing import Array, Float, Positive, PositiveNumber


class GatedLinearAttention(Attention):
  """Gated linear attention: a learned decay per channel of the key.

      S_t = diag(α_t) S_{t-1} + k_t v_tᵀ
      out_t = swish(W_g x_t) ⊙ norm(q_t S_t / √H)
      α_t = σ(W_2 W_1 x_t + b)^(1/τ)

  'Gated Linear Attention Transformers with Hardware-Efficient Training'
  (arXiv:2312.06635), section 4.4: W_1 has rank 16 and τ = 16, so that α starts
  near 0.96; the norm is a layer norm of each head's outputs, whose scale is
  left to W_out. The paper has no positions, and keys of half the values' size.

  Time O(T H V), memory O(T H); decoding keeps S, H x V numbers per head.

  Attributes:
    gate_rank: rank of the projection that makes α.
    temperature: τ.
  """

  unsupported = OF_RECURRENCES
  small: ClassVar = {'chunk_size': 8}

  def __init__(
    self,
    config: AttentionConfig,
    *,
    gate_rank: Positive = 16,
    temperature: PositiveNumber = 16.0,
    rngs: nnx.Rngs,
  ):
    super().__init__(config, rngs=rngs)
    N, H, V = config.num_heads, config.head_dim, config.value_dim
    self.temperature = temperature
    self.decay_down, self.decay_up = low_rank(
      config, gate_rank, N * H, use_bias=True, rngs=rngs
    )
    self.gate = make_linear(config, config.d_model, N * V, rngs=rngs)
    self.recurrence = Recurrence.of(config, scale=H**-0.5)

  def attend(self, qkv: QKV, context: Context) -> Float[Array, 'B Q N V']:
    """The recurrence under α."""
    q, k, v, x = qkv
    logits = self.decay_up(self.decay_down(x)).astype(accum_dtype(x))
    log_decay = jax.nn.log_sigmoid(logits) / self.temperature
    return context.recurrence(
      self.recurrence, q, k, v, log_decay=log_decay.reshape(q.shape)
    )

  def output_transform(
    self, out: Float[Array, 'B Q N V'], x: Float[Array, 'B Q D']
  ) -> Float[Array, 'B Q N V']:
    """Norm of each head, and the gate."""
    gate = jax.nn.swish(self.gate(x)).reshape(out.shape)
    return (layer_norm(out) * gate).astype(out.dtype)
