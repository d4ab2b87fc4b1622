"""Recurrences on several devices equal the same recurrences on one."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx.costs.hlo import collective_bytes
from longctx.ops.recurrence import gated_delta_rule, linear_attention
from longctx.parallel import recurrences
from longctx.parallel.layout import SequenceLayout
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


def make_delta_inputs(**kwargs):
  """Keys of length one, and steps of size 0 to 2."""
  inputs = make_inputs(**kwargs)
  rng = np.random.default_rng(1)
  inputs['k'] /= np.linalg.norm(inputs['k'], axis=-1, keepdims=True)
  inputs['beta'] = 2 * rng.uniform(size=inputs['q'].shape[:3])
  return inputs


def make_segments(layout):
  """A row that changes where runs begin, and one where they do not.

  The first has documents of several runs, of one run and of two tokens; in the
  second an id comes back, and a document ends within a run.
  """
  ids = np.zeros((B, layout.seq_len), np.int32)
  C = layout.span_len
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


def expected(inputs, op=linear_attention, **kwargs):
  with jax.enable_x64(True):
    return value_and_gradients(
      lambda x: op(**x, implementation='reference', **kwargs),
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
    lambda x: recurrences.linear_attention(
      **x, mesh=mesh, axis=axis, layout=layout.name, **settings
    ),
    as_dtype(inputs, 'float32'),
  )
  assert_trees_close(result, expected(inputs, **settings))


@pytest.mark.parametrize(
  ('axes', 'layout', 'axis', 'packed', 'T', 'kwargs'),
  [
    case('zigzag', seq=1, packed=True),
    case('contiguous', seq=3, decay='head', packed=True),
    case('zigzag', seq=8, decay='channel', packed=True),
    case('zigzag', seq=8, T=5, decay='head', K=1, initial=False),
    case('zigzag', BOTH, data=2, seq=2, model=2, decay='channel'),
    case('contiguous', seq=2, model=2, packed=True),
  ],
)
def test_shards_equal_one_device_under_the_delta_rule(
  axes, layout, axis, packed, T, kwargs
):
  mesh = make_mesh(**axes)
  inputs = make_delta_inputs(T=T, **kwargs)
  shards = mesh.size // axes.get('data', 1)
  shards = shards if axis == BOTH else axes['seq']
  layout = SequenceLayout(layout, T, shards)
  settings = dict(
    scale=0.7,
    segment_ids=make_segments(layout) if packed else None,
    chunk_size=4,
  )
  result = value_and_gradients(
    lambda x: recurrences.gated_delta_rule(
      **x, mesh=mesh, axis=axis, layout=layout.name, **settings
    ),
    as_dtype(inputs, 'float32'),
  )
  assert_trees_close(result, expected(inputs, gated_delta_rule, **settings))


@pytest.mark.parametrize('op', [linear_attention, gated_delta_rule])
def test_kernels_of_shards_equal_one_device(op):
  layout = SequenceLayout('zigzag', T, 2)
  make = make_inputs if op is linear_attention else make_delta_inputs
  inputs = make(decay='head')
  settings = dict(scale=0.7, segment_ids=make_segments(layout), chunk_size=16)
  run = functools.partial(
    getattr(recurrences, op.__name__),
    mesh=make_mesh(seq=2, model=2),
    layout='zigzag',
    implementation='pallas',
    **settings,
  )
  result = value_and_gradients(lambda x: run(**x), as_dtype(inputs, 'float32'))
  assert_trees_close(result, expected(inputs, op, **settings))


def test_padding_in_the_layout_changes_nothing_under_the_delta_rule():
  layout = SequenceLayout('zigzag', T, 4)
  inputs = as_dtype(make_delta_inputs(decay='head'), 'float32')
  state = inputs.pop('initial_state')
  run = functools.partial(
    recurrences.gated_delta_rule, mesh=make_mesh(seq=4), initial_state=state
  )
  out, last_state = jax.jit(functools.partial(run, layout='zigzag'))(**inputs)
  placed, placed_state = jax.jit(
    functools.partial(run, layout=layout, in_layout=True)
  )(**{name: layout.apply(x, fill=-3.0) for name, x in inputs.items()})
  np.testing.assert_array_equal(layout.restore(placed), out)
  np.testing.assert_array_equal(placed_state, last_state)


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
    lambda x: recurrences.linear_attention(**x, mesh=mesh, layout=layout),
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
    recurrences.linear_attention, mesh=make_mesh(seq=4), normalize=True
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


@pytest.mark.parametrize(
  ('axes', 'layout', 'kwargs'),
  [
    (dict(seq=2), 'zigzag', dict(decay='channel', packed=True)),
    (dict(seq=3), 'contiguous', dict(decay='head', with_state=False)),
    (dict(seq=8), 'zigzag', dict(normalize=True)),
    (dict(seq=8), 'contiguous', dict(decay='channel', packed=True)),
    (dict(seq=8), 'zigzag', dict(decay='matrix', packed=True)),
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
  formula = recurrences.wire_bytes(
    B, N, P, V, mesh=mesh, layout=layout, **kwargs
  )
  with_state = kwargs.pop('with_state', True)
  T = 96
  delta = kwargs.get('decay') == 'matrix'
  if delta:
    op, inputs = recurrences.gated_delta_rule, make_delta_inputs(T=T)
  else:
    op = functools.partial(
      recurrences.linear_attention, normalize='normalize' in kwargs
    )
    inputs = make_inputs(
      T=T, decay=kwargs.get('decay'), normalize='normalize' in kwargs
    )
  inputs = as_dtype(inputs, 'float32')
  if kwargs.get('packed'):
    inputs['segment_ids'] = jnp.zeros((B, T), jnp.int32)

  @jax.jit
  def run(inputs):
    out, state = op(**inputs, mesh=mesh, layout=layout, in_layout=True)
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
    recurrences.linear_attention(
      jnp.zeros((B, T, 2, 4)),
      k,
      k,
      mesh=make_mesh(data=2, seq=2, model=2),
      **call,
    )
