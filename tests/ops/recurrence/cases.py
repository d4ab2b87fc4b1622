"""Inputs of recurrences, and what their tests compare."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from longctx.ops.recurrence import gated_delta_rule, linear_attention

OPS = {'linear': linear_attention, 'delta': gated_delta_rule}


def make_inputs(
  rule,
  T,
  *,
  B=2,
  N=2,
  K=2,
  P=4,
  V=3,
  decay=None,
  beta=None,
  keys='random',
  normalize=False,
):
  """Float64 arrays by name; log_decay reaches from 0 down to -8.

  Those of the delta rule have keys of length one, and beta in [0, 2].
  """
  rng = np.random.default_rng(T)
  k = rng.normal(size=(B, T, K, P))
  inputs = dict(
    q=rng.normal(size=(B, T, N, P)) / math.sqrt(P),
    k=k,
    v=rng.normal(size=(B, T, K, V)),
    initial_state=rng.normal(size=(B, N, P, V + normalize)),
  )
  if rule == 'delta':
    if keys == 'parallel':
      k = k[:, :1] + 0.01 * k
    inputs['k'] = k / np.linalg.norm(k, axis=-1, keepdims=True)
    inputs['beta'] = rng.uniform(0, 2, size=(B, T, N))
    if beta is not None:
      inputs['beta'] = np.full((B, T, N), beta)
  if decay is not None:
    shape = (B, T, N, P) if decay == 'channel' else (B, T, N)
    # Cubed: most steps remember, some forget nearly all.
    inputs['log_decay'] = -8 * rng.uniform(size=shape) ** 3
  if normalize:
    for name in ('q', 'k', 'initial_state'):
      inputs[name] = np.abs(inputs[name])
  return inputs


def make_segments(B, T, documents=3):
  rng = np.random.default_rng(T)
  return jnp.asarray(
    np.sort(rng.integers(0, documents, size=(B, T))), jnp.int32
  )


def as_dtype(inputs, dtype):
  return {name: jnp.asarray(x, dtype) for name, x in inputs.items()}


def value_and_gradients(f, inputs):
  """f(inputs), a tree, and the gradients of a fixed random sum of it."""
  results, vjp = jax.vjp(f, inputs)
  leaves, tree = jax.tree.flatten(results)
  rng = np.random.default_rng(0)
  seeds = [jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in leaves]
  return results, vjp(tree.unflatten(seeds))[0]


def assert_trees_close(result, expected, **tolerances):
  """Compares leaf by leaf, errors in units of the largest entry."""
  for (path, x), y in zip(
    jax.tree.leaves_with_path(result), jax.tree.leaves(expected), strict=True
  ):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    size = max(1.0, np.abs(y).max())
    name = jax.tree_util.keystr(path)
    np.testing.assert_allclose(x / size, y / size, err_msg=name, **tolerances)
