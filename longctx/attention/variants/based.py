"""Based: linear attention by a Taylor feature map, on small heads."""

import dataclasses
from typing import ClassVar

from flax import nnx

from longctx.attention.base import QKV, Attention, AttentionConfig
from longctx.attention.capabilities import OF_RECURRENCES
from longctx.attention.context import Context
from longctx.attention.features import Features
from longctx.attention.recurrence import Recurrence
from longctx.ops.recurrence.feature_maps import Taylor
from longctx.typing import Array, Float, Width


class BasedAttention(Attention):
  """Based: linear attention by a second-order Taylor feature map.

      out_t = φ(q_t) S_t / φ(q_t) z_t with S_t = Σ φ(k_s) v_sᵀ, z_t = Σ φ(k_s)
      φ(q) φ(k) = 1 + q k / √d + (q k)² / (2 d)

  'Simple linear attention language models balance the recall-throughput
  tradeoff' (arXiv:2402.18668): the exponential to second order, of queries and
  keys that are projected to d = `feature_dim` numbers, fewer than a value has.
  The paper has no positions here, and layers of short windows and convolutions
  beside.

  Time O(T d² V), memory O(T d²); decoding keeps S and z, (1 + d + d²) (V + 1)
  numbers per head.

  Attributes:
    feature_dim: d, instead of the config's head_dim.
  """

  unsupported = OF_RECURRENCES
  small: ClassVar = {'chunk_size': 8, 'feature_dim': 4}

  def __init__(
    self, config: AttentionConfig, *, feature_dim: Width = 16, rngs: nnx.Rngs
  ):
    config = dataclasses.replace(config, head_dim=feature_dim)
    super().__init__(config, rngs=rngs)
    phi = Taylor()
    self.query_features = Features(phi, config, is_query=True)
    self.key_features = Features(phi, config, is_query=False)
    self.recurrence = Recurrence.of(
      config, key_dim=phi.dim(feature_dim), normalize=True
    )

  def attend(self, qkv: QKV, context: Context) -> Float[Array, 'B Q N V']:
    """The recurrence over features."""
    q, k, v, _ = qkv
    q = self.query_features(q, context)
    k = self.key_features(k, context)
    return context.recurrence(self.recurrence, q, k, v)
