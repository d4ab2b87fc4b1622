"""Linear attention: softmax's kernel replaced by a product of features."""

from collections.abc import Mapping

import numpy as np
from flax import nnx

from longctx.attention.attention import (
  Attention,
  AttentionConfig,
  take_read,
)
from longctx.ops.linear_attention import linear_attention
from longctx.ops.linear_attention.feature_maps import make_feature_map
from longctx.parallel import Placement
from longctx.typing import Array, Float, Int, Key


class LinearAttention(Attention):
  """out_t = φ(q_t) S_t / φ(q_t) z_t with S_t = Σ φ(k_s) v_sᵀ, z_t = Σ φ(k_s).

  Both sums run over s ≤ t.

  'Transformers are RNNs' (arXiv:2006.16236). Time O(T P V), memory O(T);
  decoding keeps S and z alone, whatever the length, and what does not fit into
  P x V numbers cannot be recalled. RoPE rotates queries and keys before φ, so
  that features stay positive where φ makes them so.

  Attributes:
    feature_map: φ, by its name in ops.linear_attention.feature_maps.
    feature_arguments: arguments of φ, such as {'num_features': 64}.
    normalize: divide by φ(q_t) z_t; without it, scale by 1 / √P.
    chunk_size: tokens that are mixed by one matrix product.
  """

  def __init__(
    self,
    config: AttentionConfig,
    *,
    feature_map: str = 'elu+1',
    feature_arguments: Mapping[str, int] | None = None,
    normalize: bool = True,
    chunk_size: int = 64,
    rngs: nnx.Rngs,
  ):
    if config.positions == 'alibi':
      raise NotImplementedError(
        "linear attention has no logits for ALiBi to lower: take 'rope', "
        "'learned' or 'none' as positions"
      )
    if config.attention_dropout:
      raise NotImplementedError(
        'linear attention has no weights per key to drop: give the layer '
        'attention_dropout=0.0, as in linear(attention_dropout=0.0)'
      )
    if chunk_size < 1:
      raise ValueError(f'linear: {chunk_size=} must be at least 1')
    self.feature_map = make_feature_map(feature_map, **feature_arguments or {})
    self.normalize = normalize
    self.chunk_size = chunk_size
    super().__init__(config, rngs=rngs)

  def mix(
    self,
    q: Float[Array, 'B T N H'],
    k: Float[Array, 'B T K H'],
    v: Float[Array, 'B T K V'],
    *,
    positions: Int[Array, '*B T'] | None,
    segment_ids: Int[Array, 'B T'] | None,
    read: Int[Array, 'B Q'] | None = None,
    dropout_key: Key[Array, ''] | None = None,
    placement: Placement | None = None,
  ) -> Float[Array, 'B Q N V']:
    """Mixes values over positions by the recurrence; order is that of T."""
    feature_dim = self.feature_map.dim(self.config.head_dim)
    attend = linear_attention
    if placement is not None:
      attend = placement.linear_attention
    out, _ = attend(
      self.feature_map(q, is_query=True),
      self.feature_map(k, is_query=False),
      v,
      scale=1.0 if self.normalize else feature_dim**-0.5,
      segment_ids=segment_ids,
      normalize=self.normalize,
      chunk_size=self.chunk_size,
      implementation=self.config.implementation,
    )
    # The state passes every place, whichever are read.
    return take_read(out, read)

  def state_bytes(self, seq_len: int, dtype: str) -> int:
    """Bytes of S, of z when normalized, and of the convolutions' tails."""
    config = self.config
    columns = config.value_dim + self.normalize
    entries = self.feature_map.dim(config.head_dim) * columns
    state = config.num_heads * entries * np.dtype('float32').itemsize
    return state + self._tail_bytes(dtype)

  def mixing_flops(self, seq_len: int) -> int:
    """FLOPs of the chunkwise form: within chunks, and through the state."""
    config = self.config
    features = self.feature_map.dim(config.head_dim)
    columns = config.value_dim + self.normalize
    inside = self.chunk_size * (features + columns)
    through = 2 * features * columns
    return 2 * config.num_heads * seq_len * (inside + through)
