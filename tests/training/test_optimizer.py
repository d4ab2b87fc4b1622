"""Optimizers against the update rules that their papers give."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from longctx.training.optimizer import (
  OPTIMIZERS,
  OptimizerConfig,
  decay_mask,
  make_optimizer,
  make_schedule,
  muon_axes,
)


@pytest.fixture(scope='module')
def params():
  return {
    'embedding': jnp.ones((6, 4)),
    'position_table': jnp.ones((8, 4)),
    'blocks': {
      0: {
        'norm': {'scale': jnp.ones(4)},
        'query': {'kernel': jnp.full((4, 8), 0.5)},
        'out': {'kernel': jnp.full((8, 4), 0.5)},
        'query_conv': jnp.ones((3, 8)),
      }
    },
    'head': jnp.full((4, 6), 0.5),
  }


def leaf_names(tree, keep):
  leaves = jax.tree_util.tree_leaves_with_path(
    tree, is_leaf=lambda x: x is None or isinstance(x, tuple)
  )
  return {
    jax.tree_util.keystr(path, simple=True, separator='.')
    for path, leaf in leaves
    if keep(leaf)
  }


def test_only_weight_matrices_decay(params):
  names = leaf_names(decay_mask(params), bool)
  assert names == {'blocks.0.query.kernel', 'blocks.0.out.kernel', 'head'}


def test_muon_takes_the_inner_matrices_alone(params):
  names = leaf_names(muon_axes(params), lambda axes: axes is not None)
  assert names == {'blocks.0.query.kernel', 'blocks.0.out.kernel'}


def test_muon_reads_a_kernel_with_heads_as_the_matrix_it_stands_for():
  kernels = {'query': jnp.ones((8, 2, 4)), 'out': jnp.ones((2, 4, 8))}
  axes = muon_axes(kernels)
  assert axes['query'].reduction_axis == (0,)
  assert axes['query'].output_axis == (1, 2)
  assert axes['out'].reduction_axis == (0, 1)
  assert axes['out'].output_axis == (2,)


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_zero_gradient_shrinks_matrices_and_nothing_else(name, params):
  config = OptimizerConfig(
    name=name, learning_rate=0.1, weight_decay=0.5, schedule='constant'
  )
  optimizer = make_optimizer(config, 10)
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = jax.jit(optimizer.update)(zeros, optimizer.init(params), params)
  moved = leaf_names(updates, lambda u: bool(jnp.abs(u).max() > 0))
  expected = {'blocks.0.query.kernel', 'blocks.0.out.kernel', 'head'}
  # Muon's head is AdamW's, which decays nothing there.
  assert moved == expected - ({'head'} if name == 'muon' else set())
  kernel = updates['blocks'][0]['query']['kernel']
  np.testing.assert_allclose(kernel, -0.1 * 0.5 * 0.5, rtol=1e-6)


def test_muon_update_is_close_to_orthogonal():
  config = OptimizerConfig(
    name='muon', learning_rate=1.0, weight_decay=0.0, schedule='constant'
  )
  params = {'query': {'kernel': jnp.zeros((8, 8))}}
  grads = {'query': {'kernel': jax.random.normal(jax.random.key(0), (8, 8))}}
  optimizer = make_optimizer(config, 10)
  updates, _ = optimizer.update(grads, optimizer.init(params), params)
  singular = np.linalg.svd(updates['query']['kernel'], compute_uv=False)
  # Newton-Schulz leaves them within about 30% of one value.
  assert singular.max() / singular.min() < 2


@pytest.mark.parametrize(
  ('schedule', 'expected'),
  [
    ('constant', [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]),
    ('linear', [0.25, 0.5, 0.75, 1.0, 0.775, 0.55, 0.325]),
    ('step', [0.25, 0.5, 0.75, 1.0, 1.0, 0.1, 0.1]),
  ],
)
def test_schedule_warms_up_and_then_follows_its_shape(schedule, expected):
  config = OptimizerConfig(
    learning_rate=1.0,
    schedule=schedule,
    warmup_steps=3,
    final_factor=0.1,
    step_at=5,
  )
  found = [float(make_schedule(config, 7)(step)) for step in range(7)]
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_cosine_schedule_ends_at_the_final_factor():
  config = OptimizerConfig(learning_rate=2.0, final_factor=0.1)
  schedule = make_schedule(config, 100)
  np.testing.assert_allclose(schedule(0), 2.0)
  np.testing.assert_allclose(schedule(50), 1.1, rtol=1e-5)
  np.testing.assert_allclose(schedule(100), 0.2, rtol=1e-5)


def test_gradient_is_clipped_to_the_global_norm():
  config = OptimizerConfig(
    name='sgd',
    b1=0.0,
    learning_rate=1.0,
    schedule='constant',
    weight_decay=0.0,
    clip_norm=0.5,
  )
  params = {'a': jnp.zeros(2), 'b': jnp.zeros(3)}
  grads = {'a': jnp.full(2, 30.0), 'b': jnp.full(3, -7.0)}
  for clip_norm, norm in ((0.5, 0.5), (0.0, optax.tree.norm(grads))):
    optimizer = make_optimizer(
      dataclasses.replace(config, clip_norm=clip_norm), 10
    )
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    np.testing.assert_allclose(optax.tree.norm(updates), norm, rtol=1e-6)
