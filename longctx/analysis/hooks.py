"""Forward hooks at every attention layer of a model, and head ablation."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from longctx.attention import Attention
from longctx.attention.context import Context
from longctx.models.transformer import Transformer
from longctx.ops.cross_entropy import project
from longctx.parallel import Placement
from longctx.typing import Array, Float, Int

# (layer's index, layer, its inputs, the residual stream) -> its outputs.
Hook = Callable[[int, Attention, Array, Array], Array]


def make_context(
  layer: Attention,
  *,
  segment_ids: Int[Array, 'B T'] | None = None,
  step: Int[Array, ''] | int | None = None,
  placement: Placement | None = None,
) -> Context:
  """Where a layer's tokens are, with what its config sets."""
  return layer.bind(
    Context(segment_ids=segment_ids, step=step, placement=placement)
  )


def run_with_hooks(
  model: Transformer,
  tokens: Int[Array, 'B T'],
  hook: Hook,
  *,
  placement: Placement | None = None,
) -> Float[Array, 'B T D']:
  """Runs a model, its attention layers by `hook`; the head's inputs.

  Args:
    model: of any layers.
    tokens: in the layout's order, where there is one.
    hook: stands in place of each attention layer.
    placement: where the tokens lie on a mesh; None: all on one device.

  Raises:
    NotImplementedError: the model has a gate.
  """
  if model.is_gated:
    raise NotImplementedError(
      'analysis walks through all tokens, and a gate lets few of them pass: '
      'take gate.keep=0'
    )
  context = Context(placement=placement)
  x = model.embed(tokens, context)
  for index, block in enumerate(model.blocks):
    if placement is not None:
      x = jax.lax.with_sharding_constraint(x, placement.sharding)

    def attention(h, context, index=index, block=block, x=x):
      del context
      return hook(index, block.attention, h, x)

    x = block(x, context, attention=attention)
  return model.norm(x)


def ablate_heads(
  model: Transformer,
  tokens: Int[Array, 'B T'],
  gates: Sequence[Float[Array, ' _']],
  means: Sequence[Float[Array, '_ _']] | None = None,
  *,
  segment_ids: Int[Array, 'B T'] | None = None,
  step: Int[Array, ''] | int | None = None,
  placement: Placement | None = None,
) -> Float[Array, 'B T D']:
  """The head's inputs of a model some of whose heads are silent.

  Args:
    model: of any layers.
    tokens: in the layout's order, where there is one.
    gates: per layer, 1 for a head that speaks and 0 for one that does not.
    means: per layer, what a silent head says everywhere, see `head_means`; None
      for zeros.
    segment_ids: documents packed into a row.
    step: of the training that made the parameters.
    placement: where the tokens lie on a mesh.
  """

  def hook(index, layer, h, x):
    del x
    context = make_context(
      layer, segment_ids=segment_ids, step=step, placement=placement
    )
    out = layer.head_outputs(h, context)
    gate = gates[index][:, None].astype(out.dtype)
    instead = 0 if means is None else means[index].astype(out.dtype)
    out = gate * out + (1 - gate) * instead
    return layer.out(out.reshape(*out.shape[:2], -1))

  return run_with_hooks(model, tokens, hook, placement=placement)


def head_means(
  model: Transformer, tokens: Int[Array, 'B T'], **options: Any
) -> list[Float[Array, '_ _']]:
  """What each head says on average over some tokens, for `ablate_heads`."""
  means = []

  def hook(index, layer, h, x):
    del index, x
    out = layer.head_outputs(h, make_context(layer, **options))
    where = real[:, :, None, None]
    means.append(out.astype(jnp.float32).mean((0, 1), where=where))
    return layer.out(out.reshape(*out.shape[:2], -1))

  placement = options.get('placement')
  real = jnp.ones(tokens.shape, bool)
  if placement is not None:
    # Padding stands behind the tokens.
    at = jnp.asarray(placement.layout.order)
    real = jnp.broadcast_to(at < placement.layout.seq_len, tokens.shape)
  run_with_hooks(model, tokens, hook, placement=placement)
  return means


def token_losses(
  model: Transformer,
  hidden: Float[Array, 'B T D'],
  labels: Int[Array, 'B T'],
) -> Float[Array, 'B T']:
  """Nats of each label, logits being made `logits_chunk` places at a time."""
  head = model.head_matrix()
  B, T, D = hidden.shape
  C = min(model.config.logits_chunk, T)
  pad = -T % C

  def of_chunk(chunk):
    x, labels = chunk
    logits = project(x, head)
    picked = jnp.take_along_axis(logits, labels[..., None], -1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked

  x = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0))).reshape(B, -1, C, D)
  labels = jnp.pad(labels, ((0, 0), (0, pad))).reshape(B, -1, C)
  chunks = (jnp.moveaxis(x, 1, 0), jnp.moveaxis(labels, 1, 0))
  losses = jnp.moveaxis(jax.lax.map(of_chunk, chunks), 0, 1)
  return losses.reshape(B, -1)[:, :T]
