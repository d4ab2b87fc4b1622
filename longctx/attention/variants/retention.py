"""Retention (RetNet): linear attention under a fixed decay per head."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longctx.attention.base import QKV, Attention, AttentionConfig, make_linear
from longctx.attention.capabilities import OF_RECURRENCES
from longctx.attention.context import Context
from longctx.attention.norms import accum_dtype, layer_norm
from longctx.attention.recurrence import Recurrence
from longctx.typing import Array, Float


class RetentionAttention(Attention):
  """Retention: linear attention under a fixed decay per head.

      S_t = γ S_{t-1} + k_t v_tᵀ, out_t = swish(W_g x_t) ⊙ norm(q_t S_t / √H)

  'Retentive Network' (arXiv:2307.08621): γ = 1 - 2^(-5-n) in head n, which so
  forgets half in 22 · 2^n tokens. The norm is that of one head's outputs (group
  norm; the authors' code does not subtract the mean), its scale left to W_out.
  The paper's positions are 'rope', which is what xPos comes down to under γ.

  Time O(T H V), memory O(T); decoding keeps S, H x V numbers per head.
  """

  unsupported = OF_RECURRENCES
  small: ClassVar = {'chunk_size': 8}

  def __init__(self, config: AttentionConfig, *, rngs: nnx.Rngs):
    super().__init__(config, rngs=rngs)
    width = config.num_heads * config.value_dim
    self.gate = make_linear(config, config.d_model, width, rngs=rngs)
    self.recurrence = Recurrence.of(config, scale=config.head_dim**-0.5)

  def attend(self, qkv: QKV, context: Context) -> Float[Array, 'B Q N V']:
    """The recurrence under the decays of `retention_log_decay`."""
    q, k, v, _ = qkv
    log_decay = jnp.asarray(retention_log_decay(q.shape[2]), accum_dtype(q))
    log_decay = jnp.broadcast_to(log_decay, q.shape[:3])
    return context.recurrence(self.recurrence, q, k, v, log_decay=log_decay)

  def output_transform(
    self, out: Float[Array, 'B Q N V'], x: Float[Array, 'B Q D']
  ) -> Float[Array, 'B Q N V']:
    """Norm of each head, and the gate."""
    gate = jax.nn.swish(self.gate(x)).reshape(out.shape)
    return (layer_norm(out) * gate).astype(out.dtype)


def retention_log_decay(num_heads: int) -> np.ndarray:
  """log(1 - 2^(-5-n)) of each head n, float64."""
  return np.log1p(-(2.0 ** (-5 - np.arange(num_heads))))
