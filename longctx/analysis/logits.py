"""Attention logits and entropy of softmax layers, some rows at a time."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from longctx.analysis.probes import recast
from longctx.attention import Attention
from longctx.attention.context import Context
from longctx.ops.dot_product_attention import reference, resolve
from longctx.typing import Array, Bool, Float

# Scores that exist at one time.
SCORES = 1 << 24


@dataclasses.dataclass(frozen=True, kw_only=True)
class ListeningContext(Context):
  """A context that notes the calls of softmax attention.

  Attributes:
    calls: (arrays, options) of each.
  """

  calls: list[tuple[tuple[Array, ...], dict[str, Any]]]

  @property
  def softmax_op(self) -> Callable[..., Any]:
    op = super().softmax_op

    def listen(*arrays: Any, **call: Any) -> Any:
      self.calls.append((arrays, call))
      return op(*arrays, **call)

    return listen


def statistics(
  layer: Attention,
  x: Float[Array, 'B T D'],
  real: Bool[Array, 'B T'],
  context: Context,
) -> dict[str, Float[Array, ' N']]:
  """Entropy of the weights, and the largest logit, of a layer of softmax.

  By the equation of `ops.dot_product_attention`'s reference, a block of queries
  after the other. Sinks take probability and are no key: weights are normalized
  to one before their entropy is taken. The largest logit is that of softmax and
  softmax1, to which others have no counterpart.

  Args:
    layer: of any variant.
    x: its inputs.
    real: places that are no padding.
    context: where the tokens are.

  Returns:
    `entropy` (nats, mean over queries that read anything) and `max_logit`;
    nothing for layers that have a recurrence, or heads of more than one call.
  """
  listening = recast(context, ListeningContext, calls=[])
  qkv = layer.project(x, context)
  # Traced, and left out of the compiled program, as nothing asks for it.
  out = layer.attend(qkv, listening)
  if len(listening.calls) != 1 or layer.recurrence is not None:
    return {}
  if listening.calls[0][0][0].shape[2] != out.shape[2]:
    return {}
  (q, k, v), call = listening.calls[0]
  for option in ('return_lse', 'implementation'):
    call.pop(option, None)
  call['dropout'] = None
  at = jnp.atleast_2d(context.natural_positions(x.shape[1]))
  if call['k_positions'] is None:
    call['k_positions'] = at
  if call['q_positions'] is None:
    call['q_positions'] = at
  is_softmax = call.get('normalizer', 'softmax') in ('softmax', 'softmax1')
  found = _by_rows(q, k, v, call, real)
  return found if is_softmax else {'entropy': found['entropy']}


def _by_rows(q, k, v, call, real) -> dict[str, Float[Array, ' N']]:
  args = resolve(q, k, v, **call)
  # As wide as what stands in place of the products with values.
  v = jnp.zeros((*v.shape[:3], 2), jnp.float32)
  B, T, N, _ = q.shape
  rows = max(1, min(T, SCORES // (B * N * k.shape[1])))
  pad = -T % rows

  def blocks(y, fill=0):
    widths = [(0, 0), (0, pad)] + [(0, 0)] * (y.ndim - 2)
    y = jnp.pad(y, widths, constant_values=fill)
    return jnp.moveaxis(y.reshape(y.shape[0], -1, rows, *y.shape[2:]), 1, 0)

  def of_block(block):
    q, at, ids, ok = block
    out, lse = reference.dot_product_attention(
      q,
      k,
      v,
      args.with_indices(q_positions=at, q_segment_ids=ids),
      products=reference.PRODUCTS._replace(mix=_statistics),
    )
    entropy, largest = out[..., 0], out[..., 1]
    reads = ok[..., None] & (largest > 0)
    logit = jnp.where(reads, jnp.log(largest) + lse, -jnp.inf)
    entropy = jnp.where(reads, entropy, 0)
    return entropy.sum((0, 1)), reads.sum((0, 1)), logit.max((0, 1))

  ids = args.indices.q_segment_ids
  entropy, count, logit = jax.lax.map(
    of_block,
    (
      blocks(q.astype(jnp.float32)),
      blocks(args.indices.q_positions),
      None if ids is None else blocks(ids),
      blocks(jnp.broadcast_to(real, (B, T))),
    ),
  )
  return {
    'entropy': entropy.sum(0) / jnp.maximum(count.sum(0), 1),
    'max_logit': logit.max(0),
  }


def _statistics(
  weight: Float[Array, 'B N T S'], v: Float[Array, 'B S K 2']
) -> Float[Array, 'B T N 2']:
  """In place of a product with values: entropy and the largest weight."""
  del v
  total = weight.sum(-1)
  # Σ w log w of weights normalized to one, from those that are not.
  product = jnp.sum(jnp.where(weight > 0, weight * jnp.log(weight), 0), -1)
  some = jnp.where(total > 0, total, 1)
  entropy = jnp.log(some) - product / some
  out = jnp.stack([entropy, weight.max(-1)], axis=-1)
  return jnp.swapaxes(out, 1, 2)
