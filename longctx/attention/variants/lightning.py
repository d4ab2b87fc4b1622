"""Lightning attention: a fixed decay per head, and one norm for all heads."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from longctx.attention.base import QKV, Attention, AttentionConfig
from longctx.attention.capabilities import OF_RECURRENCES
from longctx.attention.context import Context
from longctx.attention.norms import accum_dtype, low_rank, rms_norm
from longctx.attention.recurrence import Recurrence
from longctx.ops.alibi import geometric_slopes
from longctx.typing import Array, Float, Share


class LightningAttention(Attention):
  """Lightning attention: linear attention under a fixed decay per head.

      S_t = λ S_{t-1} + k_t v_tᵀ, out_t = norm(q_t S_t) ⊙ σ(W_2 W_1 x_t)

  'Lightning Attention-2' (arXiv:2401.04658) and the layer around it
  (TransNormerLLM, arXiv:2307.14995; TNL, arXiv:2405.17381): q, k and v pass a
  silu, the norm is one RMS norm without parameters over all heads together, W_1
  has the rank V of a head. λ = exp(-s_n (1 - depth)) in head n with the slopes
  s of ALiBi, 2^(-8(n+1)/N), as in the authors' code; TransNormerLLM's text has
  s_n = 8n/N, with which half of the heads keep less than 2% for one token.

  Time O(T H V), memory O(T); decoding keeps S, H x V numbers per head.

  Attributes:
    depth: where the layer stands, from 0, the first, to 1, the last, whose
      heads hardly forget.
  """

  unsupported = OF_RECURRENCES
  qkv_activation = staticmethod(jax.nn.silu)
  small: ClassVar = {'chunk_size': 8}

  def __init__(
    self, config: AttentionConfig, *, depth: Share = 0.0, rngs: nnx.Rngs
  ):
    super().__init__(config, rngs=rngs)
    N, V = config.num_heads, config.value_dim
    self.depth = depth
    self.gate_down, self.gate_up = low_rank(config, V, N * V, rngs=rngs)
    self.recurrence = Recurrence.of(config)

  def attend(self, qkv: QKV, context: Context) -> Float[Array, 'B Q N V']:
    """The recurrence under λ."""
    q, k, v, _ = qkv
    # Even the last layer forgets, by a hundred-thousandth, as published.
    slopes = geometric_slopes(q.shape[2]) * (1 - self.depth + 1e-5)
    log_decay = jnp.broadcast_to(
      jnp.asarray(-slopes, accum_dtype(q)), q.shape[:3]
    )
    return context.recurrence(self.recurrence, q, k, v, log_decay=log_decay)

  def output_transform(
    self, out: Float[Array, 'B Q N V'], x: Float[Array, 'B Q D']
  ) -> Float[Array, 'B Q N V']:
    """Norm of all heads together, and the gate."""
    gate = jax.nn.sigmoid(self.gate_up(self.gate_down(x)))
    normed = rms_norm(out.reshape(gate.shape))
    return (normed * gate).reshape(out.shape).astype(out.dtype)
