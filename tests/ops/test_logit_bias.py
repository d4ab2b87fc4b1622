"""A bias on logits by channels: exact in every dtype, with gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx.ops.logit_bias import add_logit_bias
from tests.tolerances import tolerance

B, T, S, N, K, H = 2, 5, 7, 4, 2, 6


def arrays(dtype, size=1.0):
  rng = np.random.default_rng(0)
  q, k = (rng.normal(size=(B, n, h, H)) for n, h in ((T, N), (S, K)))
  q_bias, k_bias = (size * rng.normal(size=(B, n, N)) for n in (T, S))
  wide = jnp.promote_types(dtype, jnp.float32)
  return (
    *(jnp.asarray(x, dtype) for x in (q, k)),
    *(jnp.asarray(x, wide) for x in (q_bias, k_bias)),
  )


def expected_logits(q, k, q_bias, k_bias):
  q, k, q_bias, k_bias = (
    np.asarray(x, np.float64) for x in (q, k, q_bias, k_bias)
  )
  z = np.einsum('btnh,bsnh->bnts', q, np.repeat(k, N // K, 2)) / np.sqrt(H)
  q_bias, k_bias = q_bias.swapaxes(1, 2), k_bias.swapaxes(1, 2)
  return z + q_bias[..., None] + k_bias[:, :, None]


def logits(q, k, q_bias=None, k_bias=None):
  q, k = add_logit_bias(q, k, q_bias=q_bias, k_bias=k_bias)
  # As on accelerators: factors of eight bits, sums in float32.
  k = jnp.repeat(k, N // K, axis=2)
  return jnp.einsum(
    'BTNH,BSNH->BNTS',
    q,
    k,
    preferred_element_type=jnp.promote_types(q.dtype, jnp.float32),
  )


@pytest.mark.parametrize('given', ['both', 'q', 'k'])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float64'])
def test_logits_have_the_bias(dtype, given, x64):
  q, k, q_bias, k_bias = arrays(dtype)
  biases = dict(q_bias=q_bias, k_bias=k_bias)
  if given != 'both':
    biases = {f'{given}_bias': biases[f'{given}_bias']}
  z = logits(q, k, **biases)
  zeros = dict(q_bias=0 * q_bias, k_bias=0 * k_bias)
  expected = expected_logits(q, k, **{**zeros, **biases})
  np.testing.assert_allclose(z, expected, **tolerance(dtype))


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_large_biases_are_exact_in_factors_of_eight_bits(dtype):
  q, k, q_bias, k_bias = arrays(dtype, size=1e4)
  z = logits(0 * q, k, q_bias, k_bias)
  # Up to 30,000 with 24 bits.
  np.testing.assert_allclose(
    z, expected_logits(0 * q, k, q_bias, k_bias), atol=4e-3, rtol=0
  )
  ones = add_logit_bias(0 * q, k, q_bias=q_bias)[0][..., :3]
  np.testing.assert_array_equal(ones.astype(jnp.bfloat16), ones)
  np.testing.assert_array_equal(ones.astype(jnp.float32).sum(-1), q_bias)


def test_gradient_of_the_bias_is_that_of_the_logits():
  q, k, q_bias, k_bias = arrays('float32')
  noise = np.random.default_rng(1).normal(size=(B, N, T, S))
  loss = lambda *arrays: (logits(*arrays) * noise).sum()
  found = jax.grad(loss, (2, 3))(q, k, q_bias, k_bias)
  for grad, axis in zip(found, (3, 2), strict=True):
    expected = noise.sum(axis).swapaxes(1, 2)
    np.testing.assert_allclose(grad, expected, **tolerance('float32'))
