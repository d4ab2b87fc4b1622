"""The gated delta rule: chunks equal single steps, which equal the formula."""

import functools
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx.ops.recurrence.additive import linear_attention
from longctx.ops.recurrence.delta import (
  IMPLEMENTATIONS,
  gated_delta_rule,
  reference,
)
from longctx.ops.recurrence.delta.final_state import final_state
from longctx.ops.target import Target, compiling_for
from tests.tolerances import case_id, tolerance

CHUNKED = [name for name in IMPLEMENTATIONS if name != 'reference']


def make_inputs(
  T, *, B=2, N=2, K=2, P=4, V=3, decay=None, beta=None, keys='random'
):
  """Float64 arrays by name; keys of length one, beta in [0, 2]."""
  rng = np.random.default_rng(T)
  k = rng.normal(size=(B, T, K, P))
  if keys == 'parallel':
    k = k[:, :1] + 0.01 * k
  inputs = dict(
    q=rng.normal(size=(B, T, N, P)) / math.sqrt(P),
    k=k / np.linalg.norm(k, axis=-1, keepdims=True),
    v=rng.normal(size=(B, T, K, V)),
    beta=rng.uniform(0, 2, size=(B, T, N)),
    initial_state=rng.normal(size=(B, N, P, V)),
  )
  if beta is not None:
    inputs['beta'] = np.full((B, T, N), beta)
  if decay is not None:
    shape = (B, T, N, P) if decay == 'channel' else (B, T, N)
    # Cubed: most steps remember, some forget nearly all.
    inputs['log_decay'] = -8 * rng.uniform(size=shape) ** 3
  return inputs


def make_segments(B, T, documents=3):
  rng = np.random.default_rng(T)
  return jnp.asarray(
    np.sort(rng.integers(0, documents, size=(B, T))), jnp.int32
  )


@functools.partial(jax.jit, static_argnames=('chunk_size', 'implementation'))
def value_and_gradients(inputs, *, segment_ids=None, **kwargs):
  """(out, state) and the gradients of a fixed random sum of both."""
  results, vjp = jax.vjp(
    lambda x: gated_delta_rule(
      **x, segment_ids=segment_ids, scale=0.7, **kwargs
    ),
    inputs,
  )
  rng = np.random.default_rng(0)
  seeds = [jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in results]
  return results, vjp(tuple(seeds))[0]


run = jax.jit(
  gated_delta_rule, static_argnames=('scale', 'chunk_size', 'implementation')
)


def as_dtype(inputs, dtype):
  return {name: jnp.asarray(x, dtype) for name, x in inputs.items()}


def assert_trees_close(result, expected, **tolerances):
  """Compares leaf by leaf, errors in units of the largest entry."""
  for (path, x), y in zip(
    jax.tree.leaves_with_path(result), jax.tree.leaves(expected), strict=True
  ):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    size = max(1.0, np.abs(y).max())
    name = jax.tree_util.keystr(path)
    np.testing.assert_allclose(x / size, y / size, err_msg=name, **tolerances)


def case(
  T,
  dtype='float32',
  *,
  implementation='xla',
  chunk_size=16,
  segments=False,
  **kwargs,
):
  dims = {letter: kwargs[letter] for letter in 'NK' if letter in kwargs}
  name = case_id(T=T, C=chunk_size, dtype=dtype, **dims)
  extras = [kwargs.get('decay'), kwargs.get('keys'), segments and 'packed']
  if 'beta' in kwargs:
    extras.append(f'beta{kwargs["beta"]}')
  name = '-'.join([name, *filter(None, extras), implementation])
  return pytest.param(
    T, dtype, chunk_size, segments, kwargs, implementation, id=name
  )


kernel_case = functools.partial(case, implementation='pallas')


