"""The one rule for where parameters lie."""

import jax
import pytest
from jax.sharding import PartitionSpec as P

from longctx import tasks
from longctx.parallel.parameters import parameter_spec
from longctx.training import runs, steps
from longctx.training.config import ParallelConfig
from tests.tiny import tiny_config


@pytest.mark.parametrize(
  ('path', 'shape', 'devices', 'expected'),
  [
    # Tensor parallelism: what a head makes stays with it.
    (
      'blocks.0.attention.query.kernel',
      (64, 32),
      dict(model=2),
      P(None, 'model'),
    ),
    (
      'blocks.0.attention.out.kernel',
      (32, 64),
      dict(model=2),
      P('model', None),
    ),
    ('blocks.0.attention.key_conv', (4, 32), dict(model=2), P(None, 'model')),
    ('blocks.0.mlp.down.kernel', (32, 64), dict(model=2), P('model', None)),
    (
      'blocks.0.attention.gate.kernel',
      (64, 32),
      dict(model=2),
      P(None, 'model'),
    ),
    (
      'blocks.0.attention.gate_down.kernel',
      (64, 8),
      dict(model=2),
      P(None, None),
    ),
    (
      'blocks.0.attention.gate_up.kernel',
      (8, 32),
      dict(model=2),
      P(None, 'model'),
    ),
    ('blocks.0.attention.decay_up.bias', (32,), dict(model=2), P(None)),
    # A map of 8 numbers to 8 in each of four heads.
    (
      'blocks.0.attention.key_features.parameters.kernel',
      (32, 8),
      dict(model=2),
      P('model', None),
    ),
    ('blocks.0.attention.query.kernel', (64, 33), dict(model=2), P(None, None)),
    # FSDP: the largest axis that divides and is free.
    ('embedding', (96, 64), dict(data=4), P('data', None)),
    ('embedding', (97, 64), dict(data=4), P(None, 'data')),
    (
      'blocks.0.mlp.up.kernel',
      (64, 128),
      dict(data=4, model=2),
      P('data', 'model'),
    ),
    # Too small to be worth gathering.
    ('norm.scale', (64,), dict(data=4, model=2), P(None)),
  ],
)
def test_rule(path, shape, devices, expected):
  assert parameter_spec(tuple(path.split('.')), shape, **devices) == expected


def test_fsdp_splits_parameters_and_optimizer_state_alike():
  config = tiny_config(
    model=dict(d_model=64, mlp_dim=64),
    parallel=dict(data=4, fsdp=True),
  )
  task = tasks.make_task(**config.task)
  model = runs.resolve_model(config.model, task)
  placement = runs.make_placement(config.parallel, task.seq_len)
  state = steps.init_state(model, config, placement=placement)
  split = [x for x in jax.tree.leaves(state) if x.size >= 1024]
  # Each array of parameters, and its two moments.
  assert len(split) % 3 == 0
  for x in split:
    assert x.addressable_shards[0].data.size == x.size // 4
  whole = [x for x in jax.tree.leaves(state) if x.size < 1024]
  assert all(x.sharding.is_fully_replicated for x in whole)


def test_mesh_axes_must_be_positive():
  with pytest.raises(ValueError, match=r'parallel.seq=0'):
    ParallelConfig(seq=0)
