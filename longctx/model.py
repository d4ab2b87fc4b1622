"""A decoder-only transformer from a pattern of attention layers."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from longctx.attention import (
  AttentionConfig,
  make_attention,
  take_read,
  true_positions,
)
from longctx.ops.cross_entropy import cross_entropy_sums, project
from longctx.parallel import Placement
from longctx.typing import Array, Float, Int, Key

DTYPES = ('float32', 'bfloat16', 'float64')

# What a block keeps for its backward pass, by name. The attention op keeps its
# own inputs and outputs in any case but 'full'.
REMAT_POLICIES = {
  'none': None,
  'full': jax.checkpoint_policies.nothing_saveable,
  'dots': jax.checkpoint_policies.dots_saveable,
  'dots_no_batch': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
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
    positions: 'rope', 'alibi', 'learned' or 'none'.
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
  """

  vocab_size: int | None = None
  layers: tuple[str, ...] = ('full', 'full')
  d_model: int = 64
  num_heads: int = 4
  num_kv_heads: int | None = None
  head_dim: int | None = None
  value_dim: int | None = None
  mlp_dim: int = 0
  positions: str = 'rope'
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
      positions=self.positions,
      rope_base=self.rope_base,
      short_conv=self.short_conv,
      attention_dropout=self.attention_dropout,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      implementation=self.implementation,
    )


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
    read: Int[Array, 'B Q'] | None = None,
    dropout_key: Key[Array, ''] | None = None,
    step: Int[Array, ''] | int | None = None,
    placement: Placement | None = None,
  ) -> Float[Array, 'B Q D']:
    attend = functools.partial(
      self.attention,
      positions=positions,
      segment_ids=segment_ids,
      read=read,
      dropout_key=dropout_key,
      step=step,
      placement=placement,
    )
    return self.around(attend, x, read=read)

  def around(
    self,
    attend: Callable[[Float[Array, 'B T D']], Float[Array, 'B Q D']],
    x: Float[Array, 'B T D'],
    *,
    read: Int[Array, 'B Q'] | None = None,
  ) -> Float[Array, 'B Q D']:
    """What surrounds the attention layer, in place of which `attend` stands."""
    x = take_read(x, read) + attend(self.attention_norm(x))
    if self.has_mlp:
      x = x + self.mlp(self.mlp_norm(x))
    return x