@pytest.mark.parametrize(
  ('T', 'dtype', 'chunk_size', 'segments', 'kwargs', 'implementation'),
  [
    case(1, decay='channel'),
    case(5, decay='head', segments=True, chunk_size=1),
    case(37, N=4, K=1, decay='head', segments=True),
    case(37, N=4, K=2, decay='channel', segments=True, chunk_size=12),
    case(70, decay='head', chunk_size=32),
    case(70, decay='channel', chunk_size=64),
    case(37, decay='channel', dtype='float64'),
    case(37, decay='head', segments=True, dtype='bfloat16'),
    case(37, N=4, K=2, beta=0.0),
    case(37, N=4, K=2, beta=1.0),
    case(37, N=4, K=2, beta=2.0),
    case(37, N=4, K=2, beta=1.0, keys='parallel'),
    case(37, N=4, K=2, beta=2.0, keys='parallel'),
    # One chunk that is mostly padding, and several.
    kernel_case(1, decay='channel'),
    kernel_case(70, N=2, K=1, decay='channel', segments=True, chunk_size=32),
    kernel_case(150, decay='head', chunk_size=128),
    kernel_case(37, decay='head', segments=True, dtype='bfloat16'),
    # More query heads share a key head than a step of the grid takes.
    kernel_case(37, N=8, K=1, beta=1.0),
    kernel_case(37, beta=2.0, keys='parallel'),
  ],
)
def test_implementation_equals_recurrence(
  T, dtype, chunk_size, segments, kwargs, implementation
):
  with jax.enable_x64(True):
    inputs = as_dtype(make_inputs(T, **kwargs), dtype)
    kwargs = dict(
      segment_ids=make_segments(2, T) if segments else None,
      chunk_size=chunk_size,
    )
    result = value_and_gradients(
      inputs, implementation=implementation, **kwargs
    )
    expected = value_and_gradients(
      as_dtype(inputs, 'float64'), implementation='reference', **kwargs
    )
  (out, state), _ = result
  assert out.dtype == dtype
  assert state.dtype == ('float64' if dtype == 'float64' else 'float32')
  assert_trees_close(result, expected, **tolerance(dtype))


@pytest.mark.parametrize('decay', [None, 'head', 'channel'])
def test_reference_equals_matrix_products(decay, x64):
  inputs = make_inputs(9, B=1, N=2, K=1, decay=decay)
  q, k, v, beta = (inputs[name][0] for name in ('q', 'k', 'v', 'beta'))
  out, state = run(
    **as_dtype(inputs, 'float64'), scale=0.5, implementation='reference'
  )
  log_decay = np.zeros_like(q)
  if decay is not None:
    log_decay += inputs['log_decay'][0].reshape(9, 2, -1)
  for n in range(2):
    memory = inputs['initial_state'][0, n]
    for t in range(9):
      erase = np.eye(4) - beta[t, n] * np.outer(k[t, 0], k[t, 0])
      memory = erase @ np.diag(np.exp(log_decay[t, n])) @ memory
      memory = memory + beta[t, n] * np.outer(k[t, 0], v[t, 0])
      expected = 0.5 * q[t, n] @ memory
      np.testing.assert_allclose(out[0, t, n], expected, **tolerance('float64'))
    np.testing.assert_allclose(state[0, n], memory, **tolerance('float64'))


@pytest.mark.parametrize('implementation', CHUNKED)
@pytest.mark.parametrize('decay', ['head', 'channel'])
def test_chunks_are_exact_for_extreme_decay(decay, implementation):
  patterns = [
    [-8.0],
    [-8.0] * 40 + [-1e-3] * 24,
    [-1e-3] * 40 + [-8.0] * 24,
    [-0.01, -np.inf, -0.1, -1e5, -1e-4],
    [-100.0, 0.0, 0.0],
    # From a decay of one down to e^-8 per step.
    [0.0],
    -8 * np.linspace(0, 1, 17),
    -8 * np.linspace(1, 0, 128),
    [0.01],
  ]
  log_decay = np.stack([np.resize(pattern, 128) for pattern in patterns])
  with jax.enable_x64(True):
    inputs = make_inputs(128, decay=decay, B=len(patterns))
    inputs['log_decay'] = np.broadcast_to(
      log_decay.reshape(-1, 128, *[1] * (inputs['log_decay'].ndim - 2)),
      inputs['log_decay'].shape,
    )
    inputs = as_dtype(inputs, 'float32')
    result = value_and_gradients(
      inputs, implementation=implementation, chunk_size=64
    )
    expected = value_and_gradients(
      as_dtype(inputs, 'float64'), implementation='reference'
    )
  for row in range(len(patterns)):
    assert_trees_close(
      *jax.tree.map(lambda x, row=row: x[row], (result, expected)),
      **tolerance('float32'),
    )


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_packed_documents_equal_separate_documents(implementation):
  # Documents of 8 steps, so that one compilation serves all when alone; the id
  # of the first comes back, as a new document all the same.
  inputs = as_dtype(make_inputs(32, B=1, decay='channel'), 'float32')
  initial_state = inputs.pop('initial_state')
  segment_ids = jnp.repeat(jnp.array([[1, 5, 1, 2]], jnp.int32), 8, axis=1)
  settings = dict(implementation=implementation, chunk_size=12)
  out, state = run(
    **inputs, segment_ids=segment_ids, initial_state=initial_state, **settings
  )
  for begin in range(0, 32, 8):
    document = {name: x[:, begin : begin + 8] for name, x in inputs.items()}
    alone, last_state = run(
      **document,
      initial_state=initial_state if begin == 0 else 0 * initial_state,
      **settings,
    )
    np.testing.assert_allclose(
      out[:, begin : begin + 8], alone, **tolerance('float32')
    )
  np.testing.assert_allclose(state, last_state, **tolerance('float32'))


