"""Feature maps: their kernels, their sizes, and no look at other positions."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx.ops.recurrence.feature_maps import (
  FEATURE_MAPS,
  FavorPlus,
  make_feature_map,
)
from tests.tolerances import tolerance


def make_vectors(n, d, *, size=1.0, seed=0):
  x = np.random.default_rng(seed).normal(size=(n, d)) * size
  return jnp.asarray(x, 'float32')


def features(feature_map, x, *, is_query, **given):
  """phi of vectors [n, d], n positions of one head, with what the map needs."""
  initial = feature_map.initial(heads=1, head_dim=x.shape[-1])
  known = {
    'positions': jnp.arange(len(x)),
    'step': None,
    'parameters': {name: jnp.asarray(y) for name, y in initial.items()},
  }
  needed = {name: (known | given)[name] for name in feature_map.needs}
  return feature_map(x[None, :, None], is_query=is_query, **needed)[0, :, 0]


def kernel(feature_map, q, k, **given):
  phi_q = features(feature_map, q, is_query=True, **given)
  return phi_q @ features(feature_map, k, is_query=False, **given).T


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float64'])
@pytest.mark.parametrize('name', FEATURE_MAPS)
def test_map_keeps_the_dtype_and_has_the_size_it_says(name, dtype):
  feature_map = make_feature_map(name)
  with jax.enable_x64(dtype == 'float64'):
    x = make_vectors(6, 8).astype(dtype)
    for is_query in (True, False):
      phi = features(feature_map, x, is_query=is_query)
      assert phi.dtype == dtype
      assert phi.shape == (6, feature_map.dim(8))


@pytest.mark.parametrize('name', FEATURE_MAPS)
@pytest.mark.parametrize('is_query', [True, False])
def test_map_reads_its_own_position_only(name, is_query):
  feature_map = make_feature_map(name)
  x = make_vectors(5, 4)
  changed = x.at[3].set(50.0)
  before, after = (
    features(feature_map, y, is_query=is_query) for y in (x, changed)
  )
  np.testing.assert_array_equal(before[:3], after[:3])
  np.testing.assert_array_equal(before[4], after[4])


@pytest.mark.parametrize('name', FEATURE_MAPS)
def test_map_and_gradient_are_finite_for_large_inputs(name):
  feature_map = make_feature_map(name)
  x = jnp.asarray([[1e4, -1e4, 0.0, 1e-4], [100.0] * 4, [0.0] * 4])
  for is_query in (True, False):
    phi, vjp = jax.vjp(lambda x: features(feature_map, x, is_query=is_query), x)  # noqa: B023
    assert np.isfinite(phi).all()
    assert np.isfinite(vjp(jnp.ones_like(phi))[0]).all()


@pytest.mark.parametrize('name', FEATURE_MAPS)
def test_second_derivative_is_finite(name, x64):
  feature_map = make_feature_map(name)
  x = make_vectors(3, 4).astype('float64')

  def gradient_norm(x):
    phi = lambda x: features(feature_map, x, is_query=True)
    return (jax.grad(lambda x: (phi(x) ** 2).sum())(x) ** 2).sum()

  second = jax.grad(gradient_norm)(x)
  assert second.dtype == 'float64'
  assert np.isfinite(second).all()


@pytest.mark.parametrize('name', ['elu+1', 'favor+', 'taylor', 'hedgehog'])
def test_kernel_is_positive(name):
  x = make_vectors(32, 8, size=3.0)
  assert (kernel(make_feature_map(name), x, -x) > 0).all()


@pytest.mark.parametrize('name', ['relu', 'relu2', 'dpfp', 'cosformer'])
def test_kernel_is_not_negative(name):
  x = make_vectors(32, 8, size=3.0)
  values = kernel(make_feature_map(name), x, make_vectors(32, 8, seed=1))
  assert (values >= 0).all()
  assert (values > 0).any()


def test_elu_plus_one_equals_its_formula():
  x = jnp.linspace(-3, 3, 20)[:, None]
  phi = make_feature_map('elu+1')(x, is_query=True)
  np.testing.assert_allclose(phi, jax.nn.elu(x) + 1, **tolerance('float32'))


def test_squared_relu_equals_its_formula():
  x = make_vectors(5, 4)
  phi = make_feature_map('relu2')(x, is_query=True)
  np.testing.assert_array_equal(phi, np.maximum(x, 0) ** 2)


@pytest.mark.parametrize('nu', [1, 3])
def test_dpfp_features_are_products_of_half_axes(nu):
  x = np.asarray(make_vectors(5, 4))
  halves = np.maximum(np.concatenate([x, -x], axis=-1), 0)
  expected = [
    halves[:, j] * halves[:, (j - i) % 8]
    for i in range(1, nu + 1)
    for j in range(8)
  ]
  phi = make_feature_map('dpfp', nu=nu)(jnp.asarray(x), is_query=True)
  np.testing.assert_array_equal(phi, np.stack(expected, axis=-1))


def test_cosformer_weighs_the_kernel_of_relu_by_the_cosine_of_distance():
  M, n = 12, 9
  q, k = (make_vectors(n, 4, seed=seed) for seed in (0, 1))
  positions = np.array([0, 5, 2, 1, 11, 10, 3, 4, 7])
  distance = positions[:, None] - positions[None]
  expected = np.maximum(q, 0) @ np.maximum(k, 0).T
  expected = expected * np.cos(np.pi / 2 * distance / M)
  cosformer = make_feature_map('cosformer', max_length=M)
  given = dict(positions=jnp.asarray(positions))
  np.testing.assert_allclose(
    kernel(cosformer, q, k, **given), expected, **tolerance('float32')
  )


def test_cosformer_is_not_negative_beyond_its_length():
  x = jnp.abs(make_vectors(50, 4))
  assert (kernel(make_feature_map('cosformer', max_length=8), x, x) > 0).all()


def test_hedgehog_is_two_softmaxes_over_features_of_a_map_per_head():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 5, 3, 4))
  kernel, bias = rng.normal(size=(3, 4, 4)), rng.normal(size=(3, 4))
  y = np.exp(np.einsum('BTNH,NHP->BTNP', x, kernel) + bias)
  halves = [y / y.sum(-1, keepdims=True), 1 / y / (1 / y).sum(-1)[..., None]]
  phi = make_feature_map('hedgehog')(
    jnp.asarray(x, 'float32'),
    is_query=True,
    parameters={
      'kernel': jnp.asarray(kernel.reshape(12, 4), 'float32'),
      'bias': jnp.asarray(bias.reshape(12), 'float32'),
    },
  )
  np.testing.assert_allclose(
    phi, np.concatenate(halves, axis=-1), **tolerance('float32')
  )


def test_taylor_kernel_is_the_second_order_expansion_of_exp():
  d = 8
  q, k = make_vectors(16, d), make_vectors(16, d, seed=1)
  logits = np.asarray(q, np.float64) @ np.asarray(k, np.float64).T / np.sqrt(d)
  np.testing.assert_allclose(
    kernel(make_feature_map('taylor'), q, k),
    1 + logits + logits**2 / 2,
    **tolerance('float32'),
  )


def relative_errors(d, draws, **kwargs):
  """Errors [draws, 8, 8] of the softmax kernel, relative to its values."""
  # Short vectors: the estimate's tails are log-normal, and a mean over a few
  # hundred draws from a heavier tail says little.
  q, k = (make_vectors(8, d, size=0.5, seed=seed) for seed in (0, 1))
  exact = np.exp(np.asarray(q @ k.T) / np.sqrt(d))
  maps = [FavorPlus(seed=seed, **kwargs) for seed in range(draws)]
  return np.stack([kernel(phi, q, k) / exact - 1 for phi in maps])


@pytest.mark.parametrize('orthogonal', [True, False])
def test_favor_plus_is_an_unbiased_estimate_of_the_softmax_kernel(orthogonal):
  errors = relative_errors(4, 200, num_features=64, orthogonal=orthogonal)
  standard_error = errors.std(axis=0) / np.sqrt(len(errors))
  # 64 means of 200 draws: the largest of 64 normals is rarely beyond 4.
  assert (np.abs(errors.mean(axis=0)) < 4 * standard_error).all()


def test_favor_plus_error_falls_with_the_number_of_features():
  few, many = (
    np.mean(relative_errors(4, 50, num_features=n) ** 2) for n in (16, 256)
  )
  # A variance falls with 1/P, by 16 here.
  assert many < few / 8


def test_orthogonal_features_have_less_variance_than_independent_ones():
  orthogonal, independent = (
    np.mean(relative_errors(8, 100, num_features=8, orthogonal=x) ** 2)
    for x in (True, False)
  )
  assert orthogonal < 0.9 * independent


def test_favor_plus_projection_is_orthogonal_in_blocks_and_gaussian_in_length():
  w = FavorPlus(num_features=4096).projection(16)
  block = w[16:32] @ w[16:32].T
  np.testing.assert_allclose(block, np.diag(np.diag(block)), atol=1e-12, rtol=0)
  lengths = np.sum(w**2, axis=-1)
  # Chi-squared: mean 16, variance 32.
  assert abs(lengths.mean() - 16) < 4 * np.sqrt(32 / 4096)
  assert abs(lengths.var() / 32 - 1) < 0.2


@pytest.mark.parametrize('orthogonal', [True, False])
def test_favor_plus_is_redrawn_on_its_schedule_and_the_same_each_time(
  orthogonal,
):
  make = lambda seed: FavorPlus(
    num_features=8, redraw_every=3, seed=seed, orthogonal=orthogonal
  )
  x = make_vectors(5, 4)
  phi = jax.jit(lambda step: features(make(0), x, is_query=False, step=step))
  draws = [np.asarray(phi(step)) for step in range(1, 10)]
  for step in range(1, 10):
    first = 3 * ((step - 1) // 3)
    np.testing.assert_array_equal(draws[step - 1], draws[first])
    again = features(make(0), x, is_query=False, step=step)
    np.testing.assert_allclose(draws[step - 1], again, **tolerance('float32'))
  for a, b in itertools.combinations((0, 3, 6), 2):
    assert np.abs(draws[a] - draws[b]).max() > 0.01
  untrained = features(make(0), x, is_query=False, step=None)
  np.testing.assert_allclose(untrained, draws[0], **tolerance('float32'))
  other = features(make(1), x, is_query=False, step=1)
  assert np.abs(other - draws[0]).max() > 0.01


def test_redrawn_features_estimate_the_softmax_kernel_without_bias():
  q, k = (make_vectors(8, 4, size=0.5, seed=seed) for seed in (0, 1))
  exact = np.exp(np.asarray(q @ k.T) / 2)
  favor = FavorPlus(num_features=64, redraw_every=1)
  estimate = jax.jit(lambda step: kernel(favor, q, k, step=step))
  errors = np.stack([estimate(step) / exact - 1 for step in range(1, 201)])
  standard_error = errors.std(axis=0) / np.sqrt(len(errors))
  # As above: 64 means of 200 draws.
  assert (np.abs(errors.mean(axis=0)) < 4 * standard_error).all()


def test_redrawn_projection_is_orthogonal_in_blocks():
  w = np.asarray(FavorPlus(num_features=40, redraw_every=2).redrawn(16, 7))
  assert w.shape == (40, 16)
  block = w[16:32] @ w[16:32].T
  size = np.diag(block).max()
  np.testing.assert_allclose(
    block / size, np.diag(np.diag(block)) / size, **tolerance('float32')
  )


def test_every_precision_has_the_same_draw():
  favor = FavorPlus(num_features=8, redraw_every=2)
  x = make_vectors(5, 4)
  single = features(favor, x, is_query=True, step=3)
  with jax.enable_x64(True):
    double = features(favor, x.astype('float64'), is_query=True, step=3)
  assert double.dtype == 'float64'
  np.testing.assert_allclose(single, double, **tolerance('float32'))


def test_unknown_or_wrong_map_says_what_is_known():
  with pytest.raises(ValueError, match=r'elu\+1, relu, .*favor\+'):
    make_feature_map('softmax')
  with pytest.raises(ValueError, match='num_features=0 must be at least 1'):
    make_feature_map('favor+', num_features=0)
  with pytest.raises(ValueError, match='redraw_every=-1 must be at least 0'):
    make_feature_map('favor+', redraw_every=-1)
  with pytest.raises(ValueError, match='nu=8 must be below 2 head_dim=4'):
    make_feature_map('dpfp', nu=8).dim(4)
  with pytest.raises(ValueError, match='max_length=0 must be at least 1'):
    make_feature_map('cosformer', max_length=0)
