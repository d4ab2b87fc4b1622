"""Hybrid of sliding window softmax and linear attention in one layer."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from longctx import masks
from longctx.attention.base import QKV, Attention, AttentionConfig
from longctx.attention.capabilities import OF_RECURRENCES
from longctx.attention.context import Context
from longctx.attention.features import Features
from longctx.attention.norms import accum_dtype
from longctx.attention.recurrence import Recurrence
from longctx.ops.recurrence.feature_maps import FEATURE_MAPS, make_feature_map
from longctx.typing import Array, Float, Positive


class WindowLinearAttention(Attention):
  """Hybrid attention: a sliding window and linear attention, weighed per head.

      out_t = σ(m) linear_t + (1 - σ(m)) window_t, one m per head
      window_t = Σ_{t - window < s ≤ t} softmax_s(q_t k_s / √H) v_s
      linear_t = φ(q_t) S_t / φ(q_t) z_t,  S_t = Σ_{s ≤ t} φ(k_s) v_sᵀ

  Exact recall of what is near, a state of what is far, from the same q, k and
  v. The mix is that of 'Leave No Context Behind' (Infini-attention,
  arXiv:2404.07143), whose memory is of whole segments before; here it has every
  token at once. m = 0 at first.

  Time O(T (window + P) V), memory O(T P); decoding keeps `window` keys and
  values, S and z, P x (V + 1) numbers per head.

  Attributes:
    window: keys that a query reads, its own position's included.
    feature_map: φ, by its name in ops.recurrence.feature_maps.
    feature_arguments: arguments of φ.
  """

  unsupported = OF_RECURRENCES
  small: ClassVar = {'window': 5, 'chunk_size': 8}

  def __init__(
    self,
    config: AttentionConfig,
    *,
    window: Positive = 64,
    feature_map: Literal[tuple(FEATURE_MAPS)] = 'elu+1',
    feature_arguments: Mapping[str, Any] | None = None,
    rngs: nnx.Rngs,
  ):
    super().__init__(config, rngs=rngs)
    self.mask = masks.SlidingWindow(window - 1)
    phi = make_feature_map(feature_map, **feature_arguments or {})
    self.query_features = Features(phi, config, is_query=True)
    self.key_features = Features(phi, config, is_query=False)
    self.mix_logit = nnx.Param(jnp.zeros(config.num_heads, config.param_dtype))
    self.recurrence = Recurrence.of(
      config, key_dim=phi.dim(config.head_dim), normalize=True
    )

  def attend(self, qkv: QKV, context: Context) -> Float[Array, 'B Q N V']:
    """Both branches, weighed."""
    q, k, v, _ = qkv
    near = context.dot_product_attention(q, k, v, mask=self.mask)
    far = context.recurrence(
      self.recurrence,
      self.query_features(q, context),
      self.key_features(k, context),
      v,
    )
    dtype = accum_dtype(near)
    share = jax.nn.sigmoid(self.mix_logit[...].astype(dtype))[:, None]
    out = share * far + (1 - share) * near
    return out.astype(near.dtype)
