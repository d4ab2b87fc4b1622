"""The last state alone: equal to that of the recurrence, however long."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx.ops.recurrence import reference
from longctx.ops.recurrence.final_state import final_state
from longctx.ops.recurrence.steps import Steps
from tests.ops.recurrence import cases
from tests.tolerances import tolerance


@pytest.mark.parametrize(
  ('rule', 'decay', 'packed'),
  [
    *(
      ('linear', decay, packed)
      for decay in (None, 'head', 'channel')
      for packed in (False, True)
    ),
    ('delta', None, True),
    ('delta', 'channel', True),
  ],
)
def test_final_state_equals_that_of_the_recurrence(rule, decay, packed):
  inputs = cases.make_inputs(rule, 21, B=3, N=4, K=2, decay=decay)
  # One row is one document, one continues into others, one only begins.
  changes = np.zeros((3, 21), np.int32)
  changes[1, [4, 13]] = changes[2, 0] = 1
  segment_index = jnp.asarray(changes.cumsum(1)) if packed else None

  def split(inputs):
    inputs = dict(inputs)
    state = inputs.pop('initial_state')
    return Steps(**inputs), state

  def last(inputs):
    steps, state = split(inputs)
    factor, written = final_state(steps, segment_index, chunk_size=8)
    kept = factor @ state if rule == 'delta' else factor * state
    return kept + written

  def expected(inputs):
    steps, state = split(inputs)
    _, state = reference.recurrence(
      steps,
      state,
      segment_index,
      scale=1.0,
      chunk_size=1,
      out_dtype=state.dtype,
    )
    return state

  def value_and_gradients(f, dtype):
    arrays = cases.as_dtype(inputs, dtype)
    return jax.jit(lambda x: cases.value_and_gradients(f, x))(arrays)

  result = value_and_gradients(last, 'float32')
  with jax.enable_x64(True):
    exact = value_and_gradients(expected, 'float64')
  cases.assert_trees_close(result, exact, **tolerance('float32'))


@pytest.mark.parametrize('rate', [1e-5, 1e-2, 30.0])
def test_final_state_is_precise_after_131072_steps(rate):
  T = 131_072
  rng = np.random.default_rng(0)
  k, v = rng.uniform(size=(2, 1, T, 1, 2)).astype(np.float32)
  log_decay = -(rate * rng.uniform(size=(1, T, 1))).astype(np.float32)
  decay, state = jax.jit(final_state)(Steps(k, k, v, log_decay=log_decay))
  total = np.cumsum(log_decay[0, ::-1, 0].astype(np.float64))[::-1]
  weights = np.exp(np.append(total[1:], 0))
  expected = np.einsum('T,TP,TV->PV', weights, k[0, :, 0], v[0, :, 0])
  size = np.abs(expected).max()
  np.testing.assert_allclose(
    state[0, 0] / size, expected / size, **tolerance('float32')
  )
  np.testing.assert_allclose(
    decay.squeeze(), np.exp(total[0]), **tolerance('float32')
  )
