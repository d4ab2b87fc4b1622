"""Learned feature map of linear attention, for queries or for keys."""

import jax.numpy as jnp
from flax import nnx

from longctx.attention.base import AttentionConfig
from longctx.attention.context import Context
from longctx.ops.recurrence.feature_maps import FeatureMap
from longctx.typing import Array, Float


class Features(nnx.Module):
  """Feature map φ of the queries or of the keys of a layer.

  Attributes:
    feature_map: φ.
    is_query: whether of queries; else of keys.
  """

  def __init__(
    self, feature_map: FeatureMap, config: AttentionConfig, *, is_query: bool
  ):
    self.feature_map = feature_map
    self.is_query = is_query
    heads = config.num_heads if is_query else config.num_kv_heads
    initial = feature_map.initial(heads=heads, head_dim=config.head_dim)
    self.parameters = nnx.Dict(
      {
        name: nnx.Param(jnp.asarray(x, config.param_dtype))
        for name, x in initial.items()
      }
    )

  def __call__(
    self, x: Float[Array, 'B T N H'], context: Context
  ) -> Float[Array, 'B T N P']:
    """The features of every position.

    Raises:
      ValueError: there are more positions than the map tells apart.
    """
    feature_map, T = self.feature_map, x.shape[1]
    length = context.natural_length(T)
    if feature_map.max_length and length and length > feature_map.max_length:
      raise ValueError(
        f'{length} tokens need max_length >= {length}, the feature map has '
        f'max_length={feature_map.max_length}: set it in feature_arguments'
      )
    known = {
      'positions': lambda: context.true_positions(T),
      'step': lambda: context.step,
      'parameters': lambda: {n: p[...] for n, p in self.parameters.items()},
    }
    return feature_map(
      x,
      is_query=self.is_query,
      **{name: known[name]() for name in feature_map.needs},
    )
