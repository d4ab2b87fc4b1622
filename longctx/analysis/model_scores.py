"""Scores of all attention heads of a model, in one pass over some tokens."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from longctx.analysis import heads, hooks, logits
from longctx.attention import Attention
from longctx.attention.context import Context
from longctx.models.transformer import Transformer
from longctx.parallel import Placement
from longctx.typing import Array, Bool, Float, Int

Scores = list[dict[str, Array]]


def of_sequences(
  model: Transformer,
  tokens: Int[Array, 'B T'],
  context: Context | None = None,
  *,
  epsilon: float = 0.3,
  with_logits: bool = True,
) -> tuple[Scores, Float[Array, 'B T D']]:
  """Sinks, spans and norms on any tokens.

  Args:
    model: layers that lack 'analysis' get norms alone.
    tokens: in natural order, one row after the other.
    context: their documents, in that order too, the step of the training that
      made the parameters, and the mesh to lay them on.
    epsilon: of the sink rate.
    with_logits: whether to look at softmax's scores too, see `logits`: as much
      time as the reference of attention takes.

  Returns:
    Per layer, what `heads.positions` asks, `logits.statistics` and `norms`; and
    the head's inputs, in the layout's order.
  """
  place, context = placed(context)
  found: Scores = []
  options = {'seq_len': tokens.shape[1], 'epsilon': epsilon}

  def hook(index, layer, h, x, context):
    del index
    real = hooks.is_real(h, context)
    scores = norms(layer, h, x, real, context)
    if 'analysis' not in layer.unsupported:
      question = heads.positions(real, context, **options)
      scores |= heads.ask(layer, h, [question], context)
      if with_logits:
        scores |= logits.statistics(layer, h, real, context)
    found.append(scores)
    return layer(h, context)

  return found, hooks.run_with_hooks(model, place(tokens), hook, context)


def of_repeats(
  model: Transformer,
  tokens: Int[Array, 'B T'],
  classes: Int[Array, 'B T'],
  previous: Int[Array, 'B T'],
  seen: Any,
  symbols: Int[Array, ' C'],
  context: Context | None = None,
  *,
  width: int | None = None,
) -> Scores:
  """Prefix matching, copying and the like, on tokens that come again.

  Args:
    model: layers that lack 'analysis' get empty scores.
    tokens: in natural order, as all of `sequences.Sequences`.
    classes, previous, seen, symbols: as there.
    context: as in `of_sequences`.
    width: columns of a pass, see `probes.weighted_sums`.
  """
  C = symbols.shape[0]
  place, context = placed(context)
  arrays = [place(y) for y in (classes, previous, seen)]
  found: Scores = []

  def hook(index, layer, h, x, context):
    del x
    if 'analysis' in layer.unsupported:
      found.append({})
      return layer(h, context)
    marked = heads.Tokens(*arrays, real=hooks.is_real(h, context))
    questions = [
      heads.prefixes(marked, C),
      heads.neighbours(marked, C, context),
    ]
    scores = heads.ask(layer, h, questions, context, width=width)
    out = layer.head_outputs(h, context)
    scores['copying'] = copying(model, index, h, out, marked, symbols, context)
    found.append(scores)
    return hooks.join_heads(layer, out)

  hooks.run_with_hooks(model, place(tokens), hook, context)
  return found


def copying(
  model: Transformer,
  index: int,
  h: Float[Array, 'B T D'],
  out: Float[Array, 'B T N V'],
  tokens: heads.Tokens,
  symbols: Int[Array, ' C'],
  context: Context,
) -> Float[Array, ' N']:
  """Whether a head raises the logits of what it attends to, from -1 to 1.

  After Olsson et al. (arXiv:2209.11895): the head's output goes to the logits
  directly, past all later layers. Of what it raises above their mean, that of
  the tokens attended to, weighed by the attention and in units of the one that
  is raised most, is r, and the score 2 r - 1. (The paper divides by all that is
  raised, which grows with the vocabulary: heads that copy without an error then
  have negative scores in small models.) Attention that is negative counts as
  none.
  """
  N, layer = out.shape[2], model.blocks[index].attention
  kernel = layer.out.kernel[...].reshape(N, -1, h.shape[-1])
  head = readout(model, index)
  direct = jnp.einsum(
    'BTNV,NVD->BTND', out.astype(jnp.float32), kernel.astype(jnp.float32)
  )
  raised = jnp.einsum('BTND,DW->BTNW', direct, head)
  raised = jax.nn.relu(raised - raised.mean(-1, keepdims=True))
  C = symbols.shape[0]
  probes = jax.nn.one_hot(tokens.classes, C) * tokens.real[..., None]
  weight = jax.nn.relu(heads.weighted_sums(layer, h, probes, context))
  weight /= jnp.maximum(weight.sum(-1, keepdims=True), 1e-9)
  share = jnp.sum(weight * raised[..., symbols], -1)
  share /= jnp.maximum(raised.max(-1), 1e-9)
  asked = tokens.seen & tokens.real
  return 2 * heads.mean_over_queries(share, asked) - 1


def readout(model: Transformer, index: int) -> Float[Array, 'D V']:
  """Logits of what a layer adds to its inputs, but for the norms' sizes."""
  head = model.head_matrix().astype(jnp.float32)
  for norm in (model.norm, model.blocks[index].attention_out_norm):
    if norm is not None:
      head = norm.scale[...].astype(jnp.float32)[:, None] * head
    if isinstance(norm, nnx.LayerNorm):
      head = head - head.mean(0)
  return head


