"""Attention config: what the attention layers of a model share."""

import dataclasses
from typing import Annotated, Literal

import jax

from longctx.ops.dot_product_attention import IMPLEMENTATIONS, BlockSizes
from longctx.ops.rope import Rope
from longctx.ops.rope_scaling import parse_scaling
from longctx.typing import (
  Between,
  Checked,
  Fraction,
  Positive,
  PositiveNumber,
  Reason,
  Width,
  check_multiple,
)

POSITION_ENCODINGS = ('rope', 'alibi', 'learned', 'none')
Dtype = Annotated[
  Literal['float32', 'bfloat16', 'float64'],
  Reason('float16', ", which overflows beyond 65,504: take 'bfloat16'"),
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig(Checked):
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
    rope_scaling: of RoPE's frequencies, for longer contexts than a model was
      trained on, see `longctx.ops.rope_scaling`: 'none', or such as
      'yarn(factor=4.0, original_context=32768)'.
    rotary_dim: first channels of a head that RoPE rotates; None: all.
    qk_norm: RMS norm of projected queries and keys, with a learned scale: of
      each 'head' (arXiv:2302.05442), of the whole 'width', or 'none'.
    norm_eps: what norms of the model add to a mean square.
    qkv_bias: whether projections into heads have biases.
    out_bias: whether the projection back has.
    attention_scale: of the products of queries and keys; None takes 1/√H.
    attention_soft_cap: c of logits c tanh(z / c) (Gemma 2, arXiv:2408.00118);
      None for none.
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

  d_model: Width = 64
  num_heads: Width = 4
  num_kv_heads: Width | None = None
  head_dim: Width | None = None
  value_dim: Width | None = None
  position_encoding: Literal[POSITION_ENCODINGS] = 'rope'
  rope_base: Annotated[float, Between(1, 1e15)] = 10000.0
  rope_scaling: str = 'none'
  rotary_dim: Width | None = None
  qk_norm: Literal['none', 'head', 'width'] = 'none'
  norm_eps: Annotated[float, Between(0, 1, open='low')] = 1e-6
  qkv_bias: bool = False
  out_bias: bool = False
  attention_scale: PositiveNumber | None = None
  attention_soft_cap: PositiveNumber | None = None
  # A trace has a product per tap.
  short_conv: Annotated[int, Between(0, 256)] = 0
  attention_dropout: Fraction = 0.0
  dtype: Dtype = 'float32'
  param_dtype: Dtype = 'float32'
  implementation: Literal[tuple(IMPLEMENTATIONS)] | None = None
  block_q: Positive | None = None
  block_k: Positive | None = None
  chunk_size: Positive = 64

  def check(self):
    if self.num_kv_heads is not None:
      check_multiple(self, 'num_heads', 'num_kv_heads')
    if self.position_encoding == 'rope' and (self.head_dim or 0) % 2:
      raise ValueError(
        f'RoPE needs an even head_dim, got {self.head_dim}: take '
        f'{self.head_dim + 1}, or another position_encoding'
      )
    try:
      if self.rope is not None and self.head_dim:
        self.rope.frequencies(self.head_dim)
      parse_scaling(self.rope_scaling)
    except ValueError as error:
      raise ValueError(f'rope_scaling: {error}') from error
    if (self.rotary_dim or 0) % 2 or (
      self.head_dim and (self.rotary_dim or 0) > self.head_dim
    ):
      raise ValueError(
        f'rotary_dim={self.rotary_dim} must be even, to be rotated in pairs, '
        f'and at most head_dim={self.head_dim}'
      )
    for name in ('dtype', 'param_dtype'):
      if getattr(self, name) == 'float64' and not jax.config.jax_enable_x64:
        raise ValueError(
          f"{self.prefix}{name}='float64' needs jax_enable_x64, without which "
          "arrays are float32: take 'float32'"
        )

  def resolve(self) -> 'AttentionConfig':
    """The config of one layer: its fields alone, no width of them None."""
    head_dim = self.head_dim
    if head_dim is None:
      check_multiple(self, 'd_model', 'num_heads')
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
  def rope(self) -> Rope | None:
    """What rotates queries and keys; None where nothing does."""
    if self.position_encoding != 'rope':
      return None
    return Rope(
      base=self.rope_base,
      dim=self.rotary_dim,
      scaling=parse_scaling(self.rope_scaling),
    )

  @property
  def block_sizes(self) -> BlockSizes:
    """Of both passes of softmax attention."""
    sizes = (self.block_q, self.block_k)
    return BlockSizes(*sizes, *sizes)
