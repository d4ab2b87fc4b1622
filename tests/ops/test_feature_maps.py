"""Feature maps: their kernels, their sizes, and no look at other positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx.ops.linear_attention.feature_maps import (
  FEATURE_MAPS,
  FavorPlus,
  make_feature_map,
)
from tests.tolerances import tolerance


def make_vectors(n, d, *, size=1.0, seed=0):
  x = np.random.default_rng(seed).normal(size=(n, d)) * size
  return jnp.asarray(x, 'float32')


def kernel(feature_map, q, k):
  return feature_map(q, is_query=True) @ feature_map(k, is_query=False).T


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('name', FEATURE_MAPS)
def test_map_keeps_the_dtype_and_has_the_size_it_says(name, dtype):
  feature_map = make_feature_map(name)
  x = make_vectors(6, 8).reshape(2, 3, 1, 8).astype(dtype)
  for is_query in (True, False):
    features = feature_map(x, is_query=is_query)
    assert features.dtype == dtype
    assert features.shape == (2, 3, 1, feature_map.dim(8))


@pytest.mark.parametrize('name', FEATURE_MAPS)
@pytest.mark.parametrize('is_query', [True, False])
def test_map_reads_its_own_position_only(name, is_query):
  feature_map = make_feature_map(name)
  x = make_vectors(5, 4)
  changed = x.at[3].set(50.0)
  before, after = (feature_map(y, is_query=is_query) for y in (x, changed))
  np.testing.assert_array_equal(before[:3], after[:3])
  np.testing.assert_array_equal(before[4], after[4])


@pytest.mark.parametrize('name', FEATURE_MAPS)
def test_map_and_gradient_are_finite_for_large_inputs(name):
  feature_map = make_feature_map(name)
  x = jnp.asarray([[1e4, -1e4, 0.0, 1e-4], [100.0] * 4, [0.0] * 4])
  for is_query in (True, False):
    features, vjp = jax.vjp(lambda x: feature_map(x, is_query=is_query), x)  # noqa: B023
    assert np.isfinite(features).all()
    assert np.isfinite(vjp(jnp.ones_like(features))[0]).all()


@pytest.mark.parametrize('name', ['elu+1', 'favor+', 'taylor'])
def test_kernel_is_positive(name):
  x = make_vectors(32, 8, size=3.0)
  assert (kernel(make_feature_map(name), x, -x) > 0).all()


def test_elu_plus_one_equals_its_formula():
  x = jnp.linspace(-3, 3, 20)[:, None]
  features = make_feature_map('elu+1')(x, is_query=True)
  np.testing.assert_allclose(
    features, jax.nn.elu(x) + 1, **tolerance('float32')
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


def test_unknown_or_wrong_map_says_what_is_known():
  with pytest.raises(ValueError, match=r"'elu\+1', 'favor\+', 'identity'"):
    make_feature_map('softmax')
  with pytest.raises(ValueError, match='num_features=0 must be at least 1'):
    make_feature_map('favor+', num_features=0)
