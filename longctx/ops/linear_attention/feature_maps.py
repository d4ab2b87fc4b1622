"""Feature maps phi: the kernel phi(q) · phi(k) that linear attention sums.

A map is a frozen dataclass with two methods,

  __call__(x, *, is_query) -> phi(x)   [..., H] -> [..., P], in the dtype of x
  dim(head_dim) -> P                   the state has P rows

Queries and keys are mapped one position at a time, so no map can leak the
future. A map that needs more than x (positions, parameters) takes it as
further keyword arguments.
"""

import abc
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from longctx.typing import Array, Float

# Of a random feature: two of them, e^70, summed over e^14 = 10^6 steps, are a
# float32.
_LARGEST_EXPONENT = 35.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureMap(abc.ABC):
  """A map from head_dim numbers to dim(head_dim) numbers, per position."""

  @abc.abstractmethod
  def __call__(
    self, x: Float[Array, '*shape H'], *, is_query: bool
  ) -> Float[Array, '*shape P']:
    """phi(x), of a query or of a key."""

  @abc.abstractmethod
  def dim(self, head_dim: int) -> int:
    """P, the number of features of a head of size `head_dim`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EluPlusOne(FeatureMap):
  """elu(x) + 1: positive (Katharopoulos et al., arXiv 2006.16236)."""

  def __call__(
    self, x: Float[Array, '*shape H'], *, is_query: bool
  ) -> Float[Array, '*shape H']:
    # elu(x) + 1 would round to zero below -17 in float32; exp(x) does not.
    return jnp.where(x > 0, x + 1, jnp.exp(jnp.minimum(x, 0)))

  def dim(self, head_dim: int) -> int:
    return head_dim


@dataclasses.dataclass(frozen=True, kw_only=True)
class Relu(FeatureMap):
  """max(x, 0): not negative, so the normaliser can be zero."""

  def __call__(
    self, x: Float[Array, '*shape H'], *, is_query: bool
  ) -> Float[Array, '*shape H']:
    return jax.nn.relu(x)

  def dim(self, head_dim: int) -> int:
    return head_dim


@dataclasses.dataclass(frozen=True, kw_only=True)
class Identity(FeatureMap):
  """x itself, for the variants that do not normalise."""

  def __call__(
    self, x: Float[Array, '*shape H'], *, is_query: bool
  ) -> Float[Array, '*shape H']:
    return x

  def dim(self, head_dim: int) -> int:
    return head_dim


@dataclasses.dataclass(frozen=True, kw_only=True)
class Taylor(FeatureMap):
  """The exponential to second order (Based, arXiv 2402.18668).

    phi(x) = [1, x / d^(1/4), (x ⊗ x) / (√2 √d)]        d = head_dim
    phi(q) · phi(k) = 1 + q·k/√d + (q·k)²/(2d)          > 1/2, near exp(q·k/√d)

  P = 1 + d + d², so the state is large: 273 rows for d = 16.
  """

  def __call__(
    self, x: Float[Array, '*shape H'], *, is_query: bool
  ) -> Float[Array, '*shape P']:
    d = x.shape[-1]
    y = x.astype(_sum_dtype(x)) / d**0.25
    square = (y[..., :, None] * y[..., None, :]).reshape(*y.shape[:-1], d * d)
    features = [jnp.ones_like(y[..., :1]), y, square / math.sqrt(2)]
    return jnp.concatenate(features, axis=-1).astype(x.dtype)

  def dim(self, head_dim: int) -> int:
    return 1 + head_dim + head_dim**2


@dataclasses.dataclass(frozen=True, kw_only=True)
class FavorPlus(FeatureMap):
  """Positive random features (Performer, arXiv 2009.14794).

    phi(x)_i = exp(w_i · y - |y|²/2) / √P        y = x / d^(1/4), w_i ~ N(0, 1)
    E[phi(q) · phi(k)] = exp(q·k / √d)           d = head_dim

  Orthogonal w (in blocks of d, each row with the length of a Gaussian one, so
  that the estimate stays unbiased) have a smaller variance than independent
  ones. Cost T d P per head.

  The published stabiliser divides the keys by the largest feature of the whole
  sequence and so reads the future. Here nothing depends on another position:
  an exponent is at most |w_i|²/2, whatever x, which is near d/2. What lies
  above 35 is cut off, so that a product of two features, summed over 10^6
  steps, stays a float32. A query whose features would all be below exp(-35) is
  scaled up, which normalised attention cannot see.

  Args:
    num_features: P.
    seed: of the draw of w, so that the same map can be made again anywhere.
    orthogonal: whether the w of a block are orthogonal.
  """

  num_features: int = 256
  seed: int = 0
  orthogonal: bool = True

  def __post_init__(self):
    if self.num_features < 1:
      raise ValueError(f'{self.num_features=} must be at least 1')

  def __call__(
    self, x: Float[Array, '*shape H'], *, is_query: bool
  ) -> Float[Array, '*shape P']:
    d = x.shape[-1]
    y = x.astype(_sum_dtype(x)) / d**0.25
    w = jnp.asarray(self.projection(d), y.dtype)
    exponent = y @ w.T - jnp.sum(y**2, axis=-1, keepdims=True) / 2
    exponent = jnp.minimum(exponent, _LARGEST_EXPONENT)
    if is_query:
      largest = jnp.max(exponent, axis=-1, keepdims=True)
      exponent -= jnp.minimum(largest + _LARGEST_EXPONENT, 0)
    features = jnp.exp(exponent) / math.sqrt(self.num_features)
    return features.astype(x.dtype)

  def dim(self, head_dim: int) -> int:
    return self.num_features

  def projection(self, head_dim: int) -> np.ndarray:
    """w [P, head_dim] in float64."""
    rng = np.random.default_rng((self.seed, head_dim))
    gaussian = rng.standard_normal((self.num_features, head_dim))
    if not self.orthogonal:
      return gaussian
    blocks = -(-self.num_features // head_dim)
    q, r = np.linalg.qr(rng.standard_normal((blocks, head_dim, head_dim)))
    # With the signs of a positive diagonal of r the draw is uniform over the
    # rotations, as an unbiased estimate needs.
    q *= np.sign(np.diagonal(r, axis1=-2, axis2=-1))[:, None, :]
    rows = q.reshape(-1, head_dim)[: self.num_features]
    return rows * np.linalg.norm(gaussian, axis=-1, keepdims=True)


FEATURE_MAPS = {
  'elu+1': EluPlusOne,
  'relu': Relu,
  'identity': Identity,
  'taylor': Taylor,
  'favor+': FavorPlus,
}


def make_feature_map(name: str, **kwargs) -> FeatureMap:
  """The map of that name; ValueError, with the known ones, if there is none."""
  if name not in FEATURE_MAPS:
    raise ValueError(
      f'unknown feature map {name!r}; known: {sorted(FEATURE_MAPS)}'
    )
  return FEATURE_MAPS[name](**kwargs)


def _sum_dtype(x):
  return jnp.promote_types(x.dtype, jnp.float32)