def norms(
  layer: Attention,
  h: Float[Array, 'B T D'],
  x: Float[Array, 'B T D'],
  real: Bool[Array, 'B T'],
  context: Context,
) -> dict[str, Float[Array, '...']]:
  """Sizes of keys, values and the residual stream: massive activations.

  Returns:
      key_norm, value_norm     [K], mean length of a token's vector
      first_key_norm, first_value_norm    [K], of the first token
      hidden_norm, first_hidden_norm      of the residual stream before it
      massive                  largest |activation| over the median one (Sun et
                               al., arXiv:2402.17762, call 1,000 massive)
  """
  at = jnp.atleast_2d(context.true_positions(h.shape[1]))
  first = real & (at == 0)
  qkv = layer.heads(h, context)
  found = {}
  for name, y in (('key', qkv.k), ('value', qkv.v), ('hidden', x[:, :, None])):
    length = jnp.linalg.norm(y.astype(jnp.float32), axis=-1)
    found[f'{name}_norm'] = heads.mean_over_queries(length, real)
    found[f'first_{name}_norm'] = heads.mean_over_queries(length, first)
  size = jnp.abs(x.astype(jnp.float32)) * real[..., None]
  found['hidden_norm'] = found['hidden_norm'][0]
  found['first_hidden_norm'] = found['first_hidden_norm'][0]
  found['massive'] = size.max() / jnp.maximum(_middle(size, real), 1e-9)
  return found


def _middle(
  size: Float[Array, 'B T D'], real: Bool[Array, 'B T']
) -> Float[Array, '']:
  """The median, of at most 65,536 activations spread over all."""
  flat = jnp.where(real[..., None], size, jnp.nan).reshape(-1)
  return jnp.nanmedian(flat[:: max(1, flat.size // 65536)])


def placed(
  context: Context | None,
) -> tuple[Callable[..., Array], Context]:
  """(lays arrays of natural order out, the context with its documents so)."""
  context = context or Context()
  place = placer(context.placement)
  if context.segment_ids is not None:
    ids = context.segment_ids
    # Padding is a document of its own.
    context = context.replace(segment_ids=place(ids, fill=ids.max() + 1))
  return place, context


def placer(placement: Placement | None):
  if placement is None:
    return lambda y, fill=0: jnp.asarray(y)
  return lambda y, fill=0: placement.into_layout(jnp.asarray(y), fill=fill)
