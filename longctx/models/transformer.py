"""Decoder-only transformer from a pattern of attention layers."""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from longctx.attention import make_attention
from longctx.attention.base import make_linear, make_norm
from longctx.attention.context import Context
from longctx.models.activations import ACTIVATIONS
from longctx.models.config import (
  REMAT_POLICIES,
  TransformerConfig,
  check_resolved,
)
from longctx.ops.cross_entropy import cross_entropy_sums, project
from longctx.parallel import Placement
from longctx.typing import Array, Bool, Float, Int


class MLP(nnx.Module):
  """MLP: W_out f(W_in x), or gated, W_out (f(W_gate x) · W_in x)."""

  def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
    self.function, is_gated = ACTIVATIONS[config.mlp]
    D, F = config.d_model, config.mlp_dim
    linear = functools.partial(
      make_linear, config, use_bias=config.mlp_bias, rngs=rngs
    )
    self.up = linear(D, F)
    self.gate = linear(D, F) if is_gated else None
    self.down = linear(F, D)

  def __call__(self, x: Float[Array, 'B T D']) -> Float[Array, 'B T D']:
    if self.gate is None:
      return self.down(self.function(self.up(x)))
    return self.down(self.function(self.gate(x)) * self.up(x))

  def flops(self, seq_len: int) -> int:
    """FLOPs of its products on one sequence."""
    products = 2 if self.gate is None else 3
    return 2 * products * seq_len * self.up.in_features * self.up.out_features


class Block(nnx.Module):
  """Transformer block: x + attention(norm(x)), then x + mlp(norm(x)) if any.

  Norms stand where the config says, and with `parallel_residual` both are added
  to the same x.
  """

  def __init__(self, layer: str, config: TransformerConfig, *, rngs: nnx.Rngs):
    norm = lambda at: _norm(config, rngs) if at else None
    before = config.norm_position != 'after'
    after = config.norm_position != 'before'
    self.is_parallel = config.parallel_residual
    self.attention_norm = norm(before)
    self.attention = make_attention(layer, config, rngs=rngs)
    self.attention_out_norm = norm(after)
    self.has_mlp = config.mlp_dim > 0
    if self.has_mlp:
      self.mlp_norm = norm(before)
      self.mlp = MLP(config, rngs=rngs)
      self.mlp_out_norm = norm(after)

  def __call__(
    self,
    x: Float[Array, 'B T D'],
    context: Context,
    *,
    attention: Callable[..., Float[Array, 'B Q D']] | None = None,
  ) -> Float[Array, 'B Q D']:
    """Applies the block, perhaps with another function in the layer's place."""
    attend = self.attention if attention is None else attention
    out = attend(_apply(self.attention_norm, x), context)
    before = context.at_queries(x)
    x = before + _apply(self.attention_out_norm, out)
    if self.has_mlp:
      read = before if self.is_parallel else x
      out = self.mlp(_apply(self.mlp_norm, read))
      x = x + _apply(self.mlp_out_norm, out)
    return x

  def flops(self, seq_len: int) -> int:
    """FLOPs of the forward pass on one sequence."""
    mlp = self.mlp.flops(seq_len) if self.has_mlp else 0
    return self.attention.flops(seq_len) + mlp


