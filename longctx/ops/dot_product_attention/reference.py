"""Dot-product attention as its equation: the oracle."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from longctx.masks import Mask
from longctx.ops.dot_product_attention.dropout import Dropout, keep_factor
from longctx.ops.dot_product_attention.normalizers import Normalizer
from longctx.ops.dot_product_attention.tiling import BlockSizes
from longctx.typing import Array, Float, Int


class Products(NamedTuple):
  """The two products of attention.

  Attributes:
    scores: (q [B, T, N, H], k [B, S, K, H]) -> q · k [B, N, T, S].
    mix: (weight [B, N, T, S], v [B, S, K, V]) -> Σ_s weight v [B, T, N, V].
  """

  scores: Callable[[Array, Array], Array]
  mix: Callable[[Array, Array], Array]


def _scores(
  q: Float[Array, 'B T N H'], k: Float[Array, 'B S K H']
) -> Float[Array, 'B N T S']:
  k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
  return jnp.einsum('BTNH,BSNH->BNTS', q, k)


def _mix(
  weight: Float[Array, 'B N T S'], v: Float[Array, 'B S K V']
) -> Float[Array, 'B T N V']:
  v = jnp.repeat(v, weight.shape[1] // v.shape[2], axis=2)
  return jnp.einsum('BNTS,BSNV->BTNV', weight, v)


PRODUCTS = Products(_scores, _mix)


def dot_product_attention(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K V'],
  *,
  mask: Mask,
  q_positions: Int[Array, 'Bq T'] | None,
  k_positions: Int[Array, 'Bk S'] | None,
  q_segment_ids: Int[Array, 'B T'] | None,
  k_segment_ids: Int[Array, 'B S'] | None,
  scale: float,
  logits_soft_cap: float | None,
  sink_logits: Float[Array, ' N'] | None,
  alibi_slopes: Float[Array, ' N'] | None,
  normalizer: Normalizer,
  dropout: Dropout | None,
  block_sizes: BlockSizes | None,
  products: Products = PRODUCTS,
) -> tuple[Float[Array, 'B T N V'], Float[Array, 'B T N']]:
  """The sum over the allowed keys, with every score held: memory B N T S.

    z_ts = cap tanh(scale q_t · k_s / cap) - slope |pos_t - pos_s|
    D_t = exp(sink) + Σ_s d(z_ts)            out_t = Σ_s w(z_ts) v_s / D_t

  with w and d of the normalizer, exp(z) both for the softmax.

  Arguments and errors are those of `longctx.ops.dot_product_attention`, with
  the defaults filled in and positions given a batch axis of B or 1.

  Args:
    products: how the two products are computed.

  Returns:
    out in the dtype of q, lse = log D in float32 (float64 for float64 inputs).
  """
  del block_sizes
  B, T, N, _ = q.shape
  S = k.shape[1]
  dtype = jnp.promote_types(q.dtype, jnp.float32)
  q_pos = jnp.arange(T)[None] if q_positions is None else q_positions
  k_pos = jnp.arange(S)[None] if k_positions is None else k_positions
  q_pos, k_pos = q_pos[:, None, :, None], k_pos[:, None, None, :]

  z = products.scores(q.astype(dtype), k.astype(dtype)) * scale
  if logits_soft_cap is not None:
    z = logits_soft_cap * jnp.tanh(z / logits_soft_cap)
  if alibi_slopes is not None:
    z = z - alibi_slopes[:, None, None] * abs(q_pos - k_pos)
  ok, segment = mask.allowed(q_pos, k_pos), None
  if q_segment_ids is not None:
    segment = q_segment_ids[:, None, :, None]
    ok &= segment == k_segment_ids[:, None, None, :]
  z = jnp.where(ok, z, -jnp.inf)

  sink = jnp.full(N, -jnp.inf) if sink_logits is None else sink_logits
  sink = sink.astype(dtype)[:, None, None]
  peak = jnp.zeros_like(z[..., :1])
  if normalizer.least_peak is not None:
    # It is finite, which keeps z - peak defined in a row without keys.
    peak = z.max(-1, keepdims=True, initial=normalizer.least_peak)
    peak = jax.lax.stop_gradient(jnp.maximum(peak, sink))
  terms = normalizer.terms(z, peak)
  weight = terms.weight
  total = terms.term.sum(-1, keepdims=True) + jnp.exp(sink - peak)
  some = total > 0
  total = jnp.where(some, total, 1)
  lse = jnp.where(some, peak + jnp.log(total), -jnp.inf)
  if dropout is not None:
    batch, head = jnp.arange(B)[:, None, None, None], jnp.arange(N)
    weight *= keep_factor(
      dropout,
      batch=batch,
      head=head[:, None, None],
      segment=segment,
      q_positions=q_pos,
      k_positions=k_pos,
    )
  out = products.mix(weight / total, v.astype(dtype))
  return out.astype(q.dtype), lse[..., 0].swapaxes(1, 2)
