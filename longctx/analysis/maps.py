"""Attention maps of a model, pooled to the size of a picture."""

import jax
import jax.numpy as jnp

from longctx.analysis import hooks, model_scores
from longctx.analysis.probes import weighted_sums
from longctx.attention import Attention
from longctx.attention.context import Context
from longctx.models.transformer import Transformer
from longctx.parallel import Placement
from longctx.typing import Array, Float, Int


def pooled_maps(
  model: Transformer,
  tokens: Int[Array, 'B T'],
  *,
  size: int = 64,
  segment_ids: Int[Array, 'B T'] | None = None,
  step: Int[Array, ''] | int | None = None,
  placement: Placement | None = None,
) -> list[Float[Array, 'B N M M'] | None]:
  """The maps of every layer, None for layers that lack 'analysis'.

  Args:
    model: of any layers.
    tokens: in natural order, one row after the other.
    size: M, at most; fewer tokens make smaller maps.
    segment_ids: documents packed into a row.
    step: of the training that made the parameters.
    placement: where to lay them on a mesh; None: on one device.
  """
  seq_len = tokens.shape[1]
  place = model_scores.placer(placement)
  if segment_ids is not None:
    segment_ids = place(segment_ids)
  found = []

  def hook(index, layer, h, x):
    del index, x
    context = hooks.make_context(
      layer, segment_ids=segment_ids, step=step, placement=placement
    )
    pooled = None
    if 'analysis' not in layer.unsupported:
      pooled = pooled_map(layer, h, context, seq_len=seq_len, size=size)
    found.append(pooled)
    return layer(h, context)

  hooks.run_with_hooks(model, place(tokens), hook, placement=placement)
  return found


def pooled_map(
  layer: Attention,
  x: Float[Array, 'B T D'],
  context: Context,
  *,
  seq_len: int,
  size: int = 64,
) -> Float[Array, 'B N M M']:
  """The mean of A over blocks of queries and blocks of keys.

  Keys are pooled by the layer itself, whose values say which block a token is
  in; T x M numbers per head are the most that exist. A causal layer's blocks on
  the diagonal count the pairs that it cannot see as zeros.

  Args:
    layer: of any variant that has 'analysis'.
    x: its inputs.
    context: where the tokens are.
    seq_len: of a row, without a layout's padding.
    size: M, at most.
  """
  M = min(size, seq_len)
  at = jnp.atleast_2d(context.true_positions(x.shape[1]))
  # A layout's padding lies beyond the last block, where one_hot gives zeros.
  block = jax.nn.one_hot(at * M // seq_len, M)
  block = jnp.broadcast_to(block, (*x.shape[:2], M))
  # Sums of ones stay exact in any dtype; means of them would not.
  by_key = weighted_sums(layer, x, block, context)
  sums = jnp.einsum('BTQ,BTNS->BNQS', block, by_key)
  count = block.sum(1)
  return sums / (count[:, None, :, None] * count[:, None, None, :])
