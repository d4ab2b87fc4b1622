"""The abstract attention layer: parameters, positions, one call into ops."""

import abc
import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import nnx

from longctx import masks
from longctx.ops.alibi import alibi_slopes
from longctx.ops.dot_product_attention import dot_product_attention
from longctx.ops.rope import apply_rope
from longctx.ops.short_conv import short_conv
from longctx.parallel import Placement
from longctx.typing import Array, Float, Int, Key, Shaped

POSITIONS = ('rope', 'alibi', 'learned', 'none')


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig:
  """What the attention layers of a model share.

  Attributes:
    d_model: width D of the residual stream.
    num_heads: query heads N.
    num_kv_heads: key and value heads K; divides N.
    head_dim: width H of a query or key head.
    value_dim: width V of a value head.
    positions: 'rope' (arXiv:2104.09864) rotates queries and keys, 'alibi'
      (arXiv:2108.12409) lowers logits by distance; 'learned' (added to the
      embeddings by the model) and 'none' leave the layer alone.
    rope_base: base of RoPE's geometric wavelengths.
    short_conv: width W of a causal depthwise convolution over queries, keys and
      values, each with its own; 0 for none.
    attention_dropout: share of the attention weights that training drops.
    dtype: of the computation; statistics and states are float32.
    param_dtype: of the parameters.
    implementation: of the op, by name; None takes the best that fits.
  """

  d_model: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  value_dim: int
  positions: str = 'rope'
  rope_base: float = 10000.0
  short_conv: int = 0
  attention_dropout: float = 0.0
  dtype: str = 'float32'
  param_dtype: str = 'float32'
  implementation: str | None = None

  def __post_init__(self):
    for name in (
      'd_model',
      'num_heads',
      'num_kv_heads',
      'head_dim',
      'value_dim',
    ):
      if getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)} must be at least 1')
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f'num_heads={self.num_heads} must be a multiple of '
        f'num_kv_heads={self.num_kv_heads}'
      )
    if self.positions not in POSITIONS:
      raise ValueError(
        f'unknown positions {self.positions!r}; known: {", ".join(POSITIONS)}'
      )
    if self.positions == 'rope' and self.head_dim % 2:
      raise ValueError(f'RoPE needs an even head_dim, got {self.head_dim}')
    if self.short_conv < 0:
      raise ValueError(f'short_conv={self.short_conv} must be at least 0')
    if not 0 <= self.attention_dropout < 1:
      raise ValueError(
        f'attention_dropout={self.attention_dropout} must be in [0, 1)'
      )


