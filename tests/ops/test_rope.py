"""Rotary positions: relative, exact at a million, half-split."""

import jax.numpy as jnp
import numpy as np
import pytest

from longctx.ops.rope import Rope, apply_rope
from longctx.ops.rope_scaling import SCALINGS, parse_scaling
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


def test_a_part_of_the_head_turns_and_the_rest_stays():
  x = np.random.default_rng(0).normal(size=(1, 9, 2, 12))
  x, positions = jnp.asarray(x, 'float32'), jnp.arange(9)
  result = Rope(dim=8).rotate(x, positions)
  np.testing.assert_array_equal(result[..., 8:], x[..., 8:])
  expected = rotate_in_float64(np.asarray(x[..., :8]), positions, 10_000.0)
  np.testing.assert_allclose(result[..., :8], expected, atol=1e-6)


SCALED = {
  'none': 'none',
  'linear': 'linear(factor=4.0)',
  'ntk': 'ntk(factor=4.0)',
  'yarn': 'yarn(factor=4.0, original_context=64)',
  'llama3': 'llama3(factor=4.0, original_context=64)',
  'longrope': 'longrope(short_factor=(1.0, 1.5, 2.0, 2.5), '
  'long_factor=(1.0, 2.0, 3.0, 4.0), original_context=64, context=256)',
}


@pytest.mark.parametrize('name', SCALINGS)
def test_scaling_keeps_fast_pairs_and_slows_slow_ones(name):
  scaling = parse_scaling(SCALED[name])
  plain = Rope(base=1e4).frequencies(8)
  scaled = Rope(base=1e4, scaling=scaling).frequencies(8)
  slower = plain / scaled
  assert (np.diff(slower) >= -1e-9).all()
  # The slowest pair takes four times as many tokens to a turn.
  assert slower[-1] == pytest.approx(1 if name == 'none' else 4)
  if name in ('ntk', 'yarn', 'llama3'):
    assert slower[0] == pytest.approx(1)


def test_a_query_that_turns_again_keeps_its_amplitude():
  scaling = parse_scaling('yarn(factor=16.0, original_context=8)')
  rope = Rope(scaling=scaling)
  x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 1, 8)), 'float32')
  at = jnp.arange(5) * 7
  there = rope.rotate(x, at)
  back = rope.rotate(there, -at, again=True)
  amplitude = 0.1 * np.log(16) + 1
  np.testing.assert_allclose(back, amplitude * x, atol=1e-6)


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('yarn', 'yarn needs factor'),
    ('yarn(factor=2.0)', 'yarn needs original_context'),
    ('linear(4)', "cannot read 'linear"),
    ('linear(factor=0.5)', r'factor=0.5 must be in \[1'),
    ('yran(factor=2.0)', "unknown scaling 'yran'; did you mean yarn"),
    ('linear(factor=2.0, beta=1)', "linear has no 'beta'"),
    (
      'llama3(factor=2.0, original_context=8, low_freq_factor=4.0)',
      'must be below high_freq_factor=4.0',
    ),
  ],
)
def test_a_wrong_scaling_says_what_to_change(text, message):
  with pytest.raises(ValueError, match=message):
    parse_scaling(text)


def test_factors_are_as_many_as_pairs():
  scaling = parse_scaling(SCALED['longrope'])
  with pytest.raises(ValueError, match='has 4 factors, and 16 rotated'):
    Rope(scaling=scaling).frequencies(16)
