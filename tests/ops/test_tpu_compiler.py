"""The kernels as the real TPU compiler sees them, on a machine without one."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, SingleDeviceSharding

from longctx import masks
from longctx.ops.dot_product_attention import BlockSizes, dot_product_attention
from longctx.ops.recurrence import gated_delta_rule, linear_attention
from longctx.ops.target import Target, compiling_for
from longctx.plan import topologies
from tests import needs
from tests.test_benchmarks import lines_of

pytestmark = needs.tpu_compiler

CHIPS = ('v5e:2x4', 'v5p:2x2x1', 'v6e:2x4', 'tpu7x:2x2x1')
B, T, N, K = 2, 300, 4, 2
BLOCKS = BlockSizes(128, 128, 128, 128)


def kernels_of(function, chip, *arrays, **named):
  """How many kernels the compiler makes of a function and its gradient.

  Args:
    function: of arrays, to a tree of them.
    chip: a topology.
    *arrays: (dtype, shape), of which the gradient is taken.
    **named: likewise, without a gradient.
  """
  device = topologies.describe(chip)[0]
  sharding = SingleDeviceSharding(device)
  array = lambda x: jax.ShapeDtypeStruct(x[1], x[0], sharding=sharding)
  arrays = [array(x) for x in arrays]
  named = {name: array(x) for name, x in named.items()}

  def loss(arrays, named):
    out = function(*arrays, **named)
    return sum(x.astype(jnp.float32).sum() for x in jax.tree.leaves(out))

  mesh = Mesh(np.array([device]), ('x',))
  with (
    compiling_for(Target('tpu', device.device_kind)),
    jax.sharding.use_abstract_mesh(mesh.abstract_mesh),
  ):
    program = jax.jit(jax.grad(loss)).lower(arrays, named).compile()
  return program.as_text().count('custom_call_target="tpu_custom_call"')


def attention_kernels(chip, *, H=128, dtype='bfloat16', indices=(), **options):
  rate = options.pop('rate', 0)
  shapes = {
    'q_positions': (T,),
    'k_positions': (T,),
    'q_segment_ids': (B, T),
  }

  def attend(q, k, v, **given):
    if rate:
      given['dropout'] = (rate, jax.random.key(0))
    # Of the smallest blocks: what is compiled is as long as a block is large.
    return dot_product_attention(
      q, k, v, return_lse=True, block_sizes=BLOCKS, **given, **options
    )

  heads = [(dtype, (B, T, n, H)) for n in (N, K, K)]
  named = {name: ('int32', shapes[name]) for name in indices}
  return kernels_of(attend, chip, *heads, **named)


PLACES = ('q_positions', 'k_positions')
CASES = {
  'float32': dict(dtype='float32'),
  'H64': dict(H=64),
  'H256': dict(H=256),
  'window': dict(mask=masks.SlidingWindow(100)),
  'longformer': dict(mask=masks.SlidingWindow(64, 64) | masks.GlobalTokens(3)),
  'dilated': dict(mask=masks.Causal() & masks.Dilated(64, 3)),
  'bigbird': dict(mask=masks.RandomBlocks(64, 3, 0) | masks.SlidingWindow(64)),
  'pattern': dict(mask=masks.BlockSparse(64, np.eye(20, 40, dtype=int))),
  'softpick': dict(normalizer='softpick', indices=PLACES),
  'sigmoid': dict(normalizer='sigmoid'),
  'everything': dict(
    indices=(*PLACES, 'q_segment_ids'),
    logits_soft_cap=20.0,
    alibi_slopes=np.ones(N, np.float32),
    rate=0.1,
  ),
}


@pytest.mark.parametrize('precision', ['highest', 'high'])
def test_attention_compiles_at_every_precision(precision):
  with jax.default_matmul_precision(precision):
    for dtype in ('float32', 'bfloat16'):
      assert attention_kernels('v5e:2x4', dtype=dtype) == 3


@pytest.mark.parametrize('chip', CHIPS)
def test_attention_compiles_for_every_chip(chip):
  assert attention_kernels(chip, indices=(*PLACES, 'q_segment_ids')) == 3


@pytest.mark.parametrize('case', CASES)
def test_attention_compiles_with_every_option(case):
  assert attention_kernels('v5e:2x4', **CASES[case]) == 3


@pytest.mark.parametrize(
  ('chip', 'decay'),
  [*((chip, 'head') for chip in CHIPS), (CHIPS[1], 'channel')],
)
@pytest.mark.parametrize('op', [linear_attention, gated_delta_rule])
def test_recurrence_compiles_for_every_chip(op, chip, decay):
  P, V = 64, 128
  arrays = [('bfloat16', (B, T, n, d)) for n, d in ((N, P), (K, P), (K, V))]
  if op is gated_delta_rule:
    arrays.append(('bfloat16', (B, T, N)))
  shape = (B, T, N) if decay == 'head' else (B, T, N, P)
  named = dict(log_decay=('float32', shape), segment_ids=('int32', (B, T)))
  # The states between chunks, and the gradients; the outputs are not used.
  assert kernels_of(op, chip, *arrays, **named) >= 2


# What the compiler made of the kernels when they were written, and a tenth.
LIMITS = json.loads(
  pathlib.Path(__file__).with_name('kernel_limits.json').read_text()
)


def test_kernels_keep_to_their_limits():
  found = {
    f'{line["chip"]} {line["kernel"]}': line
    for line in lines_of('kernels.py', '--chips=v5p')
    if 'kernel' in line
  }
  assert found.keys() == LIMITS.keys()
  for name, limits in LIMITS.items():
    for key, limit in limits.items():
      assert found[name][key] <= 1.1 * limit, (name, key)
