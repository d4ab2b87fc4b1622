"""Softmax and its alternatives: a numerator and a denominator per logit.

    out = Σ_s w(z_s) v_s / D        D = Σ_s d(z_s)        lse = log D

               w(z)             d(z)
    softmax    exp(z)           exp(z)
    softpick   relu(exp(z) - 1) |exp(z) - 1|   Zuhri et al., arXiv:2504.20966
    sigmoid    σ(z)             1              Ramapuram et al., 2409.04431

Parts over disjoint keys merge by (out, lse), whatever w and d are. Sigmoid
attention is a sum, not a mean: its parts are means over the keys, and the last
step multiplies by their number, exp(lse).

Gradients, with delta = rowsum(dout * out) - dlse:

    dz = (w'(z) (dout · v) - d'(z) delta) / D        dv = Σ w(z) dout / D
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from longctx.typing import Array, Float


class Terms(NamedTuple):
  """Weight w, term d and their derivatives, all of them times exp(-shift).

  Two that are the same array are the same object, so that it is computed once.

  Attributes:
    weight: w, 0 where the logit is -inf.
    term: d, 0 where the logit is -inf.
    weight_slope: w'.
    term_slope: d'; None where it is 0 for every logit.
  """

  weight: Float[Array, '...']
  term: Float[Array, '...']
  weight_slope: Float[Array, '...']
  term_slope: Float[Array, '...'] | None

  def logit_gradient(
    self, dweight: Float[Array, '...'], delta: Float[Array, '...']
  ) -> Float[Array, '...']:
    """dz, of terms whose shift is lse and with dweight = dout · v."""
    if self.term_slope is None:
      return self.weight_slope * dweight
    if self.term_slope is self.weight_slope:
      return self.weight_slope * (dweight - delta)
    return self.weight_slope * dweight - self.term_slope * delta


@dataclasses.dataclass(frozen=True)
class Normalizer:
  """Normalizer of attention logits: softmax, softmax1, softpick or sigmoid.

  Attributes:
    terms: (logits, shift) -> Terms. Without an overflow where shift is at least
      every logit and `least_row_max`, or is lse.
    least_row_max: where the running maximum of the logits starts; None where w
      is bounded, and needs none.
    start: what D starts from.
    has_sink: whether sink logits may add to D.
    is_sum: whether Σ w v is wanted, and not the quotient.
  """

  terms: Callable[[Array, Array], Terms]
  least_row_max: float | None
  start: int = 0
  has_sink: bool = False
  is_sum: bool = False

  def finish(
    self, out: Float[Array, 'B T N V'], lse: Float[Array, 'B T N']
  ) -> Float[Array, 'B T N V']:
    """The output wanted, from that of all the parts."""
    if not self.is_sum:
      return out
    return (out * jnp.exp(lse)[..., None]).astype(out.dtype)


def _softmax(z: Array, shift: Array) -> Terms:
  gap = z - shift
  # A logit is at most the log of a sum that it is part of, but where logits are
  # huge rounding can lift it above. The derivative is that of exp all the same,
  # so that it can be taken again.
  p = jnp.exp(gap - lax.stop_gradient(jnp.maximum(gap, 0)))
  return Terms(p, p, p, p)


def _softpick(z: Array, shift: Array) -> Terms:
  # |exp(z) - 1| = (1 - exp(-|z|)) exp(max(z, 0)) does not cancel near 0, with
  # 1 - exp(-x) = 2 tanh(x/2) / (1 + tanh(x/2)): TPU kernels have no expm1.
  half = jnp.tanh(abs(z) / 2)
  size = 2 * half / (1 + half) * jnp.exp(jnp.maximum(z, 0) - shift)
  size = jnp.where(z == -jnp.inf, 0, size)
  slope = jnp.exp(z - shift)
  return Terms(
    weight=jnp.where(z > 0, size, 0),
    term=size,
    weight_slope=jnp.where(z > 0, slope, 0),
    term_slope=jnp.sign(z) * slope,
  )


def _sigmoid(z: Array, shift: Array) -> Terms:
  one = jnp.exp(-shift)
  weight = lax.logistic(z) * one
  return Terms(
    weight=weight,
    term=jnp.where(z == -jnp.inf, 0, one),
    weight_slope=weight * lax.logistic(-z),
    term_slope=None,
  )


# Finite, so that exp(-inf - least_row_max) is 0 in rows that have no key yet.
SOFTMAX = Normalizer(_softmax, least_row_max=-1e30, has_sink=True)

NORMALIZERS = {
  'softmax': SOFTMAX,
  'softmax1': dataclasses.replace(SOFTMAX, start=1),
  # From 0, as the 1 of exp(z) - 1 must not overflow either.
  'softpick': Normalizer(_softpick, least_row_max=0.0),
  'sigmoid': Normalizer(_sigmoid, least_row_max=None, is_sum=True),
}