class Transformer(nnx.Module):
  """Decoder-only transformer: embedding, blocks, a norm and a head.

  All state is `nnx.Param`.
  """

  # Whether a gate stands between blocks, see `longctx.models.gated`.
  is_gated: ClassVar[bool] = False

  def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
    check_resolved(config)
    if self.is_gated != (config.gate.keep > 0):
      raise ValueError(
        f'gate.keep={config.gate.keep} is not of a {type(self).__name__}: take '
        'longctx.models.make_model, which goes by the config'
      )
    self.config = config
    # Rows of norm one: multiplied by √D, as by default, they enter the residual
    # stream with unit variance, and as a tied head they give logits of unit
    # variance.
    normal = nnx.initializers.normal(config.d_model**-0.5)
    shape = (config.vocab_size, config.d_model)
    param_dtype = jnp.dtype(config.param_dtype)
    self.embedding = nnx.Param(normal(rngs.params(), shape, param_dtype))
    if config.position_encoding == 'learned':
      shape = (config.max_positions, config.d_model)
      self.position_table = nnx.Param(normal(rngs.params(), shape, param_dtype))
    self.blocks = nnx.List(
      [Block(layer, config, rngs=rngs) for layer in config.layers]
    )
    self._init_between(config, rngs)
    self.norm = _norm(config, rngs)
    if not config.tied_head:
      lecun = nnx.initializers.lecun_normal()
      shape = (config.d_model, config.vocab_size)
      self.head = nnx.Param(lecun(rngs.params(), shape, param_dtype))

  def _init_between(self, config: TransformerConfig, rngs: nnx.Rngs):
    """Makes what stands between blocks: here nothing.

    A subclass's parameters are drawn here, before those of the head.
    """

  def __call__(
    self,
    tokens: Int[Array, 'B T'],
    context: Context | None = None,
    **fields: Any,
  ) -> Float[Array, 'B T V']:
    """Logits of the next token at every position, float32.

    Args:
      tokens: token ids below vocab_size.
      context: where the tokens are; None: T tokens in order, on one device.
      **fields: of `Context`, to be set or replaced, such as segment_ids.
    """
    context = Context.of(context, fields).counted(tokens.shape[1])
    return self.logits(self.hidden(self.embed(tokens, context), context))

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
    """Weighted sums over the batch: `loss` (nats), `weight` and `correct`.

    Logits are made `logits_chunk` positions at a time, forward and backward, so
    that [T, V] never exists at once.

    Args:
      tokens: token ids.
      labels: what the logits at each position should predict.
      weights: weight of each position in the sums; 0 where nothing is scored.
      context: as in `__call__`. With `query_indices`, the only places that are
        scored, each once, the last block, the norm and the head are computed
        there alone, which changes no sum if weights are 0 elsewhere.
      relevant: what the answers depend on, for a gate to learn.
      **fields: as in `__call__`.
    """
    del relevant
    context = Context.of(context, fields).counted(tokens.shape[1])
    x = self.hidden(self.embed(tokens, context), context)
    indices, placement = context.query_indices, context.placement
    if indices is not None:
      labels = context.at_queries(labels)
      weights = jnp.where(indices < 0, 0, context.at_queries(weights))
      placement = None
    return self.scored(x, labels, weights, placement)

  def scored(
    self,
    x: Float[Array, 'B Q D'],
    labels: Int[Array, 'B Q'],
    weights: Float[Array, 'B Q'],
    placement: Placement | None,
  ) -> dict[str, Float[Array, '']]:
    """The sums of `loss` from the head's inputs on."""
    config = self.config
    sums = functools.partial(
      cross_entropy_sums,
      chunk=config.logits_chunk,
      soft_cap=config.logits_soft_cap,
    )
    if placement is not None:
      sums = placement.sum_over_tokens(sums)
    return sums(self.head_matrix(), x, labels, weights)

  def embed(
    self,
    tokens: Int[Array, 'B T'],
    context: Context | None = None,
    **fields: Any,
  ) -> Float[Array, 'B T D']:
    """Token embeddings, plus learned positions where the model has them."""
    context = Context.of(context, fields)
    x = self.embedding[...][tokens]
    if self.config.position_encoding == 'learned':
      T = context.natural_length(tokens.shape[1])
      if T is not None and self.config.max_positions < T:
        raise ValueError(
          f'{T} tokens need max_positions >= {T}, the model has '
          f'{self.config.max_positions}; learned positions do not extrapolate'
        )
      positions = context.true_positions(tokens.shape[1])
      # Padding has positions beyond the table, and takes its last row.
      x = x + jnp.take(self.position_table[...], positions, 0, mode='clip')
    scale = self.config.embedding_scale or self.config.d_model**0.5
    return (x * scale).astype(self.config.dtype)

  def hidden(
    self,
    x: Float[Array, 'B T D'],
    context: Context | None = None,
    **fields: Any,
  ) -> Float[Array, 'B Q D']:
    """The blocks and the final norm, from embeddings to the head's inputs.

    With `query_indices`, the last block gives its outputs at these places
    alone.
    """
    context = Context.of(context, fields)
    return self.norm(self.run(x, context, range(len(self.blocks))))

  def run(
    self, x: Float[Array, 'B T D'], context: Context, indices: range
  ) -> Float[Array, 'B Q D']:
    """Some of the blocks, one after the other."""
    context, placement = context.counted(x.shape[1]), context.placement
    for index in indices:
      own = context.draw(index)
      if index < len(self.blocks) - 1:
        own = own.replace(query_indices=None)
      if placement is not None:
        x = jax.lax.with_sharding_constraint(x, placement.sharding)
      block = self.blocks[index]
      if self.config.remat == 'none':
        x = block(x, own)
        continue
      # A module is no pytree in every mode of NNX; its split state always is.
      graph, state = nnx.split(block)

      def apply(state, x, graph=graph, own=own):
        return nnx.merge(graph, state)(x, own)

      policy = REMAT_POLICIES[self.config.remat]
      x = jax.checkpoint(apply, policy=policy)(state, x)
    return x

  def logits(self, x: Float[Array, 'B T D']) -> Float[Array, 'B T V']:
    """The head: float32 logits from the normed outputs of `hidden`."""
    soft_cap = self.config.logits_soft_cap
    return project(x, self.head_matrix(), soft_cap=soft_cap)

  def state_bytes(self, seq_len: int, dtype: str | None = None) -> int:
    """Bytes that decoding keeps for one sequence, all layers together.

    As a cache has them, or with keys and values in another dtype.
    """
    layers = [block.attention for block in self.blocks]
    return sum(layer.state_bytes(seq_len, dtype) for layer in layers)

  def flops(self, seq_len: int) -> int:
    """FLOPs of the forward pass on one sequence, the head included."""
    blocks = sum(block.flops(seq_len) for block in self.blocks)
    return blocks + 2 * seq_len * self.config.d_model * self.config.vocab_size

  def head_matrix(self) -> Float[Array, 'D V']:
    """From normed activations to logits: the embedding's transpose if tied."""
    if self.config.tied_head:
      return self.embedding[...].T
    return self.head[...]


def _norm(
  config: TransformerConfig, rngs: nnx.Rngs
) -> nnx.RMSNorm | nnx.LayerNorm:
  if config.norm == 'rms':
    return make_norm(config, config.d_model, rngs=rngs)
  return nnx.LayerNorm(
    config.d_model,
    epsilon=config.norm_eps,
    dtype=jnp.dtype(config.dtype),
    param_dtype=jnp.dtype(config.param_dtype),
    rngs=rngs,
  )


def _apply(norm: Callable[[Array], Array] | None, x: Array) -> Array:
  return x if norm is None else norm(x)
