"""A decoder-only transformer from a pattern of attention layers."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from longctx.attention import (
  make_attention,
  take_queries,
  true_positions,
)
from longctx.models.config import REMAT_POLICIES, TransformerConfig, check
from longctx.models.gate import ContextGate, measure
from longctx.ops.cross_entropy import cross_entropy_sums, project
from longctx.parallel import Placement
from longctx.typing import Array, Bool, Float, Int, Key


class MLP(nnx.Module):
  """W_out gelu(W_in x), without biases."""

  def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
    kwargs = dict(
      use_bias=False,
      dtype=jnp.dtype(config.dtype),
      param_dtype=jnp.dtype(config.param_dtype),
      rngs=rngs,
    )
    self.up = nnx.Linear(config.d_model, config.mlp_dim, **kwargs)
    self.down = nnx.Linear(config.mlp_dim, config.d_model, **kwargs)

  def __call__(self, x: Float[Array, 'B T D']) -> Float[Array, 'B T D']:
    return self.down(nnx.gelu(self.up(x)))


class Block(nnx.Module):
  """x + attention(norm(x)), then x + mlp(norm(x)) when there is an MLP."""

  def __init__(self, layer: str, config: TransformerConfig, *, rngs: nnx.Rngs):
    self.attention_norm = _norm(config, rngs)
    self.attention = make_attention(layer, config.attention(), rngs=rngs)
    self.has_mlp = config.mlp_dim > 0
    if self.has_mlp:
      self.mlp_norm = _norm(config, rngs)
      self.mlp = MLP(config, rngs=rngs)

  def __call__(
    self,
    x: Float[Array, 'B T D'],
    *,
    positions: Int[Array, '*B T'] | None = None,
    segment_ids: Int[Array, 'B T'] | None = None,
    query_indices: Int[Array, 'B Q'] | None = None,
    dropout_key: Key[Array, ''] | None = None,
    step: Int[Array, ''] | int | None = None,
    placement: Placement | None = None,
  ) -> Float[Array, 'B Q D']:
    attend = functools.partial(
      self.attention,
      positions=positions,
      segment_ids=segment_ids,
      query_indices=query_indices,
      dropout_key=dropout_key,
      step=step,
      placement=placement,
    )
    return self.residual(attend, x, query_indices=query_indices)

  def residual(
    self,
    attend: Callable[[Float[Array, 'B T D']], Float[Array, 'B Q D']],
    x: Float[Array, 'B T D'],
    *,
    query_indices: Int[Array, 'B Q'] | None = None,
  ) -> Float[Array, 'B Q D']:
    """What surrounds the attention layer, in place of which `attend` stands."""
    x = take_queries(x, query_indices) + attend(self.attention_norm(x))
    if self.has_mlp:
      x = x + self.mlp(self.mlp_norm(x))
    return x


class Transformer(nnx.Module):
  """Embedding, a block per layer of the pattern, a norm and a head.

  Pre-norm with RMSNorm (arXiv:1910.07467). All state is `nnx.Param`.
  """

  def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
    check(config)
    self.config = config
    # Rows of norm one: multiplied by √D they enter the residual stream with
    # unit variance, and as a tied head they give logits of unit variance.
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
    if config.gate.keep:
      self.gate = ContextGate(config.gate, config.d_model, rngs=rngs)
    self.norm = _norm(config, rngs)
    if not config.tied_head:
      lecun = nnx.initializers.lecun_normal()
      shape = (config.d_model, config.vocab_size)
      self.head = nnx.Param(lecun(rngs.params(), shape, param_dtype))

  def __call__(
    self,
    tokens: Int[Array, 'B T'],
    *,
    positions: Int[Array, '*B T'] | None = None,
    segment_ids: Int[Array, 'B T'] | None = None,
    step: Int[Array, ''] | int | None = None,
  ) -> Float[Array, 'B T V']:
    """Logits of the next token at every position, float32.

    Args:
      tokens: token ids below vocab_size.
      positions: of the tokens, shared by the batch or per row; None means
        0, 1, …, T - 1.
      segment_ids: documents packed into a row; none reads another.
      step: of the training that made the parameters; None: none.
    """
    x = self.embed(tokens, positions=positions)
    x = self.hidden(x, positions=positions, segment_ids=segment_ids, step=step)
    return self.logits(x)

  def loss(
    self,
    tokens: Int[Array, 'B T'],
    labels: Int[Array, 'B T'],
    weights: Float[Array, 'B T'],
    *,
    positions: Int[Array, '*B T'] | None = None,
    segment_ids: Int[Array, 'B T'] | None = None,
    query_indices: Int[Array, 'B Q'] | None = None,
    dropout_key: Key[Array, ''] | None = None,
    step: Int[Array, ''] | int | None = None,
    placement: Placement | None = None,
    relevant: Bool[Array, 'B T'] | None = None,
  ) -> dict[str, Float[Array, '']]:
    """Weighted sums over the batch: `loss` (nats), `weight` and `correct`.

    A model with a gate adds those of `gate.measure`, where `relevant` is given.

    Logits are made `logits_chunk` positions at a time, forward and backward, so
    that [T, V] never exists at once.

    Args:
      tokens: token ids.
      labels: what the logits at each position should predict.
      weights: weight of each position in the sums; 0 where nothing is scored.
      positions: as in `__call__`.
      segment_ids: as in `__call__`.
      query_indices: the only places that are scored, each once, on the axis T;
        -1 stands for none. The last block, the norm and the head are computed
        there alone, which changes no sum if weights are 0 elsewhere.
      dropout_key: of this step; None drops nothing.
      step: of training, counted from 1; None before and without training.
      placement: where the tokens lie on a mesh, all arrays in its layout's
        order; None: on one device.
      relevant: what the answers depend on, for a gate to learn.
    """
    x = self.embed(tokens, positions=positions, placement=placement)
    if self.config.gate.keep:
      if segment_ids is not None:
        raise NotImplementedError(
          'a gate has one question per row: train it without packed documents'
        )
      return self._gated_loss(
        x,
        labels,
        weights,
        relevant,
        positions=positions,
        dropout_key=dropout_key,
        step=step,
        placement=placement,
      )
    x = self.hidden(
      x,
      positions=positions,
      segment_ids=segment_ids,
      query_indices=query_indices,
      dropout_key=dropout_key,
      step=step,
      placement=placement,
    )
    if query_indices is not None:
      labels = take_queries(labels, query_indices)
      weights = jnp.where(
        query_indices < 0, 0, take_queries(weights, query_indices)
      )
    return self._sums(
      x, labels, weights, None if query_indices is not None else placement
    )

  def _sums(self, x, labels, weights, placement):
    sums = functools.partial(cross_entropy_sums, chunk=self.config.logits_chunk)
    if placement is not None:
      sums = placement.sum_over_tokens(sums)
    return sums(self.head_matrix(), x, labels, weights)

  def _gated_loss(
    self,
    x,
    labels,
    weights,
    relevant,
    *,
    positions,
    dropout_key,
    step,
    placement,
  ):
    """`loss` from embeddings on: the question ends at the first answer."""
    config = self.config.gate
    natural = lambda x: x
    if placement is not None:
      natural = placement.layout.restore
    labels, weights = natural(labels), natural(weights)
    run = functools.partial(self._run, dropout_key=dropout_key, step=step)
    x = run(range(config.after), x, positions=positions, placement=placement)
    key = dropout_key
    if key is not None:
      key = jax.random.fold_in(key, len(self.blocks))
    passed = self.gate(
      x, jnp.argmax(weights > 0, axis=1), key=key, placement=placement
    )
    x = run(
      range(config.after, len(self.blocks)),
      passed.x,
      placement=passed.placement,
    )
    labels, weights = passed.take(labels), passed.take(weights)
    out = self._sums(self.norm(x), labels, weights, passed.placement)
    if relevant is not None:
      out |= measure(passed, natural(relevant), config)
      out['auxiliary'] = config.labels * out['gate_loss']
    return out

  def embed(
    self,
    tokens: Int[Array, 'B T'],
    *,
    positions: Int[Array, '*B T'] | None = None,
    placement: Placement | None = None,
  ) -> Float[Array, 'B T D']:
    """Token embeddings, plus learned positions where the model has them."""
    x = self.embedding[...][tokens]
    if self.config.position_encoding == 'learned':
      T = tokens.shape[1] if placement is None else placement.layout.seq_len
      if positions is None:
        if self.config.max_positions < T:
          raise ValueError(
            f'{T} tokens need max_positions >= {T}, the model has '
            f'{self.config.max_positions}; learned positions do not extrapolate'
          )
        positions = true_positions(T, positions, placement)
      # Padding has positions beyond the table, and takes its last row.
      x = x + jnp.take(self.position_table[...], positions, 0, mode='clip')
    return (x * self.config.d_model**0.5).astype(self.config.dtype)

  def hidden(
    self,
    x: Float[Array, 'B T D'],
    *,
    positions: Int[Array, '*B T'] | None = None,
    segment_ids: Int[Array, 'B T'] | None = None,
    query_indices: Int[Array, 'B Q'] | None = None,
    dropout_key: Key[Array, ''] | None = None,
    step: Int[Array, ''] | int | None = None,
    placement: Placement | None = None,
  ) -> Float[Array, 'B Q D']:
    """The blocks and the final norm, from embeddings to the head's inputs.

    With `query_indices`, the last block gives its outputs at these places
    alone.

    Raises:
      NotImplementedError: the model has a gate.
    """
    if self.config.gate.keep:
      raise NotImplementedError(
        'a gate passes what one question needs, and most positions have no '
        'outputs: take `loss`, or `longctx.decoding.sampler`'
      )
    x = self._run(
      range(len(self.blocks)),
      x,
      positions=positions,
      segment_ids=segment_ids,
      query_indices=query_indices,
      dropout_key=dropout_key,
      step=step,
      placement=placement,
    )
    return self.norm(x)

  def _run(
    self,
    indices,
    x,
    *,
    positions=None,
    segment_ids=None,
    query_indices=None,
    dropout_key=None,
    step=None,
    placement=None,
  ):
    """Some of the blocks, one after the other."""
    for index in indices:
      block = self.blocks[index]
      # A module is no pytree in every mode of NNX; its split state always is.
      graph, state = nnx.split(block)
      wanted = query_indices if index == len(self.blocks) - 1 else None
      key = dropout_key
      if key is not None:
        key = jax.random.fold_in(key, index)

      def apply(state, x, graph=graph, wanted=wanted, key=key):
        block = nnx.merge(graph, state)
        return block(
          x,
          positions=positions,
          segment_ids=segment_ids,
          query_indices=wanted,
          dropout_key=key,
          step=step,
          placement=placement,
        )

      if self.config.remat != 'none':
        apply = jax.checkpoint(apply, policy=REMAT_POLICIES[self.config.remat])
      if placement is not None:
        x = jax.lax.with_sharding_constraint(x, placement.sharding)
      x = apply(state, x)
    return x

  def logits(self, x: Float[Array, 'B T D']) -> Float[Array, 'B T V']:
    """The head: float32 logits from the normed outputs of `hidden`."""
    return project(x, self.head_matrix())

  def state_bytes(self, seq_len: int, dtype: str = 'float32') -> int:
    """Bytes that decoding keeps for one sequence, all layers together."""
    gate, total = self.config.gate, 0
    for index, block in enumerate(self.blocks):
      above = gate.keep and index >= gate.after
      T = min(gate.num_kept, seq_len) if above else seq_len
      total += block.attention.state_bytes(T, dtype)
    if gate.keep:
      # The outputs that the gate chooses from.
      total += seq_len * self.config.d_model * jnp.dtype(dtype).itemsize
    return total

  def flops(self, seq_len: int) -> int:
    """FLOPs of the forward pass on one sequence, the head included."""
    config, gate, total = self.config, self.config.gate, 0
    above = min(gate.num_kept, seq_len) if gate.keep else seq_len
    for index, block in enumerate(self.blocks):
      T = seq_len if gate.keep and index < gate.after else above
      total += (
        block.attention.flops(T) + 4 * T * config.d_model * config.mlp_dim
      )
    if gate.keep:
      # The question's vector is projected, and meets every token.
      total += 2 * config.d_model * (seq_len + 2 * gate.width)
    return total + 2 * above * config.d_model * config.vocab_size

  def head_matrix(self) -> Float[Array, 'D V']:
    """From normed activations to logits: the embedding's transpose if tied."""
    if self.config.tied_head:
      return self.embedding[...].T
    return self.head[...]


def validate(
  config: TransformerConfig,
  seq_len: int,
  *,
  batch_size: int = 1,
  placement: Placement | None = None,
) -> None:
  """Traces the loss on `seq_len` tokens without compiling or computing.

  Args:
    config: with the vocabulary resolved.
    seq_len: tokens of a row.
    batch_size: rows.
    placement: where the tokens lie on a mesh.

  Raises:
    ValueError: for a wrong value.
    NotImplementedError: for a combination that is not supported.
  """
  if placement is not None:
    seq_len = placement.layout.padded_len

  def loss():
    model = Transformer(config, rngs=nnx.Rngs(0))
    tokens = jnp.zeros((batch_size, seq_len), jnp.int32)
    return model.loss(
      tokens,
      tokens,
      jnp.ones(tokens.shape),
      dropout_key=jax.random.key(0),
      placement=placement,
    )

  jax.eval_shape(loss)


def _norm(config: TransformerConfig, rngs: nnx.Rngs) -> nnx.RMSNorm:
  return nnx.RMSNorm(
    config.d_model,
    dtype=jnp.dtype(config.dtype),
    param_dtype=jnp.dtype(config.param_dtype),
    rngs=rngs,
  )
