"""Forward hooks at every attention layer of a model, and head ablation."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from longctx.attention import Attention
from longctx.attention.context import Context
from longctx.models.transformer import Transformer
from longctx.typing import Array, Bool, Float, Int

# (layer's index, layer, its inputs, the residual stream, the context as the
# layer takes it) -> its outputs.
Hook = Callable[[int, Attention, Array, Array, Context], Array]


def run_with_hooks(
  model: Transformer,
  tokens: Int[Array, 'B T'],
  hook: Hook,
  context: Context | None = None,
) -> Float[Array, 'B T D']:
  """Runs a model, its attention layers by `hook`; the head's inputs.

  Args:
    model: of any layers.
    tokens: in the layout's order, where there is one.
    hook: stands in place of each attention layer.
    context: where the tokens are; None: in one document on one device.

  Raises:
    NotImplementedError: the model has a gate.
  """
  if model.is_gated:
    raise NotImplementedError(
      'analysis walks through all tokens, and a gate lets few of them pass: '
      'take gate.keep=0'
    )
  context = context or Context()
  placement = context.placement
  x = model.embed(tokens, context)
  for index, block in enumerate(model.blocks):
    if placement is not None:
      x = jax.lax.with_sharding_constraint(x, placement.sharding)

    def attention(h, context, index=index, layer=block.attention, x=x):
      return hook(index, layer, h, x, layer.bind(context))

    x = block(x, context, attention=attention)
  return model.norm(x)


def is_real(x: Float[Array, 'B T ...'], context: Context) -> Bool[Array, 'B T']:
  """False at a layout's padding, which stands behind the tokens."""
  T = x.shape[1]
  at = jnp.atleast_2d(context.natural_positions(T))
  if context.placement is not None:
    T = context.placement.layout.seq_len
  return jnp.broadcast_to(at < T, x.shape[:2])


def join_heads(
  layer: Attention, out: Float[Array, 'B T N V']
) -> Float[Array, 'B T D']:
  """What a layer makes of the outputs of its heads."""
  return layer.out(out.reshape(*out.shape[:2], -1))


def ablate_heads(
  model: Transformer,
  tokens: Int[Array, 'B T'],
  gates: Sequence[Float[Array, ' _']],
  means: Sequence[Float[Array, '_ _']] | None = None,
  context: Context | None = None,
) -> Float[Array, 'B T D']:
  """`run_with_hooks` of a model some of whose heads are silent.

  Args:
    model, tokens, context: as in `run_with_hooks`.
    gates: per layer, 1 for a head that speaks and 0 for one that does not.
    means: per layer, what a silent head says everywhere, see `head_means`; None
      for zeros.
  """

  def hook(index, layer, h, x, context):
    del x
    out = layer.head_outputs(h, context)
    gate = gates[index][:, None].astype(out.dtype)
    instead = 0 if means is None else means[index].astype(out.dtype)
    return join_heads(layer, gate * out + (1 - gate) * instead)

  return run_with_hooks(model, tokens, hook, context)


def head_means(
  model: Transformer,
  tokens: Int[Array, 'B T'],
  context: Context | None = None,
) -> list[Float[Array, '_ _']]:
  """What each head says on average over some tokens, for `ablate_heads`."""
  means = []

  def hook(index, layer, h, x, context):
    del index, x
    out = layer.head_outputs(h, context)
    where = is_real(h, context)[:, :, None, None]
    means.append(out.astype(jnp.float32).mean((0, 1), where=where))
    return join_heads(layer, out)

  run_with_hooks(model, tokens, hook, context)
  return means


def token_losses(
  model: Transformer,
  hidden: Float[Array, 'B T D'],
  labels: Int[Array, 'B T'],
) -> Float[Array, 'B T']:
  """Nats of each label, logits being made `logits_chunk` places at a time."""
  B, T, D = hidden.shape
  C = min(model.config.logits_chunk, T)
  pad = -T % C

  def of_chunk(chunk):
    x, labels = chunk
    logits = model.logits(x)
    picked = jnp.take_along_axis(logits, labels[..., None], -1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked

  x = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0))).reshape(B, -1, C, D)
  labels = jnp.pad(labels, ((0, 0), (0, pad))).reshape(B, -1, C)
  chunks = (jnp.moveaxis(x, 1, 0), jnp.moveaxis(labels, 1, 0))
  losses = jnp.moveaxis(jax.lax.map(of_chunk, chunks), 0, 1)
  return losses.reshape(B, -1)[:, :T]
