"""Gated transformer: a hard gate lets few spans of a context pass."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from longctx.attention.context import Context
from longctx.models.config import TransformerConfig
from longctx.models.gate import ContextGate, measure
from longctx.models.transformer import Block, Transformer
from longctx.typing import Array, Bool, Float, Int


class GatedTransformer(Transformer):
  """Transformer with a hard context gate between two blocks.

  The blocks below read the whole context, those above what `gate` lets pass,
  see `longctx.models.gate`.
  """

  is_gated: ClassVar[bool] = True

  def _init_between(self, config: TransformerConfig, rngs: nnx.Rngs):
    self.gate = ContextGate(config.gate, config.d_model, rngs=rngs)

  @property
  def below(self) -> list[Block]:
    """The blocks below the gate."""
    return list(self.blocks)[: self.config.gate.after]

  @property
  def above(self) -> list[Block]:
    """The blocks above the gate."""
    return list(self.blocks)[self.config.gate.after :]

  def loss(
    self,
    tokens: Int[Array, 'B T'],
    labels: Int[Array, 'B T'],
    weights: Float[Array, 'B T'],
    context: Context | None = None,
    *,
    relevant: Bool[Array, 'B T'] | None = None,
    **fields: Any,
  ) -> dict[str, Float[Array, '']]:
    """`Transformer.loss`; the question ends at the first answer.

    Adds the sums of `gate.measure` where `relevant` is given, and as
    `auxiliary` what teaches the gate.
    """
    # What passes is few, wherever it is scored.
    context = Context.of(context, fields).replace(query_indices=None)
    if context.segment_ids is not None:
      raise NotImplementedError(
        'a gate has one question per row: train it without packed documents'
      )
    placement, key = context.placement, context.dropout_key
    natural = lambda x: x
    if placement is not None:
      natural = placement.into_natural
    labels, weights = natural(labels), natural(weights)
    after = self.config.gate.after
    x = self.run(self.embed(tokens, context), context, range(after))
    if key is not None:
      key = jax.random.fold_in(key, len(self.blocks))
    passed = self.gate(
      x, jnp.argmax(weights > 0, axis=1), key=key, placement=placement
    )
    context = context.replace(positions=None, placement=passed.placement)
    above = range(after, len(self.blocks))
    x = self.norm(self.run(passed.x, context, above))
    labels, weights = passed.take(labels), passed.take(weights)
    out = self.scored(x, labels, weights, passed.placement)
    if relevant is not None:
      out |= measure(passed, natural(relevant), self.config.gate)
      out['auxiliary'] = self.config.gate.labels * out['gate_loss']
    return out

  def hidden(self, *args: Any, **kwargs: Any) -> Float[Array, 'B T D']:
    """Raises NotImplementedError: most positions have no outputs."""
    raise NotImplementedError(
      'a gate passes what one question needs, and most positions have no '
      'outputs: take `loss`, or `longctx.decoding.sampler`'
    )

  def state_bytes(self, seq_len: int, dtype: str | None = None) -> int:
    dtype = dtype or self.config.dtype
    # The outputs that the gate chooses from.
    total = seq_len * self.config.d_model * jnp.dtype(dtype).itemsize
    passed = min(self.config.gate.num_kept, seq_len)
    for blocks, T in ((self.below, seq_len), (self.above, passed)):
      total += sum(block.attention.state_bytes(T, dtype) for block in blocks)
    return total

  def flops(self, seq_len: int) -> int:
    config, gate = self.config, self.config.gate
    passed = min(gate.num_kept, seq_len)
    below = sum(block.flops(seq_len) for block in self.below)
    above = sum(block.flops(passed) for block in self.above)
    # The question's vector is projected, and meets every token.
    scores = 2 * config.d_model * (seq_len + 2 * gate.width)
    head = 2 * passed * config.d_model * config.vocab_size
    return below + above + scores + head
