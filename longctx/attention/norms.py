"""RMS norm, layer norm, gates and decays of recurrent layers.

Everything is computed in float32, or float64 where its input is.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longctx.attention.base import QKV, Attention, AttentionConfig, make_linear
from longctx.attention.context import Context
from longctx.typing import Array, Float, Key


def accum_dtype(x: Array) -> np.dtype:
  """What statistics and decays of x are computed in."""
  return jnp.promote_types(x.dtype, jnp.float32)


def l2_normalize(x: Float[Array, '*shape H']) -> Float[Array, '*shape H']:
  """x / |x| over the last axis, in the dtype of x; zero stays zero."""
  y = x.astype(accum_dtype(x))
  y *= jax.lax.rsqrt(jnp.sum(y**2, axis=-1, keepdims=True) + 1e-6)
  return y.astype(x.dtype)


def rms_norm(
  x: Float[Array, '*shape V'], *, eps: float = 1e-5
) -> Float[Array, '*shape V']:
  """x / √(mean(x²) + eps) over the last axis (arXiv:1910.07467)."""
  y = x.astype(accum_dtype(x))
  # What a state without a normaliser gives may be too large to be squared. The
  # result does not depend on `size`, nor then its gradient.
  size = jnp.max(jnp.abs(y), axis=-1, keepdims=True)
  size = jax.lax.stop_gradient(jnp.maximum(size, 1))
  y = y / size
  mean = jnp.mean(y**2, axis=-1, keepdims=True)
  return y * jax.lax.rsqrt(mean + eps / size**2)


def layer_norm(
  x: Float[Array, '*shape V'], *, eps: float = 1e-5
) -> Float[Array, '*shape V']:
  """The same without the mean: one group of a group norm, no parameters."""
  y = x.astype(accum_dtype(x))
  return rms_norm(y - jnp.mean(y, axis=-1, keepdims=True), eps=eps)


def low_rank(
  config: AttentionConfig,
  rank: int,
  outputs: int,
  *,
  use_bias: bool = False,
  rngs: nnx.Rngs,
) -> tuple[nnx.Linear, nnx.Linear]:
  """Two projections, D -> rank -> outputs, of which the second has a bias."""
  return (
    make_linear(config, config.d_model, rank, rngs=rngs),
    make_linear(config, rank, outputs, use_bias=use_bias, rngs=rngs),
  )


def softplus_decay(
  logits: Float[Array, 'B T *N'],
  bias: Float[Array, ' *N'],
  log_rate: Float[Array, '...'],
) -> tuple[Float[Array, 'B T *N'], Float[Array, 'B T *N']]:
  """(dt, log_decay) of Mamba-2: dt = softplus(logits + bias), -rate dt.

  Args:
    logits: from the layer's inputs.
    bias: see `initial_dt_bias`.
    log_rate: log of the rate, which broadcasts with `bias`.
  """
  dtype = accum_dtype(logits)
  dt = jax.nn.softplus(logits.astype(dtype) + bias.astype(dtype))
  return dt, -jnp.exp(log_rate.astype(dtype)) * dt


def delta_rule(
  layer: Attention,
  qkv: QKV,
  context: Context,
  *,
  log_decay: Float[Array, 'B T N *H'] | None = None,
) -> Float[Array, 'B Q N V']:
  """Mixes by the delta rule, q and k of length one and steps of σ(W_β x)."""
  q, k, v, x = qkv
  beta = jax.nn.sigmoid(layer.beta(x).astype(accum_dtype(x)))
  q, k = l2_normalize(q), l2_normalize(k)
  return context.recurrence(
    layer.recurrence, q, k, v, beta=beta, log_decay=log_decay
  )


def decay_parameters(
  config: AttentionConfig, size: int, *, low: float, rngs: nnx.Rngs
) -> tuple[nnx.Param, nnx.Param]:
  """(bias of `size`, log rates of heads) for `softplus_decay`, at first."""
  dtype = config.param_dtype
  return (
    nnx.Param(initial_dt_bias(rngs.params(), size, dtype)),
    nnx.Param(
      initial_log_rates(rngs.params(), config.num_heads, dtype, low=low)
    ),
  )


def initial_dt_bias(
  key: Key[Array, ''], size: int, dtype: str
) -> Float[Array, ' N']:
  """Biases with which softplus gives steps of 0.001 to 0.1, uniform in log."""
  low, high = np.log(0.001), np.log(0.1)
  dt = jnp.exp(jax.random.uniform(key, (size,), minval=low, maxval=high))
  return (dt + jnp.log(-jnp.expm1(-dt))).astype(dtype)


def initial_log_rates(
  key: Key[Array, ''], size: int, dtype: str, *, low: float
) -> Float[Array, ' N']:
  """Logarithms of decay rates between `low` and 16, uniform before the log."""
  rates = jax.random.uniform(key, (size,), minval=low, maxval=16.0)
  # Zero, which `low` may be, has no logarithm.
  return jnp.log(jnp.maximum(rates, 1e-4)).astype(dtype)
