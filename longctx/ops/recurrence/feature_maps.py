"""Feature maps phi of linear attention: it sums the kernel phi(q) · phi(k).

A map is a frozen dataclass with two methods,

  __call__(x, *, is_query) -> phi(x)   [..., H] -> [..., P], in the dtype of x
  dim(head_dim) -> P                   the state has P rows

Queries and keys are mapped one position at a time, so no map can leak the
future. A map that needs more than x says so in `needs` and takes it as further
keyword arguments. A map is a pure function: parameters that it learns are kept
by whoever calls it.
"""

import abc
import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from longctx.typing import (
  Array,
  Between,
  Checked,
  Float,
  Int,
  Natural,
  Positive,
  Seed,
  among,
  make,
)

# Of a random feature: two of them, e^70, summed over e^14 = 10^6 steps, are a
# float32.
_LARGEST_EXPONENT = 35.0
# Of a feature of Hedgehog, as in the authors' code: no normaliser is zero.
_SMALLEST_FEATURE = 1e-12


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureMap(Checked, abc.ABC):
  """Feature map from head_dim numbers to dim(head_dim) numbers, per position.

  Attributes:
    needs: names of the keyword arguments that a call takes besides `is_query`:
      positions: int [*B, T], of x [*B, T, N, H];
      step: of training, counted from 1; None before and without training;
      parameters: arrays by name, like those of `initial`.
    max_length: how many positions it tells apart; None for any number.
  """

  needs: ClassVar[tuple[str, ...]] = ()
  max_length: ClassVar[int | None] = None

  @abc.abstractmethod
  def __call__(
    self, x: Float[Array, '*shape H'], *, is_query: bool
  ) -> Float[Array, '*shape P']:
    """phi(x), of a query or of a key."""

  @abc.abstractmethod
  def dim(self, head_dim: int) -> int:
    """P, the number of features of a head of size `head_dim`."""

  def initial(self, *, heads: int, head_dim: int) -> Mapping[str, Array]:
    """The parameters at first, by name; none unless `needs` names them."""
    return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EluPlusOne(FeatureMap):
  """elu(x) + 1: positive (Katharopoulos et al., arXiv 2006.16236)."""

  def __call__(
    self, x: Float[Array, '*shape H'], *, is_query: bool
  ) -> Float[Array, '*shape H']:
    # elu(x) + 1 would round to zero below -17 in float32; exp(x) does not, but
    # is kept from being so small that the gradient of a quotient overflows.
    return jnp.where(x > 0, x + 1, jnp.exp(jnp.clip(x, -_LARGEST_EXPONENT, 0)))

  def dim(self, head_dim: int) -> int:
    return head_dim


@dataclasses.dataclass(frozen=True, kw_only=True)
class Relu(FeatureMap):
  """ReLU, max(x, 0): not negative, so the normaliser can be zero."""

  def __call__(
    self, x: Float[Array, '*shape H'], *, is_query: bool
  ) -> Float[Array, '*shape H']:
    return jax.nn.relu(x)

  def dim(self, head_dim: int) -> int:
    return head_dim


@dataclasses.dataclass(frozen=True, kw_only=True)
class SquaredRelu(FeatureMap):
  """Squared ReLU, max(x, 0)², as in Primer's MLP (arXiv 2109.08668).

  Not negative, and spikier than max(x, 0); the normaliser can be zero.
  """

  def __call__(
    self, x: Float[Array, '*shape H'], *, is_query: bool
  ) -> Float[Array, '*shape H']:
    return jnp.square(jax.nn.relu(x))

  def dim(self, head_dim: int) -> int:
    return head_dim


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dpfp(FeatureMap):
  """Deterministic parameter-free projection (Schlag et al., arXiv 2102.11174).

    y = relu([x, -x])        phi(x) = [y ⊙ roll(y, 1), …, y ⊙ roll(y, nu)]

  Products of two of the 2 d halves of the axes, so that vectors in different
  orthants share few features. P = 2 d nu; the normaliser can be zero.

  Args:
    nu: how many neighbours each half axis is multiplied by; below 2 d.
  """

  nu: Annotated[int, Between(1, 256)] = 1

  def __call__(
    self, x: Float[Array, '*shape H'], *, is_query: bool
  ) -> Float[Array, '*shape P']:
    y = jax.nn.relu(jnp.concatenate([x, -x], axis=-1))
    rolled = [y * jnp.roll(y, i, axis=-1) for i in range(1, self.nu + 1)]
    return jnp.concatenate(rolled, axis=-1)

  def dim(self, head_dim: int) -> int:
    if self.nu >= 2 * head_dim:
      raise ValueError(f'{self.nu=} must be below 2 {head_dim=}')
    return 2 * head_dim * self.nu


