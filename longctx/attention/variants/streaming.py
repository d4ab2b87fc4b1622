"""StreamingLLM: attention sinks kept beside a sliding window."""

from typing import ClassVar

import jax.numpy as jnp
from flax import nnx

from longctx import masks
from longctx.attention.base import QKV, Attention, AttentionConfig
from longctx.attention.context import Context
from longctx.ops.merge import merge
from longctx.typing import Array, Float, Natural, Positive


class StreamingAttention(Attention):
  """StreamingLLM: softmax attention to the first and the most recent tokens.

      t reads s   if s ≤ t and (s < num_sinks or t - s < window)

  StreamingLLM (arXiv:2309.17453): a window alone loses the first tokens, on
  which softmax puts the weight that it has no use for. Time O(T (window +
  num_sinks)), memory O(T); decoding keeps window + num_sinks keys and values.
  The first tokens are those of each document.

  With `cache_positions` a position is a slot of that cache, as published:
  nothing is ever farther than num_sinks + window - 1, whatever the length. A
  key of the window is as far behind the query as ever. A sink s stands in slot
  s and the query in slot

      p_t = min(t, num_sinks + window - 1)

  so that its product with the sinks takes a query rotated by p_t in place of t:
  two attentions, merged by their log-sum-exp, equal to decoding with the cache.

  Attributes:
    num_sinks: first tokens that every query may read.
    window: keys of the window, the query's own position's included.
    cache_positions: whether positions are those within the cache.
  """

  small: ClassVar = {'num_sinks': 2, 'window': 4}

  def __init__(
    self,
    config: AttentionConfig,
    *,
    num_sinks: Natural = 4,
    window: Positive = 252,
    cache_positions: bool = False,
    rngs: nnx.Rngs,
  ):
    if cache_positions and config.position_encoding not in ('rope', 'alibi'):
      raise ValueError(
        f'streaming: {cache_positions=} is of rope and alibi; with positions='
        f'{config.position_encoding!r} the layer has no positions to count'
      )
    is_biased = cache_positions and config.position_encoding == 'alibi'
    if is_biased and config.attention_soft_cap is not None:
      raise NotImplementedError(
        f'streaming: {cache_positions=} with alibi has a bias that a cap would '
        'bend: give the layer attention_soft_cap=None'
      )
    super().__init__(config, rngs=rngs)
    self.of_sinks = masks.Causal() & masks.PrefixColumns(num_sinks)
    self.of_window = masks.SlidingWindow(window - 1) & masks.Beyond(
      0, num_sinks
    )
    self.mask = self.of_sinks | masks.SlidingWindow(window - 1)
    self.cache_positions = cache_positions
    self.last_slot = num_sinks + window - 1

  def attend(self, qkv: QKV, context: Context) -> Float[Array, 'B Q N V']:
    """One attention, or that of the window and that of the sinks."""
    if not self.cache_positions:
      return super().attend(qkv, context)
    q, k, v, _ = qkv
    options = self.logit_options()
    window = context.dot_product_attention(
      q, k, v, mask=self.of_window, return_lse=True, **options
    )
    positions = context.segment_positions(q.shape[1])
    slots = jnp.minimum(positions, self.last_slot)
    if self.config.rope is not None:
      q = self.config.rope.rotate(q, slots - positions, again=True)
    slopes = options.pop('alibi_slopes', None)
    if slopes is not None:
      to_query, to_key = (
        slopes * jnp.atleast_2d(x)[..., None] for x in (-slots, positions)
      )
      options |= dict(q_bias=to_query, k_bias=to_key)
    sinks = context.dot_product_attention(
      q, k, v, mask=self.of_sinks, return_lse=True, **options
    )
    out, _ = merge(*window, *sinks)
    return out.astype(q.dtype)
