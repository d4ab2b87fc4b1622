"""Attention config: what the attention layers of a model share."""

import dataclasses

from longctx.ops.dot_product_attention import BlockSizes

POSITION_ENCODINGS = ('rope', 'alibi', 'learned', 'none')


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig:
  """Attention config: heads, widths, position encoding, dtypes of a layer.

  Attributes:
    d_model: width D of the residual stream.
    num_heads: query heads N.
    num_kv_heads: key and value heads K, a divisor of N; None means N.
    head_dim: width H of a query or key head; None means D / N.
    value_dim: width V of a value head; None means H.
    position_encoding: 'rope' (arXiv:2104.09864) rotates queries and keys,
      'alibi' (arXiv:2108.12409) lowers logits by distance; 'learned' (added to
      the embeddings by the model) and 'none' leave the layer alone.
    rope_base: base of RoPE's geometric wavelengths.
    short_conv: width W of a causal depthwise convolution over queries, keys and
      values, each with its own; 0 for none.
    attention_dropout: share of the attention weights that training drops.
    dtype: of the computation; statistics and states are float32.
    param_dtype: of the parameters.
    implementation: of the op, by name; None takes the best that fits.
    block_q: queries per block of softmax attention; None takes a heuristic.
    block_k: keys per block; likewise.
    chunk_size: tokens C that a recurrence mixes by one matrix product.
  """

  d_model: int = 64
  num_heads: int = 4
  num_kv_heads: int | None = None
  head_dim: int | None = None
  value_dim: int | None = None
  position_encoding: str = 'rope'
  rope_base: float = 10000.0
  short_conv: int = 0
  attention_dropout: float = 0.0
  dtype: str = 'float32'
  param_dtype: str = 'float32'
  implementation: str | None = None
  block_q: int | None = None
  block_k: int | None = None
  chunk_size: int = 64

  def __post_init__(self):
    widths = ('d_model', 'num_heads', 'num_kv_heads', 'head_dim', 'value_dim')
    for name in (*widths, 'chunk_size'):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise ValueError(f'{name}={value} must be at least 1')
    if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
      raise ValueError(
        f'num_heads={self.num_heads} must be a multiple of '
        f'num_kv_heads={self.num_kv_heads}'
      )
    if self.position_encoding not in POSITION_ENCODINGS:
      raise ValueError(
        f'unknown position_encoding={self.position_encoding!r}; known: '
        f'{", ".join(POSITION_ENCODINGS)}'
      )
    if self.position_encoding == 'rope' and (self.head_dim or 0) % 2:
      raise ValueError(f'RoPE needs an even head_dim, got {self.head_dim}')
    if self.short_conv < 0:
      raise ValueError(f'short_conv={self.short_conv} must be at least 0')
    if not 0 <= self.attention_dropout < 1:
      raise ValueError(
        f'attention_dropout={self.attention_dropout} must be in [0, 1)'
      )

  def resolve(self) -> 'AttentionConfig':
    """The config of one layer: its fields alone, no width of them None."""
    head_dim = self.head_dim
    if head_dim is None:
      if self.d_model % self.num_heads:
        raise ValueError(
          f'd_model={self.d_model} must be a multiple of '
          f'num_heads={self.num_heads}, or head_dim be set'
        )
      head_dim = self.d_model // self.num_heads
    fields = dataclasses.fields(AttentionConfig)
    values = {field.name: getattr(self, field.name) for field in fields}
    values |= dict(
      num_kv_heads=self.num_kv_heads or self.num_heads,
      head_dim=head_dim,
      value_dim=self.value_dim or head_dim,
    )
    return AttentionConfig(**values)

  @property
  def block_sizes(self) -> BlockSizes:
    """Of both passes of softmax attention."""
    sizes = (self.block_q, self.block_k)
    return BlockSizes(*sizes, *sizes)
