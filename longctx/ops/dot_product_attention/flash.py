"""Flash attention: the one custom derivative that all blockwise backends share.

A backend computes a forward pass, (out, lse), and a backward pass that computes
its weights again from lse (Dao et al., arXiv:2205.14135), with

    delta = rowsum(dout * out) - dlse

Only q, k, v, out and lse are kept between the passes, O(T) memory. A sink
joins after the fact, so that its gradient comes from that of lse, and a ring,
which is a forward and a backward pass of its own, counts it once.
"""

import functools
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from longctx.ops.dot_product_attention.args import (
  AttentionArgs,
  Gradients,
  OutLse,
)
from longctx.ops.merge import merge
from longctx.ops.remat import keep
from longctx.typing import Array, Float


@runtime_checkable
class Passes(Protocol):
  """Flash attention's two passes; hashable, as programs are compiled for them.

  Results are in the dtype of sums, float32 or wider, or in `dtype`, to which
  the caller would round them.
  """

  def forward(
    self,
    q: Float[Array, 'B T N H'],
    k: Float[Array, 'B S K H'],
    v: Float[Array, 'B S K V'],
    args: AttentionArgs,
    dtype: Any = None,
  ) -> OutLse:
    """(out, lse) over the keys given; without sinks."""

  def backward(
    self,
    q: Float[Array, 'B T N H'],
    k: Float[Array, 'B S K H'],
    v: Float[Array, 'B S K V'],
    args: AttentionArgs,
    lse: Float[Array, 'B T N'],
    dout: Float[Array, 'B T N V'],
    delta: Float[Array, 'B T N'],
    dtype: Any = None,
  ) -> Gradients:
    """(dq, dk, dv) of the pairs of q and k.

    With lse and delta of all the keys, the keys given may be a part of them:
    then dq is that part's share, and dk and dv are whole.
    """


@runtime_checkable
class Backend(Passes, Protocol):
  """Flash attention backend: the two passes, and how a ring adds up parts.

  Parts over disjoint keys are merged, unless a backend has states that are
  cheaper to go on from: then `from_partial` makes one of (out, lse), which
  `accumulate` takes from one part to the next and `finalize` turns back. The
  gradient of the queries goes from `init_dq` to `finalize_dq`.
  """

  def from_partial(
    self,
    q: Float[Array, 'B T N H'],
    k: Float[Array, 'B S K H'],
    args: AttentionArgs,
    out: Float[Array, 'B T N V'],
    lse: Float[Array, 'B T N'],
  ) -> Any:
    return out, lse

  def accumulate(
    self,
    q: Float[Array, 'B T N H'],
    k: Float[Array, 'B S K H'],
    v: Float[Array, 'B S K V'],
    args: AttentionArgs,
    state: Any,
  ) -> Any:
    """The state over these keys too."""
    return merge(*state, *self.forward(q, k, v, args))

  def finalize(
    self,
    q: Float[Array, 'B T N H'],
    k: Float[Array, 'B S K H'],
    args: AttentionArgs,
    state: Any,
  ) -> OutLse:
    return state

  def init_dq(
    self,
    q: Float[Array, 'B T N H'],
    k: Float[Array, 'B S K H'],
    args: AttentionArgs,
    dtype: Any,
  ) -> Any:
    return jnp.zeros(q.shape, dtype)

  def accumulate_gradients(
    self,
    q: Float[Array, 'B T N H'],
    k: Float[Array, 'B S K H'],
    v: Float[Array, 'B S K V'],
    args: AttentionArgs,
    lse: Float[Array, 'B T N'],
    dout: Float[Array, 'B T N V'],
    delta: Float[Array, 'B T N'],
    dq: Any,
  ) -> tuple[Any, Float[Array, 'B S K H'], Float[Array, 'B S K V']]:
    """`backward`, its dq added to the one given."""
    share, dk, dv = self.backward(q, k, v, args, lse, dout, delta)
    return dq + share, dk, dv

  def finalize_dq(
    self,
    q: Float[Array, 'B T N H'],
    k: Float[Array, 'B S K H'],
    args: AttentionArgs,
    dq: Any,
  ) -> Float[Array, 'B T N H']:
    return dq


def attend(
  passes: Passes,
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B S K H'],
  v: Float[Array, 'B S K V'],
  args: AttentionArgs,
) -> OutLse:
  """Attention by two passes; memory O(T).

  Returns:
    out in the dtype of q, lse in float32 (float64 for float64 inputs).
  """
  sink_logits, args = args.sink_logits, args._replace(sink_logits=None)
  out, lse = _attend(passes, q, k, v, args)
  if sink_logits is not None:
    out, lse = add_sink(out, lse, sink_logits)
  return out, lse


def add_sink(
  out: Float[Array, 'B T N V'],
  lse: Float[Array, 'B T N'],
  sink_logits: Float[Array, ' N'],
) -> OutLse:
  """Lets a logit per head take its share of the probability."""
  total = jnp.logaddexp(lse, sink_logits.astype(lse.dtype))
  return (out * jnp.exp(lse - total)[..., None]).astype(out.dtype), total


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(passes: Passes, q, k, v, args: AttentionArgs):
  return _attend_fwd(passes, q, k, v, args)[0]


def _attend_fwd(passes: Passes, q, k, v, args: AttentionArgs):
  out, lse = passes.forward(q, k, v, args, q.dtype)
  out, lse = keep(out.astype(q.dtype), lse)
  return (out, lse), (q, k, v, args, out, lse)


def _attend_bwd(passes: Passes, saved, cotangents):
  q, k, v, args, out, lse = saved
  dout, dlse = cotangents
  delta = jnp.einsum(
    'BTNV,BTNV->BTN', dout, out, preferred_element_type=dlse.dtype
  )
  grads = passes.backward(q, k, v, args, lse, dout, delta - dlse, q.dtype)
  grads = (g.astype(x.dtype) for g, x in zip(grads, (q, k, v), strict=True))
  return *grads, None


_attend.defvjp(_attend_fwd, _attend_bwd)