@dataclasses.dataclass(frozen=True, kw_only=True)
class CosFormer(FeatureMap):
  """cosFormer, ReLU with weights that fall with distance (arXiv 2202.08791).

    phi(x, i) = [relu(x) cos(π i / 2M), relu(x) sin(π i / 2M)]
    phi(q, i) · phi(k, j) = relu(q) · relu(k) cos(π (i - j) / 2M)

  P = 2 d. Not negative for distances below M; the normaliser can be zero.

  Args:
    max_length: M. Positions from M on count as M - 1, so that no weight is
      negative.
  """

  needs: ClassVar = ('positions',)
  max_length: Positive = 2048

  def __call__(
    self,
    x: Float[Array, '*B T N H'],
    *,
    is_query: bool,
    positions: Int[Array, '*C T'],
  ) -> Float[Array, '*B T N P']:
    y = jax.nn.relu(x.astype(_accum_dtype(x)))
    places = jnp.clip(positions, 0, self.max_length - 1)[..., None, None]
    angles = places.astype(y.dtype) * (math.pi / 2 / self.max_length)
    features = [y * jnp.cos(angles), y * jnp.sin(angles)]
    return jnp.concatenate(features, axis=-1).astype(x.dtype)

  def dim(self, head_dim: int) -> int:
    return 2 * head_dim


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hedgehog(FeatureMap):
  """Hedgehog, softmax features of a learned map (arXiv 2402.04347).

    y = W x + b              one W [d, d] and b per head, at first I and 0
    phi(x) = [softmax(y), softmax(-y)]

  The paper writes exp(y), exp(-y) and, for its range, divides by the sums over
  the features of either half. P = 2 d. Cost T d² per head for y.
  """

  needs: ClassVar = ('parameters',)

  def __call__(
    self,
    x: Float[Array, '*shape N H'],
    *,
    is_query: bool,
    parameters: Mapping[str, Float[Array, '...']],
  ) -> Float[Array, '*shape N P']:
    N, d = x.shape[-2:]
    # Rows of `kernel` are the inputs of one head after another.
    kernel, bias = parameters['kernel'], parameters['bias']
    kernel = kernel.astype(x.dtype).reshape(N, d, d)
    y = jnp.einsum('...NH,NHP->...NP', x, kernel).astype(_accum_dtype(x))
    y += bias.reshape(N, d)
    features = [jax.nn.softmax(y), jax.nn.softmax(-y)]
    features = jnp.concatenate(features, axis=-1)
    return jnp.maximum(features, _SMALLEST_FEATURE).astype(x.dtype)

  def dim(self, head_dim: int) -> int:
    return 2 * head_dim

  def initial(self, *, heads: int, head_dim: int) -> Mapping[str, Array]:
    return {
      'kernel': jnp.tile(jnp.eye(head_dim), (heads, 1)),
      'bias': jnp.zeros(heads * head_dim),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Identity(FeatureMap):
  """Identity map, for the variants that do not normalise."""

  def __call__(
    self, x: Float[Array, '*shape H'], *, is_query: bool
  ) -> Float[Array, '*shape H']:
    return x

  def dim(self, head_dim: int) -> int:
    return head_dim


@dataclasses.dataclass(frozen=True, kw_only=True)
class Taylor(FeatureMap):
  """Taylor expansion of exp to second order (Based, arXiv 2402.18668).

    phi(x) = [1, x / d^(1/4), (x ⊗ x) / (√2 √d)]        d = head_dim
    phi(q) · phi(k) = 1 + q·k/√d + (q·k)²/(2d)          > 1/2, near exp(q·k/√d)

  P = 1 + d + d², so the state is large: 273 rows for d = 16.
  """

  def __call__(
    self, x: Float[Array, '*shape H'], *, is_query: bool
  ) -> Float[Array, '*shape P']:
    d = x.shape[-1]
    y = x.astype(_accum_dtype(x)) / d**0.25
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
    seed: of the draws of w, so that the same map can be made again anywhere.
    orthogonal: whether the w of a block are orthogonal.
    redraw_every: steps of training between two draws of w, so that a model
      learns softmax's kernel and not the features of one draw; 0: one draw.
  """

  needs: ClassVar = ('step',)
  num_features: Annotated[int, Between(1, 2**14)] = 256
  seed: Seed = 0
  orthogonal: bool = True
  redraw_every: Natural = 0

  def __call__(
    self,
    x: Float[Array, '*shape H'],
    *,
    is_query: bool,
    step: Int[Array, ''] | int | None,
  ) -> Float[Array, '*shape P']:
    d = x.shape[-1]
    y = x.astype(_accum_dtype(x)) / d**0.25
    if self.redraw_every:
      w = self.redrawn(d, step).astype(y.dtype)
    else:
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
    """The one draw of w, [P, head_dim], in float64: a constant of programs."""
    rng = np.random.default_rng((self.seed, head_dim))
    gaussian = rng.standard_normal((self.num_features, head_dim))
    if not self.orthogonal:
      return gaussian
    blocks = -(-self.num_features // head_dim)
    squares = rng.standard_normal((blocks, head_dim, head_dim))
    return _orthogonal(np, squares, gaussian)

  def redrawn(
    self, head_dim: int, step: Int[Array, ''] | int | None
  ) -> Float[Array, 'P H']:
    """The draw of w that the update number `step` uses, float32.

    Drawn in the program, at the cost of P head_dim² per call.
    """
    draw = 0
    if step is not None:
      draw = jnp.maximum(jnp.asarray(step) - 1, 0) // self.redraw_every
    key = jax.random.fold_in(jax.random.key(self.seed), draw)
    key, square_key = jax.random.split(key)
    # Of a type that is named, so that every precision has the same draw.
    normal = lambda key, *shape: jax.random.normal(key, shape, jnp.float32)
    gaussian = normal(key, self.num_features, head_dim)
    if not self.orthogonal:
      return gaussian
    blocks = -(-self.num_features // head_dim)
    squares = normal(square_key, blocks, head_dim, head_dim)
    return _orthogonal(jnp, squares, gaussian)


def _orthogonal(xp, squares, gaussian):
  """Rows of random rotations with the lengths of `gaussian`'s, by numpy or jax.

  Args:
    xp: numpy or jax.numpy.
    squares: [blocks, d, d], standard normal.
    gaussian: [P, d], likewise.
  """
  q, r = xp.linalg.qr(squares)
  # With the signs of a positive diagonal of r the draw is uniform over the
  # rotations, as an unbiased estimate needs.
  q = q * xp.sign(xp.diagonal(r, axis1=-2, axis2=-1))[:, None, :]
  rows = q.reshape(-1, q.shape[-1])[: len(gaussian)]
  return rows * xp.linalg.norm(gaussian, axis=-1, keepdims=True)


FEATURE_MAPS = {
  'elu+1': EluPlusOne,
  'relu': Relu,
  'relu2': SquaredRelu,
  'dpfp': Dpfp,
  'cosformer': CosFormer,
  'hedgehog': Hedgehog,
  'identity': Identity,
  'taylor': Taylor,
  'favor+': FavorPlus,
}


def make_feature_map(name: str, **kwargs) -> FeatureMap:
  """The map of that name; ValueError, with the known ones, if there is none."""
  if name not in FEATURE_MAPS:
    raise ValueError(f'unknown feature map {name!r}{among(name, FEATURE_MAPS)}')
  return make(FEATURE_MAPS[name], f'the feature map {name!r}', kwargs)


def _accum_dtype(x):
  return jnp.promote_types(x.dtype, jnp.float32)
