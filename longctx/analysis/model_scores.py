"""All scores of a model in one pass over some tokens."""

from typing import Any

import jax
import jax.numpy as jnp

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
  *,
  segment_ids: Int[Array, 'B T'] | None = None,
  step: Int[Array, ''] | int | None = None,
  placement: Placement | None = None,
  epsilon: float = 0.3,
  with_logits: bool = True,
) -> tuple[Scores, Float[Array, 'B T D']]:
  """Sinks, spans and norms on any tokens.

  Args:
    model: layers that lack 'analysis' get norms alone.
    tokens: in natural order, one row after the other.
    segment_ids: documents packed into a row.
    step: of the training that made the parameters.
    placement: where to lay them on a mesh; None: on one device.
    epsilon: of the sink rate.
    with_logits: whether to look at softmax's scores too, see `logits`: as much
      time as the reference of attention takes.

  Returns:
    Per layer, what `heads.positions` asks, `logits.statistics` and `norms`; and
    the head's inputs, in the layout's order.
  """
  seq_len = tokens.shape[1]
  place = placer(placement)
  found: Scores = []
  tokens = place(tokens)
  if segment_ids is not None:
    segment_ids = place(segment_ids)
  options = dict(segment_ids=segment_ids, step=step, placement=placement)

  def hook(index, layer, h, x):
    del index
    context = hooks.make_context(layer, **options)
    at = jnp.atleast_2d(context.true_positions(h.shape[1]))
    real = jnp.broadcast_to(at < seq_len, h.shape[:2])
    scores = norms(layer, h, x, real, context)
    if 'analysis' not in layer.unsupported:
      question = heads.positions(
        real, context, seq_len=seq_len, epsilon=epsilon
      )
      scores |= heads.ask(layer, h, [question], context)
      if with_logits:
        scores |= logits.statistics(layer, h, real, context)
    found.append(scores)
    return layer(h, context)

  return found, hooks.run_with_hooks(model, tokens, hook, placement=placement)


def of_repeats(
  model: Transformer,
  tokens: Int[Array, 'B T'],
  classes: Int[Array, 'B T'],
  previous: Int[Array, 'B T'],
  seen: Any,
  symbols: Int[Array, ' C'],
  *,
  step: Int[Array, ''] | int | None = None,
  placement: Placement | None = None,
  width: int | None = None,
) -> Scores:
  """Prefix matching, copying and the like, on tokens that come again.

  Args:
    model: layers that lack 'analysis' get empty scores.
    tokens: in natural order, as all of `sequences.Sequences`.
    classes: of the tokens.
    previous: class of the token before.
    seen: whether the token came before.
    symbols: the token of each class.
    step: of the training that made the parameters.
    placement: where to lay them on a mesh; None: on one device.
    width: columns of a pass, see `probes.weighted_sums`.
  """
  seq_len, C = tokens.shape[1], symbols.shape[0]
  place = placer(placement)
  arrays = [place(y) for y in (tokens, classes, previous, seen)]
  found: Scores = []

  def hook(index, layer, h, x):
    del index, x
    context = hooks.make_context(layer, step=step, placement=placement)
    at = jnp.atleast_2d(context.true_positions(h.shape[1]))
    real = jnp.broadcast_to(at < seq_len, h.shape[:2])
    if 'analysis' in layer.unsupported:
      found.append({})
      return layer(h, context)
    placed = heads.Tokens(*arrays[1:], real=real)
    questions = [
      heads.prefixes(placed, C),
      heads.neighbours(placed, C, context),
    ]
    scores = heads.ask(layer, h, questions, context, width=width)
    out = layer.head_outputs(h, context)
    scores['copying'] = copying(model, layer, h, out, placed, symbols, context)
    found.append(scores)
    return layer.out(out.reshape(*out.shape[:2], -1))

  hooks.run_with_hooks(model, arrays[0], hook, placement=placement)
  return found


def copying(
  model: Transformer,
  layer: Attention,
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
  N = out.shape[2]
  kernel = layer.out.kernel[...].reshape(N, -1, h.shape[-1])
  scale = model.norm.scale[...]
  head = (scale[:, None] * model.head_matrix()).astype(jnp.float32)
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


def placer(placement: Placement | None):
  if placement is None:
    return jnp.asarray
  layout, sharding = placement.layout, placement.sharding
  return lambda y: jax.lax.with_sharding_constraint(
    layout.apply(jnp.asarray(y)), sharding
  )
