"""Transformer config: layers, widths, rematerialisation, checked as a whole."""

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
class TransformerConfig(AttentionConfig):
  """Transformer config: the attention of its layers, and what surrounds it.

  Has the fields of `AttentionConfig` too, which a layer's string may replace.

  Attributes:
    vocab_size: tokens V; None takes the task's.
    layers: one string per block, see `longctx.attention`: ('full', 'linear') or
      ('sliding_window(window=64)',) * 4 + ('full',).
    mlp_dim: width F of the MLP after each attention layer; 0 for no MLP.
    max_positions: rows of the table of learned positions; None takes the
      task's length.
    tied_head: whether the output head is the embedding, transposed.
    logits_chunk: positions whose logits exist at one time in `loss`.
    remat: name in REMAT_POLICIES of what a block keeps for its backward pass.
    gate: what of a context passes to the upper blocks, see
      `longctx.models.gate`.
  """

  vocab_size: int | None = None
  layers: tuple[str, ...] = ('full', 'full')
  mlp_dim: int = 0
  max_positions: int | None = None
  tied_head: bool = True
  logits_chunk: int = 1024
  remat: str = 'none'
  gate: GateConfig = dataclasses.field(default_factory=GateConfig)


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