class Attention(nnx.Module, abc.ABC):
  """Projects to heads, mixes over positions, projects back.

  A variant is a final subclass that sets `mask`, and so is softmax attention
  under that mask, or overrides `mix`, `state_bytes` and `mixing_flops` with a
  recurrence.
  """

  mask: masks.Mask | None = None

  def __init__(self, config: AttentionConfig, *, rngs: nnx.Rngs):
    self.config = config
    N, K = config.num_heads, config.num_kv_heads
    H, V = config.head_dim, config.value_dim

    def linear(inputs, outputs):
      return nnx.Linear(
        inputs,
        outputs,
        use_bias=False,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        rngs=rngs,
      )

    self.query = linear(config.d_model, N * H)
    self.key = linear(config.d_model, K * H)
    self.value = linear(config.d_model, K * V)
    self.out = linear(N * V, config.d_model)
    if config.short_conv:
      self.query_conv = _conv_kernel(config, N * H, rngs)
      self.key_conv = _conv_kernel(config, K * H, rngs)
      self.value_conv = _conv_kernel(config, K * V, rngs)

  def __call__(
    self,
    x: Float[Array, 'B T D'],
    *,
    positions: Int[Array, '*B T'] | None = None,
    segment_ids: Int[Array, 'B T'] | None = None,
    read: Int[Array, 'B Q'] | None = None,
    dropout_key: Key[Array, ''] | None = None,
    placement: Placement | None = None,
  ) -> Float[Array, 'B Q D']:
    """Applies the layer.

    Args:
      x: inputs.
      positions: of the tokens; None means 0, 1, …, T - 1, which lets an
        implementation know the mask's blocks when it compiles.
      segment_ids: documents packed into a row; none reads another.
      read: places on the axis T whose outputs are wanted, see `take_read`; None
        means all, Q = T.
      dropout_key: of this layer and step; None drops nothing.
      placement: where the tokens lie on a mesh; None: all on one device. The
        axis T is then in the layout's order, and positions default to those.
    """
    config = self.config
    B, T, _ = x.shape
    q, k, v = self.query(x), self.key(x), self.value(x)
    if config.short_conv:
      q = _convolve(q, self.query_conv, segment_ids, placement)
      k = _convolve(k, self.key_conv, segment_ids, placement)
      v = _convolve(v, self.value_conv, segment_ids, placement)
    q = q.reshape(B, T, config.num_heads, config.head_dim)
    k = k.reshape(B, T, config.num_kv_heads, config.head_dim)
    v = v.reshape(B, T, config.num_kv_heads, config.value_dim)
    if config.positions == 'rope':
      angles_at = true_positions(T, positions, placement)
      q = apply_rope(q, angles_at, base=config.rope_base)
      k = apply_rope(k, angles_at, base=config.rope_base)
    out = self.mix(
      q,
      k,
      v,
      positions=positions,
      segment_ids=segment_ids,
      read=read,
      dropout_key=dropout_key,
      placement=placement,
    )
    return self.out(out.reshape(*out.shape[:2], -1))

  def mix(
    self,
    q: Float[Array, 'B T N H'],
    k: Float[Array, 'B T K H'],
    v: Float[Array, 'B T K V'],
    *,
    positions: Int[Array, '*B T'] | None,
    segment_ids: Int[Array, 'B T'] | None,
    read: Int[Array, 'B Q'] | None = None,
    dropout_key: Key[Array, ''] | None = None,
    placement: Placement | None = None,
  ) -> Float[Array, 'B Q N V']:
    """Mixes values over positions: softmax attention under `mask`."""
    config = self.config
    alibi = config.positions == 'alibi'
    q_positions = positions
    if read is not None:
      q_positions = true_positions(q.shape[1], positions, placement)
    dropout = None
    if dropout_key is not None and config.attention_dropout:
      dropout = (config.attention_dropout, dropout_key)
    attend = dot_product_attention
    if placement is not None:
      attend = placement.dot_product_attention
    return attend(
      take_read(q, read),
      k,
      v,
      mask=self.mask,
      q_positions=take_read(q_positions, read),
      k_positions=positions,
      q_segment_ids=take_read(segment_ids, read),
      k_segment_ids=segment_ids,
      alibi_slopes=alibi_slopes(config.num_heads) if alibi else None,
      dropout=dropout,
      implementation=config.implementation,
    )

  def state_bytes(self, seq_len: int, dtype: str) -> int:
    """Bytes that decoding keeps for one sequence of `seq_len` tokens.

    Args:
      seq_len: tokens read so far.
      dtype: of cached keys and values; recurrent states are float32.
    """
    config = self.config
    per_slot = config.num_kv_heads * (config.head_dim + config.value_dim)
    slots = self.mask.kv_slots(seq_len)
    return slots * per_slot * np.dtype(dtype).itemsize + self._tail_bytes(dtype)

  def flops(self, seq_len: int) -> int:
    """FLOPs of the forward pass on one sequence: projections and mixing."""
    config = self.config
    N, K = config.num_heads, config.num_kv_heads
    H, V = config.head_dim, config.value_dim
    channels = N * H + K * (H + V)
    projections = 2 * config.d_model * (channels + N * V)
    convolutions = 2 * config.short_conv * channels
    return seq_len * (projections + convolutions) + self.mixing_flops(seq_len)

  def mixing_flops(self, seq_len: int) -> int:
    """FLOPs of `mix` alone on one sequence, counting allowed pairs."""
    config = self.config
    width = config.head_dim + config.value_dim
    pairs = self.mask.num_allowed(seq_len, seq_len)
    return 2 * config.num_heads * width * pairs

  def _tail_bytes(self, dtype: str) -> int:
    """Bytes of the inputs that the short convolutions keep."""
    config = self.config
    heads = config.num_heads * config.head_dim
    heads += config.num_kv_heads * (config.head_dim + config.value_dim)
    return max(config.short_conv - 1, 0) * heads * np.dtype(dtype).itemsize


def true_positions(
  T: int, positions: Int[Array, '*B T'] | None, placement: Placement | None
) -> Int[Array, '*B T']:
  """Positions as an array, the natural ones of the layout by default."""
  if positions is not None:
    return positions
  if placement is not None:
    return jnp.asarray(placement.layout.order)
  return jnp.arange(T)


def take_read(
  x: Shaped[Array, 'B T ...'] | Shaped[Array, ' T'] | None,
  read: Int[Array, 'B Q'] | None,
) -> Shaped[Array, '...'] | None:
  """x at the places `read` of its axis T; all of x where `read` is None.

  A place of -1 stands for none: what is taken there, the last place, is for the
  caller to ignore.
  """
  if x is None or read is None:
    return x
  if x.ndim == 1:
    return x[read]
  return x[jnp.arange(x.shape[0])[:, None], read]


def _conv_kernel(
  config: AttentionConfig, channels: int, rngs: nnx.Rngs
) -> nnx.Param:
  """Taps uniform in ±1/√W: from the start some heads look one token back.

  A kernel that starts as the identity has to find the earlier taps by
  gradient, which delays retrieval by hundreds of steps.
  """
  uniform = nnx.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')
  shape = (config.short_conv, channels)
  param_dtype = jnp.dtype(config.param_dtype)
  return nnx.Param(uniform(rngs.params(), shape, param_dtype))


def _convolve(
  x: Float[Array, 'B T E'],
  kernel: nnx.Param,
  segment_ids: Int[Array, 'B T'] | None,
  placement: Placement | None,
) -> Float[Array, 'B T E']:
  kernel = kernel[...].astype(x.dtype)
  if placement is not None:
    return placement.short_conv(x, kernel, segment_ids=segment_ids)
  out, _ = short_conv(x, kernel, segment_ids=segment_ids)
  return out
