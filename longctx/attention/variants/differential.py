"""Differential attention: the difference of two softmax attentions."""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx

from longctx import masks
from longctx.attention.base import QKV, Attention, AttentionConfig
from longctx.attention.context import Context
from longctx.ops.alibi import alibi_slopes
from longctx.typing import Array, Float, Fraction


class DifferentialAttention(Attention):
  """Differential attention: the difference of two softmax maps.

      out = (1 - λ₀) RMSNorm((softmax(q¹k¹ᵀ/√d) - λ softmax(q²k²ᵀ/√d)) v)
      λ = exp(λ_q1 · λ_k1) - exp(λ_q2 · λ_k2) + λ₀

  Both softmax over s ≤ t. Differential Transformer (arXiv:2410.05258): what two
  maps of a head have in common, noise spread over the context, cancels. A
  head's queries and keys are two of width d = H / 2 each, so that parameters
  and state are those of full attention; mixing costs (H + 2 V) / (H + V) times
  as much. λ is learned per layer, the norm is per head with a weight of V.

  Attributes:
    lambda_init: λ₀; the paper has 0.8 - 0.6 exp(-0.3 (l - 1)) in layer l = 1,
      2, ….
  """

  mask = masks.Causal()
  undecayed: ClassVar = ('lambda_q', 'lambda_k')

  def __init__(
    self,
    config: AttentionConfig,
    *,
    lambda_init: Fraction = 0.8,
    rngs: nnx.Rngs,
  ):
    even = 4 if config.position_encoding == 'rope' else 2
    if config.head_dim % even or config.value_dim % 2:
      raise ValueError(
        f'differential: head_dim={config.head_dim} must be a multiple of '
        f'{even} and value_dim={config.value_dim} of 2 to be halved'
      )
    # Twice the heads of half the width: the same projections, positions of
    # half a head, and the keys and values to keep.
    halves = dataclasses.replace(
      config,
      num_heads=2 * config.num_heads,
      num_kv_heads=2 * config.num_kv_heads,
      head_dim=config.head_dim // 2,
      value_dim=config.value_dim // 2,
    )
    super().__init__(halves, rngs=rngs)
    self.lambda_init = lambda_init
    self.group = config.num_heads // config.num_kv_heads
    normal = nnx.initializers.normal(0.1)
    param_dtype = jnp.dtype(config.param_dtype)
    self.lambda_q, self.lambda_k = (
      nnx.Param(normal(rngs.params(), (2, halves.head_dim), param_dtype))
      for _ in range(2)
    )
    self.head_norm = nnx.RMSNorm(
      config.value_dim,
      epsilon=1e-5,
      dtype=jnp.dtype(config.dtype),
      param_dtype=param_dtype,
      rngs=rngs,
    )

  def attend(self, qkv: QKV, context: Context) -> Float[Array, 'B Q n v']:
    """One attention with twice the heads; letters are those of the halves."""
    q, k, v, _ = qkv
    B, T, N, H = q.shape
    # Per key head both first maps' queries, then both second maps'.
    q = q.reshape(B, T, -1, self.group, 2, H).swapaxes(3, 4).reshape(q.shape)
    v = v.reshape(B, T, k.shape[2] // 2, -1)
    out = context.dot_product_attention(
      q, k, v, mask=self.mask, **self.logit_options()
    )
    wide = jnp.promote_types(out.dtype, jnp.float32)
    out = out.astype(wide)
    out = out.reshape(*out.shape[:2], -1, 2, self.group, out.shape[-1])
    out = out[:, :, :, 0] - self.weight_of_second(wide) * out[:, :, :, 1]
    return out.reshape(*out.shape[:2], N // 2, -1).astype(q.dtype)

  def weight_of_second(self, dtype) -> Float[Array, '']:
    """λ."""
    exponents = self.lambda_q[...].astype(dtype) * self.lambda_k[...]
    first, second = jnp.exp(exponents.sum(-1))
    return first - second + self.lambda_init

  def logit_options(self) -> dict[str, Any]:
    options = super().logit_options()
    if 'alibi_slopes' in options:
      # Both maps of a head fall with distance at one rate.
      slopes = alibi_slopes(self.config.num_heads // 2)
      slopes = jnp.repeat(slopes.reshape(-1, 1, self.group), 2, axis=1)
      options['alibi_slopes'] = slopes.reshape(-1)
    return options

  def output_transform(
    self, out: Float[Array, 'B Q n v'], x: Float[Array, 'B Q D']
  ) -> Float[Array, 'B Q n v']:
    return (1 - self.lambda_init) * self.head_norm(out)

  def mixing_flops(self, seq_len: int) -> int:
    # A map reads values of the whole head, twice as wide as the config says.
    config = self.config
    width = config.head_dim + 2 * config.value_dim
    pairs = self.mask.num_allowed(seq_len, seq_len)
    return 2 * config.num_heads * width * pairs