@pytest.mark.parametrize('implementation', CHUNKED)
@pytest.mark.parametrize('decay', ['head', 'channel'])
def test_no_gradient_from_the_future_or_another_document(decay, implementation):
  inputs = as_dtype(make_inputs(24, B=1, decay=decay), 'float32')
  segment_ids = jnp.asarray([[0] * 3 + [1] * 8 + [2] * 13], jnp.int32)

  @jax.jit
  @jax.grad
  def gradients_of_step_17(inputs):
    out, _ = gated_delta_rule(
      **inputs,
      segment_ids=segment_ids,
      chunk_size=16,
      implementation=implementation,
    )
    return out[:, 17].sum()

  gradients = jax.tree.map(np.asarray, gradients_of_step_17(inputs))
  assert np.abs(gradients.pop('initial_state')).max() == 0
  first = dict(q=17, k=11, v=11, beta=11, log_decay=12)
  for name, gradient in gradients.items():
    seen = np.flatnonzero(np.abs(gradient).reshape(24, -1).sum(1))
    np.testing.assert_array_equal(seen, np.arange(first[name], 18), name)


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_two_halves_equal_the_whole(implementation):
  inputs = as_dtype(make_inputs(32, decay='head', N=4, K=2), 'float32')
  del inputs['initial_state']
  # The cut at 16 is inside the second document.
  inputs['segment_ids'] = jnp.asarray([[0] * 9 + [1] * 20 + [2] * 3] * 2)
  settings = dict(implementation=implementation, chunk_size=8)
  whole, last_state = run(**inputs, **settings)
  first, state = run(**{x: y[:, :16] for x, y in inputs.items()}, **settings)
  second, state = run(
    **{x: y[:, 16:] for x, y in inputs.items()},
    initial_state=state,
    **settings,
  )
  halves = jnp.concatenate([first, second], axis=1)
  np.testing.assert_allclose(halves, whole, **tolerance('float32'))
  np.testing.assert_allclose(state, last_state, **tolerance('float32'))


@pytest.mark.parametrize('decay', [None, 'channel'])
def test_final_state_equals_that_of_the_recurrence(decay):
  inputs = make_inputs(21, B=3, N=4, K=2, decay=decay)
  # One row is one document, one continues into others, one only begins.
  changes = np.zeros((3, 21), np.int32)
  changes[1, [4, 13]] = changes[2, 0] = 1
  segment_index = jnp.asarray(changes.cumsum(1))

  def last(q, initial_state, **inputs):
    del q
    factor, state = final_state(
      **inputs, segment_index=segment_index, chunk_size=8
    )
    return factor @ initial_state + state

  def expected(log_decay=None, **inputs):
    _, state = reference.gated_delta_rule(
      **inputs,
      log_decay=log_decay,
      scale=1.0,
      segment_index=segment_index,
      chunk_size=1,
    )
    return state

  def value_and_gradients(f, dtype):
    state, vjp = jax.vjp(jax.jit(lambda x: f(**x)), as_dtype(inputs, dtype))
    seed = np.random.default_rng(1).normal(size=state.shape)
    return state, vjp(jnp.asarray(seed, dtype))

  result = value_and_gradients(last, 'float32')
  with jax.enable_x64(True):
    exact = value_and_gradients(expected, 'float64')
  assert_trees_close(result, exact, **tolerance('float32'))


@pytest.mark.parametrize('chunk_size', [1, 7, 64])
def test_chunks_call_no_library(chunk_size):
  # Two LAPACK calls at a time can wait for each other's threads for ever.
  inputs = make_inputs(70, decay='head')

  def loss(inputs):
    out, _ = run(**inputs, chunk_size=chunk_size, implementation='xla')
    return out.sum()

  compiled = jax.jit(jax.grad(loss)).lower(inputs).compile()
  assert 'lapack' not in compiled.as_text()


def test_jit_changes_nothing():
  inputs = as_dtype(make_inputs(9, decay='head'), 'float32')
  settings = dict(scale=0.5, chunk_size=4)
  assert_trees_close(
    run(**inputs, **settings),
    gated_delta_rule(**inputs, **settings),
    **tolerance('float32'),
  )


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_beta_of_one_recalls_the_last_value_of_every_key(implementation):
  # Two rounds over the same orthogonal keys: what the first wrote is gone.
  rng = np.random.default_rng(0)
  k, _ = np.linalg.qr(rng.normal(size=(4, 4)))
  k = jnp.asarray(np.tile(k, (2, 1))[None, :, None], jnp.float32)
  v = jnp.asarray(rng.normal(size=(1, 8, 1, 3)), jnp.float32)
  _, state = run(
    k, k, v, jnp.ones((1, 8, 1)), implementation=implementation, chunk_size=4
  )
  recalled = jnp.einsum('BTNP,BNPV->BTNV', k[:, 4:], state)
  np.testing.assert_allclose(recalled, v[:, 4:], **tolerance('float32'))


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_beta_of_zero_writes_nothing(implementation):
  inputs = as_dtype(make_inputs(9, beta=0.0), 'float32')
  _, state = run(**inputs, implementation=implementation, chunk_size=4)
  np.testing.assert_array_equal(state, inputs['initial_state'])


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_orthogonal_keys_make_it_linear_attention(implementation):
  inputs = as_dtype(make_inputs(4, K=1, beta=1.0, decay='head'), 'float32')
  del inputs['initial_state']
  inputs['k'] = jnp.tile(jnp.eye(4)[None, :, None], (2, 1, 1, 1))
  beta = inputs.pop('beta')
  assert_trees_close(
    run(**inputs, beta=beta, implementation=implementation),
    linear_attention(**inputs),
    **tolerance('float32'),
  )


