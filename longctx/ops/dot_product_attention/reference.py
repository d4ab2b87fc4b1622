"""Reference attention: the equation, as an oracle for the others."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from longctx.ops.dot_product_attention.args import AttentionArgs, OutLse
from longctx.ops.dot_product_attention.dropout import keep_factor
from longctx.typing import Array, Float


class AttentionProducts(NamedTuple):
  """Matrix products of attention, with queries and with values.

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


PRODUCTS = AttentionProducts(_scores, _mix)


def dot_product_attention(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K V'],
  args: AttentionArgs,
  *,
  products: AttentionProducts = PRODUCTS,
) -> OutLse:
  """The sum over the allowed keys, with every score held: memory B N T S.

    z_ts = cap tanh(scale q_t · k_s / cap) - slope |pos_t - pos_s|
    D_t = exp(sink) + Σ_s d(z_ts)            out_t = Σ_s w(z_ts) v_s / D_t

  with w and d of the normalizer, exp(z) both for the softmax.

  Args:
    q: queries.
    k: keys.
    v: values.
    args: from `resolve`.
    products: how the two products are computed.

  Returns:
    out in the dtype of q, lse = log D in float32 (float64 for float64 inputs).
  """
  static, indices, dropout = args.static, args.indices, args.dropout
  B, T, N, _ = q.shape
  S = k.shape[1]
  dtype = jnp.promote_types(q.dtype, jnp.float32)
  q_pos, k_pos, q_segment_ids, k_segment_ids = indices
  q_pos = jnp.arange(T)[None] if q_pos is None else q_pos
  k_pos = jnp.arange(S)[None] if k_pos is None else k_pos
  q_pos, k_pos = q_pos[:, None, :, None], k_pos[:, None, None, :]

  z = products.scores(q.astype(dtype), k.astype(dtype)) * static.scale
  if static.logits_soft_cap is not None:
    z = static.logits_soft_cap * jnp.tanh(z / static.logits_soft_cap)
  if args.alibi_slopes is not None:
    z = z - args.alibi_slopes[:, None, None] * abs(q_pos - k_pos)
  ok, segment = static.mask.allowed(q_pos, k_pos), None
  if q_segment_ids is not None:
    segment = q_segment_ids[:, None, :, None]
    ok &= segment == k_segment_ids[:, None, None, :]
  z = jnp.where(ok, z, -jnp.inf)

  sink = jnp.full(N, -jnp.inf) if args.sink_logits is None else args.sink_logits
  sink = sink.astype(dtype)[:, None, None]
  row_max, least = jnp.zeros_like(z[..., :1]), static.normalizer.least_row_max
  if least is not None:
    # It is finite, which keeps z - row_max defined in a row without keys.
    row_max = z.max(-1, keepdims=True, initial=least)
    row_max = jax.lax.stop_gradient(jnp.maximum(row_max, sink))
  terms = static.normalizer.terms(z, row_max)
  weight = terms.weight
  row_sum = terms.term.sum(-1, keepdims=True) + jnp.exp(sink - row_max)
  some = row_sum > 0
  row_sum = jnp.where(some, row_sum, 1)
  lse = jnp.where(some, row_max + jnp.log(row_sum), -jnp.inf)
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
  out = products.mix(weight / row_sum, v.astype(dtype))
  return out.astype(q.dtype), lse[..., 0].swapaxes(1, 2)