class Transformer(nnx.Module):
  """Embedding, a block per layer of the pattern, a norm and a head.

  Pre-norm with RMSNorm (arXiv:1910.07467). All state is `nnx.Param`.
  """

  def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
    _check(config)
    self.config = config
    # Rows of norm one: multiplied by √D they enter the residual stream with
    # unit variance, and as a tied head they give logits of unit variance.
    normal = nnx.initializers.normal(config.d_model**-0.5)
    shape = (config.vocab_size, config.d_model)
    param_dtype = jnp.dtype(config.param_dtype)
    self.embedding = nnx.Param(normal(rngs.params(), shape, param_dtype))
    if config.positions == 'learned':
      shape = (config.max_positions, config.d_model)
      self.position_table = nnx.Param(normal(rngs.params(), shape, param_dtype))
    self.blocks = nnx.List(
      [Block(layer, config, rngs=rngs) for layer in config.layers]
    )
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
    read: Int[Array, 'B Q'] | None = None,
    dropout_key: Key[Array, ''] | None = None,
    step: Int[Array, ''] | int | None = None,
    placement: Placement | None = None,
  ) -> dict[str, Float[Array, '']]:
    """Weighted sums over the batch: `loss` (nats), `weight` and `correct`.

    Logits are made `logits_chunk` positions at a time, forward and backward, so
    that [T, V] never exists at once.

    Args:
      tokens: token ids.
      labels: what the logits at each position should predict.
      weights: weight of each position in the sums; 0 where nothing is scored.
      positions: as in `__call__`.
      segment_ids: as in `__call__`.
      read: the only places that are scored, each once, on the axis T; -1 stands
        for none. The last block, the norm and the head are computed there
        alone, which changes no sum if weights are 0 elsewhere.
      dropout_key: of this step; None drops nothing.
      step: of training, counted from 1; None before and without training.
      placement: where the tokens lie on a mesh, all arrays in its layout's
        order; None: on one device.
    """
    x = self.embed(tokens, positions=positions, placement=placement)
    x = self.hidden(
      x,
      positions=positions,
      segment_ids=segment_ids,
      read=read,
      dropout_key=dropout_key,
      step=step,
      placement=placement,
    )
    if read is not None:
      labels = take_read(labels, read)
      weights = jnp.where(read < 0, 0, take_read(weights, read))
    sums = functools.partial(cross_entropy_sums, chunk=self.config.logits_chunk)
    if placement is not None and read is None:
      sums = placement.sum_over_tokens(sums)
    return sums(self.head_matrix(), x, labels, weights)

  def embed(
    self,
    tokens: Int[Array, 'B T'],
    *,
    positions: Int[Array, '*B T'] | None = None,
    placement: Placement | None = None,
  ) -> Float[Array, 'B T D']:
    """Token embeddings, plus learned positions where the model has them."""
    x = self.embedding[...][tokens]
    if self.config.positions == 'learned':
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
    read: Int[Array, 'B Q'] | None = None,
    dropout_key: Key[Array, ''] | None = None,
    step: Int[Array, ''] | int | None = None,
    placement: Placement | None = None,
  ) -> Float[Array, 'B Q D']:
    """The blocks and the final norm, from embeddings to the head's inputs.

    With `read`, the last block gives its outputs at these places alone.
    """
    for index, block in enumerate(self.blocks):
      # A module is no pytree in every mode of NNX; its split state always is.
      graph, state = nnx.split(block)
      wanted = read if index == len(self.blocks) - 1 else None
      key = dropout_key
      if key is not None:
        key = jax.random.fold_in(key, index)

      def apply(state, x, graph=graph, wanted=wanted, key=key):
        block = nnx.merge(graph, state)
        return block(
          x,
          positions=positions,
          segment_ids=segment_ids,
          read=wanted,
          dropout_key=key,
          step=step,
          placement=placement,
        )

      if self.config.remat != 'none':
        apply = jax.checkpoint(apply, policy=REMAT_POLICIES[self.config.remat])
      if placement is not None:
        x = jax.lax.with_sharding_constraint(x, placement.sharding)
      x = apply(state, x)
    return self.norm(x)

  def logits(self, x: Float[Array, 'B T D']) -> Float[Array, 'B T V']:
    """The head: float32 logits from the normed outputs of `hidden`."""
    return project(x, self.head_matrix())

  def state_bytes(self, seq_len: int, dtype: str = 'float32') -> int:
    """Bytes that decoding keeps for one sequence, all layers together."""
    layers = [block.attention for block in self.blocks]
    return sum(layer.state_bytes(seq_len, dtype) for layer in layers)

  def flops(self, seq_len: int) -> int:
    """FLOPs of the forward pass on one sequence, the head included."""
    config = self.config
    head = 2 * seq_len * config.d_model * config.vocab_size
    mlp = 4 * seq_len * config.d_model * config.mlp_dim
    layers = [block.attention for block in self.blocks]
    return head + sum(layer.flops(seq_len) + mlp for layer in layers)

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


def _check(config: TransformerConfig) -> None:
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
  if config.remat not in REMAT_POLICIES:
    raise ValueError(
      f'unknown remat {config.remat!r}; known: {", ".join(REMAT_POLICIES)}'
    )
  for name in ('dtype', 'param_dtype'):
    if getattr(config, name) not in DTYPES:
      raise ValueError(
        f'unknown {name} {getattr(config, name)!r}; known: {", ".join(DTYPES)}'
      )
  if config.positions == 'learned' and not config.max_positions:
    raise ValueError(
      "positions='learned' needs max_positions, the longest sequence"
    )


def _norm(config: TransformerConfig, rngs: nnx.Rngs) -> nnx.RMSNorm:
  return nnx.RMSNorm(
    config.d_model,
    dtype=jnp.dtype(config.dtype),
    param_dtype=jnp.dtype(config.param_dtype),
    rngs=rngs,
  )