@pytest.mark.parametrize(
  ('mode', 'implementation', 'dtype'),
  [
    ('forward', 'xla', 'float64'),
    ('reverse', 'xla', 'float64'),
    ('forward', 'pallas', 'float32'),
  ],
)
def test_second_derivative_equals_that_of_the_recurrence(
  mode, implementation, dtype, x64
):
  inputs = as_dtype(make_inputs(7, B=1, decay='head'), 'float64')
  segment_ids = make_segments(1, 7)

  @functools.partial(jax.jit, static_argnums=1)
  def second(inputs, implementation):
    def loss(inputs):
      out, state = gated_delta_rule(
        **inputs,
        segment_ids=segment_ids,
        implementation=implementation,
        chunk_size=4,
      )
      return (out**2).sum() + (state**2).sum()

    direction = jax.tree.map(jnp.cos, inputs)
    if mode == 'forward':
      return jax.jvp(jax.grad(loss), (inputs,), (direction,))[1]
    _, vjp = jax.vjp(jax.grad(loss), inputs)
    return vjp(direction)[0]

  assert_trees_close(
    second(as_dtype(inputs, dtype), implementation),
    second(inputs, 'reference'),
    **tolerance(dtype),
  )


@pytest.mark.parametrize(
  ('platform', 'dtype', 'width', 'message'),
  [
    ('cpu', 'float64', 4, "q is float64, .* take 'xla' or None"),
    (
      'gpu',
      'float32',
      4,
      "a GPU: take 'xla' or None",
    ),
    ('tpu', 'float32', 513, 'P=513 and V=513 must be at most 512'),
  ],
)
def test_kernel_says_what_it_does_not_support(
  platform, dtype, width, message, x64
):
  x = jnp.zeros((1, 5, 2, width), dtype)
  run = functools.partial(gated_delta_rule, x, x, x, x[..., 0])
  with compiling_for(Target(platform, 'TPU v5')):
    with pytest.raises(NotImplementedError, match=message):
      run(implementation='pallas')
    assert 'pallas' not in str(jax.make_jaxpr(run)())


def test_kernel_is_what_tpus_take():
  x = jnp.zeros((1, 5, 2, 4))
  run = functools.partial(gated_delta_rule, x, x, x, x[..., 0])
  assert 'pallas' not in str(jax.make_jaxpr(run)())
  with compiling_for(Target('tpu', 'TPU v5')):
    assert 'pallas' in str(jax.make_jaxpr(lambda: run())())


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (dict(implementation='triton'), r"known: \['pallas', 'reference', 'xla'\]"),
    (dict(chunk_size=0), 'chunk_size=0 must be at least 1'),
    (dict(k=(1, 5, 3, 4), v=(1, 5, 3, 4)), 'N=4 query heads .* K=3 key heads'),
    (
      dict(q=(1, 0, 4, 4), k=(1, 0, 2, 4), v=(1, 0, 2, 4), beta=(1, 0, 4)),
      'has no steps',
    ),
    (dict(log_decay=(1, 5, 4, 1)), r'log_decay.shape=\(1, 5, 4, 1\) must be'),
    (dict(beta=(1, 5, 2)), r'beta.shape=\(1, 5, 2\) must be \(1, 5, 4\)'),
    (dict(initial_state=(1, 4, 4, 5)), r'must be \(1, 4, 4, 4\)'),
  ],
)
def test_wrong_call_says_what_to_change(change, message):
  call = dict(q=(1, 5, 4, 4), k=(1, 5, 2, 4), v=(1, 5, 2, 4), beta=(1, 5, 4))
  call = {
    name: jnp.zeros(x) if isinstance(x, tuple) else x
    for name, x in (call | change).items()
  }
  # A user has no type checker, whose error would come first here.
  unchecked = inspect.unwrap(gated_delta_rule)
  with pytest.raises(ValueError, match=message):
    unchecked(**call)
