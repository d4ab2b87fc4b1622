"""Capacity without training: it grows as the theory says."""

import jax.numpy as jnp
import numpy as np
import pytest

from longctx.analysis import capacity
from longctx.ops.recurrence.feature_maps import (
  make_feature_map,
)

IDENTITY = capacity.linear_memory(make_feature_map('identity'))
PAIRS = (4, 16, 32, 64, 128)


def of_identity(key_dim, value_dim):
  return capacity.measured_capacity(
    IDENTITY, PAIRS, key_dim=key_dim, value_dim=value_dim, trials=16
  )


def test_linear_capacity_grows_with_the_state():
  small, wide, tall = (of_identity(*d) for d in ((16, 16), (16, 64), (64, 16)))
  assert wide > 2 * small
  assert tall > 2 * small
  # Not with the number of keys that are orthogonal: equal states are equal.
  np.testing.assert_allclose(wide, tall, rtol=0.35)


def test_orthogonal_keys_never_interfere():
  rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(16, 16)))[0]
  keys = jnp.asarray(rotation[None, :, None], jnp.float32)
  values = np.random.default_rng(1).normal(size=(1, 16, 1, 8))
  values = jnp.asarray(values, jnp.float32)
  for memory in (IDENTITY, capacity.delta_memory()):
    np.testing.assert_allclose(memory(keys, values), values, atol=1e-5)


def test_softmax_answers_what_fills_every_state():
  softmax = capacity.softmax_memory(scale=4 * np.log(128))
  one = dict(num_pairs=128, key_dim=16, value_dim=16, trials=4)
  assert capacity.accuracy(softmax, **one) > 0.95
  assert capacity.accuracy(IDENTITY, **one) < 0.5


def test_positive_features_need_long_keys():
  """At unit length elu + 1 gives every two keys a common overlap."""
  phi = make_feature_map('elu+1')
  short, long = (capacity.linear_memory(phi, length=x) for x in (1.0, 16.0))
  one = dict(num_pairs=8, key_dim=16, value_dim=64, trials=16)
  found = capacity.accuracy(short, **one), capacity.accuracy(long, **one)
  assert found[1] > found[0] + 0.1
  assert capacity.best_accuracy([short, long], **one) == max(found)


@pytest.mark.parametrize(
  ('accuracies', 'expected'),
  [
    ((1.0, 1.0, 1.0), 8),
    ((1.0, 0.8, 0.0), 3),
    ((0.8, 0.0, 0.0), 1),
    ((1.0, 1.0, 0.8), 6),
  ],
)
def test_capacity_is_interpolated(accuracies, expected):
  found = capacity.capacity((2, 4, 8), accuracies)
  assert found == pytest.approx(expected)


@pytest.mark.parametrize(
  ('accuracies', 'expected'),
  [
    ((1.0, 1.0, 1.0), 8),
    # Overloaded, it still answers six of eight.
    ((1.0, 0.8, 0.75), 8 * (0.75 - 0.1) / 0.9),
    ((1.0, 0.5, 0.1), 2),
    ((0.1, 0.05, 0.1), 0),
  ],
)
def test_recall_counts_answers_beyond_chance_at_the_best_load(
  accuracies, expected
):
  found = capacity.most_recalled((2, 4, 8), accuracies, chance=0.1)
  assert found == pytest.approx(expected)


def test_more_pairs_than_codewords_are_refused():
  with pytest.raises(ValueError, match='num_pairs=9'):
    capacity.accuracy(
      IDENTITY, num_pairs=9, key_dim=4, value_dim=4, num_values=8
    )
