"""A single attention layer, for models other than this library's."""

from typing import Any

from flax import nnx

from longctx.attention import make_attention
from longctx.attention.base import Attention, AttentionConfig


def make_layer(
  name: str,
  *,
  d_model: int,
  num_heads: int,
  num_kv_heads: int | None = None,
  head_dim: int | None = None,
  value_dim: int | None = None,
  rngs: nnx.Rngs,
  **fields: Any,
) -> Attention:
  """Makes any variant as a layer: x [B, T, D] -> [B, T, D].

  Args:
    name: a key of VARIANTS, perhaps with arguments, as in
      'sliding_window(window=64)'.
    d_model: width D.
    num_heads: query heads N.
    num_kv_heads: key and value heads K; None means N.
    head_dim: width H of a query or key head; None means D / N.
    value_dim: width V of a value head; None means H.
    rngs: source of the initial parameters.
    **fields: others of `AttentionConfig`.

  Raises:
    ValueError, NotImplementedError: as in `make_attention`.
  """
  head_dim = head_dim or d_model // num_heads
  config = AttentionConfig(
    d_model=d_model,
    num_heads=num_heads,
    num_kv_heads=num_kv_heads or num_heads,
    head_dim=head_dim,
    value_dim=value_dim or head_dim,
    **fields,
  )
  return make_attention(name, config, rngs=rngs)
