"""Linear attention: feature maps in place of the softmax kernel."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from flax import nnx

from longctx.attention.base import QKV, Attention, AttentionConfig
from longctx.attention.capabilities import OF_RECURRENCES
from longctx.attention.context import Context
from longctx.attention.features import Features
from longctx.attention.recurrence import Recurrence
from longctx.ops.recurrence.feature_maps import FEATURE_MAPS, make_feature_map
from longctx.typing import Array, Float


class LinearAttention(Attention):
  """Linear attention: a feature map φ in place of the softmax kernel.

      out_t = φ(q_t) S_t / φ(q_t) z_t with S_t = Σ φ(k_s) v_sᵀ, z_t = Σ φ(k_s)

  Both sums run over s ≤ t.

  'Transformers are RNNs' (arXiv:2006.16236). Time O(T P V), memory O(T);
  decoding keeps S and z alone, whatever the length, and what does not fit into
  P x V numbers cannot be recalled. RoPE rotates queries and keys before φ, so
  that features stay positive where φ makes them so.

  Attributes:
    feature_map: φ, by its name in ops.recurrence.feature_maps.
    feature_arguments: arguments of φ, such as {'num_features': 64} or
      {'num_features': 64, 'redraw_every': 1000}.
    normalize: divide by φ(q_t) z_t; without it, scale by 1 / √P.
  """

  unsupported = OF_RECURRENCES
  small: ClassVar = {'chunk_size': 8}

  def __init__(
    self,
    config: AttentionConfig,
    *,
    feature_map: Literal[tuple(FEATURE_MAPS)] = 'elu+1',
    feature_arguments: Mapping[str, Any] | None = None,
    normalize: bool = True,
    rngs: nnx.Rngs,
  ):
    super().__init__(config, rngs=rngs)
    phi = make_feature_map(feature_map, **feature_arguments or {})
    self.query_features = Features(phi, config, is_query=True)
    self.key_features = Features(phi, config, is_query=False)
    features = phi.dim(config.head_dim)
    self.recurrence = Recurrence.of(
      config,
      key_dim=features,
      normalize=normalize,
      scale=1.0 if normalize else features**-0.5,
    )

  def attend(self, qkv: QKV, context: Context) -> Float[Array, 'B Q N V']:
    """The recurrence over features; order is that of T."""
    q, k, v, _ = qkv
    q = self.query_features(q, context)
    k = self.key_features(k, context)
    return context.recurrence(self.recurrence, q, k, v)
