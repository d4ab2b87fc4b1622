"""Rotary positions: relative, exact at a million, half-split."""

import jax.numpy as jnp
import numpy as np
import pytest

from longctx.ops.rope import apply_rope
from tests.tolerances import tolerance


def rotate_in_float64(x, positions, base):
  """x [B, T, N, H] as complex numbers times exp(i position frequency)."""
  H = x.shape[-1]
  frequency = base ** (-np.arange(0, H, 2) / H)
  angle = np.asarray(positions, np.float64)[..., None, None] * frequency
  pairs = (x[..., : H // 2] + 1j * x[..., H // 2 :]) * np.exp(1j * angle)
  return np.concatenate([pairs.real, pairs.imag], axis=-1)


@pytest.mark.parametrize('base', [10_000.0, 500_000.0])
@pytest.mark.parametrize('start', [0, 1_000_000, 2**31 - 100, -(2**20)])
def test_rotation_equals_float64_at_any_position(start, base):
  x = np.random.default_rng(0).normal(size=(2, 37, 2, 16))
  positions = start + np.arange(37)
  result = apply_rope(
    jnp.asarray(x, 'float32'), jnp.asarray(positions, jnp.int32), base=base
  )
  expected = rotate_in_float64(x, positions, base)
  np.testing.assert_allclose(result, expected, atol=2e-6, rtol=0)


def test_float64_rotation_keeps_its_precision(x64):
  x = np.random.default_rng(0).normal(size=(1, 5, 1, 8))
  positions = 1_000_000 + np.arange(5)
  result = apply_rope(jnp.asarray(x), jnp.asarray(positions))
  expected = rotate_in_float64(x, positions, 10_000.0)
  # The angle is a multiple of 2^-32 of a turn, 1.5e-9 radians.
  np.testing.assert_allclose(result, expected, atol=5e-9, rtol=0)


@pytest.mark.parametrize('shift', [1, 1000, 1_000_003])
def test_scores_depend_on_the_difference_of_positions_only(shift):
  rng = np.random.default_rng(0)
  q, k = (jnp.asarray(rng.normal(size=(1, 9, 1, 8)), 'float32') for _ in 'qk')
  positions = jnp.arange(9) ** 2

  def scores(positions):
    rotated = [apply_rope(x, positions)[0, :, 0] for x in (q, k)]
    return rotated[0] @ rotated[1].T

  np.testing.assert_allclose(
    scores(positions + shift), scores(positions), **tolerance('float32')
  )


def test_positions_may_differ_by_row_and_bfloat16_is_rounded_once():
  x = np.random.default_rng(0).normal(size=(2, 6, 1, 4))
  x = jnp.asarray(x, 'bfloat16')
  positions = jnp.asarray([[0, 1, 2, 0, 1, 2], [5, 4, 3, 2, 1, 0]])
  result = apply_rope(x, positions)
  assert result.dtype == jnp.bfloat16
  expected = rotate_in_float64(np.asarray(x, 'float64'), positions, 10_000.0)
  expected = jnp.asarray(expected, 'bfloat16')
  np.testing.assert_allclose(
    *(np.asarray(y, 'float32') for y in (result, expected)),
    **tolerance('bfloat16'),
  )
  np.testing.assert_array_equal(result[0, 0], x[0, 0])


def test_wrong_shapes_say_what_to_change():
  with pytest.raises(ValueError, match='head dim H=5 must be even'):
    apply_rope(jnp.zeros((1, 2, 1, 5)), jnp.arange(2))
