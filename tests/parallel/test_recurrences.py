"""Recurrences on several devices equal the same recurrences on one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx.costs.hlo import collective_bytes
from longctx.parallel import recurrences
from longctx.parallel.layout import SequenceLayout
from longctx.parallel.mesh import make_mesh
from tests.ops.recurrence import cases
from tests.ops.recurrence.cases import OPS, as_dtype
from tests.tolerances import tolerance

B, T, N, K, P, V = 2, 37, 4, 2, 4, 3
BOTH = ('seq', 'model')
SHARDED = {
  'linear': recurrences.linear_attention,
  'delta': recurrences.gated_delta_rule,
}
rules = pytest.mark.parametrize('rule', OPS)


def make_inputs(rule='linear', T=T, *, initial=True, **kwargs):
  inputs = cases.make_inputs(rule, T, **(dict(B=B, N=N, K=K) | kwargs))
  if not initial:
    del inputs['initial_state']
  return inputs


def make_segments(layout):
  """A row that changes where spans begin, and one where they do not.

  The first has documents of several spans, of one and of two tokens; in the
  second an id comes back, and a document ends within a span.
  """
  ids = np.zeros((B, layout.seq_len), np.int32)
  C = layout.span_len
  for i, begin in enumerate((C, 2 * C, 2 * C + 2, 3 * C, 5 * C)):
    ids[0, begin:] = i + 1
  ids[1, 2:9], ids[1, 11:12] = 5, 7
  return jnp.asarray(ids)


def value_and_gradients(f, inputs):
  """(out, state) and the gradients of a fixed random sum of both."""
  return jax.jit(functools.partial(cases.value_and_gradients, f))(inputs)


def assert_equals_one_device(rule, inputs, place, **settings):
  """Compares out, state and gradients with those of the reference.

  Args:
    rule: a key of OPS.
    inputs: float64 arrays.
    place: where the recurrence runs, and how.
    **settings: of both.
  """
  result = value_and_gradients(
    lambda x: SHARDED[rule](**x, **place, **settings),
    as_dtype(inputs, 'float32'),
  )
  with jax.enable_x64(True):
    expected = value_and_gradients(
      lambda x: OPS[rule](**x, implementation='reference', **settings),
      as_dtype(inputs, 'float64'),
    )
  cases.assert_trees_close(result, expected, **tolerance('float32'))


def case(rule, layout, axis='seq', *, packed=False, T=T, **kwargs):
  axes = {x: kwargs.pop(x) for x in ('data', 'seq', 'model') if x in kwargs}
  name = [rule, *(f'{x}{size}' for x, size in axes.items()), layout, f'T{T}']
  name += [f'{x}-{y}' if x == 'decay' else x for x, y in kwargs.items() if y]
  name += ['packed'] * packed + ['two-axes'] * (axis == BOTH)
  return pytest.param(
    rule, axes, layout, axis, packed, T, kwargs, id='-'.join(name)
  )


@pytest.mark.parametrize(
  ('rule', 'axes', 'layout', 'axis', 'packed', 'T', 'kwargs'),
  [
    case('linear', 'zigzag', seq=1, decay='head', packed=True),
    case('linear', 'zigzag', seq=2, decay='head', packed=True),
    case('linear', 'contiguous', seq=3, decay='channel', packed=True),
    case(
      'linear', 'zigzag', seq=3, decay='head', normalize=True, initial=False
    ),
    case(
      'linear',
      'contiguous',
      seq=8,
      decay='channel',
      normalize=True,
      packed=True,
    ),
    case('linear', 'zigzag', seq=8, decay='head', packed=True),
    # Most spans are padding only.
    case('linear', 'zigzag', seq=8, T=5, decay='channel', K=1),
    case('linear', 'zigzag', data=2, seq=4, decay='head', packed=True),
    case(
      'linear', 'contiguous', seq=2, model=2, decay='channel', normalize=True
    ),
    case('linear', 'zigzag', BOTH, seq=2, model=3, decay='head', packed=True),
    case('linear', 'contiguous', BOTH, data=2, seq=2, model=2, normalize=True),
    case('delta', 'zigzag', seq=1, packed=True),
    case('delta', 'contiguous', seq=3, decay='head', packed=True),
    case('delta', 'zigzag', seq=8, decay='channel', packed=True),
    case('delta', 'zigzag', seq=8, T=5, decay='head', K=1, initial=False),
    case('delta', 'zigzag', BOTH, data=2, seq=2, model=2, decay='channel'),
    case('delta', 'contiguous', seq=2, model=2, packed=True),
  ],
)
def test_shards_equal_one_device(rule, axes, layout, axis, packed, T, kwargs):
  mesh = make_mesh(**axes)
  shards = mesh.size // axes.get('data', 1)
  shards = shards if axis == BOTH else axes['seq']
  layout = SequenceLayout(layout, T, shards)
  settings = {'normalize': True} if 'normalize' in kwargs else {}
  assert_equals_one_device(
    rule,
    make_inputs(rule, T, **kwargs),
    dict(mesh=mesh, axis=axis, layout=layout.name),
    scale=0.7,
    segment_ids=make_segments(layout) if packed else None,
    chunk_size=4,
    **settings,
  )


@rules
def test_kernels_of_shards_equal_one_device(rule):
  mesh = make_mesh(seq=2, model=2)
  assert_equals_one_device(
    rule,
    make_inputs(rule, decay='head'),
    dict(mesh=mesh, layout='zigzag', implementation='pallas'),
    scale=0.7,
    segment_ids=make_segments(SequenceLayout('zigzag', T, 2)),
    chunk_size=16,
  )


@pytest.mark.parametrize('layout', ['contiguous', 'zigzag'])
def test_strong_decay_is_exact_and_finite(layout):
  # Half of the steps forget all that any float32 holds.
  inputs = make_inputs(decay='channel')
  rng = np.random.default_rng(0)
  strong = rng.uniform(size=inputs['log_decay'].shape) < 0.5
  inputs['log_decay'][strong] = -100
  inputs['log_decay'][:, 5:30, 0] = -100
  inputs['log_decay'][:, 20, 1] = -np.inf
  place = dict(mesh=make_mesh(seq=4), layout=layout)
  assert_equals_one_device('linear', inputs, place)


@pytest.mark.parametrize(
  ('rule', 'name', 'packed', 'options'),
  [
    ('linear', 'contiguous', True, {'normalize': True}),
    ('linear', 'zigzag', True, {'normalize': True}),
    ('delta', 'zigzag', False, {}),
  ],
)
def test_padding_in_the_layout_changes_nothing(rule, name, packed, options):
  layout = SequenceLayout(name, T, 4)
  inputs = make_inputs(rule, decay='head', **options)
  inputs = as_dtype(inputs, 'float32')
  state = inputs.pop('initial_state')
  placed = {key: layout.apply(x, fill=-3.0) for key, x in inputs.items()}
  if packed:
    inputs['segment_ids'] = make_segments(layout)
    placed['segment_ids'] = layout.apply(inputs['segment_ids'], fill=-1.0)
  run = functools.partial(
    SHARDED[rule], mesh=make_mesh(seq=4), initial_state=state, **options
  )
  out, last_state = jax.jit(functools.partial(run, layout=name))(**inputs)
  placed_out, placed_state = jax.jit(
    functools.partial(run, layout=layout, in_layout=True)
  )(**placed)
  np.testing.assert_array_equal(layout.restore(placed_out), out)
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
  rule, decay = 'linear', kwargs.get('decay')
  if decay == 'matrix':
    rule, decay = 'delta', None
  options = {'normalize': True} if 'normalize' in kwargs else {}
  op = functools.partial(SHARDED[rule], **options)
  inputs = make_inputs(rule, 96, decay=decay, **options)
  inputs = as_dtype(inputs, 'float32')
  if kwargs.get('packed'):
    inputs['segment_ids'] = jnp.zeros((B, 96), jnp.int32)

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
