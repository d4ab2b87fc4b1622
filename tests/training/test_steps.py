"""Accumulated gradients are summed in float32, whatever parameters are in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx.training import runs, steps
from tests.tiny import tiny_config


@pytest.mark.parametrize('parts', [16, 256])
def test_gradients_of_parts_are_summed_in_float32(parts):
  rows = 1 + 0.1 * jax.random.normal(jax.random.key(0), (parts, 32))
  rows = rows.astype(jnp.bfloat16)

  def grad(params, part, key):
    return {'w': part['x'][0]}, {'weight': jnp.float32(1)}

  grads, out = steps._accumulate(grad, None, {'x': rows}, None, parts)
  exact = np.asarray(rows, np.float64).sum(0)
  assert grads['w'].dtype == jnp.float32
  np.testing.assert_allclose(grads['w'], exact, rtol=1e-6)
  assert out['weight'] == parts


@pytest.mark.parametrize('accumulation', [1, 4])
def test_step_keeps_the_types_of_its_state(accumulation):
  config = tiny_config(
    model={'param_dtype': 'bfloat16'},
    optimizer={'accumulation': accumulation},
  )
  model = runs.resolve_model(config.model, runs.tasks.make_task(**config.task))
  graph, _ = steps.abstract_params(model)
  state = steps.abstract_state(model, config)
  batch = {
    key: jax.ShapeDtypeStruct((8, 16), dtype)
    for key, dtype in (
      ('tokens', jnp.int32),
      ('labels', jnp.int32),
      ('weights', jnp.float32),
    )
  }
  train = steps.make_steps(graph, config).train
  after, _ = jax.eval_shape(train, state, batch, np.int32(1))
  dtypes = lambda tree: jax.tree.map(lambda x: x.dtype, tree)
  assert dtypes(after) == dtypes(state)
  assert after['params']['embedding'].dtype == jnp.bfloat16
