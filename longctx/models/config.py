"""Transformer config: layers, widths, rematerialisation, checked as a whole."""

import dataclasses
from typing import ClassVar, Literal

import jax

from longctx.attention import AttentionConfig
from longctx.models.activations import ACTIVATIONS
from longctx.models.gate import GateConfig
from longctx.ops.remat import keeping
from longctx.typing import Natural, Positive, PositiveNumber

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
    mlp: its activation, 'gelu' by tanh or 'gelu_exact', or a gated one
      (arXiv:2002.05202) such as 'swiglu', see `longctx.models.activations`.
    mlp_bias: whether its projections have biases.
    norm: 'rms' (arXiv:1910.07467), or 'layer' (arXiv:1607.06450) with biases.
    norm_position: norms 'before' attention and MLP, 'after' them, or 'both'.
    parallel_residual: whether attention and MLP read the same inputs, as in
      GPT-NeoX (arXiv:2204.06745), and not the MLP what attention has added to.
    max_positions: rows of the table of learned positions; None takes the
      task's length.
    tied_head: whether the output head is the embedding, transposed.
    embedding_scale: of the embeddings as the first block reads them; None takes
      √D.
    logits_soft_cap: c of logits c tanh(z / c) (Gemma 2, arXiv:2408.00118); None
      for none.
    logits_chunk: positions whose logits exist at one time in `loss`.
    remat: name in REMAT_POLICIES of what a block keeps for its backward pass.
    gate: what of a context passes to the upper blocks, see
      `longctx.models.gate`.
  """

  prefix: ClassVar[str] = 'model.'

  vocab_size: Positive | None = None
  layers: tuple[str, ...] = ('full', 'full')
  mlp_dim: Natural = 0
  mlp: Literal[tuple(ACTIVATIONS)] = 'gelu'
  mlp_bias: bool = False
  norm: Literal['rms', 'layer'] = 'rms'
  norm_position: Literal['before', 'after', 'both'] = 'before'
  parallel_residual: bool = False
  max_positions: Positive | None = None
  tied_head: bool = True
  embedding_scale: PositiveNumber | None = None
  logits_soft_cap: PositiveNumber | None = None
  logits_chunk: Positive = 1024
  remat: Literal[tuple(REMAT_POLICIES)] = 'none'
  gate: GateConfig = dataclasses.field(default_factory=GateConfig)

  def check(self):
    super().check()
    if not self.layers:
      raise ValueError("layers is empty: name at least one, such as ('full',)")
    if self.gate.keep and self.gate.after >= len(self.layers):
      raise ValueError(
        f'gate.after={self.gate.after} leaves no block above the gate: it must '
        f'be below the {len(self.layers)} of layers'
      )


def check_resolved(config: TransformerConfig) -> None:
  """Raises where a task was to fill in what is open, and did not."""
  if config.vocab_size is None:
    raise ValueError('vocab_size=None must be at least 1, as the task has it')
  if config.position_encoding == 'learned' and not config.max_positions:
    raise ValueError(
      "position_encoding='learned' needs max_positions, the longest sequence"
    )
