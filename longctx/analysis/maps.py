"""Attention maps of a model, pooled to the size of a picture."""

import jax
import jax.numpy as jnp

from longctx.analysis import hooks, model_scores
from longctx.analysis.probes import weighted_sums
from longctx.attention import Attention
from longctx.attention.context import Context
from longctx.models.transformer import Transformer
from longctx.typing import Array, Float, Int


def pooled_maps(
  model: Transformer,
  tokens: Int[Array, 'B T'],
  context: Context | None = None,
  *,
  size: int = 64,
) -> list[Float[Array, 'B N M M'] | None]:
  """The maps of every layer, None for layers that lack 'analysis'.

  Args:
    model: of any layers.
    tokens, context: as in `model_scores.of_sequences`.
    size: M, at most; fewer tokens make smaller maps.
  """
  place, context = model_scores.placed(context)
  options = {'seq_len': tokens.shape[1], 'size': size}
  found = []

  def hook(index, layer, h, x, context):
    del index, x
    has_map = 'analysis' not in layer.unsupported
    found.append(pooled_map(layer, h, context, **options) if has_map else None)
    return layer(h, context)

  hooks.run_with_hooks(model, place(tokens), hook, context)
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
  at = jnp.atleast_2d(context.natural_positions(x.shape[1]))
  # A layout's padding lies beyond the last block, where one_hot gives zeros.
  block = jax.nn.one_hot(at * M // seq_len, M)
  block = jnp.broadcast_to(block, (*x.shape[:2], M))
  # Sums of ones stay exact in any dtype; means of them would not.
  by_key = weighted_sums(layer, x, block, context)
  sums = jnp.einsum('BTQ,BTNS->BNQS', block, by_key)
  count = block.sum(1)
  return sums / (count[:, None, :, None] * count[:, None, None, :])
