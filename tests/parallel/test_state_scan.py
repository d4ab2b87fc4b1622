"""Linear attention on several devices equals linear attention on one."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from longctx.layouts import SequenceLayout
from longctx.ops.linear_attention import linear_attention as local
from longctx.parallel import state_scan
from longctx.parallel.hlo import collective_bytes
from longctx.parallel.mesh import make_mesh
from tests.tolerances import tolerance

B, T, N, K, P, V = 2, 37, 4, 2, 4, 3
BOTH = ('seq', 'model')


def make_inputs(*, decay=None, initial=True, normalize=False, K=K, T=T):
  """Float64 arrays by name; log_decay reaches from 0 down to -8."""
  rng = np.random.default_rng(T)
  inputs = dict(
    q=rng.normal(size=(B, T, N, P)) / math.sqrt(P),
    k=rng.normal(size=(B, T, K, P)),
    v=rng.normal(size=(B, T, K, V)),
  )
  if initial:
    inputs['initial_state'] = rng.normal(size=(B, N, P, V + normalize))
  if decay is not None:
    shape = (B, T, N, P) if decay == 'channel' else (B, T, N)
    inputs['log_decay'] = -8 * rng.uniform(size=shape) ** 3
  if normalize:
    for name in inputs.keys() - {'v', 'log_decay'}:
      inputs[name] = np.abs(inputs[name])
  return inputs


def make_segments(layout):
  """A row that changes where runs begin, and one where they do not.

  The first has documents of several runs, of one run and of two tokens; in the
  second an id comes back, and a document ends within a run.
  """
  ids = np.zeros((B, layout.seq_len), np.int32)
  C = layout.run_len
  for i, begin in enumerate((C, 2 * C, 2 * C + 2, 3 * C, 5 * C)):
    ids[0, begin:] = i + 1
  ids[1, 2:9], ids[1, 11:12] = 5, 7
  return jnp.asarray(ids)


def as_dtype(inputs, dtype):
  return {name: jnp.asarray(x, dtype) for name, x in inputs.items()}


def value_and_gradients(f, inputs):
  """(out, state) and the gradients of a fixed random sum of both."""

  @jax.jit
  def run(inputs):
    results, vjp = jax.vjp(f, inputs)
    rng = np.random.default_rng(0)
    seeds = [jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in results]
    return results, vjp(tuple(seeds))[0]

  return run(inputs)


def expected(inputs, **kwargs):
  with jax.enable_x64(True):
    return value_and_gradients(
      lambda x: local(**x, implementation='reference', **kwargs),
      as_dtype(inputs, 'float64'),
    )


def assert_trees_close(result, expected):
  """Compares leaf by leaf, errors in units of the largest entry."""
  for (path, x), y in zip(
    jax.tree.leaves_with_path(result), jax.tree.leaves(expected), strict=True
  ):
    size = max(1.0, np.abs(y).max())
    np.testing.assert_allclose(
      np.asarray(x) / size,
      np.asarray(y) / size,
      err_msg=jax.tree_util.keystr(path),
      **tolerance('float32'),
    )


def case(layout, axis='seq', *, packed=False, T=T, **kwargs):
  axes = {x: kwargs.pop(x) for x in ('data', 'seq', 'model') if x in kwargs}
  name = [f'{x}{size}' for x, size in axes.items()] + [layout, f'T{T}']
  name += [f'{x}-{y}' if x == 'decay' else x for x, y in kwargs.items() if y]
  name += ['packed'] * packed + ['two-axes'] * (axis == BOTH)
  return pytest.param(axes, layout, axis, packed, T, kwargs, id='-'.join(name))


@pytest.mark.parametrize(
  ('axes', 'layout', 'axis', 'packed', 'T', 'kwargs'),
  [
    case('zigzag', seq=1, decay='head', packed=True),
    case('zigzag', seq=2, decay='head', packed=True),
    case('contiguous', seq=3, decay='channel', packed=True),
    case('zigzag', seq=3, decay='head', normalize=True, initial=False),
    case('contiguous', seq=8, decay='channel', normalize=True, packed=True),
    case('zigzag', seq=8, decay='head', packed=True),
    # Most runs are padding only.
    case('zigzag', seq=8, T=5, decay='channel', K=1),
    case('zigzag', data=2, seq=4, decay='head', packed=True),
    case('contiguous', seq=2, model=2, decay='channel', normalize=True),
    case('zigzag', BOTH, seq=2, model=3, decay='head', packed=True),
    case('contiguous', BOTH, data=2, seq=2, model=2, normalize=True),
  ],
)
def test_shards_equal_one_device(axes, layout, axis, packed, T, kwargs):
  mesh = make_mesh(**axes)
  inputs = make_inputs(T=T, **kwargs)
  shards = mesh.size // axes.get('data', 1)
  shards = shards if axis == BOTH else axes['seq']
  layout = SequenceLayout(layout, T, shards)
  settings = dict(
    scale=0.7,
    normalize=kwargs.get('normalize', False),
    segment_ids=make_segments(layout) if packed else None,
    chunk_size=4,
  )
  result = value_and_gradients(
    lambda x: state_scan.linear_attention(
      **x, mesh=mesh, axis=axis, layout=layout.name, **settings
    ),
    as_dtype(inputs, 'float32'),
  )
  assert_trees_close(result, expected(inputs, **settings))


@pytest.mark.parametrize('layout', ['contiguous', 'zigzag'])
def test_strong_decay_is_exact_and_finite(layout):
  # Half of the steps forget all that any float32 holds.
  inputs = make_inputs(decay='channel')
  rng = np.random.default_rng(0)
  strong = rng.uniform(size=inputs['log_decay'].shape) < 0.5
  inputs['log_decay'][strong] = -100
  inputs['log_decay'][:, 5:30, 0] = -100
  inputs['log_decay'][:, 20, 1] = -np.inf
  mesh = make_mesh(seq=4)
  result = value_and_gradients(
    lambda x: state_scan.linear_attention(**x, mesh=mesh, layout=layout),
    as_dtype(inputs, 'float32'),
  )
  assert_trees_close(result, expected(inputs))


@pytest.mark.parametrize('name', ['contiguous', 'zigzag'])
def test_padding_in_the_layout_changes_nothing(name):
  layout = SequenceLayout(name, T, 4)
  inputs = as_dtype(make_inputs(decay='head', normalize=True), 'float32')
  state = inputs.pop('initial_state')
  segment_ids = make_segments(layout)
  run = functools.partial(
    state_scan.linear_attention, mesh=make_mesh(seq=4), normalize=True
  )
  out, last_state = jax.jit(functools.partial(run, layout=name))(
    **inputs, segment_ids=segment_ids, initial_state=state
  )
  placed, placed_state = jax.jit(
    functools.partial(run, layout=layout, in_layout=True)
  )(
    **{name: layout.apply(x, fill=-3.0) for name, x in inputs.items()},
    segment_ids=layout.apply(segment_ids, fill=-1.0),
    initial_state=state,
  )
  np.testing.assert_array_equal(layout.restore(placed), out)
  np.testing.assert_array_equal(placed_state, last_state)


@pytest.mark.parametrize('reverse', [False, True])
@pytest.mark.parametrize('R', [1, 2, 3, 7, 8])
def test_exclusive_scan_keeps_the_order(R, reverse):
  # Products of matrices do not commute.
  matrices = np.random.default_rng(R).normal(size=(R, 2, 2))
  result = jax.jit(
    jax.shard_map(
      lambda x: state_scan.exclusive_scan(
        x, jnp.matmul, jnp.eye(2)[None], 'seq', reverse=reverse
      ),
      mesh=make_mesh(seq=R),
      in_specs=PartitionSpec('seq'),
      out_specs=PartitionSpec('seq'),
      check_vma=False,
    )
  )(jnp.asarray(matrices, jnp.float32))
  order = list(range(R))[:: -1 if reverse else 1]
  product = np.eye(2)
  for r in order:
    np.testing.assert_allclose(result[r], product, **tolerance('float32'))
    product = product @ matrices[r]


@pytest.mark.parametrize('name', ['contiguous', 'zigzag'])
def test_run_states_take_matrices_for_decays(name):
  # As in the delta rule: S' = decay S + state, with a decay per run, [2, 2].
  layout = SequenceLayout(name, 20, 5)
  count = layout.runs * layout.num_shards
  rng = np.random.default_rng(0)
  decays, states = rng.normal(size=(2, count, 2, 2)) / 2
  begin = rng.normal(size=(2, 2))
  # The run that is at each place.
  order = layout.order[:: layout.run_len] // layout.run_len

  def combine(earlier, later):
    return later[0] @ earlier[0], later[0] @ earlier[1] + later[1]

  result = jax.jit(
    jax.shard_map(
      lambda begin, *elements: state_scan.run_states(
        begin[None],
        elements,
        combine,
        (jnp.eye(2)[None], jnp.zeros((1, 2, 2))),
        layout,
        'seq',
      ),
      mesh=make_mesh(seq=5),
      in_specs=(PartitionSpec(), *[PartitionSpec(None, 'seq')] * 2),
      out_specs=PartitionSpec(None, 'seq'),
      check_vma=False,
    )
  )(
    *(
      jnp.asarray(x, jnp.float32)
      for x in (begin, decays[order][None], states[order][None])
    )
  )
  for run in range(count):
    place = np.flatnonzero(order == run)[0]
    np.testing.assert_allclose(result[0, place], begin, **tolerance('float32'))
    begin = decays[run] @ begin + states[run]


@pytest.mark.parametrize(
  ('axes', 'layout', 'kwargs'),
  [
    (dict(seq=2), 'zigzag', dict(decay='channel', packed=True)),
    (dict(seq=3), 'contiguous', dict(decay='head', with_state=False)),
    (dict(seq=8), 'zigzag', dict(normalize=True)),
    (dict(seq=8), 'contiguous', dict(decay='channel', packed=True)),
    (
      dict(data=2, seq=2, model=2),
      'zigzag',
      dict(decay='head', packed=True, normalize=True),
    ),
  ],
)
def test_bytes_on_the_wire_are_those_of_the_formula(axes, layout, kwargs):
  kwargs = dict(kwargs)
  mesh = make_mesh(**axes)
  formula = state_scan.wire_bytes(
    B, N, P, V, mesh=mesh, layout=layout, **kwargs
  )
  with_state = kwargs.pop('with_state', True)
  T = 96
  inputs = make_inputs(
    T=T, decay=kwargs.get('decay'), normalize='normalize' in kwargs
  )
  inputs = as_dtype(inputs, 'float32')
  if kwargs.get('packed'):
    inputs['segment_ids'] = jnp.zeros((B, T), jnp.int32)

  @jax.jit
  def run(inputs):
    out, state = state_scan.linear_attention(
      **inputs,
      mesh=mesh,
      layout=layout,
      in_layout=True,
      normalize='normalize' in kwargs,
    )
    return (out, state) if with_state else out

  counted = collective_bytes(run.lower(inputs).compile().as_text())
  assert {kind: size for kind, size in counted.items() if size} == {
    kind: size for kind, size in formula.items() if size
  }


@pytest.mark.parametrize(
  ('change', 'error', 'message'),
  [
    (dict(layout='striped'), NotImplementedError, "'contiguous' or 'zigzag'"),
    (dict(layout='zigzig'), ValueError, 'unknown layout'),
    (dict(axis='rows'), ValueError, "axis='rows' must be of the mesh"),
    (dict(K=1), ValueError, 'key_heads=1 must be a multiple of .* model=2'),
    (dict(B=3), ValueError, 'batch=3 must be a multiple of .* data=2'),
    (
      dict(layout=SequenceLayout('zigzag', 8, 4)),
      ValueError,
      'num_shards=4 must be the 2 shards of the mesh',
    ),
    (
      dict(layout=SequenceLayout('zigzag', 7, 2)),
      ValueError,
      'must have length 7',
    ),
    (
      dict(layout='zigzag', T=7, in_layout=True),
      ValueError,
      'the length before padding',
    ),
    (
      dict(initial_state=jnp.zeros((2, 2, 4, 4)), normalize=True),
      ValueError,
      r'must be \(2, 2, 4, 5\)',
    ),
  ],
)
def test_wrong_call_says_what_to_change(change, error, message):
  call = dict(B=2, T=8, K=2) | change
  B, T, K = (call.pop(letter) for letter in 'BTK')
  k = jnp.zeros((B, T, K, 4))
  with pytest.raises(error, match=message):
    state_scan.linear_attention(
      jnp.zeros((B, T, 2, 4)),
      k,
      k,
      mesh=make_mesh(data=2, seq=2, model=2),
      **call,
    )
