"""DeltaNet: linear attention by the delta rule."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from longctx.attention.base import QKV, Attention, AttentionConfig, make_linear
from longctx.attention.capabilities import OF_RECURRENCES
from longctx.attention.context import Context
from longctx.attention.norms import delta_rule, rms_norm
from longctx.attention.recurrence import Recurrence
from longctx.typing import Array, Float


class DeltaNetAttention(Attention):
  """DeltaNet: the delta rule, which replaces what the state held for a key.

      S_t = (I - β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ
      out_t = norm(q_t S_t / √H)        β_t = σ(W_β x_t)

  'Parallelizing Linear Transformers with the Delta Rule over Sequence Length'
  (arXiv:2406.06484): q, k and v pass a silu, behind a convolution with
  `short_conv`, 4 in the paper; q and k have length one; the norm is an RMS norm
  of each head's outputs.

  Time O(T (H V + C H)) in chunks of C, memory O(T); decoding keeps S, H x V
  numbers per head.
  """

  unsupported = OF_RECURRENCES
  qkv_activation = staticmethod(jax.nn.silu)
  small: ClassVar = {'chunk_size': 8}

  def __init__(self, config: AttentionConfig, *, rngs: nnx.Rngs):
    super().__init__(config, rngs=rngs)
    N, V = config.num_heads, config.value_dim
    self.beta = make_linear(config, config.d_model, N, rngs=rngs)
    self.norm_scale = nnx.Param(jnp.ones(V, config.param_dtype))
    self.recurrence = Recurrence.of(
      config, delta=True, scale=config.head_dim**-0.5
    )

  def attend(self, qkv: QKV, context: Context) -> Float[Array, 'B Q N V']:
    """The delta rule."""
    return delta_rule(self, qkv, context)

  def output_transform(
    self, out: Float[Array, 'B Q N V'], x: Float[Array, 'B Q D']
  ) -> Float[Array, 'B Q N V']:
    """Norm of each head."""
    return (rms_norm(out) * self.norm_scale[...]).astype(out.dtype)
