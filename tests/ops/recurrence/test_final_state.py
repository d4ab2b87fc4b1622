"""The last state alone: equal to that of the recurrence, however long."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx.ops.recurrence.additive import reference
from longctx.ops.recurrence.additive.final_state import final_state
from tests.tolerances import tolerance


@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize('decay', [None, 'head', 'channel'])
def test_final_state_equals_that_of_the_recurrence(decay, packed):
  B, T, N, K, P, V = 3, 21, 4, 2, 3, 2
  rng = np.random.default_rng(0)
  inputs = dict(
    k=rng.normal(size=(B, T, K, P)), v=rng.normal(size=(B, T, K, V))
  )
  if decay is not None:
    shape = (B, T, N, P) if decay == 'channel' else (B, T, N)
    inputs['log_decay'] = -8 * rng.uniform(size=shape) ** 3
  initial_state = rng.normal(size=(B, N, P, V))
  # One row is one document, one continues into others, one only begins.
  changes = np.zeros((B, T), np.int32)
  changes[1, [4, 13]] = changes[2, 0] = 1
  segment_index = jnp.asarray(changes.cumsum(1)) if packed else None

  def last(inputs, initial_state):
    decay, state = final_state(
      **inputs, num_heads=N, segment_index=segment_index
    )
    return decay * initial_state + state

  def expected(inputs, initial_state):
    _, state = reference.linear_attention(
      jnp.zeros((B, T, N, P)),
      inputs['k'],
      inputs['v'],
      log_decay=inputs.get('log_decay'),
      scale=1.0,
      segment_index=segment_index,
      initial_state=initial_state,
      chunk_size=1,
    )
    return state

  def value_and_gradients(f, dtype):
    args = jax.tree.map(
      lambda x: jnp.asarray(x, dtype), (inputs, initial_state)
    )
    state, vjp = jax.vjp(jax.jit(f), *args)
    seed = np.random.default_rng(1).normal(size=state.shape)
    return state, vjp(jnp.asarray(seed, dtype))

  result = value_and_gradients(last, 'float32')
  with jax.enable_x64(True):
    exact = value_and_gradients(expected, 'float64')
  for x, y in zip(jax.tree.leaves(result), jax.tree.leaves(exact), strict=True):
    x, y = np.asarray(x), np.asarray(y)
    size = max(1.0, np.abs(y).max())
    np.testing.assert_allclose(x / size, y / size, **tolerance('float32'))


@pytest.mark.parametrize('rate', [1e-5, 1e-2, 30.0])
def test_final_state_is_precise_after_131072_steps(rate):
  T = 131_072
  rng = np.random.default_rng(0)
  k, v = rng.uniform(size=(2, 1, T, 1, 2)).astype(np.float32)
  log_decay = -(rate * rng.uniform(size=(1, T, 1))).astype(np.float32)
  decay, state = jax.jit(final_state, static_argnames='num_heads')(
    k, v, num_heads=1, log_decay=log_decay
  )
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
