"""Attention probes: what tokens get of each other, without a T x T matrix.

A layer's output is a sum of values, out_t = Σ_s A_ts v_s, and A depends on
queries and keys alone. So the layer itself, given other values, tells Σ_s A_ts
f(s) for any f: with f = 1 at the first token the attention to it, with the
positions the mean distance, with the symbols one-hot the attention to each of
them. That is one pass of the layer per `width` columns, blockwise, on a mesh,
and the same for softmax, a window, linear attention or the delta rule, whose A
is the attention that they amount to ('effective attention', which may be
negative where weights of softmax are not).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from longctx.attention import Attention
from longctx.attention.context import Context
from longctx.typing import Array, Float


class ProbeContext(Context):
  """A context in which a layer has no values but those given to `attend`."""

  def values(self, own, given):
    del own
    return given


def recast(context: Context, kind: type[Context], **more: Any) -> Any:
  """The same context as one of another kind."""
  fields = dataclasses.fields(Context)
  return kind(**{f.name: getattr(context, f.name) for f in fields}, **more)


def weighted_sums(
  layer: Attention,
  x: Float[Array, 'B T D'],
  probes: Float[Array, '#B T M'],
  context: Context,
  *,
  width: int | None = None,
) -> Float[Array, 'B Q N M']:
  """Σ_s A_ts probes_s for every head.

  Args:
    layer: of any variant that has 'analysis'.
    x: its inputs.
    probes: what stands in place of values.
    context: where the tokens are; with `read`, Q queries are asked, else all.
    width: columns of one pass; None: as many as a value has. A pass of softmax
      costs (H + width) / (H + V) times the layer's.

  Raises:
    NotImplementedError: the layer's outputs are no weighted sums of values.
  """
  sums, out = _mixer(layer, x, context)
  width, M = width or out.shape[-1], probes.shape[-1]
  padded = jnp.pad(probes, ((0, 0), (0, 0), (0, -M % width)))
  groups = padded.reshape(*probes.shape[:2], -1, width)
  found = jax.lax.map(sums, jnp.moveaxis(groups, 2, 0))
  found = jnp.moveaxis(found, 0, -2)
  return found.reshape(*found.shape[:-2], -1)[..., :M].astype(jnp.float32)


def importance(
  layer: Attention, x: Float[Array, 'B T D'], context: Context
) -> Float[Array, 'B N T']:
  """Σ_t A_ts, what all the queries together get of each token.

  One backward pass of the layer per head, with respect to a single column of
  values, so that it is as blockwise as training is.

  Args:
    layer: of any variant that has 'analysis'.
    x: its inputs.
    context: where the tokens are.
  """
  sums, out = _mixer(layer, x, context)
  probes = jnp.zeros((*x.shape[:2], out.shape[-1]), out.dtype)
  _, vjp = jax.vjp(sums, probes)

  def of_head(head):
    dout = jnp.zeros(out.shape, out.dtype).at[:, :, head, 0].set(1)
    return vjp(dout)[0][..., 0]

  columns = jax.lax.map(of_head, jnp.arange(out.shape[2]))
  return jnp.moveaxis(columns, 0, 1).astype(jnp.float32)


def _mixer(
  layer: Attention, x: Float[Array, 'B T D'], context: Context
) -> tuple[Callable[[Array], Array], jax.ShapeDtypeStruct]:
  """(probes -> what the layer mixes of them, and the layer's own outputs).

  Raises:
    NotImplementedError: the layer's outputs are no weighted sums of values.
  """
  layer.check_supported('analysis')
  qkv = layer.project(x, context)
  v = qkv.v
  out = jax.eval_shape(lambda: layer.attend(qkv, context))
  # Some layers join the values of several heads to longer ones.
  joined = out.shape[-1] // v.shape[-1]
  given = recast(context, ProbeContext)

  def sums(probes: Float[Array, '#B T W']) -> Float[Array, 'B Q N W']:
    values = jnp.broadcast_to(probes, (*x.shape[:2], probes.shape[-1]))
    values = values.reshape(*x.shape[:2], joined, -1)
    values = jnp.tile(values, (1, 1, v.shape[2] // joined, 1)).astype(v.dtype)
    return layer.attend(qkv._replace(v=values), given)

  return sums, out
