"""The shape of a decoder, checked where no layer would notice."""

import dataclasses

import jax

from longctx.attention import AttentionConfig
from longctx.models.gate import GateConfig
from longctx.ops.remat import keeping

DTYPES = ('float32', 'bfloat16', 'float64')

# What a block keeps for its backward pass, by name. What softmax attention
# gives is kept by all but 'full', which runs it forward twice (as do all where
# cuDNN computes it).
REMAT_POLICIES = {
  'none': None,
  'full': jax.checkpoint_policies.nothing_saveable,
  'dots': keeping(jax.checkpoint_policies.dots_saveable),
  'dots_no_batch': keeping(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
  """The shape of a decoder.

  Attributes:
    vocab_size: tokens V; None takes the task's.
    layers: one string per block, see `longctx.attention`: ('full', 'linear') or
      ('sliding_window(window=64)',) * 4 + ('full',).
    d_model: width D of the residual stream.
    num_heads: query heads N.
    num_kv_heads: key and value heads K; None means N.
    head_dim: width H of a query or key head; None means D / N.
    value_dim: width V of a value head; None means H.
    mlp_dim: width F of the MLP after each attention layer; 0 for no MLP.
    position_encoding: 'rope', 'alibi', 'learned' or 'none'.
    rope_base: base of RoPE's geometric wavelengths.
    max_positions: rows of the table of learned positions; None takes the
      task's length.
    short_conv: width of the convolution over queries, keys and values; 0: none.
    attention_dropout: share of the attention weights that training drops.
    tied_head: whether the output head is the embedding, transposed.
    logits_chunk: positions whose logits exist at one time in `loss`.
    remat: name in REMAT_POLICIES of what a block keeps for its backward pass.
    dtype: of the computation.
    param_dtype: of the parameters.
    implementation: of the attention ops, by name; None takes the best.
    gate: what of a context passes to the upper blocks, see
      `longctx.models.gate`.
  """

  vocab_size: int | None = None
  layers: tuple[str, ...] = ('full', 'full')
  d_model: int = 64
  num_heads: int = 4
  num_kv_heads: int | None = None
  head_dim: int | None = None
  value_dim: int | None = None
  mlp_dim: int = 0
  position_encoding: str = 'rope'
  rope_base: float = 10000.0
  max_positions: int | None = None
  short_conv: int = 0
  attention_dropout: float = 0.0
  tied_head: bool = True
  logits_chunk: int = 1024
  remat: str = 'none'
  dtype: str = 'float32'
  param_dtype: str = 'float32'
  implementation: str | None = None
  gate: GateConfig = dataclasses.field(default_factory=GateConfig)

  def attention(self) -> AttentionConfig:
    """What the attention layers share, with the None fields resolved."""
    head_dim = self.head_dim
    if head_dim is None:
      if self.num_heads < 1 or self.d_model % self.num_heads:
        raise ValueError(
          f'd_model={self.d_model} must be a multiple of '
          f'num_heads={self.num_heads}, or head_dim be set'
        )
      head_dim = self.d_model // self.num_heads
    return AttentionConfig(
      d_model=self.d_model,
      num_heads=self.num_heads,
      num_kv_heads=self.num_kv_heads or self.num_heads,
      head_dim=head_dim,
      value_dim=self.value_dim or head_dim,
      position_encoding=self.position_encoding,
      rope_base=self.rope_base,
      short_conv=self.short_conv,
      attention_dropout=self.attention_dropout,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      implementation=self.implementation,
    )


def check(config: TransformerConfig) -> None:
  """Raises for values that no layer would notice."""
  if not config.layers:
    raise ValueError("layers is empty: name at least one, such as ('full',)")
  if config.vocab_size is None or config.vocab_size < 1:
    raise ValueError(f'vocab_size={config.vocab_size} must be at least 1')
  if config.mlp_dim < 0 or config.logits_chunk < 1:
    raise ValueError(
      f'need mlp_dim={config.mlp_dim} >= 0 and '
      f'logits_chunk={config.logits_chunk} >= 1'
    )
  if config.gate.keep and config.gate.after >= len(config.layers):
    raise ValueError(
      f'gate.after={config.gate.after} leaves no block above the gate: it must '
      f'be below the {len(config.layers)} of layers'
    )
  if config.remat not in REMAT_POLICIES:
    raise ValueError(
      f'unknown remat {config.remat!r}; known: {", ".join(REMAT_POLICIES)}'
    )
  for name in ('dtype', 'param_dtype'):
    if getattr(config, name) not in DTYPES:
      raise ValueError(
        f'unknown {name} {getattr(config, name)!r}; known: {", ".join(DTYPES)}'
      )
  if config.position_encoding == 'learned' and not config.max_positions:
    raise ValueError(
      "position_encoding='learned' needs max_positions, the longest sequence"
    )
